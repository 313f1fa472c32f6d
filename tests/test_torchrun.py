"""`torchrun -m bnfold adapt`: files, a report and an exit code as one process gives them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from processes import ROOT
from test_distributed import batches, ready

import bnfold
from bnfold.graph import read_onnx
from bnfold.measuring.norms import norms_of


@pytest.fixture
def files(tmp_path):
    bnfold.export(ready(), (torch.zeros(2, 3, 9, 9),), path=tmp_path / "net.onnx")
    np.save(tmp_path / "target.npy", np.concatenate(batches(7)))
    return tmp_path


def run(folder, *arguments, processes=None):
    """`python -m bnfold` in the folder, alone or by torchrun; (exit code, stdout, stderr)."""
    start = ["-m", "bnfold"]
    if processes:
        run_all = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        start = [*run_all, *start]
    done = subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    return done.returncode, done.stdout, done.stderr


def statistics(path):
    return {name: norm.layer.source for name, norm in norms_of(read_onnx(path)).items()}


def test_two_processes_write_and_say_what_one_does(files):
    call = ("adapt", "net.onnx", "--target-data", "target.npy", "--batch-size", 5, "--json")
    code, said, _ = run(files, *call, "-o", "one.onnx")
    assert code == 0
    one = json.loads(said)
    code, said, error = run(files, *call, "-o", "two.onnx", "--state", "run.state", processes=2)
    assert code == 0, error
    two = json.loads(said)  # one report, and nothing else
    assert two["warnings"] == one["warnings"]
    assert two["summary"] == one["summary"]
    found, wanted = statistics(files / "two.onnx"), statistics(files / "one.onnx")
    assert list(found) == list(wanted)
    for name, source in wanted.items():
        np.testing.assert_allclose(found[name].mean, source.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[name].var, source.var, rtol=1e-5)
    assert sorted(path.name for path in files.iterdir()) == [
        *("net.onnx", "one.onnx", "target.npy", "two.onnx"),
    ]


def test_what_is_wrong_is_said_once(files):
    bad = np.concatenate(batches(7))
    bad[3] = np.nan
    np.save(files / "target.npy", bad)
    code, said, error = run(
        files, "adapt", "net.onnx", "--target-data", "target.npy", "-o", "two.onnx", processes=2
    )
    assert code == 1  # torchrun's own
    assert (said, error.count("bnfold: ")) == ("", 1)
    assert "bnfold: Sample 3 of target.npy holds NaN or infinity; leave it out." in error
    assert error.count("exitcode  : 3") >= 1
    assert not (files / "two.onnx").exists()
