"""Two graphs side by side: what is constant in each, which nodes answer to which.

For the certificate. `View` reads one graph: producers, and constants together with the rounding of
the dtype that they are stored in. `match` finds, for a node of the original, the piece of the
folded graph that computes the same value from the same sources. `Gauge` and `Carried` say how the
folded graph carries a value. Nothing here knows how a fold is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto
from onnx_ir.passes.common import InlinePass

from bnfold.proof.exact.reference import NodeReference, NoReferenceError, widen

Array = np.ndarray[Any, np.dtype[Any]]

UNPREDICTABLE = frozenset(
    ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli",
     "Multinomial", "Dropout")
)  # fmt: skip
REGION_LIMIT = 24  # nodes that one node of the original may have become, and the reverse


def replaceable_inputs(model: onnx.ModelProto) -> frozenset[str]:
    """Initializers that are inputs too, so that a caller may give another value.

    Before IR 4 every initializer had to be listed as an input, which says nothing.
    """
    if model.ir_version < 4:
        return frozenset()
    names = {tensor.name for tensor in model.graph.initializer}
    return frozenset(value.name for value in model.graph.input if value.name in names)


def with_functions_inlined(original: onnx.ModelProto, folded: onnx.ModelProto) -> onnx.ModelProto:
    """The original with those local functions in place that the folded model no longer has."""
    kept = {(f.domain, f.name, f.overload) for f in folded.functions}
    gone = {(f.domain, f.name, f.overload) for f in original.functions} - kept
    if not gone:
        return original
    model = ir.from_proto(original)
    try:
        InlinePass(criteria=lambda function: function.identifier() in gone)(model)
    except Exception:  # then the functions are not the same, which is a failed record
        return original
    return ir.to_proto(model)


class Rounding(NamedTuple):
    """Rounding to nearest: |fl(x) - x| <= unit * |x|, or tiny where x is subnormal."""

    unit: float
    tiny: float


ROUNDINGS = {
    # float64 is recomputed in another order of operations, so a few units are granted
    TensorProto.DOUBLE: Rounding(2.0**-50, 0.0),
    TensorProto.FLOAT: Rounding(2.0**-24, 2.0**-150),
    TensorProto.FLOAT16: Rounding(2.0**-11, 2.0**-25),
    TensorProto.BFLOAT16: Rounding(2.0**-8, 2.0**-134),
}
EXACT = Rounding(0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Constant:
    """A value that the graph fixes.

    value: float64 where it is a float (exactly what the stored parameters mean).
    rounding: of the coarsest float dtype on its way from the initializers (EXACT: no floats).
    stored: True when it is an initializer or a Constant itself, not computed from some.
    """

    value: Array
    rounding: Rounding
    stored: bool


def coarsest(roundings: Iterable[Rounding]) -> Rounding:
    """The greatest of these roundings, EXACT for none."""
    return max(roundings, default=EXACT, key=lambda rounding: rounding.unit)


class View:
    """One graph, or the body of a control-flow node, as the certificate reads it."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        opsets: Mapping[str, int],
        functions: Sequence[onnx.FunctionProto] = (),
        *,
        replaceable: frozenset[str] = frozenset(),
        outer: View | None = None,
    ):
        self.graph = graph
        self.opsets = opsets
        self.functions = functions
        self.outer = outer
        self.replaceable = replaceable
        # the wrappers are kept: protobuf makes new ones, with other ids, once they are gone
        self.nodes = list(graph.node)
        self.order = {id(node): index for index, node in enumerate(self.nodes)}
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self.inputs = [value.name for value in graph.input]
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._computed: dict[str, Constant] = {}
        self._evaluators: dict[int, NodeReference] = {}
        self._fixed = dict.fromkeys(self.inputs, False)
        self._fixed.update((name, name not in replaceable) for name in self.initializers)
        for node in self.nodes:  # in order of evaluation: a network is deeper than a stack of calls
            self._fixed.update(
                dict.fromkeys(filter(None, node.output), self._gives_constants(node))
            )

    @staticmethod
    def of(model: onnx.ModelProto, replaceable: frozenset[str] = frozenset()) -> View:
        """The main graph of a model; `replaceable` initializers are inputs, not constants."""
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        return View(model.graph, opsets, model.functions, replaceable=replaceable)

    def body(self, graph: onnx.GraphProto) -> View:
        """A subgraph of one of this graph's nodes, which sees this graph's values."""
        return View(graph, self.opsets, self.functions, outer=self)

    def knows(self, name: str) -> bool:
        """True when a value of this name exists here or in an enclosing graph."""
        here = name in self.producers or name in self.inputs or name in self.initializers
        return here or (self.outer is not None and self.outer.knows(name))

    def is_constant(self, name: str) -> bool:
        """True for an initializer, a Constant, and what deterministic operators make of them."""
        if name in self._fixed:
            return self._fixed[name]
        return bool(self.outer and self.outer.is_constant(name))

    def _gives_constants(self, node: onnx.NodeProto) -> bool:
        if node.op_type in UNPREDICTABLE or any(a.HasField("g") for a in node.attribute):
            return False
        given = [source for source in node.input if source]
        is_literal = node.op_type == "Constant" and not node.domain
        return is_literal or (bool(given) and all(self.is_constant(source) for source in given))

    def constant(self, name: str) -> Constant:
        """The value of a constant. Raises NoReferenceError where it cannot be computed."""
        if name in self.initializers:
            return _from_tensor(self.initializers[name])  # not kept: it would double the weights
        if name not in self._computed:
            node = self.producers.get(name)
            if node is None:
                assert self.outer is not None, f"{name} is no constant"
                return self.outer.constant(name)
            self._computed[name] = self._compute(node, name)
        return self._computed[name]

    def _compute(self, node: onnx.NodeProto, name: str) -> Constant:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                return _from_tensor(attribute.t)
        value = np.asarray(self.evaluate(node, {})[list(node.output).index(name)])
        if node.op_type == "Constant":
            is_float = value.dtype.kind == "f"
            rounding = ROUNDINGS[TensorProto.FLOAT] if is_float else EXACT
            return Constant(value, rounding, stored=True)
        roundings = [self.constant(given).rounding for given in node.input if given]
        to = next((a.i for a in node.attribute if a.name == "to"), None)
        if node.op_type == "Cast" and to in ROUNDINGS:
            roundings.append(ROUNDINGS[to])
        return Constant(value, coarsest(roundings), stored=False)

    def evaluate(self, node: onnx.NodeProto, values: Mapping[str, Array | None],
                 alter: Callable[[Array], Array] | None = None) -> list[Any]:  # fmt: skip
        """The node's outputs in float64; inputs from `values`, else this graph's constants.

        alter: applied to the constants among the inputs. Raises NoReferenceError.
        """
        arguments: list[Array | None] = []
        for name in node.input:
            if not name:
                arguments.append(None)
            elif name in values:
                arguments.append(values[name])
            elif self.is_constant(name):
                constant = self.constant(name).value
                arguments.append(alter(constant) if alter else constant)
            else:
                raise NoReferenceError(f"the value '{name}' is not known")
        if id(node) not in self.order:  # a copy, which will not live long enough to be known by id
            return NodeReference(node, self.opsets, self.functions)(*arguments)
        if id(node) not in self._evaluators:
            self._evaluators[id(node)] = NodeReference(node, self.opsets, self.functions)
        return self._evaluators[id(node)](*arguments)

    def sources(self, node: onnx.NodeProto) -> list[str]:
        """The node's inputs that are no constants, each once."""
        found = dict.fromkeys(name for name in node.input if name and not self.is_constant(name))
        return list(found)

    def label(self, node: onnx.NodeProto) -> str:
        """How a message names the node."""
        return str(node.name or next((name for name in node.output if name), node.op_type))


