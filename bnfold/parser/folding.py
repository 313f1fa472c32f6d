"""`bnfold fold`, `unfold` and `inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bnfold.parser.demands import add_demands
from bnfold.parser.shared import (
    Verbs,
    add_model,
    add_output,
    add_proof,
    add_report,
    add_source,
    numbers,
)


def fold(verbs: Verbs) -> None:
    """`bnfold fold MODEL`."""
    fold = verbs.add_parser("fold", help="fold a model's batch norms, prove it, write it")
    add_model(fold)
    add_output(
        fold,
        "folded model: .onnx, .pt or .safetensors (the network's own class), .pt2 (a graph module);"
        " default beside the input",
    )
    fold.add_argument(
        "--record", type=Path, metavar="FILE", help="fold record (default beside OUT)"
    )
    fold.add_argument("--no-verify", action="store_true", help="write without proof")
    fold.add_argument("--dry-run", action="store_true", help="plan only, write nothing")
    fold.add_argument(
        "--bisect",
        type=Path,
        nargs="?",
        const=Path("bisect"),
        metavar="FOLDER",
        help="where a gate fails: find the fewest batch norms whose folding fails, and write the"
        " smallest models that show it (default folder: bisect)",
    )
    _add_folding(fold)
    add_source(fold)
    add_proof(fold)
    add_demands(fold, folds=True)
    add_report(fold)


def unfold(verbs: Verbs) -> None:
    """`bnfold unfold FOLDED`."""
    unfold = verbs.add_parser(
        "unfold",
        help="give back the network that was folded",
        description="From a folded model and its fold record: the network that was folded, its"
        " batch norms, its graph and every weight bit for bit. Proved before it is written.",
    )
    add_model(unfold, "folded")
    add_output(unfold, "unfolded model (default NAME.unfolded beside the input, same suffix)")
    unfold.add_argument("--record", type=Path, metavar="FILE", help="fold record (default beside)")
    unfold.add_argument("--no-verify", action="store_true", help="write without proof")
    add_source(unfold)
    add_proof(unfold)
    add_demands(unfold)
    add_report(unfold)


def inspect(verbs: Verbs) -> None:
    """`bnfold inspect MODEL`."""
    inspect = verbs.add_parser("inspect", help="where each batch norm would go, or why it stays")
    add_model(inspect)
    _add_folding(inspect)
    add_source(inspect)
    add_demands(inspect, folds=True)
    add_report(inspect)


def _add_folding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("folding")
    group.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keep the batch norms of this name, parameters and statistics unchanged, so that they"
        " can be tuned or re-estimated; shell-style (layer1.*), repeat for several",
    )
    group.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="fold the batch norms of this name and keep the others unchanged",
    )
    group.add_argument(
        "--repair",
        dest="repairs",
        choices=("clamp", "pad", "border", "all"),
        action="append",
        default=[],
        help="allow an exact repair where a batch norm would stay: Relu as Max and Min (clamp), a"
        " Pad in front of a padded convolution where one number does (pad), a constant map behind"
        " it (border); it may be slower than the batch norm (docs/results/repairs.md)",
    )
    group.add_argument(
        "--clean-up",
        dest="clean_up",
        choices=("pad", "conv-chain", "dead-channels", "all"),
        action="append",
        default=[],
        help="simplify besides: a Pad with zeros becomes the convolution's own (pad), a 1x1"
        " convolution of a convolution one of both where that costs no more (conv-chain), channels"
        " that are constant or unread go (dead-channels); ONNX only, repeat for several",
    )
    group.add_argument(
        "--input-mean",
        type=numbers,
        metavar="M,M,M",
        help="the network is fed (x - mean) / std: fold that into it, so that it takes x itself",
    )
    group.add_argument("--input-std", type=numbers, metavar="S,S,S", help="see --input-mean")
    group.add_argument(
        "--input-name", metavar="NAME", help="the input of --input-mean, where there are several"
    )
