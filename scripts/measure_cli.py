"""Whole-process times of the command line, as ratios to onnxsim and onnxslim on the same file.

    .venv/bin/python scripts/measure_cli.py MODEL.onnx [REPEATS]

Each command runs as a fresh process, the tools in turn (interleaved), after one round that warms
the disk; the figures are medians. bnfold is measured with and without its proof; the other two
check nothing by default.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent


def commands(model: Path, folder: Path) -> dict[str, list[str]]:
    """The processes to compare, by name."""
    fold = [str(BIN / "bnfold"), "fold", str(model), "--freeze-inputs", "--overwrite", "-q"]
    return {
        "bnfold --help": [str(BIN / "bnfold"), "--help"],
        "bnfold fold --no-verify": [*fold, "--no-verify", "-o", str(folder / "a.onnx")],
        "bnfold fold (proved)": [*fold, "-o", str(folder / "b.onnx")],
        "onnxsim --help": [str(BIN / "onnxsim"), "--help"],
        "onnxsim": [str(BIN / "onnxsim"), str(model), str(folder / "c.onnx")],
        "onnxslim --help": [str(BIN / "onnxslim"), "--help"],
        "onnxslim": [str(BIN / "onnxslim"), str(model), str(folder / "d.onnx")],
    }


def seconds(command: list[str]) -> float:
    """Wall time of one process."""
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begun


def main() -> None:
    """Print the table."""
    model, repeats = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 7
    folder = Path(tempfile.mkdtemp())
    try:
        jobs = commands(model, folder)
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for round_ in range(repeats + 1):
            for name, command in jobs.items():
                taken = seconds(command)
                if round_:
                    times[name].append(taken)
    finally:
        shutil.rmtree(folder)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"{model.name}, medians of {repeats}")
    for name, other in (
        ("bnfold --help", "--help"),
        ("bnfold fold --no-verify", ""),
        ("bnfold fold (proved)", ""),
    ):
        sim, slim = (median[f"{tool} {other}".strip()] for tool in ("onnxsim", "onnxslim"))
        print(
            f"{name:25} {median[name] / sim:5.2f} x onnxsim  {median[name] / slim:5.2f} x onnxslim"
        )


if __name__ == "__main__":
    main()