def _from_tensor(tensor: TensorProto) -> Constant:
    rounding = ROUNDINGS.get(tensor.data_type, EXACT)
    return Constant(widen(onnx.numpy_helper.to_array(tensor)), rounding, stored=True)


def rests(node: onnx.NodeProto, view: View) -> bool:
    """Dropout that drops nothing: no training mode, which is input 2 from opset 12 on."""
    mode = node.input[2] if len(node.input) > 2 else ""
    if not mode:
        return True
    return view.is_constant(mode) and not np.any(view.constant(mode).value)


def same_constant(name: str, view: View, other_name: str, other: View) -> bool:
    """Equal bit for bit as stored; a computed one may differ by the rounding of its dtype."""
    first, second = view.initializers.get(name), other.initializers.get(other_name)
    if first is not None and second is not None:
        if first.data_type != second.data_type or list(first.dims) != list(second.dims):
            return False
        if first.raw_data and first.raw_data == second.raw_data:
            return True
    a, b = view.constant(name), other.constant(other_name)
    if a.value.shape != b.value.shape or a.value.dtype.kind != b.value.dtype.kind:
        return False
    if a.value.tobytes() == b.value.tobytes():
        return True
    if (a.stored and b.stored) or a.value.dtype.kind != "f":
        return False
    unit = 4 * coarsest((a.rounding, b.rounding)).unit
    return bool(np.all(np.abs(a.value - b.value) <= unit * np.abs(a.value)))


# -------------------------------------------------------------------------------------- gauges


class Gauge(Protocol):
    """How the folded graph carries a value: x~ = scale * (x - origin), arrays of its rank."""

    @property
    def scale(self) -> Array:
        """Per-channel factor; 0: written constant, inf: known constant."""

    @property
    def origin(self) -> Array:
        """What the original value is where the folded one is zero."""


