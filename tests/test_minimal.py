"""The smallest pair that still fails, and the fewest names."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnxslim
import pytest
from fault_nets import FAULTS, NETS, SPOILED, TAKES, Net, changed, in_training, inputs, residual
from handmade import Gauge

import bnfold
from bnfold.api import FoldResult
from bnfold.bisecting.minimal import MinimalPair, fewest, minimal_pair
from bnfold.proof.fault.finding import Finding, find_fault
from bnfold.proof.figures.draws import InputSet
from bnfold.proof.verify import verify

UNIT = 2.0**-24
Plan = dict[str, object]
BARE: Plan = {"gauges": None, "aliases": None}


@cache
def right(kind: str) -> tuple[onnx.ModelProto, FoldResult]:
    model = NETS[kind]()
    return model, bnfold.fold(model)


def plan_of(fold: FoldResult) -> Plan:
    return {"gauges": fold.record.gauges, "aliases": fold.record.aliases}


def reduced(
    original: onnx.ModelProto, folded: onnx.ModelProto, plan: Plan = BARE
) -> tuple[Finding, MinimalPair | None]:
    sets = [InputSet("given", (inputs(original),))]
    finding = find_fault(original, folded, sets, unit=UNIT, **plan)
    pair = minimal_pair(original, folded, finding, **plan)
    if pair is not None:
        onnx.checker.check_model(pair.original)
        onnx.checker.check_model(pair.folded)
    return finding, pair


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


PIECES = {
    "residual": (["Conv", "BatchNormalization"], ["Conv"]),
    "depthwise": (["Conv", "BatchNormalization"], ["Conv"]),
    "preactivation": (["BatchNormalization", "Conv"], ["Conv"]),
    "dense": (["Gemm", "BatchNormalization"], ["Gemm"]),
}


@pytest.mark.parametrize("name", ["eps dropped", "one gamma off by 1e-3"])
@pytest.mark.parametrize("kind", NETS)
def test_pair_is_the_batch_norm_and_what_took_it_up(kind: str, name: str) -> None:
    original, fold = right(kind)
    wrong = bnfold.fold(FAULTS[name][0](original, SPOILED[kind])).model
    for plan in (plan_of(fold), BARE):
        finding, pair = reduced(original, wrong, plan)
        assert pair is not None
        assert pair.norm == SPOILED[kind]
        assert (operators(pair.original), operators(pair.folded)) == PIECES[kind]
        assert {t.name for t in pair.folded.graph.initializer} == {
            f"{TAKES[kind]}.weight", f"{TAKES[kind]}.bias"}  # fmt: skip
        assert not pair.report.passed
        assert pair.report.cause is not None
        assert finding.cause is not None
        assert pair.report.cause.fault == finding.cause.fault  # for the same reason


def test_pair_of_right_weights_passes() -> None:
    """The pieces are right: with the fault taken out of them, the pair passes."""
    for kind in NETS:
        original, fold = right(kind)
        wrong = bnfold.fold(FAULTS["mean's sign"][0](original, SPOILED[kind])).model
        pair = reduced(original, wrong, plan_of(fold))[1]
        assert pair is not None
        held = {tensor.name for tensor in pair.folded.graph.initializer}
        mended = onnx.ModelProto()
        mended.CopyFrom(pair.folded)
        del mended.graph.initializer[:]
        mended.graph.initializer.extend(t for t in fold.model.graph.initializer if t.name in held)
        assert verify(pair.original, mended, inputs=pair.inputs).passed


def test_fold_of_another_tool_is_cut_too() -> None:
    original, _ = right("residual")
    wrong = onnxslim.slim(FAULTS["variance x 0.999"][0](original, "bn2"))
    pair = reduced(original, wrong)[1]
    assert pair is not None
    assert (pair.norm, operators(pair.folded)) == ("bn2", ["Conv"])
    assert list(pair.inputs) == ["relu_5"]


def test_batch_norm_that_stays_is_a_pair_of_its_own() -> None:
    original, _ = right("residual")
    kept = bnfold.fold(original, keep=["bn1"])
    pair = reduced(original, in_training(kept.model, "bn1"), plan_of(kept))[1]
    assert pair is not None
    assert operators(pair.original) == operators(pair.folded) == ["BatchNormalization"]


def test_value_that_is_carried_otherwise_is_re_expressed() -> None:
    """A fold that halves one value and moves another: Mul and Add stand at the piece's ends."""
    original = residual()
    by = np.linspace(0.5, 2, 8).reshape(1, 8, 1, 1)
    channels = by.reshape(8)
    fold = bnfold.fold(original)
    folded = changed(
        fold.model,
        **{
            "conv1.weight": lambda w: w * channels[:, None, None, None],
            "conv1.bias": lambda b: b * channels,
            "conv2.weight": lambda w: w / channels[None, :, None, None],
        },
    )
    plan = plan_of(fold)
    zero = np.zeros((1, 1, 1, 1))
    gauges = dict(fold.record.gauges)
    for name in ("batchnormalization_4", "relu_5"):
        gauges[name] = Gauge(by, zero)
    inner = gauges["conv_3"]
    gauges["conv_3"] = Gauge(inner.scale * by, inner.origin)
    plan["gauges"] = gauges
    assert reduced(original, folded, plan)[1] is None
    wrong = changed(folded, **{"conv2.weight": lambda w: w * np.float32(1.01)})
    pair = reduced(original, wrong, plan)[1]
    assert pair is not None
    assert operators(pair.folded) == ["Mul", "Conv"]
    assert "carries 'relu_5' as scale * (x - origin)" in pair.folded.doc_string
    assert pair.report.r < 1.1e6  # the fault alone, about 1 % of the size
    wrong = changed(folded, **{"conv1.weight": lambda w: w * np.float32(1.01)})
    pair = reduced(original, wrong, plan)[1]
    assert pair is not None
    assert operators(pair.folded) == ["Conv", "Mul"]
    assert pair.norm == "bn1"


