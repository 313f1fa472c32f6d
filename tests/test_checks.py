"""The checks of the folding tests bite: each is shown a fault of the kind that it is there for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bnfold.folding.affine import Gauge
from tests import folding
from tests.law_models import Law, build, inputs
from tests.test_rules import check_law

LAW = Law(
    "checks",
    "Conv",
    "x[4,4,4,4] > y; c = Conv(x, W[4,4,1,1]); b = BN4(c); r = Relu(b); y = Conv(r, V[4,4,1,1])",
    1,
)


@pytest.fixture
def made() -> folding.Fold:
    return folding.fold(build(LAW))


def test_the_checks_pass_what_is_right(made: folding.Fold) -> None:
    folding.check_counts(made)
    folding.check_interface(made)
    folding.check_shapes(made)
    assert folding.check_values(made, inputs(made.original)) >= 3
    folding.check_folding_again(made)


def rename_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = model.graph.node[-1].output[0] = "other"


def loosen_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[0].ClearField("dim_value")


def raise_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version += 1


def drop_metadata(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


@pytest.mark.parametrize("fault", [rename_output, loosen_output, raise_opset, drop_metadata])
def test_a_changed_interface_is_caught(
    made: folding.Fold, fault: Callable[[onnx.ModelProto], None]
) -> None:
    fault(made.model)
    with pytest.raises(AssertionError):
        folding.check_interface(made)


def test_a_batch_norm_that_is_still_there_is_caught(made: folding.Fold) -> None:
    with pytest.raises(AssertionError):
        folding.check_counts(replace(made, model=made.original))


def test_operators_that_come_are_caught(made: folding.Fold) -> None:
    for name in ("p", "q"):
        made.model.graph.node.append(onnx.helper.make_node("Identity", ["x"], [name]))
    with pytest.raises(AssertionError, match="adds operators"):
        folding.check_counts(made)


def test_a_constant_of_another_shape_is_caught(made: folding.Fold) -> None:
    weight = made.model.graph.initializer[0]
    array = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(array[:3], weight.name))
    with pytest.raises(Exception, match=r"[Ss]hape"):
        folding.check_shapes(made)


def test_a_wrong_gauge_is_caught(made: folding.Fold) -> None:
    value, gauge = next(iter(made.plan.gauges.items()))
    wrong = {**made.plan.gauges, value: Gauge(2 * gauge.scale, gauge.origin)}
    with pytest.raises(AssertionError, match="not its gauge"):
        folding.check_values(
            replace(made, plan=replace(made.plan, gauges=wrong)), inputs(made.original)
        )


def test_a_wrong_alias_is_caught(made: folding.Fold) -> None:
    folded = replace(made.folded, aliases={"b": "r"})
    with pytest.raises(AssertionError, match="not its gauge"):
        folding.check_values(replace(made, folded=folded), inputs(made.original))


def test_something_left_to_fold_is_caught(made: folding.Fold) -> None:
    with pytest.raises(AssertionError, match="second fold"):
        folding.check_folding_again(replace(made, model=made.original))


def test_a_plan_that_touches_the_model_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = folding.plan

    def meddling(model: object, **options: object) -> object:
        model.graph.name = "meddled"  # type: ignore[attr-defined]
        return plan(model, **options)

    monkeypatch.setattr(folding, "plan", meddling)
    with pytest.raises(AssertionError, match="changed the model"):
        folding.fold(build(LAW))


ZEROS = "x[4,4] > y; c = Sub(x, x); b = MatMul(c, W[4,4]); y = BN4:altscale(b)"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (replace(LAW, removed=0), "assert 1 == 0"),
        (replace(LAW, op="Add"), "no gauge went through Add"),
        (replace(LAW, kept=("padding",)), r"\[\]"),
        (replace(LAW, graph=ZEROS, op=""), "only zeros"),
    ],
)
def test_a_law_that_says_what_is_not_so_fails(wrong: Law, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_law(wrong)


def test_a_weight_that_is_off_by_one_unit_is_caught(made: folding.Fold) -> None:
    weight = made.model.graph.initializer[0]
    array = numpy_helper.to_array(weight)
    off = np.where(array == 0, array, np.nextafter(array, np.float32(9)))
    weight.CopyFrom(numpy_helper.from_array(off, weight.name))
    feeds = inputs(made.original)
    with pytest.raises(AssertionError):
        folding.check_values(made, feeds)
    before, after = folding.run(made.original, feeds), folding.run(made.model, feeds)
    assert not np.array_equal(before["y"], after["y"])
