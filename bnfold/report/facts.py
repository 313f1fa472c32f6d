"""What a report is made of: plain values, the versions in use, the hashes of files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from bnfold.jsonable import plain
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
    """The report as one JSON document; numbers that JSON has no word for become strings.

    In ASCII, which every terminal can show; so is half a surrogate pair, of a file's name that is
    no UTF-8.
    """
    return json.dumps(plain(report), indent=2, allow_nan=False)


def number(value: Any) -> float:
    """A figure of a report as a number again; NaN for one that is missing."""
    return math.nan if value is None else float(value)


def printable(text: str) -> str:
    """The text with control characters spelled out: names from a file may hold anything.

    Those that turn the direction of writing are among them.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def all_printable(value: Any) -> Any:
    """The same of every text in a report, keys included."""
    if isinstance(value, Mapping):
        return {printable(str(key)): all_printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [all_printable(item) for item in value]
    return printable(value) if isinstance(value, str) else value
