"""`bnfold adapt` on files: what holds the network decides what is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_adapt import Net, seeded, target

import bnfold
from bnfold.cli import main
from bnfold.outputs import record_path

EXAMPLE = torch.zeros(1, 2, 5, 5)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One network as ONNX, folded ONNX and checkpoint; the target, the source, labelled samples."""
    folder = tmp_path_factory.mktemp("adapt")
    net = seeded(Net()).eval()
    bnfold.export(net, EXAMPLE, folder / "net.onnx")
    assert main(["fold", str(folder / "net.onnx"), "-q"]) == 0
    here = str(Path(__file__).parent)
    (folder / "nets.py").write_text(
        f"import sys\nsys.path.insert(0, {here!r})\nfrom test_adapt import Net\n"
    )
    torch.save(net.state_dict(), folder / "net.pt")
    x = target(61).numpy()
    np.save(folder / "target.npy", x)
    np.save(folder / "source.npy", target(61, seed=5).numpy())
    np.savez(folder / "test.npz", x=x, y=np.arange(61) % 3)
    return folder


def run(capsys, *arguments):
    """The exit code and the JSON document of `bnfold adapt`."""
    capsys.readouterr()
    code = main(["adapt", *map(str, arguments), "--json", "--batch-size", "16"])
    return code, json.loads(capsys.readouterr().out)


def statistics(path):
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    return {name: array for name, array in arrays.items() if "running" in name}


def test_onnx_files_get_other_statistics_and_nothing_else(files, capsys, tmp_path):
    out = tmp_path / "out.onnx"
    code, told = run(
        capsys, files / "net.onnx", "--target-data", files / "target.npy",
        "--test-data", files / "test.npz", "-o", out,
    )  # fmt: skip
    assert code == 0
    assert told["summary"] == "3 batch norms adapted to 61 images (exact)."
    assert len(told["layers"]["rows"]) == 3
    assert told["accuracy"]["rows"][0][0] == "accuracy %"
    before, after = onnx.load(files / "net.onnx"), onnx.load(out)
    own = bnfold.adapt(files / "net.onnx", target(61).split(16), diagnose=False)
    for tensor in after.graph.initializer:
        if "running" in tensor.name:
            name, kind = tensor.name.rsplit(".", 1)
            wanted = getattr(own.statistics[name], kind.removeprefix("running_"))
            np.testing.assert_allclose(onnx.numpy_helper.to_array(tensor), wanted, rtol=1e-6)
            tensor.ClearField("raw_data")
    for tensor in before.graph.initializer:
        if "running" in tensor.name:
            tensor.ClearField("raw_data")
    assert before.graph == after.graph


