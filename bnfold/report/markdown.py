"""The report as Markdown: for a pull request, or the summary of a CI job."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bnfold.errors import UsageError
from bnfold.report.facts import all_printable
from bnfold.report.tables import Table, tables

LONG = 20  # rows from which a table is folded away behind its title
SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


def to_markdown(report: Mapping[str, Any]) -> str:
    """Every table in full; the long ones open on a click."""
    report = all_printable(report)
    if "error" in report and "summary" not in report:
        heading = f"# bnfold {report.get('command', '')}".rstrip()
        return "\n".join([heading, "", f"**Error.** {_cell(report['error']['message'])}", ""])
    lines = [f"# bnfold {report['command']}", "", _cell(report["summary"]), ""]
    for table in tables(report):
        lines += _section(table)
    lines += [f"- note: {_cell(note)}" for note in report.get("notes", ())]
    lines += [f"- warning: {_cell(note)}" for note in report.get("warnings", ())]
    made = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join([*lines, "", f"Made with {made}.", ""])


def _section(table: Table) -> list[str]:
    rows = markdown_table(table.rows, table.head)
    if len(table.rows) > LONG:
        opening = f"<details><summary>{len(table.rows)} rows</summary>"
        rows = [opening, "", *rows, "", "</details>"]
    return [f"## {table.title}", "", *rows, ""]


def markdown_table(rows: Iterable[Sequence[str]], head: Sequence[str]) -> list[str]:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *(list(row) for row in rows)]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\`*_[]|":  # of names that hold what Markdown would read
        escaped = escaped.replace(sign, f"\\{sign}")
    return escaped.replace("\n", " ")


def check_step_summary() -> Path:
    """The file that GitHub shows as the job's summary. Raises UsageError where there is none."""
    path = os.environ.get(SUMMARY_VARIABLE)
    if not path:
        raise UsageError(
            f"--github appends to the file that ${SUMMARY_VARIABLE} names, and it is not set:"
            " this is no GitHub job; use --report FILE.md."
        )
    return Path(path)


def append_step_summary(path: Path, markdown: str) -> None:
    """Append to the job's summary. Raises UsageError where the file cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(markdown + "\n")
    except OSError as error:
        raise UsageError(f"--github: {path} cannot be written: {error.strerror}.") from error
