"""Faults planted in a fold, as a wrong folder would leave them; for tests and for measurements.

A fault is a belief about one batch norm that is wrong (its epsilon, a gamma, ...): the original
spoiled so, then folded by the rules. What comes out is what a folder with that mistake writes, and
is held against the original that was not spoiled. Two faults are not of this kind: weights
rounded to float16, and a batch norm left in training mode, which stays in the graph and normalises
by the batch that it sees.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

import bnfold
from bnfold.folding.record import FoldRecord
from bnfold.graph import to_proto

Array = np.ndarray[Any, Any]
GAMMA, BETA, MEAN, VAR = 1, 2, 3, 4
EPS = 1e-5


@dataclass(frozen=True)
class Norm:
    """A batch norm of a model that may be spoiled: its node, and the constants that it reads."""

    model: onnx.ModelProto
    node: onnx.NodeProto

    @property
    def eps(self) -> float:
        """Its epsilon."""
        return next((a.f for a in self.node.attribute if a.name == "epsilon"), EPS)

    def set_eps(self, eps: float) -> None:
        """Give it another epsilon."""
        kept = [a for a in self.node.attribute if a.name != "epsilon"]
        del self.node.attribute[:]
        self.node.attribute.extend([*kept, helper.make_attribute("epsilon", eps)])

    def read(self, slot: int) -> Array:
        """Its gamma, beta, mean or variance."""
        tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        return np.array(numpy_helper.to_array(tensors[self.node.input[slot]]))

    def write(self, slot: int, value: Array) -> None:
        """Give it another one, under a name of its own: constants may be shared."""
        name = f"{self.node.output[0]}.spoiled{slot}"
        self.model.graph.initializer.append(numpy_helper.from_array(value, name))
        self.node.input[slot] = name


def norms_of(model: onnx.ModelProto) -> list[Norm]:
    """The batch norms whose parameters are constants, in order of execution."""
    held = {tensor.name for tensor in model.graph.initializer}
    return [
        Norm(model, node)
        for node in model.graph.node
        if node.op_type == "BatchNormalization" and set(node.input[1:]) <= held
    ]


# ------------------------------------------------------------------------------ wrong beliefs


def _scaled(slot: int, factor: float, only_one: bool = False) -> Callable[[Norm, int], None]:
    def spoil(norm: Norm, channel: int) -> None:
        value = norm.read(slot)
        where = channel if only_one else slice(None)
        value[where] *= np.asarray(factor, value.dtype)
        norm.write(slot, value)

    return spoil


def _swapped(norm: Norm, channel: int) -> None:
    for slot in (GAMMA, BETA, MEAN, VAR):
        value = norm.read(slot)
        other = (channel + 1) % len(value)
        value[[channel, other]] = value[[other, channel]]
        norm.write(slot, value)


BELIEFS: Mapping[str, Callable[[Norm, int], None]] = {
    "eps dropped": lambda norm, _: norm.set_eps(0.0),
    "eps 1e-3 for 1e-5": lambda norm, _: norm.set_eps(100 * norm.eps),
    "one gamma off by 1e-3": _scaled(GAMMA, 1.001, only_one=True),
    "two channels swapped": _swapped,
    "variance * 0.999": _scaled(VAR, 0.999),
    "mean's sign": _scaled(MEAN, -1.0),
}
FLOAT16, TRAINING = "float16 weights", "left in training mode"
FAULTS = (*BELIEFS, FLOAT16, TRAINING)


# ---------------------------------------------------------------------------------- planting


@dataclass(frozen=True)
class Planted:
    """A wrong fold. record: of the right fold, which is what gate A holds it against.

    norm, output: the name of the batch norm, and that of its value in the original graph.
    """

    fault: str
    norm: str
    output: str
    folded: onnx.ModelProto
    record: FoldRecord


@dataclass(frozen=True)
class Bed:
    """A model that faults are planted in: its right fold is made once. repair: as for a fold."""

    original: onnx.ModelProto
    repair: tuple[str, ...] = ()

    @cached_property
    def right(self) -> bnfold.FoldResult:
        """The fold as it should be."""
        return bnfold.fold(self.original, repair=self.repair)

    @cached_property
    def folded(self) -> onnx.ModelProto:
        """The right fold's graph."""
        return to_proto(self.right.graph)

    @property
    def outputs(self) -> list[str]:
        """The values of the batch norms that are gone, in order of execution."""
        gone = {norm.output for norm in self.right.folded}
        return [n.node.output[0] for n in norms_of(self.original) if n.node.output[0] in gone]

    def plant(self, fault: str, output: str, channel: int = 0) -> Planted:
        """The fault at the batch norm with this output (float16: in every weight of the file)."""
        name = next(norm.name for norm in self.right.folded if norm.output == output)
        if fault == FLOAT16:
            return Planted(fault, name, output, _through_float16(self.folded), self.right.record)
        if fault == TRAINING:
            kept = bnfold.fold(self.original, keep=[glob.escape(name)], repair=self.repair)
            return Planted(
                fault, name, output, _by_the_batch(to_proto(kept.graph), output), kept.record
            )
        spoiled = onnx.ModelProto()
        spoiled.CopyFrom(self.original)
        norm = next(n for n in norms_of(spoiled) if n.node.output[0] == output)
        BELIEFS[fault](norm, channel)
        wrong = bnfold.fold(spoiled, repair=self.repair)
        return Planted(fault, name, output, to_proto(wrong.graph), self.right.record)


