"""Faults planted into folds of whole networks: how often `verify` names batch norm and fault.

    .venv/bin/python scripts/measure_causes.py [--seed N] [FOLDER OF REAL DATA]

A wrong fold is a right fold of a wrong original. For every network and every fault one of its
folded batch norms is drawn, and the wrong fold is held against the right original: with the right
fold's record, without one, and as onnxsim folds it, of a model without any batch norm's name.
A fault that no gate sees is counted as passed and is no failure of what is measured here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxsim
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import realdata  # noqa: E402
from fault_nets import FAULTS, in_training, inputs, narrowed  # noqa: E402
from nets import with_statistics  # noqa: E402

import bnfold  # noqa: E402
from bnfold.graph import to_proto  # noqa: E402
from models.densenet import densenet_bc  # noqa: E402
from models.mobilenet_v2 import mobilenet_v2_small  # noqa: E402
from models.preact_resnet import preact_resnet20  # noqa: E402
from models.resnet import resnet18  # noqa: E402
from models.unet import unet  # noqa: E402
from models.vgg import vgg11  # noqa: E402

PLANTED = (
    *("eps dropped", "eps 1e-3 for 1e-5", "one gamma off by 1e-3", "two channels swapped"),
    *("variance x 0.999", "mean's sign"),
)
REAL = {"resnet20": (3, 32, 32), "mnist_cnn": (1, 28, 28), "mnist_resnet": (1, 28, 28),
        "mnist_mlp": (784,), "dncnn": (1, 24, 24)}  # fmt: skip


def networks(data: Path) -> dict[str, onnx.ModelProto]:
    """Real checkpoints where there are any, and architectures with statistics that are drawn."""
    made: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    if data.is_dir():
        for name, shape in REAL.items():
            made[name] = realdata.load_model(data, name), shape
    torch.manual_seed(0)
    for factory, shape in ((mobilenet_v2_small, (3, 64, 64)), (preact_resnet20, (3, 32, 32)),
                           (densenet_bc, (3, 32, 32)), (unet, (1, 32, 32)),
                           (vgg11, (3, 32, 32)), (resnet18, (3, 48, 48))):  # fmt: skip
        made[factory.__name__] = with_statistics(factory(), positive=True), shape
    return {
        name: to_proto(bnfold.export(module, torch.zeros(2, *shape)))
        for name, (module, shape) in made.items()
    }


def bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the names of its values."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    ends = {value.name for value in (*copy.graph.input, *copy.graph.output)}
    made = {name for node in copy.graph.node for name in node.output} - ends
    names = {name: f"v{at}" for at, name in enumerate(sorted(made))}
    for node in copy.graph.node:
        for part in (node.input, node.output):
            part[:] = [names.get(name, name) for name in part]
    del copy.graph.value_info[:]
    return copy


def told(original: onnx.ModelProto, wrong: onnx.ModelProto, norm: str, fault: str,
         record: Any = None) -> str:  # fmt: skip
    """What verify makes of a wrong fold."""
    report = bnfold.verify(original, wrong, inputs(original), record=record)
    if report.passed:
        return "passed"
    cause = report.cause
    if cause is None:
        return "gate A alone"  # the outputs agree: the fault does not reach them
    if norm not in (cause.norm, *cause.others):
        return "another layer"
    if cause.norm != norm:
        return "among others"
    return "layer and fault" if cause.fault == fault else "layer alone"


def main() -> int:
    """Print a row for each network."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    print("| network | fold | layer and fault | layer alone | among others | another layer |"
          " gate A alone | passed | s |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, original in networks(args.data).items():
        fold = bnfold.fold(original)
        norms = [norm.name for norm in fold.folded]
        tallies: dict[str, Counter[str]] = {way: Counter() for way in ("record", "bare", "onnxsim")}
        missed, begun = [], time.perf_counter()
        for planted in (*PLANTED, "float16 weights", "training mode"):
            norm = norms[rng.integers(len(norms))]
            for way, (wrong, fault, record) in spoiled(original, fold, norm, planted).items():
                verdict = told(original, wrong, norm, fault, record)
                tallies[way][verdict] += 1
                if verdict not in ("layer and fault", "gate A alone", "passed"):
                    missed.append(f"{way}: {planted} at {norm}: {verdict}")
        for way, tally in tallies.items():
            cells = (*("layer and fault", "layer alone", "among others", "another layer"),
                     *("gate A alone", "passed"))  # fmt: skip
            row = " | ".join(str(tally[cell]) for cell in cells)
            print(f"| {name} | {way} | {row} | {time.perf_counter() - begun:.0f} |", flush=True)
        for line in missed:
            print(f"|  | {line} |", flush=True)
    return 0


def spoiled(original: onnx.ModelProto, fold: bnfold.FoldResult, norm: str, planted: str
            ) -> dict[str, tuple[onnx.ModelProto, str, Any]]:  # fmt: skip
    """The wrong folds of a fault: way -> (model, what is to be told, record)."""
    if planted == "training mode":
        kept = bnfold.fold(original, keep=[norm])
        wrong = in_training(kept.model, norm)
        return {"record": (wrong, planted, kept.record), "bare": (bare(wrong), planted, None)}
    if planted == "float16 weights":
        into = next(n.into for n in fold.folded if n.name == norm)
        wrong = fold.model
        for layer in into:
            wrong = narrowed(wrong, np.float16, f"{layer}.weight")
        return {"record": (wrong, planted, fold.record), "bare": (bare(wrong), planted, None)}
    spoil, fault, _ = FAULTS[planted]
    wrong = spoil(original, norm)
    folded = bnfold.fold(wrong).model
    return {
        "record": (folded, fault, fold.record),
        "bare": (bare(folded), fault, None),
        "onnxsim": (bare(onnxsim.simplify(wrong)[0]), fault, None),
    }


if __name__ == "__main__":
    sys.exit(main())
