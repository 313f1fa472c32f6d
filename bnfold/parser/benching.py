"""`bnfold bench` and `doctor`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bnfold.parser.demands import add_demands
from bnfold.parser.shared import Verbs, add_model, add_report, add_runtimes, add_source, runtime
from bnfold.proof.places.runtimes import DEFAULT, RUNTIMES


def bench(verbs: Verbs) -> None:
    """`bnfold bench ORIGINAL [FOLDED ...]`."""
    bench = verbs.add_parser(
        "bench", help="time a network, its fold and what other tools make of it, in turn"
    )
    add_model(bench, "original")
    bench.add_argument(
        "folded",
        type=Path,
        nargs="*",
        metavar="FOLDED",
        help="others to time (default: the fold, made on the way)",
    )
    group = bench.add_argument_group("what is timed")
    group.add_argument(
        "--compare",
        type=_words,
        default=(),
        metavar="TOOL[,TOOL]",
        help="what these make of the original, too: onnxsim, onnxslim",
    )
    add_runtimes(group, f"{', '.join(RUNTIMES)} (default {DEFAULT})")
    group.add_argument(
        "--batch-size", dest="batch_sizes", type=_counts, metavar="N[,N]", help="default 1"
    )
    group.add_argument("--threads", type=int, default=1, metavar="N", help="of a run (default 1)")
    group.add_argument(
        "--rounds", type=int, default=200, metavar="N", help="of each model at most (default 200)"
    )
    group.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="for all models on one runtime with one batch size (default 10)",
    )
    group.add_argument("--seed", type=int, default=0, help="of inputs and order (default 0)")
    group.add_argument(
        "--unoptimized",
        action="store_true",
        help="the original with onnxruntime's own optimization off, too",
    )
    group.add_argument(
        "--no-verify", action="store_true", help="time without proof that it is one function"
    )
    add_source(bench)
    add_demands(bench)
    add_report(bench)


def doctor(verbs: Verbs) -> None:
    """`bnfold doctor`."""
    doctor = verbs.add_parser("doctor", help="what is installed, and which runtimes really run")
    doctor.add_argument(
        "--runtime",
        dest="runtimes",
        action="append",
        type=runtime,
        metavar="NAME",
        help="exit with 4 where this one cannot run; repeat for several",
    )
    add_report(doctor)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _counts(text: str) -> tuple[int, ...]:
    """`1,8`."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of batch sizes") from None
