"""Gate A: a data-free proof that a folded graph computes what the original computed.

The claim about each value x of the original is that the folded graph carries
x~ = scale * (x - origin), the gauge that the plan gave it. The proof is an induction over the nodes
of the original, from the graph's outputs back to its inputs: for each node, the piece of the folded
graph that computes y~ is found, and shown to take the x~ of the node's sources to y~:

- a node without a gauge around it must be there unchanged, constants bit for bit;
- a linear node (Conv, ConvTranspose, Gemm, MatMul) by its weights: each one must be the rounding of
  scale_y * W / scale_x, and each bias the rounding of scale_y * (b + W origin_x - origin_y);
- a sum of parallel branches that is one convolution by that one's weights;
- a normalization or a per-channel Mul/Add, staying or gone, by slope and intercept per channel;
- any other node by running both sides in float64 on random x and the x~ that belongs to it.

Two kinds of channel have no inverse. scale 0: x~ is `origin`, and x may be anything. scale inf:
x is `origin`, and x~ may be anything. A proof must hold whatever the free one of the two is.

Everything here reads the operators' specification; nothing is shared with the code that folds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from bnfold.proof.algebra.equations import (
    RECURRENT,
    channels,
    compare_linear,
    compare_maps,
    compare_weights,
    read_linear,
    read_map,
    read_padded,
    read_recurrent,
    shifted_border,
    wrong_padding,
)
from bnfold.proof.algebra.parallel import NotParallel, is_sum, read_parallel
from bnfold.proof.algebra.probe import probe
from bnfold.proof.exact.counterpart import (
    EXACT,
    ROUNDINGS,
    Carried,
    Gauge,
    Match,
    Rounding,
    Unmatched,
    View,
    attributes_equal,
    coarsest,
    match,
    replaceable_inputs,
    same_constant,
    with_functions_inlined,
)
from bnfold.proof.exact.reference import NoReferenceError
from bnfold.proof.exact.shapes import Shapes

__all__ = ["Certificate", "Gauge", "NodeRecord", "certify"]

READS_NO_VALUE = frozenset(("Shape", "Size"))


@dataclass(frozen=True)
class NodeRecord:
    """What was checked of one node, and the verdict as a sentence.

    check: "interface", "unchanged", "weights", "channel map", "probe" or "subgraph".
    ulps: the greatest deviation of a written constant from its exact value, in units of the
    rounding of its dtype (1 is what rounding once may do); 0 where no constant was written.
    """

    node: str
    op_type: str
    check: str
    ulps: float
    passed: bool
    sentence: str


@dataclass(frozen=True)
class Certificate:
    """The records of every node that the graph's outputs depend on."""

    records: tuple[NodeRecord, ...]

    @property
    def passed(self) -> bool:
        """True when something was checked and nothing failed."""
        return bool(self.records) and all(record.passed for record in self.records)

    @property
    def failures(self) -> tuple[NodeRecord, ...]:
        """The records that did not pass, inputs first."""
        return tuple(record for record in self.records if not record.passed)

    @property
    def worst(self) -> NodeRecord | None:
        """The first failure, else the record with the greatest deviation."""
        if self.failures:
            return self.failures[0]
        return max(self.records, key=lambda record: record.ulps, default=None)


