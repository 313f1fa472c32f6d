"""The table of rules: operator -> family.

A family says what one node asks of the gauges around it, in three kinds of statement:

- ties: what the scale (or the origin) on one side makes of the scale (the origin) on the other;
- sums: the origin of an Add is the sum of the origins of its branches;
- demands: what a single gauge must be, with the sentence that explains why if it is not.

An operator that holds constants absorbs what its ties leave free, and a fourth function, `rewrite`,
gives its new constants from the gauges around it. An operator without a row lets nothing pass. A new
operator is one row of RULES and one case in the law test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from bnfold import layout
from bnfold.affine import Array, ChannelAffine, Gauge, canonical
from bnfold.constants import FLOATS, Constant, constant
from bnfold.errors import InputError
from bnfold.layout import Dim

Scales = Callable[[ir.Value], Array]
Transfer = Callable[[Array, Scales], Array | None]
Gauges = Callable[[ir.Value], Gauge]
Rewrite = Callable[[ir.Node, Gauges], dict[int, Array]]


@dataclass(frozen=True, eq=False)
class Tie:
    """What a number at value `a` makes of the number at value `b`, and back.

    elementwise: both sides have one layout and the two transfers are inverse up to rounding.
    """

    a: ir.Value
    b: ir.Value
    forward: Transfer
    backward: Transfer
    elementwise: bool = False


@dataclass(frozen=True, eq=False)
class Term:
    """A signed operand of a sum; `lift` brings its array to the result's rank, `lower` back."""

    value: ir.Value
    sign: int
    lift: Callable[[Array], Array]
    lower: Callable[[Array], Array | None]


@dataclass(frozen=True, eq=False)
class Sum:
    """origin(result) = sum of sign * origin(term)."""

    result: ir.Value
    terms: tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Demand:
    """What a node asks of the scale or the origin at one value.

    holds(scale, origin) is an array of bool, False on the channels where the demand is broken.
    """

    value: ir.Value
    layer: Literal["scale", "origin"]
    holds: Callable[[Array, Array], Array]
    sentence: str


@dataclass(frozen=True, eq=False)
class Relations:
    """Everything that one node asks of the gauges around it."""

    scales: tuple[Tie, ...] = ()
    origins: tuple[Tie, ...] = ()
    sums: tuple[Sum, ...] = ()
    demands: tuple[Demand, ...] = ()


@dataclass(frozen=True, eq=False)
class Rule:
    """A row of the table: what the operator asks, and its new constants if it holds any."""

    relations: Callable[[ir.Node], Relations]
    rewrite: Rewrite | None = None
    # the operands that `rewrite` may change
    constants: Callable[[ir.Node], tuple[int, ...]] = field(default=lambda _node: ())


class Opaque(Exception):  # noqa: N818 - not an error: a rule's way of saying "as without a row"
    """Raised by a family for a node that it does not cover; the text says why."""


# --- reading a node ------------------------------------------------------------------------------


def label(node: ir.Node) -> str:
    """How a node is named to a user: operator and name, or operator and output."""
    return f"{node.op_type} '{node.name or node.outputs[0].name}'"


def dims(value: ir.Value) -> list[Dim]:
    """The extents of a value. Raises Opaque where not even the rank is known."""
    if value.shape is None:
        raise Opaque(f"the rank of '{value.name}' is not known")
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def _data(node: ir.Node, slot: int) -> ir.Value:
    value = node.inputs[slot] if slot < len(node.inputs) else None
    if value is None:
        raise Opaque(f"{label(node)} lacks input {slot}")
    return value


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def _ints(node: ir.Node, name: str) -> list[int] | None:
    attribute = node.attributes.get(name)
    return [int(i) for i in attribute.as_ints()] if attribute is not None else None


