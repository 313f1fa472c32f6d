"""Results of the API as runs of the report: what the schema takes, with the proof's verdict."""

import json

import numpy as np
import onnx
import pytest
from small_onnx import digits_onnx

import bnfold
from bnfold.cli import main
from bnfold.errors import DemandError, UsageError
from bnfold.report.schema import read_runs


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "net.onnx"
    path.write_bytes(digits_onnx())
    return path


def test_a_fold_and_its_proof_are_a_run(net, tmp_path):
    fold = bnfold.fold(net)
    run = bnfold.report_of("fold", fold=fold, proof=fold.verify(), files={"model": net})
    bnfold.write_report(tmp_path / "run.json", run)
    (read,) = read_runs(tmp_path / "run.json")
    assert read["exit_code"] == 0
    assert len(read["batch_norms"]["folded"]) == 4
    assert "All 4 batch norms folded. Proved by gates A, B, C" in read["summary"]
    assert "error" not in read


def test_a_proof_that_failed_is_a_run_that_failed(net, tmp_path):
    model = onnx.load(net)
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    array = onnx.numpy_helper.to_array(weight) * np.float32(1.001)
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    run = bnfold.report_of("verify", proof=bnfold.verify(net, model))
    bnfold.write_report(tmp_path / "run.json", [run, run])
    for read in read_runs(tmp_path / "run.json"):
        assert read["exit_code"] == read["error"]["exit_code"] == 1
        assert read["error"]["code"] == "E_GATE"
    for name in ("run.html", "run.md", "run.xml", "run.txt"):
        bnfold.write_report(tmp_path / name, run)
        assert "NOT" in (tmp_path / name).read_text() or name == "run.xml"
    with pytest.raises(UsageError, match="suffix"):
        bnfold.write_report(tmp_path / "run.pdf", run)


def test_gate_a_is_said_to_prove_a_fold_only_by_its_plan(net, tmp_path, capsys):
    fold = bnfold.fold(net)
    record = fold.save(tmp_path / "folded.onnx")
    arguments = ["verify", str(net), str(tmp_path / "folded.onnx"), "-q"]
    assert main([*arguments, "--strict"]) == 0
    assert "Proved by gates A, B, C" in capsys.readouterr().out
    record.unlink()
    assert main([*arguments, "--strict"]) == 1  # the weights alone were looked at
    out = capsys.readouterr().out
    assert "Proved by gates B, C" in out
    assert "Gate A, the algebra, was not checked" in out


def test_a_failure_that_has_no_place_says_which_check_failed(net):
    model = onnx.load(net)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "other"
    proof = bnfold.verify(net, model)
    assert proof.first_divergence is None
    run = bnfold.report_of("verify", proof=proof)
    assert run["summary"].startswith("NOT the same function. ")
    assert "the folded model has the outputs other" in run["summary"]


@pytest.mark.slow
def test_a_bench_of_another_function_is_a_run_that_failed(net, tmp_path):
    other = tmp_path / "other.onnx"
    other.write_bytes(digits_onnx(seed=7))
    bench = bnfold.bench(net, {"other": other}, rounds=2, seconds=0.1)
    run = bnfold.report_of("bench", bench=bench)
    assert (bench.passed, run["exit_code"]) == (False, 1)
    assert run["warnings"][0].startswith("other: ")


def test_a_saved_fold_is_the_commands(net, tmp_path):
    fold = bnfold.fold(net)
    record = fold.save(tmp_path / "a.onnx")
    assert record == tmp_path / "a.record.safetensors"
    assert main(["fold", str(net), "-o", str(tmp_path / "b.onnx"), "-q", "--no-verify"]) == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    unfolded = bnfold.unfold(tmp_path / "a.onnx", record)
    assert len(unfolded.norms) == 4
    with pytest.raises(UsageError, match="exists"):
        fold.save(tmp_path / "a.onnx")
    fold.save(tmp_path / "a.onnx", overwrite=True)
    with pytest.raises(UsageError, match="never overwritten"):
        fold.save(net, overwrite=True)
    with pytest.raises(UsageError, match="torch"):
        fold.save(tmp_path / "c.pt")
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{name}.{end}" for name in "ab" for end in ("onnx", "record.safetensors")
    }


def test_a_fold_says_whether_it_is_enough(net):
    fold = bnfold.fold(net, keep=["*1*"])
    fold.require_folded(len(fold.folded))
    with pytest.raises(DemandError, match="All batch norms must fold") as caught:
        fold.require_folded()
    assert json.loads(json.dumps(caught.value.to_dict()))["code"] == "E_NOT_FOLDED"
    bnfold.inspect(net).require_folded("all")
    with pytest.raises(DemandError, match="At least 5"):
        bnfold.inspect(net).require_folded(5)
