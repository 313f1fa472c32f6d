"""What re-estimating statistics costs, over a plain eval forward of the same batches.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/measure_adaptation_cost.py [--repeats N] [NAME ...]
    OMP_NUM_THREADS=1 .venv/bin/python scripts/measure_adaptation_cost.py --memory

In one process, interleaved, after a warm-up: the plain forward, `fast`, `exact` and torch's own
update_bn, each once per repeat; medians. Processor time, all threads of the process together, is
what the ratios are of: on a machine that does other work too, the wall clock says little (it is
printed beside). `--memory`: the peak of a plain forward and of `exact` that spills, each in a
process of its own, for 1, 4 and 16 times as many images.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from bnfold.adapting.module_network import is_batch_norm  # noqa: E402
from bnfold.measuring import modules  # noqa: E402
from bnfold.measuring.estimate import Progress  # noqa: E402
from bnfold.measuring.feed import Feed  # noqa: E402
from models.mobilenet_v2 import mobilenet_v2  # noqa: E402
from models.resnet import resnet18  # noqa: E402
from models.resnet_cifar import resnet20  # noqa: E402

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # size, images in all
    "resnet20": (resnet20, 32, 512),
    "resnet18": (resnet18, 96, 128),
    "mobilenet_v2": (mobilenet_v2, 96, 128),
}
SIZES = (16, 32)
ROOM = 1 << 40  # bytes that the time of `exact` is measured with
MEMORY = ("resnet18", 16, 32 << 20)  # network, batch size, room of `exact`
IMAGES = (64, 256, 1024)


def plain(net: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """A forward in eval mode: what everything is measured against."""
    for batch in batches:
        net(batch)


def estimate(method: str) -> Callable[[nn.Module, Iterable[torch.Tensor]], None]:
    """`fast` or `exact`, without the copies and checks that `adapt` makes around it."""

    def run(net: nn.Module, batches: Iterable[torch.Tensor]) -> None:
        layers = {name: layer for name, layer in net.named_modules() if is_batch_norm(layer)}
        feed = Feed(net, batches, forward=None, max_bytes=0)
        progress = Progress(None, feed, len(layers), diagnose=False)
        if method == "fast":
            modules.fast(net, layers, feed, progress)
        else:
            modules.exact(net, layers, feed, progress, max_bytes=ROOM)

    return run


def update_bn(net: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """torch.optim.swa_utils.update_bn, as its documentation calls it."""
    torch.optim.swa_utils.update_bn(batches, net)


WAYS = {
    "plain": plain,
    "fast": estimate("fast"),
    "exact": estimate("exact"),
    "update_bn": update_bn,
}


def measure(name: str, size: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds of each way: of the processor, and on the clock; medians."""
    make, width, count = NETWORKS[name]
    torch.manual_seed(0)
    nets = {way: copy.deepcopy(make()).eval() for way in WAYS}
    batches = list(torch.randn(count, 3, width, width).split(size))
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for repeat in range(-1, repeats):
        for way, run in WAYS.items():
            nets[way].eval()
            clock, processor = time.perf_counter(), time.process_time()
            with torch.no_grad():
                run(nets[way], batches)
            spent = time.process_time() - processor, time.perf_counter() - clock
            if repeat >= 0:  # the first one warms up
                times[way].append(spent)
    return {
        way: (statistics.median(t[0] for t in all_), statistics.median(t[1] for t in all_))
        for way, all_ in times.items()
    }


class Images:
    """Batches that are made as they are asked for, so that none is held by whoever made it."""

    def __init__(self, count: int, size: int, width: int) -> None:
        self.count, self.size, self.width = count, size, width

    def __iter__(self) -> Iterator[torch.Tensor]:
        rng = torch.Generator().manual_seed(0)
        for _ in range(0, self.count, self.size):
            yield torch.randn(self.size, 3, self.width, self.width, generator=rng)


def peak(method: str, images: int) -> None:
    """Print how much memory a way takes at most, in a process of its own."""
    name, size, room = MEMORY
    make, width, _ = NETWORKS[name]
    torch.manual_seed(0)
    net, batches = make().eval(), Images(images, size, width)
    with torch.no_grad():
        net(next(iter(batches)))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = time.perf_counter()
        if method == "plain":
            plain(net, batches)
            told = ""
        else:
            layers = {name: layer for name, layer in net.named_modules() if is_batch_norm(layer)}
            feed = Feed(net, batches, forward=None, max_bytes=0)
            progress = Progress(None, feed, len(layers), diagnose=False)
            found = modules.exact(net, layers, feed, progress, max_bytes=room)
            told = f", {found.spilled >> 20} MiB on disk, {found.passes} passes"
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{method}, {images} images: peak {now >> 10} MiB, {now - before >> 10} MiB more than one"
        f" forward{told}, {time.perf_counter() - seconds:.1f} s",
        flush=True,
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--peak", nargs=2, metavar=("WAY", "IMAGES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(options.peak[0], int(options.peak[1]))
        return
    if options.memory:
        print(f"{MEMORY[0]}, batches of {MEMORY[1]}; exact may hold {MEMORY[2] >> 20} MiB")
        for method in ("plain", "exact"):
            for images in IMAGES:
                command = [sys.executable, __file__, "--peak", method, str(images)]
                subprocess.run(command, check=True)
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; plain forward = 1,")
    print("processor time (wall clock); aims: fast 1.15, exact 1.4, both below update_bn")
    for name in options.names:
        for size in SIZES:
            found = measure(name, size, options.repeats)
            unit = found["plain"]
            ratios = [
                f"{way} {found[way][0] / unit[0]:.2f} ({found[way][1] / unit[1]:.2f})"
                for way in WAYS
                if way != "plain"
            ]
            print(
                f"{name}, batches of {size}: plain {unit[0]:.2f} s; {', '.join(ratios)}", flush=True
            )


if __name__ == "__main__":
    main()
