"""What a training step of each kind of normalization costs, over one with torch's batch norm.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/measure_training_cost.py

It prints the page docs/results/training_cost.md. A step is forward, loss, backward and an SGD
update on one batch of random images. The kinds take turns, one step each per round, in one process;
a ratio is that of a step to the step with batch norm of the same round, so that what else the
machine does falls on both. `batch` runs twice: the second one shows what a ratio is worth. On a CPU
the time is the processor's, of all threads; on CUDA (`--device cuda`) the clock's, with the device
waited for.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from bnfold.errors import BnfoldError  # noqa: E402
from bnfold.norm import KINDS, Clipping, convert  # noqa: E402
from models.mobilenet_v2 import mobilenet_v2  # noqa: E402
from models.resnet_cifar import resnet20  # noqa: E402

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # width of an image, batch size
    "resnet20": (resnet20, 32, 64),
    "mobilenet_v2": (mobilenet_v2, 64, 32),
}
AGAIN = "batch, again"
SHOWN = {  # what is not the kind's own default
    "renorm": {"schedule": Clipping.fixed(3, 5)},
    "ghost": {"ghost_size": 16},
}


class Run:
    """A network in training, and how long its steps took."""

    def __init__(self, network: nn.Module, batch: torch.Tensor) -> None:
        self.network, self.batch = network.to(batch.device), batch
        self.classes = torch.arange(len(batch), device=batch.device) % 10
        self.optimiser = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)
        self.seconds: list[float] = []

    def step(self) -> None:
        """One step, timed."""
        start = now(self.batch.device)
        self.optimiser.zero_grad()
        functional.cross_entropy(self.network(self.batch), self.classes).backward()
        self.optimiser.step()
        self.seconds.append(now(self.batch.device) - start)


def now(device: torch.device) -> float:
    """Seconds: of the processor, or where a device does the work, of the clock."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def runs(name: str, device: str) -> tuple[dict[str, Run], dict[str, str]]:
    """A run of each kind from the same weights, and why there is none of others."""
    make, width, size = NETWORKS[name]
    batch = torch.randn(size, 3, width, width, generator=torch.Generator().manual_seed(0))
    made, refused = {}, {}
    for kind in (*KINDS, AGAIN):
        torch.manual_seed(0)
        try:
            network = convert(make(), kind.removesuffix(", again"), **SHOWN.get(kind, {}))
        except BnfoldError as error:
            refused[kind] = str(error)
            continue
        made[kind] = Run(network.train(), batch.to(device))
    return made, refused


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower one, the median, the upper one."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def table(name: str, device: str, rounds: int, warm_up: int = 3) -> str:
    """Markdown: milliseconds and ratios of each kind."""
    made, refused = runs(name, device)
    for done in range(warm_up + rounds):
        if done == warm_up:
            for run in made.values():
                run.seconds.clear()
        for run in made.values():
            run.step()
    _, width, size = NETWORKS[name]
    lines = [
        f"## {name}, {size} images of {width}x{width}",
        "",
        "| kind | ms per step, median | over batch norm: median (quartiles) |",
        "| --- | ---: | ---: |",
    ]
    for kind, run in made.items():
        pairs = zip(run.seconds, made["batch"].seconds, strict=True)
        low, middle, high = quartiles([mine / batchs for mine, batchs in pairs])
        spread = "1" if kind == "batch" else f"{middle:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {kind} | {1e3 * statistics.median(run.seconds):.1f} | {spread} |")
    lines += [f"\n`{kind}`: {words}" for kind, words in refused.items()]
    return "\n".join(lines)


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    load = [os.getloadavg()[0]]
    tables = []
    for name in arguments.names:
        tables.append(table(name, arguments.device, arguments.rounds))
        load.append(os.getloadavg()[0])
    device = arguments.device
    if device != "cpu":
        device = torch.cuda.get_device_name(device)
    print("# What a training step costs, by kind of normalization\n")
    print(
        "Printed by `scripts/measure_training_cost.py`"
        f" (torch {torch.__version__}, {device}, {torch.get_num_threads()} thread(s) of"
        f" {os.cpu_count()} cores, load average {min(load):.1f} to {math.ceil(10 * max(load)) / 10}"
        f" during the run, {arguments.rounds} rounds).\n"
    )
    print(" ".join(NOTES.split()) + "\n")
    print("\n\n".join(tables))


NOTES = """
A step is forward, loss, backward and SGD update. The kinds take turns, and a ratio is of two steps
of one round; the second `batch` shows what a ratio is worth. `renorm` has its bounds open from the
first step (r_max 3, d_max 5): over batch norm it reads each input once more, for the mean and the
deviation that r and d come from. `ghost` takes 16 images at a time, and joins what comes out.
`sync` is one process, where it is torch's batch norm; `frozen` measures nothing. `none` has no
normalization at all: what it is below 1 is what batch norm costs.
"""

if __name__ == "__main__":
    main()