def certify(
    original: onnx.ModelProto,
    folded: onnx.ModelProto,
    gauges: Mapping[str, Gauge],
    aliases: Mapping[str, str],
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> Certificate:
    """Check that `folded` carries every value of `original` as `gauges` say.

    original, folded: models with their tensors inside. gauges: by value name of the original;
    a value without one is carried as it is. aliases: value of the original -> its name in the
    folded graph, where that differs. input_shapes: sizes for dynamic axes, where the defaults
    (2 for the first, then 224 for images) do not suit the network.

    Never raises on a wrong fold: what cannot be proved is a failed record.
    """
    original = with_functions_inlined(original, folded)
    shapes = Shapes(original, dict(input_shapes or {}))
    # an input with a default is data where it can still be given, a constant where it was frozen
    replaceable = replaceable_inputs(folded)
    proof = _Proof(
        View.of(original, replaceable), View.of(folded, replaceable), gauges, aliases, shapes
    )
    records = _interface(original, folded, proof, replaceable)
    if all(record.passed for record in records):
        records += proof.walk([value.name for value in original.graph.output])
    return Certificate(tuple(records))


# ---------------------------------------------------------------------------------- interface


def _interface(
    original: onnx.ModelProto, folded: onnx.ModelProto, proof: _Proof, replaceable: frozenset[str]
) -> list[NodeRecord]:
    """Names, types, shapes and order of inputs and outputs, and the operators' versions."""
    failures = [
        *_unusable_gauges(proof),
        *_different_borders(original, folded),
        *_different_versions(original, folded),
        *(_changed_default(name, original, proof) for name in sorted(replaceable)),
    ]
    for value in (*original.graph.input, *original.graph.output):
        if proof.rename(value.name) != value.name or not proof.gauge(value.name).is_identity:
            failures.append(f"'{value.name}' of the graph's interface is carried as another value")
    sentences = [f"{failure}." for failure in failures if failure]
    if sentences:
        return [NodeRecord("graph", "graph", "interface", 0.0, False, text) for text in sentences]
    text = "inputs, outputs and operator sets are the same."
    return [NodeRecord("graph", "graph", "interface", 0.0, True, text)]


def _unusable_gauges(proof: _Proof) -> Iterator[str]:
    for name in proof.gauges:
        if not proof.gauge(name).is_usable:
            yield f"the gauge of '{name}' holds what is no number, or arrays that do not fit"


def _different_borders(original: onnx.ModelProto, folded: onnx.ModelProto) -> Iterator[str]:
    for kind in ("input", "output"):
        before, after = (
            [
                _signature(value)
                for value in getattr(model.graph, kind)
                if kind == "output" or value.name not in {t.name for t in model.graph.initializer}
            ]
            for model in (original, folded)
        )
        if before != after:
            yield f"the graph's {kind}s were {before} and are {after}"


def _different_versions(original: onnx.ModelProto, folded: onnx.ModelProto) -> Iterator[str]:
    ours = {entry.domain: entry.version for entry in original.opset_import}
    theirs = {entry.domain: entry.version for entry in folded.opset_import}
    if any(theirs.get(domain, version) != version for domain, version in ours.items()):
        yield f"the operator sets were {ours} and are {theirs}"
    functions = [function.SerializeToString(deterministic=True) for function in original.functions]
    if functions != [f.SerializeToString(deterministic=True) for f in folded.functions]:
        yield "the model's local functions are not the same"


def _changed_default(name: str, original: onnx.ModelProto, proof: _Proof) -> str:
    """Empty where an input that a caller may give still has the default that it had."""
    if name not in replaceable_inputs(original):
        return f"the constant '{name}' has become an input"
    same = same_constant(name, proof.original, name, proof.folded)
    return "" if same else f"the default of the input '{name}' was changed"


def _signature(value: onnx.ValueInfoProto) -> tuple[Any, ...]:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return (value.name, value.type.SerializeToString(deterministic=True))
    dims = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return (value.name, tensor.elem_type, dims if tensor.HasField("shape") else None)


# ------------------------------------------------------------------------------------ the walk


class _Proof:
    """The induction over one graph, or the body of a control-flow node."""

    def __init__(self, original: View, folded: View, gauges: Mapping[str, Gauge],
                 aliases: Mapping[str, str], shapes: Shapes):  # fmt: skip
        self.original, self.folded = original, folded
        self.gauges, self.aliases, self.shapes = gauges, aliases, shapes
        self.demanded_outside: set[str] = set()
        self.rounding = _model_rounding(original)
        self._carried = frozenset(self.rename(name) for name in self._values(original))

    def _values(self, view: View) -> list[str]:
        outside = self._values(view.outer) if view.outer else []
        here = [*view.inputs, *view.producers]
        return outside + [name for name in here if not view.is_constant(name)]

    def rename(self, name: str) -> str:
        """The value's name in the folded graph."""
        return self.aliases.get(name, name)

    def gauge(self, name: str) -> Carried:
        """How the folded graph carries the value."""
        return Carried.by(self.gauges.get(name))

    def walk(self, outputs: Sequence[str]) -> list[NodeRecord]:
        """Records for every node that `outputs` depend on, in the order of execution."""
        records: list[NodeRecord] = []
        demanded: set[str] = set()
        for name in outputs:
            if self.original.is_constant(name):
                records.append(self._constant_output(name))
            else:
                demanded.add(name)
        for node in reversed(self.original.nodes):
            wanted = [name for name in node.output if name in demanded]
            if wanted:
                record, sources = self._check(node, wanted)
                records.append(record)
                demanded.update(sources)
        known = set(self.original.inputs) | set(self.original.producers)
        self.demanded_outside = demanded - known
        return records[::-1]

    def _constant_output(self, name: str) -> NodeRecord:
        there = self.rename(name)
        same = self.folded.is_constant(there) and same_constant(
            name, self.original, there, self.folded
        )
        sentence = "the constant is the same." if same else f"the constant '{name}' was changed."
        return NodeRecord(name, "Constant", "unchanged", 0.0, same, sentence)

    def _check(self, node: onnx.NodeProto, wanted: list[str]) -> tuple[NodeRecord, list[str]]:
        if any(attribute.HasField("g") for attribute in node.attribute):
            return self._check_control(node, wanted)
        found, why_not = None, ""
        try:
            if (parallel := self._check_parallel(node, wanted)) is not None:
                return parallel
        except NotParallel as reason:
            why_not = f"not proved: in the folded graph it is one convolution; {reason}"
        try:
            found = match(node, wanted, self.original, self.folded, self.rename, self._carried,
                          lambda name: self.gauge(name).is_known)  # fmt: skip
            record = self._judge(node, found)
        except (Unmatched, NoReferenceError) as reason:
            record = self._record(node, "probe", False, f"not proved: {reason}")
        if why_not and not record.passed:
            record = self._record(node, "weights", False, why_not)
        sources = found.sources if found else self.original.sources(node)
        return record, list(sources)

    def _judge(self, node: onnx.NodeProto, found: Match) -> NodeRecord:
        around = [self.gauge(name) for name in (*found.sources, *found.outputs)]
        plain = all(gauge.is_identity for gauge in around)
        if node.op_type in READS_NO_VALUE and self._same_node(found):
            return self._record(node, "unchanged", True, "it reads no value of its input.")
        unchanged = self._same_node(found) and self._same_constants(found)
        if plain and unchanged:
            return self._record(node, "unchanged", True, "no gauge around it; it is unchanged.")
        return (
            self._check_padded(node, found)
            or self._check_linear(node, found)
            or self._check_recurrent(node, found)
            or self._check_channel_map(node, found)
            or self._probe(node, found, unchanged)
        )

    def _record(self, node: onnx.NodeProto, check: str, passed: bool, sentence: str,
                ulps: float = 0.0) -> NodeRecord:  # fmt: skip
        label = self.original.label(node)
        text = f"{node.op_type} '{label}': {sentence}"
        return NodeRecord(label, node.op_type, check, ulps, passed, text)

    def _same_node(self, found: Match) -> bool:
        """One node on each side: the operator, its attributes and its connections are the same."""
        if len(found.original) != 1 or len(found.folded) != 1:
            return False
        a, b = found.original[0], found.folded[0]
        if (a.op_type, a.domain) != (b.op_type, b.domain) or not attributes_equal(a, b):
            return False
        first, second = _trimmed(a.input), _trimmed(b.input)
        outputs = [self.rename(name) for name in _trimmed(a.output)]
        return (
            len(first) == len(second)
            and all(self._connects(x, y) for x, y in zip(first, second, strict=True))
            and all(name in b.output for name in outputs if name in self._carried)
            and [bool(n) for n in _trimmed(a.output)] == [bool(n) for n in _trimmed(b.output)]
            and all(list(b.output).index(self.rename(name)) == list(a.output).index(name)
                    for name in found.outputs)
        )  # fmt: skip

    def _connects(self, name: str, there: str) -> bool:
        if not name or not there or self.original.is_constant(name):
            constant = bool(there) and self.folded.is_constant(there)
            return not name and not there if not (name and there) else constant
        return self.rename(name) == there

    def _same_constants(self, found: Match) -> bool:
        return all(
            same_constant(x, self.original, y, self.folded)
            for x, y in zip(
                _trimmed(found.original[0].input), _trimmed(found.folded[0].input), strict=True
            )
            if x and self.original.is_constant(x)
        )

    # ------------------------------------------------------------------------------ subgraphs

    def _check_control(self, node: onnx.NodeProto, wanted: list[str]
                       ) -> tuple[NodeRecord, list[str]]:  # fmt: skip
        """If, Loop, Scan: no gauge at the node itself; its bodies are walked like graphs."""
        sources = self.original.sources(node)

        def failed(sentence: str) -> tuple[NodeRecord, list[str]]:
            return self._record(node, "subgraph", False, sentence), sources

        for name in (*wanted, *sources):
            if not self.gauge(name).is_identity:
                return failed(f"the gauge of '{name}' stands at its border, where none may.")
        there = self.folded.producers.get(self.rename(wanted[0]))
        if there is None or not self._same_node(Match((node,), (there,), (), tuple(wanted))):
            return failed("the folded graph has no such node in its place.")
        if not self._same_constants(Match((node,), (there,), (), ())):
            return failed("a constant that it reads was changed.")
        demanded, records = set(sources), []
        for mine, theirs in zip(_bodies(node), _bodies(there), strict=True):
            inner = _Proof(self.original.body(mine), self.folded.body(theirs), self.gauges,
                           self.aliases, self.shapes)  # fmt: skip
            problem = _body_interface(mine, theirs, inner)
            if problem:
                return failed(problem)
            records += inner.walk([value.name for value in mine.output])
            demanded |= inner.demanded_outside
        bad = [record for record in records if not record.passed]
        sentence = f"inside it, {bad[0].sentence}" if bad else f"{len(records)} nodes inside hold."
        ulps = max((record.ulps for record in records), default=0.0)
        record = self._record(node, "subgraph", not bad, sentence, ulps)
        here = {name for name in demanded if not self.original.is_constant(name)}
        return record, sorted(here)

    # -------------------------------------------------------------------------------- weights

    def _check_linear(self, node: onnx.NodeProto, found: Match) -> NodeRecord | None:
        """W~ = scale_y W / scale_x and b~ = scale_y (b + W origin_x - origin_y), rounded once.

        Where a shift meets a border, b~ is a map over the places: the weights are held against the
        exact ones here, and the map is left to the probe.
        """
        mine = read_linear(found.original, self.original)
        theirs = read_linear(found.folded, self.folded) or read_linear(
            found.folded[:1], self.folded
        )
        if mine is None or theirs is None or mine.settings != theirs.settings:
            return None
        if mine.weight.shape != theirs.weight.shape or len(found.outputs) != 1:
            return None
        if theirs.source != self.rename(mine.source):
            return None
        inputs = channels(self.gauge(mine.source), mine.axis, mine.shape_in)
        outputs = channels(self.gauge(found.outputs[0]), mine.axis, mine.shape_out)
        if inputs is None or outputs is None:
            return None
        if shifted_border(mine, inputs):
            ulps, problem = compare_weights(mine, theirs, inputs, outputs)
            return self._record(node, "weights", False, problem, ulps) if problem else None
        if read_linear(found.folded, self.folded) is None:
            return None
        ulps, problem = compare_linear(mine, theirs, inputs, outputs)
        sentence = problem or "weights and bias are the exact ones, rounded once."
        return self._record(node, "weights", not problem, sentence, ulps)

    def _check_padded(self, node: onnx.NodeProto, found: Match) -> NodeRecord | None:
        """A Conv that padded with zeros, behind a Pad with what zero has become."""
        mine, there = (
            read_linear(found.original, self.original),
            read_padded(found.folded, self.folded),
        )
        if mine is None or there is None or len(found.outputs) != 1:
            return None
        theirs, number = there
        inputs = channels(self.gauge(mine.source), mine.axis, mine.shape_in)
        outputs = channels(self.gauge(found.outputs[0]), mine.axis, mine.shape_out)
        same = mine.settings == theirs.settings and mine.weight.shape == theirs.weight.shape
        if not same or inputs is None or outputs is None:
            return None
        if theirs.source != self.rename(mine.source):
            return None
        ulps, problem = 0.0, wrong_padding(number, inputs)
        if not problem:  # every tap sees a number that is carried as all others are
            ulps, problem = compare_linear(replace(mine, blind=False), theirs, inputs, outputs)
        sentence = problem or "padding, weights and bias are the exact ones, rounded once."
        return self._record(node, "weights", not problem, sentence, ulps)

    def _check_recurrent(self, node: onnx.NodeProto, found: Match) -> NodeRecord | None:
        """RNN, GRU, LSTM: W and Wb absorb the gauge of the input; all else is as it was."""
        if node.op_type not in RECURRENT or not self._same_node_but(found, (1, 3)):
            return None
        mine = read_recurrent(node, self.original)
        theirs = read_recurrent(found.folded[0], self.folded)
        if mine is None or theirs is None or mine.settings != theirs.settings:
            return None
        hidden = [name for name in (*found.sources, *found.outputs) if name != mine.source]
        inputs = channels(self.gauge(mine.source), mine.axis, mine.shape_in)
        if inputs is None or not all(self.gauge(name).is_identity for name in hidden):
            return None
        outputs = Carried(np.ones(mine.shape_out), np.zeros(mine.shape_out))
        ulps, problem = compare_linear(mine, theirs, inputs, outputs)
        sentence = problem or "the input's weights and biases are the exact ones, rounded once."
        return self._record(node, "weights", not problem, sentence, ulps)

    def _same_node_but(self, found: Match, slots: tuple[int, ...]) -> bool:
        """As `_same_node` and `_same_constants`, the constants in some slots left out."""
        if len(found.original) != 1 or len(found.folded) != 1:
            return False
        pair = []
        for given in (found.original[0], found.folded[0]):
            bare = onnx.NodeProto()
            bare.CopyFrom(given)
            names = [name for slot, name in enumerate(given.input) if slot not in slots]
            bare.input[:] = _trimmed(names)
            pair.append(bare)
        rest = Match((pair[0],), (pair[1],), found.sources, found.outputs)
        return self._same_node(rest) and self._same_constants(rest)

    def _check_parallel(self, node: onnx.NodeProto, wanted: list[str]
                        ) -> tuple[NodeRecord, list[str]] | None:  # fmt: skip
        """A sum in the original for which the folded graph has one convolution; else None.

        Raises NotParallel where it is no sum of branches of what that one reads. Where a shift
        meets a border, only the weights are held against the exact ones here, and the map of the
        border is left to the probe.
        """
        region = self._convolution_behind(self.rename(wanted[0]))
        if not region or not is_sum(node, self.original):
            return None
        theirs = read_linear(region, self.folded) or read_linear(region[:1], self.folded)
        output = self.gauge(wanted[0])
        if theirs is None or (outputs := channels(output, 1, theirs.shape_out)) is None:
            return None

        def carried(name: str) -> Carried | None:
            return self.gauge(name) if self.rename(name) == theirs.source else None

        found = read_parallel(node, self.original, theirs, carried)
        plain = Carried(np.ones(theirs.shape_in), np.zeros(theirs.shape_in))
        compare = compare_weights if found.shifted_border else compare_linear
        ulps, problem = compare(found.linear, theirs, plain, outputs)
        if found.shifted_border and not problem:
            return None
        sentence = problem or "its branches add up to the weights and bias of one convolution."
        return self._record(node, "weights", not problem, sentence, ulps), list(found.sources)

    def _convolution_behind(self, name: str) -> list[onnx.NodeProto]:
        """The convolution that computes a folded tensor, an added constant behind it; else []."""
        node, region = self.folded.producers.get(name), []
        if node is not None and node.op_type == "Add":
            region = [node]
            given = [n for n in node.input if not self.folded.is_constant(n)]
            inside = len(given) == 1 and given[0] not in self._carried
            node = self.folded.producers.get(given[0]) if inside else None
        return [node, *region] if node is not None and node.op_type == "Conv" else []

    # --------------------------------------------------------------------------- channel maps

    def _check_channel_map(self, node: onnx.NodeProto, found: Match) -> NodeRecord | None:
        """Slope and intercept of y~ over x~, per channel, for y = a x + b."""
        if len(found.sources) != 1 or len(found.outputs) != 1:
            return None
        source, output = found.sources[0], found.outputs[0]
        rank = self._rank(source)
        mine = read_map(found.original, self.original, source, rank)
        theirs = read_map(found.folded, self.folded, self.rename(source), rank)
        if mine is None or theirs is None:
            return None
        ulps, problem = compare_maps(mine, theirs, self.gauge(source), self.gauge(output))
        gone = "" if found.folded else "it is gone, and "
        sentence = problem or f"{gone}both sides are the same map of every channel."
        return self._record(node, "channel map", not problem, sentence, ulps)

    def _rank(self, name: str) -> int | None:
        gauge = self.gauge(name)
        if gauge.scale.ndim or gauge.origin.ndim:
            return max(gauge.scale.ndim, gauge.origin.ndim)
        known = self.shapes.of(name)
        return None if known is None or known.shape is None else len(known.shape)

    # --------------------------------------------------------------------------------- probes

    def _probe(self, node: onnx.NodeProto, found: Match, unchanged: bool) -> NodeRecord:
        """Run both sides on random x and its x~; y~ must be the one that belongs to y."""
        rounding = EXACT if unchanged else self._written_rounding(found)
        worst, problem = probe(self, found, rounding=rounding)
        sentence = (
            f"run on random values, {problem}" if problem else "random values pass as they must."
        )
        return self._record(node, "probe", not problem, sentence, worst)

    def _written_rounding(self, found: Match) -> Rounding:
        """Of the constants that the folded side reads; no coarser than the model's own."""
        names = {name for node in found.folded for name in node.input if name}
        constants = [self.folded.constant(n) for n in names if self.folded.is_constant(n)]
        return min(coarsest(constant.rounding for constant in constants), self.rounding)


def _model_rounding(view: View) -> Rounding:
    """The coarsest float dtype among the initializers, float32 where there is none."""
    while view.outer is not None:
        view = view.outer
    kinds = {tensor.data_type for tensor in view.graph.initializer}
    found = [ROUNDINGS[kind] for kind in kinds if kind in ROUNDINGS]
    return coarsest(found) if found else ROUNDINGS[onnx.TensorProto.FLOAT]


def _trimmed(names: Sequence[str]) -> list[str]:
    """Inputs or outputs without the absent ones at the end."""
    trimmed = list(names)
    while trimmed and not trimmed[-1]:
        trimmed.pop()
    return trimmed


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    named = sorted((attribute.name, index) for index, attribute in enumerate(node.attribute)
                   if attribute.HasField("g"))  # fmt: skip
    return [node.attribute[index].g for _, index in named]


def _body_interface(mine: onnx.GraphProto, theirs: onnx.GraphProto, inner: _Proof) -> str:
    """Empty, or the sentence that says how the two bodies' borders differ."""
    if [value.name for value in mine.input] != [value.name for value in theirs.input]:
        return "the inputs of its body were changed."
    if [inner.rename(value.name) for value in mine.output] != [v.name for v in theirs.output]:
        return "the outputs of its body were changed."
    for value in (*mine.input, *mine.output):
        if not inner.gauge(value.name).is_identity:
            return f"the gauge of '{value.name}' stands at the border of its body."
    return ""
