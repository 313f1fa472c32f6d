"""Parallel branches that are one convolution: what they ask together, and the new constants.

Where convolutions, per-channel maps and a value itself, all of one tensor x, are added up, the sum
is one convolution of x: a map is a 1x1 kernel on the diagonal, and a small kernel is a large one
with zeros around it. One of the convolutions, the host, takes the others in; its window and its
groups must hold theirs, so the result never costs more than the host did alone.

    r = sum of  scale_i * (W_i * x + b_i) + shift_i
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array, Gauge
from bnfold.folding.rules.linear import conv_rule, shifted
from bnfold.folding.rules.node import (
    along,
    auto_padded,
    dims,
    integer,
    integers,
    string,
    weights,
)
from bnfold.folding.rules.relations import (
    Demand,
    Gauges,
    Relations,
    only_along,
    readable,
    writable,
)

_CONV = conv_rule(transposed=False)


@dataclass(frozen=True, eq=False)
class Branch:
    """scale * conv(source) + shift, or scale * source + shift where there is no convolution.

    scale, shift: numbers per channel of the result, along its axis 1.
    """

    source: ir.Value
    conv: ir.Node | None
    scale: Array
    shift: Array


@dataclass(frozen=True, eq=False)
class Merge:
    """A sum of branches that becomes one convolution.

    root: the node that computes the sum. host: the convolution that stays, under its own name, and
    writes the sum. inner: all nodes between the common tensor and the sum; of them only the host
    stays.
    """

    root: ir.Node
    host: ir.Node
    branches: tuple[Branch, ...]
    inner: frozenset[ir.Node]

    @property
    def result(self) -> ir.Value:
        """The sum."""
        return self.root.outputs[0]

    @property
    def convs(self) -> tuple[ir.Node, ...]:
        """The convolutions that become one."""
        return tuple(branch.conv for branch in self.branches if branch.conv is not None)

    @cached_property
    def asks(self) -> Relations:
        """What the one convolution asks of the gauges around it: it absorbs them."""
        demands = [*only_along(self.result, 1, self.root), writable(self.result, self.root)]
        for branch in self.branches:
            demands += _demands_of(branch, self.root)
        return Relations(demands=tuple(demands))

    def constants(self, gauges: Gauges) -> dict[int, Array]:
        """The host's new weight (slot 1) and bias (slot 2), given the gauges around the sum."""
        kernel = weights(self.host, 1)
        groups, outs = integer(self.host, "group", 1), kernel.shape[0]
        weight = np.zeros((groups, outs // groups, *kernel.shape[1:]))
        bias = np.zeros(outs)
        for branch in self.branches:
            taps, offset = _in_terms_of_what_is_carried(branch, outs, gauges)
            place = _place(branch.conv, self.host)
            assert place is not None  # the host holds every branch
            _add_taps(weight, taps, place)
            bias = bias + offset
        y = gauges(self.result)
        scale = along(y.scale, outs)
        weight = scale.reshape(groups, -1, *(1,) * (kernel.ndim - 1)) * weight
        return {
            1: weight.reshape(kernel.shape),
            2: shifted(bias, scale, along(y.origin, outs)),
        }


def _demands_of(branch: Branch, root: ir.Node) -> list[Demand]:
    if branch.conv is None:
        return [*only_along(branch.source, 1, root), readable(branch.source, root)]
    return [d for d in _CONV.relations(branch.conv).demands if d.value is branch.source]


def _in_terms_of_what_is_carried(branch: Branch, outs: int, gauges: Gauges) -> tuple[Array, Array]:
    """A branch's kernel (groups, out, in, taps...) and bias, as it reads the folded tensor x~."""
    scale, shift = along(branch.scale, outs), along(branch.shift, outs)
    x = gauges(branch.source)
    if branch.conv is None:
        taps = (scale * along(x.read_scale, outs)).reshape(-1, *(1,) * (x.scale.ndim))
        return taps, scale * along(x.origin, outs) + shift
    y = branch.conv.outputs[0]
    plain = Gauge.identity(x.scale.ndim)
    assert _CONV.rewrite is not None
    new = _CONV.rewrite(branch.conv, lambda value: plain if value is y else x)
    groups = integer(branch.conv, "group", 1)
    taps = scale.reshape(-1, *(1,) * (new[1].ndim - 1)) * new[1]
    return taps.reshape(groups, -1, *new[1].shape[1:]), scale * new[2] + shift


def _add_taps(weight: Array, taps: Array, place: Sequence[slice]) -> None:
    """Add a kernel of as many groups, or of a multiple, whose blocks lie on the diagonal."""
    parts = len(taps) // len(weight)
    blocks = weight.reshape(
        len(weight), parts, taps.shape[1], parts, taps.shape[2], *weight.shape[3:]
    )
    assert np.shares_memory(blocks, weight)
    split = taps.reshape(len(weight), parts, *taps.shape[1:])
    for part in range(parts):
        blocks[:, part, :, part][:, :, :, *place] += split[:, part]


# --- does the host hold a branch? ----------------------------------------------------------------


def holds(host: ir.Node, branches: Sequence[Branch]) -> bool:
    """True where the host's window and groups hold every branch, and all give the same channels."""
    shape, groups = weights(host, 1).shape, integer(host, "group", 1)
    for branch in branches:
        if branch.conv is None:
            if shape[0] != shape[1] * groups:
                return False
        else:
            other, parts = weights(branch.conv, 1).shape, integer(branch.conv, "group", 1)
            if parts % groups or (other[0], other[1] * parts) != (shape[0], shape[1] * groups):
                return False
        if len(dims(branch.source)) != len(shape) or _place(branch.conv, host) is None:
            return False
    return True


@dataclass(frozen=True)
class _Axis:
    """The window of a convolution along one axis: padding before and after, size, steps."""

    before: int
    after: int
    size: int
    stride: int
    dilation: int

    @property
    def reach(self) -> int:
        """What the output is longer than the input, at stride 1."""
        return self.before + self.after - self.dilation * (self.size - 1)


_POINT = _Axis(0, 0, 1, 1, 1)


def _window(conv: ir.Node) -> list[_Axis] | None:
    """The window along each axis; None where the padding depends on the size of the input."""
    kernel = weights(conv, 1).shape[2:]
    rank = len(kernel)
    strides = integers(conv, "strides") or [1] * rank
    dilations = integers(conv, "dilations") or [1] * rank
    pads = [0] * 2 * rank
    if auto_padded(conv):
        if any(n != 1 for n in (*strides, *dilations)):
            return None
        small, large = [(n - 1) // 2 for n in kernel], [n // 2 for n in kernel]
        upper = string(conv, "auto_pad", "") == "SAME_UPPER"
        pads = [*small, *large] if upper else [*large, *small]
    elif string(conv, "auto_pad", "NOTSET") != "VALID":
        pads = integers(conv, "pads") or pads
    return [
        _Axis(*numbers)
        for numbers in zip(pads[:rank], pads[rank:], kernel, strides, dilations, strict=True)
    ]


def _place(conv: ir.Node | None, host: ir.Node) -> tuple[slice, ...] | None:
    """Where a branch's taps lie in the host's window; None where they do not all lie in it."""
    outer = _window(host)
    inner = [_POINT] * len(outer or ()) if conv is None else _window(conv)
    if outer is None or inner is None or len(inner) != len(outer):
        return None
    places = [_place_along(a, b) for a, b in zip(inner, outer, strict=True)]
    return None if any(place is None for place in places) else tuple(p for p in places if p)


def _place_along(inner: _Axis, outer: _Axis) -> slice | None:
    if inner.stride != outer.stride or inner.reach != outer.reach:
        return None
    unit = outer.dilation if outer.size > 1 else 1
    first, rest = divmod(outer.before - inner.before, unit)
    step, uneven = divmod(inner.dilation, unit) if inner.size > 1 else (1, 0)
    last = first + step * (inner.size - 1)
    if rest or uneven or first < 0 or last >= outer.size:
        return None
    return slice(first, last + 1, step)
