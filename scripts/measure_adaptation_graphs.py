"""What re-estimation costs on an ONNX graph, over a plain onnxruntime forward of the same data.

    .venv/bin/python scripts/measure_adaptation_graphs.py [THREADS]

The plain forward is that of the unfolded graph, optimised by onnxruntime as far as it goes (it
folds batch norms itself), with the same threads and batches. Runs are interleaved; the ratio of
medians is told of wall time and of processor time, which a busy machine disturbs less. The first
figure counts the opening of a session per segment; the second, of three times as many images less
the first, does not. Then the peak of resident memory as the set grows.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bnfold  # noqa: E402
from bnfold import graph  # noqa: E402
from bnfold.measuring import graphs  # noqa: E402
from bnfold.measuring.arrays import ArrayFeed  # noqa: E402
from bnfold.measuring.estimate import Progress  # noqa: E402
from bnfold.measuring.norms import norms_of  # noqa: E402
from bnfold.proof.places.runtime import open_session  # noqa: E402
from models import mobilenet_v2, resnet, resnet_cifar  # noqa: E402

# network: side of an image, images in a batch, batches
CASES = {
    "resnet18": (resnet.resnet18, 96, 16, 8),
    "resnet20": (resnet_cifar.resnet20, 32, 64, 8),
    "mobilenet_v2": (mobilenet_v2.mobilenet_v2, 96, 16, 8),
}
ROOM = 1 << 33
ROUNDS = 5

Run = Callable[[], None]
Batches = Sequence[np.ndarray]


def batches_of(side: int, size: int, count: int) -> list[np.ndarray]:
    """Random images."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(size, 3, side, side)).astype(np.float32) for _ in range(count)]


def runs_of(model: ir.Model, batches: Batches, threads: int) -> dict[str, Run]:
    """What is compared."""
    session = open_session(graph.to_proto(model), optimize=True, threads=threads)
    (name,) = session.input_names

    def plain() -> None:
        for batch in batches:
            session.run({name: batch})

    return {
        "plain": plain,
        "fast": partial(adapt, model, batches, graphs.fast, threads=threads),
        "exact": partial(adapt, model, batches, graphs.exact, threads=threads, max_bytes=ROOM),
    }


def adapt(model: ir.Model, batches: Batches, method: Callable, **options: int) -> None:
    """One estimate."""
    feed = ArrayFeed(model, batches, max_bytes=ROOM)
    method(model, norms_of(model), feed, Progress(None, feed, 1, False), **options)


def times(runs: dict[str, Run]) -> dict[str, tuple[float, float]]:
    """Median wall and processor time of each, interleaved, after one run that is not counted."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            start = time.perf_counter(), time.process_time()
            run()
            taken[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {
        name: (statistics.median(t[0] for t in rows[1:]), statistics.median(t[1] for t in rows[1:]))
        for name, rows in taken.items()
    }


def cost(name: str, threads: int) -> None:
    """The rows of one network."""
    make, side, size, count = CASES[name]
    torch.manual_seed(0)
    model = bnfold.export(make().eval(), torch.zeros(2, 3, side, side))
    few = times(runs_of(model, batches_of(side, size, count), threads))
    many = times(runs_of(model, batches_of(side, size, 3 * count), threads))
    for method in ("fast", "exact"):
        first = [few[method][i] / few["plain"][i] for i in (0, 1)]
        rest = [
            (many[method][i] - few[method][i]) / (many["plain"][i] - few["plain"][i])
            for i in (0, 1)
        ]
        print(
            f"{name:13s} {method:6s} {size * count:5d} images: wall {first[0]:.2f}, processor"
            f" {first[1]:.2f}; each further image: wall {rest[0]:.2f}, processor {rest[1]:.2f}",
            flush=True,
        )


class Drawn:
    """Batches that are drawn as they are read, so that the data take no memory."""

    def __init__(self, side: int, size: int, count: int) -> None:
        self._shape, self._count = (size, 3, side, side), count

    def __iter__(self) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        return (rng.normal(size=self._shape).astype(np.float32) for _ in range(self._count))


def resident() -> int:
    """MiB of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20


def peak_of(run: Run) -> int:
    """MiB that a run takes at its peak beyond what there was before."""
    before, seen, ended = resident(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.003):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    ended.set()
    watcher.join()
    return max(seen) - before


def peak(method: str, count: int, threads: int) -> int:
    """The peak of resnet18 at 96 pixels, `exact` with 64 MiB for what its batches hold."""
    torch.set_num_threads(threads)
    model = bnfold.export(resnet.resnet18().eval(), torch.zeros(2, 3, 96, 96))
    options = {"max_bytes": 64 << 20} if method == "exact" else {}
    run = getattr(graphs, method)
    return peak_of(partial(adapt, model, Drawn(96, 16, count), run, threads=threads, **options))


def memory(threads: int) -> None:
    """Peaks as the set grows, each in a process of its own."""
    for method in ("exact", "fast"):
        for count in (8, 32, 64):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found = pool.submit(peak, method, count, threads).result()
            print(f"resnet18 {method:5s} {16 * count:5d} images: +{found} MiB", flush=True)


def main() -> None:
    """All tables."""
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    torch.set_num_threads(threads)
    for name in CASES:
        cost(name, threads)
    memory(threads)


if __name__ == "__main__":
    main()
