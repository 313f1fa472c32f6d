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

from bnfold.folding.affine import Array
from bnfold.folding.merging import (
    Attributes,
    Merge,
    OneConv,
    Shape,
    add_blocks,
    carried_result,
    is_private,
)
from bnfold.folding.network import Network
from bnfold.folding.parallel import MayGo, conv_at, fits, is_view
from bnfold.folding.rules.moves import pads_of
from bnfold.folding.rules.node import (
    Opaque,
    along,
    auto_padded,
    dims,
    input_of,
    integer,
    integers,
    label,
    string,
    weights,
)
from bnfold.folding.rules.passing import pad_value
from bnfold.folding.rules.relations import Demand, Form, Gauges, no_shift, only_along, readable


@dataclass(frozen=True, eq=False)
class PaddedConv(Merge):
    """A Pad with zeros and the convolution behind it; pads: of the two together."""

    pad: ir.Node
    pads: tuple[int, ...]

    @property
    def entry(self) -> ir.Node:
        """The Pad."""
        return self.pad

    @property
    def attributes(self) -> Attributes:
        """The pads, spelled out."""
        spelled = {"auto_pad": "NOTSET"} if "auto_pad" in self.host.attributes else {}
        return {**spelled, "pads": self.pads}

    @property
    def taken(self) -> tuple[ir.Node, ...]:
        """The Pad."""
        return (self.pad,)

    @property
    def shape(self) -> Shape:
        """The convolution's, with these pads."""
        shape = OneConv.of(self.host).shape
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
        padded = self.pad.outputs[0]
        conv = OneConv.of(self.host)
        return conv.form(lambda value: gauges(self.sources[0] if value is padded else value))


@dataclass(frozen=True, eq=False)
class ConvChain(Merge):
    """A 1x1 convolution, the root, of scale * (another one, in front) + shift."""

    front: Merge
    scale: Array
    shift: Array

    @property
    def entry(self) -> ir.Node:
        """As the convolution in front has it."""
        return self.front.entry

    @property
    def attributes(self) -> Attributes:
        """Those that change in front, and the groups."""
        same = self.shape.groups == integer(self.host, "group", 1)
        return (
            self.front.attributes if same else {**self.front.attributes, "group": self.shape.groups}
        )

    @property
    def taken(self) -> tuple[ir.Node, ...]:
        """The 1x1 convolution."""
        return (*self.front.taken, self.root)

    @property
    def shape(self) -> Shape:
        """The window in front; as many groups as both have blocks of channels in common."""
        point = OneConv.of(self.root).shape
        groups = math.gcd(self.front.shape.groups, point.groups)
        return replace(self.front.shape, outs=point.outs, groups=groups)

    @property
    def sources(self) -> tuple[ir.Value, ...]:
        """What the convolution in front reads."""
        return self.front.sources

    def asks_of_sources(self, repairs: frozenset[str]) -> list[Demand]:  # noqa: ARG002
        """What the convolution in front asks, without a repair."""
        return self.front.asks_of_sources(frozenset())

    def form(self, gauges: Gauges) -> Form:
        """The product of the two kernels, group by group."""
        shape, front, point = self.shape, self.front.shape, OneConv.of(self.root).shape
        middle, window = front.outs, front.kernel
        form = self.front.plain_form(gauges)
        assert form.constants is not None
        scale, shift = along(self.scale, middle), along(self.shift, middle)
        taps = scale.reshape(-1, *(1,) * (len(window) + 1)) * form.constants[1]
        first = np.zeros(replace(front, groups=shape.groups).weight)
        add_blocks(first, taps.reshape(front.weight), (slice(None),) * len(window))
        second = np.zeros(replace(point, groups=shape.groups).weight)
        add_blocks(
            second, weights(self.root, 1).reshape(point.weight), (slice(None),) * len(window)
        )
        second = second.reshape(second.shape[:3])
        offset = (scale * form.constants[2] + shift).reshape(shape.groups, -1)
        bias = np.einsum("gom,gm->go", second, offset).reshape(shape.outs)
        if len(self.root.inputs) > 2 and self.root.inputs[2] is not None:
            bias = bias + weights(self.root, 2)
        weight = np.einsum("gom,gm...->go...", second, first)
        return carried_result(weight, bias, gauges(self.result))


