"""What comes of a training: the checkpoint, how it came about, and what is said of the run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold import report
from bnfold.commands.learning_data import LearningData
from bnfold.commands.shared import Report, new_report, percent, unread
from bnfold.outputs import add_file
from bnfold.runs import counted

if TYPE_CHECKING:
    from bnfold.training.train import TrainResult


def write_trained(
    args: argparse.Namespace,
    outputs: Sequence[Path],
    data: LearningData,
    result: TrainResult,
    processes: int,
) -> Report:
    """The checkpoint, and what is said about the run."""
    from bnfold.training.train import save_checkpoint

    done = new_report("train", args, ())
    head = ["epoch", "loss", "accuracy %", "test loss", "test accuracy %", "s"]
    rows = [
        [
            e.epoch,
            f"{e.loss:.4f}",
            percent(e.accuracy),
            "-" if e.test_loss is None else f"{e.test_loss:.4f}",
            percent(e.test_accuracy),
            f"{e.seconds:.1f}",
        ]
        for e in result.history
    ]
    done["layers"] = {"head": head, "rows": rows}
    done["warnings"] = unread(result.unread)
    done["summary"] = _summary(args, data, result, processes)
    metrics = _figures(result) | {"epochs": args.epochs, "seed": args.seed}
    metrics["run"] = about_run(args, data) | {"processes": processes}
    for path in outputs:
        save_checkpoint(
            path,
            result.module,
            model_spec=args.factory,
            example_input=data.example,
            metrics=metrics,
        )
        add_file(done, "checkpoint", path)
    return done


def _summary(
    args: argparse.Namespace, data: LearningData, result: TrainResult, processes: int
) -> str:
    said = f"Trained on {data.name} for {counted(args.epochs, 'epoch')}"
    said += f" in {processes} processes." if processes > 1 else "."
    if result.test_accuracy is not None:
        said += f" Test accuracy {percent(result.test_accuracy)} %"
        chosen = f", by which epoch {result.epoch} was chosen" if args.keep == "best" else ""
        if result.moving is not None:  # the epochs were scored with these
            said += f" ({percent(result.moving[1])} % with moving averages{chosen})"
            chosen = ""
        said += f" on {data.test_name}{chosen}"
        said += ": on other data expect less." if args.keep == "best" else "."
    return said


def _figures(result: TrainResult) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "test_accuracy": result.test_accuracy,
        "test_loss": result.test_loss,
        "epoch": result.epoch,
    }
    if result.moving is not None:
        figures["with_moving_averages"] = {
            "test_loss": result.moving[0],
            "test_accuracy": result.moving[1],
        }
    return figures


_RECORDED = (
    *("norm", "batch_size", "samples", "seed", "epochs", "optimizer", "lr", "schedule"),
    *("weight_decay", "momentum", "label_smoothing", "clip_norm", "amp", "augment", "statistics"),
    *("keep", "device"),
)
_PREPARATION = ("mean", "std", "resize", "input_scale", "channels", "preprocess")


def about_run(args: argparse.Namespace, data: LearningData) -> dict[str, Any]:
    """The run in words and numbers, as JSON: all that it takes to repeat it."""
    from bnfold.training.settings import defaults_of

    about: dict[str, Any] = {name: getattr(args, name) for name in _RECORDED}
    rates = defaults_of(args.optimizer, args.lr, args.weight_decay, args.momentum)
    about["momentum"] = rates[2]
    about |= {
        "model": args.factory,
        "arguments": dict(args.arguments),
        "norm_options": args.norm_options,
        "data": data.name,
        "test_data": data.test_name,
        "preprocessing": {name: getattr(args, name) for name in _PREPARATION},
        "versions": report.versions(),
    }
    if data.classes:
        about["classes"] = list(data.classes)
    loaded: dict[str, Any] = json.loads(json.dumps(about, default=str))
    return loaded
