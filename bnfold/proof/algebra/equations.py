"""What a linear node or a per-channel map must look like after a fold, and whether it does.

Reads Conv, ConvTranspose, Gemm and MatMul with a constant as y = W x + b, and normalizations and
arithmetic with constants as y = a x + b per channel, from the operators' specification; and holds
the written constants against the exact ones in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from bnfold.proof.exact.counterpart import (
    EXACT,
    Carried,
    Constant,
    Rounding,
    View,
    attributes,
    coarsest,
)
from bnfold.proof.exact.reference import window_pads

Array = np.ndarray[Any, np.dtype[Any]]

ARITHMETIC = 2.0**-40  # of the accumulated magnitude: float64 sums of many terms
SLOPES = 2.0**-44  # of a slope: a few operations in float64
ONE_ROUNDING = 1 + 1e-6  # the recomputation may sit on the other side of a tie
PIECE = 1 << 16  # weights that are compared at a time

# ------------------------------------------------------------------------- reading linear nodes


@dataclass(frozen=True, eq=False)
class Linear:
    """y = W x + b with W seen as (groups, outputs per group, inputs per group, taps), float64.

    settings: what both sides must have in common (kind, groups, strides, pads, ...).
    axis: the channel axis of x and y, counted from the front (>= 0) or from the back.
    rank: of x and y, None where the operator takes any.
    blind: zeros enter the sums beside x (padding), or the borders see fewer taps.
    weight = factor * what is stored, rounded as `rounding`. biases: (values, rounding) each.
    weight_size, bias_size: the magnitudes that were added up, where several things were.
    """

    source: str
    settings: tuple[Any, ...]
    axis: int
    rank: int | None
    blind: bool
    weight: Array
    factor: float
    rounding: Rounding
    biases: tuple[tuple[Array, Rounding], ...]
    weight_size: Array | None = None
    bias_size: Array | None = None

    @property
    def shape_in(self) -> tuple[int, int]:
        """(groups, inputs per group)."""
        return (self.weight.shape[0], self.weight.shape[2])

    @property
    def shape_out(self) -> tuple[int, int]:
        """(groups, outputs per group)."""
        return (self.weight.shape[0], self.weight.shape[1])

    @property
    def bias(self) -> Array:
        """(groups, outputs per group): the sum of all biases."""
        total = np.zeros(self.shape_out)
        for values, _ in self.biases:
            total = total + values.reshape(self.shape_out)
        return total


def read_linear(nodes: Sequence[onnx.NodeProto], view: View) -> Linear | None:
    """A linear node with the additions of constants behind it, or None for anything else."""
    if not nodes or nodes[0].op_type not in _LINEAR_READERS or nodes[0].domain:
        return None
    linear = _LINEAR_READERS[nodes[0].op_type](nodes[0], view)
    previous = nodes[0]
    for node in nodes[1:]:
        if linear is None:
            return None
        linear = _with_addition(linear, node, previous.output[0], view)
        previous = node
    return linear


def _with_addition(linear: Linear, node: onnx.NodeProto, value: str, view: View
                   ) -> Linear | None:  # fmt: skip
    if node.op_type not in ("Add", "Sub") or node.domain or list(node.input).count(value) != 1:
        return None
    index = list(node.input).index(value)
    other = node.input[1 - index]
    if not view.is_constant(other) or (node.op_type == "Sub" and index == 1):
        return None
    constant = view.constant(other)
    values = per_channel(constant.value, linear.axis, math.prod(linear.shape_out), linear.rank)
    if values is None:
        return None
    signed = -values if node.op_type == "Sub" else values
    biases = (*linear.biases, (signed, constant.rounding))
    return dataclasses.replace(linear, biases=biases)


def per_channel(values: Array, axis: int, size: int, rank: int | None) -> Array | None:
    """A constant that is added to a value of `rank`, as one number per channel, or None."""
    if axis >= 0:
        if rank is None or values.ndim > rank:
            return None
        values = values.reshape((1,) * (rank - values.ndim) + values.shape)
    elif values.ndim < -axis:
        values = values.reshape((1,) * (-axis - values.ndim) + values.shape)
    along = axis % values.ndim
    if any(extent != 1 for place, extent in enumerate(values.shape) if place != along):
        return None
    flat = values.reshape(-1)
    return np.broadcast_to(flat, (size,)) if flat.size in (1, size) else None


def _float_constant(view: View, name: str) -> Constant | None:
    if not name or not view.is_constant(name):
        return None
    constant = view.constant(name)
    return constant if constant.value.dtype.kind == "f" else None


def _optional_bias(node: onnx.NodeProto, index: int, view: View
                   ) -> tuple[tuple[Array, Rounding], ...] | None:  # fmt: skip
    """() where the node has no such input, None where it is no constant."""
    if len(node.input) <= index or not node.input[index]:
        return ()
    constant = _float_constant(view, node.input[index])
    return None if constant is None else ((constant.value.reshape(-1), constant.rounding),)


def _read_conv(node: onnx.NodeProto, view: View) -> Linear | None:
    weight = _float_constant(view, node.input[1])
    biases = _optional_bias(node, 2, view)
    if weight is None or biases is None or view.is_constant(node.input[0]):
        return None
    given = attributes(node)
    kernel = weight.value.shape[2:]
    strides = tuple(given.get("strides") or (1,) * len(kernel))
    dilations = tuple(given.get("dilations") or (1,) * len(kernel))
    auto_pad = (given.get("auto_pad") or b"NOTSET").decode()
    group = int(given.get("group", 1))
    if auto_pad in ("NOTSET", "VALID"):
        pads: Any = window_pads((), kernel, strides, dilations, given.get("pads"), auto_pad)
        blind = any(extent > 0 for pair in pads for extent in pair)
    else:
        pads = auto_pad
        blind = any(extent > 1 for extent in kernel)
    shape = weight.value.shape
    taps = weight.value.reshape(group, shape[0] // group, shape[1], -1)
    settings = ("Conv", group, kernel, strides, dilations, pads)
    return Linear(node.input[0], settings, 1, len(shape), blind, taps, 1.0, weight.rounding, biases)


def _read_conv_transpose(node: onnx.NodeProto, view: View) -> Linear | None:
    weight = _float_constant(view, node.input[1])
    biases = _optional_bias(node, 2, view)
    if weight is None or biases is None or view.is_constant(node.input[0]):
        return None
    given = attributes(node)
    shape = weight.value.shape
    rank = len(shape) - 2
    group = int(given.get("group", 1))
    taps = weight.value.reshape(group, shape[0] // group, shape[1], -1).swapaxes(1, 2)
    settings = (
        "ConvTranspose", group, shape[2:],
        tuple(given.get("strides") or (1,) * rank),
        tuple(given.get("dilations") or (1,) * rank),
        tuple(given.get("pads") or (0,) * 2 * rank),
        tuple(given.get("output_padding") or (0,) * rank),
        tuple(given.get("output_shape") or ()),
        given.get("auto_pad") or b"NOTSET",
    )  # fmt: skip
    return Linear(node.input[0], settings, 1, len(shape), True, taps, 1.0, weight.rounding, biases)


def _read_gemm(node: onnx.NodeProto, view: View) -> Linear | None:
    given = attributes(node)
    weight = _float_constant(view, node.input[1])
    if weight is None or given.get("transA") or view.is_constant(node.input[0]):
        return None
    alpha, beta = float(given.get("alpha", 1.0)), float(given.get("beta", 1.0))
    matrix = weight.value if given.get("transB") else weight.value.T
    biases: tuple[tuple[Array, Rounding], ...] = ()
    if len(node.input) > 2 and node.input[2]:
        constant = _float_constant(view, node.input[2])
        values = None if constant is None else per_channel(constant.value, -1, len(matrix), None)
        if constant is None or values is None:
            return None
        biases = ((beta * values, constant.rounding),)
    return Linear(node.input[0], ("product",), -1, None, False, alpha * matrix[None, :, :, None],
                   alpha, weight.rounding, biases)  # fmt: skip


def _read_matmul(node: onnx.NodeProto, view: View) -> Linear | None:
    left, right = node.input[0], node.input[1]
    if view.is_constant(right) and not view.is_constant(left):
        weight, source, axis, kind = _float_constant(view, right), left, -1, "product"
    elif view.is_constant(left) and not view.is_constant(right):
        weight, source, axis, kind = _float_constant(view, left), right, -2, "left product"
    else:
        return None
    if weight is None or weight.value.ndim != 2:
        return None
    matrix = weight.value.T if axis == -1 else weight.value
    return Linear(source, (kind,), axis, None, False, matrix[None, :, :, None], 1.0,
                   weight.rounding, ())  # fmt: skip


def read_padded(nodes: Sequence[onnx.NodeProto], view: View) -> tuple[Linear, Constant] | None:
    """A Conv that does not pad behind a Pad of its spatial axes with one number, and the number.

    The Conv is given as one that pads by itself.
    """
    if len(nodes) < 2 or nodes[0].op_type != "Pad" or nodes[0].domain or len(nodes[0].input) != 3:
        return None
    given, (source, counts, number) = attributes(nodes[0]), nodes[0].input
    linear = read_linear(nodes[1:], view)
    if linear is None or linear.source != nodes[0].output[0] or linear.settings[0] != "Conv":
        return None
    if (given.get("mode") or b"constant") != b"constant" or not view.is_constant(counts):
        return None
    value = _float_constant(view, number)
    pads = view.constant(counts).value.reshape(2, -1).T
    if value is None or value.value.size != 1 or linear.blind or pads[:2].any() or (pads < 0).any():
        return None
    by_axis = tuple((int(before), int(after)) for before, after in pads[2:])
    settings = (*linear.settings[:-1], by_axis)
    return dataclasses.replace(linear, source=source, settings=settings), value


def wrong_padding(number: Constant, inputs: Carried) -> str:
    """Empty where the number is what zero has become in every channel, else the sentence."""
    live = np.isfinite(inputs.scale) & (inputs.scale != 0)
    if not live.all():
        return "a channel of its input is a constant, which a Pad does not know."
    got, expected = float(number.value.reshape(-1)[0]), -inputs.scale * inputs.origin
    room = number.rounding.unit * ONE_ROUNDING * np.abs(expected) + number.rounding.tiny
    wrong = ~(np.abs(expected - got) <= room)
    if not wrong.any():
        return ""
    return f"it pads with {got:.9g}, and zero has become {expected[wrong][0]:.9g}."


RECURRENT = ("RNN", "GRU", "LSTM")


def read_recurrent(node: onnx.NodeProto, view: View) -> Linear | None:
    """W x + Wb, what the gates of RNN, GRU or LSTM see of the input, for all directions at once.

    The recurrent half of the biases is among the settings, which both sides must have in common.
    """
    weight = _float_constant(view, node.input[1])
    given = _optional_bias(node, 3, view)
    if weight is None or given is None or view.is_constant(node.input[0]):
        return None
    directions, rows, ins = weight.value.shape
    halves = given[0][0].reshape(directions, 2, rows) if given else np.zeros((directions, 2, rows))
    bias = (halves[:, 0].reshape(-1), given[0][1] if given else EXACT)
    taps = weight.value.reshape(1, directions * rows, ins, 1)
    settings = (node.op_type, directions, (halves[:, 1] + 0.0).tobytes())
    return Linear(node.input[0], settings, 2, 3, False, taps, 1.0, weight.rounding, (bias,))


_LINEAR_READERS = {
    "Conv": _read_conv,
    "ConvTranspose": _read_conv_transpose,
    "Gemm": _read_gemm,
    "MatMul": _read_matmul,
}


def channels(gauge: Carried, axis: int, shape: tuple[int, int]) -> Carried | None:
    """The gauge as (groups, channels per group) arrays; None if it varies along another axis."""
    parts = []
    for values in (gauge.scale, gauge.origin):
        flat = values.reshape(1) if values.ndim == 0 else None
        if flat is None:
            if values.ndim <= (axis if axis >= 0 else -axis - 1):
                return None
            flat = per_channel(values, axis, math.prod(shape), values.ndim)
        if flat is None:
            return None
        parts.append(np.broadcast_to(flat, (math.prod(shape),)).reshape(shape))
    return Carried(parts[0], parts[1])


# ----------------------------------------------------------------------- comparing linear nodes


def compare_linear(
    mine: Linear, theirs: Linear, inputs: Carried, outputs: Carried
) -> tuple[float, str]:
    """Are W~ = scale_y W / scale_x and b~ = scale_y (b + W origin_x - origin_y), rounded once?

    inputs, outputs: gauges as (groups, channels per group) arrays (`channels`).
    Returns the worst deviation in units of the rounding, and "" or what is wrong.
    """
    live = np.isfinite(outputs.scale) & (outputs.scale != 0)
    known = np.isinf(outputs.scale)
    readable = np.isfinite(inputs.scale) & (inputs.scale != 0)
    problem = _linear_premises(mine, inputs, readable, known, live)
    if problem:
        return 0.0, problem
    ulps, problem = compare_weights(mine, theirs, inputs, outputs)
    if problem:
        return ulps, problem
    return ulps, _compare_bias(mine, theirs, inputs, outputs, live, known)


def shifted_border(mine: Linear, inputs: Carried) -> bool:
    """True where a shift of the input changes what the border sees: a number for each place."""
    return mine.blind and bool(np.any((inputs.origin != 0) & (inputs.scale != 0)))


def _linear_premises(mine: Linear, inputs: Carried, readable: Array, known: Array, live: Array
                     ) -> str:  # fmt: skip
    """What must hold of the original's weights for the gauges around it to make sense."""
    if readable.all() and not inputs.origin.any() and not known.any():
        return ""
    reads = (mine.weight != 0).any(axis=3) & (live | known)[:, :, None]
    lost = reads & (inputs.scale == 0)[:, None, :]
    if lost.any():
        group, _, channel = np.argwhere(lost)[0]
        return (
            f"it reads input channel {group * inputs.scale.shape[1] + channel}, of which the "
            f"folded graph keeps only a constant."
        )
    shifted = reads & ((inputs.origin != 0) & (inputs.scale != 0))[:, None, :]
    if mine.blind and shifted.any():
        group, _, channel = np.argwhere(shifted)[0]
        return (
            f"input channel {group * inputs.scale.shape[1] + channel} is carried with a shift, but "
            f"zero padding or fewer taps at the border do not shift with it."
        )
    varying = reads & readable[:, None, :] & known[:, :, None]
    if varying.any():
        group, row, _ = np.argwhere(varying)[0]
        return f"output channel {group * known.shape[1] + row} is said to be constant; it is not."
    return ""


