"""The layer that a failed proof names: what gate A is certain of comes before what values show."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from fault_nets import FAULTS, NETS, Net, changed, depthwise, inputs, residual
from onnx import TensorProto, helper

import bnfold
from bnfold.proof.fault.finding import find_fault
from bnfold.proof.figures.draws import InputSet
from bnfold.proof.result import VerifyReport
from bnfold.runs import report_of

Feeds = Mapping[str, np.ndarray]


def one_channel(factor: float) -> object:
    """One output channel at another scale."""

    def wrong(array: np.ndarray) -> np.ndarray:
        array[2] *= np.float32(factor)
        return array

    return wrong


def sentence_of(report: VerifyReport) -> str:
    """The last word of the verdict, as every face has it."""
    return str(report_of("verify", proof=report)["summary"])


# ------------------------------------------------------------------------- gate A has named it


def ill_conditioned() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Inputs far from zero: what rounding does to the first layer is beyond a small fault."""
    far = np.float32(3000)
    model = depthwise()
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    stem = held["stem.weight"].sum(axis=(1, 2, 3))
    original = changed(model, **{"bn0.running_mean": lambda m: m + far * stem})
    return original, {"x": inputs(original)["x"] + far}


@pytest.mark.parametrize("planned", [True, False])
def test_no_place_that_rounding_explains_is_blamed_where_gate_a_has_named_one(planned) -> None:
    original, feeds = ill_conditioned()
    fold = bnfold.fold(original)
    wrong = changed(fold.model, **{"point.weight": one_channel(1 + 1e-6)})
    report = bnfold.verify(original, wrong, feeds, record=fold.record if planned else None)
    assert {result.gate for result in report.failures} >= {"A"}
    assert report.cause is not None
    assert (report.cause.norm, report.cause.others) == ("bn2", ())
    assert "'bn2'" in report.fault.sentence
    assert "'bn0'" not in report.fault.sentence


@pytest.mark.parametrize("planned", [True, False])
def test_gate_a_alone_names_layer_and_batch_norm(planned: bool) -> None:
    original = residual()
    fold = bnfold.fold(original)
    wrong = changed(fold.model, **{"conv2.weight": one_channel(1 + 2e-6)})
    report = bnfold.verify(original, wrong, record=fold.record if planned else None)
    assert {result.gate for result in report.failures} == {"A"}
    assert report.cause is not None
    assert report.cause.norm == "bn2"
    assert "The fault is at Conv 'node_conv_6'" in sentence_of(report)
    assert "'bn2'" in sentence_of(report)


def test_batch_norm_folded_forward_is_named_by_the_plan() -> None:
    original = NETS["preactivation"]()
    fold = bnfold.fold(original)
    wrong = changed(fold.model, **{"conv2.weight": one_channel(1.001)})
    report = bnfold.verify(original, wrong, record=fold.record)
    assert report.cause is not None
    assert (report.cause.norm, report.cause.others) == ("bn2", ())
    assert report.cause.node == next(r.subject for r in report.failures if r.gate == "A")


def test_layer_without_a_batch_norm_blames_none() -> None:
    original = residual()
    fold = bnfold.fold(original)
    wrong = changed(fold.model, **{"fc.weight": one_channel(1.001)})
    for record in (fold.record, None):
        report = bnfold.verify(original, wrong, record=record)
        assert report.cause is not None
        assert report.cause.norm is None
        assert "The fault is at Gemm 'node_gemm_12'" in sentence_of(report)
        assert "bn" not in report.cause.sentence.replace("bnfold", "")


@pytest.mark.parametrize("planned", [True, False])
def test_outputs_that_hardly_depend_on_the_inputs_hide_no_name(planned: bool) -> None:
    """Every batch norm in turn; the last layer takes up next to nothing of what comes to it."""
    original = changed(residual(), **{"fc.weight": lambda w: w * np.float32(1e-9)})
    fold = bnfold.fold(original)
    faults = {"bn0": "variance x 0.999", "bn1": "mean's sign", "bn2": "variance x 0.999"}
    for norm, fault in faults.items():
        if not planned and fault == "mean's sign":
            continue  # a bias alone is wrong, and without a plan none is judged
        spoil, name, _ = FAULTS[fault]
        wrong = bnfold.fold(spoil(original, norm)).model
        report = bnfold.verify(original, wrong, record=fold.record if planned else None)
        assert report.cause is not None
        assert (report.cause.norm, report.cause.fault) == (norm, name)


def test_several_layers_that_gate_a_has_named_are_all_told() -> None:
    original = residual()
    fold = bnfold.fold(original)
    faults = {"conv1.weight": one_channel(1.001), "conv2.weight": one_channel(1.001)}
    wrong = changed(fold.model, **faults)
    report = bnfold.verify(original, wrong, record=fold.record)
    assert report.cause is not None
    assert (report.cause.norm, report.cause.others) == ("bn1", ("bn2",))
    assert "Further faults lie at 'bn2'." in report.fault.sentence


# ----------------------------------------------------- outputs that are no smooth function


