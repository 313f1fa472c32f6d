"""A sum of parallel branches in the original, where the folded graph has one convolution.

The original's sum is read back, from the specification of its operators, to the one tensor that
all of it is made of, as the convolution that it is: tap by tap, each at its offset from the output
element, each output channel with its input channels. The folded convolution is then held against
that one as against any other: every weight the rounding of the exact one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from bnfold.proof.algebra.equations import Linear, channels, per_channel, read_linear, read_map
from bnfold.proof.exact.counterpart import EXACT, Carried, Rounding, View, rests

Array = np.ndarray[Any, np.dtype[Any]]

SUMS = {"Add": (1.0, 1.0), "Sub": (1.0, -1.0), "Sum": ()}


def is_sum(node: onnx.NodeProto, view: View) -> bool:
    """Add, Sub or Sum of computed values."""
    known = any(view.is_constant(name) for name in node.input)
    return node.op_type in SUMS and not node.domain and not known


class NotParallel(Exception):  # noqa: N818  an outcome of the reading, not a failure of ours
    """The sum is no convolution of the tensor; the message is the sentence."""


@dataclass(frozen=True)
class Parallel:
    """A sum as a convolution of the folded tensor.

    sources: the values of the original from which it was read. shifted_border: the tensor is
    carried with a shift, and padded: the bias is that of places far from the border.
    """

    linear: Linear
    sources: tuple[str, ...]
    shifted_border: bool


def read_parallel(
    node: onnx.NodeProto,
    view: View,
    like: Linear,
    carried: Callable[[str], Carried | None],
) -> Parallel:
    """The sum that `node` computes, in the form of the folded convolution `like`.

    carried: how the folded tensor that `like` reads carries a value of the original, None for
    values that it does not carry. Raises NotParallel.
    """
    reading = _Reading(view, like, carried)
    reading.add_sum(node, np.ones(reading.outs), np.zeros(reading.outs))
    total = dataclasses.replace(
        like,
        weight=reading.weight,
        weight_size=reading.weight_size,
        factor=1.0,
        rounding=reading.rounding,
        biases=((reading.bias, EXACT),),
        bias_size=reading.bias_size.reshape(like.shape_out),
    )
    return Parallel(total, tuple(reading.sources), reading.shifted_border)


class _Reading:
    """The kernel and bias that the branches add up to, with the magnitude of what was added."""

    def __init__(self, view: View, like: Linear, carried: Callable[[str], Carried | None]):
        self.view, self.like, self.carried = view, like, carried
        self.outs, self.ins = math.prod(like.shape_out), math.prod(like.shape_in)
        self.weight, self.weight_size = np.zeros(like.weight.shape), np.zeros(like.weight.shape)
        self.bias, self.bias_size = np.zeros(self.outs), np.zeros(self.outs)
        self.rounding: Rounding = like.rounding
        self.sources: dict[str, None] = {}
        self.shifted_border = False
        window = _taps(like)
        if window is None:
            raise NotParallel("the padding of the folded convolution depends on the size.")
        self.reach, strides, self.places = window
        self.strides = strides

    def add_sum(self, node: onnx.NodeProto, slope: Array, shift: Array) -> None:
        """Add slope * (what the node computes) + shift."""
        signs = SUMS[node.op_type] or (1.0,) * len(node.input)
        for index, (name, sign) in enumerate(zip(node.input, signs, strict=True)):
            self.add(name, sign * slope, shift if index == 0 else np.zeros(self.outs))

    def add(self, name: str, slope: Array, shift: Array) -> None:
        """Add slope * (the value) + shift, back to the tensor that the folded side reads."""
        gauge = self.carried(name)
        node = self.view.producers.get(name)
        if gauge is not None:
            self._add_itself(name, gauge, slope, shift)
        elif node is None or node.domain:
            raise NotParallel(f"it also adds '{name}', which is not computed from that tensor.")
        elif is_sum(node, self.view):
            self.add_sum(node, slope, shift)
        elif node.op_type == "Conv":
            self._add_conv(node, slope, shift)
        else:
            self._add_map(node, slope, shift)

    def _add_map(self, node: onnx.NodeProto, slope: Array, shift: Array) -> None:
        """A normalization, arithmetic with a constant, or an operator that changes nothing."""
        sources = self.view.sources(node)
        rank = self.like.rank
        if len(sources) == 1 and node.op_type == "Dropout" and rests(node, self.view):
            self.add(sources[0], slope, shift)
            return
        step = read_map([node], self.view, sources[0], rank) if len(sources) == 1 else None
        numbers = [self._vector(a) for a in (step.slope, step.shift)] if step is not None else []
        if len(numbers) != 2:
            raise NotParallel(f"{node.op_type} '{self.view.label(node)}' stands in between.")
        self.bias_size += np.abs(slope * numbers[1])
        self.add(sources[0], slope * numbers[0], slope * numbers[1] + shift)

    def _vector(self, values: Array) -> Array:
        """Numbers per channel. Raises NotParallel for what varies along another axis."""
        flat = per_channel(values, 1, self.outs, self.like.rank)
        if flat is None:
            raise NotParallel("a map in between is not one of the channels.")
        return np.broadcast_to(flat, (self.outs,))

    # --- the ends of the branches

    def _add_itself(self, name: str, gauge: Carried, slope: Array, shift: Array) -> None:
        """x = x~ / scale + origin, one tap at offset 0 on the diagonal."""
        if self.ins != self.outs or any(s != 1 for s in self.strides):
            raise NotParallel(f"'{name}' does not have the shape of the sum.")
        eye = np.arange(self.outs)
        here = (0,) * len(self.strides)
        self._add_taps(name, gauge, slope[:, None], eye[:, None], eye[:, None], [here], here, False)
        self._add_bias(shift)

    def _add_conv(self, node: onnx.NodeProto, slope: Array, shift: Array) -> None:
        linear = read_linear([node], self.view)
        label = self.view.label(node)
        gauge = self.carried(linear.source) if linear is not None else None
        window = _taps(linear) if linear is not None else None
        if linear is None or gauge is None or window is None:
            raise NotParallel(f"Conv '{label}' is no convolution of that tensor.")
        reach, strides, offsets = window
        if (math.prod(linear.shape_out), math.prod(linear.shape_in)) != (self.outs, self.ins):
            raise NotParallel(f"Conv '{label}' has other channels.")
        if strides != self.strides:
            raise NotParallel(f"Conv '{label}' has other strides.")
        (groups, per_out), per_in = linear.shape_out, linear.shape_in[1]
        rows = np.arange(self.outs).reshape(groups, per_out, 1)
        columns = np.arange(self.ins).reshape(groups, 1, per_in)
        weight = slope.reshape(groups, per_out, 1, 1) * linear.weight
        self.rounding = min(self.rounding, linear.rounding)
        flat = (self.outs, per_in)
        self._add_taps(
            linear.source,
            gauge,
            weight.reshape(*flat, -1),
            np.broadcast_to(rows, (groups, per_out, per_in)).reshape(flat),
            np.broadcast_to(columns, (groups, per_out, per_in)).reshape(flat),
            list(offsets),
            reach,
            linear.blind,
        )
        self._add_bias(slope * linear.bias.reshape(-1) + shift)

    def _add_bias(self, values: Array) -> None:
        self.bias = self.bias + values
        self.bias_size += np.abs(values)

    def _add_taps(self, name: str, gauge: Carried, weight: Array, rows: Array, columns: Array,
                  offsets: list[tuple[int, ...]], reach: tuple[int, ...], blind: bool
                  ) -> None:  # fmt: skip
        """Add weights (output channel, k) or (output channel, k, tap) of the input channels.

        rows, columns: the output and the input channel of each, (output channel, k).
        """
        if reach != self.reach:
            raise NotParallel("a branch has another size than the sum.")
        self.sources[name] = None
        flat = channels(gauge, 1, (1, self.ins))
        if flat is None:
            raise NotParallel(f"'{name}' is carried in another way along other axes.")
        scale, origin = flat.scale[0][columns], flat.origin[0][columns]
        weight = weight.reshape(*columns.shape, len(offsets))
        read = (weight != 0).any(axis=2)
        if (read & (scale == 0)).any():
            raise NotParallel(f"it reads channels of '{name}' that are kept as constants only.")
        self.shifted_border |= blind and bool((read & (origin != 0)).any())
        moved = np.where(read, origin, 0.0) * weight.sum(axis=2)
        size = np.where(read, np.abs(origin), 0.0) * np.abs(weight).sum(axis=2)
        self.bias = self.bias + moved.sum(axis=1)
        self.bias_size += size.sum(axis=1)
        inverse = np.where(scale == 0, 0.0, 1 / np.where(scale == 0, 1.0, scale))
        self._place(weight * inverse[:, :, None], rows, columns, offsets)

    def _place(self, weight: Array, rows: Array, columns: Array, offsets: list[tuple[int, ...]]
               ) -> None:  # fmt: skip
        """Each weight where the folded convolution has this offset and these two channels."""
        per_out, per_in = self.like.shape_out[1], self.like.shape_in[1]
        group, row = np.divmod(rows, per_out)
        column = columns - group * per_in
        held = (column >= 0) & (column < per_in)
        for tap, offset in enumerate(offsets):
            values = weight[:, :, tap]
            place = self.places.get(offset)
            lost = values if place is None else values[~held]
            if lost.any():
                raise NotParallel("the folded convolution does not see what a branch sees.")
            if place is not None:
                at = (group[held], row[held], column[held], place)
                self.weight[at] += values[held]
                self.weight_size[at] += np.abs(values[held])


_Window = tuple[tuple[int, ...], tuple[int, ...], dict[tuple[int, ...], int]]


def _taps(linear: Linear) -> _Window | None:
    """(reach, strides, {offset from the output element's own place: index of the tap}).

    reach: how many elements the output is longer than the input, for stride 1. None where the
    padding depends on the size.
    """
    if linear.settings[0] != "Conv":
        return None
    _, _, kernel, strides, dilations, pads = linear.settings
    if isinstance(pads, str):
        if any(n != 1 for n in (*strides, *dilations)):
            return None
        both = [((n - 1) // 2, n // 2) for n in kernel]
        pads = [pair if pads == "SAME_UPPER" else pair[::-1] for pair in both]
    reach = tuple(
        low + high - dilation * (n - 1)
        for (low, high), dilation, n in zip(pads, dilations, kernel, strict=True)
    )
    offsets = {
        tuple(
            int(i * dilation - low)
            for i, dilation, (low, _) in zip(index, dilations, pads, strict=True)
        ): tap
        for tap, index in enumerate(np.ndindex(*kernel))
    }
    return reach, tuple(strides), offsets
