"""Concrete shapes of a model's values, found without running it.

onnx's shape inference on a copy without weights, and the arithmetic on shapes that it leaves out
(Shape, Gather, Div, Concat ... in front of a Reshape), evaluated as far as the sizes are known.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from bnfold.proof.exact.counterpart import UNPREDICTABLE, View
from bnfold.proof.exact.reference import NoReferenceError

Array = np.ndarray[Any, np.dtype[Any]]

INFERENCE_ROUNDS = 6
SMALL_TENSOR = 1024  # elements up to which a constant may steer shapes


@dataclass(frozen=True)
class ValueType:
    """A value's element type (TensorProto.DataType) and concrete shape (None: not known)."""

    elem_type: int
    shape: tuple[int, ...] | None


@dataclass
class Shapes:
    """Concrete shapes of a model's values, found without running it.

    Every dynamic axis of an input gets a size: 2 for the first, and for the others what suits the
    rank (images 224, volumes 32, sequences 64), unless `sizes` gives the input's shape.
    """

    model: onnx.ModelProto
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    _types: dict[str, ValueType] | None = None
    _integers: dict[str, Array] = field(default_factory=dict)

    def of(self, name: str) -> ValueType | None:
        """The type of a value, or None when inference did not reach it."""
        return self._inferred().get(name)

    def integer(self, name: str) -> Array | None:
        """The value of a shape computation that the concrete sizes fix, or None."""
        self._inferred()
        return self._integers.get(name)

    def _inferred(self) -> dict[str, ValueType]:
        if self._types is None:
            view = View.of(self.model)
            skeleton = _skeleton(self.model, self.sizes)
            self._types = _infer(skeleton)
            for _ in range(INFERENCE_ROUNDS):
                if not self._propagate(view, skeleton):
                    break
                self._types = _infer(skeleton)
        return self._types

    def _propagate(self, view: View, skeleton: onnx.ModelProto) -> bool:
        """Compute shape arithmetic whose inputs are known and fix it in the skeleton."""
        assert self._types is not None
        fixed = []
        for node in view.nodes:
            name = node.output[0] if len(node.output) == 1 else ""
            if not name or name in self._integers or view.is_constant(name):
                continue
            value = self._shape_arithmetic(node, view)
            if value is not None:
                self._integers[name] = value
                fixed.append(name)
        for name in fixed:
            _fix(skeleton.graph, name, self._integers[name])
        return bool(fixed)

    def _shape_arithmetic(self, node: onnx.NodeProto, view: View) -> Array | None:
        assert self._types is not None
        if node.op_type in UNPREDICTABLE or any(a.HasField("g") for a in node.attribute):
            return None
        if node.op_type in ("Shape", "Size"):
            known = self._types.get(node.input[0])
            if known is None or known.shape is None:
                return None
            values = {node.input[0]: np.broadcast_to(np.zeros(()), known.shape)}
        else:
            named = view.sources(node)
            if not named or any(name not in self._integers for name in named):
                return None
            values = {name: self._integers[name] for name in named}
        try:
            result = np.asarray(view.evaluate(node, values)[0])
        except NoReferenceError:
            return None
        return result if result.size <= SMALL_TENSOR else None


def _skeleton(model: onnx.ModelProto, sizes: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """The model without its weights (typed inputs instead) and with concrete input shapes."""
    small = onnx.ModelProto(ir_version=max(model.ir_version, 4))
    small.opset_import.extend(model.opset_import)
    small.functions.extend(model.functions)
    small.graph.name = "skeleton"
    small.graph.node.extend(model.graph.node)
    given = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name not in given:
            small.graph.input.append(_concrete(value, sizes.get(value.name)))
    for tensor in model.graph.initializer:
        if int(np.prod(tensor.dims)) <= SMALL_TENSOR:
            small.graph.initializer.append(tensor)
        else:
            weight = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            small.graph.input.append(weight)
    for value in model.graph.output:
        untyped = small.graph.output.add(name=value.name)
        untyped.type.tensor_type.elem_type = value.type.tensor_type.elem_type
    return small


def _concrete(value: onnx.ValueInfoProto, sizes: Sequence[int] | None) -> onnx.ValueInfoProto:
    fixed = onnx.ValueInfoProto()
    fixed.CopyFrom(value)
    dims = fixed.type.tensor_type.shape.dim
    if sizes is not None and not dims:
        for _ in sizes:
            dims.add()
    rest = {4: 224, 5: 32}.get(len(dims), 64)
    for axis, dim in enumerate(dims):
        if dim.dim_value >= 1:
            continue
        given = int(sizes[axis]) if sizes is not None and axis < len(sizes) else 0
        # two rows show what one would hide, and more would only cost
        dim.dim_value = min(given or 2, 2) if axis == 0 else given or rest
    return fixed


def _infer(skeleton: onnx.ModelProto) -> dict[str, ValueType]:
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    except Exception:  # inference raises its own C++ errors on inconsistent graphs
        inferred = skeleton
    types: dict[str, ValueType] = {}
    for graph in _graphs(inferred.graph):
        for value in itertools.chain(graph.input, graph.value_info, graph.output):
            tensor = value.type.tensor_type
            dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
            known = tensor.HasField("shape") and all(dim >= 0 for dim in dims)
            types[value.name] = ValueType(tensor.elem_type, tuple(dims) if known else None)
    return types


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _fix(graph: onnx.GraphProto, name: str, value: Array) -> None:
    """Put an initializer in the place of the node that computes `name`."""
    for index, node in enumerate(graph.node):
        if name in node.output:
            del graph.node[index]
            break
    graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
