"""The verifier fails on every planted fault and names the layer, and passes right folds that any
fixed tolerance refuses; on small networks here, all faults at every layer where slow tests run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from planted import FAULTS, FLOAT16, Bed, Planted, norms_of
from torch import Tensor, nn

import bnfold
from bnfold.graph import to_proto
from bnfold.proof import comparison
from bnfold.proof.verify import VerifyReport, verify

SIZE, WIDTH = 12, 16


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


# ------------------------------------------------------------------- networks, well and ill made


def norm_modules(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def spread_gammas(net: Net) -> None:
    """Gammas over four decades, of both signs."""
    for norm in norm_modules(net):
        exponent = torch.rand(norm.num_features) * 4 - 2
        norm.weight.data = 10**exponent * torch.sign(torch.randn(norm.num_features))


def dead_channels(net: Net) -> None:
    """A quarter of the channels has a variance of 1e-12."""
    for conv in (net.conv1, net.conv2, net.conv3):
        conv.weight.data[::4] *= 1e-6


def large_means(net: Net) -> None:
    """A mean of thousands of standard deviations, which the batch norm takes away."""
    assert net.conv2.bias is not None
    net.conv2.bias.data += 1000.0


def huge_weights(net: Net) -> None:
    net.conv1.weight.data *= 1e4
    net.fc.weight.data *= 1e4


def tiny_outputs(net: Net) -> None:
    net.fc.weight.data *= 1e-6
    net.fc.bias.data *= 1e-6


def ordinary(net: Net) -> None:
    """As it is initialised."""


PROFILES: dict[str, Callable[[Net], None]] = {
    "ordinary": ordinary,
    "gammas over four decades": spread_gammas,
    "variances of 1e-12": dead_channels,
    "large means": large_means,
    "huge weights": huge_weights,
    "tiny outputs": tiny_outputs,
    "pixels of 0 to 255": ordinary,
}


def pictures(profile: str, rows: int, seed: int = 0) -> np.ndarray:
    """Inputs as the profile's network is given them."""
    rng = np.random.default_rng(seed)
    if profile.startswith("pixels"):
        return rng.integers(0, 256, (rows, 3, SIZE, SIZE)).astype(np.float32)
    return rng.standard_normal((rows, 3, SIZE, SIZE)).astype(np.float32)


@cache
def bed(profile: str, width: int = WIDTH) -> Bed:
    """The network of a profile, with the statistics that its activations have."""
    torch.manual_seed(1)
    net = Net(width)
    for norm in norm_modules(net):
        norm.weight.data = torch.randn(norm.num_features) * 0.3 + 1
        norm.bias.data = torch.randn(norm.num_features) * 0.3
        norm.momentum = None  # the plain average
    PROFILES[profile](net)
    with torch.no_grad():
        net.train()(torch.from_numpy(pictures(profile, 16)))
    exported = bnfold.export(net.eval(), torch.zeros(1, 3, SIZE, SIZE))
    return Bed(to_proto(exported))


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
    monkeypatch.setattr(comparison, "R_LIMIT", 1e9)
    monkeypatch.setattr(comparison, "ELEMENT_LIMIT", 1e9)
    for fault in FAULTS:
        wrong = start.plant(fault, start.outputs[1], channel=3)
        assert held("ordinary", wrong, by_record=False).passed
