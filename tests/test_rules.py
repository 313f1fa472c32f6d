"""Every rule of the table, case by case: folded bit by bit right, or kept with a reason."""

from __future__ import annotations

import numpy as np
import pytest

from bnfold.folding.rules import RULES
from tests import folding
from tests.law_models import Law, build, inputs
from tests.laws import LAWS


def through(made: folding.Fold) -> set[str]:
    """The operators around which a gauge that is no identity lies."""
    touched = set()
    for value in made.plan.gauges:
        producer = value.producer()
        touched |= {producer.op_type} if producer is not None else set()
        touched |= {user.op_type for user, _ in value.uses()}
    return touched


def check_law(law: Law) -> None:
    """Fold the case, count, compare bit by bit, fold again. Raises AssertionError."""
    original = build(law)
    absorb, merge = law.absorbed is not None, law.merges is not None
    repairs, clean_up = frozenset(law.repairs), frozenset(law.clean_up)
    made = folding.fold(original, absorb=absorb, repairs=repairs, merge=merge, clean_up=clean_up)
    reasons = [kept.reason for kept in made.plan.kept]
    assert len(made.plan.removed) == law.removed, reasons
    assert len(made.plan.absorbed) == (law.absorbed or 0), [r.name for r in made.plan.absorbed]
    assert len(made.plan.merges) == (law.merges or 0), [m.root for m in made.plan.merges]
    for word in law.kept:
        assert any(word in reason for reason in reasons), reasons
    folding.check_counts(made)
    folding.check_interface(made)
    folding.check_shapes(made)
    if law.op:
        assert law.op in through(made), f"no gauge went through {law.op}"
    feeds = inputs(original)
    run = folding.run if law.runs else folding.evaluate
    before, after = run(original, feeds), run(made.model, feeds)
    for name, expected in before.items():
        assert after[name].dtype == expected.dtype
        np.testing.assert_array_equal(after[name], expected, err_msg=name)
        assert np.all(np.isfinite(expected.astype(float)))
    assert any(np.any(value != 0) for value in before.values()), "the case computes only zeros"
    if law.reference:
        folding.check_values(made, feeds)
        folding.check_algebra(made)
    folding.check_folding_again(made, absorb=absorb, merge=merge, clean_up=clean_up)
    folding.check_undo(made)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_law(law: Law) -> None:
    check_law(law)


def test_every_row_of_the_table_has_a_case() -> None:
    assert set(RULES) == {law.op for law in LAWS if law.op}


def test_names_of_laws_are_unique() -> None:
    assert len({law.name for law in LAWS}) == len(LAWS)
