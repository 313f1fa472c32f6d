"""Which face a file's name asks for."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnfold.errors import UsageError
from bnfold.report.facts import SCHEMA, to_json
from bnfold.report.markdown import to_markdown
from bnfold.report.text import to_text

Run = Mapping[str, Any]
MARKDOWN, PAGES = (".md", ".markdown"), (".html", ".htm")
SUFFIXES = (".html", ".htm", ".md", ".markdown", ".xml", ".json", ".txt")


def render(runs: Run | Sequence[Run], path: Path) -> str:
    """One run, or several, in the format that a file's suffix names; text for any other."""
    runs = [runs] if isinstance(runs, Mapping) else runs
    suffix = path.suffix.lower()
    if suffix in PAGES:
        from bnfold.report.html import to_html

        return to_html(runs)
    if suffix == ".xml":
        from bnfold.report.junit import to_junit

        return to_junit(runs)
    if suffix == ".json":
        return to_json(runs[0] if len(runs) == 1 else {"schema": SCHEMA, "runs": runs}) + "\n"
    if suffix in MARKDOWN:
        return "\n".join(to_markdown(run) for run in runs)
    return "\n\n".join(to_text(run, verbose=True) for run in runs) + "\n"


def check_face(option: str, path: Path) -> None:
    """Refuse a report that could not be written. Raises UsageError."""
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}, or it is a folder.")
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{option} {path}: the suffix must be .html, .md, .xml (JUnit), .json or .txt."
        )


def pictured(args: Namespace) -> bool:
    """True where the error of each layer is to be measured: for a page, or asked for by name."""
    asked = getattr(args, "report", None) or ()
    return bool(getattr(args, "profile", False)) or any(
        path.suffix.lower() in PAGES for path in asked
    )
