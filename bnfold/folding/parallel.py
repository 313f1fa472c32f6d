"""Finding sums of parallel branches: from an Add back to the one tensor that all of it reads.

Behind a sum lie other sums, batch norms (those that go and those that would stay), Identity, and
at the end of each branch a convolution of the common tensor, or that tensor itself. Everything in
between must be read by nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array
from bnfold.folding.constants import constant
from bnfold.folding.merging import Branch, Merge, OneConv, ParallelSum, holds, is_private
from bnfold.folding.network import Network
from bnfold.folding.rules import relations_of
from bnfold.folding.rules.node import Opaque, dims, input_of, is_standard

_SUMS = {"Add": (1, 1), "Sub": (1, -1)}
_VIEWS = frozenset({"Identity", "Dropout"})
MayGo = Callable[[ir.Node], bool]


class _NotParallel(Exception):  # noqa: N818 - the normal end of a search, not an error
    """Something other than branches of one tensor is added up."""


def parallel_sums(network: Network, may_go: MayGo) -> Iterator[Merge]:
    """The sums that can become one convolution, outermost first, each node in one at most.

    may_go: the per-channel maps that may disappear in one. Sums that have been merged before come
    back only as a part of a larger one.
    """
    taken = {node for merge in network.merges for node in merge.inner}
    for node in reversed(network.nodes):
        if node in taken or node.domain not in ("", "ai.onnx") or not _is_sum(node):
            continue
        merge = _merge_at(network, node, may_go)
        if merge is not None:
            taken |= merge.inner
            yield merge


def _is_sum(node: ir.Node) -> bool:
    """Add, Sub or Sum of computed values, in float."""
    if node.op_type not in (*_SUMS, "Sum") or len(node.inputs) < 2:
        return False
    return all(value is not None and constant(value) is None for value in node.inputs)


def _merge_at(network: Network, root: ir.Node, may_go: MayGo) -> Merge | None:
    """The sum that a node computes as one convolution, if it is one."""
    for tensor in _read_by_convolutions(network, root, may_go):
        try:
            branches, inner = _Search(network, root, tensor, may_go).run()
            convs = [branch.conv for branch in branches if branch.conv is not None]
            convs.sort(key=lambda conv: -conv.shape.cost)
            hosts = [conv for conv in convs if holds(conv, branches)]
        except (_NotParallel, Opaque):
            continue
        for host in hosts[:1]:
            merge = ParallelSum(root, host.host, frozenset(inner), tuple(branches), host)
            if fits(network, merge):
                return merge
    return None


def fits(network: Network, merge: Merge) -> bool:
    """The gauges agreed so far suit the one convolution."""
    return all(
        bool(np.all(demand.holds(gauge.scale, gauge.origin)))
        for demand in merge.asks(network.repairs).demands
        for gauge in [network.gauge(demand.value)]
    )


def conv_at(network: Network, node: ir.Node) -> Merge | None:
    """The convolution that a node is, or that is merged up to it; None for anything else."""
    merge = network.merged(node)
    if merge is not None:
        return merge if merge.root is node else None
    if not is_standard(node, "Conv"):
        return None
    try:
        return OneConv.of(node)
    except Opaque:
        return None


def tensor_of(network: Network, value: ir.Value) -> ir.Value:
    """The first value that is the same tensor in the folded graph."""
    while (node := value.producer()) is not None and value is node.outputs[0]:
        if node not in network.gone and not is_view(node):
            break
        value = network.map_of(node).x if node in network.gone else input_of(node, 0)
    return value


def is_view(node: ir.Node) -> bool:
    """Identity, and Dropout at inference."""
    if not is_standard(node, *_VIEWS):
        return False
    return bool(relations_of(node).scales)


def _read_by_convolutions(network: Network, root: ir.Node, may_go: MayGo) -> list[ir.Value]:
    """The tensors that convolutions somewhere behind the sum read; the nearest first."""
    found: dict[ir.Value, None] = {}
    queue, seen = [root], {root}
    for node in queue:  # it grows
        for value in node.inputs:
            if value is None or len(value.uses()) != 1:
                continue
            producer = value.producer()
            if producer is None or producer in seen:
                continue
            seen.add(producer)
            conv = conv_at(network, producer)
            if conv is not None and not _is_sum(producer):
                found[tensor_of(network, conv.sources[0])] = None
            elif may_go(producer) or is_view(producer) or _is_sum(producer):
                queue.append(producer)
    return list(found)


class _Search:
    """Collects the branches of one sum, all of which must come from one tensor."""

    def __init__(self, network: Network, root: ir.Node, tensor: ir.Value, may_go: MayGo):
        self.network, self.root, self.tensor, self.may_go = network, root, tensor, may_go
        self.branches: list[Branch] = []
        self.inner: dict[ir.Node, None] = {}

    def run(self) -> tuple[list[Branch], dict[ir.Node, None]]:
        """Branches and inner nodes. Raises _NotParallel, and Opaque for constants computed."""
        rank = len(dims(self.root.outputs[0]))
        self._take_sum(self.root, np.ones((1,) * rank), np.zeros((1,) * rank))
        return self.branches, self.inner

    def _take_sum(self, node: ir.Node, scale: Array, shift: Array) -> None:
        self.inner[node] = None
        for slot, value in enumerate(node.inputs):
            assert value is not None  # a sum has no absent operands
            sign = _SUMS[node.op_type][slot] if node.op_type in _SUMS else 1
            self._take(value, sign * scale, shift if slot == 0 else np.zeros_like(shift))

    def _take(self, value: ir.Value, scale: Array, shift: Array) -> None:
        """Add scale * value + shift to the branches."""
        node = value.producer()
        if tensor_of(self.network, value) is self.tensor:
            self._add(value, None, scale, shift)
            return
        if node is None or node.graph is not self.root.graph or value is not node.outputs[0]:
            raise _NotParallel
        if not is_private(value):
            raise _NotParallel
        if _is_sum(node):
            self._take_sum(node, scale, shift)
            return
        conv = conv_at(self.network, node)
        if conv is not None:
            if any(tensor_of(self.network, source) is not self.tensor for source in conv.sources):
                raise _NotParallel
            self.inner.update(dict.fromkeys(conv.inner))
            self._add(conv.sources[0], conv, scale, shift)
            return
        self.inner[node] = None
        if self.may_go(node):
            m = self.network.map_of(node)
            self._take(m.x, scale * m.affine.scale, scale * m.affine.shift + shift)
        elif is_view(node):
            self._take(input_of(node, 0), scale, shift)
        else:
            raise _NotParallel

    def _add(self, source: ir.Value, conv: Merge | None, scale: Array, shift: Array) -> None:
        if any(n > 1 for a in (scale, shift) for axis, n in enumerate(a.shape) if axis != 1):
            raise _NotParallel  # numbers that vary along other axes than the channels'
        self.branches.append(Branch(source, conv, scale, shift))
