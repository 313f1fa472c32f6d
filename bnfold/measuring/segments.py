"""An ONNX graph cut at its batch norms, so that a layer can be measured before it runs.

Wave k holds the batch norms that depend on those of the waves before it and on no other. Segment k
is what can be computed once wave k is settled: from what is held to the inputs of wave k + 1 and
what is needed later. A segment is a small model of its own, the statistics of its batch norms being
inputs: the same session serves every batch, and whatever statistics are asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from bnfold import graph
from bnfold.folding.rules.node import is_standard
from bnfold.measuring.norms import MEAN, VAR, Norm
from bnfold.measuring.shelf import AnyArray
from bnfold.measuring.statistics import Statistics

# Free to compute where they are wanted: they read one value of the size they give.
_CHEAP = (
    *("BatchNormalization", "Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish"),
    *("Tanh", "Elu", "Selu", "Softplus", "Softsign", "Gelu", "Mish", "Identity", "Neg", "Abs"),
)
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli")


@dataclass(frozen=True, eq=False)
class Use:
    """A batch norm node: its layer, the wave that it is settled in, the value that it reads.

    first: whether no other use of its layer comes before it.
    statistics: the names under which a segment reads its running mean and variance.
    """

    layer: str
    wave: int
    value: str
    first: bool
    node: ir.Node
    statistics: tuple[str, str]


@dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of the graph.

    uses: the batch norms in it.  reads: what it takes of the values that are held.  gives: what it
    computes and is wanted: measured or held.  measured: values that batch norms read and that are
    known now.  held: values that later segments read.
    """

    nodes: Sequence[ir.Node]
    uses: tuple[Use, ...]
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    measured: tuple[str, ...]
    held: tuple[str, ...]