def compare_weights(
    mine: Linear, theirs: Linear, inputs: Carried, outputs: Carried
) -> tuple[float, str]:
    """The weights' half of `compare_linear`, in pieces that stay in the processor's cache."""
    live = np.isfinite(outputs.scale) & (outputs.scale != 0)
    readable = np.isfinite(inputs.scale) & (inputs.scale != 0)
    checked = ~np.isinf(outputs.scale)  # a known constant is not read, so any weights will do
    factor = np.where(live, outputs.scale, 0.0)
    divisor = np.where(readable, inputs.scale, 1.0)
    rounding = min(mine.rounding, theirs.rounding)
    tiny = max(rounding.tiny * abs(theirs.factor), np.finfo(np.float64).tiny)
    worst, count, where = 0.0, 0, (0, 0, 0, 0)
    step = max(1, PIECE // max(1, mine.weight[:, :1].size))
    for first in range(0, mine.weight.shape[1], step):
        rows = slice(first, first + step)
        expected = mine.weight[:, rows] * factor[:, rows, None, None]
        if (divisor != 1).any() or not readable.all():
            expected /= divisor[:, None, :, None]
            expected *= readable[:, None, :, None]
        excess = np.abs(theirs.weight[:, rows] - expected)
        room = np.abs(expected) * (rounding.unit * ONE_ROUNDING) + tiny
        if mine.weight_size is not None:
            room += ARITHMETIC * mine.weight_size[:, rows] * np.abs(factor[:, rows, None, None])
        excess /= room
        excess[~checked[:, rows]] = 0.0
        wrong = ~(excess <= 1)
        count += int(np.count_nonzero(wrong))
        peak = int(np.argmax(_ranked(excess)))
        if not excess.flat[peak] <= worst:
            worst = float(_ranked(excess.flat[peak]))
            at = [int(index) for index in np.unravel_index(peak, excess.shape)]
            where = (at[0], first + at[1], at[2], at[3])
    if not count:
        return worst, ""
    group, row, column, _ = where
    got = theirs.weight[where]
    scale = factor[group, row] / divisor[group, column] * readable[group, column]
    return worst, (
        f"{count} of {mine.weight.size} weights are not the rounding of the exact ones, the worst "
        f"at output channel {group * mine.weight.shape[1] + row}, input channel "
        f"{group * mine.weight.shape[2] + column}: {got:.9g} for {mine.weight[where] * scale:.9g}."
    )


def _ranked(values: Array) -> Array:
    return np.nan_to_num(values, nan=np.inf)


def _compare_bias(mine: Linear, theirs: Linear, inputs: Carried, outputs: Carried,
                  live: Array, known: Array) -> str:  # fmt: skip
    seen = np.where(inputs.scale == 0, 0.0, inputs.origin)
    shift = np.zeros(live.shape)
    size = np.abs(mine.bias) if mine.bias_size is None else mine.bias_size
    if seen.any():
        shift = np.einsum("gmct,gc->gm", mine.weight, seen)
        size = size + np.einsum("gmct,gc->gm", np.abs(mine.weight), np.abs(seen))
    value = mine.bias + shift
    size = size + np.abs(outputs.origin)
    scale = np.where(live, outputs.scale, 1.0)
    expected = np.where(live, scale * (value - outputs.origin), outputs.origin)
    allowed = ARITHMETIC * np.where(live, np.abs(scale) * size, np.abs(outputs.origin))
    for values, rounding in theirs.biases:
        finest = min(rounding, mine.rounding)
        allowed = allowed + finest.unit * np.abs(values.reshape(live.shape)) + finest.tiny
    excess = np.abs(theirs.bias - expected)
    wrong = ~(excess <= allowed) & ~known
    if wrong.any():
        at = np.unravel_index(int(np.argmax(np.where(wrong, _ranked(excess), -1.0))), wrong.shape)
        return (
            f"the bias of output channel {at[0] * live.shape[1] + at[1]} is "
            f"{theirs.bias[at]:.9g} and should be {expected[at]:.9g}."
        )
    moves = ~(np.abs(value - outputs.origin) <= ARITHMETIC * size) & known
    if moves.any():
        at = tuple(np.argwhere(moves)[0])
        return (
            f"output channel {at[0] * live.shape[1] + at[1]} is said to be the constant "
            f"{outputs.origin[at]:.9g}; it is {value[at]:.9g}."
        )
    return ""


# --------------------------------------------------------------------------- per-channel maps


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """y = slope * x + shift, arrays that broadcast against the value.

    slope_roundings: how many roundings of written constants the slope carries. shift_roundings: the
    same for the shift, times the size of the rounded terms. rounding: that of the constants. tiny:
    what the slope moves by where a constant moves by 1, for constants too small to be normal.
    """

    slope: Array
    shift: Array
    slope_roundings: float
    shift_roundings: Array
    size: Array
    rounding: Rounding
    tiny: Array


_ONE, _ZERO = np.ones(()), np.zeros(())


def read_map(
    nodes: Sequence[onnx.NodeProto], view: View, source: str, rank: int | None
) -> ChannelMap | None:
    """A chain of normalizations and arithmetic with constants as one map, or None."""
    total = ChannelMap(_ONE, _ZERO, 0, _ZERO, _ZERO, EXACT, _ZERO)
    value = source
    for node in nodes:
        if list(node.input).count(value) != 1 or node.domain:
            return None
        step = _read_step(node, view, value, rank)
        if step is None:
            return None
        scale = np.abs(step.slope)
        total = ChannelMap(
            step.slope * total.slope,
            step.slope * total.shift + step.shift,
            step.slope_roundings + total.slope_roundings,
            scale * (total.shift_roundings + step.slope_roundings * np.abs(total.shift))
            + step.shift_roundings,
            scale * total.size + step.size,
            coarsest((total.rounding, step.rounding)),
            scale * total.tiny + step.tiny * np.abs(total.slope),
        )
        value = node.output[0]
    return total


def _read_step(node: onnx.NodeProto, view: View, value: str, rank: int | None) -> ChannelMap | None:
    if node.op_type == "BatchNormalization":
        return _read_normalization(node, view, value, rank)
    if node.op_type == "Identity":
        return ChannelMap(_ONE, _ZERO, 0, _ZERO, _ZERO, EXACT, _ZERO)
    if node.op_type == "Neg":
        return ChannelMap(-_ONE, _ZERO, 0, _ZERO, _ZERO, EXACT, _ZERO)
    if node.op_type not in ("Add", "Sub", "Mul", "Div"):
        return None
    index = list(node.input).index(value)
    constant = _float_constant(view, node.input[1 - index])
    if constant is None or (node.op_type == "Div" and index == 1):
        return None
    c = constant.value
    if node.op_type == "Mul":
        return ChannelMap(c, _ZERO, 1, _ZERO, _ZERO, constant.rounding, _ONE)
    if node.op_type == "Div":
        with np.errstate(divide="ignore"):
            return ChannelMap(1 / c, _ZERO, 1, _ZERO, _ZERO, constant.rounding, _ZERO)
    size = np.abs(c)
    slope = -_ONE if node.op_type == "Sub" and index == 1 else _ONE
    shift = -c if node.op_type == "Sub" and index == 0 else c
    return ChannelMap(slope, shift, 0, size, size, constant.rounding, _ZERO)


def _read_normalization(
    node: onnx.NodeProto, view: View, value: str, rank: int | None
) -> ChannelMap | None:
    """gamma (x - mean) / sqrt(var + eps) + beta with stored statistics, else None."""
    given = attributes(node)
    spatial = given.get("spatial", 1) or view.opsets.get("", 1) >= 9
    if _in_training(node, view) or not spatial or rank is None or rank < 2:
        return None
    constants = [_float_constant(view, name) for name in node.input[1:5]]
    if any(constant is None for constant in constants) or node.input[0] != value:
        return None
    parameters = [constant for constant in constants if constant is not None]
    gamma, beta, mean, var = (
        constant.value.reshape(-1, *(1,) * (rank - 2)) for constant in parameters
    )
    slope = gamma / np.sqrt(var + _epsilon(given))
    centred = np.abs(slope * mean)
    return ChannelMap(
        slope,
        beta - slope * mean,
        1.5,  # gamma's, and half of the variance's under the root
        np.abs(beta) + 2.5 * centred,
        np.abs(beta) + centred,
        coarsest(constant.rounding for constant in parameters),
        1 / np.sqrt(var + _epsilon(given)),
    )


def _epsilon(given: Mapping[str, Any]) -> float:
    """As a file holds it, in float32, where it is not written too."""
    return float(np.float32(given.get("epsilon", 1e-5)))


def _in_training(node: onnx.NodeProto, view: View) -> bool:
    """Said by is_test up to opset 6, by a second output up to 13, by training_mode since."""
    given, opset = attributes(node), view.opsets.get("", 1)
    if opset >= 14:
        return bool(given.get("training_mode"))
    return any(node.output[1:]) if opset >= 7 else not given.get("is_test")


def compare_maps(mine: ChannelMap, theirs: ChannelMap, inputs: Carried, outputs: Carried
                  ) -> tuple[float, str]:  # fmt: skip
    """(worst deviation in roundings, "" or what is wrong) for y = a x + b read and written.

    With both scales finite: a~ = scale_y a / scale_x, b~ = scale_y (a origin_x + b - origin_y).
    """
    a, b, a2, b2, sx, ox, sy, oy = np.broadcast_arrays(
        mine.slope, mine.shift, theirs.slope, theirs.shift, inputs.scale, inputs.origin,
        outputs.scale, outputs.origin,
    )  # fmt: skip
    x_free, x_known, y_free, y_known = sx == 0, np.isinf(sx), sy == 0, np.isinf(sy)
    varies = ~x_free & ~x_known
    live = ~y_free & ~y_known
    rounding = theirs.rounding if mine.rounding is EXACT else min(mine.rounding, theirs.rounding)
    unit = rounding.unit * ONE_ROUNDING
    with np.errstate(all="ignore"):
        slope = np.where(live & varies, sy * a / sx, 0.0)
        value = np.where(x_free, b, a * ox + b)
        wanted = np.where(live, sy * (value - oy), oy)
        found = np.where(x_free, a2 * ox + b2, b2)
        size = np.abs(a * ox) + mine.size + np.abs(oy)
        reach = np.where(live, np.abs(sy) * size, np.abs(oy))
        turned = theirs.slope_roundings * unit
        small = rounding.tiny * theirs.tiny
        slopes = np.abs(a2 - slope) / ((turned + SLOPES) * np.abs(slope) + small)
        terms = unit * theirs.shift_roundings + turned * np.abs(a2 * np.where(x_free, ox, 0.0))
        shifts = np.abs(found - wanted) / (terms + rounding.tiny + small + ARITHMETIC * reach)
        checks = {
            "its factor": np.where((a2 == slope) | x_free | y_known, 0.0, slopes),
            "its shift": np.where((found == wanted) | y_known, 0.0, shifts),
        }
        lost = (a != 0) & ((x_free & ~y_free) | (varies & y_known))
        moved = y_known & ~(np.abs(value - oy) <= ARITHMETIC * size)
    worst = max(float(np.max(_ranked(excess), initial=0.0)) for excess in checks.values())
    ulps = 0.0 if theirs.rounding is EXACT else worst
    if lost.any() or moved.any():
        return ulps, (
            f"channel {_channel(lost | moved, sx.shape)} is said to be constant; it is not."
        )
    for what, excess in checks.items():
        wrong = ~(excess <= 1)
        if wrong.any():
            got, should = (a2, slope) if what == "its factor" else (found, wanted)
            at = tuple(np.argwhere(wrong)[0])
            return ulps, (
                f"{what} of channel {_channel(wrong, sx.shape)} is {got[at]:.9g} in the folded "
                f"graph and should be {should[at]:.9g} ({int(wrong.sum())} of {wrong.size} wrong)."
            )
    return ulps, ""


def _channel(wrong: Array, shape: tuple[int, ...]) -> str:
    """The first wrong position, along the axes on which the map varies."""
    at = np.argwhere(wrong)[0] if wrong.ndim else ()
    varying = [str(i) for i, size in zip(at, shape, strict=True) if size > 1]
    return ", ".join(varying) or "0"
