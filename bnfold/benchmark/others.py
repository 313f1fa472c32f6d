"""What other optimisers make of an ONNX file, each through its own public command.

They run in a process of their own: what they print, how they end and what they do to the folder
they run in is theirs.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bnfold.errors import RuntimeUnavailableError, UsageError

SECONDS = 1200.0

Command = Callable[[Path, Path], list[str]]

# name -> the arguments behind `python`; each takes the default settings
OTHERS: Mapping[str, Command] = {
    "onnxsim": lambda source, target: ["-m", "onnxsim", str(source), str(target)],
    "onnxslim": lambda source, target: ["-m", "onnxslim", str(source), str(target)],
}


def check_others(names: Sequence[str]) -> None:
    """Refuse what is not known (UsageError) or not installed (RuntimeUnavailableError)."""
    unknown = [name for name in names if name not in OTHERS]
    if unknown:
        raise UsageError(f"'{unknown[0]}' is not compared with; there are {', '.join(OTHERS)}.")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeUnavailableError(
            f"{missing[0]} is to be compared with and is not installed; pip install {missing[0]},"
            " or leave it out of --compare."
        )


def made_by(name: str, source: Path, target: Path) -> str:
    """Let `name` write `target`; a sentence why there is none, else "".

    An exit code alone says little: one of them writes the file before it fails, another ends well
    without one.
    """
    command = [sys.executable, *OTHERS[name](source.resolve(), target.resolve())]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, cwd=target.parent
        )
    except subprocess.TimeoutExpired:
        return f"{name} was not done within {SECONDS:.0f} s."
    said = " ".join((run.stderr.strip() or run.stdout.strip() or "it said nothing").split())
    if run.returncode:
        return f"{name} ended with exit code {run.returncode}: {said[-300:]}"
    if not target.is_file():
        return f"{name} wrote no file: {said[-300:]}"
    return ""
