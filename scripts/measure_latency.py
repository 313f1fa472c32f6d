"""How fast folded networks run: latency on onnxruntime's CPU, all optimisations on, one thread.

    scripts/env-zoo
    .venv-zoo/bin/python scripts/measure_latency.py [NAME ...]

The original and the networks that bnfold, onnxsim and onnxslim make of it run in turn, in an order
drawn anew each round, so that a disturbance of the machine falls on all. A ratio is the median over
the rounds of (its time / the original's time in the same round); the quartiles are beside it. Time
is the processor's: with one thread the same as the clock's, less what others do to the machine. The
table goes to docs/results/latency.md.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import zoo  # noqa: E402
from measure_zoo import tool  # noqa: E402

FOLDER = ROOT / "build" / "latency"
TABLE = ROOT / "docs" / "results" / "latency.md"
ROUNDS = 200
SECONDS = 30  # enough for a network, whatever the rounds
TOOLS = ("bnfold", "onnxsim", "onnxslim")
# name -> height and width as published
NETWORKS = {
    "torchvision:densenet121": 224,
    "timm:levit_128s": 224,
    "timm:repvgg_a0": 224,
    "timm:mobileone_s0": 224,
    "timm:fastvit_t8": 256,
    "timm:resnetv2_50": 224,
    "models:preact_resnet18": 32,
    "timm:xcit_nano_12_p16_224": 224,
    "torchvision:resnet18": 224,
    "torchvision:mobilenet_v2": 224,
}


def files_of(name: str) -> dict[str, Path]:
    """The original and what each tool makes of it; the original is exported where it is missing."""
    import bnfold

    original = zoo.file_of(name, FOLDER)
    if not original.exists():
        network, shape = zoo.build(name, NETWORKS[name])
        import torch

        bnfold.export(network, torch.zeros(1, *shape), original, dynamic_batch=False)
    files = {"original": original}
    for other in TOOLS:
        files[other] = original.with_suffix(f".{other}.onnx")
        tool(other)(original, files[other])
    return files


def runner(path: Path) -> Callable[[], float]:
    """A function that runs the model once and gives the processor seconds that it took."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    feeds = {
        value.name: generator.standard_normal(value.shape).astype(np.float32)
        for value in session.get_inputs()
    }

    def run() -> float:
        begun = time.process_time()
        session.run(None, feeds)
        return time.process_time() - begun

    return run


def measure(name: str) -> str:
    """One row of the table."""
    runners = {who: runner(path) for who, path in files_of(name).items()}
    for run in runners.values():
        run()
    rounds: list[dict[str, float]] = []
    order, draw, until = list(runners), random.Random(0), time.monotonic() + SECONDS
    while len(rounds) < ROUNDS and (len(rounds) < 5 or time.monotonic() < until):
        draw.shuffle(order)
        rounds.append({who: runners[who]() for who in order})
    cells = [name, f"{1000 * statistics.median(r['original'] for r in rounds):.1f}"]
    for other in TOOLS:
        cells.append(_ratio([r[other] / r["original"] for r in rounds]))
    return "| " + " | ".join([*cells, str(len(rounds))]) + " |"


def _ratio(ratios: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Each network in a process of its own; the table."""
    if sys.argv[1:2] == ["--one"]:
        print(measure(sys.argv[2]))
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in sys.argv[1:] or NETWORKS:
        command = [sys.executable, __file__, "--one", name]
        run = subprocess.run(command, capture_output=True, text=True)
        failure = (run.stderr.strip().splitlines() or [""])[-1]
        rows.append(
            run.stdout.strip().splitlines()[-1] if not run.returncode else f"| {name} | {failure} |"
        )
        print(rows[-1], flush=True)
    if not sys.argv[1:]:
        TABLE.write_text("\n".join([*_about(), *rows]) + "\n")


def _about() -> list[str]:
    return [
        "# Latency of folded networks",
        "",
        "Printed by `scripts/measure_latency.py`: onnxruntime's CPU provider, all optimisations on",
        "(it folds Conv -> BN itself), one thread, batch 1. Original in milliseconds (median); the",
        "others as ratios to it, median of the ratios within a round and quartiles. Processor",
        f"time; the networks run in turn, up to {ROUNDS} rounds or {SECONDS} s.",
        "",
        "| network | original, ms | bnfold | onnxsim | onnxslim | rounds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]


if __name__ == "__main__":
    main()