def test_channels_that_cannot_be_read_back_are_left_out() -> None:
    """gamma = 0 forward: the folded network holds anything there."""
    original = changed(residual(), **{"bn1.weight": lambda g: g * (np.arange(8) != 2)})
    fold = bnfold.fold(original)
    plan = plan_of(fold)
    gauges = dict(fold.record.gauges)
    scale = np.where(np.arange(8) == 2, 0.0, 1.0).reshape(1, 8, 1, 1)
    gauges["batchnormalization_4"] = Gauge(scale, np.zeros((1, 1, 1, 1)))
    plan["gauges"] = gauges
    wrong = bnfold.fold(FAULTS["mean's sign"][0](original, "bn1")).model
    pair = reduced(original, wrong, plan)[1]
    assert pair is not None
    assert operators(pair.original) == ["Conv", "BatchNormalization", "Mul"]


def test_piece_between_several_values_takes_them_all() -> None:
    net = Net(3, 8, 8)
    x = net.op("Relu", net.conv("x", "stem", 3, 4))
    y = net.op("Relu", net.conv(x, "side", 4, 4, pad=1))
    model = net.model(net.norm(net.op("Add", x, y), "bn", 4))
    wrong = FAULTS["no beta"][0](model, "bn")
    for name in ("Add", "BatchNormalization"):
        assert name in operators(wrong)
    pair = reduced(model, wrong)[1]
    assert pair is not None
    assert operators(pair.original) == ["BatchNormalization"]
    # the sum itself wrong: both of its sources are inputs
    tripled = onnx.ModelProto()
    tripled.CopyFrom(model)
    add = next(node for node in tripled.graph.node if node.op_type == "Add")
    add.op_type = "Sub"
    plan = {"gauges": {}, "aliases": {}}
    pair = reduced(model, tripled, plan)[1]
    assert pair is not None
    assert (operators(pair.original), sorted(pair.inputs)) == (["Add"], sorted([x, y]))


def test_networks_that_agree_have_no_pair() -> None:
    original, fold = right("dense")
    assert reduced(original, fold.model, plan_of(fold))[1] is None


def test_fixed_batch_stays_fixed() -> None:
    original, _ = right("dense")
    fixed = onnx.ModelProto()
    fixed.CopyFrom(original)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    fold = bnfold.fold(fixed)
    wrong = bnfold.fold(FAULTS["eps 1e-3 for 1e-5"][0](fixed, "bn1")).model
    pair = reduced(fixed, wrong, plan_of(fold))[1]
    assert pair is not None
    dims = pair.original.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [8, 12]


# --------------------------------------------------------------------------------- fewest names


@pytest.mark.parametrize("guilty", [{"7"}, {"0"}, {"49"}, {"3", "30"}, {"1", "2", "3"}])
def test_fewest_are_the_guilty(guilty: set[str]) -> None:
    names = [str(number) for number in range(50)]
    trials: list[frozenset[str]] = []

    def fails(chosen: object) -> bool:
        trials.append(frozenset(chosen))  # type: ignore[call-overload]
        return guilty <= trials[-1]

    assert set(fewest(names, fails)) == guilty
    assert len(trials) == len(set(trials))
    assert len(trials) <= {1: 13, 2: 60, 3: 60}[len(guilty)]


def test_fewest_of_several_alone_guilty_is_one() -> None:
    names = [str(number) for number in range(20)]
    assert fewest(names, lambda chosen: bool({"4", "17"} & set(chosen))) in (["4"], ["17"])
    assert fewest(["a"], lambda _: True) == ["a"]
    assert fewest(names, lambda chosen: len(chosen) == 20) == names
