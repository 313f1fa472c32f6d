"""`bnfold train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bnfold.commands.shared import Report, new_report, open_samples, percent, progress_bar
from bnfold.errors import UsageError
from bnfold.outputs import (
    add_file,
    check_outputs,
)


def train(args: argparse.Namespace) -> Report:
    """`bnfold train SPEC --data DATA`: a network trained, in a checkpoint that describes itself."""
    import torch

    from bnfold.reading.factory import build_module
    from bnfold.training.train import save_checkpoint
    from bnfold.training.train import train as fit

    outputs = args.outputs or [Path(f"{args.factory.rpartition(':')[2]}.pt")]
    check_outputs(outputs, None, args.overwrite, (".pt", ".pth"))
    data = _labelled(args, args.data)
    tests = _labelled(args, args.test_data) if args.test_data else None
    torch.manual_seed(args.seed)
    module = build_module(args.factory)
    with progress_bar(args, "training") as progress:
        result = fit(
            module,
            data,
            test_data=tests,
            epochs=args.epochs,
            batch_size=args.batch_size,
            optimizer=args.optimizer,
            lr=args.lr,
            schedule=args.schedule,
            weight_decay=args.weight_decay,
            seed=args.seed,
            device=args.device,
            checkpoint=args.checkpoint,
            resume=args.resume,
            progress=progress,
        )
    done = new_report("train", args, ())
    rows = [
        [e.epoch, f"{e.loss:.4f}", f"{100 * e.accuracy:.2f}", percent(e.test_accuracy)]
        for e in result.history
    ]
    done["layers"] = {"head": ["epoch", "loss", "accuracy %", "test accuracy %"], "rows": rows}
    done["summary"] = f"Trained for {args.epochs} epochs."
    if result.test_accuracy is not None:
        done["summary"] += f" Test accuracy {percent(result.test_accuracy)} %."
    example = torch.as_tensor(data[0][:1] if isinstance(data, tuple) else next(iter(data))[0][:1])
    figures = {"test_accuracy": result.test_accuracy, "epochs": args.epochs, "seed": args.seed}
    for path in outputs:
        save_checkpoint(
            path, result.module, model_spec=args.factory, example_input=example, metrics=figures
        )
        add_file(done, "checkpoint", path)
    return done


def _labelled(args: argparse.Namespace, spec: str) -> Any:
    """Samples and labels as two arrays, or the batches (x, y) that a factory gives."""
    import numpy as np

    data = open_samples(args, spec)
    if data.labels is None:
        first = next(iter(data))
        if isinstance(first, list | tuple) and len(first) == 2:
            return data
        raise UsageError(f"{spec} holds no labels; training needs them (array y in .npz).")
    return np.concatenate(list(data)), data.labels
