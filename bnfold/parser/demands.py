"""The options of pipelines: what is a failure besides a failed gate, and how long it may take."""

from __future__ import annotations

import argparse


def add_demands(parser: argparse.ArgumentParser, *, folds: bool = False) -> None:
    """What a pipeline asks for beyond the gates; folds: of a verb that plans a fold."""
    group = parser.add_argument_group("pipelines")
    group.add_argument("--strict", action="store_true", help="a warning is a failure: exit code 1")
    group.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="run in a process of its own, and end it after so long: exit code 4",
    )
    if folds:
        group.add_argument(
            "--require-fold",
            type=_count,
            metavar="N|all",
            help="exit code 1, and no file, where fewer batch norms fold",
        )


def _count(text: str) -> int | str:
    if text == "all":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of batch norms, nor all")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds above 0")
    return seconds
