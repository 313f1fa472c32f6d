"""Local functions: those that hold or touch a batch norm are inlined, the others stay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from bnfold import graph
from bnfold.proof.algebra.certificate import certify
from tests import folding

OPSET = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
BN = ["gamma", "beta", "mean", "var"]


def function(name: str, inputs: Sequence[str], *nodes: onnx.NodeProto, output: str = "y",
             attributes: Sequence[str] = (), opset: int = 20) -> onnx.FunctionProto:  # fmt: skip
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, inputs, [output], list(nodes), opsets, attributes)


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    domain = "own" if op[0].islower() else ""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, names, [output], domain=domain, **attributes)


def norm(x: str, y: str, **attributes: object) -> onnx.NodeProto:
    return node("BatchNormalization", f"{x} {' '.join(BN)}", y, **attributes)


NORM = function("norm", ["x", *BN], norm("x", "y", epsilon=0.25))
CONV = function("conv", ["x", "w"], node("Conv", "x w", "y"))
RELU = function("relu", ["x"], node("Relu", "x", "y"))
FLOOR = function("floor", ["x"], node("Floor", "x", "y"))
BLOCK = function("block", ["x", "w", *BN], node("conv", "x w", "c"),
                 node("norm", f"c {' '.join(BN)}", "n"), node("relu", "n", "y"))  # fmt: skip
EPS = function("norm", ["x", *BN], norm("x", "y"), attributes=["eps"])
EPS.node[0].attribute.append(onnx.AttributeProto(name="epsilon", ref_attr_name="eps", type=1))


def dyadic(name: str, *shape: int) -> onnx.TensorProto:
    rng = np.random.default_rng(sum(name.encode()))
    if name.startswith("var"):
        array = rng.choice([0.75, 3.75, 0], shape)
    elif name.startswith("gamma"):
        array = rng.choice([1, -2, 0.5], shape)
    else:
        array = rng.integers(-2, 3, shape)
    return numpy_helper.from_array(array.astype(np.float32), name)


def model(nodes: Sequence[onnx.NodeProto], *functions: onnx.FunctionProto) -> onnx.ModelProto:
    held = [dyadic(f"{name}{i}", 4) for name in BN for i in ("", "2")]
    held += [dyadic(f"w{i}", 4, 4, 1, 1) for i in ("", "2")]
    read = {name for n in nodes for name in n.input}
    read |= {name for n in nodes for a in n.attribute for m in a.g.node for name in m.input}
    value = [helper.make_tensor_value_info(name, 1, [4, 4, 4, 4]) for name in ("x", "out")]
    main = helper.make_graph(
        nodes, "main", value[:1], value[1:], [t for t in held if t.name in read]
    )
    return helper.make_model(main, opset_imports=OPSET, functions=list(functions), ir_version=10)


def check(proto: onnx.ModelProto, *, removed: int, left: Sequence[str] = ()) -> folding.Fold:
    """Fold; compare bit by bit with the file that has the functions; gate A against that file."""
    onnx.checker.check_model(proto)
    made = folding.fold(proto)
    assert len(made.plan.removed) == removed, [kept.reason for kept in made.plan.kept]
    assert sorted(f.name for f in made.model.functions) == sorted(left)
    x = np.random.default_rng(3).integers(-3, 4, (4, 4, 4, 4)).astype(np.float32)
    before, after = folding.run(proto, {"x": x}), folding.run(made.model, {"x": x})
    np.testing.assert_array_equal(before["out"], after["out"])
    assert np.any(before["out"])
    folding.check_algebra(made)
    folding.check_interface(made)
    folding.check_folding_again(made)
    return made


PARAMETERS = " ".join(BN)
SECOND = " ".join(f"{name}2" for name in BN)


def test_a_batch_norm_in_a_function() -> None:
    made = check(
        model([node("Conv", "x w", "c"), node("norm", f"c {PARAMETERS}", "n"),
               node("Relu", "n", "out")], NORM),
        removed=1,
    )  # fmt: skip
    assert [n.op_type for n in made.model.graph.node] == ["Conv", "Relu"]


def test_a_function_called_twice() -> None:
    nodes = [node("Conv", "x w", "c"), node("norm", f"c {PARAMETERS}", "n"),
             node("Relu", "n", "r"), node("Conv", "r w2", "d"),
             node("norm", f"d {SECOND}", "out")]  # fmt: skip
    check(model(nodes, NORM), removed=2)


def test_a_function_called_twice_with_one_set_of_weights() -> None:
    nodes = [node("block", f"x w {PARAMETERS}", "b"), node("block", f"b w {PARAMETERS}", "out")]
    check(model(nodes, BLOCK, NORM, CONV, RELU), removed=2)


def test_neighbours_are_inlined_and_others_stay() -> None:
    nodes = [node("floor", "x", "f"), node("Relu", "f", "g"), node("conv", "g w", "c"),
             norm("c", "n", epsilon=0.25), node("relu", "n", "r"), node("Identity", "r", "i"),
             node("floor", "i", "out")]  # fmt: skip
    made = check(model(nodes, CONV, RELU, FLOOR), removed=1, left=["floor"])
    assert [n.op_type for n in made.model.graph.node].count("floor") == 2


def test_a_model_without_batch_norms_keeps_its_functions() -> None:
    proto = model([node("conv", "x w", "c"), node("relu", "c", "out")], CONV, RELU)
    made = folding.fold(proto)
    assert [f.name for f in made.model.functions] == ["conv", "relu"]
    assert [n.op_type for n in made.model.graph.node] == ["conv", "relu"]


def test_attributes_of_a_call() -> None:
    nodes = [node("Conv", "x w", "c"), node("norm", f"c {PARAMETERS}", "out", eps=0.25)]
    check(model(nodes, EPS), removed=1)


def test_a_call_in_a_branch() -> None:
    value = helper.make_tensor_value_info("o", 1, [4, 4, 4, 4])
    then = helper.make_graph(
        [node("Conv", "x w", "c"), node("norm", f"c {PARAMETERS}", "o")], "then", [], [value]
    )
    other = helper.make_graph([node("Floor", "x", "o2")], "else", [], [
        helper.make_tensor_value_info("o2", 1, [4, 4, 4, 4])])  # fmt: skip
    total = [node("ReduceSum", "x", "s", keepdims=0), node("Cast", "s", "d", to=7),
             node("Equal", "d d", "q")]  # fmt: skip
    branch = helper.make_node("If", ["q"], ["out"], then_branch=then, else_branch=other)
    check(model([*total, branch], NORM), removed=1)


def test_a_function_that_cannot_be_inlined_says_so() -> None:
    old = function("norm", ["x", *BN], norm("x", "y", epsilon=0.25), opset=15)
    proto = model([node("Conv", "x w", "c"), node("norm", f"c {PARAMETERS}", "out")], old)
    made = folding.fold(proto)
    assert not made.plan.removed
    assert ["'norm'" in kept.reason for kept in made.plan.kept] == [True]
    assert [f.name for f in made.model.functions] == ["norm"]


def test_a_planted_fault_in_an_inlined_function_is_found() -> None:
    proto = model([node("Conv", "x w", "c"), node("norm", f"c {PARAMETERS}", "out")], NORM)
    made = folding.fold(proto)
    for tensor in made.model.graph.initializer:
        wrong = numpy_helper.to_array(tensor) * np.float32(1.001)
        tensor.CopyFrom(numpy_helper.from_array(wrong, tensor.name))
    gauges = {str(value.name): g for value, g in made.plan.gauges.items()}
    assert not certify(proto, made.model, gauges, made.folded.aliases).passed


def test_a_changed_function_is_found() -> None:
    proto = model([node("floor", "x", "f"), node("Conv", "f w", "c"),
                   norm("c", "out", epsilon=0.25)], FLOOR)  # fmt: skip
    made = folding.fold(proto)
    made.model.functions[0].node[0].op_type = "Ceil"
    gauges = {str(value.name): g for value, g in made.plan.gauges.items()}
    assert not certify(proto, made.model, gauges, made.folded.aliases).passed


@pytest.mark.parametrize("external", [False, True])
def test_functions_of_a_file(tmp_path: Path, external: bool) -> None:
    proto = model([node("Conv", "x w", "c"), node("norm", f"c {PARAMETERS}", "out")], NORM)
    path = tmp_path / "m.onnx"
    onnx.save(proto, path, save_as_external_data=external, size_threshold=0)
    read = graph.read_onnx(path)
    assert not read.functions
    assert isinstance(read.graph.initializers["w"].const_value, ir.ExternalTensor) == external
