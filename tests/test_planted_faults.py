"""The verifier fails on every planted fault and names the layer, and passes right folds that any
fixed tolerance refuses; on small networks here, all faults at every layer where slow tests run."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
import torch
from conditions import PROFILES, conditioned
from planted import FAULTS, FLOAT16, Bed, Planted, norms_of
from torch import Tensor, nn

import bnfold
from bnfold.graph import to_proto
from bnfold.proof import runtimes
from bnfold.proof.verify import VerifyReport, verify

SHAPE, WIDTH = (3, 12, 12), 16


class Net(nn.Module):
    """A stem, a residual block with a depthwise convolution, and a classifier."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(x + self.bn3(self.conv3(y)))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


def pictures(profile: str, rows: int, seed: int = 0) -> np.ndarray:
    """Inputs as the profile's network is given them."""
    return PROFILES[profile].inputs(rows, SHAPE, seed)


@cache
def bed(profile: str, width: int = WIDTH) -> Bed:
    """The network of a profile, with the statistics that its activations have."""
    torch.manual_seed(1)
    net = conditioned(Net(width), SHAPE, PROFILES[profile])
    return Bed(to_proto(bnfold.export(net, torch.zeros(1, *SHAPE))))


def held(profile: str, wrong: Planted, *, by_record: bool) -> VerifyReport:
    """What the verifier says of a planted fault: with the fold's record, or of two files alone."""
    record = wrong.record if by_record else None
    return verify(
        bed(profile).original,
        wrong.folded,
        gauges=record.gauges if record else None,
        aliases=record.aliases if record else None,
        inputs={"x": pictures(profile, 8, seed=7)},
        threads=1,
    )


def around(wrong: Planted, original: onnx.ModelProto) -> set[str]:
    """The names by which a report may point at the layer: its batch norm's or its convolution's."""
    (node,) = (n.node for n in norms_of(original) if wrong.output in n.node.output)
    producer = next(n for n in original.graph.node if node.input[0] in n.output)
    return {node.name, producer.name, *node.output, *producer.output, wrong.norm}


# ------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_fails_gate_a_and_its_layer_is_named(fault: str) -> None:
    start = bed("ordinary")
    wrong = start.plant(fault, start.outputs[1], channel=3)
    report = held("ordinary", wrong, by_record=True)
    assert not report.passed
    assert report.failures[0].gate == "A"
    names = around(wrong, start.original)
    if fault != FLOAT16:  # which is in every layer, so that the first is named
        assert report.failures[0].subject in names
    assert report.first_divergence is not None


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_fails_without_a_record(fault: str) -> None:
    start = bed("ordinary")
    wrong = start.plant(fault, start.outputs[1], channel=3)
    report = held("ordinary", wrong, by_record=False)
    assert not report.passed
    assert "A" not in [result.gate for result in report.gates]
    assert report.r > 10


def test_limits_of_gate_b_are_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """With limits that let everything through every fault would pass: nothing else catches it."""
    start = bed("ordinary")
    monkeypatch.setattr(runtimes, "R_LIMIT", 1e9)
    for fault in FAULTS:
        wrong = start.plant(fault, start.outputs[1], channel=3)
        assert held("ordinary", wrong, by_record=False).passed
