"""The network under plan: its nodes with what each asks, and the gauges agreed so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from bnfold.folding.affine import ChannelAffine, Gauge
from bnfold.folding.rules import relations_of
from bnfold.folding.rules.normalization import bypass, normalization_map
from bnfold.folding.rules.relations import Relations


@dataclass
class Network:
    """A model that stays as it is, and a growing assignment of gauges.

    gone: the batch norms that disappear. trying: the one under trial, which is among them.
    """

    model: ir.Model
    gauges: dict[ir.Value, Gauge] = field(default_factory=dict)
    gone: set[ir.Node] = field(default_factory=set)
    trying: ir.Node | None = None

    def __post_init__(self) -> None:
        self.nodes = [node for graph in self.model.graphs() for node in graph]
        self._relations: dict[ir.Node, Relations] = {}
        self._maps: dict[ir.Node, ChannelAffine] = {}

    def relations(self, node: ir.Node) -> Relations:
        """What a node asks of the gauges around it; a batch norm that goes asks as a bypass."""
        if node not in self._relations:
            self._relations[node] = self._bypass(node) if node in self.gone else relations_of(node)
        return self._relations[node]

    def _bypass(self, node: ir.Node) -> Relations:
        return bypass(node, self.map_of(node))

    def map_of(self, node: ir.Node) -> ChannelAffine:
        """The affine map of a batch norm that has one."""
        if node not in self._maps:
            self._maps[node] = normalization_map(node)
        return self._maps[node]

    def try_without(self, node: ir.Node) -> None:
        """Treat a batch norm as gone."""
        self.gone.add(node)
        self.trying = node
        self._relations.pop(node, None)

    def put_back(self, node: ir.Node) -> None:
        """Treat a batch norm as one that stays."""
        self.gone.discard(node)
        self._relations.pop(node, None)

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
