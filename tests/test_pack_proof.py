"""`pack apply` proves what it writes: no weight is neither the base's nor the pack's."""

import numpy as np
import pytest
import torch
from test_adapt import Net, seeded, target

import bnfold
from bnfold.adapting import base as bases
from bnfold.cli import main


@pytest.fixture
def files(tmp_path):
    net = seeded(Net()).eval()
    bnfold.export(net, torch.zeros(1, 2, 5, 5), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", target(61).numpy())
    common = ["--target-data", str(tmp_path / "x.npy"), "-q", "--overwrite"]
    assert (
        main(["adapt", str(tmp_path / "net.onnx"), *common, "--pack", str(tmp_path / "a.pack")])
        == 0
    )
    return tmp_path


def double_a_weight(adapted):
    for value in adapted.graph.graph.initializers.values():
        if value.name == "conv1.weight":
            value.const_value = bases.ir.tensor(2 * value.const_value.numpy(), name=value.name)


def swap_two_layers(adapted):
    held = adapted.graph.graph.initializers
    one, other = held["bn1.running_mean"], held["bn2.running_mean"]
    one.const_value, other.const_value = other.const_value, one.const_value


@pytest.mark.parametrize("fault", [double_a_weight, swap_two_layers])
def test_a_fault_in_what_is_written_is_seen(files, monkeypatch, capsys, fault):
    whole = bases.Base.adapted

    def faulty(self, statistics):
        adapted = whole(self, statistics)
        fault(adapted)
        return adapted

    monkeypatch.setattr(bases.Base, "adapted", faulty)
    arguments = [str(files / "net.onnx"), str(files / "a.pack"), "-o", str(files / "b.onnx")]
    assert main(["pack", "apply", *arguments, "-q"]) in (1, 3)
    assert "neither the base's nor the pack's" in capsys.readouterr().err
    assert not (files / "b.onnx").exists()
    monkeypatch.undo()
    assert main(["pack", "apply", *arguments, "-q"]) == 0
