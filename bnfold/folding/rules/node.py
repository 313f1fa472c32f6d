"""Reading a node: its attributes, constant operands, extents and name."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array
from bnfold.folding.constants import Constant, constant
from bnfold.folding.layout import Dim


class Opaque(Exception):  # noqa: N818 - not an error: a rule's way of saying "as without a row"
    """Raised by a family for a node that it does not cover; the text says why."""


def label(node: ir.Node) -> str:
    """How a node is named to a user: operator and name, or operator and output."""
    return f"{node.op_type} '{node.name or node.outputs[0].name}'"


def name_of(node: ir.Node) -> str:
    """The name of a batch norm as its author knows it: the module's path if there is one."""
    held = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    source = held.root.name if held is not None else None
    if source and source.endswith(".running_mean"):
        return source.removesuffix(".running_mean")
    return node.name or node.outputs[0].name or "BatchNormalization"


def layer_name(node: ir.Node, slot: int) -> str:
    """The name of the layer that holds a node's weight, or the node's own."""
    if node.op_type == "BatchNormalization":
        return name_of(node)
    held = constant(optional_input(node, slot))
    root = held.root.name if held is not None else None
    if root and root.endswith(".weight"):
        return root.removesuffix(".weight")
    return node.name or node.outputs[0].name or node.op_type


def dims(value: ir.Value) -> list[Dim]:
    """The extents of a value. Raises Opaque where not even the rank is known."""
    if value.shape is None:
        raise Opaque(f"the rank of '{value.name}' is not known")
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def optional_input(node: ir.Node, slot: int) -> ir.Value | None:
    """The value at an input slot, None where there is none."""
    return node.inputs[slot] if slot < len(node.inputs) else None


def input_of(node: ir.Node, slot: int) -> ir.Value:
    """The value at an input slot. Raises Opaque where there is none."""
    value = optional_input(node, slot)
    if value is None:
        raise Opaque(f"{label(node)} lacks input {slot}")
    return value


def is_standard(node: ir.Node, *op_types: str) -> bool:
    """True for one of these operators as ONNX itself defines it."""
    return node.op_type in op_types and node.domain in ("", "ai.onnx")


def opset_of(node: ir.Node) -> int:
    """The opset that a node is written in (`graph.prepare` notes it on every graph)."""
    graph = node.graph
    return int(graph.meta.get("opset", 0)) if graph is not None else 0


# --- attributes ----------------------------------------------------------------------------------


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def integers(node: ir.Node, name: str) -> list[int] | None:
    """A list of integers, None where the attribute is absent."""
    attribute = node.attributes.get(name)
    return [int(i) for i in attribute.as_ints()] if attribute is not None else None


def real(node: ir.Node, name: str, default: float) -> float:
    """A float attribute, as a file holds it: in float32."""
    attribute = node.attributes.get(name)
    return float(np.float32(attribute.as_float() if attribute is not None else default))


def string(node: ir.Node, name: str, default: str) -> str:
    """A text attribute."""
    attribute = node.attributes.get(name)
    return attribute.as_string() if attribute is not None else default


def auto_padded(node: ir.Node) -> bool:
    """True where the node pads as much as it takes to keep the size."""
    return string(node, "auto_pad", "NOTSET").startswith("SAME")


# --- constant operands ---------------------------------------------------------------------------


def weights(node: ir.Node, slot: int) -> Array:
    """The elements at an input slot, fresh, in float64. Raises Opaque where they are computed."""
    return constant_at(node, slot).array


def constant_at(node: ir.Node, slot: int) -> Constant:
    """The constant at an input slot. Raises Opaque where it is computed."""
    value = optional_input(node, slot)
    held = constant(value)
    if held is not None:
        return held
    if value is not None and value.is_initializer():
        raise Opaque(
            f"'{value.name}' is also an input of the model, so a caller may override it;"
            " --freeze-inputs makes it a constant"
        )
    raise Opaque(f"input {slot} of {label(node)} is computed, not constant")


def indices(node: ir.Node, slot: int, name: str) -> list[int] | None:
    """Integers given as an attribute (older opsets) or as a constant input (newer ones)."""
    if optional_input(node, slot) is not None:
        return [int(i) for i in weights(node, slot).reshape(-1)]
    return integers(node, name)


def one_constant(node: ir.Node) -> tuple[int, Constant] | None:
    """The operand of a two-operand node that is constant, if exactly one is."""
    held = [constant(value) for value in node.inputs[:2]]
    found = [(slot, c) for slot, c in enumerate(held) if c is not None]
    if len(found) != 1:
        return None
    slot, c = found[0]
    if len(c.shape) > len(dims(node.outputs[0])):
        raise Opaque("its constant has a higher rank than the data")
    return slot, c


def operand_slots(node: ir.Node) -> tuple[int, ...]:
    """The slot of the constant operand of a two-operand node, if there is one."""
    held = one_constant(node)
    return () if held is None else (held[0],)


def along(array: Array, size: int) -> Array:
    """The numbers of an array along its one varying axis, as a vector."""
    return np.broadcast_to(array.reshape(-1), (size,)) if array.size == 1 else array.reshape(size)