# --- finding them --------------------------------------------------------------------------------


def padded_convs(network: Network, may_go: MayGo) -> Iterator[Merge]:  # noqa: ARG001
    """The convolutions that can pad for themselves."""
    for conv in _free_convs(network):
        try:
            merge = _padded(conv)
        except Opaque:
            continue
        if merge is not None and fits(network, merge):
            yield merge


def _padded(conv: ir.Node) -> PaddedConv | None:
    value = input_of(conv, 0)
    pad = value.producer()
    if pad is None or pad.op_type != "Pad" or pad.graph is not conv.graph:
        return None
    if not is_private(value) or auto_padded(conv) or pad.domain not in ("", "ai.onnx"):
        return None
    if string(pad, "mode", "constant") != "constant" or pad_value(pad) != 0:
        return None
    rank, extents = len(dims(input_of(pad, 0))), pads_of(pad)
    if len(extents) != 2 * rank or min(extents) < 0:
        return None
    if any(extents[axis] for axis in (0, 1, rank, rank + 1)):
        return None
    own = [0] * 2 * (rank - 2)
    if string(conv, "auto_pad", "NOTSET") == "NOTSET":
        own = integers(conv, "pads") or own
    spatial = (*extents[2:rank], *extents[rank + 2 :])
    pads = tuple(a + b for a, b in zip(own, spatial, strict=True))
    return PaddedConv(conv, conv, frozenset((pad, conv)), pad, pads)


def conv_chains(network: Network, may_go: MayGo) -> Iterator[Merge]:
    """The 1x1 convolutions of convolutions that cost no more as one."""
    taken: set[ir.Node] = set()
    for point in _free_convs(network):
        try:
            merge = _chain(network, point, may_go) if _is_point(point) else None
            if merge is None or taken & merge.inner or not _pays(merge):
                continue
        except Opaque:
            continue
        if fits(network, merge):
            taken |= merge.inner
            yield merge


def _is_point(conv: ir.Node) -> bool:
    """A convolution of single elements: 1x1, stride 1, no padding."""
    one = all(n == 1 for n in (*weights(conv, 1).shape[2:], *(integers(conv, "strides") or ())))
    return one and not any(integers(conv, "pads") or ())


def _pays(chain: ConvChain) -> bool:
    """The one convolution multiplies no more than the two."""
    return chain.shape.cost <= chain.front.shape.cost + OneConv.of(chain.root).shape.cost


def _chain(network: Network, point: ir.Node, may_go: MayGo) -> ConvChain | None:
    value = input_of(point, 0)
    rank = len(dims(value))
    scale, shift = np.ones((1,) * rank), np.zeros((1,) * rank)
    between = {point}
    while (node := value.producer()) is not None and is_private(value):
        if node.graph is not point.graph:
            return None
        front = conv_at(network, node)
        if front is not None:
            inner = front.inner | between
            return ConvChain(point, front.host, inner, front, scale, shift)
        between.add(node)
        if may_go(node):
            m = network.map_of(node)
            arrays = (m.affine.scale, m.affine.shift)
            if any(n > 1 for a in arrays for axis, n in enumerate(a.shape) if axis != 1):
                return None
            scale, shift = scale * m.affine.scale, scale * m.affine.shift + shift
            value = m.x
        elif is_view(node):
            value = input_of(node, 0)
        else:
            return None
    return None


def _free_convs(network: Network) -> Iterator[ir.Node]:
    """The convolutions with constant weights that are part of no merge, in order."""
    for node in network.nodes:
        if network.merged(node) is None and conv_at(network, node) is not None:
            yield node


Finder = Callable[[Network, MayGo], Iterator[Merge]]
# by the names under which they are asked for
CHAINS: Mapping[str, Finder] = {"pad": padded_convs, "conv-chain": conv_chains}
