"""What a batch norm gets for what it saw: the target's, the source's, or between the two."""

import numpy as np
import pytest

from bnfold.errors import InputError, UsageError
from bnfold.measuring.moments import ImageMoments
from bnfold.measuring.statistics import Layer, Rule, Statistics

RNG = np.random.default_rng(0)
SOURCE = Statistics(np.array([0.0, 2.0, -1.0]), np.array([1.0, 4.0, 0.25]))
LAYER = Layer("bn", 0.5, SOURCE)


def moments_of(x):
    """x: (N, C, L)."""
    return ImageMoments.of(x.mean(2), x.var(2), x.shape[2])


def drawn(images=40, seed=0, shift=1.0, scale=1.0):
    rng = np.random.default_rng(seed)
    level = rng.standard_normal((images, 3, 1))
    return shift + scale * (level + rng.standard_normal((images, 3, 7)))


X = drawn()
SEEN = moments_of(X)


def test_by_default_they_are_the_targets_own():
    got = Rule()(LAYER, SEEN)
    pixels = X.transpose(1, 0, 2).reshape(3, -1)
    np.testing.assert_allclose(got.mean, pixels.mean(1), rtol=1e-14)
    np.testing.assert_allclose(got.var, pixels.var(1, ddof=1), rtol=1e-13)


@pytest.mark.parametrize(
    ("rule", "share"),
    [(Rule(prior=10), 0.2), (Rule(weight=0.3), 0.3), (Rule(weight=1), 1.0), (Rule(prior=0), 0.0)],
)
def test_the_source_counts_as_many_images(rule, share):
    got, own = rule(LAYER, SEEN), Rule()(LAYER, SEEN)
    np.testing.assert_allclose(got.mean, share * SOURCE.mean + (1 - share) * own.mean)
    np.testing.assert_allclose(got.var, share * SOURCE.var + (1 - share) * own.var)


def test_a_prior_is_weighed_against_all_images_where_a_batch_is_measured():
    got, own = Rule(prior=10, images=990)(LAYER, SEEN), Rule()(LAYER, SEEN)
    np.testing.assert_allclose(got.mean, 0.01 * SOURCE.mean + 0.99 * own.mean)


def test_a_prior_counts_images_where_an_image_has_many_rows():
    """A batch norm over the tokens of 4 images sees 40 rows."""
    got = Rule(prior=4, images=4)(LAYER, SEEN)
    np.testing.assert_allclose(got.mean, 0.5 * SOURCE.mean + 0.5 * Rule()(LAYER, SEEN).mean)


def test_a_mixture_holds_what_the_means_differ_by():
    """Against the moments of both samples put together."""
    other = drawn(10, seed=1, shift=4)
    source = moments_of(other)
    layer = Layer("bn", 0.0, Statistics(source.pixels.mean, source.pixels.var))
    whole = source.merge(SEEN)
    got = Rule(prior=10, mixture=True)(layer, SEEN)
    np.testing.assert_allclose(got.mean, whole.pixels.mean)
    np.testing.assert_allclose(got.var, whole.pixels.var, rtol=4e-3)  # the divisor count - 1
    assert (np.abs(Rule(prior=10)(layer, SEEN).var / whole.pixels.var - 1) > 0.1).all()


def test_one_part_alone_leaves_the_other():
    own = Rule()(LAYER, SEEN)
    mean, var = Rule(part="mean")(LAYER, SEEN), Rule(part="var")(LAYER, SEEN)
    assert np.array_equal(mean.mean, own.mean)
    assert np.array_equal(mean.var, SOURCE.var)
    assert np.array_equal(var.mean, SOURCE.mean)
    assert np.array_equal(var.var, own.var)


def test_auto_follows_the_target_only_where_it_differs_by_more_than_chance():
    near = Layer("bn", 0.5, Statistics(SEEN.pixels.mean + 0.1 * SEEN.mean_error, SEEN.pixels.var))
    far = Layer("bn", 0.5, Statistics(SEEN.pixels.mean + 10, SEEN.pixels.var))
    auto = Rule(prior="auto")
    np.testing.assert_allclose(auto(near, SEEN).mean, near.source.mean)
    np.testing.assert_allclose(auto(far, SEEN).mean, SEEN.pixels.mean, atol=0.01)


def test_auto_keeps_the_source_for_a_single_image():
    one = moments_of(drawn(1))
    got = Rule(prior="auto")(LAYER, one)
    assert np.array_equal(got.mean, SOURCE.mean)
    assert np.array_equal(got.var, SOURCE.var)


def test_auto_beats_both_ends_in_repeated_draws():
    """Mean squared error of the mean, over draws in which source and target differ at random."""
    errors = np.zeros(3)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        truth = rng.choice([0.0, 2.0], 3)[:, None]
        seen = moments_of(drawn(6, seed=seed, shift=0) + truth)
        layer = Layer("bn", 0.0, Statistics(np.zeros(3), np.full(3, 2.0)))
        rules = (Rule(weight=1), Rule(), Rule(prior="auto"))
        errors += [np.square(rule(layer, seen).mean - truth[:, 0]).mean() for rule in rules]
    assert errors[2] < 0.9 * errors[:2].min()


def test_matched_to_the_source_nothing_changes_on_the_source():
    seen_on_source = moments_of(drawn(50, seed=3))
    rule = Rule(reference={"bn": seen_on_source})
    got = rule(LAYER, seen_on_source)
    np.testing.assert_allclose(got.mean, SOURCE.mean, atol=1e-12)
    np.testing.assert_allclose(got.var, SOURCE.var, rtol=1e-12)


def test_matched_the_normalised_target_is_as_the_source_was():
    on_source, x = drawn(50, seed=3, shift=2), drawn(60, seed=4, shift=-7, scale=3)
    got = Rule(reference={"bn": moments_of(on_source)})(LAYER, moments_of(x))

    def normalised(values, statistics):
        mean, sd = statistics.mean[:, None], np.sqrt(statistics.var + LAYER.eps)[:, None]
        return (values.transpose(1, 0, 2).reshape(3, -1) - mean) / sd

    was, now = normalised(on_source, SOURCE), normalised(x, got)
    np.testing.assert_allclose(now.mean(1), was.mean(1), atol=1e-12)
    np.testing.assert_allclose(now.std(1), was.std(1), rtol=5e-3)  # the divisors count - 1


def test_matched_a_channel_that_is_constant_on_the_source_is_so_on_the_target():
    on_source, x = drawn(50, seed=3), drawn(60, seed=4)
    on_source[:, 1] = 5.0
    got = Rule(reference={"bn": moments_of(on_source)})(LAYER, moments_of(x))
    assert np.isfinite(got.mean).all()
    assert 9 / np.sqrt(got.var[1] + LAYER.eps) < 1e-4


def test_a_layer_without_reference_gets_its_own():
    rule = Rule(reference={"other": moments_of(drawn(5))})
    assert np.array_equal(rule(LAYER, SEEN).mean, SEEN.pixels.mean)


def test_one_value_is_refused_with_the_layer():
    with pytest.raises(InputError, match="'bn' saw 1 value"):
        Rule()(LAYER, ImageMoments.of(np.ones((1, 3)), np.zeros((1, 3)), 1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"part": "sd"}, "part is 'sd'"),
        ({"prior": -1}, "prior is -1"),
        ({"prior": float("nan")}, "prior is nan"),
        ({"prior": "much"}, "'auto' or a number"),
        ({"weight": 1.5}, "weight is 1.5"),
        ({"weight": 0.5, "prior": 3}, "give one"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        Rule(**arguments)
