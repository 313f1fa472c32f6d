"""Run a node on random values and its counterpart on what belongs to them.

For the operators without constants to check: Relu, pools, sums, reshapes. Both sides are evaluated
in float64, so the only tolerance is that of one node's arithmetic, and where constants were
written, of their rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx

from bnfold.proof.exact.counterpart import (
    EXACT,
    Carried,
    Match,
    Rounding,
    View,
    attributes,
    rests,
)
from bnfold.proof.exact.reference import NoReferenceError
from bnfold.proof.exact.shapes import Shapes

Array = np.ndarray[Any, np.dtype[Any]]

FLOAT_TYPES = (
    onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
)  # fmt: skip
EVALUATION = 2.0**-44  # of the magnitude: one node in float64
ROUNDINGS = 4  # of written constants that may add up in one value
MANY_ELEMENTS = 1 << 18  # beyond this one draw instead of two

POINTWISE = frozenset(
    ("Relu", "LeakyRelu", "PRelu", "Abs", "Neg", "Identity", "Dropout", "Add", "Sub", "Mul",
     "Div", "Max", "Min", "Sum", "Mean", "Clip", "Where", "Sign", "Cast", "Concat", "Elu",
     "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "BatchNormalization")
)  # fmt: skip
POOLS = frozenset(("MaxPool", "AveragePool", "LpPool"))
GLOBAL_POOLS = frozenset(("GlobalAveragePool", "GlobalMaxPool"))


class Sides(Protocol):
    """The two graphs, how the folded one names and carries values, and concrete shapes."""

    original: View
    folded: View
    shapes: Shapes

    def rename(self, name: str) -> str:
        """The value's name in the folded graph."""

    def gauge(self, name: str) -> Carried:
        """How the folded graph carries the value."""


def probe(sides: Sides, found: Match, *, rounding: Rounding) -> tuple[float, str]:
    """(worst deviation over what was allowed, "" or what is wrong).

    rounding: of the constants that the fold wrote here, EXACT for none. Raises NoReferenceError
    where a side cannot be run.
    """
    shapes = _shapes(sides, found)
    rng = np.random.default_rng(len(found.sources) + 7)
    many = sum(math.prod(shape) for shape in shapes.values()) > MANY_ELEMENTS
    worst = 0.0
    for _ in range(1 if many else 2):
        x, carried = _draw(sides, found, shapes, rng)
        y = _run(found.original, sides.original, x)
        z = _run(found.folded, sides.folded, carried)
        size = _run(found.original, sides.original, _absolute(x), absolute=True)
        written: dict[str, Array] = {}
        if rounding is not EXACT:
            written = _run(found.folded, sides.folded, _absolute(carried), absolute=True)
        for name in found.outputs:
            there = sides.rename(name)
            problem, excess = _compare(
                sides.gauge(name), y[name], z.get(there), size[name], written.get(there), rounding
            )
            worst = max(worst, excess)
            if problem:
                return worst, problem
    return worst, ""