def _through_float16(folded: onnx.ModelProto) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(folded)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            value = numpy_helper.to_array(tensor)
            with np.errstate(over="ignore"):
                rounded = value.astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    return model


def _by_the_batch(folded: onnx.ModelProto, output: str) -> onnx.ModelProto:
    """The batch norm's node replaced by what a module in training mode computes."""
    norm = next(n for n in norms_of(folded) if n.node.output[0] == output)
    graph, x = folded.graph, norm.node.input[0]
    opset = next(o.version for o in folded.opset_import if o.domain in ("", "ai.onnx"))
    rank = _rank(folded, x)
    axes = [axis for axis in range(rank) if axis != 1]

    def name(part: str) -> str:
        return f"{output}.{part}"

    def constant(part: str, value: Array) -> str:
        graph.initializer.append(numpy_helper.from_array(value, name(part)))
        return name(part)

    def mean(of: str, into: str) -> onnx.NodeProto:
        if opset >= 18:
            held = constant(f"{into}.axes", np.array(axes, np.int64))
            return helper.make_node("ReduceMean", [of, held], [name(into)])
        return helper.make_node("ReduceMean", [of], [name(into)], axes=axes)

    shape = (1, -1, *(1 for _ in axes[1:]))
    gamma, beta = (norm.read(slot).reshape(shape) for slot in (GAMMA, BETA))
    steps = [
        mean(x, "mean"),
        helper.make_node("Sub", [x, name("mean")], [name("centred")]),
        helper.make_node("Mul", [name("centred")] * 2, [name("square")]),
        mean(name("square"), "var"),
        helper.make_node(
            "Add", [name("var"), constant("eps", np.array(norm.eps, gamma.dtype))], [name("spread")]
        ),
        helper.make_node("Sqrt", [name("spread")], [name("std")]),
        helper.make_node("Div", [name("centred"), name("std")], [name("normal")]),
        helper.make_node("Mul", [name("normal"), constant("gamma", gamma)], [name("scaled")]),
        helper.make_node("Add", [name("scaled"), constant("beta", beta)], [output]),
    ]
    at = list(graph.node).index(norm.node)
    nodes = [*graph.node[:at], *steps, *graph.node[at + 1 :]]
    del graph.node[:]
    graph.node.extend(nodes)
    return folded


def _rank(model: onnx.ModelProto, value: str) -> int:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {v.name: v.type.tensor_type.shape for v in [*inferred.value_info, *inferred.input]}
    return len(shapes[value].dim)
