"""Exact repairs under gate A, and an input's mean and std as part of the network."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import bnfold
from bnfold.errors import UsageError
from bnfold.folding.rules.repairs import REPAIRS
from bnfold.graph import prepare, to_proto
from bnfold.input_scaling import scale_input
from bnfold.proof.algebra.certificate import certify
from tests import folding
from tests.law_models import Law, build, inputs
from tests.laws import ONE_NUMBER, REPAIRED, X

REPAIRABLE = [law for law in (*REPAIRED, *ONE_NUMBER) if law.removed or law.absorbed]


def repaired(law: Law) -> folding.Fold:
    absorb = law.absorbed is not None
    return folding.fold(build(law), absorb=absorb, repairs=frozenset(law.repairs))


def certificate_holds(made: folding.Fold, model: onnx.ModelProto) -> bool:
    gauges = {str(value.name): gauge for value, gauge in made.plan.gauges.items()}
    return certify(made.original, model, gauges, made.folded.aliases).passed


@pytest.mark.parametrize("law", REPAIRABLE, ids=lambda law: law.name)
def test_gate_a_proves_a_repair_and_finds_one_wrong_number_in_it(law: Law) -> None:
    made = repaired(law)
    assert certificate_holds(made, made.model)
    held = {tensor.name for tensor in made.original.graph.initializer}
    added = [tensor for tensor in made.model.graph.initializer if tensor.name not in held]
    for tensor in added:
        wrong = onnx.ModelProto()
        wrong.CopyFrom(made.model)
        array = numpy_helper.to_array(tensor).copy()
        bounds = np.flatnonzero(np.abs(array) < 1e30)  # not the type's largest: no bound at all
        array.reshape(-1)[bounds[len(bounds) // 2]] += 1e-3 if array.dtype.kind == "f" else 1
        place = next(t for t in wrong.graph.initializer if t.name == tensor.name)
        place.CopyFrom(numpy_helper.from_array(array, tensor.name))
        assert not certificate_holds(made, wrong), tensor.name


def test_every_repair_has_a_case() -> None:
    assert set(REPAIRS) == {name for law in REPAIRABLE for name in law.repairs}


def test_no_repair_is_used_unless_asked_for() -> None:
    for law in REPAIRABLE:
        plain = folding.fold(build(law), absorb=False)
        ours = [node.op_type for node in plain.model.graph.node]
        assert not {"Max", "Min"} & set(ours), law.name


def test_a_repair_that_does_not_exist_is_named() -> None:
    with pytest.raises(UsageError, match="no repair 'clam'"):
        bnfold.fold(build(REPAIRABLE[0]), repair=["clam"])


# --- the input's mean and std --------------------------------------------------------------------

SCALED = Law("scaled input", "", f"{X} > y; y = Conv(x, W[4,4,3,3], B[4])", 0)
PADDED = Law("scaled padded", "", f"{X} > y; y = Conv<pads=[1,1,1,1]>(x, W[4,4,3,3], B[4])", 0)
MEAN, STD = (1.0, -2.0, 3.0, 0.5), (2.0, 0.5, 4.0, 1.0)


@pytest.mark.parametrize(("law", "left"), [(SCALED, []), (PADDED, ["Sub"])], ids=["free", "padded"])
def test_mean_and_std_of_an_input_fold_into_the_first_layer(law: Law, left: list[str]) -> None:
    plain = build(law)
    scaled = scale_input(prepare(bnfold.fold(plain).original), MEAN, STD)
    result = bnfold.fold(scaled)
    assert [node.op_type for node in result.graph.graph] == [*left, "Conv"]
    x = inputs(plain)["x"]
    column = (1, 4, 1, 1)
    raw = x * np.reshape(STD, column) + np.reshape(MEAN, column)
    expected = folding.run(plain, {"x": x})["y"]
    found = folding.run(to_proto(result.graph), {"x": raw.astype(np.float32)})["y"]
    np.testing.assert_array_equal(found, expected)


def test_one_number_serves_all_channels() -> None:
    scaled = scale_input(prepare(bnfold.fold(build(SCALED)).original), [2.0], [0.5])
    assert [node.op_type for node in bnfold.fold(scaled).graph.graph] == ["Conv"]


@pytest.mark.parametrize(
    ("mean", "std", "name", "word"),
    [
        ((1.0, 2.0), (1.0,), None, "4 channels"),
        ((1.0,), (0.0,), None, "above 0"),
        ((float("nan"),), (1.0,), None, "finite"),
        ((1.0,), (1.0,), "z", "no input of floats 'z'"),
    ],
)
def test_numbers_that_do_not_fit_an_input_are_refused(
    mean: tuple[float, ...], std: tuple[float, ...], name: str | None, word: str
) -> None:
    model = prepare(bnfold.fold(build(SCALED)).original)
    with pytest.raises(UsageError, match=word):
        scale_input(model, mean, std, name)
