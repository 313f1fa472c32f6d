"""The files that a report goes to: checked before any work, written at its end, good or bad.

An error is written too. A CI server that reads the file would otherwise find the last run's there,
and that one may have been a success.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfold.errors import UsageError
from bnfold.report.faces import check_face, render
from bnfold.report.markdown import append_step_summary, check_step_summary, to_markdown

_MODELS = ("model", "original", "folded", "record", "adapted", "base", "pack", "other")


@dataclass(frozen=True)
class Reports:
    """What `--report` and `--github` ask for. step_summary: the file that GitHub shows."""

    files: tuple[Path, ...] = ()
    step_summary: Path | None = None

    @classmethod
    def asked(cls, args: Namespace) -> Reports:
        """Checked: each can be written, and none would replace a model. Raises UsageError."""
        files = tuple(getattr(args, "report", None) or ())
        named = [getattr(args, name, None) for name in _MODELS]
        taken = [*named, *(getattr(args, "outputs", None) or ())]
        others = {path.resolve() for path in taken if isinstance(path, Path)}
        for path in files:
            check_face("--report", path)
            if path.resolve() in others:
                raise UsageError(f"--report {path} would replace {path}; name another file.")
        return cls(files, check_step_summary() if getattr(args, "github", False) else None)

    def write(self, run: Mapping[str, Any]) -> None:
        """Write a run, or the error that ended it, to all of them. Raises UsageError."""
        for path in self.files:
            write_text(path, render(run, path))
        if self.step_summary is not None:
            append_step_summary(self.step_summary, to_markdown(run))


def write_text(path: Path, text: str) -> None:
    """Write a report, replacing an older one. Raises UsageError."""
    from bnfold.graph import replacing

    with replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")
