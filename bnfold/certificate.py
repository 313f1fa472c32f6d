"""Gate A: a data-free proof that a folded graph computes what the original computed.

The claim about each value x of the original is that the folded graph carries
x~ = scale * (x - origin), the gauge that the plan gave it. The proof is an induction over the nodes
of the original, from the graph's outputs back to its inputs: for each node, the piece of the folded
graph that computes y~ is found, and shown to take the x~ of the node's sources to y~:

- a node without a gauge around it must be there unchanged, constants bit for bit;
- a linear node (Conv, ConvTranspose, Gemm, MatMul) by its weights: each one must be the rounding of
  scale_y * W / scale_x, and each bias the rounding of scale_y * (b + W origin_x - origin_y);
- a normalization or a per-channel Mul/Add, staying or gone, by slope and intercept per channel;
- any other node by running both sides in float64 on random x and the x~ that belongs to it.

Two kinds of channel have no inverse. scale 0: x~ is `origin`, and x may be anything. scale inf:
x is `origin`, and x~ may be anything. A proof must hold whatever the free one of the two is.

Everything here reads the operators' specification; nothing is shared with the code that folds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx

from bnfold.counterpart import (
    EXACT,
    Constant,
    Match,
    Rounding,
    Shapes,
    Unmatched,
    View,
    attributes_equal,
    coarsest,
    match,
    replaceable_inputs,
    same_constant,
)
from bnfold.reference import NoReferenceError, window_pads

Array = np.ndarray[Any, np.dtype[Any]]

FLOAT_TYPES = (
    onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
)  # fmt: skip
ARITHMETIC = 2.0**-40  # of the accumulated magnitude: float64 sums of many terms
EVALUATION = 2.0**-44  # of the magnitude: one node in float64
ONE_ROUNDING = 1 + 1e-6  # the recomputation may sit on the other side of a tie
ROUNDINGS_PER_MAP = 4  # a normalization has up to four rounded constants
READS_NO_VALUE = frozenset(("Shape", "Size"))
PROBE_ELEMENTS = 1 << 18  # beyond this one draw instead of two


class Gauge(Protocol):
    """How the folded graph carries a value: x~ = scale * (x - origin), arrays of its rank."""

    @property
    def scale(self) -> Array:
        """Per-channel factor; 0: written constant, inf: known constant."""

    @property
    def origin(self) -> Array:
        """What the original value is where the folded one is zero."""


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


@dataclass(frozen=True, eq=False)
class _Carried:
    """A gauge as float64 arrays."""

    scale: Array
    origin: Array

    @property
    def is_identity(self) -> bool:
        return bool(np.all(self.scale == 1) and np.all(self.origin == 0))


_AS_IT_IS = _Carried(np.ones(()), np.zeros(()))


class _Proof:
    """The induction over one graph, or the body of a control-flow node."""

    def __init__(self, original: View, folded: View, gauges: Mapping[str, Gauge],
                 aliases: Mapping[str, str], shapes: Shapes):  # fmt: skip
        self.original, self.folded = original, folded
        self.gauges, self.aliases, self.shapes = gauges, aliases, shapes
        self.demanded_outside: set[str] = set()
        self._carried = frozenset(self.rename(name) for name in self._values(original))

    def _values(self, view: View) -> list[str]:
        outside = self._values(view.outer) if view.outer else []
        here = [*view.inputs, *view.producers]
        return outside + [name for name in here if not view.is_constant(name)]

    def rename(self, name: str) -> str:
        """The value's name in the folded graph."""
        return self.aliases.get(name, name)

    def gauge(self, name: str) -> _Carried:
        """How the folded graph carries the value."""
        gauge = self.gauges.get(name)
        if gauge is None:
            return _AS_IT_IS
        return _Carried(np.asarray(gauge.scale, np.float64), np.asarray(gauge.origin, np.float64))

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
        found = None
        try:
            found = match(node, wanted, self.original, self.folded, self.rename, self._carried,
                          self._is_known)  # fmt: skip
            record = self._judge(node, found)
        except (Unmatched, NoReferenceError) as reason:
            record = self._record(node, "probe", False, f"not proved: {reason}")
        sources = found.sources if found else self.original.sources(node)
        return record, list(sources)

    def _is_known(self, name: str) -> bool:
        scale = self.gauge(name).scale
        return bool(np.all(np.isinf(scale)))

    def _judge(self, node: onnx.NodeProto, found: Match) -> NodeRecord:
        around = [self.gauge(name) for name in (*found.sources, *found.outputs)]
        plain = all(gauge.is_identity for gauge in around)
        if node.op_type in READS_NO_VALUE and self._same_node(found):
            return self._record(node, "unchanged", True, "it reads no value of its input.")
        unchanged = self._same_node(found) and self._same_constants(found)
        if plain and unchanged:
            return self._record(node, "unchanged", True, "no gauge around it; it is unchanged.")
        return (
            self._check_linear(node, found)
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
        """W~ = scale_y W / scale_x and b~ = scale_y (b + W origin_x - origin_y), rounded once."""
        mine = _read_linear(found.original, self.original)
        theirs = _read_linear(found.folded, self.folded)
        if mine is None or theirs is None or mine.settings != theirs.settings:
            return None
        if mine.weight.shape != theirs.weight.shape or len(found.outputs) != 1:
            return None
        if theirs.source != self.rename(mine.source):
            return None
        inputs = _channels(self.gauge(mine.source), mine.axis, mine.shape_in)
        outputs = _channels(self.gauge(found.outputs[0]), mine.axis, mine.shape_out)
        if inputs is None or outputs is None:
            return None
        ulps, problem = _compare_linear(mine, theirs, inputs, outputs)
        sentence = problem or "weights and bias are the exact ones, rounded once."
        return self._record(node, "weights", not problem, sentence, ulps)

    # --------------------------------------------------------------------------- channel maps

    def _check_channel_map(self, node: onnx.NodeProto, found: Match) -> NodeRecord | None:
        """Slope and intercept of y~ over x~, per channel, for y = a x + b."""
        if len(found.sources) != 1 or len(found.outputs) != 1:
            return None
        source, output = found.sources[0], found.outputs[0]
        rank = self._rank(source)
        mine = _read_map(found.original, self.original, source, rank)
        theirs = _read_map(found.folded, self.folded, self.rename(source), rank)
        if mine is None or theirs is None:
            return None
        ulps, problem = _compare_maps(mine, theirs, self.gauge(source), self.gauge(output))
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
        shapes = _probe_shapes(self, found)
        rng = np.random.default_rng(len(found.sources) + 7)
        large = sum(math.prod(shape) for shape in shapes.values()) > PROBE_ELEMENTS
        rounding = EXACT if unchanged else self._written_rounding(found)
        worst = 0.0
        for _ in range(1 if large else 2):
            x, carried = _draw(self, found, shapes, rng)
            y = _run(found.original, self.original, x)
            z = _run(found.folded, self.folded, carried)
            sizes = _run(found.original, self.original, _absolute(x), absolute=True)
            written = (
                _run(found.folded, self.folded, _absolute(carried), absolute=True)
                if rounding is not EXACT
                else {}
            )
            for name in found.outputs:
                there = self.rename(name)
                problem, excess = _compare_probe(
                    self.gauge(name), y[name], z.get(there), sizes[name],
                    written.get(there), rounding,
                )  # fmt: skip
                worst = max(worst, excess)
                if problem:
                    sentence = f"run on random values, {problem}"
                    return self._record(node, "probe", False, sentence, worst)
        return self._record(node, "probe", True, "random values pass through as they must.", worst)

    def _written_rounding(self, found: Match) -> Rounding:
        names = {name for node in found.folded for name in node.input if name}
        constants = [self.folded.constant(n) for n in names if self.folded.is_constant(n)]
        return coarsest(constant.rounding for constant in constants)


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


# ------------------------------------------------------------------------- reading linear nodes


@dataclass(frozen=True, eq=False)
class _Linear:
    """y = W x + b with W seen as (groups, outputs per group, inputs per group, taps), float64.

    settings: what both sides must have in common (kind, groups, strides, pads, ...).
    axis: the channel axis of x and y, counted from the front (>= 0) or from the back.
    rank: of x and y, None where the operator takes any.
    blind: zeros enter the sums beside x (padding), or the borders see fewer taps.
    weight = factor * what is stored, rounded as `rounding`. biases: (values, rounding) each.
    """

    source: str
    settings: tuple[Any, ...]
    axis: int
    rank: int | None
    blind: bool
    weight: Array
    factor: float
    rounding: Rounding
    biases: tuple[tuple[Array, Rounding], ...]

    @property
    def shape_in(self) -> tuple[int, int]:
        """(groups, inputs per group)."""
        return (self.weight.shape[0], self.weight.shape[2])

    @property
    def shape_out(self) -> tuple[int, int]:
        """(groups, outputs per group)."""
        return (self.weight.shape[0], self.weight.shape[1])

    @property
    def bias(self) -> Array:
        """(groups, outputs per group): the sum of all biases."""
        total = np.zeros(self.shape_out)
        for values, _ in self.biases:
            total = total + values.reshape(self.shape_out)
        return total


def _read_linear(nodes: Sequence[onnx.NodeProto], view: View) -> _Linear | None:
    """A linear node with the additions of constants behind it, or None for anything else."""
    if not nodes or nodes[0].op_type not in _LINEAR_READERS or nodes[0].domain:
        return None
    linear = _LINEAR_READERS[nodes[0].op_type](nodes[0], view)
    previous = nodes[0]
    for node in nodes[1:]:
        if linear is None:
            return None
        linear = _with_addition(linear, node, previous.output[0], view)
        previous = node
    return linear


def _with_addition(linear: _Linear, node: onnx.NodeProto, value: str, view: View
                   ) -> _Linear | None:  # fmt: skip
    if node.op_type not in ("Add", "Sub") or node.domain or list(node.input).count(value) != 1:
        return None
    index = list(node.input).index(value)
    other = node.input[1 - index]
    if not view.is_constant(other) or (node.op_type == "Sub" and index == 1):
        return None
    constant = view.constant(other)
    values = _per_channel(constant.value, linear.axis, math.prod(linear.shape_out), linear.rank)
    if values is None:
        return None
    signed = -values if node.op_type == "Sub" else values
    biases = (*linear.biases, (signed, constant.rounding))
    return dataclasses.replace(linear, biases=biases)


def _per_channel(values: Array, axis: int, size: int, rank: int | None) -> Array | None:
    """A constant that is added to a value of `rank`, as one number per channel, or None."""
    if axis >= 0:
        if rank is None or values.ndim > rank:
            return None
        values = values.reshape((1,) * (rank - values.ndim) + values.shape)
    elif values.ndim < -axis:
        values = values.reshape((1,) * (-axis - values.ndim) + values.shape)
    along = axis % values.ndim
    if any(extent != 1 for place, extent in enumerate(values.shape) if place != along):
        return None
    flat = values.reshape(-1)
    return np.broadcast_to(flat, (size,)) if flat.size in (1, size) else None


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name}


