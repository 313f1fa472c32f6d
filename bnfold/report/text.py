"""The report for a terminal: the summary last, where the eye is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bnfold.report.facts import printable
from bnfold.report.tables import tables


def to_text(report: Mapping[str, Any], *, verbose: bool = False) -> str:
    """The report in aligned columns; the long tables in full only if asked for."""
    if "error" in report and "summary" not in report:
        return printable(f"{report['error']['message']}")
    lines: list[str] = []
    for table in tables(report):
        rows = table.rows if verbose or table.brief is None else table.brief
        if not rows:
            continue
        left = len(table.rows) - len(rows)
        more = f" ({len(rows)} of {len(table.rows)}, -v shows all)" if left else ""
        title = table.title if table.title == "Batch norms" else table.title + more
        lines += [f"{title}:", *("  " + line for line in aligned(rows, table.head)), ""]
    lines += [f"note: {note}" for note in report.get("notes", ())]
    lines += [f"warning: {note}" for note in report.get("warnings", ())]
    lines.append(report["summary"])
    return printable("\n".join(lines))


def aligned(rows: Iterable[Sequence[str]], head: Sequence[str]) -> list[str]:
    """Aligned columns under a head."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    ]
    return [line.rstrip() for line in (text[0], "  ".join("-" * w for w in widths), *text[1:])]