def _string(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return attribute.as_string() if attribute is not None else default


def _float(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return attribute.as_float() if attribute is not None else default


def _weights(node: ir.Node, slot: int) -> Array:
    value = node.inputs[slot] if slot < len(node.inputs) else None
    held = constant(value)
    if held is None:
        if value is not None and value.is_initializer():
            raise Opaque(
                f"'{value.name}' is also an input of the model, so a caller may override it;"
                " --freeze-inputs makes it a constant"
            )
        raise Opaque(f"input {slot} of {label(node)} is computed, not constant")
    return held.array


def _indices(node: ir.Node, slot: int, name: str) -> list[int] | None:
    """Integers given as an attribute (older opsets) or as a constant input (newer ones)."""
    if slot < len(node.inputs) and node.inputs[slot] is not None:
        held = constant(node.inputs[slot])
        if held is None:
            raise Opaque(f"input {slot} of {label(node)} is computed, not constant")
        return [int(i) for i in held.array.reshape(-1)]
    return _ints(node, name)


def along(array: Array, axis: int, size: int) -> Array:
    """The numbers of an array along its one varying axis, as a vector."""
    return np.broadcast_to(array.reshape(-1), (size,)) if array.size == 1 else array.reshape(size)


# --- demands -------------------------------------------------------------------------------------


def _identity(value: ir.Value, sentence: str) -> tuple[Demand, Demand]:
    return (
        Demand(value, "scale", lambda scale, _o: scale == 1, sentence),
        Demand(value, "origin", lambda _s, origin: origin == 0, sentence),
    )


def _positive(value: ir.Value, node: ir.Node) -> Demand:
    sentence = f"{label(node)} takes only positive scales"
    return Demand(value, "scale", lambda scale, _o: scale > 0, sentence)


def _not_negative(value: ir.Value, node: ir.Node) -> Demand:
    sentence = f"{label(node)} takes no negative scale"
    return Demand(value, "scale", lambda scale, _o: scale >= 0, sentence)


def _readable(value: ir.Value, node: ir.Node) -> Demand:
    sentence = f"{label(node)} reads channels whose batch norm has gamma = 0"
    return Demand(value, "scale", lambda scale, _o: scale != 0, sentence)


def _written(value: ir.Value, node: ir.Node) -> Demand:
    sentence = f"{label(node)} cannot make its output a known constant"
    return Demand(value, "scale", lambda scale, _o: np.isfinite(scale), sentence)


def _no_shift(value: ir.Value, sentence: str, *, known_constants: bool = False) -> Demand:
    """Origin 0; with `known_constants`, channels of infinite scale may have any."""
    return Demand(
        value,
        "origin",
        lambda s, o: (o == 0) | (np.isinf(s) if known_constants else False),
        sentence,
    )


def _only_along(value: ir.Value, axis: int, node: ir.Node) -> tuple[Demand, Demand]:
    """The gauge of this value varies along one axis alone."""
    rank = len(dims(value))

    def constant_elsewhere(array: Array) -> Array:
        fits = all(n == 1 or i == axis % rank for i, n in enumerate(array.shape))
        return np.full(array.shape, fits)

    sentence = f"the channels of {label(node)} lie along axis {axis % rank} of '{value.name}' only"
    return (
        Demand(value, "scale", lambda scale, _o: constant_elsewhere(scale), sentence),
        Demand(value, "origin", lambda _s, origin: constant_elsewhere(origin), sentence),
    )


# --- no family -----------------------------------------------------------------------------------


def opaque(node: ir.Node, why: str | None = None) -> Relations:
    """Nothing passes: every value around the node keeps its identity gauge."""
    reason = f" ({why})" if why else ""
    sentence = f"{label(node)} lets no scale or shift pass{reason}"
    around = {v for v in (*node.inputs, *node.outputs) if v is not None}
    return Relations(demands=tuple(d for v in around for d in _identity(v, sentence)))


def _free(_node: ir.Node) -> Relations:
    """Shape and Size: they look at no element, so every gauge may enter."""
    return Relations()


# --- structural, averaging, monotone, homogeneous: one tie ---------------------------------------

Moves = tuple[Callable[[Array], Array | None], Callable[[Array], Array | None]]


def _tie(x: ir.Value, y: ir.Value, moves: Moves) -> Tie:
    ahead, back = moves
    return Tie(x, y, lambda array, _s: ahead(array), lambda array, _s: back(array))


def _same(x: ir.Value, y: ir.Value, _node: ir.Node) -> Moves:
    if len(dims(x)) != len(dims(y)):
        raise Opaque(f"'{x.name}' and '{y.name}' differ in rank")
    return (lambda array: array), (lambda array: array)


def structural(moves: Callable[[ir.Value, ir.Value, ir.Node], Moves] = _same) -> Rule:
    """y = f(x), f moves or averages elements with weights of sum 1: any gauge, re-indexed."""

    def relations(node: ir.Node) -> Relations:
        x, y = _data(node, 0), node.outputs[0]
        tie = _tie(x, y, moves(x, y, node))
        return Relations(scales=(tie,), origins=(tie,))

    return Rule(relations)


def monotone(moves: Callable[[ir.Value, ir.Value, ir.Node], Moves] = _same) -> Rule:
    """max(s x + t) = s max(x) + t for s >= 0: no negative scale, any shift."""

    def relations(node: ir.Node) -> Relations:
        x, y = _data(node, 0), node.outputs[0]
        tie = _tie(x, y, moves(x, y, node))
        return Relations((tie,), (tie,), (), (_not_negative(x, node), _not_negative(y, node)))

    return Rule(relations)


def summing(moves: Callable[[ir.Value, ir.Value, ir.Node], Moves] = _same) -> Rule:
    """y = A x, A without channels: any scale, no shift."""

    def relations(node: ir.Node) -> Relations:
        x, y = _data(node, 0), node.outputs[0]
        sentence = f"{label(node)} passes no shift"
        demands = (_no_shift(x, sentence), _no_shift(y, sentence))
        return Relations((_tie(x, y, moves(x, y, node)),), (), (), demands)

    return Rule(relations)


def homogeneous(function: Callable[[ir.Node, Array], Array]) -> Rule:
    """f(s x) = s f(x) for s > 0: the same positive scale on both sides, no shift.

    A known constant k passes as f(k).
    """

    def relations(node: ir.Node) -> Relations:
        x, y = _data(node, 0), node.outputs[0]
        scale = _tie(x, y, _same(x, y, node))
        origin = Tie(
            x,
            y,
            lambda array, _s: canonical(function(node, array)),
            lambda array, _s: np.full_like(array, np.nan),
        )
        sentence = f"{label(node)} passes no shift"
        demands = (
            _positive(x, node),
            _positive(y, node),
            _no_shift(x, sentence, known_constants=True),
            _no_shift(y, sentence, known_constants=True),
        )
        return Relations((scale,), (origin,), (), demands)

    return Rule(relations)


def _leaky(node: ir.Node, x: Array) -> Array:
    return np.where(x < 0, _float(node, "alpha", 0.01) * x, x)


def _prelu(node: ir.Node, x: Array) -> Array:
    return np.where(x < 0, _weights(node, 1) * x, x)


def _prelu_rule() -> Rule:
    rule = homogeneous(_prelu)

    def relations(node: ir.Node) -> Relations:
        _weights(node, 1)  # a computed slope is opaque
        return rule.relations(node)

    return Rule(relations)


# --- how layout operators move an array ----------------------------------------------------------


def _reshaped(x: ir.Value, y: ir.Value, _node: ir.Node) -> Moves:
    before, after = dims(x), dims(y)
    return (
        lambda array: layout.reshape(array, before, after),
        lambda array: layout.reshape(array, after, before),
    )


def _transposed(x: ir.Value, _y: ir.Value, node: ir.Node) -> Moves:
    perm = _ints(node, "perm") or list(range(len(dims(x))))[::-1]
    back = layout.inverse(perm)
    return (
        lambda array: layout.transpose(array, perm),
        lambda array: layout.transpose(array, back),
    )


def _pooled(x: ir.Value, y: ir.Value, node: ir.Node) -> Moves:
    """Windows over the axes from 2 on; the gauge must be constant along them."""
    _same(x, y, node)
    axes = range(2, len(dims(x)))
    return (
        lambda array: layout.constant_along(array, axes),
        lambda array: layout.constant_along(array, axes),
    )


def _resized(x: ir.Value, y: ir.Value, node: ir.Node) -> Moves:
    if _string(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise Opaque("it fills with a constant outside the image")
    before, after = dims(x), dims(y)
    if len(before) != len(after) or not isinstance(before[1], int) or before[1] != after[1]:
        raise Opaque("its channels may be resized")
    return _pooled(x, y, node)


def _average_pooled(x: ir.Value, y: ir.Value, node: ir.Node) -> Moves:
    counted = _int(node, "count_include_pad", 0)
    ceil = _int(node, "ceil_mode", 0)
    if counted and (ceil or any(_ints(node, "pads") or ()) or _auto_padded(node)):
        raise Opaque("it counts padded zeros")
    return _pooled(x, y, node)


def _reduced(x: ir.Value, y: ir.Value, node: ir.Node) -> Moves:
    rank = len(dims(x))
    axes = _indices(node, 1, "axes")
    if not axes:
        if _int(node, "noop_with_empty_axes", 0):
            return _same(x, y, node)
        axes = list(range(rank))
    axes = [axis % rank for axis in axes]
    kept = [axis for axis in range(rank) if axis not in axes]
    if _int(node, "keepdims", 1):
        return (
            lambda array: layout.constant_along(array, axes),
            lambda array: layout.constant_along(array, axes),
        )

    def ahead(array: Array) -> Array | None:
        inner = layout.constant_along(array, axes)
        return None if inner is None else inner.reshape([inner.shape[axis] for axis in kept])

    def back(array: Array) -> Array:
        shape = [1] * rank
        for position, axis in enumerate(kept):
            shape[axis] = array.shape[position]
        return array.reshape(shape)

    return ahead, back


def _expanded(x: ir.Value, y: ir.Value, _node: ir.Node) -> Moves:
    before, after = dims(x), dims(y)
    return (
        lambda array: layout.broadcast(array, len(after)),
        lambda array: layout.unbroadcast(array, before),
    )


def _sliced(x: ir.Value, _y: ir.Value, node: ir.Node) -> Moves:
    rank = len(dims(x))
    starts, ends = _indices(node, 1, "starts"), _indices(node, 2, "ends")
    if starts is None or ends is None:
        raise Opaque("its bounds are not known")
    axes = [a % rank for a in _indices(node, 3, "axes") or range(len(starts))]
    steps = _indices(node, 4, "steps") or [1] * len(starts)
    before = dims(x)
    cuts = [
        (axis, _clamped(start, stop, step))
        for axis, start, stop, step in zip(axes, starts, ends, steps, strict=True)
    ]

    def ahead(array: Array) -> Array | None:
        for axis, cut in cuts:
            array = layout.take(array, cut, axis)
        return array

    def back(array: Array) -> Array | None:
        result: Array | None = array
        for axis, cut in cuts:
            if result is not None:
                result = _put_along(result, cut, axis, before[axis])
        return result

    return ahead, back


def _clamped(start: int, stop: int, step: int) -> slice:
    """ONNX bounds as a Python slice: a stop far below 0 means "past the first element"."""
    if step < 0 and stop < -(2**30):
        return slice(start, None, step)
    return slice(start, stop, step)


def _put_along(array: Array, index: slice | Sequence[int], axis: int, size: Dim) -> Array | None:
    """`layout.put`, but an axis of unknown extent is fine where the array is constant along it."""
    if not isinstance(size, int):
        return array if array.shape[axis] == 1 else None
    return layout.put(array, index, axis, size)


def _gathered(x: ir.Value, _y: ir.Value, node: ir.Node) -> Moves:
    before = dims(x)
    axis = _int(node, "axis", 0) % len(before)
    held = constant(_data(node, 1))
    if held is None:
        raise Opaque("its indices are computed")
    index = [int(i) for i in held.array.reshape(-1)]
    shape = held.array.shape

    def ahead(array: Array) -> Array | None:
        if array.shape[axis] == 1:
            inner = [1] * len(shape)
        else:
            array = np.take(array, index, axis=axis)
            inner = list(shape)
        return canonical(array.reshape(*array.shape[:axis], *inner, *array.shape[axis + 1 :]))

    def back(array: Array) -> Array | None:
        inner = array.shape[axis : axis + len(shape)]
        full = (
            np.broadcast_to(array, (*array.shape[:axis], *shape, *array.shape[axis + len(shape) :]))
            if inner
            else array
        )
        flat = full.reshape(*array.shape[:axis], len(index), *array.shape[axis + len(shape) :])
        return _put_along(flat, index, axis, before[axis])

    return ahead, back


def _depth_to_space(x: ir.Value, y: ir.Value, node: ir.Node) -> Moves:
    _same(x, y, node)
    block, mode = _int(node, "blocksize", 1), _string(node, "mode", "DCR")
    return (
        lambda array: layout.depth_to_space(array, block, mode),
        lambda array: layout.space_to_depth(array, block, mode),
    )


def _space_to_depth(x: ir.Value, y: ir.Value, node: ir.Node) -> Moves:
    ahead, back = _depth_to_space(x, y, node)
    return back, ahead  # SpaceToDepth orders its output as DepthToSpace in DCR mode reads it


def _padded(x: ir.Value, y: ir.Value, node: ir.Node) -> Moves:
    _same(x, y, node)
    pads = _indices(node, 1, "pads") or _indices(node, 1, "paddings")
    if pads is None or (len(node.inputs) > 3 and node.inputs[3] is not None):
        raise Opaque("its pads are not known")
    rank = len(dims(x))
    touched = [axis for axis in range(rank) if pads[axis] or pads[axis + rank]]
    return (
        lambda array: layout.constant_along(array, touched),
        lambda array: layout.constant_along(array, touched),
    )


def _pad_rule() -> Rule:
    """Reflected and repeated borders are structural; zeros pass any scale and no shift."""
    copies, zeros = structural(_padded), summing(_padded)

    def relations(node: ir.Node) -> Relations:
        if _string(node, "mode", "constant") != "constant":
            return copies.relations(node)
        value = _float(node, "value", 0.0)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            value = float(_weights(node, 2).reshape(-1)[0])
        if value != 0:
            raise Opaque("it pads with a number that is not 0")
        return zeros.relations(node)

    return Rule(relations)


def _cast_rule() -> Rule:
    rule = structural()

    def relations(node: ir.Node) -> Relations:
        if _data(node, 0).dtype not in FLOATS or node.outputs[0].dtype not in FLOATS:
            raise Opaque("it is not a cast between floating types")
        return rule.relations(node)

    return Rule(relations)


def _dropout_rule() -> Rule:
    rule = structural()

    def relations(node: ir.Node) -> Relations:
        mode = node.inputs[2] if len(node.inputs) > 2 else None
        if mode is not None:
            held = constant(mode)
            if held is None or bool(np.any(held.array)):
                raise Opaque("it runs in training mode")
        return rule.relations(node)

    return Rule(relations)


# --- several values ------------------------------------------------------------------------------


def _operand(value: ir.Value, result: ir.Value) -> Moves:
    """An operand against the result it broadcasts to."""
    rank, shape = len(dims(result)), dims(value)
    return (
        lambda array: layout.broadcast(array, rank),
        lambda array: layout.unbroadcast(array, shape),
    )


def _sum_relations(node: ir.Node, terms: Sequence[tuple[ir.Value, int]]) -> Relations:
    """E(x + y) = s (x - a) + s (y - b): one scale for all, the origins add up."""
    y = node.outputs[0]
    moves = [(value, sign, _operand(value, y)) for value, sign in terms]
    total = Sum(y, tuple(Term(value, sign, lift, lower) for value, sign, (lift, lower) in moves))
    return Relations(tuple(_tie(value, y, m) for value, _, m in moves), (), (total,), ())


def _add_rule(sign: int) -> Rule:
    """Add (sign 1) and Sub (sign -1): of two data values, or of one and a constant."""

    def relations(node: ir.Node) -> Relations:
        a, b = _data(node, 0), _data(node, 1)
        held = _one_constant(node)
        if held is not None:
            slot, _ = held
            x, y = _data(node, 1 - slot), node.outputs[0]
            tie = _tie(x, y, _operand(x, y))
            return Relations((tie,), (), (), (_written(x, node), _written(y, node)))
        if a is b:
            raise Opaque("it reads one value twice")
        return _sum_relations(node, [(a, 1), (b, sign)])

    def rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
        held = _one_constant(node)
        if held is None:
            return {}
        slot, c = held
        y = gauges(node.outputs[0])
        x = gauges(_data(node, 1 - slot))
        rank = y.scale.ndim
        offset, origin = layout.broadcast(c.array, rank), layout.broadcast(x.origin, rank)
        # y = x + c, x - c, or c - x
        value = {(0, 1): 1, (1, 1): 1, (1, -1): -1, (0, -1): 1}[slot, sign]
        data = -1 if (slot, sign) == (0, -1) else 1
        regular = y.scale * (value * offset + data * origin - y.origin)
        new = np.where(y.scale == 0, y.origin - data * origin, regular)
        return {slot: value * new}

    return Rule(relations, rewrite, lambda node: _constant_slots(node))


def _one_constant(node: ir.Node) -> tuple[int, Constant] | None:
    """The operand of a two-operand node that is constant, if exactly one is."""
    held = [constant(value) for value in node.inputs[:2]]
    found = [(slot, c) for slot, c in enumerate(held) if c is not None]
    if len(found) != 1:
        return None
    slot, c = found[0]
    if c.array.ndim > len(dims(node.outputs[0])):
        raise Opaque("its constant has a higher rank than the data")
    return slot, c


def _constant_slots(node: ir.Node) -> tuple[int, ...]:
    held = _one_constant(node)
    return () if held is None else (held[0],)


def _sum_n(node: ir.Node) -> Relations:
    values = [value for value in node.inputs if value is not None]
    if len(set(values)) != len(values) or any(constant(value) is not None for value in values):
        raise Opaque("it reads a constant, or one value twice")
    return _sum_relations(node, [(value, 1) for value in values])


def _factor_rule(*, divide: bool) -> Rule:
    """y = m x, channel by channel: any scales on both sides; origin_y = m origin_x."""

    def factor(node: ir.Node) -> tuple[int, Array]:
        held = _one_constant(node)
        if held is None or (divide and held[0] == 0):
            raise Opaque("it multiplies two computed values")
        slot, c = held
        if divide and not np.all(c.array):
            raise Opaque("it divides by 0")
        return slot, 1 / c.array if divide else c.array

    def relations(node: ir.Node) -> Relations:
        slot, m = factor(node)
        x, y = _data(node, 1 - slot), node.outputs[0]
        _same(x, y, node)
        m = layout.broadcast(m, len(dims(y)))

        def back(origin: Array, _scales: Scales) -> Array | None:
            if np.any((m == 0) & ~np.isnan(origin) & (origin != 0)):
                return None
            with np.errstate(divide="ignore", invalid="ignore"):
                return canonical(np.where(m == 0, np.nan, origin / m))

        tie = Tie(x, y, lambda origin, _s: canonical(m * origin), back, elementwise=True)
        demands = tuple(d(v, node) for v in (x, y) for d in (_readable, _written))
        return Relations((), (tie,), (), demands)

    def rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
        slot, m = factor(node)
        x, y = gauges(_data(node, 1 - slot)), gauges(node.outputs[0])
        new = y.scale * layout.broadcast(m, y.scale.ndim) * x.read_scale
        return {slot: 1 / new if divide else new}

    return Rule(relations, rewrite, lambda node: _constant_slots(node))


def _concat(node: ir.Node) -> Relations:
    """Each branch has its slice of the result's gauge."""
    y = node.outputs[0]
    axis = _int(node, "axis", 1) % len(dims(y))
    total = dims(y)[axis]
    ties, at = [], 0
    for value in node.inputs:
        assert value is not None
        size = dims(value)[axis]
        if not isinstance(size, int) or not isinstance(total, int):
            raise Opaque(f"the extent of '{value.name}' along axis {axis} is not known")
        cut = slice(at, at + size)
        ties.append(
            _tie(
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


def _split(node: ir.Node) -> Relations:
    x = _data(node, 0)
    axis = _int(node, "axis", 0) % len(dims(x))
    total = dims(x)[axis]
    ties, at = [], 0
    for y in node.outputs:
        size = dims(y)[axis]
        if not isinstance(size, int) or not isinstance(total, int):
            raise Opaque(f"the extent of '{y.name}' along axis {axis} is not known")
        cut = slice(at, at + size)
        ties.append(
            _tie(
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


# --- linear: absorbs on both sides ---------------------------------------------------------------


def _auto_padded(node: ir.Node) -> bool:
    return _string(node, "auto_pad", "NOTSET").startswith("SAME")


def _pads_with_zeros(node: ir.Node, kernel: Sequence[int]) -> bool:
    if _auto_padded(node):
        return any(size != 1 for size in kernel)
    return _string(node, "auto_pad", "NOTSET") != "VALID" and any(_ints(node, "pads") or ())


def _linear_relations(
    node: ir.Node, x: ir.Value, y: ir.Value, axis: int, *, no_shift: str | None = None
) -> Relations:
    """y = W x + b: no tie at all; W~ = scale_y W / scale_x takes every gauge along the channels."""
    demands = [
        *_only_along(x, axis, node),
        *_only_along(y, axis, node),
        _readable(x, node),
        _written(y, node),
    ]
    if no_shift is not None:
        demands.append(_no_shift(x, f"{label(node)} {no_shift}, which a shift would change"))
    return Relations(demands=tuple(demands))


def _bias(node: ir.Node, slot: int, size: int) -> Array:
    if slot < len(node.inputs) and node.inputs[slot] is not None:
        return _weights(node, slot)
    return np.zeros(size)


def _shifted(bias: Array, scale: Array, origin: Array) -> Array:
    """scale (bias - origin), and the constant itself where one is to be written."""
    return np.where(scale == 0, origin, scale * (bias - origin))


def _conv_rule(*, transposed: bool) -> Rule:
    """Conv, weights (g O/g) I/g k..., and ConvTranspose, weights (g I/g) O/g k...; 1-D to 3-D."""

    def relations(node: ir.Node) -> Relations:
        kernel = _weights(node, 1).shape[2:]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            _weights(node, 2)
        no_shift = None
        if transposed:
            no_shift = "sees fewer elements at the border"
        elif _pads_with_zeros(node, kernel):
            no_shift = "pads with zeros"
        return _linear_relations(node, _data(node, 0), node.outputs[0], 1, no_shift=no_shift)

    def rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
        weight, groups = _weights(node, 1), _int(node, "group", 1)
        kernel = weight.shape[2:]
        # (group, out, in, kernel...)
        split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        split = np.swapaxes(split, 1, 2) if transposed else split
        outs, ins = groups * split.shape[1], groups * split.shape[2]
        x, y = gauges(_data(node, 0)), gauges(node.outputs[0])
        ones = (1,) * len(kernel)
        scale = along(y.scale, 1, outs)
        read = along(x.read_scale, 1, ins).reshape(groups, 1, -1, *ones)
        shift = along(x.origin, 1, ins).reshape(groups, 1, -1, *ones)
        reduced = tuple(range(2, split.ndim))
        bias = _bias(node, 2, outs) + (split * shift).sum(axis=reduced).reshape(outs)
        new = scale.reshape(groups, -1, 1, *ones) * split * read
        new = np.swapaxes(new, 1, 2) if transposed else new
        return {
            1: new.reshape(weight.shape),
            2: _shifted(bias, scale, along(y.origin, 1, outs)),
        }

    return Rule(relations, rewrite, lambda _node: (1, 2))


def _gemm_relations(node: ir.Node) -> Relations:
    _weights(node, 1)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        _weights(node, 2)
        if _float(node, "beta", 1.0) == 0:
            raise Opaque("its beta is 0")
    x, y = _data(node, 0), node.outputs[0]
    in_axis = 0 if _int(node, "transA", 0) else 1
    relations = _linear_relations(node, x, y, 1)
    if in_axis == 1:
        return relations
    here = (*_only_along(x, 0, node), *_only_along(y, 1, node))
    return Relations(demands=(*here, _readable(x, node), _written(y, node)))


def _gemm_rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
    """y = alpha A B + beta C."""
    flip = bool(_int(node, "transB", 0))
    alpha, beta = _float(node, "alpha", 1.0), _float(node, "beta", 1.0)
    weight = _weights(node, 1).T if flip else _weights(node, 1)
    ins, outs = weight.shape
    x, y = gauges(_data(node, 0)), gauges(node.outputs[0])
    scale, origin = along(y.scale, 1, outs), along(y.origin, 1, outs)
    new = along(x.read_scale, 0, ins)[:, None] * weight * scale
    bias = beta * _bias(node, 2, outs) + alpha * (along(x.origin, 0, ins) @ weight)
    has_c = len(node.inputs) > 2 and node.inputs[2] is not None
    return {
        1: new.T if flip else new,
        2: _shifted(bias, scale, origin) / (beta if has_c else 1.0),
    }


def _matmul_operand(node: ir.Node) -> tuple[int, Array]:
    held = _one_constant(node)
    if held is None:
        raise Opaque("it multiplies two computed values")
    slot, c = held
    if c.array.ndim < 2 or len(dims(_data(node, 1 - slot))) < 2:
        raise Opaque("one of its operands is a vector")
    return slot, c.array


def _matmul_relations(node: ir.Node) -> Relations:
    slot, _ = _matmul_operand(node)
    return _linear_relations(node, _data(node, 1 - slot), node.outputs[0], -1 if slot == 1 else -2)


def _matmul_rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
    """y = x W (channels last) or y = W x (channels last but one); operand 2 is the bias it needs."""
    slot, weight = _matmul_operand(node)
    x, y = gauges(_data(node, 1 - slot)), gauges(node.outputs[0])
    weight = weight if slot == 1 else np.swapaxes(weight, -1, -2)
    ins, outs = weight.shape[-2:]
    scale, origin = along(y.scale, -1, outs), along(y.origin, -1, outs)
    new = along(x.read_scale, -1, ins)[:, None] * weight * scale
    bias = _shifted(along(x.origin, -1, ins) @ weight, scale, origin)
    if slot == 1:
        return {1: new, 2: bias}
    return {0: np.swapaxes(new, -1, -2), 2: bias[..., None]}


# --- batch normalization -------------------------------------------------------------------------


def normalization_map(node: ir.Node) -> ChannelAffine:
    """The affine map of an inference BatchNormalization, along axis 1 of its input.

    Raises Opaque where it has none (training mode, computed statistics), and InputError where its
    statistics are not numbers that can be normalised by: a negative variance, NaN, infinity.
    """
    if _int(node, "training_mode", 0) or any(_used(output) for output in node.outputs[1:]):
        raise Opaque("it runs in training mode: its statistics are those of each batch")
    if _int(node, "is_test", 1) == 0 or _int(node, "spatial", 1) == 0:
        raise Opaque("an old opset's training or per-element mode")
    rank = len(dims(_data(node, 0)))
    if rank < 2:
        raise Opaque("its input has no channel axis")
    gamma, beta, mean, var = (_weights(node, slot) for slot in (1, 2, 3, 4))
    eps = _float(node, "epsilon", 1e-5)
    spread = np.asarray(var + eps)
    for what, numbers, bad in (
        ("gamma", gamma, ~np.isfinite(gamma)),
        ("beta", beta, ~np.isfinite(beta)),
        ("running_mean", mean, ~np.isfinite(mean)),
        ("running_var + eps", spread, ~np.isfinite(spread) | (spread <= 0)),
    ):
        if np.any(bad):
            channel = int(np.flatnonzero(bad)[0])
            raise InputError(
                f"{label(node)} ({name_of(node)}): {what} is {numbers[channel]:g} in channel"
                f" {channel} ({int(bad.sum())} of {bad.size} channels are like that). The network"
                " cannot run with these statistics; re-estimate them, or retrain."
            )
    scale = gamma / np.sqrt(spread)
    shape = (1, -1) + (1,) * (rank - 2)
    return ChannelAffine(scale.reshape(shape), (beta - scale * mean).reshape(shape))


def _used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def name_of(node: ir.Node) -> str:
    """The name of a batch norm as its author knows it: the module's path if there is one."""
    held = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    source = held.root.name if held is not None else None
    if source and source.endswith(".running_mean"):
        return source.removesuffix(".running_mean")
    return node.name or node.outputs[0].name or "BatchNormalization"


def _normalization_relations(node: ir.Node) -> Relations:
    normalization_map(node)
    x, y = _data(node, 0), node.outputs[0]
    return _linear_relations(node, x, y, 1)


def _normalization_rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
    """A batch norm that stays: gamma~ = scale_y gamma / scale_x around a moved mean."""
    gamma, beta, mean = (_weights(node, slot) for slot in (1, 2, 3))
    x, y = gauges(_data(node, 0)), gauges(node.outputs[0])
    size = gamma.size
    scale, read = along(y.scale, 1, size), along(x.read_scale, 1, size)
    origin = along(x.origin, 1, size)
    known = read == 0
    normalization = normalization_map(node)
    at_origin = normalization.scale.reshape(-1) * origin + normalization.shift.reshape(-1)
    forward_scale = np.where(known, 1.0, along(x.scale, 1, size))
    return {
        1: scale * gamma * read,
        2: _shifted(np.where(known, at_origin, beta), scale, along(y.origin, 1, size)),
        3: np.where(known, mean, forward_scale * (mean - origin)),
    }


def bypass(node: ir.Node) -> Relations:
    """A batch norm y = s x + t that goes: its two sides become one tensor, x~ = y~.

    scale_x = s * scale_y, and origins move as points do: origin_y = s * origin_x + t. Where s = 0
    the output is t whatever comes in: either x~ is written as that constant (scale_x = 0), or the
    readers of y know it (scale_y = inf).
    """
    x, y = _data(node, 0), node.outputs[0]
    m = normalization_map(node)
    s, t = m.scale, m.shift

    def scale_ahead(scale: Array, _scales: Scales) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            ahead = scale / s
        return np.where(np.isinf(ahead), np.inf, np.where((s == 0) & (scale == 0), np.nan, ahead))

    def scale_back(scale: Array, scales: Scales) -> Array:
        with np.errstate(invalid="ignore"):
            back = s * scale
        # s = 0: x keeps its own scale under a known constant, and stays written if it was
        return np.where((s == 0) & ~((scales(x) == 0) & np.isfinite(scale)), np.nan, back)

    def origin_ahead(origin: Array, scales: Scales) -> Array:
        written_x, written_y = scales(x) == 0, scales(y) == 0
        point = np.where(s == 0, t + 0 * np.where(np.isnan(origin), 0, origin), s * origin + t)
        through = np.where(written_x & written_y & (s != 0), origin, point)
        return np.where(written_x & (s == 0), np.nan, through)

    def origin_back(origin: Array, scales: Scales) -> Array:
        scale_x, scale_y = scales(x), scales(y)
        with np.errstate(divide="ignore", invalid="ignore"):
            point = (origin - t) / s
            constant_value = np.where(scale_y == 0, origin, scale_y * (t - origin))
        regular = np.where((scale_x == 0) & (scale_y == 0), origin, point)
        return np.where(s != 0, regular, np.where(scale_x == 0, constant_value, np.nan))

    scale_tie = Tie(x, y, scale_ahead, scale_back, elementwise=True)
    origin_tie = Tie(x, y, origin_ahead, origin_back, elementwise=True)
    return Relations((scale_tie,), (origin_tie,))


def constants_of_bypass(
    node: ir.Node, scales: Scales, origins: Callable[[ir.Value], Array]
) -> dict[ir.Value, Array]:
    """Where a batch norm that goes has gamma = 0: the constant to write at x, or to know at y."""
    x, y = _data(node, 0), node.outputs[0]
    m = normalization_map(node)
    if np.all(m.scale != 0):
        return {}
    written = (m.scale == 0) & (scales(x) == 0)
    known = (m.scale == 0) & np.isinf(scales(y))
    with np.errstate(invalid="ignore"):
        constant_x = np.where(scales(y) == 0, origins(y), scales(y) * (m.shift - origins(y)))
    return {
        x: np.where(written & ~known, constant_x, np.nan),
        y: np.where(known, m.shift, np.nan),
    }


# --- the table -----------------------------------------------------------------------------------

RULES: dict[str, Rule] = {
    # linear: absorbs any gauge
    "Conv": _conv_rule(transposed=False),
    "ConvTranspose": _conv_rule(transposed=True),
    "Gemm": Rule(_gemm_relations, _gemm_rewrite, lambda _node: (1, 2)),
    "MatMul": Rule(_matmul_relations, _matmul_rewrite, lambda n: (_matmul_operand(n)[0],)),
    # diagonal: absorbs channel by channel
    "BatchNormalization": Rule(
        _normalization_relations, _normalization_rewrite, lambda _node: (1, 2, 3)
    ),
    "Add": _add_rule(1),
    "Sub": _add_rule(-1),
    "Mul": _factor_rule(divide=False),
    "Div": _factor_rule(divide=True),
    # homogeneous: one positive scale, no shift
    "Relu": homogeneous(lambda _node, x: np.maximum(x, 0)),
    "LeakyRelu": homogeneous(_leaky),
    "PRelu": _prelu_rule(),
    "Abs": homogeneous(lambda _node, x: np.abs(x)),
    # monotone: one scale that is not negative, any shift
    "MaxPool": monotone(_pooled),
    "GlobalMaxPool": monotone(_pooled),
    "ReduceMax": monotone(_reduced),
    "ReduceMin": monotone(_reduced),
    # averaging: any gauge
    "AveragePool": structural(_average_pooled),
    "GlobalAveragePool": structural(_pooled),
    "ReduceMean": structural(_reduced),
    "Resize": structural(_resized),
    "Upsample": structural(_resized),
    # additive: any scale, no shift
    "ReduceSum": summing(_reduced),
    # structural: the gauge re-indexed
    "Identity": structural(),
    "Dropout": _dropout_rule(),
    "Cast": _cast_rule(),
    "Reshape": structural(_reshaped),
    "Flatten": structural(_reshaped),
    "Squeeze": structural(_reshaped),
    "Unsqueeze": structural(_reshaped),
    "Transpose": structural(_transposed),
    "Expand": structural(_expanded),
    "Slice": structural(_sliced),
    "Gather": structural(_gathered),
    "DepthToSpace": structural(_depth_to_space),
    "SpaceToDepth": structural(_space_to_depth),
    "Pad": _pad_rule(),
    # several values
    "Sum": Rule(_sum_n),
    "Concat": Rule(_concat),
    "Split": Rule(_split),
    # no element is looked at
    "Shape": Rule(_free),
    "Size": Rule(_free),
}


def relations_of(node: ir.Node) -> Relations:
    """What this node asks of the gauges around it. Raises InputError for impossible statistics."""
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is None:
        return opaque(node)
    try:
        return rule.relations(node)
    except Opaque as why:
        return opaque(node, str(why))