def with_tail(*operators: tuple[str, dict[str, object]], kind: int) -> onnx.ModelProto:
    """Batch norms that went forward: without a plan gate A says nothing."""
    net = Net(3, 10, 10)
    x = net.op("Relu", net.conv("x", "stem", 3, 6))
    x = net.op("Relu", net.conv(net.norm(x, "bn1", 6), "conv1", 6, 8))
    x = net.conv(net.norm(x, "bn2", 8), "conv2", 8, 8)
    for operator, attributes in operators:
        x = net.op(operator, x, *(["half"] if operator == "Greater" else []), **attributes)
    net.held("half", np.float32(0.2))
    model = net.model(x)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(x, kind, [None] * 4))
    return model


TAILS = {
    "ArgMax": with_tail(("ArgMax", {"axis": 1, "keepdims": 1}), kind=TensorProto.INT64),
    "Cast": with_tail(("Round", {}), ("Cast", {"to": TensorProto.INT32}), kind=TensorProto.INT32),
    "Greater": with_tail(("Greater", {}), kind=TensorProto.BOOL),
    "Log": with_tail(("Log", {}), kind=TensorProto.FLOAT),
    "Identity": with_tail(("Identity", {}), kind=TensorProto.FLOAT),
}


@pytest.mark.parametrize("tail", TAILS)
def test_operator_that_makes_the_error_large_is_not_blamed(tail: str) -> None:
    original = TAILS[tail]
    wrong = bnfold.fold(FAULTS["mean's sign"][0](original, "bn2")).model
    report = bnfold.verify(original, wrong)
    assert all(result.gate != "A" for result in report.gates)
    assert report.cause is not None
    assert (report.cause.norm, report.cause.fault) == ("bn2", "mean's sign")


def test_operator_behind_the_last_that_is_wrong_by_itself_is_blamed() -> None:
    original = TAILS["Greater"]
    wrong = changed(bnfold.fold(original).model, half=lambda half: half + np.float32(2))
    report = bnfold.verify(original, wrong)
    assert report.first_divergence is not None
    assert report.first_divergence.op_type == "Greater"


def test_shape_that_was_frozen_is_told_as_a_shape() -> None:
    net = Net(3, 10, 10)
    x = net.op("Relu", net.norm(net.conv("x", "stem", 3, 6), "bn0", 6))
    net.weights["target"] = np.array([0, -1])
    model = net.model(net.op("Reshape", x, "target"))
    sizes = next(tensor for tensor in model.graph.initializer if tensor.name == "target")
    sizes.CopyFrom(onnx.numpy_helper.from_array(np.array([0, -1]), "target"))
    wrong = bnfold.fold(model).model
    sizes = next(tensor for tensor in wrong.graph.initializer if tensor.name == "target")
    sizes.CopyFrom(onnx.numpy_helper.from_array(np.array([1, -1]), "target"))
    report = bnfold.verify(model, wrong, inputs(model))
    assert report.cause is not None
    assert (report.cause.norm, report.cause.fault) == (None, "shape")
    assert "has the shape [1, 3072] and should have [8, 384]." in report.cause.sentence


@pytest.mark.parametrize("behind", ["Identity", "Dropout"])
def test_fault_in_front_of_what_only_passes_a_value_on_is_named(behind: str) -> None:
    net = Net(3, 10, 10)
    x = net.norm(net.conv("x", "stem", 3, 6), "bn0", 6)
    model = net.model(net.op(behind, x))
    wrong = bnfold.fold(FAULTS["eps 1e-3 for 1e-5"][0](model, "bn0")).model
    report = bnfold.verify(model, wrong)
    assert report.cause is not None
    assert (report.cause.norm, report.cause.fault) == ("bn0", "eps")


def test_value_that_a_batch_norm_passed_by_on_its_way_forward_is_not_blamed() -> None:
    """What the Reshape gives is carried at another scale, which the fold's Gemm gives back."""
    net = Net(3, 10, 10)
    x = net.op("Relu", net.conv("x", "stem", 3, 6))
    x = net.op("Relu", net.conv(x, "conv1", 6, 8))
    x = net.op("Flatten", net.norm(net.op("Relu", net.conv(x, "conv2", 8, 8)), "bn2", 8))
    model = net.model(net.gemm(x, "fc", 8 * 16, 5))
    fold = bnfold.fold(model)
    assert [norm.into for norm in fold.folded] == [("fc",)]
    for weight, node in (("stem", "node_conv_0"), ("conv1", "node_conv_2")):
        wrong = changed(fold.model, **{f"{weight}.weight": one_channel(1.001)})
        report = bnfold.verify(model, wrong)
        assert report.first_divergence is not None
        assert report.first_divergence.node == node
        assert report.cause is not None
        assert (report.cause.norm, report.cause.others) == (None, ())


def test_what_rounding_explains_is_no_name() -> None:
    """A fault far below the rounding of the first layer, and nothing said by gate A."""
    original, feeds = ill_conditioned()
    wrong = changed(bnfold.fold(original).model, **{"point.weight": one_channel(1 + 1e-6)})
    sets = [InputSet("given", (feeds,))]
    finding = find_fault(original, wrong, sets, gauges=None, aliases=None, unit=2.0**-24)
    assert finding.first is None
    assert finding.cause is None
    assert "No value is off by more than the original's own rounding explains" in finding.sentence