def test_a_folded_file_comes_back_folded_with_its_record(files, capsys, tmp_path):
    out, pack = tmp_path / "out.onnx", tmp_path / "night.pack"
    folded = files / "net.folded.onnx"
    code, told = run(
        capsys, folded, "--target-data", files / "target.npy", "-o", out, "--pack", pack
    )
    assert code == 0
    assert {gate["gate"] for gate in told["gates"]} == {"A", "B", "C"}
    assert {file["role"] for file in told["files"]} == {"model", "adapted", "record", "pack"}
    assert not any(n.op_type == "BatchNormalization" for n in onnx.load(out).graph.node)
    assert main(["unfold", str(out), "-q", "-o", str(tmp_path / "back.onnx")]) == 0
    assert main(["adapt", str(files / "net.onnx"), "--target-data", str(files / "target.npy"),
                 "--batch-size", "16", "-q", "-o", str(tmp_path / "plain.onnx")]) == 0  # fmt: skip
    one, other = (statistics(tmp_path / name) for name in ("back.onnx", "plain.onnx"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert (
        main(["pack", "apply", str(folded), str(pack), "-q", "-o", str(tmp_path / "p.onnx")]) == 0
    )
    a, b = (onnx.load(tmp_path / name).graph.initializer for name in ("p.onnx", "out.onnx"))
    assert {t.name: t.raw_data for t in a} == {t.name: t.raw_data for t in b}


def test_a_checkpoint_that_carries_its_graph_needs_no_code(files, capsys, tmp_path):
    spec = f"{files / 'nets.py'}:Net"
    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    common = ("--target-data", files / "target.npy", "-o")
    assert run(capsys, files / "net.pt", "--model", spec, *common, first)[0] == 0
    code, _ = run(capsys, first, "--target-data", files / "source.npy", "-o", second)
    assert code == 0
    state = torch.load(second, weights_only=True)["state_dict"]
    net = Net()
    net.load_state_dict(torch.load(files / "net.pt", weights_only=True))
    own = bnfold.adapt(net.eval(), target(61, seed=5).split(16), diagnose=False).model.state_dict()
    for name in ("bn1.running_mean", "bn2.running_var", "bn3.running_mean"):
        torch.testing.assert_close(state[name], own[name], rtol=2e-6, atol=2e-6)
    assert main(["fold", str(second), "-q", "-o", str(tmp_path / "c.onnx")]) == 0


def test_without_batch_norms_source_samples_are_needed(files, capsys, tmp_path):
    out = tmp_path / "out.onnx"
    bare = tmp_path / "bare.onnx"
    bare.write_bytes((files / "net.folded.onnx").read_bytes())
    code, told = run(capsys, bare, "--target-data", files / "target.npy", "-o", out)
    assert code == 3
    assert "--source-data" in told["error"]["message"]
    assert not out.exists()
    code, told = run(
        capsys, bare, "--target-data", files / "target.npy",
        "--source-data", files / "source.npy", "-o", out,
    )  # fmt: skip
    assert code == 0
    assert "approximation" in told["warnings"][0]
    assert out.exists()


def test_a_run_goes_on_from_its_state(files, tmp_path, monkeypatch):
    out, state = tmp_path / "out.onnx", tmp_path / "run.state"
    arguments = (files / "net.onnx", "--target-data", files / "target.npy", "-o", out)
    from bnfold.measuring.resume import State

    add = State.add

    def interrupted(self, name, moments):
        add(self, name, moments)
        if name == "bn2":
            raise KeyboardInterrupt

    monkeypatch.setattr(State, "add", interrupted)
    assert main(["adapt", *map(str, arguments), "-q", "--state", str(state)]) == 130
    assert state.exists()
    assert not out.exists()
    measured = []

    def counted(self, name, moments):
        measured.append(name)
        add(self, name, moments)

    monkeypatch.setattr(State, "add", counted)
    assert main(["adapt", *map(str, arguments), "-q", "--state", str(state)]) == 0
    assert measured == ["bn3"]
    assert not state.exists()
    whole = tmp_path / "whole.onnx"
    assert main(["adapt", *map(str, arguments[:-1]), str(whole), "-q"]) == 0
    for name, array in statistics(out).items():
        # onnxruntime fuses what is settled into other kernels: the same to rounding
        np.testing.assert_allclose(array, statistics(whole)[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["net.onnx", "-o", "x.pt"], 2, "suffix must be one of .onnx"),
        (["net.onnx", "--device", "cpu"], 2, "device is of a torch module"),
        (["net.onnx", "--up-to", "bn9"], 2, "which is no batch norm that is adapted"),
        (["net.onnx", "--layers", "conv*"], 2, "matches no batch norm"),
        (["net.onnx", "--prior", "2", "--source-weight", "0.5"], 2, "give one"),
        (["net.onnx", "--stop", "2"], 2, "stop is 2"),
        (["net.onnx", "--prior", "few"], 2, "no number of images"),
        (["net.onnx", "--mixture"], 2, "give prior or weight"),
        (["net.onnx", "--max-memory", "-1"], 2, "--max-memory is -1"),
        (["net.pt", "--model", "nets.py:Net", "--provider", "cuda"], 2, "give device"),
        (["net.onnx", "--pack", "x.onnx"], 2, "suffix must be one of .pack"),
        (["net.onnx", "--method", "fast", "--state", "s"], 2, "--state is of the exact method"),
        (["net.onnx", "--model", "nets.py:Net"], 2, "needs no factory"),
        (["net.folded.onnx", "--record", "target.npy"], 3, "not a fold record"),
        (["net.pt"], 2, "Say which network"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(
    files, capsys, monkeypatch, arguments, code, words
):
    monkeypatch.chdir(files)
    before = sorted(path.name for path in files.iterdir())
    found, told = run(capsys, *arguments, "--target-data", "target.npy")
    assert (found, told["error"]["exit_code"]) == (code, code)
    assert words in told["error"]["message"]
    assert sorted(path.name for path in files.iterdir()) == before


def test_two_processes_write_what_one_writes(files, tmp_path):
    outs = [tmp_path / "one.onnx", tmp_path / "two.onnx"]
    arguments = ["-m", "bnfold", "adapt", str(files / "net.onnx"), "-q", "--batch-size", "16"]
    arguments += ["--target-data", str(files / "target.npy"), "-o"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert main([*arguments[2:], str(outs[0])]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", *arguments, str(outs[1])],
        env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("batch norms adapted") == 1
    one, two = map(statistics, outs)
    assert all(np.allclose(one[name], two[name], rtol=1e-6, atol=1e-6) for name in one)
    assert not list(tmp_path.glob("*.record*"))
    assert record_path(outs[1]) not in list(tmp_path.iterdir())
