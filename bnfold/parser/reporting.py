"""`bnfold report`."""

from __future__ import annotations

from pathlib import Path

from bnfold.parser.shared import Verbs, add_telling


def report(verbs: Verbs) -> None:
    """`bnfold report RUN.json ...`."""
    report = verbs.add_parser(
        "report",
        help="several runs' reports on one page",
        description="Of what other verbs printed with --json (a fold, an adaptation, a benchmark)"
        " one page to look at and to keep with a release. Exit code 0 means that it was written,"
        " whatever it says.",
    )
    report.add_argument(
        "runs", type=Path, nargs="*", metavar="RUN.json", help="what --json printed"
    )
    report.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of these files instead"
    )
    group = report.add_argument_group("output")
    group.add_argument(
        "-o",
        "--output",
        dest="outputs",
        type=Path,
        action="append",
        metavar="PAGE",
        help="the page: .html, .md, .xml (JUnit), .json or .txt; repeat for several",
    )
    group.add_argument(
        "--github",
        dest="to_github",
        action="store_true",
        help="append them as Markdown to the job's summary, $GITHUB_STEP_SUMMARY",
    )
    add_telling(report)
