"""Fold a model and hold what comes out against what went in: what every fold must pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from bnfold import graph
from bnfold.folding.apply import Folded, apply
from bnfold.folding.plan import FoldPlan, plan
from bnfold.folding.undo import original_graph, undo_of
from bnfold.proof.algebra.certificate import certify
from bnfold.proof.exact.reference import Float64Reference

Feeds = Mapping[str, np.ndarray]
Values = dict[str, np.ndarray]
BATCH_NORM = "BatchNormalization"


@dataclass(frozen=True)
class Fold:
    """A model, its plan, and the folded model."""

    original: onnx.ModelProto
    model: onnx.ModelProto
    plan: FoldPlan
    folded: Folded


def fold(
    original: onnx.ModelProto,
    *,
    absorb: bool = True,
    repairs: frozenset[str] = frozenset(),
    merge: bool = True,
    clean_up: frozenset[str] = frozenset(),
    watched: bool = True,
) -> Fold:
    """Fold; the model that went in must come out of planning and applying byte by byte unchanged.

    watched: look whether it does.
    """
    model = graph.prepare(ir.from_proto(original))
    before = graph.to_bytes(model) if watched else b""
    made = plan(model, absorb=absorb, repairs=repairs, merge=merge, clean_up=clean_up)
    folded = apply(made)
    if watched:
        assert graph.to_bytes(model) == before, "plan or apply changed the model they were given"
    proto = graph.to_proto(folded.model)
    onnx.checker.check_model(proto)
    return Fold(original, proto, made, folded)


def run(model: onnx.ModelProto, feeds: Feeds) -> Values:
    """What onnxruntime computes on one thread of the CPU, with every optimisation off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def evaluate(model: onnx.ModelProto, feeds: Feeds) -> Values:
    """What the float64 reference computes."""
    return Float64Reference(model).run(feeds)


def batch_norms(model: onnx.ModelProto) -> int:
    """The batch norms of the main graph and of its branches."""

    def count(nodes: object) -> int:
        total = 0
        for node in nodes:  # type: ignore[attr-defined]
            total += node.op_type == BATCH_NORM
            total += sum(count(a.g.node) for a in node.attribute if a.HasField("g"))
        return total

    return count(model.graph.node)


def static_values(model: onnx.ModelProto) -> set[str]:
    """The values that no input enters: constants, and what is computed from them alone."""
    static = {""} | {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if all(name in static for name in node.input) and not any(
            attribute.HasField("g") for attribute in node.attribute
        ):
            static.update(node.output)
    return static


# --- the checks ----------------------------------------------------------------------------------


def check_counts(made: Fold) -> None:
    """What the plan says is removed is gone from the file, and nothing else came."""
    assert batch_norms(made.original) - batch_norms(made.model) == len(made.plan.removed)
    before, after = len(made.original.graph.node), len(made.model.graph.node)
    assert after <= before or made.plan.repairs, "the fold adds operators"
    for kept in made.plan.kept:
        assert kept.reason, f"{kept.name} is kept without a reason"


def check_interface(made: Fold) -> None:
    """Names, types, order and shapes of inputs and outputs, opsets and metadata are as before."""
    before, after = made.original, made.model
    held = {tensor.name for tensor in before.graph.initializer}
    still = {tensor.name for tensor in after.graph.initializer}
    assert [v for v in before.graph.input if v.name not in held] == [
        v for v in after.graph.input if v.name not in still
    ]
    assert list(before.graph.output) == list(after.graph.output)
    assert list(before.opset_import) == list(after.opset_import)
    assert list(before.metadata_props) == list(after.metadata_props)
    assert before.ir_version == after.ir_version
    assert before.producer_name == after.producer_name


def check_shapes(made: Fold) -> None:
    """The folded file does not contradict itself: shapes follow from its constants."""
    onnx.shape_inference.infer_shapes(made.model, check_type=True, strict_mode=True)


def check_algebra(made: Fold) -> None:
    """Gate A, which shares nothing with the folder, proves every node."""
    gauges = {str(value.name): gauge for value, gauge in made.plan.gauges.items()}
    certificate = certify(made.original, made.model, gauges, made.folded.aliases)
    assert certificate.passed, [record.sentence for record in certificate.failures]


def check_folding_again(
    made: Fold,
    *,
    absorb: bool = True,
    merge: bool = True,
    clean_up: frozenset[str] = frozenset(),
) -> None:
    """A folded model has nothing left to fold, and folding it changes no byte."""
    repairs = made.plan.repairs
    again = fold(made.model, absorb=absorb, repairs=repairs, merge=merge, clean_up=clean_up)
    check_nothing_left(made, again)


def check_nothing_left(made: Fold, again: Fold) -> None:
    """The second fold removes nothing and writes the file that it was given."""
    assert not again.plan.removed, f"a second fold removes {[r.name for r in again.plan.removed]}"
    assert not again.plan.absorbed, f"a second fold removes {again.plan.absorbed[0].name}"
    assert not again.plan.merges, f"a second fold merges {again.plan.merges[0].result.name}"
    assert again.model.SerializeToString() == made.model.SerializeToString()


def check_values(made: Fold, feeds: Feeds, *, tolerance: float = 0.0) -> int:
    """Every value of the main graph is its gauge of what it was; how many were compared.

    tolerance: what may remain, relative to the largest value of the network.
    """
    gauges = {str(value.name): gauge for value, gauge in made.plan.gauges.items()}
    static = static_values(made.original)
    nodes = made.original.graph.node
    names = [name for node in nodes for name in node.output if name and name not in static]
    there = {name for node in made.model.graph.node for name in node.output}
    there |= {value.name for value in made.model.graph.input}
    now = {name: made.folded.aliases.get(name, name) for name in names}
    now = {name: place for name, place in now.items() if place in there}
    originals = Float64Reference(made.original).run(feeds, list(now))
    folded = Float64Reference(made.model).run(feeds, list(dict.fromkeys(now.values())))
    largest = max((float(np.max(np.abs(v), initial=0)) for v in originals.values()), default=0.0)
    compared = 0
    for name, place in now.items():
        expected = originals[name]
        if expected.dtype.kind != "f":
            continue
        gauge = gauges.get(name)
        readable = np.ones(expected.shape, bool)
        if gauge is not None:
            expected = gauge.write(expected)
            readable = np.broadcast_to(~np.isinf(gauge.scale), expected.shape)
        error = np.abs(expected - folded[place])[readable]
        assert np.max(error, initial=0) <= tolerance * largest, f"'{name}' is not its gauge"
        compared += 1
    return compared


def check_undo(made: Fold) -> None:
    """The folded file, with what its record keeps, gives the original, every bit of it."""
    undo = undo_of(made.plan, made.folded)
    folded = graph.parse_onnx(made.model.SerializeToString())
    assert graph.to_bytes(original_graph(undo, folded)) == graph.to_bytes(made.plan.model)
