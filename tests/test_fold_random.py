"""Random graphs of every operator: folded right, whatever the planner found to fold.

Three things are asked of each. In exact arithmetic (float64 over dyadic weights, whose folds are
exact in float32 too) every value of the folded network is its gauge of what it was. In float32 on
onnxruntime the folded network is as near to the float64 reference as the original, within a factor.
And the file keeps its face: inputs, outputs, opset, metadata, nothing left to fold.

BNFOLD_FUZZ_EXAMPLES (default 20000) is the number of graphs of the long run.
"""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnfold.errors import InputError
from bnfold.folding.range import Guard
from bnfold.folding.rules import RULES
from bnfold.folding.rules.repairs import REPAIRS
from bnfold.proof.exact.reference import Float64Reference
from tests import folding
from tests.random_graphs import RandomModel, random_model

UNIT = 2.0**-24  # float32 rounds by at most this, relatively
ROUNDING_FACTOR = 4  # of the original's own error; the worst of 1500 graphs needs 1.5
EXACT = 1e-10  # what float64 leaves behind in a network of twenty operators, relatively
EXAMPLES = int(os.environ.get("BNFOLD_FUZZ_EXAMPLES", "20000"))
CHUNKS = 20
STEPS = 20


def float_values(model: onnx.ModelProto, feeds: folding.Feeds) -> dict[str, np.ndarray]:
    """Every float value of the main graph, in float64."""
    names = [name for node in model.graph.node for name in node.output if name]
    values = Float64Reference(model).run(feeds, names)
    return {name: value for name, value in values.items() if value.dtype.kind == "f"}


def largest(values: dict[str, np.ndarray]) -> float:
    return max((float(np.max(np.abs(v), initial=0)) for v in values.values()), default=0.0)


def check_error(made: folding.Fold, feeds: folding.Feeds) -> None:
    """The folded network's error against float64 is that of the original, within a factor.

    An operator rounds relatively to the numbers that it handles. So a network may leave a few units
    of its largest value, however small the output is (two shifts that cancel, a Relu's zeros); the
    largest value of the original, for a fold may not make a network handle larger ones.
    """
    exact = float_values(made.original, feeds)
    size = largest(exact)
    before, after = folding.run(made.original, feeds), folding.run(made.model, feeds)
    for name, original in before.items():
        assert after[name].shape == original.shape
        assert after[name].dtype == original.dtype
        if original.dtype.kind != "f":
            np.testing.assert_array_equal(after[name], original)
            continue
        error = np.max(np.abs(after[name] - exact[name]), initial=0)
        own = np.max(np.abs(original - exact[name]), initial=0)
        assert error <= ROUNDING_FACTOR * max(own, 4 * UNIT * size), f"'{name}' is off by {error:g}"


def has_constants(made: folding.Fold) -> bool:
    """The plan writes or knows a constant (gamma = 0), which changes what a next plan sees."""
    return any(np.any(g.scale == 0) or np.any(np.isinf(g.scale)) for g in made.plan.gauges.values())


def free_extents(model: onnx.ModelProto) -> bool:
    return any(dim.dim_param for v in model.graph.input for dim in v.type.tensor_type.shape.dim)


def check_again(made: folding.Fold) -> None:
    """Nothing is left to fold.

    Left out: the plan's constants are ordinary zero weights in the new file, an Add that took a
    MatMul's shift can take another one, extents may be known that were not, and what was kept for
    its precision may have a neighbour now whose statistics no longer tell.
    """
    again = folding.fold(made.model, repairs=made.plan.repairs, watched=False)
    precise = any("spreads away" in kept.reason for kept in made.plan.kept)
    more_known = has_constants(made) or made.folded.biases or free_extents(made.original) or precise
    more = again.plan.removed or again.plan.absorbed or again.plan.merges
    if more and more_known:
        return
    folding.check_nothing_left(made, again)


def check(case: RandomModel, *, dyadic: bool, algebra: bool = False, repaired: bool = False) -> int:
    """All checks on one graph; the number of batch norms that went.

    algebra: gate A must prove the fold as well. repaired: with every exact repair allowed.
    """
    onnx.checker.check_model(case.proto)
    made = folding.fold(case.proto, repairs=frozenset(REPAIRS) if repaired else frozenset())
    folding.check_counts(made)
    folding.check_interface(made)
    folding.check_shapes(made)
    check_error(made, case.feeds)
    if dyadic:
        folding.check_values(made, case.feeds, tolerance=EXACT)
    if algebra and not free_extents(case.proto):  # a constant may fix what is declared free
        folding.check_algebra(made)
    check_again(made)
    folding.check_undo(made)
    return len(made.plan.removed)


def report(case: RandomModel) -> str:
    return f"this graph is folded wrong:\n{onnx.printer.to_text(case.proto)}"


# --- the short run: hypothesis, which shrinks what it finds --------------------------------------


@st.composite
def models(draw: st.DrawFn, *, dyadic: bool) -> RandomModel:
    seed = draw(st.integers(0, 2**32 - 1))
    steps = draw(st.integers(1, 12))
    return random_model(lambda n: draw(st.integers(0, n - 1)), seed, dyadic=dyadic, steps=steps)


