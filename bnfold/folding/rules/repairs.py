"""Exact repairs: another form of a node, in which a gauge passes that its own form refuses.

- clamp: Relu and Clip are, in the coordinates of any gauge, a clamp between per-channel bounds:
  scale (clip(x) - origin) = clip(x~) between scale (low - origin) and scale (high - origin).
  So Max and Min by constants take the place of the Relu, and shift and sign pass.
- border: a convolution that pads with zeros pads, in the coordinates of a shifted input, with
  another number. What that changes depends on the place alone: a constant map, added behind.
- pad: where that other number is the same in every channel, a Pad with it in front of the
  convolution (or the average pooling), which does not pad any more; for any size.

A repair puts operators in the place of a batch norm. It is exact, not always quicker: which ones
may be used is the caller's choice (`docs/decisions/0005`). Two cost nothing, and are always used
(`docs/decisions/0015`): where the bounds are the same in every channel, a Clip between them; and a
Pad in front of the first layer, where a batch norm of the input was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array, Gauge, Mask, canonical
from bnfold.folding.constants import constant
from bnfold.folding.rules.linear import absorbs, conv_barrier, conv_rewrite
from bnfold.folding.rules.moves import pooled, same
from bnfold.folding.rules.node import (
    Opaque,
    along,
    auto_padded,
    dims,
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
from bnfold.folding.rules.passing import carried, connect, is_carried_as
from bnfold.folding.rules.relations import (
    Demand,
    Form,
    Gauges,
    Padding,
    Relations,
    Repair,
    Scales,
    Step,
    Tie,
    positive,
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
        if _takes_numbers(node) and np.all(_one_range(gauge, low, high)):
            return _as_clip(node, [carried(b, gauge) for b in (low, high) if np.isfinite(b)])
        steps = (Step("Max", lower), Step("Min", upper))
        return Form(tuple(step for step in steps if np.any(np.isfinite(step.constant))))

    return Repair(relations, form)


def clip(node: ir.Node) -> Repair:
    """Relu or Clip as a Clip between other numbers. Raises Opaque where that cannot be.

    As quick as the Relu: onnxruntime runs it in one with the convolution ahead, as it does a Relu.
    """
    if not _takes_numbers(node):
        raise Opaque("its opset has no Clip with constants, or it has an infinite one")
    low, high = _bounds(node)
    clamped, x, y = clamp(node), input_of(node, 0), node.outputs[0]
    one_range = Demand(
        y,
        "origin",
        lambda scale, origin: _one_range(Gauge(scale, origin), low, high),
        f"{label(node)} passes no shift",
    )
    asked = (*clamped.relations.demands, positive(x, node), positive(y, node), one_range)
    return Repair(replace(clamped.relations, demands=asked), clamped.form)


def _takes_numbers(node: ir.Node) -> bool:
    """True where a Relu can be a Clip, or the bounds of a Clip can be other numbers."""
    held = [slot for slot in (1, 2) if optional_input(node, slot) is not None]
    finite = np.count_nonzero(np.isfinite(_bounds(node)))
    return opset_of(node) >= _CLIP_WITH_INPUTS and (node.op_type == "Relu" or finite == len(held))


_CLIP_WITH_INPUTS = 11


def _one_range(gauge: Gauge, low: float, high: float) -> Mask:
    """Whether the bounds are the same numbers in all channels, and still the lower and the upper.

    A known constant is between any bounds.
    """
    fits = gauge.scale > 0
    for bound in (low, high):
        if np.isfinite(bound):
            fits = fits & (
                np.isinf(gauge.scale) | is_carried_as(carried(bound, gauge), bound, gauge)
            )
    return fits


def _as_clip(node: ir.Node, bounds: list[float]) -> Form:
    """A Clip in the place of a Relu, or a Clip with other constants in the slots that it has."""
    numbers = [np.asarray(bound) for bound in bounds]
    if node.op_type == "Relu":
        return Form((Step("Clip", numbers[0]),))
    slots = [slot for slot in (1, 2) if optional_input(node, slot) is not None]
    return Form((), dict(zip(slots, numbers, strict=True)))


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


# --- a Pad in front ------------------------------------------------------------------------------


def pad(node: ir.Node) -> Repair:
    """Conv or AveragePool that pads with what zero has become, by a Pad in front of it.

    The number must be the same in every channel. Raises Opaque where that cannot be.
    """
    if opset_of(node) < _PAD_WITH_INPUTS:
        raise Opaque("its opset has no Pad with a constant")
    pooling = node.op_type == "AveragePool"
    if pooling and not (integer(node, "count_include_pad", 0) and _pads_only(node)):
        raise Opaque("it averages no zeros, or counts what lies beyond them")
    x, y = input_of(node, 0), node.outputs[0]
    if not pooling and conv_barrier(node, transposed=False) is None:
        raise Opaque("it has no border that a shift would change")
    before, after = _pads(node)
    sentence = f"{label(node)} pads with zeros, which a shift would change"
    one_number = Demand(x, "origin", _one_number, sentence)
    if pooling:
        tie = connect(x, y, pooled(x, y, node))
        relations = Relations((tie,), (tie,), (), (one_number,))
    else:
        asks = absorbs(node, (x, 1), (y, 1))
        relations = replace(asks, demands=(*asks.demands, one_number))

    def form(gauges: Gauges) -> Form | None:
        gauge = gauges(x)
        number = carried(0.0, gauge)
        if number == 0 or not np.all(_one_number(gauge.scale, gauge.origin)):
            return None
        constants = {} if pooling else conv_rewrite(node, gauges, transposed=False)
        return Form((), constants, Padding(before, after, number))

    return Repair(relations, form)


_PAD_WITH_INPUTS = 11


def _one_number(scale: Array, origin: Array) -> Mask:
    """Whether zero is one number in all channels of the folded graph."""
    gauge = Gauge(scale, origin)
    return is_carried_as(carried(0.0, gauge), 0.0, gauge)


def _pads_only(node: ir.Node) -> bool:
    """True for a pooling that pads, and whose windows end where its pads do."""
    padded = any(integers(node, "pads") or ()) or auto_padded(node)
    return padded and not integer(node, "ceil_mode", 0)


def _pads(node: ir.Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How much a Conv or a pooling pads in front of each axis and behind it."""
    if not auto_padded(node):
        pads = integers(node, "pads") or []
        return tuple(pads[: len(pads) // 2]), tuple(pads[len(pads) // 2 :])
    x, y = input_of(node, 0), node.outputs[0]
    kernel = integers(node, "kernel_shape") or list(weights(node, 1).shape[2:])
    strides = integers(node, "strides") or [1] * len(kernel)
    dilations = integers(node, "dilations") or [1] * len(kernel)
    before, after = [], []
    for axis, (size, places) in enumerate(zip(dims(x)[2:], dims(y)[2:], strict=True)):
        if not isinstance(size, int) or not isinstance(places, int):
            raise Opaque(f"the size of '{x.name}' is not known, and its pads follow from it")
        window = (kernel[axis] - 1) * dilations[axis] + 1
        total = max(0, (places - 1) * strides[axis] + window - size)
        first = _pads_before(node, axis, size, places, strides[axis], window)
        before.append(first)
        after.append(total - first)
    return tuple(before), tuple(after)


def first_pad(node: ir.Node) -> Repair:
    """A Pad in front of a layer that reads the graph's input, through per-channel maps at most.

    There it costs what the batch norm of the input did. Raises Opaque for any other layer.
    """
    value: ir.Value | None = input_of(node, 0)
    while value is not None and not value.is_graph_input():
        producer = value.producer()
        if producer is None or producer.op_type not in _MAPS:
            raise Opaque("it does not read the graph's input")
        value = next((v for v in producer.inputs if constant(v) is None), None)
    return pad(node)


_MAPS = ("BatchNormalization", "Add", "Sub", "Mul", "Div")


# --- the table ------------------------------------------------------------------------------------

Make = Callable[[ir.Node], Repair]
Table = dict[str, tuple[tuple[str, ...], Make]]
# Those that nobody needs to ask for, and those that are asked for; the narrower ones first.
FREE: Table = {
    "clip": (("Relu", "Clip"), clip),
    "first-pad": (("Conv", "AveragePool"), first_pad),
}
REPAIRS: Table = {
    "clamp": (("Relu", "Clip"), clamp),
    "pad": (("Conv", "AveragePool"), pad),
    "border": (("Conv", "ConvTranspose"), border),
}


def repair_of(node: ir.Node, allowed: frozenset[str]) -> Repair | None:
    """The repair of a node among those that are allowed, if it has one.

    Of several it asks what the widest asks, and has the form of the narrowest that will do.
    """
    if node.domain not in ("", "ai.onnx"):
        return None
    found: list[Repair] = []
    for name, (operators, make) in (FREE | REPAIRS).items():
        if name in allowed and node.op_type in operators:
            with contextlib.suppress(Opaque):
                found.append(make(node))
    if len(found) < 2:
        return found[0] if found else None

    def form(gauges: Gauges) -> Form | None:
        forms = (repair.form(gauges) for repair in found)
        return next((form for form in forms if form is not None), None)

    return Repair(found[-1].relations, form)
