"""The command line's verbs and options; light, so that `bnfold --help` answers at once."""

from __future__ import annotations

import argparse

from bnfold.parser import adapting, benching, folding, packs, proving, reporting, training
from bnfold.parser.shared import Parser

EXIT_CODES = """exit codes:
  0  good (nothing to fold included)
  1  a gate failed: not the same function; or a demand (--strict, --require-fold) was not met
  2  wrong usage
  3  input unreadable, unsupported or unsafe
  4  a runtime that was asked for cannot run here, or time or memory ran out
  5  nothing was compared
  70 a fault of bnfold's own
  130 interrupted
"""
# in the order that the help lists them
VERBS = (
    folding.fold,
    folding.unfold,
    adapting.adapt,
    packs.pack,
    proving.export,
    proving.verify,
    proving.parity,
    folding.inspect,
    training.train,
    benching.bench,
    reporting.report,
    benching.doctor,
)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="bnfold",
        description="Fold batch normalization into the neighbouring weights, adapt its statistics"
        " to a target domain, export ONNX, and prove that nothing changed.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="the versions in use")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for add in VERBS:
        add(verbs)
    return parser
