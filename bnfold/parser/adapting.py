"""`bnfold adapt`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bnfold.parser.demands import add_demands
from bnfold.parser.shared import (
    Verbs,
    add_data,
    add_model,
    add_output,
    add_proof,
    add_report,
    add_source,
)


def adapt(verbs: Verbs) -> None:
    """`bnfold adapt MODEL`."""
    adapt = verbs.add_parser(
        "adapt",
        help="re-estimate the statistics on a target domain",
        description="The model with the batch-norm statistics of the target's own samples, no"
        " labels needed. A folded model comes back folded, through its fold record.",
    )
    add_model(adapt)
    add_data(adapt, "--target-data", "samples of the target domain", required=True)
    adapt.add_argument(
        "--source-data",
        metavar="DATA",
        help="samples of the source domain: bring each layer to the mean and deviation that it had"
        " on these; without batch norms and record, the only way",
    )
    adapt.add_argument(
        "--test-data", metavar="DATA", help="labelled samples: accuracy before and after"
    )
    group = adapt.add_argument_group("estimate")
    group.add_argument(
        "--method",
        choices=("exact", "fast"),
        default="exact",
        help="exact: each layer behind adapted ones, over the whole set; fast: one pass",
    )
    group.add_argument(
        "--layers",
        action="append",
        metavar="PATTERN",
        help="adapt the batch norms of this name, shell-style; with ! in front: all but these;"
        " repeat for several",
    )
    group.add_argument(
        "--up-to", metavar="NAME|K", help="only those up to this one in the forward, or the first K"
    )
    group.add_argument(
        "--part",
        choices=("both", "mean", "var"),
        default="both",
        help="adapt both statistics (default) or one",
    )
    group.add_argument(
        "--prior",
        type=_prior,
        default=0.0,
        metavar="N|auto",
        help="let the source count as N images beside the n of the target, w = N / (N + n);"
        " auto: as far as chance explains the difference",
    )
    group.add_argument(
        "--source-weight", type=float, metavar="W", help="share of the source, 0 to 1, fixed"
    )
    group.add_argument(
        "--mixture",
        action="store_true",
        help="blended variances hold the difference of the means too",
    )
    group.add_argument(
        "--stop",
        type=float,
        metavar="TOL",
        help="read only until statistics move by less than TOL standard deviations",
    )
    group.add_argument(
        "--precision",
        type=float,
        default=0.1,
        metavar="P",
        help="images are counted as enough for +-P standard deviations (default 0.1)",
    )
    group.add_argument(
        "--max-memory",
        type=int,
        metavar="MIB",
        help="for activations of batches that wait; beyond it they go to disk (TMPDIR)",
    )
    group.add_argument("--state", type=Path, metavar="FILE", help="resume from here if interrupted")
    group.add_argument(
        "--device", metavar="DEVICE", help="of a torch network: cpu (default) or cuda"
    )
    group.add_argument(
        "--backend",
        choices=("gloo", "nccl"),
        default="gloo",
        help="by which torchrun's processes talk (default gloo)",
    )
    group.add_argument(
        "--no-verify", action="store_true", help="write a folded model without proof"
    )
    group.add_argument(
        "--record", type=Path, metavar="FILE", help="of a folded model (default beside)"
    )
    add_output(adapt, "adapted model (default NAME.adapted beside the input, same suffix)")
    adapt.add_argument("--pack", type=Path, metavar="FILE", help="also write a domain pack")
    add_source(adapt)
    add_proof(adapt, precision=False)
    add_demands(adapt)
    add_report(adapt)


def _prior(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of images, nor auto") from None