def _float_constant(view: View, name: str) -> Constant | None:
    if not name or not view.is_constant(name):
        return None
    constant = view.constant(name)
    return constant if constant.value.dtype.kind == "f" else None


def _optional_bias(node: onnx.NodeProto, index: int, view: View
                   ) -> tuple[tuple[Array, Rounding], ...] | None:  # fmt: skip
    """() where the node has no such input, None where it is no constant."""
    if len(node.input) <= index or not node.input[index]:
        return ()
    constant = _float_constant(view, node.input[index])
    return None if constant is None else ((constant.value.reshape(-1), constant.rounding),)


def _read_conv(node: onnx.NodeProto, view: View) -> _Linear | None:
    weight = _float_constant(view, node.input[1])
    biases = _optional_bias(node, 2, view)
    if weight is None or biases is None or view.is_constant(node.input[0]):
        return None
    given = _attributes(node)
    kernel = weight.value.shape[2:]
    strides = tuple(given.get("strides") or (1,) * len(kernel))
    dilations = tuple(given.get("dilations") or (1,) * len(kernel))
    auto_pad = (given.get("auto_pad") or b"NOTSET").decode()
    group = int(given.get("group", 1))
    if auto_pad in ("NOTSET", "VALID"):
        pads: Any = window_pads((), kernel, strides, dilations, given.get("pads"), auto_pad)
        blind = any(extent > 0 for pair in pads for extent in pair)
    else:
        pads = auto_pad
        blind = any(extent > 1 for extent in kernel)
    shape = weight.value.shape
    taps = weight.value.reshape(group, shape[0] // group, shape[1], -1)
    settings = ("Conv", group, kernel, strides, dilations, pads)
    return _Linear(
        node.input[0], settings, 1, len(shape), blind, taps, 1.0, weight.rounding, biases
    )


def _read_conv_transpose(node: onnx.NodeProto, view: View) -> _Linear | None:
    weight = _float_constant(view, node.input[1])
    biases = _optional_bias(node, 2, view)
    if weight is None or biases is None or view.is_constant(node.input[0]):
        return None
    given = _attributes(node)
    shape = weight.value.shape
    rank = len(shape) - 2
    group = int(given.get("group", 1))
    taps = weight.value.reshape(group, shape[0] // group, shape[1], -1).swapaxes(1, 2)
    settings = (
        "ConvTranspose", group, shape[2:],
        tuple(given.get("strides") or (1,) * rank),
        tuple(given.get("dilations") or (1,) * rank),
        tuple(given.get("pads") or (0,) * 2 * rank),
        tuple(given.get("output_padding") or (0,) * rank),
        tuple(given.get("output_shape") or ()),
        given.get("auto_pad") or b"NOTSET",
    )  # fmt: skip
    return _Linear(node.input[0], settings, 1, len(shape), True, taps, 1.0, weight.rounding, biases)


def _read_gemm(node: onnx.NodeProto, view: View) -> _Linear | None:
    given = _attributes(node)
    weight = _float_constant(view, node.input[1])
    if weight is None or given.get("transA") or view.is_constant(node.input[0]):
        return None
    alpha, beta = float(given.get("alpha", 1.0)), float(given.get("beta", 1.0))
    matrix = weight.value if given.get("transB") else weight.value.T
    biases: tuple[tuple[Array, Rounding], ...] = ()
    if len(node.input) > 2 and node.input[2]:
        constant = _float_constant(view, node.input[2])
        values = None if constant is None else _per_channel(constant.value, -1, len(matrix), None)
        if constant is None or values is None:
            return None
        biases = ((beta * values, constant.rounding),)
    return _Linear(node.input[0], ("product",), -1, None, False, alpha * matrix[None, :, :, None],
                   alpha, weight.rounding, biases)  # fmt: skip


def _read_matmul(node: onnx.NodeProto, view: View) -> _Linear | None:
    left, right = node.input[0], node.input[1]
    if view.is_constant(right) and not view.is_constant(left):
        weight, source, axis, kind = _float_constant(view, right), left, -1, "product"
    elif view.is_constant(left) and not view.is_constant(right):
        weight, source, axis, kind = _float_constant(view, left), right, -2, "left product"
    else:
        return None
    if weight is None or weight.value.ndim != 2:
        return None
    matrix = weight.value.T if axis == -1 else weight.value
    return _Linear(source, (kind,), axis, None, False, matrix[None, :, :, None], 1.0,
                   weight.rounding, ())  # fmt: skip


_LINEAR_READERS = {
    "Conv": _read_conv,
    "ConvTranspose": _read_conv_transpose,
    "Gemm": _read_gemm,
    "MatMul": _read_matmul,
}


def _channels(gauge: _Carried, axis: int, shape: tuple[int, int]) -> _Carried | None:
    """The gauge as (groups, channels per group) arrays; None if it varies along another axis."""
    parts = []
    for values in (gauge.scale, gauge.origin):
        flat = values.reshape(1) if values.ndim == 0 else None
        if flat is None:
            if values.ndim <= (axis if axis >= 0 else -axis - 1):
                return None
            flat = _per_channel(values, axis, math.prod(shape), values.ndim)
        if flat is None:
            return None
        parts.append(np.broadcast_to(flat, (math.prod(shape),)).reshape(shape))
    return _Carried(parts[0], parts[1])


# ----------------------------------------------------------------------- comparing linear nodes


def _compare_linear(mine: _Linear, theirs: _Linear, inputs: _Carried, outputs: _Carried
                    ) -> tuple[float, str]:  # fmt: skip
    """(worst deviation in units of the rounding, "" or what is wrong)."""
    live = np.isfinite(outputs.scale) & (outputs.scale != 0)
    known = np.isinf(outputs.scale)
    readable = np.isfinite(inputs.scale) & (inputs.scale != 0)
    problem = _linear_premises(mine, inputs, readable, known, live)
    if problem:
        return 0.0, problem
    expected = mine.weight * np.where(live, outputs.scale, 0.0)[:, :, None, None]
    expected /= np.where(readable, inputs.scale, 1.0)[:, None, :, None]
    if not readable.all():
        expected *= readable[:, None, :, None]
    ulps, problem = _compare_weights(expected, theirs, known)
    if problem:
        return ulps, problem
    return ulps, _compare_bias(mine, theirs, inputs, outputs, live, known)


def _linear_premises(mine: _Linear, inputs: _Carried, readable: Array, known: Array, live: Array
                     ) -> str:  # fmt: skip
    """What must hold of the original's weights for the gauges around it to make sense."""
    if readable.all() and not inputs.origin.any() and not known.any():
        return ""
    reads = (mine.weight != 0).any(axis=3) & (live | known)[:, :, None]
    lost = reads & (inputs.scale == 0)[:, None, :]
    if lost.any():
        group, _, channel = np.argwhere(lost)[0]
        return (
            f"it reads input channel {group * inputs.scale.shape[1] + channel}, of which the "
            f"folded graph keeps only a constant."
        )
    shifted = reads & ((inputs.origin != 0) & (inputs.scale != 0))[:, None, :]
    if mine.blind and shifted.any():
        group, _, channel = np.argwhere(shifted)[0]
        return (
            f"input channel {group * inputs.scale.shape[1] + channel} is carried with a shift, but "
            f"zero padding or fewer taps at the border do not shift with it."
        )
    varying = reads & readable[:, None, :] & known[:, :, None]
    if varying.any():
        group, row, _ = np.argwhere(varying)[0]
        return f"output channel {group * known.shape[1] + row} is said to be constant; it is not."
    return ""


def _compare_weights(expected: Array, theirs: _Linear, known: Array) -> tuple[float, str]:
    size = np.abs(expected)
    excess = np.abs(theirs.weight - expected)
    unit = theirs.rounding.unit
    allowed = size * (unit * ONE_ROUNDING) + theirs.rounding.tiny * abs(theirs.factor)
    wrong = ~(excess <= allowed)
    if known.any():
        wrong &= ~known[:, :, None, None]
        excess = np.where(known[:, :, None, None], 0.0, excess)
    ulps = float(np.max(excess / np.maximum(allowed, np.finfo(np.float64).tiny), initial=0.0))
    if not wrong.any():
        return ulps, ""
    group, row, column, _ = np.unravel_index(
        int(np.argmax(np.where(wrong, _ranked(excess / np.maximum(size, 1e-300)), -1.0))),
        wrong.shape,
    )
    there = (group, row, column)
    return ulps, (
        f"{int(wrong.sum())} of {wrong.size} weights are not the rounding of the exact ones, the "
        f"worst at output channel {group * wrong.shape[1] + row}, input channel "
        f"{group * wrong.shape[2] + column}: {_relative(excess[there], size[there])} away."
    )


def _ranked(values: Array) -> Array:
    return np.nan_to_num(values, nan=np.inf)


def _relative(excess: Array, size: Array) -> str:
    worst = int(np.argmax(_ranked(excess)))
    scale = size.flat[worst]
    if scale:
        return f"{excess.flat[worst] / scale:.2g} of its size"
    return f"{excess.flat[worst]:.2g} where it should be 0"


def _compare_bias(mine: _Linear, theirs: _Linear, inputs: _Carried, outputs: _Carried,
                  live: Array, known: Array) -> str:  # fmt: skip
    seen = np.where(inputs.scale == 0, 0.0, inputs.origin)
    shift, size = np.zeros(live.shape), np.abs(mine.bias)
    if seen.any():
        shift = np.einsum("gmct,gc->gm", mine.weight, seen)
        size = size + np.einsum("gmct,gc->gm", np.abs(mine.weight), np.abs(seen))
    value = mine.bias + shift
    size = size + np.abs(outputs.origin)
    scale = np.where(live, outputs.scale, 1.0)
    expected = np.where(live, scale * (value - outputs.origin), outputs.origin)
    allowed = ARITHMETIC * np.where(live, np.abs(scale) * size, np.abs(outputs.origin))
    for values, rounding in theirs.biases:
        allowed = allowed + rounding.unit * np.abs(values.reshape(live.shape)) + rounding.tiny
    excess = np.abs(theirs.bias - expected)
    wrong = ~(excess <= allowed) & ~known
    if wrong.any():
        at = np.unravel_index(int(np.argmax(np.where(wrong, _ranked(excess), -1.0))), wrong.shape)
        return (
            f"the bias of output channel {at[0] * live.shape[1] + at[1]} is "
            f"{theirs.bias[at]:.9g} and should be {expected[at]:.9g}."
        )
    moves = ~(np.abs(value - outputs.origin) <= ARITHMETIC * size) & known
    if moves.any():
        at = tuple(np.argwhere(moves)[0])
        return (
            f"output channel {at[0] * live.shape[1] + at[1]} is said to be the constant "
            f"{outputs.origin[at]:.9g}; it is {value[at]:.9g}."
        )
    return ""


# --------------------------------------------------------------------------- per-channel maps


@dataclass(frozen=True, eq=False)
class _Map:
    """y = slope * x + shift, arrays that broadcast against the value; `size` bounds the terms
    of shift, `rounding` is that of the constants.
    """

    slope: Array
    shift: Array
    size: Array
    rounding: Rounding


def _read_map(nodes: Sequence[onnx.NodeProto], view: View, source: str, rank: int | None
              ) -> _Map | None:  # fmt: skip
    """A chain of normalizations and arithmetic with constants as one map, or None."""
    zero = np.zeros(())
    total = _Map(np.ones(()), zero, zero, EXACT)
    value = source
    for node in nodes:
        if list(node.input).count(value) != 1 or node.domain:
            return None
        step = _read_step(node, view, value, rank)
        if step is None:
            return None
        total = _Map(
            step.slope * total.slope,
            step.slope * total.shift + step.shift,
            np.abs(step.slope) * total.size + step.size,
            coarsest((total.rounding, step.rounding)),
        )
        value = node.output[0]
    return total


def _read_step(node: onnx.NodeProto, view: View, value: str, rank: int | None) -> _Map | None:
    if node.op_type == "BatchNormalization":
        return _read_normalization(node, view, value, rank)
    one, zero = np.ones(()), np.zeros(())
    if node.op_type == "Identity":
        return _Map(one, zero, zero, EXACT)
    if node.op_type == "Neg":
        return _Map(-one, zero, zero, EXACT)
    if node.op_type not in ("Add", "Sub", "Mul", "Div"):
        return None
    index = list(node.input).index(value)
    constant = _float_constant(view, node.input[1 - index])
    if constant is None or (node.op_type == "Div" and index == 1):
        return None
    c = constant.value
    if node.op_type == "Mul":
        return _Map(c, zero, zero, constant.rounding)
    if node.op_type == "Div":
        with np.errstate(divide="ignore"):
            return _Map(1 / c, zero, zero, constant.rounding)
    if node.op_type == "Add":
        return _Map(one, c, np.abs(c), constant.rounding)
    return _Map(one if index == 0 else -one, -c if index == 0 else c, np.abs(c), constant.rounding)


def _read_normalization(node: onnx.NodeProto, view: View, value: str, rank: int | None
                        ) -> _Map | None:  # fmt: skip
    """gamma (x - mean) / sqrt(var + eps) + beta with stored statistics, else None."""
    given = _attributes(node)
    opset = view.opsets.get("", 1)
    training = (
        bool(given.get("training_mode"))
        if opset >= 14
        else any(node.output[1:]) if opset >= 7 else not given.get("is_test")
    )  # fmt: skip
    spatial = given.get("spatial", 1) or opset >= 9
    if training or not spatial or rank is None or rank < 2 or node.input[0] != value:
        return None
    constants = [_float_constant(view, name) for name in node.input[1:5]]
    if any(constant is None for constant in constants):
        return None
    parameters = [constant for constant in constants if constant is not None]
    gamma, beta, mean, var = (
        constant.value.reshape(-1, *(1,) * (rank - 2)) for constant in parameters
    )
    slope = gamma / np.sqrt(var + float(given.get("epsilon", 1e-5)))
    rounding = coarsest(constant.rounding for constant in parameters)
    return _Map(slope, beta - slope * mean, np.abs(beta) + np.abs(slope * mean), rounding)


def _compare_maps(mine: _Map, theirs: _Map, inputs: _Carried, outputs: _Carried
                  ) -> tuple[float, str]:  # fmt: skip
    """(worst deviation in roundings, "" or what is wrong) for y = a x + b read and written.

    With both scales finite: a~ = scale_y a / scale_x, b~ = scale_y (a origin_x + b - origin_y).
    """
    a, b, a2, b2, sx, ox, sy, oy = np.broadcast_arrays(
        mine.slope, mine.shift, theirs.slope, theirs.shift, inputs.scale, inputs.origin,
        outputs.scale, outputs.origin,
    )  # fmt: skip
    x_free, x_known, y_free, y_known = sx == 0, np.isinf(sx), sy == 0, np.isinf(sy)
    varies = ~x_free & ~x_known
    live = ~y_free & ~y_known
    unit = ROUNDINGS_PER_MAP * theirs.rounding.unit
    with np.errstate(all="ignore"):
        slope = np.where(live & varies, sy * a / sx, 0.0)
        value = np.where(x_free, b, a * ox + b)
        wanted = np.where(live, sy * (value - oy), oy)
        found = np.where(x_free, a2 * ox + b2, b2)
        size = np.abs(a * ox) + mine.size + np.abs(oy)
        reach = np.where(live, np.abs(sy) * size, np.abs(oy))
        slopes = np.abs(a2 - slope) / ((unit + EVALUATION) * np.abs(slope))
        terms = theirs.size + np.abs(b2) + np.abs(a2 * np.where(x_free, ox, 0.0))
        shifts = np.abs(found - wanted) / (unit * terms + ARITHMETIC * reach)
        checks = {
            "its factor": np.where((a2 == slope) | x_free | y_known, 0.0, slopes),
            "its shift": np.where((found == wanted) | y_known, 0.0, shifts),
        }
        lost = (a != 0) & ((x_free & ~y_free) | (varies & y_known))
        moved = y_known & ~(np.abs(value - oy) <= ARITHMETIC * size)
    ulps = float(np.max(checks["its factor"], initial=0.0)) * ROUNDINGS_PER_MAP
    if theirs.rounding is EXACT:
        ulps = 0.0
    if lost.any() or moved.any():
        return ulps, (
            f"channel {_channel(lost | moved, sx.shape)} is said to be constant; it is not."
        )
    for what, excess in checks.items():
        wrong = ~(excess <= 1)
        if wrong.any():
            got, should = (a2, slope) if what == "its factor" else (found, wanted)
            at = tuple(np.argwhere(wrong)[0])
            return ulps, (
                f"{what} of channel {_channel(wrong, sx.shape)} is {got[at]:.9g} in the folded "
                f"graph and should be {should[at]:.9g} ({int(wrong.sum())} of {wrong.size} wrong)."
            )
    return ulps, ""


def _channel(wrong: Array, shape: tuple[int, ...]) -> str:
    """The first wrong position, along the axes on which the map varies."""
    at = np.argwhere(wrong)[0] if wrong.ndim else ()
    varying = [str(i) for i, size in zip(at, shape, strict=True) if size > 1]
    return ", ".join(varying) or "0"


# -------------------------------------------------------------------------------------- probes

POINTWISE = frozenset(
    ("Relu", "LeakyRelu", "PRelu", "Abs", "Neg", "Identity", "Dropout", "Add", "Sub", "Mul",
     "Div", "Max", "Min", "Sum", "Mean", "Clip", "Where", "Sign", "Cast", "Concat", "Elu",
     "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "BatchNormalization")
)  # fmt: skip
POOLS = frozenset(("MaxPool", "AveragePool", "LpPool"))
GLOBAL_POOLS = frozenset(("GlobalAveragePool", "GlobalMaxPool"))


def _probe_shapes(proof: _Proof, found: Match) -> dict[str, tuple[int, ...]]:
    """A concrete shape for every source; small where the operator does not look at the size."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in found.sources:
        known, integer = proof.shapes.of(name), proof.shapes.integer(name)
        shape = known.shape if known else None
        if integer is not None:
            shape = integer.shape
        if shape is None:
            shape = _guess(proof, found, name)
        if shape is None:
            raise NoReferenceError(
                f"the shape of '{name}' is not known; give the shape of the model's inputs"
            )
        shapes[name] = shape
    return _reduced(proof, found, shapes)


def _guess(proof: _Proof, found: Match, name: str) -> tuple[int, ...] | None:
    """Without an inferred shape: from the gauges around a pointwise node."""
    if any(node.op_type not in POINTWISE | POOLS | GLOBAL_POOLS for node in found.original):
        return None
    arrays = [
        array
        for value in (name, *found.outputs)
        for array in (proof.gauge(value).scale, proof.gauge(value).origin)
        if array.ndim
    ]
    if not arrays or any(node.op_type == "Concat" for node in found.original):
        return None
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    small = 2 if all(node.op_type in POINTWISE for node in found.original) else 16
    return tuple(size if size > 1 else small for size in shape)


def _reduced(proof: _Proof, found: Match, shapes: dict[str, tuple[int, ...]]
             ) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """The same shapes with the axes cut down that neither the operator nor a gauge looks at."""
    nodes = (*found.original, *found.folded)
    small = POINTWISE | POOLS | GLOBAL_POOLS | {"Transpose"}
    ranks = {len(shape) for shape in shapes.values()}
    if len(ranks) != 1 or any(node.op_type not in small for node in nodes):
        return shapes
    rank = ranks.pop()
    needs = _needs(found, rank)
    if needs is None:
        return shapes
    fixed = _fixed_axes(proof, found, rank)
    return {
        name: tuple(
            size if axis in fixed else _smaller(size, *needs[axis])
            for axis, size in enumerate(shape)
        )
        for name, shape in shapes.items()
    }


def _smaller(size: int, least: int, stride: int) -> int:
    """At least `least`, at most `size`, and with the remainder that `size` leaves over stride."""
    return min(size, least + (size - least) % stride)


def _needs(found: Match, rank: int) -> list[tuple[int, int]] | None:
    """Per axis: the least size that shows every border case, and the stride."""
    needs = [(2, 1)] * rank
    windowed = [n for n in found.original if n.op_type in POOLS | GLOBAL_POOLS | {"Transpose"}]
    if len(windowed) > 1 or (windowed and len(found.original) > 1):
        return None
    for node in windowed:
        given = _attributes(node)
        for axis in range(2, rank):
            if node.op_type in POOLS:
                kernel = given["kernel_shape"][axis - 2]
                stride = (given.get("strides") or [1] * rank)[axis - 2]
                dilation = (given.get("dilations") or [1] * rank)[axis - 2]
                needs[axis] = ((kernel - 1) * dilation + 1 + 2 * stride, stride)
            elif node.op_type in GLOBAL_POOLS:
                needs[axis] = (3, 1)
    return needs


def _fixed_axes(proof: _Proof, found: Match, rank: int) -> set[int]:
    """Axes along which a gauge or a constant varies, or on which the operator acts."""
    fixed: set[int] = set()

    def keep(shape: Sequence[int], order: Sequence[int] | None = None) -> None:
        for axis, size in enumerate(shape):
            if size > 1:
                place = axis + rank - len(shape)
                fixed.add(order[place] if order else place)

    order = None
    for view, nodes in ((proof.original, found.original), (proof.folded, found.folded)):
        for node in nodes:
            given = _attributes(node)
            if node.op_type == "Transpose":
                order = list(given.get("perm") or range(rank)[::-1])
            if node.op_type == "Concat":
                fixed.add(given["axis"] % rank)
            if node.op_type == "BatchNormalization":
                fixed.add(1)
                continue
            for name in node.input:
                if name and view.is_constant(name):
                    keep(view.constant(name).value.shape)
    for name in (*found.sources, *found.outputs):
        gauge = proof.gauge(name)
        for array in (gauge.scale, gauge.origin):
            keep(array.shape, order if name in found.outputs else None)
    return fixed


def _draw(proof: _Proof, found: Match, shapes: Mapping[str, tuple[int, ...]],
          rng: np.random.Generator) -> tuple[dict[str, Array], dict[str, Array]]:  # fmt: skip
    """Random x by name in the original, and the x~ that belong to them by name in the folded.

    Half of the elements are drawn around zero of x~ and half around zero of x, in two sizes, so
    that both sides of a kink are met. Values that are one tensor in the folded graph agree.
    """
    originals: dict[str, Array] = {}
    carried: dict[str, Array] = {}
    for name in found.sources:
        there, gauge = proof.rename(name), proof.gauge(name)
        discrete = _draw_discrete(proof, found, name, shapes[name], rng)
        if discrete is not None:
            if not gauge.is_identity:
                raise NoReferenceError(f"'{name}' has a gauge, but it is no float")
            originals[name] = carried[there] = discrete
            continue
        free = rng.standard_normal(shapes[name]) * rng.choice([1.0, 8.0], shapes[name])
        finite = np.isfinite(gauge.scale) & (gauge.scale != 0)
        scale = np.where(finite, gauge.scale, 1.0)
        if there in carried:
            x = gauge.origin + carried[there] / scale
        else:
            centre = rng.random(shapes[name]) < 0.5
            x = np.where(centre, free, gauge.origin + free / scale)
            z = np.where(finite, scale * (x - gauge.origin), free)
            carried[there] = np.where(gauge.scale == 0, gauge.origin, z)
        originals[name] = np.where(
            finite, x, np.where(gauge.scale == 0, rng.standard_normal(x.shape), gauge.origin)
        )
    return originals, carried


def _draw_discrete(proof: _Proof, found: Match, name: str, shape: tuple[int, ...],
                   rng: np.random.Generator) -> Array | None:  # fmt: skip
    """None for a float; integers and booleans: what the shapes fix, every row of a constant table
    that is indexed, else 0 and 1.
    """
    fixed, known = proof.shapes.integer(name), proof.shapes.of(name)
    if fixed is not None:
        return fixed
    if known is None or not known.elem_type or known.elem_type in FLOAT_TYPES:
        return None
    dtype = onnx.helper.tensor_dtype_to_np_dtype(known.elem_type)
    for node in found.original:
        table = node.input[0] if node.op_type == "Gather" else ""
        if table and proof.original.is_constant(table) and node.input[1] == name and shape:
            axis = int(_attributes(node).get("axis", 0))
            rows = proof.original.constant(table).value.shape[axis]
            return np.arange(rows, dtype=dtype).reshape((1,) * (len(shape) - 1) + (rows,))
    return rng.integers(0, 2, shape).astype(dtype)


def _absolute(values: Mapping[str, Array]) -> dict[str, Array]:
    return {
        name: np.abs(value) if value.dtype.kind == "f" else value for name, value in values.items()
    }


def _run(nodes: Sequence[onnx.NodeProto], view: View, values: Mapping[str, Array],
         absolute: bool = False) -> dict[str, Array]:  # fmt: skip
    """All values that the nodes compute in float64, the given ones included.

    absolute: with the magnitudes of all constants and Sub as Add, which bounds what the sums
    inside add up for the operators that are monotone.
    """
    known: dict[str, Array] = dict(values)
    for node in nodes:
        if absolute:
            results = view.evaluate(_additive(node), known, alter=_magnitude)
        else:
            results = view.evaluate(node, known)
        known.update(zip(node.output, results, strict=False))
    return known


def _magnitude(value: Array) -> Array:
    return np.abs(value) if value.dtype.kind == "f" else value


def _additive(node: onnx.NodeProto) -> onnx.NodeProto:
    if node.op_type != "Sub":
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.op_type = "Add"
    return copy


def _compare_probe(
    gauge: _Carried,
    y: Array,
    z: Array | None,
    size: Array,
    written: Array | None,
    rounding: Rounding,
) -> tuple[str, float]:
    """("" or what is wrong, the worst deviation over what was allowed)."""
    if z is None:
        if not np.all(np.isinf(gauge.scale)):
            return "the folded graph does not compute it.", math.inf
        z = np.zeros(y.shape)
    if y.shape != z.shape:
        return f"the shape is {z.shape} and should be {y.shape}.", math.inf
    if y.dtype.kind != "f":
        same = np.array_equal(y, z)
        return ("" if same else "the values are not the same."), 0.0 if same else math.inf
    scale = np.broadcast_to(gauge.scale, y.shape)
    free, known = scale == 0, np.isinf(scale)
    finite = np.where(free | known, 1.0, scale)
    wanted = np.where(free, gauge.origin, finite * (y - gauge.origin))
    bound = np.abs(y) + np.abs(gauge.origin) + np.nan_to_num(np.abs(size))
    allowed = EVALUATION * (np.abs(finite) * bound + np.abs(z))
    if written is not None:
        rounded = np.abs(z) + np.nan_to_num(np.abs(written))
        allowed = allowed + ROUNDINGS_PER_MAP * (rounding.unit * rounded + rounding.tiny)
    excess = np.where(known, np.abs(y - gauge.origin), np.abs(z - wanted))
    excess = np.where((z == wanted) & ~known, 0.0, excess)
    wrong = ~(excess <= allowed)
    with np.errstate(all="ignore"):
        worst = float(np.max(_ranked(np.where(wrong, excess / allowed, 0.0)), initial=0.0))
    if not wrong.any():
        if y.size and not np.isfinite(y).any():
            return "nothing but NaN and infinity came out.", math.inf
        return "", worst
    at = tuple(np.argwhere(wrong)[0])
    place = ", ".join(str(int(index)) for index in at)
    return (
        f"element ({place}) is {z[at]:.9g} in the folded graph and should be {wanted[at]:.9g} "
        f"({int(wrong.sum())} of {wrong.size} wrong).",
        worst,
    )
