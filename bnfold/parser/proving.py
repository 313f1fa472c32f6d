"""`bnfold export`, `verify` and `parity`."""

from __future__ import annotations

from pathlib import Path

from bnfold.parser.demands import add_demands
from bnfold.parser.shared import (
    Parser,
    Verbs,
    add_data,
    add_model,
    add_output,
    add_proof,
    add_report,
    add_source,
)

_DATA = "inputs to compare on (default: drawn; an .npz may hold an array for each input)"


def export(verbs: Verbs) -> None:
    """`bnfold export MODEL`."""
    export = verbs.add_parser("export", help="export a torch model to ONNX, unfolded, and prove it")
    add_model(export)
    add_output(export, "the ONNX file (default beside the input)")
    export.add_argument("--no-verify", action="store_true", help="write without proof")
    add_source(export)
    add_proof(export)
    add_report(export)


def verify(verbs: Verbs) -> None:
    """`bnfold verify ORIGINAL FOLDED`."""
    verify = verbs.add_parser("verify", help="prove that two models are the same function")
    add_model(verify, "original")
    add_model(verify, "folded")
    verify.add_argument("--record", type=Path, metavar="FILE", help="fold record (default beside)")
    verify.add_argument(
        "--bisect",
        type=Path,
        nargs="?",
        const=Path("bisect"),
        metavar="FOLDER",
        help="where a gate fails: reduce the fold to the batch norm that breaks it, and write the"
        " smallest models that show it (default folder: bisect)",
    )
    _add_profile(verify)
    add_data(verify, "--data", _DATA, required=False)
    add_source(verify)
    add_proof(verify)
    add_demands(verify)
    add_report(verify)


def parity(verbs: Verbs) -> None:
    """`bnfold parity MODEL`."""
    parity = verbs.add_parser("parity", help="prove that runtimes compute the same of one model")
    add_model(parity)
    _add_profile(parity)
    add_data(parity, "--data", _DATA, required=False)
    add_source(parity)
    add_proof(parity)
    add_demands(parity)
    add_report(parity)


def _add_profile(parser: Parser) -> None:
    parser.add_argument(
        "--profile",
        action="store_true",
        help="measure the error at every former batch norm (an .html report shows it)",
    )
