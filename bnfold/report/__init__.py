"""One report, several faces: a dictionary of plain values, rendered as text, Markdown or JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bnfold.version import VERSION

SCHEMA = 1
_TOGETHER = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")


def versions() -> dict[str, str]:
    """The versions of bnfold and of what it stands on, as installed."""
    found = {"bnfold": VERSION}
    for name in _TOGETHER:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(report: Mapping[str, Any]) -> str:
    """The report as one JSON document; numbers that JSON has no word for become strings."""
    return json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if hasattr(value, "item"):
        return _plain(value.item())
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def printable(text: str) -> str:
    """The text with control characters spelled out: names from a file may hold anything."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def table(rows: Iterable[Sequence[str]], head: Sequence[str]) -> list[str]:
    """Aligned columns under a head, for a terminal."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    ]
    return [line.rstrip() for line in (text[0], "  ".join("-" * w for w in widths), *text[1:])]


def markdown_table(rows: Iterable[Sequence[str]], head: Sequence[str]) -> list[str]:
    """The same as a Markdown table."""
    lines = [list(head), ["---"] * len(head), *(list(row) for row in rows)]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("|", "\\|").replace("\n", " ")


def sections(report: Mapping[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """The report's tables: (title, head, rows)."""
    found: list[tuple[str, Sequence[str], list[list[str]]]] = []
    norms = report.get("batch_norms")
    if norms:
        rows = [[n["name"], "folded", ", ".join(n["into"]) or "-"] for n in norms["folded"]]
        rows += [[n["name"], "stays", n["reason"]] for n in norms["kept"]]
        found.append(("Batch norms", ("batch norm", "", "into, or the reason why it stays"), rows))
    merged = report.get("merged")
    if merged:
        rows = [[m["into"], ", ".join(m["layers"]) or "-", m["sum"]] for m in merged]
        found.append(("Merged", ("convolution", "took in", "and writes"), rows))
    operators = report.get("operators")
    if operators:
        before, after = operators["before"], operators["after"]
        names = sorted({*before, *after}, key=lambda n: (-before.get(n, 0), n))
        rows = [[n, str(before.get(n, 0)), str(after.get(n, 0))] for n in names]
        found.append(("Operators", ("operator", "before", "after"), rows))
    for title, key in (("Layers", "layers"), ("Accuracy", "accuracy"), ("Output", "diagnostics")):
        part = report.get(key)
        if part:
            found.append((title, part["head"], [[str(c) for c in row] for row in part["rows"]]))
    gates = report.get("gates")
    if gates:
        rows = [
            [g["gate"], g["subject"], "pass" if g["passed"] else "FAIL", g["sentence"]]
            for g in gates
        ]
        found.append(("Proof", ("gate", "of", "", "measured"), rows))
    files = report.get("files")
    if files:
        rows = [[f["role"], f["path"], f.get("sha256", "")[:16]] for f in files]
        found.append(("Files", ("", "path", "sha256 (first 16)"), rows))
    return found


def to_text(report: Mapping[str, Any], *, verbose: bool = False) -> str:
    """The report for a terminal: the summary last, the long tables only if asked for."""
    lines: list[str] = []
    for title, head, rows in sections(report):
        if title in ("Operators", "Merged") and not verbose:
            continue
        shown = rows
        if title == "Batch norms" and not verbose:
            shown = [row for row in rows if row[1] == "stays"]
        if not shown:
            continue
        lines += [f"{title}:", *("  " + line for line in table(shown, head)), ""]
    lines += [f"note: {note}" for note in report.get("notes", ())]
    lines += [f"warning: {note}" for note in report.get("warnings", ())]
    lines.append(report["summary"])
    return printable("\n".join(lines))


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown, every table in full."""
    lines = [f"# bnfold {report['command']}", "", _cell(report["summary"]), ""]
    for title, head, rows in sections(report):
        lines += [f"## {title}", "", *markdown_table(rows, head), ""]
    lines += [f"- note: {_cell(note)}" for note in report.get("notes", ())]
    lines += [f"- warning: {_cell(note)}" for note in report.get("warnings", ())]
    made = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join([*lines, "", f"Made with {made}.", ""])


def render(report: Mapping[str, Any], path: Path) -> str:
    """The report in the format that a file's suffix names: .json, .md, or text for any other."""
    if path.suffix.lower() == ".json":
        return to_json(report) + "\n"
    if path.suffix.lower() in (".md", ".markdown"):
        return to_markdown(report)
    return to_text(report, verbose=True) + "\n"
