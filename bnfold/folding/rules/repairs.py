"""Exact repairs: another form of a node, in which a gauge passes that its own form refuses.

- clamp: Relu and Clip are, in the coordinates of any gauge, a clamp between per-channel bounds:
  scale (clip(x) - origin) = clip(x~) between scale (low - origin) and scale (high - origin).
  So Max and Min by constants take the place of the Relu, and shift and sign pass.
- border: a convolution that pads with zeros pads, in the coordinates of a shifted input, with
  another number. What that changes depends on the place alone: a constant map, added behind.

A repair puts operators in the place of a batch norm. It is exact, not always quicker: which ones
may be used is the caller's choice (`docs/decisions/0005`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array, Gauge, canonical
from bnfold.folding.rules.linear import absorbs, conv_barrier, conv_rewrite
from bnfold.folding.rules.moves import same
from bnfold.folding.rules.node import (
    Opaque,
    along,
    dims,
    input_of,
    integer,
    integers,
    opset_of,
    real,
    string,
    weights,
)
from bnfold.folding.rules.relations import (
    Form,
    Gauges,
    Relations,
    Repair,
    Scales,
    Step,
    Tie,
    readable,
)

# --- Relu and Clip as per-channel clamps ----------------------------------------------------------


def clamp(node: ir.Node) -> Repair:
    """Relu or Clip as Max and Min by per-channel constants. Raises Opaque where that cannot be."""
    low, high = _bounds(node)
    x, y = input_of(node, 0), node.outputs[0]
    ahead, back = same(x, y, node)
    if opset_of(node) < (8 if x.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE) else 12):
        raise Opaque("its opset has no Max that broadcasts")

    def origin_ahead(origin: Array, scales: Scales) -> Array | None:
        known = np.isinf(scales(x))
        return ahead(canonical(np.where(known, np.clip(origin, low, high), origin)))

    def origin_back(origin: Array, scales: Scales) -> Array | None:
        return back(canonical(np.where(np.isinf(scales(y)), np.nan, origin)))

    scale = Tie(x, y, lambda array, _s: ahead(array), lambda array, _s: back(array))
    relations = Relations(
        (scale,), (Tie(x, y, origin_ahead, origin_back),), (), (readable(x, node),)
    )

    def form(gauges: Gauges) -> Form | None:
        gauge = gauges(y)
        lower, upper = _carried_bounds(gauge, low, high)
        same_bounds = np.all(lower == low) and np.all(upper == high)
        relu = np.all((gauge.scale > 0) & ((gauge.origin == 0) | np.isinf(gauge.scale)))
        if same_bounds or (relu and node.op_type == "Relu"):
            return None
        steps = (Step("Max", lower), Step("Min", upper))
        return Form(tuple(step for step in steps if np.any(np.isfinite(step.constant))))

    return Repair(relations, form)


def _bounds(node: ir.Node) -> tuple[float, float]:
    if node.op_type == "Relu":
        return 0.0, np.inf
    held = []
    for slot, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        if slot < len(node.inputs) and node.inputs[slot] is not None:
            held.append(float(weights(node, slot).reshape(-1)[0]))
        else:
            held.append(real(node, name, default))
    if held[0] > held[1]:
        raise Opaque("its lower bound lies above its upper one")
    return held[0], held[1]


def _carried_bounds(gauge: Gauge, low: float, high: float) -> tuple[Array, Array]:
    """The two bounds as the folded graph sees them; infinite where there is none."""
    with np.errstate(invalid="ignore"):
        first = gauge.scale * (low - gauge.origin)
        second = gauge.scale * (high - gauge.origin)
    known = np.isinf(gauge.scale)
    lower = np.where(known, -np.inf, np.where(gauge.scale > 0, first, second))
    upper = np.where(known, np.inf, np.where(gauge.scale > 0, second, first))
    return canonical(lower), canonical(upper)


# --- a padded convolution with a map of its border ------------------------------------------------


def border(node: ir.Node) -> Repair:
    """Conv or ConvTranspose with a constant map behind it. Raises Opaque where that cannot be.

    W * (x~ / scale + origin), padded with zeros, is W~ * x~ and W * origin, padded with zeros: the
    second term is one number per channel and place, where the sizes are known.
    """
    transposed = node.op_type == "ConvTranspose"
    x, y = input_of(node, 0), node.outputs[0]
    if conv_barrier(node, transposed=transposed) is None:
        raise Opaque("it has no border that a shift would change")
    inside = _inside(node, transposed)

    def form(gauges: Gauges) -> Form | None:
        gauge_x, gauge_y = gauges(x), gauges(y)
        if not np.any(gauge_x.origin):
            return None
        without = {x: Gauge(gauge_x.scale, 0 * gauge_x.origin)}
        constants = conv_rewrite(node, lambda v: without.get(v) or gauges(v), transposed=transposed)
        seen = _response(node, gauge_x.origin, inside, transposed)
        scale = along(gauge_y.scale, len(seen))
        scale = np.where(np.isinf(scale), 0, scale).reshape(-1, *(1,) * len(inside))
        shift = scale * seen
        if all(extent == 1 for extent in canonical(shift).shape[1:]):  # no map, a bias
            return Form((), {**constants, 2: constants[2] + shift.reshape(len(shift), -1)[:, 0]})
        return Form((Step("Add", shift[None]),), constants)

    return Repair(absorbs(node, (x, 1), (y, 1)), form)


def _response(node: ir.Node, origin: Array, inside: list[Array], transposed: bool) -> Array:
    """What the convolution makes of an input that is `origin` everywhere: (outputs, places...)."""
    weight, groups = weights(node, 1), integer(node, "group", 1)
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    split = np.swapaxes(split, 1, 2) if transposed else split
    ins, kernel = groups * split.shape[2], split.shape[3:]
    origins = along(origin, ins).reshape(groups, -1)
    seen: Array = np.einsum("goit,gi->got", split.reshape(*split.shape[:3], -1), origins)
    seen = seen.reshape(-1, *kernel)
    for taps in inside:  # the first axis of taps goes, its places come last
        seen = np.asarray(np.tensordot(seen, taps, axes=(1, 1)))
    return seen


def _inside(node: ir.Node, transposed: bool) -> list[Array]:
    """For each spatial axis an array (places, taps): 1 where the tap sees an element, else 0."""
    x, y = input_of(node, 0), node.outputs[0]
    kernel = weights(node, 1).shape[2:]
    rank = len(kernel)
    before, after = dims(x)[2:], dims(y)[2:]
    strides = integers(node, "strides") or [1] * rank
    dilations = integers(node, "dilations") or [1] * rank
    found = []
    for axis in range(rank):
        size, places = before[axis], after[axis]
        if not isinstance(size, int) or not isinstance(places, int):
            raise Opaque(f"the size of '{x.name}' is not known, so its border has no fixed place")
        stride, dilation, taps = strides[axis], dilations[axis], np.arange(kernel[axis])
        first = _pads_before(node, axis, size, places, stride, (kernel[axis] - 1) * dilation + 1)
        place = np.arange(places)[:, None]
        if transposed:
            at, rest = np.divmod(place + first - taps * dilation, stride)
            seen = (rest == 0) & (at >= 0) & (at < size)
        else:
            at = place * stride + taps * dilation - first
            seen = (at >= 0) & (at < size)
        found.append(seen.astype(np.float64))
    return found


def _pads_before(node: ir.Node, axis: int, size: int, places: int, stride: int, window: int) -> int:
    """How many elements are padded in front of an axis."""
    mode = string(node, "auto_pad", "NOTSET")
    if mode == "NOTSET":
        if node.attributes.get("output_shape") is not None:
            raise Opaque("its pads follow from its output_shape")
        pads = integers(node, "pads")
        return pads[axis] if pads else 0
    if mode == "VALID":
        return 0
    if node.op_type == "ConvTranspose":
        raise Opaque("its pads follow from its size")
    total = max(0, (places - 1) * stride + window - size)
    return total // 2 if mode == "SAME_UPPER" else total - total // 2


# --- the table ------------------------------------------------------------------------------------

REPAIRS: dict[str, tuple[tuple[str, ...], Callable[[ir.Node], Repair]]] = {
    "clamp": (("Relu", "Clip"), clamp),
    "border": (("Conv", "ConvTranspose"), border),
}


def repair_of(node: ir.Node, allowed: frozenset[str]) -> Repair | None:
    """The repair of a node among those that are allowed, if it has one."""
    if node.domain not in ("", "ai.onnx"):
        return None
    for name, (operators, make) in REPAIRS.items():
        if name in allowed and node.op_type in operators:
            try:
                return make(node)
            except Opaque:
                return None
    return None
