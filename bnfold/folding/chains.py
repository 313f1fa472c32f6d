"""Nodes in a chain that are one convolution: a Pad in front of one, a 1x1 convolution behind one.

Nothing of this is batch normalization, so each is asked for by name. A Pad with zeros is the
convolution's own padding. A 1x1 convolution of a convolution, with nothing but per-channel maps in
between, is one convolution; it is made only where it multiplies no more than the two did: seldom
behind a depthwise one, whose kernel would become dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array, Gauge
from bnfold.folding.merging import POINT, Attributes, Merge, Shape, add_blocks
from bnfold.folding.network import Network
from bnfold.folding.parallel import MayGo, conv_at, fits, is_view
from bnfold.folding.rules.moves import pads_of
from bnfold.folding.rules.node import (
    Opaque,
    auto_padded,
    dims,
    input_of,
    integer,
    label,
    string,
)
from bnfold.folding.rules.passing import pad_value
from bnfold.folding.rules.relations import Demand, Form, Gauges, no_shift, only_along, readable

Between = Mapping[ir.Value, Gauge]  # how a value in front carries what is read behind it


@dataclass(frozen=True, eq=False)
class PaddedConv(Merge):
    """A Pad with zeros and the convolution behind it; pads: of the two together."""

    pad: ir.Node
    conv: Merge
    between: Between
    pads: tuple[int, ...]

    @property
    def entry(self) -> ir.Node:
        """The Pad."""
        return self.pad

    @property
    def attributes(self) -> Attributes:
        """The pads, spelled out."""
        spelled = {"auto_pad": "NOTSET"} if "auto_pad" in self.host.attributes else {}
        return {**self.conv.attributes, **spelled, "pads": self.pads}

    @property
    def taken(self) -> tuple[ir.Node, ...]:
        """The Pad."""
        return (self.pad, *self.conv.taken)

    @property
    def shape(self) -> Shape:
        """The convolution's, with these pads."""
        shape = self.conv.shape
        rank = len(shape.kernel)
        pairs = zip(shape.axes or (), self.pads[:rank], self.pads[rank:], strict=True)
        return replace(shape, axes=tuple(replace(a, before=b, after=c) for a, b, c in pairs))

    @property
    def sources(self) -> tuple[ir.Value, ...]:
        """What the Pad reads."""
        return (input_of(self.pad, 0),)

    def asks_of_sources(self, repairs: frozenset[str]) -> list[Demand]:  # noqa: ARG002
        """What a convolution asks that pads with zeros."""
        (x,) = self.sources
        sentence = f"{label(self.pad)} pads with zeros, which a shift would change"
        return [*only_along(x, 1, self.host), readable(x, self.host), no_shift(x, sentence)]

    def form(self, gauges: Gauges) -> Form:
        """The convolution's constants, as it reads what the Pad has read."""
        x = gauges(self.sources[0])

        def around(value: ir.Value) -> Gauge:
            own = self.between.get(value)
            return gauges(value) if own is None else Gauge(x.scale * own.scale, own.origin)

        return self.conv.form(around)


@dataclass(frozen=True, eq=False)
class ConvChain(Merge):
    """A 1x1 convolution of what another one, in front, makes."""

    front: Merge
    point: Merge
    between: Between

    @property
    def entry(self) -> ir.Node:
        """As the convolution in front has it."""
        return self.front.entry

    @property
    def attributes(self) -> Attributes:
        """Those that change in front, and the groups."""
        groups = self.shape.groups
        same = groups == integer(self.host, "group", 1)
        return self.front.attributes if same else {**self.front.attributes, "group": groups}

    @property
    def taken(self) -> tuple[ir.Node, ...]:
        """The 1x1 convolution, and what both have taken in."""
        return (*self.front.taken, self.point.host, *self.point.taken)

    @property
    def shape(self) -> Shape:
        """The window in front; as many groups as both have blocks of channels in common."""
        front, point = self.front.shape, self.point.shape
        return replace(front, outs=point.outs, groups=math.gcd(front.groups, point.groups))

    @property
    def sources(self) -> tuple[ir.Value, ...]:
        """What the convolution in front reads."""
        return self.front.sources

    def asks_of_sources(self, repairs: frozenset[str]) -> list[Demand]:  # noqa: ARG002
        """What the convolution in front asks, without a repair."""
        return self.front.asks_of_sources(frozenset())

    def form(self, gauges: Gauges) -> Form:
        """The product of the two kernels, group by group."""
        front = self.front.plain_form(gauges).constants
        point = self.point.form(lambda value: self.between.get(value) or gauges(value)).constants
        assert front is not None
        assert point is not None
        first = _by_groups(front[1], self.front.shape, self.shape.groups)
        second = _by_groups(point[1], self.point.shape, self.shape.groups)
        second = second.reshape(second.shape[:3])
        weight = np.einsum("gom,gm...->go...", second, first)
        bias = np.einsum("gom,gm->go", second, front[2].reshape(self.shape.groups, -1))
        weight = weight.reshape(self.shape.outs, -1, *self.shape.kernel)
        return Form((), {1: weight, 2: bias.reshape(-1) + point[2]})


