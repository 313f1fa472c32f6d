"""Nodes that are one convolution: what they ask together, and its constants.

A `Merge` is such a convolution: `OneConv`, a convolution by itself, and what is built from others.
`ParallelSum` is the sum of branches of one tensor x:

    r = sum of  scale_i * (W_i * x + b_i) + shift_i

A per-channel map of x is a 1x1 kernel on the diagonal, and a small kernel is a large one with zeros
around it. One of the convolutions, the host, takes the others in; its window and its groups must
hold theirs, so the result never costs more than the host did alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array, Gauge
from bnfold.folding.rules.linear import conv_rule, shifted
from bnfold.folding.rules.node import (
    Opaque,
    along,
    auto_padded,
    constant_at,
    dims,
    input_of,
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

Attributes = Mapping[str, int | str | tuple[int, ...]]
CONV = conv_rule(transposed=False)
_BORDER = frozenset({"border"})


@dataclass(frozen=True)
class Axis:
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


@dataclass(frozen=True)
class Shape:
    """Of a convolution: channels, groups, and the window along each axis.

    axes: None where the padding depends on the size of the input.
    """

    outs: int
    ins: int
    groups: int
    axes: tuple[Axis, ...] | None
    kernel: tuple[int, ...]

    @property
    def weight(self) -> tuple[int, ...]:
        """The shape of the weight, by groups: (group, out, in, kernel...)."""
        return (self.groups, self.outs // self.groups, self.ins // self.groups, *self.kernel)

    @property
    def cost(self) -> int:
        """Multiplications for each element of the output's image."""
        return int(np.prod(self.weight))


