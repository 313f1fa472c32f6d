"""A constant, read through the views that lead to it and written back under its own name.

A weight often reaches its operator through Transpose, Reshape, Cast or Identity of an initializer
(a Linear on tokens exports as Transpose -> MatMul). Folding that away first would lose the
parameter's name; so the views are remembered and undone when the new weight is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array
from bnfold.folding.layout import inverse

FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
)
_VIEWS = frozenset({"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast"})


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant operand: the value that holds it, and the views from there to the operand."""

    root: ir.Value
    views: tuple[ir.Node, ...]
    tensor: ir.TensorProtocol

    @cached_property
    def _stored(self) -> np.ndarray:
        array = self.tensor.numpy()
        for view in self.views:
            array = _forward(view, array)
        return array

    @cached_property
    def array(self) -> Array:
        """The operand's elements, as the operator sees them, in float64."""
        return self._stored.astype(np.float64, order="C")

    @property
    def shape(self) -> tuple[int, ...]:
        """The operand's shape."""
        return self._stored.shape

    def as_root(self, array: Array) -> Array:
        """An array in the operand's layout, brought back to the layout of the root."""
        shapes = [self.tensor.numpy().shape]
        probe = self.tensor.numpy()
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
        types = [
            ir.DataType(v.attributes["to"].as_int()) for v in self.views if v.op_type == "Cast"
        ]
        return types[-1] if types else self.tensor.dtype

    @property
    def in_place(self) -> bool:
        """True where the root can hold any new value of the operand: no Cast on the way."""
        return all(view.op_type != "Cast" for view in self.views)


def _perm(view: ir.Node, rank: int) -> list[int]:
    perm = view.attributes.get("perm")
    return list(perm.as_ints()) if perm is not None else list(range(rank))[::-1]


def _forward(view: ir.Node, array: np.ndarray) -> np.ndarray:
    if view.op_type == "Transpose":
        return np.transpose(array, _perm(view, array.ndim))
    if view.op_type == "Cast":
        return array.astype(ir.DataType(view.attributes["to"].as_int()).numpy())
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
        if node is None:
            tensor = value.const_value if value.is_initializer() else None
            if value.is_graph_input() and _overridable(value):
                tensor = None
            break
        if node.op_type == "Constant" and node.domain == "":
            tensor = ir.convenience.get_const_tensor(value)
            break
        if node.op_type not in _VIEWS or node.domain != "" or value.is_graph_output():
            return None
        if node.op_type not in ("Identity", "Cast", "Transpose") and not _static(value):
            return None
        views.append(node)
        value = node.inputs[0]
    if value is None or tensor is None:
        return None
    return Constant(value, tuple(reversed(views)), tensor)


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
