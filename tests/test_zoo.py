"""The zoo: its measurement finds a wrong network, and some of its networks fold right.

The networks come from torchvision and timm, which .venv-zoo has (scripts/env-zoo):

    .venv-zoo/bin/python -m pytest -m slow tests/test_zoo.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import with_statistics
from onnx import numpy_helper
from torch import nn

import bnfold
from scripts.measure_zoo import judged, measure_fold, measure_proof, tool
from scripts.zoo_table import table

FACTS = {"norms": 1, "torch.fx": {"left": 0, "difference": 1e-15}}
SOME = (
    "timm:levit_128s",
    "timm:repvgg_a0",
    "timm:xcit_nano_12_p16_224",
    "torchvision:densenet121",
    "torchvision:mobilenet_v3_small",
)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A convolution, a batch norm and a Relu, as a file."""
    module = with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    bnfold.export(module, torch.zeros(1, 3, 16, 16), tmp_path / "network.onnx")
    return tmp_path / "network.onnx"


@pytest.mark.parametrize("name", ["bnfold", "onnxruntime", "onnxsim", "onnxslim", "onnxscript"])
def test_a_tool_writes_a_network_that_is_right(name: str, network: Path, tmp_path: Path) -> None:
    tool(name)(network, tmp_path / "out.onnx")
    _, (result,) = judged(network, [tmp_path / "out.onnx"])
    assert result["left"] == 0
    assert result["r"] < 4


def test_a_wrong_network_is_found_and_told(network: Path, tmp_path: Path) -> None:
    folded = tmp_path / "out.onnx"
    tool("bnfold")(network, folded)
    model = onnx.load(folded)
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    spoilt = numpy_helper.to_array(weight) * np.float32(1 + 1e-4)
    weight.CopyFrom(numpy_helper.from_array(spoilt, weight.name))
    onnx.save(model, folded)
    own, (result,) = judged(network, [folded])
    assert own < 1e-6
    assert result["r"] > 4
    measured = {
        "fold": measure_fold(network),
        "proof": measure_proof(network),
        "tools": {"tools": {"bnfold": {}, "onnxsim": result}, "original error": own},
    }
    text = table({"a": measured}, {"a": FACTS}, 1)
    assert "| a | 1 | 0 | 0 |  | 0 (wrong) |" in text
    assert "1 wrong: a" in text
    assert "0 wrong (gate A), 0 crashes" in text


@pytest.mark.parametrize(("r", "own", "told"), [(6, 1e-3, 0), (6, 1e-6, 1), (300, 1e-3, 1)])
def test_what_is_wrong_depends_on_the_original(r: float, own: float, told: int) -> None:
    fold = {"before": 1, "left": 0, "left, repairs allowed": 0, "left, all gammas positive": 0}
    tools = {"tools": {"onnxsim": {"left": 0, "r": r}}, "original error": own}
    assert f"0 failures, {told} wrong" in table(
        {"a": {"fold": fold, "tools": tools}}, {"a": FACTS}, 1
    )


def test_a_crash_of_bnfold_is_counted() -> None:
    text = table({"a": {"fold": {"error": "RecursionError"}}}, {"a": FACTS}, 1)
    assert "1 crashes" in text
    assert "crash: RecursionError" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_a_network_of_the_zoo_folds_right(name: str, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="timm and torchvision are in .venv-zoo (scripts/env-zoo)")
    from scripts import zoo

    zoo.export(name, tmp_path)
    proof = measure_proof(zoo.file_of(name, tmp_path))
    assert proof["passed"], proof["failures"]
