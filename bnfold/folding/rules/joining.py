"""Operators with several data values or a constant beside the data: Add, Mul, Concat, Split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from bnfold.folding import layout
from bnfold.folding.affine import Array, ChannelAffine, canonical
from bnfold.folding.constants import FLOATS, constant
from bnfold.folding.rules.gating import Blocked, product_relations
from bnfold.folding.rules.moves import operand, same
from bnfold.folding.rules.node import (
    Opaque,
    dims,
    input_of,
    integer,
    label,
    one_constant,
    operand_slots,
)
from bnfold.folding.rules.passing import connect
from bnfold.folding.rules.relations import (
    Gauges,
    Relations,
    Rule,
    Scales,
    Sum,
    Term,
    Tie,
    no_shift,
    not_negative,
    readable,
    writable,
)


def add_up(node: ir.Node, terms: Sequence[tuple[ir.Value, int]]) -> Relations:
    """E(x + y) = s (x - a) + s (y - b): one scale for all, the origins add up."""
    y = node.outputs[0]
    total = Sum(y, tuple(Term(value, sign, operand(value, y)) for value, sign in terms))
    ties = tuple(connect(term.value, y, term.moves) for term in total.terms)
    return Relations(scales=ties, sums=(total,))


def add_rule(sign: int) -> Rule:
    """Add (sign 1) and Sub (sign -1): of two data values, or of one and a constant."""

    def relations(node: ir.Node) -> Relations:
        a, b = input_of(node, 0), input_of(node, 1)
        held = one_constant(node)
        if held is not None:
            slot, c = held
            if not np.all(np.isfinite(c.array)):
                raise Opaque("its constant is not finite")
            x, y = input_of(node, 1 - slot), node.outputs[0]
            tie = connect(x, y, operand(x, y))
            return Relations((tie,), (), (), (writable(x, node), writable(y, node)))
        if a is b:
            raise Opaque("it reads one value twice")
        return add_up(node, [(a, 1), (b, sign)])

    def rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
        held = one_constant(node)
        if held is None:
            return {}
        slot, c = held
        y = gauges(node.outputs[0])
        x = gauges(input_of(node, 1 - slot))
        rank = y.scale.ndim
        offset, origin = layout.broadcast(c.array, rank), layout.broadcast(x.origin, rank)
        # y = x + c, x - c, or c - x
        value = {(0, 1): 1, (1, 1): 1, (1, -1): -1, (0, -1): 1}[slot, sign]
        data = -1 if (slot, sign) == (0, -1) else 1
        regular = y.scale * (value * offset + data * origin - y.origin)
        new = np.where(y.scale == 0, y.origin - data * origin, regular)
        return {slot: _fitted(value * new, c.array.ndim)}

    def affine(node: ir.Node) -> tuple[int, ChannelAffine]:
        held = one_constant(node)
        if held is None:
            raise Opaque("it adds two computed values")
        slot, c = held
        producer = input_of(node, 1 - slot).producer()
        if producer is not None and producer.op_type == "MatMul":
            raise Opaque("it is the bias of a MatMul, which has none of its own")
        shift = _per_channel(node, slot, c.array)
        scale = -1.0 if (slot, sign) == (0, -1) else 1.0
        value = sign * shift if slot == 1 else shift
        return 1 - slot, ChannelAffine(np.full((1,) * shift.ndim, scale), value)

    return Rule(relations, rewrite, operand_slots, affine)


def _per_channel(node: ir.Node, slot: int, constant: Array) -> Array:
    """The constant of a two-operand node against its data, if it varies along one axis at most."""
    x, y = input_of(node, 1 - slot), node.outputs[0]
    shape = dims(x)
    if y.dtype not in FLOATS or len(shape) != len(dims(y)):
        raise Opaque("its constant changes the shape or type of the data")
    array = canonical(layout.broadcast(constant, len(shape)))
    fits = all(extent in (1, size) for extent, size in zip(array.shape, shape, strict=True))
    if not fits or sum(extent > 1 for extent in array.shape) > 1:
        raise Opaque("its constant varies along more than the channels")
    # an axis that the constant stretches is one whose extent in the data is 1
    wide = layout.broadcast(constant, len(shape)).shape
    if any(extent not in (1, size) for extent, size in zip(wide, shape, strict=True)):
        raise Opaque("its constant changes the shape of the data")
    if not np.all(np.isfinite(array)):
        raise Opaque("its constant is not finite")
    return array


def _fitted(array: Array, rank: int) -> Array:
    """The array without the leading axes of size 1 that broadcasting has added."""
    while array.ndim > rank and array.shape[0] == 1:
        array = array[0]
    return array


def sum_relations(node: ir.Node) -> Relations:
    """Sum of any number of computed values."""
    values = [value for value in node.inputs if value is not None]
    if len(set(values)) != len(values) or any(constant(value) is not None for value in values):
        raise Opaque("it reads a constant, or one value twice")
    return add_up(node, [(value, 1) for value in values])


def factor_rule(*, divide: bool, blocked: Blocked) -> Rule:
    """y = m x, channel by channel: any scales on both sides; origin_y = m origin_x.

    blocked: tells operators that let nothing pass, for a product of two computed values.
    """

    def factor(node: ir.Node) -> tuple[int, Array]:
        held = one_constant(node)
        if held is None or (divide and held[0] == 0):
            raise Opaque("it divides a constant")
        slot, c = held
        if divide and not np.all(c.array):
            raise Opaque("it divides by 0")
        return slot, 1 / c.array if divide else c.array

    def relations(node: ir.Node) -> Relations:
        if one_constant(node) is None:
            return product_relations(node, blocked, divide=divide)
        slot, m = factor(node)
        x, y = input_of(node, 1 - slot), node.outputs[0]
        same(x, y, node)
        m = layout.broadcast(m, len(dims(y)))

        def back(origin: Array, _scales: Scales) -> Array | None:
            if np.any((m == 0) & ~np.isnan(origin) & (origin != 0)):
                return None
            with np.errstate(divide="ignore", invalid="ignore"):
                return canonical(np.where(m == 0, np.nan, origin / m))

        tie = Tie(x, y, lambda origin, _s: canonical(m * origin), back, elementwise=True)
        demands = tuple(d(v, node) for v in (x, y) for d in (readable, writable))
        return Relations((), (tie,), (), demands)

    def rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
        slot, m = factor(node)
        x, y = gauges(input_of(node, 1 - slot)), gauges(node.outputs[0])
        new = y.scale * layout.broadcast(m, y.scale.ndim) * x.read_scale
        return {slot: _fitted(1 / new if divide else new, m.ndim)}

    def affine(node: ir.Node) -> tuple[int, ChannelAffine]:
        slot, m = factor(node)
        scale = _per_channel(node, slot, m)
        if np.any(scale == 0):
            raise Opaque("it multiplies by 0")
        return 1 - slot, ChannelAffine(scale, np.zeros((1,) * scale.ndim))

    return Rule(relations, rewrite, operand_slots, affine)


def mean_relations(node: ir.Node) -> Relations:
    """Mean of any number of computed values: one scale for all, no shift."""
    values = [value for value in node.inputs if value is not None]
    if any(constant(value) is not None for value in values):
        raise Opaque("it reads a constant")
    y = node.outputs[0]
    sentence = f"{label(node)} passes no shift"
    ties = tuple(connect(value, y, operand(value, y)) for value in values)
    return Relations(ties, (), (), tuple(no_shift(v, sentence) for v in (*values, y)))


def extremum_rule(choose: Callable[[Array, Array], Array]) -> Rule:
    """Max and Min: one scale that is not negative and one origin for all; constants follow."""

    def held(node: ir.Node) -> dict[int, Array]:
        found = {slot: constant(value) for slot, value in enumerate(node.inputs)}
        return {slot: c.array for slot, c in found.items() if c is not None}

    def relations(node: ir.Node) -> Relations:
        y, bounds = node.outputs[0], held(node)
        values = [v for slot, v in enumerate(node.inputs) if slot not in bounds and v is not None]
        if not values:
            raise Opaque("it reads constants alone")
        if any(array.ndim > len(dims(y)) for array in bounds.values()):
            raise Opaque("its constant has a higher rank than the data")
        if not all(np.all(np.isfinite(array)) for array in bounds.values()):
            raise Opaque("its constant is not finite")
        scales = tuple(connect(value, y, operand(value, y)) for value in values)
        demands = [not_negative(value, node) for value in (*values, y)]
        if len(values) == 1:
            origins = (_bounded(values[0], y, bounds, choose),)
            return Relations(scales, origins, (), tuple(demands))
        demands += [writable(value, node) for value in (*values, y)]
        return Relations(scales, scales, (), tuple(demands))

    def rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
        y = gauges(node.outputs[0])
        return {
            slot: _fitted(y.write(layout.broadcast(array, y.scale.ndim)), array.ndim)
            for slot, array in held(node).items()
        }

    return Rule(relations, rewrite, lambda node: tuple(held(node)))


def _bounded(
    x: ir.Value, y: ir.Value, bounds: Mapping[int, Array], choose: Callable[[Array, Array], Array]
) -> Tie:
    """The origin passes as it is; of a known constant, what the operator makes of it."""
    ahead, back = operand(x, y)

    def forward(origin: Array, scales: Scales) -> Array | None:
        chosen = origin
        for array in bounds.values():
            chosen = choose(chosen, layout.broadcast(array, origin.ndim))
        known = np.isinf(scales(x))
        return ahead(canonical(np.where(known, chosen, origin)))

    def backward(origin: Array, scales: Scales) -> Array | None:
        return back(canonical(np.where(np.isinf(scales(y)), np.nan, origin)))

    return Tie(x, y, forward, backward)


def negation_rule() -> Rule:
    """Neg: any scale; the origin changes its sign."""

    def relations(node: ir.Node) -> Relations:
        x, y = input_of(node, 0), node.outputs[0]
        origin = Tie(x, y, lambda array, _s: -array, lambda array, _s: -array)
        return Relations((connect(x, y, same(x, y, node)),), (origin,))

    def affine(node: ir.Node) -> tuple[int, ChannelAffine]:
        one = (1,) * len(dims(input_of(node, 0)))
        return 0, ChannelAffine(np.full(one, -1.0), np.zeros(one))

    return Rule(relations, affine=affine)


def concat_relations(node: ir.Node) -> Relations:
    """Each branch has its slice of the result's gauge."""
    y = node.outputs[0]
    axis = integer(node, "axis", 1) % len(dims(y))
    total = dims(y)[axis]
    ties, at = [], 0
    for value in node.inputs:
        assert value is not None
        size = dims(value)[axis]
        if not isinstance(size, int) or not isinstance(total, int):
            raise Opaque(f"the extent of '{value.name}' along axis {axis} is not known")
        cut = slice(at, at + size)
        ties.append(
            connect(
                value,
                y,
                (
                    lambda array, cut=cut: layout.put(array, cut, axis, total),  # type: ignore[misc]
                    lambda array, cut=cut: layout.take(array, cut, axis),  # type: ignore[misc]
                ),
            )
        )
        at += size
    if len({tie.a for tie in ties}) != len(ties):
        raise Opaque("it reads one value twice")
    return Relations(tuple(ties), tuple(ties))


def split_relations(node: ir.Node) -> Relations:
    """Each output is a slice of the input's gauge."""
    x = input_of(node, 0)
    axis = integer(node, "axis", 0) % len(dims(x))
    total = dims(x)[axis]
    ties, at = [], 0
    for y in node.outputs:
        size = dims(y)[axis]
        if not isinstance(size, int) or not isinstance(total, int):
            raise Opaque(f"the extent of '{y.name}' along axis {axis} is not known")
        cut = slice(at, at + size)
        ties.append(
            connect(
                x,
                y,
                (
                    lambda array, cut=cut: layout.take(array, cut, axis),  # type: ignore[misc]
                    lambda array, cut=cut: layout.put(array, cut, axis, total),  # type: ignore[misc]
                ),
            )
        )
        at += size
    return Relations(tuple(ties), tuple(ties))