FAST = settings(
    max_examples=75,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@FAST
@given(models(dyadic=True))
def test_dyadic_graphs_are_folded_exactly(case: RandomModel) -> None:
    try:
        check(case, dyadic=True)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{report(case)}") from error


@FAST
@given(models(dyadic=False))
def test_graphs_of_real_numbers_keep_their_accuracy(case: RandomModel) -> None:
    try:
        check(case, dyadic=False)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{report(case)}") from error


# --- the long run: seeds, whose graphs grow by a step at a time ----------------------------------


def seeded(seed: int, steps: int) -> RandomModel:
    """The first steps of the graph of a seed."""
    rng = np.random.default_rng(seed)
    return random_model(lambda n: int(rng.integers(n)), seed, dyadic=seed % 4 != 0, steps=steps)


def fault(seed: int, steps: int) -> str | None:
    """What is wrong with this graph, None if nothing is."""
    case = seeded(seed, steps)
    try:
        check(case, dyadic=seed % 4 != 0, algebra=seed % 5 == 0, repaired=seed % 3 == 0)
    except Exception as error:
        return f"{type(error).__name__}: {error}\n{report(case)}"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_many_graphs(chunk: int) -> None:
    for seed in range(chunk, EXAMPLES, CHUNKS):
        if fault(seed, 2 + seed % STEPS) is None:
            continue
        shortest = next(steps for steps in range(1, STEPS + 2) if fault(seed, steps))
        pytest.fail(f"seed {seed}, {shortest} steps: {fault(seed, shortest)}")


# --- half precision -------------------------------------------------------------------------------


def in_half(case: RandomModel, seed: int) -> RandomModel:
    """The same network in float16, some of its batch norms at the ends of that type's range."""
    rng, proto = np.random.default_rng(seed), onnx.ModelProto()
    proto.CopyFrom(case.proto)
    gammas = {n.input[1] for n in proto.graph.node if n.op_type == folding.BATCH_NORM}
    scales = {n.input[2] for n in proto.graph.node if n.op_type == "Resize"}
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype != np.float32 or tensor.name in scales:
            continue
        if (tensor.name in gammas or array.ndim > 2) and rng.random() < 0.5:
            array = array * 2.0 ** rng.integers(-14, 15)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float16), tensor.name))
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.FLOAT16
            if attribute.HasField("t") and attribute.t.data_type == onnx.TensorProto.FLOAT:
                array = onnx.numpy_helper.to_array(attribute.t).astype(np.float16)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(array, attribute.t.name))
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    feeds = {n: a.astype(np.float16) if a.dtype.kind == "f" else a for n, a in case.feeds.items()}
    return RandomModel(proto, feeds)


def check_half(case: RandomModel) -> int:
    """No weight is infinite, and the folded network is the same up to the rounding of float16."""
    made = folding.fold(case.proto)
    folding.check_counts(made)
    for tensor in made.model.graph.initializer:
        assert np.all(np.isfinite(onnx.numpy_helper.to_array(tensor).astype(float))), tensor.name
    exact, folded = (float_values(m, case.feeds) for m in (made.original, made.model))
    biases = {t.name: onnx.numpy_helper.to_array(t) for t in made.model.graph.initializer}
    size = max(largest(exact), largest({n: a for n, a in biases.items() if a.dtype == np.float16}))
    for output in made.original.graph.output:
        error = np.max(np.abs(exact[output.name] - folded[output.name]), initial=0)
        assert error <= 2.0**-7 * size, f"'{output.name}' is off by {error:g} of {size:g}"
    return len(made.plan.removed)


def test_half_precision_stays_in_its_range() -> None:
    removed = 0
    for seed in range(60):
        case = in_half(seeded(4 * seed + 1, 8), seed)  # dyadic, of one type throughout
        if any(a.HasField("g") for node in case.proto.graph.node for a in node.attribute):
            continue
        try:
            removed += check_half(case)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{report(case)}") from error
    assert removed >= 20


def test_without_the_guard_half_precision_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = in_half(seeded(4 * 12 + 1, 14), 12)
    check_half(case)
    monkeypatch.setattr(Guard, "check", lambda *_: None)
    with pytest.raises(InputError, match="too large for FLOAT16"):
        check_half(case)


# --- the net holds -------------------------------------------------------------------------------


def test_every_row_of_the_table_is_drawn() -> None:
    """A row that no random graph contains would never be tried in company."""
    drawn = {node.op_type for seed in range(1000) for node in seeded(seed, 12).proto.graph.node}
    assert set(RULES) - drawn == set()


def test_most_random_graphs_have_something_to_fold() -> None:
    removed = [check(seeded(seed, 12), dyadic=seed % 4 != 0) for seed in range(1000, 1040)]
    assert sum(count > 0 for count in removed) >= 20


def test_a_wrong_weight_is_caught() -> None:
    caught = 0
    for seed in range(1000, 1040):
        case = seeded(seed, 12)
        made = folding.fold(case.proto)
        before = {t.name: onnx.numpy_helper.to_array(t) for t in case.proto.graph.initializer}
        for tensor in made.model.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor)
            if not np.array_equal(array, before.get(tensor.name, np.zeros(0))):
                wrong = array * np.float32(1.001)
                tensor.CopyFrom(onnx.numpy_helper.from_array(wrong, tensor.name))
        try:
            check_error(made, case.feeds)
        except AssertionError:
            caught += 1
    assert caught >= 15
