"""How small domain packs are, and what it costs to swap them in a running service.

    .venv/bin/python scripts/measure_packs.py [--runs N] [NAME=MODEL.onnx ...]

Random weights and statistics where no model is given: neither size nor time depends on them. All
on one thread of the CPU, medians of N runs, which take turns. "swap": a pack that was not in use
yet, from its file on disk (read and checked, weights computed, a session made); "back": one of
those kept ready; "anew": the adapted model's own file, loaded by onnxruntime; "refold alone": what
the weights of a folded base would cost without the shortcut. In brackets: in inferences of one
image.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import bnfold  # noqa: E402
from bnfold.adapting.base import open_base  # noqa: E402
from bnfold.adapting.folded import fold_again  # noqa: E402
from bnfold.graph import write_onnx  # noqa: E402
from bnfold.measuring.statistics import Statistics  # noqa: E402
from bnfold.packs.deployment import load  # noqa: E402
from bnfold.packs.pack import Pack  # noqa: E402
from models.resnet import resnet18  # noqa: E402
from models.resnet_cifar import resnet20  # noqa: E402

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (resnet20, 32),
    "resnet18": (resnet18, 224),
}

RESNET50 = 4 * 25_557_032  # bytes of its parameters


def resnet50_norms() -> nn.Module:
    """The 53 batch norms of a ResNet-50 under torchvision's names: all that its pack depends on."""
    found = {"bn1": 64}
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            found |= {f"{at}.bn1": width, f"{at}.bn2": width, f"{at}.bn3": 4 * width}
        found[f"layer{stage}.0.downsample.1"] = 4 * width
    root = nn.Module()
    for name, size in found.items():
        at = root
        *parents, leaf = name.split(".")
        for parent in parents:
            if parent not in at._modules:
                at.add_module(parent, nn.Module())
            at = at.get_submodule(parent)
        at.add_module(leaf, nn.BatchNorm2d(size))
    return with_statistics(root)


def with_statistics(module: nn.Module) -> nn.Module:
    """The module with statistics as training leaves them, none of them equal."""
    generator = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2.0, generator=generator)
    return module.eval()


def write_models(given: list[str], folder: Path) -> dict[str, Path]:
    """Each network as ONNX."""
    found = dict(text.split("=", 1) for text in given)
    if found:
        return {name: Path(path) for name, path in found.items()}
    paths = {}
    for name, (factory, size) in NETWORKS.items():
        torch.manual_seed(0)
        paths[name] = folder / f"{name}.onnx"
        bnfold.export(with_statistics(factory()), torch.zeros(1, 3, size, size), paths[name])
    return paths


def write_packs(base: Path, count: int, folder: Path) -> list[Path]:
    """Packs with other statistics for every batch norm."""
    network, paths = open_base(base), []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        moved = {
            name: Statistics(
                held.mean + rng.normal(size=held.mean.size) * np.sqrt(held.var) / 3,
                held.var * rng.uniform(0.5, 2, held.var.size),
            )
            for name, held in network.layers.items()
        }
        paths.append(folder / f"{base.stem}.{seed}.pack")
        Pack.of(moved, base=network, method="exact", images=1000, data=f"{seed}").save(paths[-1])
    return paths


def anew(path: Path) -> onnxruntime.InferenceSession:
    """A file as onnxruntime loads it; one thread, else as it has them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def timed(what: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Milliseconds, and what came."""
    begun = time.perf_counter()
    found = what(*arguments)
    return 1e3 * (time.perf_counter() - begun), found


def measure(base: Path, packs: list[Path], folder: Path) -> list[str]:
    """The figures of one base."""
    service, network = load(base, keep=2, threads=1), open_base(base)
    image = anew(base).get_inputs()[0]
    sizes = [n if isinstance(n, int) else 1 for n in image.shape]
    feeds = {image.name: np.random.default_rng(0).standard_normal(sizes).astype(np.float32)}
    adapted = folder / "adapted.onnx"
    swaps, backs, runs, loads, plans = ([] for _ in range(5))
    same = True
    for path in packs:
        swaps.append(timed(service.swap, path)[0])
        found = service.run(feeds)
        runs.append(timed(service.run, feeds)[0])
        pack = service.pack
        assert pack is not None
        service.swap(None)
        backs.append(timed(service.swap, pack)[0])
        if network.back is not None:
            plans.append(timed(fold_again, network.back, pack.statistics)[0])
        write_onnx(pack.applied(network).model, adapted)
        took, session = timed(anew, adapted)
        loads.append(took)
        expected = session.run(None, feeds)
        same &= all(np.array_equal(a, b) for a, b in zip(found.values(), expected, strict=True))
    once = statistics.median(runs)

    def shown(times: list[float]) -> str:
        if not times:
            return "-"
        middle = statistics.median(times)
        return f"{middle:.1f} ({middle / once:.1f})"

    return [
        f"{once:.1f}",
        shown(swaps),
        shown(backs),
        shown(loads),
        f"{statistics.median(swaps) / statistics.median(loads):.2f}",
        shown(plans),
        "bit for bit" if same else "NO",
    ]


def write_small(folder: Path) -> None:
    """The row of a ResNet-50, of which only the size is asked."""
    module, path = resnet50_norms(), folder / "resnet50.pack"
    network = open_base(module)
    found = {n: Statistics(held.mean, held.var) for n, held in network.layers.items()}
    Pack.of(found, base=network, method="exact", images=1000, data="0").save(path)
    size, channels = path.stat().st_size, sum(new.mean.size for new in found.values())
    print(
        f"| resnet50 | {channels} | {RESNET50 / 1e6:.2f} MB | {size / 1e3:.1f} kB"
        f" | {100 * size / RESNET50:.2f} % |"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("models", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = write_models(args.models, folder)
        packs = {name: write_packs(path, args.runs, folder) for name, path in models.items()}
        print("| network | channels | base | pack | of the base |")
        print("| --- | --- | --- | --- | --- |")
        for name, path in models.items():
            size, whole = packs[name][0].stat().st_size, path.stat().st_size
            channels = sum(held.mean.size for held in open_base(path).layers.values())
            print(
                f"| {name} | {channels} | {whole / 1e6:.2f} MB | {size / 1e3:.1f} kB"
                f" | {100 * size / whole:.2f} % |"
            )
        write_small(folder)
        head = ["network", "base", "one image, ms", "swap", "back", "anew", "swap / anew"]
        head += ["refold alone", "outputs equal"]
        print(f"\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
        for name, path in models.items():
            folded = folder / f"{name}.folded.onnx"
            command = ["fold", path, "-o", folded, "--no-verify", "-q"]
            subprocess.run(
                [sys.executable, "-m", "bnfold", *map(str, command)],
                check=True,
                stdout=subprocess.DEVNULL,
                cwd=ROOT,
            )
            for what, base in (("unfolded", path), ("folded", folded)):
                print(f"| {name} | {what} | {' | '.join(measure(base, packs[name], folder))} |")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