@dataclass(frozen=True, eq=False)
class Merge(ABC):
    """Nodes that become one convolution.

    root: the node that computes the result. host: the convolution that stays, under its own name,
    and writes the result. inner: all nodes up to the root; of them only the host stays.
    """

    root: ir.Node
    host: ir.Node
    inner: frozenset[ir.Node]

    @property
    def result(self) -> ir.Value:
        """What the nodes compute together."""
        return self.root.outputs[0]

    @property
    def entry(self) -> ir.Node:
        """The inner node whose first input the host is to read."""
        return self.host

    @property
    def attributes(self) -> Attributes:
        """The host's attributes that change."""
        return {}

    @property
    def taken(self) -> tuple[ir.Node, ...]:
        """The layers that the host takes in."""
        return ()

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Of the one convolution."""

    @property
    @abstractmethod
    def sources(self) -> tuple[ir.Value, ...]:
        """What the nodes read; one tensor in the folded graph."""

    @abstractmethod
    def asks_of_sources(self, repairs: frozenset[str]) -> list[Demand]:
        """What is asked of the gauges of what the nodes read, where they may use these repairs."""

    @abstractmethod
    def form(self, gauges: Gauges) -> Form:
        """The one convolution, given the gauges around it.

        Its constants are the host's weight (slot 1) and bias (slot 2).
        """

    def asks(self, repairs: frozenset[str] = frozenset()) -> Relations:
        """What the one convolution asks of the gauges around it: it absorbs them."""
        of_result = (*only_along(self.result, 1, self.root), writable(self.result, self.root))
        return Relations(demands=(*self.asks_of_sources(repairs), *of_result))

    def plain_form(self, gauges: Gauges) -> Form:
        """The one convolution with no gauge on its result."""
        plain = Gauge.identity(len(dims(self.result)))
        return self.form(lambda value: plain if value is self.result else gauges(value))


@dataclass(frozen=True, eq=False)
class OneConv(Merge):
    """A convolution by itself."""

    @staticmethod
    def of(conv: ir.Node) -> OneConv:
        """A Conv node. Raises Opaque where its constants are computed, or held as integers."""
        for slot in range(1, len(conv.inputs)):
            if conv.inputs[slot] is not None and constant_at(conv, slot).dequantizer is not None:
                raise Opaque("its weights are integers, of which there is no sum")
        return OneConv(conv, conv, frozenset((conv,)))

    @property
    def shape(self) -> Shape:
        """As the node says."""
        weight, groups = weights(self.host, 1).shape, integer(self.host, "group", 1)
        axes = _axes(self.host, weight[2:])
        return Shape(weight[0], weight[1] * groups, groups, axes, weight[2:])

    @property
    def sources(self) -> tuple[ir.Value, ...]:
        """Its input."""
        return (input_of(self.host, 0),)

    def asks_of_sources(self, repairs: frozenset[str]) -> list[Demand]:
        """As its row in the table, or with a map of its border."""
        repair = repair_of(self.host, repairs & _BORDER)
        asks = repair.relations if repair is not None else CONV.relations(self.host)
        return [demand for demand in asks.demands if demand.value is self.sources[0]]

    def form(self, gauges: Gauges) -> Form:
        """Its rewrite, or that of its repair where a shift meets a border."""
        shift = np.any(gauges(self.sources[0]).origin)
        repair = repair_of(self.host, _BORDER) if shift else None
        form = repair.form(gauges) if repair is not None else None
        assert CONV.rewrite is not None
        return form if form is not None else Form((), CONV.rewrite(self.host, gauges))


@dataclass(frozen=True, eq=False)
class Branch:
    """scale * conv(source) + shift, or scale * source + shift where there is no convolution.

    scale, shift: numbers per channel of the result, along its axis 1.
    """

    source: ir.Value
    conv: Merge | None
    scale: Array
    shift: Array


@dataclass(frozen=True, eq=False)
class ParallelSum(Merge):
    """A sum of branches that becomes one convolution; first: the branch of the host."""

    branches: tuple[Branch, ...]
    first: Merge

    @property
    def entry(self) -> ir.Node:
        """As the host's branch has it."""
        return self.first.entry

    @property
    def attributes(self) -> Attributes:
        """As the host's branch has them."""
        return self.first.attributes

    @property
    def taken(self) -> tuple[ir.Node, ...]:
        """The convolutions of the other branches."""
        convs = [branch.conv for branch in self.branches if branch.conv is not None]
        own = [conv.host for conv in convs if conv is not self.first]
        return (*own, *(node for conv in convs for node in conv.taken))

    @property
    def shape(self) -> Shape:
        """The host's."""
        return self.first.shape

    @property
    def sources(self) -> tuple[ir.Value, ...]:
        """What the branches read."""
        return tuple(branch.source for branch in self.branches)

    def asks_of_sources(self, repairs: frozenset[str]) -> list[Demand]:
        """What each branch asks."""
        demands: list[Demand] = []
        for branch in self.branches:
            if branch.conv is not None:
                demands += branch.conv.asks_of_sources(repairs)
            else:
                demands += only_along(branch.source, 1, self.root)
                demands.append(readable(branch.source, self.root))
        return demands

    def form(self, gauges: Gauges) -> Form:
        """The kernels and biases added up, and behind them the maps of borders.

        A border has a map where a branch pads a tensor with zeros that is carried with a shift.
        """
        shape = self.shape
        rank = len(shape.kernel) + 2
        weight, bias, border = np.zeros(shape.weight), np.zeros(shape.outs), np.zeros((1,) * rank)
        for branch in self.branches:
            taps, offset, step = _carried(branch, shape.outs, gauges)
            place = _place(branch.conv, self.first)
            assert place is not None  # the host holds every branch
            add_blocks(weight, taps, place)
            bias, border = bias + offset, border + step
        return carried_result(weight, bias, gauges(self.result), border)


def _carried(branch: Branch, outs: int, gauges: Gauges) -> tuple[Array, Array, Array]:
    """A branch as it reads x~: kernel (group, out, in, taps...), bias, map of the border."""
    scale, shift = along(branch.scale, outs), along(branch.shift, outs)
    x = gauges(branch.source)
    rank = x.scale.ndim
    border = np.zeros((1,) * rank)
    if branch.conv is None:
        taps = (scale * along(x.read_scale, outs)).reshape(-1, *(1,) * rank)
        return taps, scale * along(x.origin, outs) + shift, border
    form = branch.conv.plain_form(gauges)
    assert form.constants is not None
    for step in form.steps:
        border = border + per_channel(scale, rank) * step.constant
    taps = scale.reshape(-1, *(1,) * (rank - 1)) * form.constants[1]
    return taps.reshape(branch.conv.shape.weight), scale * form.constants[2] + shift, border