class Cut:
    """A model cut at `norms`, as far as the last of them needs it, or to its outputs if asked.

    uses: in the order of the graph.  segments: one more than there are waves.
    """

    def __init__(
        self, model: ir.Model, norms: Mapping[str, Norm], *, to_outputs: bool = False
    ) -> None:
        self.model = model
        self._norms = norms
        self._layer_of = {node: name for name, norm in norms.items() for node in norm.nodes}
        self._outputs = list(model.graph.outputs) if to_outputs else []
        self._inputs = set(graph.graph_inputs(model).values())
        self._free = self._constants()
        self._needed = self._needed_nodes()
        self._stage: dict[ir.Value, int] = {}
        self.uses = self._assign_stages()
        self.waves = max(use.wave for use in self.uses)
        self._place = self._places()
        self.segments = [self._segment(index) for index in range(self.waves + 1)]

    def wave(self, number: int) -> list[Use]:
        """The batch norms that are settled together, in the order of the graph."""
        return [use for use in self.uses if use.wave == number]

    # which node runs where

    def _constants(self) -> set[ir.Value]:
        """What is the same for every batch, and computed anew wherever it is read."""
        free: set[ir.Value] = set(self.model.graph.initializers.values())
        for node in self.model.graph:
            if node.op_type not in _RANDOM and all(value in free for value in reads(node)):
                free.update(node.outputs)
        return free

    def _needed_nodes(self) -> set[ir.Node]:
        wanted = [node.inputs[0] for node in self._layer_of] + self._outputs
        needed: set[ir.Node] = set()
        while wanted:
            value = wanted.pop()
            node = value.producer() if value is not None else None
            if node is not None and node not in needed:
                needed.add(node)
                wanted.extend(reads(node))
        return needed

    def _assign_stages(self) -> tuple[Use, ...]:
        """The earliest segment of each value, and thereby the wave of each batch norm."""
        taken = graph.names_in(self.model)
        uses: dict[str, Use] = {}
        found: list[Use] = []
        for node in self.model.graph:
            stage = max((self._stage.get(value, 0) for value in reads(node)), default=0)
            layer = self._layer_of.get(node)
            if layer is not None:
                value = node.inputs[0]
                assert value is not None
                wave = self._stage.get(value, 0) + 1
                if layer in uses:
                    wave = max(wave, uses[layer].wave)
                names = tuple(
                    graph.fresh_name(f"{layer}.{what}.given", taken) for what in ("mean", "var")
                )
                use = Use(
                    layer, wave, str(value.name), layer not in uses, node, (names[0], names[1])
                )
                uses.setdefault(layer, use)
                found.append(use)
                stage = max(stage, wave)
            for output in node.outputs:
                self._stage[output] = stage
        return tuple(found)

    def _places(self) -> dict[ir.Node, int]:
        """The segment of each node: the earliest, but cheap ones wait for whoever reads them."""
        place: dict[ir.Node, int] = {}
        readers: dict[ir.Value, list[ir.Node]] = {}
        for node in self._needed:
            for value in reads(node):
                readers.setdefault(value, []).append(node)
        waves: dict[str, int] = {}
        for use in self.uses:
            waves[use.value] = min(use.wave, waves.get(use.value, use.wave))
        for node in reversed(self.model.graph):
            if node not in self._needed:
                continue
            ends = [place[user] for value in node.outputs for user in readers.get(value, ())]
            ends += [waves[value.name] - 1 for value in node.outputs if value.name in waves]
            waits = is_standard(node, *_CHEAP) and ends
            place[node] = min(ends) if waits else self._stage[node.outputs[0]]
        return place

    # the segments

    def _segment(self, index: int) -> Segment:
        own_nodes = [node for node in self.model.graph if self._is_in(node, index)]
        nodes = self._with_constants(own_nodes)
        own = {value for node in nodes for value in node.outputs}
        needs = dict.fromkeys(value for node in nodes for value in reads(node))
        known = self._inputs | self._given(range(index + 1))
        later = set(self._outputs)
        for node, place in self._place.items():
            if place > index:
                later.update(reads(node))
        cuts = {use.value for use in self.uses}
        fresh = known if index == 0 else own
        measured = {str(value.name) for value in fresh if value.name in cuts}
        held = {str(value.name) for value in (known & later) - self._free}
        return Segment(
            nodes,
            tuple(use for use in self.uses if use.node in own_nodes),
            tuple(str(v.name) for v in needs if v not in own and v not in self._free),
            tuple(str(v.name) for n in own_nodes for v in n.outputs if v.name in measured | held),
            tuple(sorted(measured)),
            tuple(sorted(held)),
        )

    def _given(self, indices: Collection[int]) -> set[ir.Value]:
        """What the nodes of these segments compute."""
        nodes = [node for node, place in self._place.items() if place in indices]
        return {value for node in nodes for value in node.outputs}

    def _is_in(self, node: ir.Node, index: int) -> bool:
        return self._place.get(node) == index and not self._is_free(node)

    def _is_free(self, node: ir.Node) -> bool:
        return all(value in self._free for value in node.outputs)

    def _with_constants(self, nodes: list[ir.Node]) -> list[ir.Node]:
        """The nodes, and before them those that compute constants for them."""
        wanted = [value for node in nodes for value in reads(node)]
        wanted = [value for value in wanted if value in self._free]
        before: set[ir.Node] = set()
        while wanted:
            node = wanted.pop().producer()
            if node is not None and node not in before:
                before.add(node)
                wanted.extend(reads(node))
        return [node for node in self.model.graph if node in before] + nodes

    def model_of(self, segment: Segment, given: Mapping[str, AnyArray]) -> onnx.ModelProto:
        """A segment as a model. given: what it reads, of one batch, for the types.

        Of the extents, only those are declared that the graph itself knows.
        """
        values = {str(v.name): v for node in segment.nodes for v in reads(node)}
        outputs = {str(v.name): v for node in segment.nodes for v in node.outputs}
        weights = [v for v in values.values() if v.producer() is None and v in self._free]
        view = ir.GraphView(
            inputs=[values[name] for name in segment.reads],
            outputs=[outputs[name] for name in segment.gives],
            nodes=segment.nodes,
            initializers=weights,
            opset_imports=self.model.graph.opset_imports,
            name="segment",
        )
        part = view.clone()
        for value in part.inputs:
            value.meta.clear()  # the shape that the file declares, as of an inner value none
            value.dtype = ir.DataType.from_numpy(given[str(value.name)].dtype)
            value.shape = _agreeing(value.shape, given[str(value.name)].shape)
        clones = dict(zip(segment.nodes, part, strict=True))
        for use in segment.uses:
            for slot, name in zip((MEAN, VAR), use.statistics, strict=True):
                statistic = ir.Value(
                    name=name,
                    shape=ir.Shape([self._norms[use.layer].layer.num_features]),
                    type=ir.TensorType(self._type(use, slot)),
                )
                part.inputs.append(statistic)
                clones[use.node].replace_input_with(slot, statistic)
        model = ir.Model(
            part, ir_version=self.model.ir_version, functions=list(self.model.functions.values())
        )
        return graph.to_proto(model)

    def _type(self, use: Use, slot: int) -> ir.DataType:
        norm = self._norms[use.layer]
        return (norm.mean if slot == MEAN else norm.var).dtype

    def feeds(self, use: Use, statistics: Statistics) -> dict[str, AnyArray]:
        """What gives a use these statistics."""
        return {
            name: array.astype(self._type(use, slot).numpy())
            for slot, name, array in zip(
                (MEAN, VAR), use.statistics, (statistics.mean, statistics.var), strict=True
            )
        }


def _agreeing(shape: ir.Shape | None, actual: Sequence[int]) -> ir.Shape:
    """The extents that the graph knows and that are so; the others may vary."""
    known = list(shape) if shape is not None and len(shape) == len(actual) else []
    return ir.Shape([n if known and known[axis] == n else None for axis, n in enumerate(actual)])


def reads(node: ir.Node) -> list[ir.Value]:
    """Every value that a node reads, those that its bodies take from outside among them."""
    found = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found += _read_outside([attribute.as_graph()])
        elif attribute.type == ir.AttributeType.GRAPHS:
            found += _read_outside(attribute.as_graphs())
    return found


def _read_outside(bodies: Collection[ir.Graph]) -> list[ir.Value]:
    found: list[ir.Value] = []
    for body in bodies:
        own = {*body.inputs, *body.initializers.values()}
        own.update(value for node in body for value in node.outputs)
        inside = [value for node in body for value in reads(node)]
        found += [value for value in (*inside, *body.outputs) if value not in own]
    return found
