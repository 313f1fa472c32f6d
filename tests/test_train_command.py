"""`bnfold train` as a user meets it: files, lines, sentences, a run that goes on after an end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ROOT

import bnfold.training.state
from bnfold.cli import main
from bnfold.norm import KINDS

NET = """
from torch import nn
def net(num_classes=3, in_channels=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(24, num_classes),
    )
def one(x=None):
    return 1
def noisy(x):
    import torch
    return x + 0.1 * torch.randn_like(x)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with net.py and data.npz, to be in."""
    (tmp_path / "net.py").write_text(NET)
    rng = np.random.default_rng(0)
    y = np.arange(96) % 3
    x = rng.normal(size=(96, 1, 6, 6)) + y[:, None, None, None]
    np.savez(tmp_path / "data.npz", x=x.astype(np.float32), y=y)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*options):
    data = () if "--data" in options else ("--data", "data.npz", "--test-data", "data.npz")
    return [str(o) for o in ("train", "net.py:net", *data, "--epochs", 3, "--lr", 0.05, *options)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(log):
    return [{k: v for k, v in line.items() if k not in ("seconds", "versions")} for line in log]


def about(path):
    return torch.load(path, weights_only=True)["bnfold"]


def same_weights(a, b):
    left, right = (torch.load(path, weights_only=True)["state_dict"] for path in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# --- a new user -----------------------------------------------------------------------------------


def test_the_digits_are_the_data_unless_others_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = f"{ROOT}/models/digits.py:digits_cnn"
    assert main(["train", spec, "--epochs", "2"]) == 0
    said = capsys.readouterr().out
    assert "Trained on digits:train for 2 epochs. Test accuracy 9" in said
    assert [path.name for path in tmp_path.iterdir()] == ["digits_cnn.pt"]
    for verb in ("inspect", "fold", "export"):
        assert (
            main([verb, "digits_cnn.pt", "-q", *(["-o", f"{verb}.onnx"] * (verb != "inspect"))])
            == 0
        )
    adapt = ["adapt", "digits_cnn.pt", "--target-data", "digits:test", "-q"]
    assert main([*adapt, "-o", "adapted.pt"]) == 0


def operators(path):
    import onnx

    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sync"])
@pytest.mark.usefixtures("folder")
def test_every_normalisation_trains_and_its_checkpoint_folds_alone(kind, capsys):
    option = ["--norm-set", "ghost_size=16"] if kind == "ghost" else []
    assert main(call("--norm", kind, *option, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert "Test accuracy" in found["summary"]
    metrics = about("net.pt")["metrics"]
    assert metrics["run"]["norm"] == kind
    recorded = {
        "ghost": {"ghost_size": 16},
        "normprop": {"input": "batch"},
        "renorm": {"r_max": 3.0, "d_max": 5.0, "start": 0, "r_end": 2, "d_end": 1},
    }
    assert metrics["run"]["norm_options"] == recorded.get(kind, {})
    assert metrics["test_accuracy"] > 0.6
    assert main(["fold", "net.pt", "--json", "-o", "net.folded.onnx"]) == 0
    folded = json.loads(capsys.readouterr().out)
    assert folded["proof"]["passed"]
    # Add: NormProp's shift of the input; the others are the shape of the flattening
    plain = {"Conv", "Relu", "Gemm", "Add", "Pad", "Reshape", "Shape", "Squeeze", "Concat"}
    assert operators("net.folded.onnx") <= plain
    assert main(["verify", "net.pt", "net.folded.onnx", "--json"]) == 0
    gates = json.loads(capsys.readouterr().out)["gates"]
    assert {gate["gate"] for gate in gates} == {"A", "B", "C"}
    # as ONNX the weights are held too, so that the file folds as the checkpoint does
    assert main(["export", "net.pt", "-o", "net.onnx", "-q"]) == 0
    assert main(["fold", "net.onnx", "-o", "again.onnx", "-q"]) == 0
    assert operators("again.onnx") == operators("net.folded.onnx")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("kind", ["weight", "weight-mean-only"])
def test_weight_norm_starts_from_what_the_first_samples_show(kind):
    assert main(call("--norm", kind, "--lr", 1e-12, "-q")) == 0
    state = torch.load("net.pt", weights_only=True)["state_dict"]
    gain, direction = (state[f"0.parametrizations.weight.original{n}"] for n in (0, 1))
    length = torch.linalg.vector_norm(direction, dim=(1, 2, 3), keepdim=True)
    x = torch.from_numpy(np.load("data.npz")["x"])
    seen = torch.nn.functional.conv2d(x, gain * direction / length, state.get("0.bias"))
    torch.testing.assert_close(seen.std((0, 2, 3)), torch.ones(6), rtol=1e-3, atol=0)
    if kind == "weight":
        torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(6), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("folder")
def test_the_checkpoint_says_how_it_came_about():
    options = ("--set", "num_classes=4", "--optimizer", "rmsprop", "--mean", "0.5", "--std", "2")
    options = (*options, "--augment", "net.py:noisy", "--keep", "best", "--seed", 7, "-q")
    assert main(call(*options, "--label-smoothing", 0.1, "--clip-norm", 5, "--batch-size", 16)) == 0
    described = about("net.pt")
    run = described["metrics"]["run"]
    assert described["model"] == run["model"] == "net.py:net"
    wanted = {"arguments": {"num_classes": 4}, "data": "data.npz", "test_data": "data.npz"}
    wanted |= {"optimizer": "rmsprop", "lr": 0.05, "momentum": 0.0, "weight_decay": 0.0}
    wanted |= {"label_smoothing": 0.1, "clip_norm": 5.0, "augment": "net.py:noisy", "seed": 7}
    wanted |= {"batch_size": 16, "keep": "best", "schedule": "onecycle", "processes": 1}
    assert {name: run[name] for name in wanted} == wanted
    assert run["preprocessing"]["mean"] == [0.5]
    assert run["versions"]["torch"] == torch.__version__
    assert described["metrics"]["epoch"] in (1, 2, 3)


@pytest.mark.usefixtures("folder")
def test_exact_statistics_are_those_of_the_training_set(capsys):
    assert main(call("--statistics", "exact")) == 0
    assert "with moving averages)" in capsys.readouterr().out
    best = call("--statistics", "exact", "--keep", "best", "--overwrite")
    assert main(best) == 0
    told = re.search(
        r"accuracy ([\d.]+) % \(([\d.]+) % with moving averages, by which epoch (\d) was chosen\)",
        capsys.readouterr().out,
    )
    figures = about("net.pt")["metrics"]
    found = figures["test_accuracy"], figures["with_moving_averages"]["test_accuracy"]
    assert told.groups() == (*(f"{100 * share:.2f}" for share in found), str(figures["epoch"]))
    assert main(call("--statistics", "exact", "--overwrite")) == 0
    assert "with_moving_averages" in about("net.pt")["metrics"]
    state = torch.load("net.pt", weights_only=True)["state_dict"]
    x = torch.from_numpy(np.load("data.npz")["x"])
    seen = torch.nn.functional.conv2d(x, state["0.weight"])
    torch.testing.assert_close(state["1.running_mean"], seen.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["1.running_var"], seen.var((0, 2, 3)), rtol=1e-5, atol=1e-6)
    # of the second one: what it sees behind the first one's exact statistics
    hidden = torch.relu(
        torch.nn.functional.batch_norm(
            seen,
            state["1.running_mean"],
            state["1.running_var"],
            state["1.weight"],
            state["1.bias"],
        )
    )
    mean = torch.nn.functional.conv2d(hidden, state["3.weight"]).mean((0, 2, 3))
    torch.testing.assert_close(state["4.running_mean"], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("folder")
def test_tensorboard_gets_the_curves():
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(call("--tensorboard", "curves", "--log-every", 2, "-q")) == 0
    found = EventAccumulator("curves").Reload()
    assert [s.step for s in found.Scalars("step/loss")] == [2, 4, 6]
    assert [s.step for s in found.Scalars("epoch/test_accuracy")] == [2, 4, 6]


@pytest.mark.usefixtures("folder")
def test_a_place_where_no_curves_can_be_written_is_told(capsys):
    pytest.importorskip("tensorboard")
    assert main(call("--tensorboard", "data.npz", "-q")) == 2
    assert "Cannot write TensorBoard's files in data.npz: File exists." in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_without_tensorboard_a_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(call("--tensorboard", "curves")) == 4
    assert "bnfold[tensorboard] brings it" in capsys.readouterr().err


# --- an interrupted run ---------------------------------------------------------------------------


def interrupted(monkeypatch, epoch):
    """Let the run be broken off just before the state of this epoch is written."""
    save = bnfold.training.state.State.save

    def broken(self, path):
        if len(self.history) == epoch:
            raise KeyboardInterrupt
        save(self, path)

    monkeypatch.setattr(bnfold.training.state.State, "save", broken)


@pytest.mark.parametrize("kind", ["batch", "renorm", "weight"])
def test_an_interrupted_run_goes_on_to_the_same_bits_and_the_same_log(
    folder, monkeypatch, capsys, kind
):
    options = ("--norm", kind, "--log-every", 1, "--keep", "best")
    assert main(call(*options, "--log-file", "whole.jsonl", "-o", "whole.pt", "-q")) == 0
    with monkeypatch.context() as patch:
        interrupted(patch, 2)
        assert main(call(*options, "--log-file", "log.jsonl")) == 130
    told = capsys.readouterr().err
    assert "the run up to its last whole epoch is in net.state" in told
    assert "--resume" in told
    assert not (folder / "net.pt").exists()
    assert lines(folder / "log.jsonl")[-1]["epoch"] == 2  # written, and its state was not
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"event": "st')  # as a machine that goes down leaves it
    assert main(call(*options, "--log-file", "log.jsonl", "--resume", "-q")) == 0
    assert same_weights("net.pt", "whole.pt")
    whole, log = lines(folder / "whole.jsonl"), lines(folder / "log.jsonl")
    assert without_times(log) == without_times(whole)
    assert [line["epoch"] for line in log if line["event"] == "epoch"] == [1, 2, 3]
    assert [line["step"] for line in log if line["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert not (folder / "net.state").exists()


@pytest.mark.usefixtures("folder")
def test_a_state_is_not_written_over_by_chance(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupted(patch, 2)
        assert main(call()) == 130
    assert main(call()) == 2
    assert "net.state is the state of a run that was broken off" in capsys.readouterr().err
    assert main(call("--resume", "--seed", 1)) == 3
    assert "seed 0, now 1" in capsys.readouterr().err
    # one state_dict, another function
    assert main(call("--resume", "--norm", "ghost", "--norm-set", "ghost_size=8")) == 3
    assert "another network, or another normalisation in it" in capsys.readouterr().err
    assert main(call("--overwrite", "--seed", 1, "-q")) == 0
    assert main(call("--resume")) == 2
    assert main(call("--overwrite", "--resume")) == 2
    assert "There is no state net.state" in capsys.readouterr().err


def test_a_run_that_ends_while_it_writes_leaves_the_state_before(folder, monkeypatch):
    saved = []
    save = torch.save

    def cut_off(content, file):
        if len(saved) == 1:
            Path(file).write_bytes(b"half a fi")
            raise KeyboardInterrupt
        save(content, file)
        saved.append(file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut_off)
        assert main(call()) == 130
    assert len(torch.load("net.state", weights_only=True)["history"]) == 1
    assert {p.name for p in folder.iterdir()} - {"__pycache__"} == {
        *("data.npz", "net.py", "net.state")
    }


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_state_that_the_run_goes_on_from(folder, sign):
    options = call("--epochs", 4000, "--state", "run.state")
    started = subprocess.Popen(
        [sys.executable, "-m", "bnfold", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "run.state").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        started.send_signal(sign)
        _, told = started.communicate(timeout=60)
    finally:
        started.kill()
        started.wait()
    assert started.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[sign]
    assert "is in run.state; the same command with --resume goes on from there." in told
    assert "Traceback" not in told
    # nothing half-written beside it
    assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == [
        *("data.npz", "net.py", "run.state")
    ]
    content = torch.load(folder / "run.state", weights_only=True)
    assert 1 <= len(content["history"]) < 4000


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ["--set", "num_clases=3"],
            2,
            "no argument 'num_clases', it takes num_classes, in_channel",
        ),
        (["--set", "num_classes"], 2, "write NAME=VALUE"),
        (["--set", "num_classes=2"], 2, "label 2, but the network has 2 outputs (classes 0 to 1)"),
        (["--set", "in_channels=3"], 2, "--set in_channels=1"),
        (["--set", 'num_classes="a"'], 2, "net.py:net(num_classes='a') failed with TypeError"),
        (["--norm", "bogus"], 2, "There is no kind 'bogus'"),
        (["--norm", "ghost", "--norm-set", "ghost_size=0"], 2, "ghost_size is 0; it must be"),
        (["--norm", "ghost", "--norm-set", "ghost_size=2.5"], 2, "ghost_size is 2.5; it must be"),
        (["--norm", "batch", "--norm-set", "momentum=5"], 2, "momentum is 5; it must be"),
        (["--norm", "weight", "--norm-set", "log_scale=-1"], 2, "log_scale is -1; it must be"),
        (["--norm", "normprop", "--norm-set", "pooling=2"], 2, "pooling is 2; it must be"),
        (["--data", "flat.npz"], 2, "does not take a batch of shape (4, 5)"),
        (
            ["--norm", "weight", "--data", "little.npz"],
            2,
            "does not take a batch of shape (4, 1, 2",
        ),
        (["--norm", "renorm", "--norm-set", "r_max=big"], 2, "r_max is 'big'; it must be a number"),
        (["--norm", "renorm", "--norm-set", "schedule=3"], 2, "'renorm' has no option 'schedule'"),
        (["--norm", "weight", "--set", "in_channels=3"], 2, "--set in_channels=1"),
        (["--norm", "weight", "--statistics", "exact"], 2, "has none to measure"),
        (["--norm-set", "eps=1"], 2, "--norm-set is of --norm"),
        (["--data", "mnist:nowhere"], (3, 4), "mnist"),
        (["--data", "absent.npz"], 3, "does not exist"),
        (["--data", "unlabelled.npy"], 2, "holds no labels"),
        (["--data", "one.npz"], 3, "samples of one class only"),
        (["--data", "negative.npz"], 3, "has the label -1; classes count from 0"),
        (["--data", "floats.npz"], 3, "floats.npz"),
        (["--data", "short.npz"], 3, "short.npz"),
        (["--data", "net.py:net"], 2, "train_data gave a value of type Conv2d where a batch"),
        (["--data", "net.py:one"], 2, "net.py:one returned"),
        (["--epochs", "0"], 2, "epochs is 0"),
        (["--lr", "1e30"], 2, "training diverged"),
        (["--momentum", "0.9", "--optimizer", "adam"], 2, "adam has none to set"),
        (["--momentum", "1.5"], 2, "momentum is 1.5"),
        (["--clip-norm", "0"], 2, "clip_norm is 0.0"),
        (["--label-smoothing", "1"], 2, "label_smoothing is 1.0"),
        (["--augment", "net.py:net"], 2, "augment failed on a batch of shape (48, 1, 6, 6)"),
        (["--augment", "net.py:one"], 2, "augment must return the batch"),
        (["--augment", "net.py:absent"], 2, "has no 'absent'"),
        (["--keep", "best", "--data", "data.npz"], 2, "needs test_data"),
        (["--log-every", "2"], 2, "--log-every is of --log-file or --tensorboard"),
        (["--log-file", "no/log.jsonl"], 2, "--log-file no/log.jsonl: there is no such folder"),
        (["--log-file", "data.npz"], 2, "--log-file data.npz exists"),
        (["--workers", "-1"], 2, "workers is -1"),
        (["--device", "abacus"], 4, "'abacus' cannot be used here"),
        (["--resume"], 2, "There is no state net.state"),
        (["-o", "net.onnx"], 2, "the suffix must be one of .pt, .pth"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(folder, capsys, options, code, message):
    np.save("unlabelled.npy", np.zeros((4, 1, 6, 6), np.float32))
    np.savez("one.npz", x=np.zeros((4, 1, 6, 6), np.float32), y=np.ones(4, np.int64))
    for name, y in (
        ("negative", np.arange(-1, 3)),
        ("floats", np.arange(4) / 2),
        ("short", np.arange(3)),
    ):
        np.savez(f"{name}.npz", x=np.zeros((4, 1, 6, 6), np.float32), y=y)
    np.savez("little.npz", x=np.zeros((4, 1, 2, 2), np.float32), y=np.arange(4) % 2)
    np.savez("flat.npz", x=np.zeros((4, 5), np.float32), y=np.arange(4) % 2)
    before = sorted(path.name for path in folder.iterdir())
    assert main(call(*options)) in np.atleast_1d(code)
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("bnfold: ") == 1
    assert "Traceback" not in said.err
    made = [path.name for path in folder.iterdir()]
    assert sorted(name for name in made if name != "__pycache__") == before
