"""How fast folded networks run: latency on onnxruntime's CPU, all optimisations on, one thread.

    scripts/env-zoo
    .venv-zoo/bin/python scripts/measure_latency.py [NAME ...]

`bnfold.bench` over the zoo: the original and the networks that bnfold, onnxsim and onnxslim make of
it run in turn, in an order drawn anew each round, so that a disturbance of the machine falls on
all. A ratio is the median over the rounds of (its time / the original's time in the same round);
the quartiles are beside it. Each is proved to be the original's function before it is timed. Time
is the processor's: with one thread the same as the clock's, less what others do to the machine. The
table goes to docs/results/latency.md.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import zoo  # noqa: E402

FOLDER = ROOT / "build" / "latency"
TABLE = ROOT / "docs" / "results" / "latency.md"
ROUNDS = 200
SECONDS = 30  # enough for a network, whatever the rounds
TOOLS = ("onnxsim", "onnxslim")
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


def exported(name: str) -> Path:
    """The original's file; it is exported where it is missing."""
    import torch

    import bnfold

    path = zoo.file_of(name, FOLDER)
    if not path.exists():
        network, shape = zoo.build(name, NETWORKS[name])
        bnfold.export(network, torch.zeros(1, *shape), path, dynamic_batch=False)
    return path


def measure(name: str) -> str:
    """One row of the table."""
    import bnfold

    report = bnfold.bench(exported(name), compare=TOOLS, rounds=ROUNDS, seconds=SECONDS)
    original = report.row("original")
    cells = [name, f"{original.median_ms:.1f}"]
    cells += [_ratio(report.row(other)) for other in ("folded", *TOOLS)]
    return "| " + " | ".join([*cells, str(original.rounds)]) + " |"


def _ratio(row: Any) -> str:
    if row.ratio is None:
        return str(row.verdict)
    low, high = row.ratio_quartiles
    return f"{row.ratio:.3f} ({low:.3f} to {high:.3f})"


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
