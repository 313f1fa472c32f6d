"""How large fold records are beside the weights, and what it costs that they undo every bit.

    .venv/bin/python scripts/measure_records.py [MODEL.onnx ...]

Random weights and statistics where none are given: the size depends on the shapes. "to rounding" is
the record without what makes it bit for bit: inverse gauges and the batch norms' own vectors.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import bnfold  # noqa: E402
from models.mobilenet_v2 import mobilenet_v2  # noqa: E402
from models.preact_resnet import preact_resnet18  # noqa: E402
from models.resnet import resnet18  # noqa: E402
from models.resnet_cifar import resnet20  # noqa: E402

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": resnet20,
    "resnet18": resnet18,
    "preact_resnet18": preact_resnet18,
    "mobilenet_v2": mobilenet_v2,
}


def with_statistics(module: nn.Module) -> nn.Module:
    """The module with statistics as training leaves them, none of them equal."""
    generator = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for vector, low, high in (
                (norm.running_mean, -1.0, 1.0),
                (norm.running_var, 0.5, 2.0),
                (norm.weight.data, 0.3, 1.5),
                (norm.bias.data, -0.5, 0.5),
            ):
                assert vector is not None
                vector.copy_(torch.rand(vector.shape, generator=generator) * (high - low) + low)
    return module.eval()


def folds(paths: list[str]) -> Iterator[tuple[str, bnfold.FoldResult]]:
    """Each network and its fold."""
    for path in paths:
        yield Path(path).stem, bnfold.fold(path)
    for name, factory in NETWORKS.items() if not paths else ():
        torch.manual_seed(0)
        module = with_statistics(factory())
        size = 32 if name == "resnet20" else 64
        yield name, bnfold.fold(module, torch.zeros(1, 3, size, size))


def size_of(record: object, folder: Path) -> int:
    """The bytes of a record's file."""
    path = folder / "record.safetensors"
    record.save(path)  # type: ignore[attr-defined]
    return path.stat().st_size


def main() -> None:
    """Print the table."""
    print("| network | batch norms | weights | to rounding | bit for bit | seconds to unfold |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name, result in folds(sys.argv[1:]):
            graph = result.original.graph
            weights = sum(v.const_value.nbytes for v in graph.initializers.values())
            undo = result.record.undo
            empty = {
                key: replace(
                    told, upper=told.upper[:0], places=told.places[:0], fixes=told.fixes[:0]
                )
                for key, told in undo.told.items()
            }
            coarse = replace(result.record, undo=replace(undo, told=empty))
            rough, exact = (size_of(record, Path(folder)) for record in (coarse, result.record))
            begun = time.process_time()
            bnfold.unfold(result.graph, result.record)
            seconds = time.process_time() - begun
            print(
                f"| {name} | {len(result.folded)} | {weights / 1e6:.2f} MB"
                f" | {rough / 1e3:.1f} kB ({100 * rough / weights:.2f} %)"
                f" | {exact / 1e3:.1f} kB ({100 * exact / weights:.2f} %) | {seconds:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
