"""What every verb prints with --json, on one small network: each is run once in a session."""

import contextlib
import json

import numpy as np
import onnx
import pytest
import torch
from nets import with_statistics
from onnx import numpy_helper

from bnfold import graph
from bnfold.cli import main
from models.digits import digits_cnn

SPEC = "--model models/digits.py:digits_cnn --input-shape 1,1,8,8"
VERBS = {
    "fold": "fold {0}/net.onnx -o {0}/again.onnx",
    "fold, torch": f"fold {{0}}/net.pt {SPEC} -o {{0}}/torch.onnx",
    "fold, no proof": "fold {0}/net.onnx --dry-run",
    "fold, not enough": "fold {0}/net.onnx -o {0}/n.onnx --keep * --require-fold 1",
    "inspect": "inspect {0}/net.onnx --keep *0*",
    "unfold": "unfold {0}/net.folded.onnx",
    "export": f"export {{0}}/net.pt {SPEC} -o {{0}}/exported.onnx",
    "verify": "verify {0}/net.onnx {0}/net.folded.onnx",
    "verify, wrong": "verify {0}/net.onnx {0}/wrong.onnx --report {0}/wrong.html",
    "parity": "parity {0}/net.onnx",
    "adapt": "adapt {0}/net.folded.onnx --target-data {0}/night.npy -o {0}/night.onnx"
    " --pack {0}/night.pack",
    "adapt, other": "adapt {0}/net.folded.onnx --target-data {0}/fog.npy -o {0}/fog.onnx"
    " --pack {0}/fog.pack",
    "pack show": "pack show {0}/night.pack",
    "pack diff": "pack diff {0}/night.pack {0}/fog.pack",
    "pack apply": "pack apply {0}/net.folded.onnx {0}/night.pack -o {0}/applied.onnx",
    "pack make": "pack make {0}/night.onnx --base {0}/net.folded.onnx -o {0}/made.pack",
    "pack keygen": "pack keygen -o {0}/key",
    "train": "train models/digits.py:digits_cnn --samples 256 --epochs 1 -o {0}/trained.pt",
    "bench": "bench {0}/net.onnx --rounds 8 --seconds 0.5",
    "doctor": "doctor",
    "report": "report {0}/one.json -o {0}/page.md",
    "unreadable": "fold {0}/nothing.onnx",
    "usage": "fold {0}/net.onnx --no-such-option",
}


_ONCE = {}  # a session fixture that two files import is two fixtures


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The folder of a network as a checkpoint, as ONNX and folded, samples, and a wrong fold."""
    if "made" not in _ONCE:
        _ONCE["made"] = made_in(tmp_path_factory.mktemp("made"))
    return _ONCE["made"]


@pytest.fixture(scope="session")
def runs(made):
    """What a verb printed, by its name in VERBS."""
    return _ONCE.setdefault("runs", Runs(made))


def made_in(folder):
    module = with_statistics(digits_cnn(), positive=True)
    torch.save(module.state_dict(), folder / "net.pt")
    graph.write_onnx(graph.export_module(module, (torch.zeros(1, 1, 8, 8),)), folder / "net.onnx")
    rng = np.random.default_rng(0)
    for name, size in (("night", 0.3), ("fog", 2.0)):
        np.save(folder / f"{name}.npy", size * rng.normal(size=(40, 1, 8, 8)).astype("f4"))
    assert main(["fold", str(folder / "net.onnx"), "-q"]) == 0
    model = onnx.load(folder / "net.folded.onnx")
    weight = next(t for t in model.graph.initializer if t.name.endswith("weight"))
    array = numpy_helper.to_array(weight).copy()
    array[0] *= 1.001
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, folder / "wrong.onnx")
    return folder


class Runs(dict):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __missing__(self, name):
        arguments = [a.format(self.folder) for a in VERBS[name].split()]
        stdout = self.folder / "stdout"
        with stdout.open("w") as file, contextlib.redirect_stdout(file):
            code = main([*arguments, "--json"])
        self[name] = json.loads(stdout.read_text())  # one document, nothing else
        assert code == self[name].get("exit_code", self[name].get("error", {}).get("exit_code"))
        return self[name]