@dataclass(frozen=True, eq=False)
class Carried:
    """A gauge as float64 arrays."""

    scale: Array
    origin: Array

    @staticmethod
    def by(gauge: Gauge | None) -> Carried:
        """As the gauge says; without one, the value itself."""
        if gauge is None:
            return AS_IT_IS
        return Carried(np.asarray(gauge.scale, np.float64), np.asarray(gauge.origin, np.float64))

    @property
    def is_identity(self) -> bool:
        """True when the folded graph carries the value itself."""
        return bool(np.all(self.scale == 1) and np.all(self.origin == 0))

    @property
    def is_usable(self) -> bool:
        """Numbers, finite but for scales that are inf, in arrays that broadcast together."""
        if np.isnan(self.scale).any() or not np.isfinite(self.origin).all():
            return False
        try:
            np.broadcast_shapes(self.scale.shape, self.origin.shape)
        except ValueError:
            return False
        return True

    @property
    def is_known(self) -> bool:
        """True when the original is a known constant everywhere: the folded graph needs none."""
        return bool(np.all(np.isinf(self.scale)))


AS_IT_IS = Carried(np.ones(()), np.zeros(()))


# ------------------------------------------------------------------------------- counterparts


@dataclass(frozen=True)
class Match:
    """Nodes of the original, nodes of the folded graph, and what both compute from what.

    sources: values of the original that both sides start from; outputs: those they arrive at.
    """

    original: tuple[onnx.NodeProto, ...]
    folded: tuple[onnx.NodeProto, ...]
    sources: tuple[str, ...]
    outputs: tuple[str, ...]


class Unmatched(Exception):  # noqa: N818  an outcome of the search, not a failure of ours
    """No piece of the folded graph answers to the node; the message is the sentence."""


def match(
    node: onnx.NodeProto,
    outputs: Sequence[str],
    original: View,
    folded: View,
    rename: Callable[[str], str],
    carried: frozenset[str],
    idle: Callable[[str], bool],
) -> Match:
    """The folded nodes that compute `outputs` of `node` from what the node reads.

    rename: value of the original -> its name in the folded graph. carried: the folded names of
    all values of the original, where a walk through the folded graph stops. idle: values that
    need no tensor in the folded graph. A value that the folded graph no longer has (the product
    between MatMul and Add that became one Gemm) is replaced by what it is computed from.
    Raises Unmatched.
    """
    starts = [rename(name) for name in outputs if not idle(name)]
    pieces = [node]
    sources = original.sources(node)
    if len(outputs) == 1 and starts and starts[0] in {rename(name) for name in sources}:
        return Match((node,), (), tuple(sources), tuple(outputs))
    region, reached = _walk(starts, folded, carried)
    while True:
        strangers = reached - {rename(name) for name in sources}
        lost = [
            name
            for name in sources
            if name in original.producers
            and (rename(name) not in reached if strangers else _is_gone(name, folded, rename, idle))
        ]
        if not strangers and not lost:
            break
        if not lost or len(pieces) >= REGION_LIMIT:
            strange = sorted(strangers or {rename(name) for name in lost})[0]
            raise Unmatched(
                f"in the folded graph it is computed from '{strange}', which the original does "
                f"not read there"
            )
        producer = original.producers[lost[0]]
        if producer not in pieces:
            pieces.append(producer)
        kept = [name for name in sources if name not in producer.output]
        sources = list(dict.fromkeys([*kept, *original.sources(producer)]))
    pieces.sort(key=lambda piece: original.order[id(piece)])
    return Match(tuple(pieces), tuple(region), tuple(sources), tuple(outputs))


def _is_gone(
    name: str, folded: View, rename: Callable[[str], str], idle: Callable[[str], bool]
) -> bool:
    """True for a value that the folded graph would need and no longer has."""
    return not idle(name) and not folded.knows(rename(name))


def _walk(starts: Sequence[str], folded: View, carried: frozenset[str]
          ) -> tuple[list[onnx.NodeProto], set[str]]:  # fmt: skip
    """The nodes behind `starts` in order of execution, and the carried values that they read."""
    region: list[onnx.NodeProto] = []
    reached: set[str] = set()
    pending = list(starts)
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in carried and name not in starts:
            reached.add(name)
        elif not folded.is_constant(name):
            producer = folded.producers.get(name)
            if producer is None:
                raise Unmatched(
                    f"the folded graph has no tensor '{name}'"
                    if not folded.knows(name)
                    else f"the folded graph takes it from the input '{name}'"
                )
            if producer not in region:
                region.append(producer)
                pending.extend(given for given in producer.input if given)
        if len(region) > REGION_LIMIT:
            raise Unmatched("no small piece of the folded graph computes it")
    region.sort(key=lambda piece: folded.order[id(piece)])
    return region, reached


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The node's attributes by name, as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name}


def attributes_equal(a: onnx.NodeProto, b: onnx.NodeProto) -> bool:
    """The same attributes with the same values, subgraphs aside."""

    def plain(node: onnx.NodeProto) -> dict[str, bytes]:
        return {
            attribute.name: attribute.SerializeToString(deterministic=True)
            for attribute in node.attribute
            if not attribute.HasField("g") and not attribute.graphs and attribute.name
        }

    first, second = plain(a), plain(b)
    for values in (first, second):
        values.pop("doc_string", None)
    return first == second
