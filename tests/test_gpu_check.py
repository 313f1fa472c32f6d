"""The script that anyone with a GPU runs: its page, its exit codes, and its rehearsal on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.py"

sys.path.append(str(ROOT / "scripts"))

import gpu_check  # noqa: E402
from gpu_check import NETWORKS, TIMED, TRAINED, Result, Step, Where  # noqa: E402
from gpu_check_page import REHEARSED, TITLE, page  # noqa: E402

FACTS = {
    "versions": {"torch": "2.13.0", "onnxruntime": None},
    "machine": {"cpu": "a CPU", "cores": 2, "gpus": [{"name": "a GPU", "driver": "580.1"}]},
    "cuda": {"torch": "13.0", "onnxruntime": "13"},
    "conflicts": [],
}


def found(**changes):
    step = {"passed": True, "sentence": "All hold.", "rows": [], "libraries": [], "seconds": 2.0}
    row = {"network": "tcn", "runtime": "ort-cuda", "of": "folded", "ratio": 1.5, "noise": 0.0,
           "nodes": {"CUDA": 12, "CPU": 1}}  # fmt: skip
    steps = {
        "parity:tcn": {**step, "rows": [row], "libraries": ["libcudnn.so.9.19.0"]},
        "tests": {**step, "passed": False, "sentence": "1 failed | 3 passed."},
    }
    given = {"rehearsal": False, "torch only": False, "date": "2026-01-02", "seconds": 9,
             "facts": FACTS, "steps": steps, "missing": ["latency:resnet18"],
             "whole": True}  # fmt: skip
    return {**given, **changes}


def test_the_page_tells_what_held_and_what_did_not():
    text = page(found())
    assert text.startswith(TITLE)
    assert "a GPU, 580.1" in text
    assert "torch 2.13.0" in text
    assert "cuDNN: in use" in text
    assert "| parity:tcn | holds | 2 | All hold. |" in text
    assert "| tests | **FAILS** | 2 | 1 failed \\| 3 passed. |" in text
    assert "| latency:resnet18 | not done |" in text
    assert "| tcn | ort-cuda | folded | 1.5 | 0 | 12 CUDA, 1 CPU |" in text


def test_a_rehearsal_says_so_first():
    assert page(found(rehearsal=True)).startswith(REHEARSED)
    assert "nothing here was run on CUDA" in REHEARSED
    assert (
        "onnxruntime's provider was not run" in page(found(**{"torch only": True})).split("\n")[0]
    )


def test_every_network_is_there():
    for name, (factory, _, _) in NETWORKS.items():
        assert (ROOT / "models" / f"{factory.partition('.')[0]}.py").is_file(), name
    assert set(TRAINED) == {path.name for path in (ROOT / "models").glob("*.pt")}
    assert {name.removesuffix(gpu_check.HALF) for name in TIMED} <= set(NETWORKS)


def test_a_step_that_fails_or_hangs_leaves_the_others():
    broken = gpu_check.run_step(Step("no such kind"), Where(True), 1)
    assert broken.passed is False
    assert "KeyError" in broken.sentence
    late = gpu_check.run_step(Step("tests", limit=0.01), Where(True), 1)
    assert late.passed is False
    assert "not done within" in late.sentence


def test_all_results_are_told_and_one_failure_is_exit_1(monkeypatch, tmp_path, capsys):
    results = {"planted": Result(True, "ok"), "silent CPU": Result(False, "not refused")}
    monkeypatch.setattr(gpu_check, "run_step", lambda step, *_: results[step.name])
    monkeypatch.setattr("bnfold.proof.places.installation.installation", lambda: FACTS)
    chosen = [Step("planted"), Step("silent CPU")]
    output = tmp_path / "new" / "page.md"
    assert gpu_check.check(Where(True), chosen, output) == 1
    assert gpu_check.check(Where(True), chosen[:1], output.with_name("good.md")) == 0
    told = json.loads(output.with_suffix(".json").read_text())
    assert told["steps"]["silent CPU"]["sentence"] == "not refused"
    assert told["rehearsal"] is True
    assert output.read_text().startswith(REHEARSED)
    assert "Failed: silent CPU." in capsys.readouterr().out


def test_without_a_gpu_it_is_exit_4_and_no_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("bnfold.proof.places.installation.runs", lambda name: f"no GPU for {name}")
    page = tmp_path / "cuda.md"
    assert gpu_check.main(["--output", str(page)]) == 4
    assert not page.exists()
    assert "ort-cuda cannot run here: no GPU for ort-cuda" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--rehearse", "--torch-only"])
def test_a_part_or_a_rehearsal_never_becomes_the_result(option, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main([option, "--output", str(gpu_check.PAGE)])
    assert stop.value.code == 2
    assert "is no result for cuda.md" in capsys.readouterr().err


def test_without_onnxruntime_torch_alone_is_run():
    where = Where(False, torch_only=True)
    for runtimes in (where.classes, where.plain, where.timed):
        assert runtimes
        assert all(name.startswith("torch-cuda") for name in runtimes)
    assert Where(False).plain == ("ort-cuda", "torch-cuda")
    assert Where(True).timed == ("ort-cpu", "torch")
    assert where.page.name == "cuda_torch.md"


@pytest.mark.slow
def test_the_rehearsal_runs_every_kind_of_step(tmp_path):
    """Every kind on the CPU, in the processes and by the paths of the real run."""
    only = "parity:tcn,parity:tcn_weight.pt,planted,silent CPU,adaptation,tests,latency:resnet18"
    output = tmp_path / "rehearsal.md"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--rehearse", "--only", only, "--output", str(output)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    told = json.loads(output.with_suffix(".json").read_text())
    assert {name.split(":")[0] for name in told["steps"]} == set(gpu_check.KINDS)
    verdicts = {name: step["passed"] for name, step in told["steps"].items()}
    assert False not in verdicts.values()
    assert {name for name, passed in verdicts.items() if passed is None} == {
        "adaptation:torch as it comes",
        "latency:resnet18",
    }
    assert str(ROOT) not in output.read_text()
