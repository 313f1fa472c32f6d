"""Parallel branches that are one convolution: what they ask together, and the new constants.

Where convolutions, per-channel maps and a value itself, all of one tensor x, are added up, the sum
is one convolution of x: a map is a 1x1 kernel on the diagonal, and a small kernel is a large one
with zeros around it. One of the convolutions, the host, takes the others in; its window and its
groups must hold theirs, so the result never costs more than the host did alone.

    r = sum of  scale_i * (W_i * x + b_i) + shift_i
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    Form,
    Gauges,
    Relations,
    Step,
    only_along,
    readable,
    writable,
)
from bnfold.folding.rules.repairs import repair_of

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

    def asks(self, repairs: frozenset[str] = frozenset()) -> Relations:
        """What the one convolution asks of the gauges around it: it absorbs them.

        repairs: the exact repairs that its branches may take.
        """
        demands = [*only_along(self.result, 1, self.root), writable(self.result, self.root)]
        for branch in self.branches:
            demands += _demands_of(branch, self.root, repairs)
        return Relations(demands=tuple(demands))

    def form(self, gauges: Gauges) -> Form:
        """The one convolution, given the gauges around the sum.

        Its constants are the host's weight (slot 1) and bias (slot 2). The map of a border stands
        behind it where a branch pads a tensor with zeros that is carried with a shift.
        """
        kernel = weights(self.host, 1)
        groups, outs = integer(self.host, "group", 1), kernel.shape[0]
        weight = np.zeros((groups, outs // groups, *kernel.shape[1:]))
        bias, border = np.zeros(outs), np.zeros((1,) * kernel.ndim)
        for branch in self.branches:
            taps, offset, step = _in_terms_of_what_is_carried(branch, outs, gauges)
            place = _place(branch.conv, self.host)
            assert place is not None  # the host holds every branch
            _add_taps(weight, taps, place)
            bias, border = bias + offset, border + step
        y = gauges(self.result)
        scale = along(y.scale, outs)
        weight = scale.reshape(groups, -1, *(1,) * (kernel.ndim - 1)) * weight
        border = _per_output(scale, kernel.ndim) * border
        constants = {
            1: weight.reshape(kernel.shape),
            2: shifted(bias, scale, along(y.origin, outs)),
        }
        return Form((Step("Add", border),) if np.any(border) else (), constants)


def _per_output(numbers: Array, rank: int) -> Array:
    """Numbers per channel against a value of this rank."""
    return numbers.reshape(1, -1, *(1,) * (rank - 2))


def _demands_of(branch: Branch, root: ir.Node, repairs: frozenset[str]) -> list[Demand]:
    if branch.conv is None:
        return [*only_along(branch.source, 1, root), readable(branch.source, root)]
    repair = repair_of(branch.conv, repairs)
    asks = repair.relations if repair is not None else _CONV.relations(branch.conv)
    return [d for d in asks.demands if d.value is branch.source]


def _in_terms_of_what_is_carried(
    branch: Branch, outs: int, gauges: Gauges
) -> tuple[Array, Array, Array]:
    """A branch as it reads x~: kernel (groups, out, in, taps...), bias, map of the border."""
    scale, shift = along(branch.scale, outs), along(branch.shift, outs)
    x = gauges(branch.source)
    rank = x.scale.ndim
    border = np.zeros((1,) * rank)
    if branch.conv is None:
        taps = (scale * along(x.read_scale, outs)).reshape(-1, *(1,) * rank)
        return taps, scale * along(x.origin, outs) + shift, border
    new, steps = _plain_form(branch.conv, x)
    for step in steps:
        border = border + _per_output(scale, rank) * step.constant
    groups = integer(branch.conv, "group", 1)
    taps = scale.reshape(-1, *(1,) * (rank - 1)) * new[1]
    return taps.reshape(groups, -1, *new[1].shape[1:]), scale * new[2] + shift, border


def _plain_form(conv: ir.Node, x: Gauge) -> tuple[Mapping[int, Array], tuple[Step, ...]]:
    """A convolution with this gauge on what it reads and none on its result."""
    result, plain = conv.outputs[0], Gauge.identity(x.scale.ndim)

    def around(value: ir.Value) -> Gauge:
        return plain if value is result else x

    repair = repair_of(conv, frozenset({"border"})) if np.any(x.origin) else None
    form = repair.form(around) if repair is not None else None
    if form is not None and form.constants is not None:
        return form.constants, form.steps
    assert _CONV.rewrite is not None
    return _CONV.rewrite(conv, around), ()


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
