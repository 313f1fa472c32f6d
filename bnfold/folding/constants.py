"""A constant, read through what leads to it and written back under its own name.

A weight often reaches its operator through Transpose, Reshape, Cast or Identity of an initializer
(a Linear on tokens exports as Transpose -> MatMul). Folding that away first would lose the
parameter's name; so the views are remembered and undone when the new weight is written. What is
computed from several constants (`arithmetic`) becomes a constant of its own when it is written.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array
from bnfold.folding.arithmetic import ARITHMETIC, Elements, compute
from bnfold.folding.layout import inverse

FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
)
_VIEWS = frozenset({"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast"})


_STANDARD = ("", "ai.onnx")
# a longer way from the parameters to the constant is no small arithmetic
_LONGEST_EXPRESSION = 64


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant operand: the value that holds it, and the views from there to the operand.

    tensor: what the root holds; None where the root is computed from other constants.
    """

    root: ir.Value
    views: tuple[ir.Node, ...]
    tensor: ir.TensorProtocol | None

    @cached_property
    def stored(self) -> Elements:
        """The elements at the root; floats that were computed in float64."""
        return _evaluate(self.root, {}) if self.tensor is None else self.tensor.numpy()

    @cached_property
    def _seen(self) -> Elements:
        array = self.stored
        for view in self.views:
            array = _forward(view, array)
        return array

    @cached_property
    def array(self) -> Array:
        """The operand's elements, as the operator sees them, in float64."""
        return self._seen.astype(np.float64, order="C")

    @property
    def shape(self) -> tuple[int, ...]:
        """The operand's shape."""
        if self.tensor is not None and not self.views:  # reading the elements would cost a copy
            return tuple(int(extent) for extent in self.tensor.shape.numpy())
        return tuple(self._seen.shape)

    def as_root(self, array: Array) -> Array:
        """An array in the operand's layout, brought back to the layout of the root."""
        if not self.views:
            return array
        probe = self.stored
        shapes = [probe.shape]
        for view in self.views:
            probe = _forward(view, probe)
            shapes.append(probe.shape)
        for view, shape in zip(reversed(self.views), reversed(shapes[:-1]), strict=True):
            if view.op_type == "Transpose":
                array = np.transpose(array, inverse(_perm(view, array.ndim)))
            else:
                array = array.reshape(shape)
        return array

    @property
    def dtype(self) -> ir.DataType:
        """The operand's type, to which a new value is rounded."""
        types = [_target(view) for view in self.views if view.op_type == "Cast"]
        if types:
            return types[-1]
        held = self.root.dtype if self.tensor is None else self.tensor.dtype
        assert held is not None  # `constant` asks for it
        return held

    @property
    def dequantizer(self) -> ir.Node | None:
        """The DequantizeLinear that gives the root from a weight's integers, if one does.

        A bias of 32 bits is none: its integers are as long as the floats that take their place.
        """
        node = self.root.producer() if self.tensor is None else None
        integers = node.inputs[0] if node is not None else None
        if node is None or node.op_type != "DequantizeLinear" or integers is None:
            return None
        return None if integers.dtype == ir.DataType.INT32 else node

    @property
    def in_place(self) -> bool:
        """True where the root can hold any new value of the operand: no Cast on the way."""
        return self.tensor is not None and all(view.op_type != "Cast" for view in self.views)


def _perm(view: ir.Node, rank: int) -> list[int]:
    perm = view.attributes.get("perm")
    return list(perm.as_ints()) if perm is not None else list(range(rank))[::-1]


def _target(view: ir.Node) -> ir.DataType:
    return ir.DataType(view.attributes["to"].as_int())


def _forward(view: ir.Node, array: Elements) -> Elements:
    if view.op_type == "Transpose":
        return np.transpose(array, _perm(view, array.ndim))
    if view.op_type == "Cast":
        # a narrower float is not rounded to: the new constant will be, once
        return array.astype(np.float64 if _target(view) in FLOATS else _target(view).numpy())
    if view.op_type == "Identity":
        return array
    shape = view.outputs[0].shape
    assert shape is not None
    return array.reshape([int(str(dim)) for dim in shape])


