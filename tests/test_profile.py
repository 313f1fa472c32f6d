"""The error at every former batch norm, and which value stands for which."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import onnx
import onnxsim
import onnxslim
import pytest
from fault_nets import FAULTS, NETS, Net, inputs, narrowed, residual
from folding import run

import bnfold
from bnfold.api import FoldResult
from bnfold.errors import InputError, NothingComparedError
from bnfold.proof.exact.alignment import Alignment, relative_error
from bnfold.proof.exact.counterpart import View
from bnfold.proof.exact.reference import Float64Reference
from bnfold.proof.fault.divergence import divergences
from bnfold.proof.fault.profile import Profile, profile

UNIT = 2.0**-24


@cache
def right(kind: str) -> tuple[onnx.ModelProto, FoldResult]:
    model = NETS[kind]()
    return model, bnfold.fold(model)


def profiled(kind: str, folded: onnx.ModelProto | None = None, *, plan: bool = True) -> Profile:
    original, fold = right(kind)
    record = fold.record if plan else None
    return profile(
        original,
        folded or fold.model,
        inputs(original),
        gauges=record.gauges if record else None,
        aliases=record.aliases if record else None,
    )


@pytest.mark.parametrize("kind", NETS)
def test_right_fold_is_at_every_layer_as_good_as_the_original(kind: str) -> None:
    _, fold = right(kind)
    for plan in (True, False):
        made = profiled(kind, plan=plan)
        assert [layer.norm for layer in made.layers] == [norm.name for norm in fold.folded]
        for layer in made.layers:
            assert 0 < layer.original < 20 * UNIT
            if layer.folded is not None:  # told without a plan where it was folded backward
                assert layer.exact is not None
                assert 0 <= layer.exact < 2 * UNIT
                assert layer.folded < 20 * UNIT
                ratio = layer.folded / max(layer.original, 4 * UNIT)
                assert layer.ratio == pytest.approx(ratio)
        if plan:
            assert all(layer.folded is not None for layer in made.layers)


def test_figures_are_the_errors_of_the_values() -> None:
    """By hand: the outputs of the batch norms added to both models, held against float64."""
    original, fold = right("residual")
    layer = profiled("residual").layers[1]
    aliases = fold.record.aliases
    exact = Float64Reference(original).run(inputs(original), [layer.value])[layer.value]
    for model, name, figure in (
        (original, layer.value, layer.original),
        (fold.model, aliases.get(layer.value, layer.value), layer.folded),
    ):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        copy.graph.output.append(onnx.ValueInfoProto(name=name))
        got = run(copy, inputs(original))[name].astype(np.float64)
        assert figure == pytest.approx(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def test_value_that_is_carried_otherwise_is_read_back() -> None:
    """A batch norm folded forward: the folded graph holds its input, and its gauge says so."""
    _, fold = right("preactivation")
    names = [norm.output for norm in fold.folded]
    assert any(not np.all(fold.record.gauges[name].scale == 1) for name in names)
    assert all(layer.ratio is not None and layer.ratio < 4 for layer in
               profiled("preactivation").layers)  # fmt: skip


def test_fault_shows_at_its_layer_and_behind() -> None:
    original, _ = right("residual")
    wrong = bnfold.fold(FAULTS["eps 1e-3 for 1e-5"][0](original, "bn1")).model
    before, at, behind = profiled("residual", wrong).layers
    assert before.exact is not None
    assert at.exact is not None
    assert at.ratio is not None
    assert before.exact < 2 * UNIT < 1e-3 < at.exact
    assert at.ratio > 1e4
    assert behind.exact is not None
    assert behind.exact > 1e-4


def test_one_model_has_its_own_errors_alone() -> None:
    original, _ = right("dense")
    made = profile(original, None, inputs(original))
    assert [(layer.folded, layer.exact, layer.ratio) for layer in made.layers] == [(None,) * 3] * 2
    assert made.layers[0].original > 0


def test_profile_is_json_with_infinities_as_text() -> None:
    _, fold = right("dense")
    broken = onnx.ModelProto()
    broken.CopyFrom(fold.model)
    made = narrowed(broken, np.float16)
    tensor = next(t for t in made.graph.initializer if t.name == "fc1.bias")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(10, np.inf, np.float32), tensor.name))
    fields = profiled("dense", made).to_dict()
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert fields["layers"][0]["exact"] == "inf"
    assert list(fields["layers"][0]) == [
        "norm", "value", "original", "folded", "exact", "ratio"
    ]  # fmt: skip


def test_network_without_batch_norms_has_no_profile() -> None:
    net = Net(4)
    model = net.model(net.gemm("x", "fc", 4, 3))
    with pytest.raises(NothingComparedError, match="no batch norm"):
        profile(model, model, inputs(model))


# ------------------------------------------------------------------------- which is which


@pytest.mark.parametrize("tool", [lambda m: onnxsim.simplify(m)[0], onnxslim.slim])
@pytest.mark.parametrize("kind", ["residual", "depthwise"])
def test_fold_of_another_tool_is_told_by_its_structure(kind: str, tool: object) -> None:
    original, _ = right(kind)
    made = profiled(kind, tool(original), plan=False)  # type: ignore[operator]
    assert all(layer.ratio is not None and layer.ratio < 4 for layer in made.layers)


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Other names for everything but the ends."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    ends = {value.name for value in (*copy.graph.input, *copy.graph.output)}
    for index, node in enumerate(copy.graph.node):
        node.name = f"n{index}"
        for names in (node.input, node.output):
            names[:] = [n if n in ends or not n else f"v_{n[::-1]}" for n in names]
    for tensor in copy.graph.initializer:
        tensor.name = f"v_{tensor.name[::-1]}"
    del copy.graph.value_info[:]
    return copy


@pytest.mark.parametrize("kind", NETS)
def test_names_are_not_needed(kind: str) -> None:
    _, fold = right(kind)
    with_names = profiled(kind, plan=False)
    without = profiled(kind, renamed(fold.model), plan=False)
    assert [layer.exact for layer in without.layers] == [layer.exact for layer in with_names.layers]


def test_equal_branches_keep_their_order() -> None:
    """Two branches of the same operators on the same value differ by their place alone."""
    net = Net(3, 8, 8)
    x = net.op("Relu", net.conv("x", "stem", 3, 4))
    a = net.norm(net.conv(x, "a", 4, 4), "bn_a", 4)
    b = net.norm(net.conv(x, "b", 4, 4), "bn_b", 4)
    model = net.model(net.op("Mul", net.op("Sigmoid", a), net.op("Tanh", b)))
    folded = renamed(onnxsim.simplify(model)[0])
    made = profile(model, folded, inputs(model))
    assert all(layer.exact is not None and layer.exact < 2 * UNIT for layer in made.layers)
    assert divergences(model, folded, inputs(model), gauges=None, aliases=None, unit=UNIT) == []


def test_structure_goes_on_behind_operators_that_differ() -> None:
    """Three slices that a tool made one, a pad that it computes otherwise: all behind is told."""
    net = Net(3, 10, 10)
    x = net.op("Relu", net.norm(net.conv("x", "stem", 3, 8, pad=1), "bn0", 8))
    y = net.norm(net.conv(x, "conv1", 8, 8, pad=1), "bn1", 8)
    ints = {"one": [1], "eight": [8], "nine": [9], "axis2": [2], "axis3": [3],
            "pads": [0, 0, 1, 1, 0, 0, 1, 1]}  # fmt: skip
    z = net.op("Slice", x, "one", "nine", "axis2")
    z = net.op("Pad", net.op("Slice", z, "one", "nine", "axis3"), "pads")
    z = net.op("Relu", net.op("Add", y, z))
    model = net.model(net.op("Sigmoid", net.norm(net.conv(z, "conv2", 8, 8), "bn2", 8)))
    for name, values in ints.items():
        array = np.array(values, np.int64)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    folded = onnx.ModelProto()
    folded.CopyFrom(bnfold.fold(model).model)
    slices = [node for node in folded.graph.node if node.op_type == "Slice"]
    for name, values in (("start", [1, 1]), ("end", [9, 9]), ("axes", [2, 3])):
        array = np.array(values, np.int64)
        folded.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    slices[1].input[:] = [slices[0].input[0], "start", "end", "axes"]
    folded.graph.node.remove(slices[0])
    made = profile(model, renamed(folded), inputs(model))
    assert len(made.layers) == 3
    assert all(layer.exact is not None and layer.exact < 2 * UNIT for layer in made.layers)


def test_names_that_mean_something_else_are_not_trusted() -> None:
    """An exporter that numbers its values: after a fold the numbers stand for other values."""
    original, fold = right("residual")
    folded = onnx.ModelProto()
    folded.CopyFrom(fold.model)
    taken = [name for node in original.graph.node for name in node.output]
    own = [name for node in folded.graph.node for name in node.output]
    shifted = dict(zip(own, taken, strict=False))
    shifted[own[-1]] = taken[-1]
    for node in folded.graph.node:
        for names in (node.input, node.output):
            names[:] = [shifted.get(name, name) for name in names]
    del folded.graph.value_info[:]
    there = Alignment.of(View.of(original), View.of(folded), None, None).there
    assert any(here != other for here, other in there.items())
    made = profiled("residual", folded, plan=False)
    assert all(layer.exact is not None and layer.exact < 2 * UNIT for layer in made.layers)


def test_relative_error() -> None:
    x = np.array([3.0, np.nan, np.inf])
    assert relative_error(x, x) == 0
    assert relative_error(x, np.array([3.3, np.nan, np.inf])) == pytest.approx(0.1)
    assert relative_error(x, np.array([3.0, 0.0, np.inf])) == np.inf
    assert relative_error(x, np.zeros(4)) == np.inf
    assert relative_error(x, np.array([9.0, np.nan, np.inf]), np.array([False, True, True])) == 0
    assert relative_error(np.arange(3), np.arange(3)) == 0
    assert relative_error(np.arange(3), np.zeros(3, int)) == np.inf


# --------------------------------------------------------------------- the reference, in parts


def test_values_may_be_given_and_what_only_they_need_is_not_run() -> None:
    model = residual()
    reference = Float64Reference(model)
    values = reference.run(inputs(model), ["relu_5", "gemm_12"])
    again = reference.run({"relu_5": values["relu_5"], "relu_2": np.zeros((8, 8, 10, 10))},
                          ["conv_6"])  # no x  # fmt: skip
    assert again["conv_6"].shape == (8, 8, 10, 10)
    with pytest.raises(InputError, match="input 'x' was not given"):
        reference.run({"relu_5": values["relu_5"]}, ["gemm_12"])


def test_values_come_as_they_are_known() -> None:
    model = residual()
    order = [
        name for name, _ in Float64Reference(model).stream(inputs(model), ["relu_9", "conv_0"])
    ]
    assert order == ["conv_0", "relu_9"]
