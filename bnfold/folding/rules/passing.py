"""Operators with one input that hold nothing back: one tie between input and output.

structural, averaging (any gauge), monotone (no negative scale), additive (no shift), homogeneous (a
positive scale, no shift); and "opaque", where nothing passes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array, Gauge, Mask, canonical
from bnfold.folding.constants import FLOATS, constant
from bnfold.folding.rules.moves import padded, pads_of, pooled, same
from bnfold.folding.rules.node import (
    Opaque,
    auto_padded,
    input_of,
    integer,
    integers,
    label,
    opset_of,
    optional_input,
    real,
    string,
    weights,
)
from bnfold.folding.rules.relations import (
    Demand,
    Gauges,
    Moves,
    Relations,
    Rule,
    Tie,
    identity_demands,
    no_shift,
    not_negative,
    positive,
    writable,
)


def opaque(node: ir.Node, why: str | None = None) -> Relations:
    """Nothing passes: every value around the node keeps its identity gauge."""
    reason = f" ({why})" if why else ""
    sentence = f"{label(node)} lets no scale or shift pass{reason}"
    around = {v for v in (*node.inputs, *node.outputs) if v is not None}
    return Relations(demands=tuple(d for v in around for d in identity_demands(v, sentence)))


def free(_node: ir.Node) -> Relations:
    """Shape and Size: they look at no element, so every gauge may enter."""
    return Relations()


# --- structural, averaging, monotone, homogeneous: one tie ---------------------------------------


def connect(x: ir.Value, y: ir.Value, moves: Moves) -> Tie:
    """The tie between two values of which one is the other, moved."""
    ahead, back = moves
    return Tie(x, y, lambda array, _s: ahead(array), lambda array, _s: back(array))


def structural(moves: Callable[[ir.Value, ir.Value, ir.Node], Moves] = same) -> Rule:
    """y = f(x), f moves or averages elements with weights of sum 1: any gauge, re-indexed."""

    def relations(node: ir.Node) -> Relations:
        x, y = input_of(node, 0), node.outputs[0]
        tie = connect(x, y, moves(x, y, node))
        return Relations(scales=(tie,), origins=(tie,))

    return Rule(relations)


def monotone(moves: Callable[[ir.Value, ir.Value, ir.Node], Moves] = same) -> Rule:
    """max(s x + t) = s max(x) + t for s >= 0: no negative scale, any shift."""

    def relations(node: ir.Node) -> Relations:
        x, y = input_of(node, 0), node.outputs[0]
        tie = connect(x, y, moves(x, y, node))
        demands = [not_negative(x, node), not_negative(y, node)]
        if any(other.uses() or other.is_graph_output() for other in node.outputs[1:]):
            # the places of the maxima are read too: they need the data itself
            demands += [positive(x, node), writable(x, node)]
        return Relations((tie,), (tie,), (), tuple(demands))

    return Rule(relations)


def summing(moves: Callable[[ir.Value, ir.Value, ir.Node], Moves] = same) -> Rule:
    """y = A x, A without channels: any scale, no shift."""

    def relations(node: ir.Node) -> Relations:
        x, y = input_of(node, 0), node.outputs[0]
        sentence = f"{label(node)} passes no shift"
        demands = (no_shift(x, sentence), no_shift(y, sentence))
        return Relations((connect(x, y, moves(x, y, node)),), (), (), demands)

    return Rule(relations)


def homogeneous(function: Callable[[ir.Node, Array], Array]) -> Rule:
    """f(s x) = s f(x) for s > 0: the same positive scale on both sides, no shift.

    A known constant k passes as f(k).
    """

    def relations(node: ir.Node) -> Relations:
        x, y = input_of(node, 0), node.outputs[0]
        scale = connect(x, y, same(x, y, node))
        origin = Tie(
            x,
            y,
            lambda array, _s: canonical(function(node, array)),
            lambda array, _s: np.full_like(array, np.nan),
        )
        sentence = f"{label(node)} passes no shift"
        demands = (
            positive(x, node),
            positive(y, node),
            no_shift(x, sentence, known_constants=True),
            no_shift(y, sentence, known_constants=True),
        )
        return Relations((scale,), (origin,), (), demands)

    return Rule(relations)


def leaky(node: ir.Node, x: Array) -> Array:
    """LeakyRelu of an array."""
    return np.where(x < 0, real(node, "alpha", 0.01) * x, x)


def _prelu(node: ir.Node, x: Array) -> Array:
    return np.where(x < 0, weights(node, 1) * x, x)


def prelu_rule() -> Rule:
    """PRelu with a constant slope, which a positive scale leaves as it is."""
    rule = homogeneous(_prelu)

    def relations(node: ir.Node) -> Relations:
        weights(node, 1)  # a computed slope is opaque
        return rule.relations(node)

    return Rule(relations)


def pad_rule() -> Rule:
    """Reflected and repeated borders are structural; one number for all channels is rewritten."""
    copies = structural(padded)

    def relations(node: ir.Node) -> Relations:
        asks = copies.relations(node)
        if string(node, "mode", "constant") != "constant" or not any(pads_of(node)):
            return asks
        value, y, as_input = pad_value(node), node.outputs[0], _pads_with_input(node)

        def one_number(scale: Array, origin: Array) -> Mask:
            gauge = Gauge(scale, origin)
            return is_carried_as(carried(value, gauge) if as_input else value, value, gauge)

        sentence = f"{label(node)} pads all channels with one number, which no shift may change"
        demand = Demand(y, "origin", one_number, sentence)
        return Relations(asks.scales, asks.origins, (), (demand,))

    def rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
        number = carried(pad_value(node), gauges(node.outputs[0]))
        return {_PAD_VALUE: np.asarray(number)}

    return Rule(relations, rewrite, lambda n: (_PAD_VALUE,) if _pads_with_input(n) else ())


_PAD_VALUE = 2


def _pads_with_input(node: ir.Node) -> bool:
    """True where the number is an input, which can be rewritten, not an attribute."""
    return string(node, "mode", "constant") == "constant" and opset_of(node) >= 11


def pad_value(node: ir.Node) -> float:
    """The number that a Pad puts around its input."""
    if optional_input(node, _PAD_VALUE) is None:
        return real(node, "value", 0.0)
    return float(weights(node, _PAD_VALUE).reshape(-1)[0])


def carried(value: float, gauge: Gauge) -> float:
    """A number as the folded graph has it, by the first channel that is no known constant."""
    new, known = np.broadcast_arrays(gauge.write(np.asarray(value)), np.isinf(gauge.scale))
    live = new[~known]
    return float(live[0]) if live.size else value


def is_carried_as(number: float, value: float, gauge: Gauge) -> Mask:
    """Whether each channel carries `value` as this one number."""
    new = gauge.write(np.asarray(value))
    return np.asarray(np.where(np.isinf(gauge.scale), gauge.origin == value, new == number))


def grid_sample_rule() -> Rule:
    """Weights of sum 1 wherever the grid points; beside the image are zeros, or its border."""
    inside, zeros = structural(pooled), summing(pooled)

    def relations(node: ir.Node) -> Relations:
        mode = string(node, "padding_mode", "zeros")
        asks = (zeros if mode == "zeros" else inside).relations(node)
        sentence = f"{label(node)} reads places, not numbers, from its grid"
        grid = identity_demands(input_of(node, 1), sentence)
        return Relations(asks.scales, asks.origins, (), (*asks.demands, *grid))

    return Rule(relations)


def average_pool_rule() -> Rule:
    """AveragePool averages what is there; where it counts padded zeros too, no shift passes."""
    plain, counting = structural(pooled), summing(pooled)

    def relations(node: ir.Node) -> Relations:
        padded = any(integers(node, "pads") or ()) or auto_padded(node)
        counts = integer(node, "count_include_pad", 0) and (padded or integer(node, "ceil_mode", 0))
        return (counting if counts else plain).relations(node)

    return Rule(relations)


# binary digits of the floating types
_DIGITS = {
    ir.DataType.BFLOAT16: 8,
    ir.DataType.FLOAT16: 11,
    ir.DataType.FLOAT: 24,
    ir.DataType.DOUBLE: 53,
}


def cast_rule() -> Rule:
    """Cast between floating types: any gauge, but no shift where digits are dropped.

    Two bytes have few digits: what is rounded to them far from its own mean would lose them all.
    """
    rule = structural()

    def relations(node: ir.Node) -> Relations:
        x, y = input_of(node, 0), node.outputs[0]
        if x.dtype not in FLOATS or y.dtype not in FLOATS:
            raise Opaque("it is not a cast between floating types")
        asks = rule.relations(node)
        if _DIGITS[y.dtype] >= min(_DIGITS[x.dtype], _DIGITS[ir.DataType.FLOAT]):
            return asks
        sentence = f"{label(node)} drops digits, of which a shift would change what is left"
        return Relations(asks.scales, asks.origins, (), (no_shift(y, sentence),))

    return Rule(relations)


def dropout_rule() -> Rule:
    """Dropout at inference is the identity."""
    rule = structural()

    def relations(node: ir.Node) -> Relations:
        if not drops_nothing(node):
            raise Opaque("it runs in training mode")
        return rule.relations(node)

    return Rule(relations)


def drops_nothing(node: ir.Node) -> bool:
    """True for a Dropout at inference."""
    mode = optional_input(node, 2)
    held = constant(mode)
    return mode is None or (held is not None and not np.any(held.array))
