"""Linear operators, y = W x + b: they absorb every gauge, W~ = scale_y W / scale_x.

A shift at the input needs every output element to see every weight: no zero padding in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from bnfold.folding import layout
from bnfold.folding.affine import Array, canonical
from bnfold.folding.constants import Constant, constant
from bnfold.folding.rules.gating import Blocked
from bnfold.folding.rules.gating import matmul_relations as gated_matmul
from bnfold.folding.rules.node import (
    Opaque,
    along,
    auto_padded,
    constant_at,
    dims,
    input_of,
    integer,
    integers,
    label,
    one_constant,
    real,
    string,
    weights,
)
from bnfold.folding.rules.relations import (
    Gauges,
    Relations,
    Rule,
    Scales,
    Tie,
    no_shift,
    only_along,
    readable,
    writable,
)


def _pads_with_zeros(node: ir.Node, kernel: Sequence[int]) -> bool:
    if auto_padded(node):
        return any(size != 1 for size in kernel)
    return string(node, "auto_pad", "NOTSET") != "VALID" and any(integers(node, "pads") or ())


def absorbs(
    node: ir.Node,
    source: tuple[ir.Value, int],
    result: tuple[ir.Value, int],
    *,
    barrier: str | None = None,
) -> Relations:
    """No tie at all: both sides, each a value and its channel axis, take any gauge.

    barrier: what stands against a shift at the input, if something does.
    """
    (x, in_axis), (y, out_axis) = source, result
    demands = [
        *only_along(x, in_axis, node),
        *only_along(y, out_axis, node),
        readable(x, node),
        writable(y, node),
    ]
    if barrier is not None:
        demands.append(no_shift(x, f"{label(node)} {barrier}, which a shift would change"))
    return Relations(demands=tuple(demands))


def _bias(node: ir.Node, slot: int, size: int) -> Array:
    if slot < len(node.inputs) and node.inputs[slot] is not None:
        return weights(node, slot)
    return np.zeros(size)


def shifted(bias: Array, scale: Array, origin: Array) -> Array:
    """scale (bias - origin), and the constant itself where one is to be written."""
    return np.where(scale == 0, origin, scale * (bias - origin))


def _is_pointwise(node: ir.Node) -> bool:
    """True where every output element of a transposed convolution sees exactly one of the input."""
    ones = (*constant_at(node, 1).shape[2:], *(integers(node, "strides") or ()))
    zeros = (*(integers(node, "pads") or ()), *(integers(node, "output_padding") or ()))
    plain = string(node, "auto_pad", "NOTSET") == "NOTSET" and "output_shape" not in node.attributes
    return plain and all(n == 1 for n in ones) and not any(zeros)


def conv_barrier(node: ir.Node, *, transposed: bool) -> str | None:
    """What stands against a shift at the input of a convolution, if something does."""
    if transposed:
        return None if _is_pointwise(node) else "sees fewer elements at the border"
    return "pads with zeros" if _pads_with_zeros(node, constant_at(node, 1).shape[2:]) else None


def conv_rewrite(node: ir.Node, gauges: Gauges, *, transposed: bool) -> dict[int, Array]:
    """Conv, weights (g O/g) I/g k..., and ConvTranspose, weights (g I/g) O/g k..."""
    weight, groups = weights(node, 1), integer(node, "group", 1)
    kernel = weight.shape[2:]
    # (group, out, in, kernel...)
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    split = np.swapaxes(split, 1, 2) if transposed else split
    outs, ins = groups * split.shape[1], groups * split.shape[2]
    x, y = gauges(input_of(node, 0)), gauges(node.outputs[0])
    ones = (1,) * len(kernel)
    scale = along(y.scale, outs)
    read = along(x.read_scale, ins).reshape(groups, 1, -1, *ones)
    shift = along(x.origin, ins).reshape(groups, 1, -1, *ones)
    bias = _bias(node, 2, outs)
    if np.any(shift):
        bias = bias + (split * shift).sum(axis=tuple(range(2, split.ndim))).reshape(outs)
    split *= scale.reshape(groups, -1, 1, *ones)  # in place: `weights` gave a fresh array
    if np.any(read != 1):
        split *= read
    return {
        1: weight,
        2: shifted(bias, scale, along(y.origin, outs)),
    }


def conv_rule(*, transposed: bool) -> Rule:
    """Conv and ConvTranspose, 1-D to 3-D, grouped and depthwise."""

    def relations(node: ir.Node) -> Relations:
        constant_at(node, 1)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            constant_at(node, 2)
        barrier = conv_barrier(node, transposed=transposed)
        return absorbs(node, (input_of(node, 0), 1), (node.outputs[0], 1), barrier=barrier)

    def rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
        return conv_rewrite(node, gauges, transposed=transposed)

    return Rule(relations, rewrite, lambda _node: (1, 2))


def gemm_relations(node: ir.Node) -> Relations:
    """Gemm with constant B and C absorbs every gauge; the channels of A are its columns."""
    constant_at(node, 1)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        constant_at(node, 2)
    if real(node, "beta", 1.0) == 0:
        raise Opaque("its beta is 0")
    x, y = input_of(node, 0), node.outputs[0]
    return absorbs(node, (x, 0 if integer(node, "transA", 0) else 1), (y, 1))


def gemm_rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
    """y = alpha A B + beta C."""
    flip = bool(integer(node, "transB", 0))
    alpha, beta = real(node, "alpha", 1.0), real(node, "beta", 1.0)
    weight = weights(node, 1).T if flip else weights(node, 1)
    ins, outs = weight.shape
    x, y = gauges(input_of(node, 0)), gauges(node.outputs[0])
    scale, origin = along(y.scale, outs), along(y.origin, outs)
    new = along(x.read_scale, ins)[:, None] * weight * scale
    bias = beta * _bias(node, 2, outs) + alpha * (along(x.origin, ins) @ weight)
    return {1: new.T if flip else new, 2: shifted(bias, scale, origin) / beta}


def matmul_operand(node: ir.Node) -> tuple[int, Constant]:
    """The slot of the constant operand, and the constant. Raises Opaque where there is none."""
    held = one_constant(node)
    if held is None:
        raise Opaque("it multiplies two computed values")
    slot, c = held
    if len(c.shape) < 2 or len(dims(input_of(node, 1 - slot))) < 2:
        raise Opaque("one of its operands is a vector")
    return slot, c


def matmul_rule(blocked: Blocked) -> Rule:
    """MatMul of a constant, which absorbs, or of two computed values, through which a scale passes.

    blocked: tells operators that let nothing pass.
    """

    def relations(node: ir.Node) -> Relations:
        if one_constant(node) is None:
            return gated_matmul(node, blocked)
        return _matmul_relations(node)

    return Rule(relations, _matmul_rewrite, lambda node: (matmul_operand(node)[0],))


def _matmul_relations(node: ir.Node) -> Relations:
    """MatMul with one constant operand absorbs every gauge along the other one's channels.

    The bias that it may need is an Add behind it, which takes a shift along any axis. If one is
    there already, the shift of the input goes on to that one.
    """
    slot, _ = matmul_operand(node)
    axis = -1 if slot == 1 else -2
    x, y = input_of(node, 1 - slot), node.outputs[0]
    scale_only, _ = only_along(y, axis, node)
    demands = (*only_along(x, axis, node), scale_only, readable(x, node), writable(y, node))
    return Relations(origins=_shift_goes_on(node, x, y), demands=demands)


def _shift_goes_on(node: ir.Node, x: ir.Value, y: ir.Value) -> tuple[Tie, ...]:
    """origin_y = W origin_x where the only reader of y adds a constant, which takes any origin."""
    uses = list(y.uses())
    if len(uses) != 1 or y.is_graph_output():
        return ()
    reader, slot = uses[0]
    other = reader.inputs[1 - slot] if reader.op_type in ("Add", "Sub") else None
    if constant(other) is None:
        return ()

    def ahead(origin: Array, _scales: Scales) -> Array | None:
        return _product_of_origin(node, origin, len(dims(y)))

    return (Tie(x, y, ahead, lambda _origin, _s: np.full((1,) * len(dims(x)), np.nan)),)


def _product_of_origin(node: ir.Node, origin: Array, rank: int) -> Array:
    """W times the origin of the input, against the output; NaN where the origin is not known."""
    if origin.size == 1 and (
        origin == 0 or np.isnan(origin)
    ):  # the common cases, without a product
        return np.full((1,) * rank, origin.item())
    slot, held = matmul_operand(node)
    weight = held.array if slot == 1 else np.swapaxes(held.array, -1, -2)
    moved = (along(origin, weight.shape[-2]) @ weight)[..., None, :]
    moved = moved if slot == 1 else np.swapaxes(moved, -1, -2)
    return canonical(layout.broadcast(moved, rank))


def matmul_bias(node: ir.Node, gauges: Gauges) -> Array:
    """The bias that a MatMul needs with the gauges around it; zeros where it needs none."""
    slot, _ = matmul_operand(node)
    x, y = gauges(input_of(node, 1 - slot)), gauges(node.outputs[0])
    bias = shifted(_product_of_origin(node, x.origin, y.scale.ndim), y.scale, y.origin)
    while bias.ndim > 1 and bias.shape[0] == 1:
        bias = bias[0]
    return bias


def _matmul_rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
    """y = x W or y = W x; slot 2 stands for the bias that a MatMul does not have."""
    slot, held = matmul_operand(node)
    x, y = gauges(input_of(node, 1 - slot)), gauges(node.outputs[0])
    weight = held.array if slot == 1 else np.swapaxes(held.array, -1, -2)
    ins, outs = weight.shape[-2:]
    weight *= along(y.scale, outs)  # in place: it is a fresh array
    weight *= along(x.read_scale, ins)[:, None]
    new = weight if slot == 1 else np.swapaxes(weight, -1, -2)
    return {slot: new, 2: matmul_bias(node, gauges)}
