"""The network under plan: its nodes with what each asks, and the gauges agreed so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from bnfold.folding.affine import ChannelAffine, Gauge
from bnfold.folding.merging import Merge
from bnfold.folding.rules import affine_of, relations_of
from bnfold.folding.rules.node import input_of
from bnfold.folding.rules.normalization import bypass
from bnfold.folding.rules.passing import opaque
from bnfold.folding.rules.relations import Relations, Repair
from bnfold.folding.rules.repairs import repair_of


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """A node y = scale * x + shift, channel by channel, that may go."""

    x: ir.Value
    y: ir.Value
    affine: ChannelAffine


@dataclass
class Network:
    """A model that stays as it is, and a growing assignment of gauges.

    gone: the per-channel maps that disappear. trying: the one under trial, which is among them.
    held: the batch norms that are to stay untouched, each with the reason.
    repairs: the names of the exact repairs that nodes may take. room: how many operators may come
    in the place of one that goes, None for any number. visited: the values that waves have
    reached, changed: those around which something was agreed, since they were last emptied.
    merges: the sums that become one convolution each; what lies inside them has no gauge any more.
    restricted: a scope stood in the way of something.
    """

    model: ir.Model
    gauges: dict[ir.Value, Gauge] = field(default_factory=dict)
    gone: set[ir.Node] = field(default_factory=set)
    trying: ir.Node | None = None
    held: dict[ir.Node, str] = field(default_factory=dict)
    repairs: frozenset[str] = frozenset()
    room: int | None = None
    visited: set[ir.Value] = field(default_factory=set)
    changed: set[ir.Value] = field(default_factory=set)
    merges: list[Merge] = field(default_factory=list)
    restricted: bool = False

    def __post_init__(self) -> None:
        self.nodes = [node for graph in self.model.graphs() for node in graph]
        self._relations: dict[ir.Node, Relations] = {}
        self._maps: dict[ir.Node, ChannelMap] = {}
        self._repairs: dict[ir.Node, Repair | None] = {}
        self._merged = {node: merge for merge in self.merges for node in merge.inner}

    def relations(self, node: ir.Node) -> Relations:
        """What a node asks of the gauges around it; one that goes asks as a bypass."""
        if node in self._merged:
            root = self.unit(node)
            if root not in self._relations:
                self._relations[root] = self._merged[root].asks(self.repairs)
            return self._relations[root]
        if node not in self._relations:
            self._relations[node] = self._ask(node)
        return self._relations[node]

    def _ask(self, node: ir.Node) -> Relations:
        if node in self.held:
            return opaque(node, "it is to stay as it is")
        if node in self.gone:
            m = self.map_of(node)
            return bypass(m.x, m.y, m.affine)
        repair = self.repair(node)
        return repair.relations if repair else relations_of(node)

    def repair(self, node: ir.Node) -> Repair | None:
        """The repair that a node may take, if there is one."""
        if not self.repairs or node in self.gone:
            return None
        if node in self._merged:
            return Repair(self.relations(node), self._merged[node].form)
        if node not in self._repairs:
            self._repairs[node] = repair_of(node, self.repairs)
        return self._repairs[node]

    def allow(self, repairs: frozenset[str]) -> None:
        """From now on nodes may take these repairs, among them those that were used so far."""
        self.repairs = repairs
        self._relations.clear()
        self._repairs.clear()

    def map_of(self, node: ir.Node) -> ChannelMap:
        """The per-channel map of a node that is one. Raises Opaque."""
        if node not in self._maps:
            slot, affine = affine_of(node)
            self._maps[node] = ChannelMap(input_of(node, slot), node.outputs[0], affine)
        return self._maps[node]

    def try_without(self, node: ir.Node) -> None:
        """Treat a per-channel map as gone."""
        self.gone.add(node)
        self.trying = node
        self._relations.pop(node, None)

    def put_back(self, node: ir.Node) -> None:
        """Treat a per-channel map as one that stays."""
        self.gone.discard(node)
        self._relations.pop(node, None)

    def agree(self, gauges: Mapping[ir.Value, Gauge]) -> None:
        """Let the node under trial go for good, with these gauges around it."""
        assert self.trying is not None
        m = self.map_of(self.trying)
        self.gauges.update(gauges)
        self.changed.update(gauges, (m.x, m.y))

    def merge(self, merge: Merge) -> None:
        """Treat a sum as one convolution; merges inside it become parts of it."""
        self.merges = [m for m in self.merges if not m.inner & merge.inner] + [merge]
        self._merged = {node: m for m in self.merges for node in m.inner}
        self._relations.pop(merge.root, None)
        for node in merge.inner - {merge.root}:
            for value in node.outputs:
                self.gauges.pop(value, None)

    def merged(self, node: ir.Node) -> Merge | None:
        """The merge that a node lies inside of, or whose sum it computes."""
        return self._merged.get(node)

    def unit(self, node: ir.Node) -> ir.Node:
        """The node itself, or the sum that it is merged into."""
        return self._merged[node].root if node in self._merged else node

    def gauge(self, value: ir.Value) -> Gauge:
        """The gauge agreed for a value so far."""
        found = self.gauges.get(value)
        return found if found is not None else Gauge.identity(len(value.shape or ()))

    def around(self, value: ir.Value) -> Iterator[ir.Node]:
        """The nodes that produce and read a value, each once."""
        producer = value.producer()
        users = dict.fromkeys(user for user, _ in value.uses())
        if producer is not None:
            yield producer
            users.pop(producer, None)
        yield from users
