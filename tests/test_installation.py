"""`bnfold doctor`: what really runs is told from what is listed, and conflicts are sentences."""

from __future__ import annotations

import json
import os
from pathlib import Path

import onnx
import pytest
import torch

from bnfold.cli import main
from bnfold.errors import RuntimeUnavailableError
from bnfold.proof.places import installation
from bnfold.proof.places.installation import conflicts, usable_cores

HERE = dict.fromkeys(installation.PACKAGES) | {"torch": "2.13.0", "onnx": "1.23.2"}
FACTS = {
    "versions": HERE,
    "optional": {},
    "claimed": [],
    "loads": {"ort-cpu": True, "ort-cuda": "no GPU"},
    "missing_libraries": [],
    "cuda": {"torch": "13.0", "onnxruntime": "13"},
    "machine": {"cores": 2},
    "environment": {},
    "conflicts": [],
}


@pytest.fixture(scope="module")
def facts():
    return installation.installation()


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_claimed_is_told_from_what_runs(facts):
    assert "CPUExecutionProvider" in facts["claimed"]
    assert facts["loads"]["ort-cpu"] is True
    assert facts["loads"]["torch"] is True
    if not torch.cuda.is_available():
        assert "torch" in facts["loads"]["torch-cuda"]
        assert "CUDA was asked for" in facts["loads"]["ort-cuda"]
        assert "TensorRT was asked for" in facts["loads"]["ort-tensorrt"]
    assert facts["versions"]["onnx"] == onnx.__version__
    if facts["versions"]["onnxruntime-gpu"]:
        assert facts["cuda"]["onnxruntime"] in ("12", "13")


def test_no_name_of_this_machine_is_told(facts):
    told = json.dumps({key: facts[key] for key in facts if key != "environment"})
    assert os.uname().nodename not in told
    assert f"{Path.home()}/" not in told
    assert str(Path.cwd()) not in told


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("versions", {"onnxruntime": "1", "onnxruntime-gpu": "1"}, ["uninstall both"]),
        ("versions", {"torch": "2.9.1"}, ["torch 2.9.1 is older than 2.10", "CVE-2026-24747"]),
        ("versions", {"onnx": "1.20.0"}, ["onnx 1.20.0 is older than 1.21"]),
        ("cuda", {"torch": "12.8"}, ["CUDA 12.8", "CUDA 13"]),
        ("environment", {"NVIDIA_TF32_OVERRIDE": "1"}, ["NVIDIA_TF32_OVERRIDE=1", "11 bits"]),
        ("environment", {"OMP_NUM_THREADS": "64"}, ["only 2 cores"]),
    ],
)
def test_a_conflict_is_a_sentence(key, value, words):
    assert conflicts(FACTS) == []
    (sentence,) = conflicts(FACTS | {key: {**FACTS[key], **value}})
    assert all(word in sentence for word in words)


def test_a_cpu_build_beside_a_gpu_one_is_no_conflict():
    assert conflicts(FACTS | {"cuda": {"torch": None, "onnxruntime": "13"}}) == []
    assert conflicts(FACTS | {"environment": {"NVIDIA_TF32_OVERRIDE": "0"}}) == []


def test_a_containers_share_of_time_counts(tmp_path):
    whole = usable_cores(tmp_path)
    assert whole == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == whole
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in (("-1\n", whole), ("100000\n", 1)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        assert usable_cores(tmp_path) == cores


# --- the verb ------------------------------------------------------------------------------------


def test_doctor_tells_of_conflicts(capsys, monkeypatch):
    found = dict(FACTS)
    monkeypatch.setattr(installation, "installation", lambda: found)
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert out.endswith("Runs here: ort-cpu. Not here: ort-cuda.\n")
    found["conflicts"] = ["two of them"]
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "two of them" in out
    assert "Something stands in the way" in out


def test_a_runtime_that_is_asked_for_and_does_not_run_is_exit_4(capsys, monkeypatch):
    monkeypatch.setattr(installation, "installation", lambda: dict(FACTS))
    assert run(capsys, "doctor", "--runtime", "cpu")[0] == 0
    code, out, _ = run(capsys, "doctor", "--runtime", "ort-cpu", "--runtime", "ort-cuda", "--json")
    assert code == 4
    report = json.loads(out)
    assert report["exit_code"] == 4
    assert "ort-cuda cannot run here: no GPU" in report["summary"]
    assert report["facts"]["loads"]["ort-cuda"] == "no GPU"
    code, _, err = run(capsys, "doctor", "--runtime", "ort-cudo")
    assert code == 2
    assert "did you mean ort-cuda" in err


def test_require_gives_the_reason(monkeypatch):
    monkeypatch.setattr(installation, "runs", lambda name: name == "ort-cpu" or "no GPU")
    installation.require(["ort-cpu"])
    with pytest.raises(RuntimeUnavailableError, match="torch-cuda cannot run here: no GPU"):
        installation.require(["ort-cpu", "torch-cuda"])
