"""Moments: any split and any order give the same numbers, and large means cost no digits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfold.errors import InputError, UsageError
from bnfold.measuring.moments import ImageMoments, Moments, batch_excess, chance_limit


def sample(seed, count=200, channels=3, mean=0.0, sd=1.0):
    return mean + sd * np.random.default_rng(seed).standard_normal((count, channels))


def images(seed, count, channels=2, pixels=5, mean=0.0):
    """Per-image means and variances of random images whose levels and contrasts differ."""
    rng = np.random.default_rng(seed)
    level = rng.gamma(2.0, size=(count, channels, 1))
    return mean + level + (0.2 + level) * rng.standard_normal((count, channels, pixels))


def of_images(x):
    return ImageMoments.of(x.mean(axis=2), x.var(axis=2), x.shape[2])


def assert_same_images(a, b, rtol):
    assert (a.images, a.pixels.count) == (b.images, b.pixels.count)
    for name in ("centre", "within", "m2", "m3", "m4", "v2", "mv", "mmv"):
        scale = np.abs(getattr(b, name)).max() + 1e-300
        np.testing.assert_allclose(
            getattr(a, name) / scale, getattr(b, name) / scale, rtol=0, atol=rtol, err_msg=name
        )
    np.testing.assert_allclose(a.pixels.mean, b.pixels.mean, rtol=rtol)
    np.testing.assert_allclose(a.pixels.m2, b.pixels.m2, rtol=rtol)


@given(
    cuts=st.lists(st.integers(0, 200), max_size=6),
    order=st.randoms(use_true_random=False),
    mean=st.sampled_from([0.0, 1.0, -1e4]),
    sd=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_any_split_and_order_agree_to_1e_12(cuts, order, mean, sd):
    x = sample(0, mean=mean, sd=sd)
    parts = [Moments.of(part) for part in np.split(x, sorted(cuts))]
    order.shuffle(parts)
    merged = Moments.none(3)
    for part in parts:
        merged = merged.merge(part)
    whole = Moments.of(x)
    assert merged.count == 200
    # the mean is known to a unit in the last place of the values, wherever the mean lies
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12 * sd)
    # the data itself carries the variance to about (mean / sd) * 1e-16
    np.testing.assert_allclose(merged.var, whole.var, rtol=max(1e-12, abs(mean) / sd * 1e-15))


@given(st.lists(st.integers(1, 40), min_size=3, max_size=3))
def test_merging_is_associative(sizes):
    a, b, c = (Moments.of(sample(seed, count)) for seed, count in enumerate(sizes))
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    np.testing.assert_allclose(left.mean, right.mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(left.m2, right.m2, rtol=1e-12)


@pytest.mark.parametrize(("mean", "sd"), [(1e4, 1.0), (1e3, 0.1), (1e6, 0.1)])
def test_a_mean_far_from_zero_costs_no_digits(mean, sd):
    x = sample(1, 40_000, 1, mean, sd)
    exact = np.asarray(x, dtype=np.longdouble).var()
    merged = Moments.none(1)
    for part in np.split(x, 100):
        merged = merged.merge(Moments.of(part))
    np.testing.assert_allclose(merged.var, float(exact), rtol=1e-9)


def test_the_variance_of_a_sum_of_squares_would_be_caught():
    """What E[x^2] - E[x]^2 gives in float64 is off by more than the tolerance above."""
    x = sample(1, 40_000, 1, 1e6, 0.1)
    wrong = np.mean(x**2) - np.mean(x) ** 2
    assert abs(wrong / x.var() - 1) > 1e-3


def test_the_axis_names_the_channels():
    x = np.arange(24.0).reshape(2, 3, 4)
    for axis in (0, 1, 2, -1):
        other = tuple(i for i in range(3) if i != axis % 3)
        found = Moments.of(x, axis)
        np.testing.assert_allclose(found.mean, x.mean(axis=other))
        np.testing.assert_allclose(found.var, x.var(axis=other))
        np.testing.assert_allclose(found.var_unbiased, x.var(axis=other, ddof=1))
    assert found.num_features == 4


def test_no_values_have_no_variance():
    with pytest.raises(InputError, match="at least 1 values"):
        _ = Moments.none(2).var
    with pytest.raises(InputError, match="at least 2 values"):
        _ = Moments.of(np.ones((1, 2))).var_unbiased
    assert Moments.of(np.empty((0, 2))).count == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_is_refused_with_name_and_channel(bad):
    x = np.zeros((4, 3))
    x[2, 1] = bad
    with pytest.raises(InputError, match=r"'bn1' holds NaN or infinity in 1 of 3 .* channel 1"):
        Moments.of(x, name="The input of 'bn1'")
    with pytest.raises(InputError, match="channel 1"):
        ImageMoments.of(x, np.zeros((4, 3)), 1)
    with pytest.raises(InputError, match="channel 1"):
        ImageMoments.of(np.zeros((4, 3)), x, 1)


def test_wrong_shapes_are_refused_in_words():
    with pytest.raises(UsageError, match="no axis 2"):
        Moments.of(np.zeros((4, 3)), 2)
    with pytest.raises(UsageError, match="2 and of 3 channels"):
        Moments.none(2).merge(Moments.none(3))
    with pytest.raises(UsageError, match=r"arrays \(N, C\)"):
        ImageMoments.of(np.zeros(3), np.zeros(3), 1)
    with pytest.raises(UsageError, match="no moments to pool"):
        ImageMoments.pooled([])


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    mean=st.sampled_from([0.0, 1e3]),
)
def test_image_moments_of_any_split_and_order_agree(sizes, order, mean):
    sizes.append(7)
    x = images(2, sum(sizes), mean=mean)
    parts = [of_images(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
    order.shuffle(parts)
    assert_same_images(ImageMoments.pooled(parts), of_images(x), 1e-9 if mean else 1e-11)


def test_image_moments_pool_the_pixels():
    x = images(3, 50)
    pooled = of_images(x).pixels
    np.testing.assert_allclose(pooled.mean, x.mean(axis=(0, 2)), rtol=1e-14)
    np.testing.assert_allclose(pooled.var, x.var(axis=(0, 2)), rtol=1e-13)


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_standard_errors_are_those_of_the_per_image_statistics(mean):
    """SE(mean) = std(m_i) / sqrt(N), SE(var) = std(q_i) / sqrt(N), from the images themselves.

    The images come in two sizes, so that the pooled mean is not the mean of m_i.
    """
    sets = [images(4, 40, pixels=5, mean=mean), 3 + images(5, 30, pixels=20, mean=mean)]
    found = ImageMoments.pooled(of_images(x[i::3]) for x in sets for i in range(3))
    n = 70
    mu = np.concatenate([np.moveaxis(x, 1, 0).reshape(2, -1) for x in sets], axis=1).mean(axis=1)
    m = np.concatenate([x.mean(axis=2) for x in sets])
    q = np.concatenate([np.square(x - mu[:, None]).mean(axis=2) for x in sets])
    np.testing.assert_allclose(found.mean_error, m.std(axis=0, ddof=1) / n**0.5, rtol=1e-8)
    np.testing.assert_allclose(found.var_error, q.std(axis=0, ddof=1) / n**0.5, rtol=1e-8)
    np.testing.assert_allclose(
        found.scale_error(0.5), found.var_error / (2 * (found.pixels.var + 0.5))
    )


def test_standard_errors_by_image_hold_in_repeated_samples():
    """The spread of the estimate over 400 repetitions is what one repetition predicts."""
    runs = [of_images(images(seed, 60, channels=1)) for seed in range(400)]
    means = np.array([run.pixels.mean[0] for run in runs])
    variances = np.array([run.pixels.var[0] for run in runs])
    predicted = np.mean([run.mean_error[0] for run in runs])
    assert means.std() == pytest.approx(predicted, rel=0.1)
    predicted = np.mean([run.var_error[0] for run in runs])
    assert variances.std() == pytest.approx(predicted, rel=0.2)  # heavy tails: biased low
    by_pixel = np.mean([(run.pixels.var[0] / run.pixels.count) ** 0.5 for run in runs])
    assert means.std() > 1.3 * by_pixel  # counting pixels as independent would be wrong


def test_images_needed_is_the_number_that_reaches_the_precision():
    """std(m_i) / sigma = .5 and .05 of a sigma take 384 images."""
    m = np.array([[0.5], [-0.5]] * 500)
    v = np.full((1000, 1), 0.75 - 1e-12)
    found = ImageMoments.of(m, v, 100)
    assert found.images_needed(0.05, 0.0)[0] == pytest.approx(384.5, rel=2e-3)
    # equal means, q_i of 0.5 and 1.5: the scale's relative error is std(q_i) / 2 of each image
    q = ImageMoments.of(np.zeros((1000, 1)), 1 + m, 100)
    assert q.images_needed(0.05, 0.0)[0] == pytest.approx((1.96 * 0.5 / 2 / 0.05) ** 2, rel=2e-3)
    assert np.isinf(ImageMoments.of(m[:1], v[:1], 100).images_needed(0.05, 0.0)).all()
    # equal means, q_i of 0.5 and 1.5: the scale's relative error is std(q_i) / 2 of each image
    q = ImageMoments.of(np.zeros((1000, 1)), 1 + m, 100)
    assert q.images_needed(0.05, 0.0)[0] == pytest.approx((1.96 * 0.5 / 2 / 0.05) ** 2, rel=2e-3)
    assert np.isinf(ImageMoments.of(m[:1], v[:1], 100).mean_error).all()


def test_sorted_batches_stand_out_and_shuffled_ones_do_not():
    rng = np.random.default_rng(6)
    level = np.sort(rng.standard_normal((640, 4)), axis=0)
    parts = [ImageMoments.of(m, np.ones_like(m), 9) for m in np.split(level, 20)]
    assert batch_excess(parts) > 100 > chance_limit(20, 640)
    shuffled = rng.permutation(level)
    parts = [ImageMoments.of(m, np.ones_like(m), 9) for m in np.split(shuffled, 20)]
    assert batch_excess(parts) < chance_limit(20, 640)


def test_excess_of_batches_is_not_told_where_nothing_is_known():
    m = sample(7, 6)
    assert batch_excess([of_images(images(8, 6))]) is None
    assert batch_excess([ImageMoments.of(row[None], row[None] ** 2, 1) for row in m]) is None
    constant = ImageMoments.of(np.ones((5, 2)), np.ones((5, 2)), 1)
    assert batch_excess([constant, constant]) is None


@pytest.mark.parametrize(
    ("batches", "images"), [(2, 20), (2, 500), (3, 30), (7, 200), (25, 50), (25, 200), (50, 400)]
)
def test_the_limit_is_the_quantile_of_f(batches, images):
    """Never below it, so that shuffled images stay below 999 times in 1000."""
    stats = pytest.importorskip("scipy.stats")
    exact = stats.f.ppf(0.999, batches - 1, images - batches)
    assert exact <= chance_limit(batches, images) < 1.04 * exact


def test_the_limit_where_counts_are_small_or_large():
    assert chance_limit(1, 8) == chance_limit(2, 3) == np.inf
    assert chance_limit(1250, 10_000) == 1.5  # chance alone explains 1.14
    assert chance_limit(20) <= chance_limit(20, 640) < chance_limit(20, 60)


@pytest.mark.parametrize("size", [8, 40, 100])
def test_shuffled_images_hardly_ever_pass_the_limit(size):
    """In less than one of 200 draws, of one channel whose means have a heavy tail."""
    rng = np.random.default_rng(size)
    alarms = 0
    for _ in range(1000):
        level = rng.lognormal(sigma=0.7, size=(200, 1))
        parts = [
            ImageMoments.of(level[i : i + size], np.ones_like(level[i : i + size]), 9)
            for i in range(0, 200, size)
        ]
        alarms += batch_excess(parts) > chance_limit(len(parts), 200)
    assert alarms < 5


def first_means(shared, name):
    """What the first batch norm of a real network sees of each image, and the labels."""
    import realdata

    model, read = {
        "MNIST": ("mnist_cnn", realdata.mnist_train10k),
        "CIFAR": ("resnet20", realdata.cifar_jpeg),
    }[name]
    x, y = read(shared)
    seen = []

    def keep(_module, arguments):
        seen.append(arguments[0].double().mean((2, 3)))

    net = realdata.load_model(shared, model)
    layer = next(m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    layer.register_forward_pre_hook(keep)
    realdata.predict(net, x[::5])
    return torch.cat(seen).numpy(), y[::5]


@pytest.mark.parametrize("name", ["MNIST", "CIFAR"])
def test_real_images_sorted_by_class_are_told_and_shuffled_ones_are_not(shared_data, name):
    """2000 images, in batches of 8 to 250; 100 shuffles."""
    means, labels = first_means(shared_data, name)
    assert (np.diff(labels) >= 0).all()
    rng = np.random.default_rng(0)

    def excess(order, size):
        rows = [means[order[i : i + size]] for i in range(0, len(order), size)]
        return batch_excess([ImageMoments.of(m, np.ones_like(m), 9) for m in rows])

    for size in (8, 32, 100, 250):
        limit = chance_limit(-(-len(means) // size), len(means))
        assert excess(np.arange(len(means)), size) > 1.2 * limit
        alarms = sum(excess(rng.permutation(len(means)), size) > limit for _ in range(100))
        assert alarms <= 1