def carried_result(weight: Array, bias: Array, y: Gauge, border: Array | None = None) -> Form:
    """A kernel by groups, a bias and a map of the border, their result carried by a gauge."""
    scale = along(y.scale, len(bias))
    weight = scale.reshape(len(weight), -1, *(1,) * (weight.ndim - 2)) * weight
    weight = weight.reshape(len(bias), *weight.shape[2:])
    constants = {1: weight, 2: shifted(bias, scale, along(y.origin, len(bias)))}
    if border is None or not np.any(border):
        return Form((), constants)
    return Form((Step("Add", per_channel(scale, border.ndim) * border),), constants)


def per_channel(numbers: Array, rank: int) -> Array:
    """Numbers per channel against a value of this rank."""
    return numbers.reshape(1, -1, *(1,) * (rank - 2))


def add_blocks(weight: Array, taps: Array, place: Sequence[slice]) -> None:
    """Add a kernel of as many groups, or of a multiple, whose blocks lie on the diagonal."""
    parts = len(taps) // len(weight)
    blocks = weight.reshape(
        len(weight), parts, taps.shape[1], parts, taps.shape[2], *weight.shape[3:]
    )
    assert np.shares_memory(blocks, weight)
    split = taps.reshape(len(weight), parts, *taps.shape[1:])
    for part in range(parts):
        blocks[:, part, :, part][:, :, :, *place] += split[:, part]


def is_private(value: ir.Value) -> bool:
    """True for a value that one node reads and nobody else."""
    return len(value.uses()) == 1 and not value.is_graph_output()


# --- does the host hold a branch? ----------------------------------------------------------------

POINT = Axis(0, 0, 1, 1, 1)


def holds(host: Merge, branches: Sequence[Branch]) -> bool:
    """True where the host's window and groups hold every branch, and all give the same channels."""
    shape = host.shape
    for branch in branches:
        if branch.conv is None:
            if shape.outs != shape.ins:
                return False
        else:
            other = branch.conv.shape
            if other.groups % shape.groups or (other.outs, other.ins) != (shape.outs, shape.ins):
                return False
        rank = len(dims(branch.source))
        if rank != len(shape.kernel) + 2 or _place(branch.conv, host) is None:
            return False
    return True


def _axes(conv: ir.Node, kernel: Sequence[int]) -> tuple[Axis, ...] | None:
    """The window along each axis; None where the padding depends on the size of the input."""
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
    return tuple(
        Axis(*numbers)
        for numbers in zip(pads[:rank], pads[rank:], kernel, strides, dilations, strict=True)
    )


def _place(conv: Merge | None, host: Merge) -> tuple[slice, ...] | None:
    """Where a branch's taps lie in the host's window; None where they do not all lie in it."""
    outer = host.shape.axes
    inner = (POINT,) * len(outer or ()) if conv is None else conv.shape.axes
    if outer is None or inner is None or len(inner) != len(outer):
        return None
    places = [_place_along(a, b) for a, b in zip(inner, outer, strict=True)]
    return None if any(place is None for place in places) else tuple(p for p in places if p)


def _place_along(inner: Axis, outer: Axis) -> slice | None:
    if inner.stride != outer.stride or inner.reach != outer.reach:
        return None
    unit = outer.dilation if outer.size > 1 else 1
    first, rest = divmod(outer.before - inner.before, unit)
    step, uneven = divmod(inner.dilation, unit) if inner.size > 1 else (1, 0)
    last = first + step * (inner.size - 1)
    if rest or uneven or first < 0 or last >= outer.size:
        return None
    return slice(first, last + 1, step)
