"""`bnfold report`: several runs' reports on one page."""

from __future__ import annotations

import argparse

from bnfold import report as faces
from bnfold.commands.shared import Report, new_report
from bnfold.errors import UsageError
from bnfold.outputs import add_file
from bnfold.report.markdown import append_step_summary, check_step_summary
from bnfold.report.schema import read_runs
from bnfold.report.verdict import verdict_of
from bnfold.runs import counted


def report(args: argparse.Namespace) -> Report:
    """`bnfold report RUN.json ... -o PAGE`: read them all, then write each page."""
    outputs = args.outputs or []
    if not args.runs:
        raise UsageError("name the reports, files that --json printed.")
    if not outputs and not args.to_github:
        raise UsageError("name the page with -o, for instance -o release.html.")
    read = {path.resolve() for path in args.runs}
    for path in outputs:
        faces.check_face("-o", path)
        if path.resolve() in read:
            raise UsageError(f"-o {path} would replace a report that is read; name another file.")
    step_summary = check_step_summary() if args.to_github else None
    runs = [run for path in args.runs for run in read_runs(path)]
    done = new_report("report", args, ())
    for path in args.runs:
        add_file(done, "run", path)
    for path in outputs:
        faces.write_text(path, faces.render(runs, path))
        add_file(done, "page", path)
    if step_summary is not None:
        append_step_summary(step_summary, "\n".join(faces.to_markdown(run) for run in runs))
    told = ", ".join(f"{run.get('command', 'a run')}: {verdict_of(run).word}" for run in runs)
    done["summary"] = f"{counted(len(runs), 'run')}. {told}."
    return done
