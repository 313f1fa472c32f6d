"""Weights held as integers: on onnxruntime with its optimisations, and as small as before."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bnfold.proof.exact.reference import Float64Reference
from bnfold.proof.places.runtime import open_session
from tests import folding

Array = np.ndarray[Any, np.dtype[Any]]


def quantised_net(per_channel: bool, seed: int, *, int_bias: bool = True) -> onnx.ModelProto:
    """x -> Q -> DQ -> Conv (int8 weight, int32 bias) -> BN -> Relu -> Conv (int8) -> BN."""
    rng = np.random.default_rng(seed)
    held: dict[str, Array] = {"sx": np.float32(0.02), "zx": np.int8(3)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["v0"]),
    ]
    value = "v0"
    for i in range(2):
        scale = rng.uniform(0.005, 0.02, 8 if per_channel else ()).astype(np.float32)
        held[f"q{i}"] = rng.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8)
        held[f"s{i}"] = np.asarray(scale)
        held[f"i{i}"] = rng.integers(-2000, 2000, 8).astype(np.int32)
        held[f"t{i}"] = np.asarray(scale * held["sx"])
        held[f"g{i}"] = (rng.uniform(0.5, 2, 8) * rng.choice([-1, 1], 8)).astype(np.float32)
        held[f"b{i}"], held[f"m{i}"] = (rng.normal(size=(2, 8)) * 0.5).astype(np.float32)
        held[f"r{i}"] = rng.uniform(0.5, 2, 8).astype(np.float32)
        bias = [f"c{i}"] if int_bias else []
        nodes += [
            helper.make_node("DequantizeLinear", [f"q{i}", f"s{i}"], [f"w{i}"], axis=0),
            *(
                [helper.make_node("DequantizeLinear", [f"i{i}", f"t{i}"], bias, axis=0)]
                if bias
                else []
            ),
            helper.make_node("Conv", [value, f"w{i}", *bias], [f"y{i}"], pads=[1, 1, 1, 1]),
            helper.make_node(
                "BatchNormalization", [f"y{i}", *(f"{p}{i}" for p in "gbmr")], [f"n{i}"]
            ),
        ]
        value = f"n{i}"
        if i == 0:
            nodes.append(helper.make_node("Relu", [value], ["v1"]))
            value = "v1"
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "q",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8, 6, 6])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, [2, 8, 6, 6])],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in held.items() if n in read],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("int_bias", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_quantised_net(per_channel: bool, int_bias: bool, seed: int) -> None:
    proto = quantised_net(per_channel, seed, int_bias=int_bias)
    made = folding.fold(proto)
    assert len(made.plan.removed) == 2
    folding.check_algebra(made)
    folding.check_counts(made)
    x = np.random.default_rng(seed + 9).normal(size=(2, 8, 6, 6)).astype(np.float32)
    expected = Float64Reference(proto).run({"x": x})["n1"]
    largest = float(np.max(np.abs(expected)))
    for optimize in (False, True):
        found = open_session(made.model, optimize=optimize, threads=1).run({"x": x})["n1"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * largest)


def test_integers_stay_integers() -> None:
    proto = quantised_net(True, 5)
    made = folding.fold(proto)
    kinds = {t.name: t.data_type for t in made.model.graph.initializer}
    integers = [n for n, kind in kinds.items() if kind == TensorProto.INT8 and n[0] == "q"]
    assert len(integers) == 2
    assert made.model.ByteSize() < proto.ByteSize()


def test_a_planted_sign_is_found() -> None:
    made = folding.fold(quantised_net(True, 5))
    for tensor in made.model.graph.initializer:
        if tensor.data_type == TensorProto.INT8 and tensor.name.startswith("q"):
            wrong = numpy_helper.to_array(tensor).copy()
            wrong[0] = np.negative(wrong[0])
            tensor.CopyFrom(numpy_helper.from_array(wrong, tensor.name))
    with pytest.raises(AssertionError):
        folding.check_algebra(made)