def _by_groups(weight: Array, shape: Shape, groups: int) -> Array:
    """A weight of this shape with fewer groups, each of several blocks: (group, out, in, ...)."""
    whole = np.zeros(replace(shape, groups=groups).weight)
    add_blocks(whole, weight.reshape(shape.weight), (slice(None),) * len(shape.kernel))
    return whole


# --- finding them --------------------------------------------------------------------------------


def padded_convs(network: Network, may_go: MayGo) -> Iterator[Merge]:
    """The convolutions that can pad for themselves."""
    yield from _found(network, lambda conv: _padded(network, conv, may_go))


def conv_chains(network: Network, may_go: MayGo) -> Iterator[Merge]:
    """The 1x1 convolutions of convolutions that cost no more as one."""
    yield from _found(network, lambda conv: _chained(network, conv, may_go))


def _found(network: Network, make: Callable[[Merge], Merge | None]) -> Iterator[Merge]:
    """What can be made of the convolutions, in order, each in one at most."""
    taken: set[ir.Node] = set()
    for node in network.nodes:
        conv = conv_at(network, node)
        try:
            merge = make(conv) if conv is not None else None
        except Opaque:
            continue
        if merge is not None and not taken & merge.inner and fits(network, merge):
            taken |= merge.inner
            yield merge


def _padded(network: Network, conv: Merge, may_go: MayGo) -> PaddedConv | None:
    line = _in_front(network, conv, may_go)
    pad, axes = line.node if line is not None else None, conv.shape.axes
    if line is None or pad is None or pad.op_type != "Pad" or axes is None:
        return None
    if pad.domain not in ("", "ai.onnx") or auto_padded(conv.host):
        return None
    if string(pad, "mode", "constant") != "constant" or pad_value(pad) != 0:
        return None
    rank, extents = len(dims(input_of(pad, 0))), pads_of(pad)
    if len(extents) != 2 * rank or min(extents) < 0:
        return None
    if any(extents[axis] for axis in (0, 1, rank, rank + 1)):
        return None
    own = (*(axis.before for axis in axes), *(axis.after for axis in axes))
    spatial = (*extents[2:rank], *extents[rank + 2 :])
    pads = tuple(a + b for a, b in zip(own, spatial, strict=True))
    inner = conv.inner | line.path | {pad}
    return PaddedConv(conv.root, conv.host, inner, pad, conv, line.between, pads)


def _chained(network: Network, point: Merge, may_go: MayGo) -> ConvChain | None:
    axes = point.shape.axes
    if axes is None or any(replace(axis, dilation=1) != POINT for axis in axes):
        return None
    line = _in_front(network, point, may_go)
    front = conv_at(network, line.node) if line is not None else None
    if line is None or front is None:
        return None
    inner = front.inner | line.path | point.inner
    chain = ConvChain(point.root, front.host, inner, front, point, line.between)
    return chain if chain.shape.cost <= front.shape.cost + point.shape.cost else None


@dataclass(frozen=True)
class _Line:
    """The node in front of a convolution, the per-channel maps on the way, and how it is read."""

    node: ir.Node
    path: frozenset[ir.Node]
    between: Between


def _in_front(network: Network, conv: Merge, may_go: MayGo) -> _Line | None:
    """The one node that makes all that a convolution reads, and nothing that others read."""
    between: dict[ir.Value, Gauge] = {}
    path: dict[ir.Node, None] = {}
    values: set[ir.Value] = set()
    for source in conv.sources:
        value, scale, shift = source, np.ones(()), np.zeros(())
        while (node := value.producer()) is not None:
            values.add(value)
            if may_go(node):
                m = network.map_of(node)
                scale, shift = scale * m.affine.scale, scale * m.affine.shift + shift
                value = m.x
            elif is_view(node):
                value = input_of(node, 0)
            else:
                break
            path[node] = None
        if node is None or node.graph is not conv.root.graph or len(values) - len(path) != 1:
            return None
        rank = len(dims(source))
        with np.errstate(divide="ignore"):
            between[source] = Gauge(_against(1 / scale, rank), _against(shift, rank))
    inside = {*conv.inner, *path}
    shared = any(v.is_graph_output() or {u for u, _ in v.uses()} - inside for v in values)
    asked = conv.asks_of_sources(frozenset())
    held = all(np.all(d.holds(between[d.value].scale, between[d.value].origin)) for d in asked)
    assert node is not None  # a convolution has a source
    return None if shared or not held else _Line(node, frozenset(path), between)


def _against(array: Array, rank: int) -> Array:
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


Finder = Callable[[Network, MayGo], Iterator[Merge]]
# by the names under which they are asked for
CHAINS: Mapping[str, Finder] = {"pad": padded_convs, "conv-chain": conv_chains}
