"""What is said of an adaptation without labels: the figures, and the warnings of harm."""

import numpy as np
import pytest

from bnfold.measuring import diagnosis
from bnfold.measuring.diagnosis import Comparison, likely_harm
from bnfold.measuring.ranks import Alone

RNG = np.random.default_rng(0)


def sure(winners, classes=10, certainty=0.999):
    """Logits of predictions that are right about `winners`, with so much probability each."""
    scores = np.zeros((len(winners), classes))
    scores[np.arange(len(winners)), winners] = np.log(certainty * (classes - 1) / (1 - certainty))
    return scores


def compared(before, after, parts=3):
    comparison = Comparison()
    for pair in zip(np.array_split(before, parts), np.array_split(after, parts), strict=True):
        comparison.add(*pair)
    return comparison.result()


ALL_CLASSES = RNG.integers(0, 10, 600)


def said(words, shift, outputs):
    return [sentence for sentence in likely_harm(shift, outputs) if words in sentence]


def test_information_is_that_of_image_and_class():
    """Against its definition: sum over images and classes of p(i, c) log p(i, c) / (p(i) p(c))."""
    before, after = RNG.normal(size=(2, 200, 4)) * [[[1.0]], [[3.0]]]
    found = compared(before, after)
    for scores, information in (
        (before, found.information_before),
        (after, found.information_after),
    ):
        p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        joint = p / len(p)
        expected = (joint * np.log(joint / (joint.sum(0) / len(p)))).sum()
        assert information == pytest.approx(expected, rel=1e-9)
    assert found.mean_after == pytest.approx(p.mean(0), rel=1e-12)
    assert found.information_after > found.information_before > 0


def test_information_has_its_extremes():
    every = compared(sure(ALL_CLASSES, certainty=1 - 1e-9), np.zeros((600, 10)))
    assert every.information_before == pytest.approx(np.log(10), abs=0.02)
    assert every.information_after == pytest.approx(0, abs=1e-12)
    one = compared(sure(ALL_CLASSES * 0), sure(ALL_CLASSES * 0))
    assert one.information_before == pytest.approx(0, abs=1e-12)


class TwoRanks(Alone):
    """This process and another that saw other images."""

    def __init__(self, other):
        self.other = other

    def share(self, value):
        return [value, self.other | {"images": 200}] if isinstance(value, dict) else [value, value]


def test_processes_know_what_one_would():
    before, after = RNG.normal(size=(2, 600, 10)) * 2
    whole = compared(before, after)
    mine, other = compared(before[:400], after[:400]), compared(before[400:], after[400:])
    shared = {name: getattr(other, name) for name in diagnosis._MEANS}
    merged = mine.merged(TwoRanks(shared))
    for name in diagnosis._MEANS:
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert merged.information_after == pytest.approx(whole.information_after, rel=1e-12)
    assert mine.merged(Alone()) == mine


def test_an_adaptation_that_says_less_is_warned_of():
    clear, dim = sure(ALL_CLASSES), sure(ALL_CLASSES, certainty=0.9)
    assert said("say less about the images than before (-0.", 0.02, compared(clear, dim))
    assert not said("than before", 0.02, compared(dim, clear))
    (same,) = said("than before", 0.02, compared(clear, clear))
    assert "say hardly more" in same
    # what is the source itself is said to be that, once
    (home,) = likely_harm(0.001, compared(clear, clear))
    assert "looks like the source" in home


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_few_classes_are_warned_of(classes):
    """A sure network that sees few classes; adapted, it spreads them over all."""
    few = compared(sure(ALL_CLASSES % classes), sure(ALL_CLASSES, certainty=0.8))
    (warning,) = said("few classes", 0.05, few)
    assert f"about {classes}." in warning


def test_a_network_that_a_shift_has_broken_is_no_target_of_few_classes():
    """It predicts few classes as well, but is not sure of them; or it is, far from its source."""
    broken = compared(sure(ALL_CLASSES % 3, certainty=0.8), sure(ALL_CLASSES))
    assert not said("few classes", 0.2, broken)
    proud = compared(sure(ALL_CLASSES % 3), sure(ALL_CLASSES))
    assert said("few classes", 0.2, proud)
    assert not said("few classes", 6.5, proud)
    unsettled = compared(sure(ALL_CLASSES % 3, certainty=0.9), sure(ALL_CLASSES, certainty=0.7))
    assert "surer of them than the adapted" in said("few classes", 0.2, unsettled)[0]
    assert not said("few classes", 6.5, unsettled)
    assert "sure of them" in said("few classes", 0.04, proud)[0]
    assert "near its source" in said("few classes", 0.04, broken)[0]


def test_all_classes_are_no_few_classes():
    found = compared(sure(ALL_CLASSES, certainty=0.9), sure(ALL_CLASSES))
    assert list(likely_harm(0.2, found)) == []


def test_a_single_class_afterwards_is_warned_of():
    found = compared(sure(ALL_CLASSES), sure(np.where(ALL_CLASSES < 8, 3, ALL_CLASSES)))
    (warning,) = said("predicted as class 3 of 10", 0.2, found)
    assert "After adaptation 77%" in warning


def test_two_classes_may_be_as_they_are():
    few = compared(sure(ALL_CLASSES * 0, 2), sure(ALL_CLASSES * 0, 2))
    assert list(likely_harm(0.2, few)) == []
    assert list(likely_harm(0.2, None)) == []
    assert said("looks like the source", 0.001, None)