def constant(value: ir.Value | None) -> Constant | None:
    """The constant behind a value, or None if it is computed or may be overridden at run time.

    An initializer that is also a graph input can be overridden by the caller (ONNX IR 4 and newer),
    so it is not a constant. Before IR 4 every initializer had to be listed as an input, and
    runtimes treat it as constant; so do we (`graph.prepare` notes the version on the graph).
    """
    views: list[ir.Node] = []
    while value is not None:
        node = value.producer()
        if node is None or _is_literal(node):
            tensor = _tensor(value)
            return None if tensor is None else Constant(value, tuple(reversed(views)), tensor)
        if value.is_graph_output():
            return None
        if not _is_view(node):
            break
        views.append(node)
        value = node.inputs[0]
    if value is None or value.dtype is None or not _is_expression(value):
        return None
    return Constant(value, tuple(reversed(views)), None)


def _is_literal(node: ir.Node) -> bool:
    return node.op_type == "Constant" and node.domain in _STANDARD


def _is_view(node: ir.Node) -> bool:
    if node.op_type not in _VIEWS or node.domain not in _STANDARD:
        return False
    return node.op_type in ("Identity", "Cast", "Transpose") or _static(node.outputs[0])


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """What an initializer or a Constant holds, None where a caller may override it."""
    node = value.producer()
    if node is not None:
        held = node.attributes.get("value")
        # onnx_ir's own reader gives the tensor of a Constant another name
        return ir.convenience.get_const_tensor(value) if held is None else held.as_tensor()
    if not value.is_initializer() or (value.is_graph_input() and _overridable(value)):
        return None
    return value.const_value


def _is_expression(value: ir.Value) -> bool:
    """True where constants alone enter a value, through operators that we can compute."""
    queue, seen = deque([value]), {value}
    while queue:
        place = queue.popleft()
        node = place.producer()
        if node is None or _is_literal(node):
            if _tensor(place) is None:
                return False
            continue
        computable = _is_view(node) or (node.op_type in ARITHMETIC and node.domain in _STANDARD)
        if not computable or len(seen) > _LONGEST_EXPRESSION:
            return False
        found = {v for v in node.inputs if v is not None} - seen
        seen |= found
        queue.extend(found)
    return True


def _evaluate(value: ir.Value, known: dict[ir.Value, Elements]) -> Elements:
    """The elements of an expression of constants; floats in float64."""
    if value not in known:
        node, tensor = value.producer(), None
        if node is None or _is_literal(node):
            tensor = _tensor(value)
            assert tensor is not None  # as `_is_expression` has found
            wide = tensor.dtype in FLOATS
            known[value] = tensor.numpy().astype(np.float64) if wide else tensor.numpy()
        else:
            operands = [None if v is None else _evaluate(v, known) for v in node.inputs]
            if _is_view(node):
                assert operands[0] is not None
                known[value] = _forward(node, operands[0])
            else:
                known[value] = compute(node, operands)
    return known[value]


def _static(value: ir.Value) -> bool:
    return value.shape is not None and all(isinstance(dim, int) for dim in value.shape)


def _overridable(value: ir.Value) -> bool:
    graph = value.graph
    return graph is None or graph.meta.get("ir_version", 4) >= 4


def readers(root: ir.Value) -> list[tuple[ir.Node, int]]:
    """Every operator slot that reads a constant, directly or through views."""
    found: list[tuple[ir.Node, int]] = []
    for node, slot in root.uses():
        behind = constant(node.outputs[0]) if node.op_type in _VIEWS else None
        if behind is not None and behind.root is root:
            found.extend(readers(node.outputs[0]))
        else:
            found.append((node, slot))
    return found
