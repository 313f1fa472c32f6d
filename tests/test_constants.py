"""Constants computed from constants: each operator against the reference, and the limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from bnfold import graph
from bnfold.errors import InputError
from bnfold.folding.arithmetic import ARITHMETIC
from bnfold.folding.constants import constant
from bnfold.proof.exact.reference import NodeReference

Array = np.ndarray[Any, np.dtype[Any]]


def draw(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).uniform(0.5, 2, shape).astype(np.float32)


def whole(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


# operator -> (operands, attributes, opset), in every form that it has
Case = tuple[list[Array | None], dict[str, Any], int]
CASES: dict[str, list[Case]] = {
    **{op: [([draw(3, 4), draw(4)], {}, 20)] for op in ("Add", "Sub", "Mul", "Div", "Pow")},
    **{op: [([-draw(3, 4)], {}, 20)] for op in ("Neg", "Abs", "Exp")},
    **{op: [([draw(3, 4)], {}, 20)] for op in ("Sqrt", "Reciprocal", "Log")},
    **{
        op: [([draw(3, 4), draw(4), draw(1)], {}, 20), ([draw(4)], {}, 20)]
        for op in ("Max", "Min")
    },
    "Clip": [
        ([draw(9), np.float32(0.8), np.float32(1.2)], {}, 20),
        ([draw(9), None, np.float32(1.2)], {}, 20),
        ([draw(9)], {"min": 0.75, "max": 1.25}, 7),
    ],
    **{
        op: [
            ([draw(2, 3, 4), whole(0, -1)], {}, 20),
            ([draw(2, 3, 4), whole(1)], {"keepdims": 0}, 20),
            ([draw(2, 3, 4)], {}, 20),
            ([draw(2, 3, 4)], {"noop_with_empty_axes": 1}, 20),
            ([draw(2, 3, 4)], {"axes": [1, 2]}, 11),
        ]
        for op in ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2")
    },
    "Slice": [
        ([draw(4, 5), whole(1), whole(3)], {}, 20),
        ([draw(4, 5), whole(-1, 3), whole(-(2**62), 0), whole(1, 0), whole(-1, -2)], {}, 20),
        ([draw(4, 5)], {"starts": [1], "ends": [2**40], "axes": [1]}, 9),
    ],
    "Gather": [
        ([draw(4, 5), whole(3, -1)], {"axis": 1}, 20),
        ([draw(4, 5), np.array([[0], [2]])], {}, 20),
        ([draw(4, 5), np.array(1)], {}, 20),
    ],
    "Concat": [([draw(2, 3), draw(4, 3)], {"axis": 0}, 20), ([draw(2), draw(3)], {"axis": -1}, 20)],
    "Expand": [([draw(3, 1), whole(2, 1, 4)], {}, 20), ([draw(2, 3), whole(1, 1)], {}, 20)],
    "ConstantOfShape": [
        ([whole(2, 3)], {}, 20),
        ([whole(4)], {"value": helper.make_tensor("v", 1, [1], [2.5])}, 20),
        ([whole(4)], {"value": helper.make_tensor("v", 7, [1], [3])}, 20),
    ],
    "DequantizeLinear": [
        ([np.array([[1, -2], [3, 4]], np.int8), np.float32(0.3)], {}, 13),
        ([np.array([[1, -2], [3, 4]], np.int8), draw(2), np.array([1, -1], np.int8)], {}, 13),
        ([np.array([[1, -2], [3, 4]], np.int8), draw(2)], {"axis": 0}, 13),
        ([np.array([[1, 2]], np.uint8), np.float32(0.3), np.uint8(7)], {"axis": -1}, 21),
        ([whole(1, 2, 3, 4, 5, 6).astype(np.int8).reshape(2, 3), draw(2, 2)],
         {"axis": 1, "block_size": 2}, 21),
        ([np.array([2**30, -3], np.int32), np.float32(0.3)], {}, 13),
    ],
}  # fmt: skip


def value_of(op: str, case: Case) -> ir.Value:
    """The output of one node that reads initializers, as planning sees it."""
    operands, attributes, opset = case
    names = ["" if operand is None else f"k{i}" for i, operand in enumerate(operands)]
    node = helper.make_node(op, names, ["y"], **attributes)
    held = [
        helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(o.dtype), o.shape, o.reshape(-1))
        for n, o in zip(names, operands, strict=True)
        if o is not None
    ]
    reader = helper.make_node("Identity", ["y"], ["z"])
    output = helper.make_tensor_value_info("z", 1, None)
    proto = helper.make_model(
        helper.make_graph([node, reader], "g", [], [output], held),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    model = graph.prepare(ir.from_proto(proto))
    return model.graph[0].outputs[0]


@pytest.mark.parametrize(
    ("op", "index"), [(op, i) for op, c in CASES.items() for i in range(len(c))]
)
def test_an_operator_computes_what_the_reference_does(op: str, index: int) -> None:
    case = CASES[op][index]
    found = constant(value_of(op, case))
    assert found is not None
    operands, attributes, opset = case
    names = ["" if operand is None else f"k{i}" for i, operand in enumerate(operands)]
    node = helper.make_node(op, names, ["y"], **attributes)
    expected = NodeReference(node, {"": opset})(*operands)[0]
    assert found.array.shape == expected.shape
    np.testing.assert_allclose(found.array, expected.astype(np.float64), rtol=1e-15)


def test_every_operator_has_a_case() -> None:
    assert set(CASES) == set(ARITHMETIC)


def test_integers_are_divided_towards_zero() -> None:
    case: Case = ([whole(7, -7, 7, -7), whole(2, 2, -2, -2)], {}, 20)
    found = constant(value_of("Div", case))
    assert found is not None
    assert found.array.tolist() == [3, -3, -3, 3]


def test_constants_that_do_not_fit_together_are_a_sentence() -> None:
    found = constant(value_of("Add", ([draw(3), draw(4)], {}, 20)))
    if found is not None:  # no type could be inferred
        with pytest.raises(InputError, match="do not fit together"):
            _ = found.array


@pytest.mark.parametrize(("ir_version", "fixed"), [(8, False), (3, True)])
def test_what_a_caller_may_override_is_no_constant(ir_version: int, fixed: bool) -> None:
    held = [helper.make_tensor(name, 1, [2], [1.0, 2.0]) for name in ("a", "b")]
    listed = [helper.make_tensor_value_info("a", 1, [2])]
    if ir_version == 3:
        listed.append(helper.make_tensor_value_info("b", 1, [2]))
    nodes = [helper.make_node("Mul", ["a", "b"], ["y"]), helper.make_node("Neg", ["y"], ["z"])]
    output = helper.make_tensor_value_info("z", 1, None)
    proto = helper.make_model(
        helper.make_graph(nodes, "g", listed, [output], held), ir_version=ir_version
    )
    model = graph.prepare(ir.from_proto(proto))
    assert (constant(model.graph[0].outputs[0]) is not None) == fixed


def test_a_long_way_is_no_small_arithmetic() -> None:
    nodes = [helper.make_node("Neg", [f"v{i}"], [f"v{i + 1}"]) for i in range(100)]
    held = [helper.make_tensor("v0", 1, [2], [1.0, 2.0])]
    output = helper.make_tensor_value_info("z", 1, None)
    last = helper.make_node("Identity", ["v100"], ["z"])
    proto = helper.make_model(helper.make_graph([*nodes, last], "g", [], [output], held))
    model = graph.prepare(ir.from_proto(proto))
    assert constant(model.graph[99].outputs[0]) is None
    assert constant(model.graph[9].outputs[0]) is not None