def _shapes(sides: Sides, found: Match) -> dict[str, tuple[int, ...]]:
    """A concrete shape for every source; small where the operator does not look at the size."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in found.sources:
        known, integer = sides.shapes.of(name), sides.shapes.integer(name)
        shape = known.shape if known else None
        if integer is not None:
            shape = integer.shape
        if shape is None:
            shape = _guess(sides, found, name)
        if shape is None:
            raise NoReferenceError(
                f"the shape of '{name}' is not known; give the shape of the model's inputs"
            )
        shapes[name] = shape
    return _reduced(sides, found, shapes)


def _guess(sides: Sides, found: Match, name: str) -> tuple[int, ...] | None:
    """Without an inferred shape: from the gauges around a pointwise node."""
    if any(node.op_type not in POINTWISE | POOLS | GLOBAL_POOLS for node in found.original):
        return None
    arrays = [
        array
        for value in (name, *found.outputs)
        for array in (sides.gauge(value).scale, sides.gauge(value).origin)
        if array.ndim
    ]
    if not arrays or any(node.op_type == "Concat" for node in found.original):
        return None
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    small = 2 if all(node.op_type in POINTWISE for node in found.original) else 16
    return tuple(size if size > 1 else small for size in shape)


def _reduced(sides: Sides, found: Match, shapes: dict[str, tuple[int, ...]]
             ) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """The same shapes with the axes cut down that neither the operator nor a gauge looks at."""
    nodes = (*found.original, *found.folded)
    small = POINTWISE | POOLS | GLOBAL_POOLS | {"Transpose"}
    ranks = {len(shape) for shape in shapes.values()}
    if len(ranks) != 1 or any(node.op_type not in small for node in nodes):
        return shapes
    rank = ranks.pop()
    needs = _needs(found, rank)
    if needs is None:
        return shapes
    fixed = _fixed_axes(sides, found, rank)
    return {
        name: tuple(
            size if axis in fixed else _smaller(size, *needs[axis])
            for axis, size in enumerate(shape)
        )
        for name, shape in shapes.items()
    }


def _smaller(size: int, least: int, stride: int) -> int:
    """At least `least`, at most `size`, and with the remainder that `size` leaves over stride."""
    return min(size, least + (size - least) % stride)


def _needs(found: Match, rank: int) -> list[tuple[int, int]] | None:
    """Per axis: the least size that shows every border case, and the stride."""
    needs = [(2, 1)] * rank
    windowed = [n for n in found.original if n.op_type in POOLS | GLOBAL_POOLS | {"Transpose"}]
    if len(windowed) > 1 or (windowed and len(found.original) > 1):
        return None
    for node in windowed:
        given = attributes(node)
        for axis in range(2, rank):
            if node.op_type in POOLS:
                kernel = given["kernel_shape"][axis - 2]
                stride = (given.get("strides") or [1] * rank)[axis - 2]
                dilation = (given.get("dilations") or [1] * rank)[axis - 2]
                needs[axis] = ((kernel - 1) * dilation + 1 + 2 * stride, stride)
            elif node.op_type in GLOBAL_POOLS:
                needs[axis] = (3, 1)
    return needs


def _fixed_axes(sides: Sides, found: Match, rank: int) -> set[int]:
    """Axes along which a gauge or a constant varies, or on which the operator acts."""
    fixed: set[int] = set()

    def keep(shape: Sequence[int], order: Sequence[int] | None = None) -> None:
        for axis, size in enumerate(shape):
            if size > 1:
                place = axis + rank - len(shape)
                fixed.add(order[place] if order else place)

    order = None
    for view, nodes in ((sides.original, found.original), (sides.folded, found.folded)):
        for node in nodes:
            given = attributes(node)
            if node.op_type == "Transpose":
                order = list(given.get("perm") or range(rank)[::-1])
            if node.op_type == "Concat":
                fixed.add(given["axis"] % rank)
            if node.op_type == "BatchNormalization":
                fixed.add(1)
                continue
            for name in node.input:
                if name and view.is_constant(name):
                    keep(view.constant(name).value.shape)
    for name in (*found.sources, *found.outputs):
        gauge = sides.gauge(name)
        for array in (gauge.scale, gauge.origin):
            keep(array.shape, order if name in found.outputs else None)
    return fixed


def _draw(sides: Sides, found: Match, shapes: Mapping[str, tuple[int, ...]],
          rng: np.random.Generator) -> tuple[dict[str, Array], dict[str, Array]]:  # fmt: skip
    """Random x by name in the original, and the x~ that belong to them by name in the folded.

    Half of the elements are drawn around zero of x~ and half around zero of x, in two sizes, so
    that both sides of a kink are met. Values that are one tensor in the folded graph agree.
    """
    originals: dict[str, Array] = {}
    carried: dict[str, Array] = {}
    for name in found.sources:
        there, gauge = sides.rename(name), sides.gauge(name)
        discrete = _draw_discrete(sides, found, name, shapes[name], rng)
        if discrete is not None:
            if not gauge.is_identity:
                raise NoReferenceError(f"'{name}' has a gauge, but it is no float")
            originals[name] = carried[there] = discrete
            continue
        free = rng.standard_normal(shapes[name]) * rng.choice([1.0, 8.0], shapes[name])
        if gauge.is_identity and _rows_sum_to_one(sides.original, name, free.ndim):
            weights = np.exp(free - free.max(axis=-1, keepdims=True))
            originals[name] = carried[there] = weights / weights.sum(axis=-1, keepdims=True)
            continue
        finite = np.isfinite(gauge.scale) & (gauge.scale != 0)
        scale = np.where(finite, gauge.scale, 1.0)
        if there in carried:
            x = gauge.origin + carried[there] / scale
        else:
            centre = rng.random(shapes[name]) < 0.5
            x = np.where(centre, free, gauge.origin + free / scale)
            z = np.where(finite, scale * (x - gauge.origin), free)
            carried[there] = np.where(gauge.scale == 0, gauge.origin, z)
        originals[name] = np.where(
            finite, x, np.where(gauge.scale == 0, rng.standard_normal(x.shape), gauge.origin)
        )
    return originals, carried


def _rows_sum_to_one(view: View, name: str, rank: int) -> bool:
    """True for what a Softmax over the last axis gives, which is no arbitrary number."""
    node = view.producers.get(name)
    while node is not None and not node.domain and _hands_on(node, view):
        node = view.producers.get(node.input[0])
    if node is None or node.op_type != "Softmax" or node.domain or not rank:
        return False
    default = -1 if view.opsets.get("", 1) >= 13 else 1
    return int(attributes(node).get("axis", default)) % rank == rank - 1


def _hands_on(node: onnx.NodeProto, view: View) -> bool:
    return node.op_type == "Identity" or (node.op_type == "Dropout" and rests(node, view))


def _draw_discrete(sides: Sides, found: Match, name: str, shape: tuple[int, ...],
                   rng: np.random.Generator) -> Array | None:  # fmt: skip
    """None for a float; integers and booleans: what the shapes fix, every row of a constant table
    that is indexed, else 0 and 1.
    """
    fixed, known = sides.shapes.integer(name), sides.shapes.of(name)
    if fixed is not None:
        return fixed
    if known is None or not known.elem_type or known.elem_type in FLOAT_TYPES:
        return None
    dtype = onnx.helper.tensor_dtype_to_np_dtype(known.elem_type)
    for node in found.original:
        table = node.input[0] if node.op_type == "Gather" else ""
        if table and sides.original.is_constant(table) and node.input[1] == name and shape:
            axis = int(attributes(node).get("axis", 0))
            rows = sides.original.constant(table).value.shape[axis]
            return np.arange(rows, dtype=dtype).reshape((1,) * (len(shape) - 1) + (rows,))
    return rng.integers(0, 2, shape).astype(dtype)


def _absolute(values: Mapping[str, Array]) -> dict[str, Array]:
    return {
        name: np.abs(value) if value.dtype.kind == "f" else value for name, value in values.items()
    }


def _run(nodes: Sequence[onnx.NodeProto], view: View, values: Mapping[str, Array],
         absolute: bool = False) -> dict[str, Array]:  # fmt: skip
    """All values that the nodes compute in float64, the given ones included.

    absolute: with the magnitudes of all constants and Sub as Add, which bounds what the sums
    inside add up for the operators that are monotone.
    """
    known: dict[str, Array] = dict(values)
    for node in nodes:
        if absolute:
            results = view.evaluate(_additive(node), known, alter=_magnitude)
        else:
            results = view.evaluate(node, known)
        known.update(zip(node.output, results, strict=False))
    return known


def _magnitude(value: Array) -> Array:
    return np.abs(value) if value.dtype.kind == "f" else value


def _additive(node: onnx.NodeProto) -> onnx.NodeProto:
    if node.op_type != "Sub":
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.op_type = "Add"
    return copy


def _compare(
    gauge: Carried,
    y: Array,
    z: Array | None,
    size: Array,
    written: Array | None,
    rounding: Rounding,
) -> tuple[str, float]:
    """("" or what is wrong, the worst deviation over what was allowed)."""
    if z is None:
        if not np.all(np.isinf(gauge.scale)):
            return "the folded graph does not compute it.", math.inf
        z = np.zeros(y.shape)
    if y.shape != z.shape:
        return f"the shape is {z.shape} and should be {y.shape}.", math.inf
    if y.dtype.kind != "f":
        same = np.array_equal(y, z)
        return ("" if same else "the values are not the same."), 0.0 if same else math.inf
    scale = np.broadcast_to(gauge.scale, y.shape)
    free, known = scale == 0, np.isinf(scale)
    finite = np.where(free | known, 1.0, scale)
    wanted = np.where(free, gauge.origin, finite * (y - gauge.origin))
    bound = np.abs(y) + np.abs(gauge.origin) + _finite(size)
    allowed = EVALUATION * (np.abs(finite) * bound + np.abs(z))
    if written is not None:
        rounded = np.abs(z) + _finite(written)
        allowed = allowed + ROUNDINGS * (rounding.unit * rounded + rounding.tiny)
    excess = np.where(known, np.abs(y - gauge.origin), np.abs(z - wanted))
    excess = np.where((z == wanted) & ~known, 0.0, excess)
    wrong = ~(excess <= allowed)
    with np.errstate(all="ignore"):
        worst = float(
            np.max(np.nan_to_num(np.where(wrong, excess / allowed, 0.0), nan=np.inf), initial=0.0)
        )
    if not wrong.any():
        if y.size and not np.isfinite(y).any():
            return "nothing but NaN and infinity came out.", math.inf
        return "", worst
    at = tuple(np.argwhere(wrong)[0])
    place = ", ".join(str(int(index)) for index in at)
    return (
        f"element ({place}) is {z[at]:.9g} in the folded graph and should be {wanted[at]:.9g} "
        f"({int(wrong.sum())} of {wrong.size} wrong).",
        worst,
    )


def _finite(size: Array) -> Array:
    """A magnitude, 0 where it overflowed: it must not grant everything."""
    return np.where(np.isfinite(size), np.abs(size), 0.0)
