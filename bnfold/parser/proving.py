"""`bnfold export`, `verify`, `parity` and `doctor`."""

from __future__ import annotations

from pathlib import Path

from bnfold.parser.shared import (
    Verbs,
    add_data,
    add_model,
    add_output,
    add_proof,
    add_report,
    add_source,
)


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
    add_data(verify, "--data", "inputs to compare on (default: drawn)", required=False)
    add_source(verify)
    add_proof(verify)
    add_report(verify)


def parity(verbs: Verbs) -> None:
    """`bnfold parity MODEL`."""
    parity = verbs.add_parser("parity", help="prove that runtimes compute the same of one model")
    add_model(parity)
    add_data(parity, "--data", "inputs to compare on (default: drawn)", required=False)
    add_source(parity)
    add_proof(parity)
    add_report(parity)


def doctor(verbs: Verbs) -> None:
    """`bnfold doctor`."""
    doctor = verbs.add_parser("doctor", help="what is installed, and which providers really load")
    add_report(doctor)
