"""What `bnfold.verify` costs, over the float64 forward that it cannot do without.

    .venv/bin/python scripts/measure_verify_cost.py [-o PAGE.md] [--rounds N]

Each network is folded and proved with its record. Within the proof the clock of each part runs: the
float64 evaluations of the original on the drawn inputs, gate A, opening onnxruntime's sessions,
running them; the rest is what is left. The ratio is the whole over the float64 evaluations of the
same run, so that a busy machine slows both; the median of the rounds is told, and the quartiles. A
float32 forward of the original, optimized, on the same inputs is told over the float64 one as well.
One thread.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from nets import with_statistics  # noqa: E402

import bnfold  # noqa: E402
from bnfold.graph import to_proto  # noqa: E402
from bnfold.proof import verify  # noqa: E402
from bnfold.proof.exact import reference  # noqa: E402
from bnfold.proof.places import backends, runtime  # noqa: E402
from models.mobilenet_v2 import mobilenet_v2  # noqa: E402
from models.resnet import resnet18  # noqa: E402
from models.resnet_cifar import resnet20  # noqa: E402

PAGE = ROOT / "docs" / "results" / "verify_cost.md"
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20, 32x32": (resnet20, (3, 32, 32)),
    "mobilenet_v2, 224x224": (mobilenet_v2, (3, 224, 224)),
    "resnet18, 224x224": (resnet18, (3, 224, 224)),
}
FLOAT64, ALGEBRA, OPEN, RUN = "float64 forward", "gate A", "opening sessions", "running sessions"
PARTS: dict[str, tuple[Any, str]] = {
    FLOAT64: (reference.Float64Reference, "run"),
    ALGEBRA: (verify, "certify"),
    OPEN: (backends, "open_session"),
    RUN: (runtime.Session, "run"),
}
SHOWN = (*PARTS, "rest")


class Clock:
    """Seconds spent in each part, and how often it was entered; a part inside another is its."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.inside = ""

    def around(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **options: Any) -> Any:
            if self.inside:
                return work(*args, **options)
            self.inside, begun = part, time.perf_counter()
            try:
                return work(*args, **options)
            finally:
                self.seconds[part] += time.perf_counter() - begun
                self.calls[part] += 1
                self.inside = ""

        return timed


@contextlib.contextmanager
def clocked() -> Iterator[Clock]:
    """While it lasts, the parts of a proof are timed."""
    clock = Clock()
    with contextlib.ExitStack() as stack:
        for part, (where, name) in PARTS.items():
            timed = clock.around(part, getattr(where, name))
            stack.enter_context(mock.patch.object(where, name, timed))
        yield clock


def measure(network: nn.Module, shape: tuple[int, ...], rounds: int) -> list[str]:
    """The cells of one row."""
    fold = bnfold.fold(with_statistics(network), torch.zeros(1, *shape))
    original, folded = to_proto(fold.original), to_proto(fold.graph)
    ratios, quick, shares = [], [], defaultdict(list)
    rows = 0
    for _ in range(rounds + 1):
        with clocked() as clock:
            begun = time.perf_counter()
            report = bnfold.verify(original, folded, record=fold.record)
            whole = time.perf_counter() - begun
        report.raise_for_failure()
        rows = report.samples
        assert clock.calls[FLOAT64] > 0
        clock.seconds["rest"] = whole - sum(clock.seconds.values())
        ratios.append(whole / clock.seconds[FLOAT64])
        quick.append(forward(original, shape, rows) / clock.seconds[FLOAT64])
        for part in SHOWN:
            shares[part].append(clock.seconds[part] / whole)
    # the first round warms up
    low, middle, high = np.quantile(ratios[1:], (0.25, 0.5, 0.75))
    told = [f"{100 * statistics.median(shares[part][1:]):.0f} %" for part in SHOWN]
    return [str(rows), f"{middle:.2f}", f"{low:.2f} to {high:.2f}", *told,
            f"{statistics.median(quick[1:]):.2f}"]  # fmt: skip


def forward(model: Any, shape: tuple[int, ...], rows: int) -> float:
    """Seconds of onnxruntime's float32 forward, optimized, on as many rows."""
    session = runtime.open_session(model, "cpu", optimize=True, threads=1)
    (name,) = session.input_names
    x = np.random.default_rng(0).standard_normal((rows, *shape)).astype(np.float32)
    session.run({name: x[:1]})
    begun = time.perf_counter()
    for row in x:
        session.run({name: row[None]})
    return time.perf_counter() - begun


def main() -> None:
    """Print the table, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=PAGE)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    columns = ["network", "rows", "verify / float64", "quartiles", *SHOWN, "float32 / float64"]
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for name, (factory, shape) in NETWORKS.items():
        torch.manual_seed(0)
        lines.append(f"| {' | '.join([name, *measure(factory(), shape, args.rounds)])} |")
        print(lines[-1], flush=True)
    head = (
        "# What verify costs\n\n"
        f"Printed by `scripts/{Path(__file__).name}` (torch {torch.__version__}, one thread, "
        f"median of {args.rounds} rounds): the whole proof with a record, gates A, B and C, over "
        "its float64 evaluations of the original; the shares of its parts; a float32 forward of as "
        "many rows over the float64 one.\n\n"
    )
    args.output.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
