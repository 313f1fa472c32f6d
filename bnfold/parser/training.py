"""`bnfold train`."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

from bnfold.parser.shared import Verbs, add_data, add_output, add_report


def train(verbs: Verbs) -> None:
    """`bnfold train SPEC`."""
    train = verbs.add_parser(
        "train",
        help="train a network with batch normalization or a variant",
        description="Train a classifier; the checkpoint describes itself, so that it folds,"
        " adapts and exports without another word. In several processes: torchrun"
        " --nproc-per-node=N -m bnfold train ..., each with --batch-size samples of a step.",
    )
    train.add_argument(
        "factory",
        metavar="SPEC",
        help="the network: path.py:name, pkg.mod:name, torchvision:NAME or timm:NAME",
    )
    add_data(train, "--data", "training samples with labels", required=False)
    train.set_defaults(data="digits")
    _add_network(train)
    _add_training(train)
    _add_run(train)
    add_output(train, "checkpoint, .pt (default NAME.pt here)")
    add_report(train)


def _setting(text: str) -> tuple[str, Any]:
    """`num_classes=10`: a name and a JSON value, or a text where it is no JSON."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"'{text}' is no setting; write NAME=VALUE")
    with contextlib.suppress(ValueError):
        return name, json.loads(value)
    return name, value


def _add_network(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("network")
    group.add_argument(
        "--set",
        dest="arguments",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the factory, such as num_classes=10; repeat for several",
    )
    group.add_argument(
        "--norm",
        metavar="KIND",
        help="normalisation in place of every batch norm: batch, renorm, ghost, mean-only, weight,"
        " weight-mean-only, normprop, frozen, sync, none",
    )
    group.add_argument(
        "--norm-set",
        dest="norm_options",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the normalisation: ghost_size=16 (ghost), r_max=3 and d_max=5 (renorm;"
        " reached over the run), log_scale=true (weight), gain=1, pooling=true and input=null"
        " (normprop; null: the data are normalised already), momentum=0.1, eps=1e-5; repeat for"
        " several",
    )
    group.add_argument(
        "--statistics",
        choices=("moving", "exact"),
        default="moving",
        help="of the trained network: moving averages (default), or exactly those of the training"
        " set, measured after training",
    )


def _add_training(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("training")
    group.add_argument(
        "--test-data", metavar="DATA", help="samples to measure on (of a known data set: its test)"
    )
    group.add_argument(
        "--channels",
        type=int,
        choices=(1, 3),
        help="read images as grey (1) or colour (3); default as the first one is stored",
    )
    group.add_argument(
        "--download", action="store_true", help="let torchvision fetch a data set that is not there"
    )
    group.add_argument("--epochs", type=int, default=10, metavar="N", help="default 10")
    group.add_argument(
        "--optimizer",
        choices=("sgd", "adam", "adamw", "rmsprop"),
        default="sgd",
        help="default sgd, with Nesterov momentum",
    )
    group.add_argument(
        "--schedule",
        choices=("onecycle", "cosine", "constant"),
        default="onecycle",
        help="of the learning rate (default onecycle)",
    )
    group.add_argument(
        "--lr",
        type=float,
        metavar="RATE",
        help="peak learning rate (default sgd 0.1, or 0.01 with --norm weight, weight-mean-only and"
        " normprop; others 3e-3)",
    )
    group.add_argument(
        "--weight-decay", type=float, metavar="W", help="default sgd 5e-4, adamw 1e-2, others 0"
    )
    group.add_argument(
        "--momentum", type=float, metavar="M", help="of sgd (default 0.9) and rmsprop (default 0)"
    )
    group.add_argument(
        "--label-smoothing", type=float, default=0.0, metavar="S", help="default 0, none"
    )
    group.add_argument(
        "--clip-norm", type=float, metavar="N", help="the most that the gradients' norm may be"
    )
    group.add_argument(
        "--augment", metavar="path.py:fn", help="your function, batch of inputs -> other ones"
    )
    group.add_argument("--amp", action="store_true", help="forward in bfloat16 where torch can")
    group.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    group.add_argument(
        "--backend",
        choices=("gloo", "nccl"),
        help="by which torchrun's processes talk (default nccl on cuda, else gloo)",
    )
    group.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read ahead (default 0)"
    )
    group.add_argument(
        "--keep",
        choices=("last", "best"),
        default="last",
        help="the last epoch's network (default), or the best one's on the test data (with moving"
        " averages)",
    )


def _add_run(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("run")
    group.add_argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="the run's state after each epoch (default NAME.state beside the checkpoint, gone when"
        " the run is complete)",
    )
    group.add_argument("--resume", action="store_true", help="go on with the run of the state file")
    group.add_argument(
        "--log-file", type=Path, metavar="FILE", help="one JSON object per epoch (.jsonl)"
    )
    group.add_argument("--tensorboard", type=Path, metavar="DIR", help="curves for TensorBoard")
    group.add_argument(
        "--log-every",
        type=int,
        metavar="N",
        help="also every N steps in --log-file and --tensorboard",
    )
