"""The fifteen corruptions: pure, seeded, in range; each does what the paper says it does."""

import numpy as np
import pytest
from PIL import Image

from bnfold.data.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    corrupted,
    gaussian_blur,
    plasma,
    smeared,
)
from bnfold.errors import UsageError

RNG = np.random.default_rng(0)
CHANCE = {
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "glass_blur",
    "motion_blur",
    "snow",
    "frost",
    "fog",
    "elastic_transform",
}
# Where the constants themselves do not grow: glass blurs more, then shuffles twice; frost darkens
# the image as it thickens; elastic moves corners less as it ripples more; motion 4 is motion 3.
GROWING = {
    **dict.fromkeys(CORRUPTIONS, (SEVERITIES,)),
    "glass_blur": ((1, 4), (3, 5)),
    "frost": ((1, 2, 3),),
    "elastic_transform": (),
    "motion_blur": ((1, 2, 3, 5),),
}


def photographs(count: int, channels: int = 3, height: int = 32, width: int = 32):
    """Noise with a natural image's fall of power over frequency, filling [0, 1]."""
    rng = np.random.default_rng(7)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequencies[0, 0] = 1 / max(height, width)
    noise = np.fft.rfft2(rng.standard_normal((count, channels, height, width)))
    x = np.fft.irfft2(noise / frequencies**1.2, (height, width))
    x -= x.min(axis=(1, 2, 3), keepdims=True)
    x /= x.max(axis=(1, 2, 3), keepdims=True)
    return x.astype(np.float32)


PHOTOS = photographs(24)


def test_there_are_fifteen_of_five_severities():
    assert len(CORRUPTIONS) == 15
    assert {len(corruption.constants) for corruption in CORRUPTIONS.values()} == {5}


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_pure_seeded_and_stays_in_range(name, channels):
    # channels last in memory, as bytes come from a file: a transposed view must not be written to
    x = np.moveaxis(np.ascontiguousarray(np.moveaxis(photographs(3, channels, 28, 30), 1, 3)), 3, 1)
    before = x.copy()
    found = corrupted(x, name, 4, seed=1)
    assert found.shape == x.shape
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 1
    assert np.abs(found - x).mean() > 1e-3
    np.testing.assert_array_equal(found, corrupted(x, name, 4, seed=1))
    assert (name in CHANCE) != np.array_equal(found, corrupted(x, name, 4, seed=2))
    for severity in SEVERITIES:
        corrupted(x, name, severity)
        np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_grows_the_distance(name):
    distances = {s: float(np.mean((corrupted(PHOTOS, name, s) - PHOTOS) ** 2)) for s in SEVERITIES}
    for severities in GROWING[name]:
        values = [distances[severity] for severity in severities]
        assert values == sorted(values), distances
        assert values[-1] > values[0], distances


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_does_not_depend_on_those_behind_it_but_by_chance(name):
    if name not in CHANCE:
        np.testing.assert_allclose(
            corrupted(PHOTOS[:2], name, 5), corrupted(PHOTOS, name, 5)[:2], atol=1e-6
        )


def test_noise_has_the_strength_of_the_paper():
    grey = np.full((64, 3, 32, 32), 0.5, np.float32)
    for severity, sigma in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        assert corrupted(grey, "gaussian_noise", severity).std() == pytest.approx(sigma, rel=0.01)
    for severity, photons in zip(SEVERITIES, (500, 250, 100, 75, 50), strict=True):
        found = corrupted(grey, "shot_noise", severity)
        assert found.mean() == pytest.approx(0.5, abs=0.002)
        assert found.var() == pytest.approx(0.5 / photons, rel=0.02)
        np.testing.assert_allclose(found * photons, np.round(found * photons), atol=1e-3)
    for severity, share in zip(SEVERITIES, (0.01, 0.02, 0.03, 0.05, 0.07), strict=True):
        found = corrupted(grey, "impulse_noise", severity)
        assert (found == 0).mean() == pytest.approx(share / 2, rel=0.06)
        assert (found == 1).mean() == pytest.approx(share / 2, rel=0.06)
        assert ((found != 0.5).any(1) & (found == 0.5).any(1)).any()  # a channel alone


def test_contrast_and_brightness_are_exact():
    mean = PHOTOS.mean(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(
        corrupted(PHOTOS, "contrast", 5), mean + 0.15 * (PHOTOS - mean), atol=1e-6
    )
    bright = corrupted(PHOTOS, "brightness", 3)
    np.testing.assert_allclose(bright.max(1), np.minimum(PHOTOS.max(1) + 0.15, 1), atol=1e-6)
    value, brighter = PHOTOS.max(1, keepdims=True), bright.max(1, keepdims=True)
    np.testing.assert_allclose(  # ratios of channels, which are hue and saturation
        bright / brighter, PHOTOS / np.maximum(value, 1e-6), atol=1e-4
    )
    grey = photographs(2, 1)
    np.testing.assert_allclose(corrupted(grey, "brightness", 3), np.minimum(grey + 0.15, 1))
    black = np.zeros((1, 3, 4, 4), np.float32)
    np.testing.assert_allclose(corrupted(black, "brightness", 1), 0.05, atol=1e-6)


def point(size: int = 15):
    x = np.zeros((1, 1, size, size), np.float32)
    x[0, 0, size // 2, size // 2] = 1
    return x


def test_defocus_is_a_disk():
    spread = corrupted(point(), "defocus_blur", 4)[0, 0]
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    # radius 1: a cross of five; the Gaussian of .2 leaves 1 / (1 + 2 exp(-12.5)) of each in place
    np.testing.assert_allclose(spread[7, 6:9], 0.2, rtol=1e-4)
    np.testing.assert_allclose(spread[6:9, 7], 0.2, rtol=1e-4)
    assert spread[6, 6] < 1e-5
    wide = corrupted(point(), "defocus_blur", 5)[0, 0]
    np.testing.assert_allclose(wide[6:9, 6:9], 1 / 9, rtol=1e-4)
    assert wide.sum() == pytest.approx(1, abs=1e-5)


def test_motion_blur_smears_to_one_side():
    x = np.repeat(point(31), 200, axis=0)
    found = corrupted(x, "motion_blur", 5)[:, 0]
    np.testing.assert_allclose(found.sum(axis=(1, 2)), 1, atol=1e-5)
    rows = (found.sum(2) * (np.arange(31) - 15)).sum(1)
    columns = (found.sum(1) * (np.arange(31) - 15)).sum(1)
    # each pixel reads from its right: the point moves to the left, by half a Gaussian's mean
    taps = np.exp(-(np.arange(19) ** 2) / (2 * 2.5**2))
    length = (taps * np.arange(19)).sum() / taps.sum()
    assert np.hypot(rows, columns) == pytest.approx(np.full(200, length), rel=0.15)
    assert (columns < 0).all()
    angles = np.rad2deg(np.arctan2(-rows, -columns))
    assert np.abs(angles).max() < 50
    assert angles.min() < -30
    assert angles.max() > 30


def test_a_smear_has_twice_its_reach_and_one_tap():
    found = smeared(point(41), 5, 100.0, np.zeros(1))[0, 0, 20]
    np.testing.assert_allclose(found[10:21], 1 / 11, rtol=0.01)
    assert found[:10].max() == found[21:].max() == 0


def test_plasma_is_midpoints_and_noise_that_shrinks():
    smooth = plasma(5, 32, 1e6, np.random.default_rng(0))  # noise at the first halving alone
    corners = sum(smooth[:, r::32, c::32] for r in (0, 16) for c in (0, 16))
    np.testing.assert_allclose(smooth[:, 8::32, 8::32], corners / 4, atol=1e-5)
    beside = smooth[:, 0, 0] + smooth[:, 0, 16] + smooth[:, 8, 8] + smooth[:, 24, 8]
    np.testing.assert_allclose(smooth[:, 0, 8], beside / 4, atol=1e-5)
    rough = plasma(400, 64, 2, np.random.default_rng(0))

    def noise(step):
        """What a point between two corners has that its four neighbours have not."""
        x = rough[:, :: step // 2, :: step // 2]
        along = x[:, ::2, ::2] + np.roll(x[:, ::2, ::2], -1, 2)
        across = x[:, 1::2, 1::2] + np.roll(x[:, 1::2, 1::2], 1, 1)
        return float((x[:, ::2, 1::2] - (along + across) / 4).std())

    assert noise(4) / noise(2) == pytest.approx(4, rel=0.05)


def test_zoom_blur_is_the_mean_of_enlargements():
    """Enlarged by f, a ramp about the middle is 1 / f as steep; the middle stays."""
    ramp = np.repeat(np.linspace(0, 1, 101, dtype=np.float32)[None, None, None], 101, axis=2)
    found = corrupted(ramp, "zoom_blur", 5)[0, 0, 50]
    factors = np.arange(1, 1.26, 0.01)
    slope = (1 + (1 / factors).sum()) / (len(factors) + 1) / 100
    assert np.diff(found[1:-1]).mean() == pytest.approx(slope, rel=0.01)
    assert found[50] == pytest.approx(0.5, abs=0.005)
    flat = np.full((1, 3, 32, 32), 0.3, np.float32)
    np.testing.assert_allclose(corrupted(flat, "zoom_blur", 5), 0.3, atol=1e-6)


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "elastic_transform"])
def test_what_only_moves_pixels_leaves_a_plane_alone(name):
    flat = np.full((2, 3, 32, 32), 0.3, np.float32)
    for severity in SEVERITIES:
        np.testing.assert_allclose(corrupted(flat, name, severity), 0.3, atol=1e-5)


def test_glass_takes_pixels_from_next_door():
    rows = np.repeat(np.linspace(0, 1, 32, dtype=np.float32)[None, None, :, None], 32, axis=3)
    found = corrupted(rows, "glass_blur", 1)
    steps = np.round((rows - found) * 31, 3)
    assert set(np.unique(steps)) == {0.0, 1.0}  # this row, or the one above
    assert 0.4 < (steps[:, :, 2:, 2:] == 1).mean() < 0.6


def test_snow_brightens_fog_greys_and_frost_lays_ice_over():
    dark = PHOTOS * np.float32(0.3)
    for name in ("snow", "frost"):
        assert corrupted(dark, name, 5).mean() > dark.mean() + 0.1
    x = np.full((50, 3, 32, 32), 0.5, np.float32)
    found = corrupted(x, "fog", 5)
    # the brightest value stays: 1.5 of cloud added, all scaled by .5 / 2
    np.testing.assert_allclose(found.max(axis=(1, 2, 3)), 0.5, atol=1e-5)
    np.testing.assert_allclose(found.min(axis=(1, 2, 3)), 0.125, atol=1e-5)
    assert (found[:, 0] == found[:, 2]).all()
    ice = (corrupted(np.zeros_like(x), "frost", 1) / 0.2)[:, :, 1:, 1:]
    assert 0.3 < ice.mean() < 0.7
    assert 0.1 < ice.std() < 0.35
    assert ice[:, 2].mean() > ice[:, 0].mean()  # bluish


def test_elastic_bends_more_than_it_shears_as_it_grows():
    """A straight line: at severity 1 it stays straight (an affine map), at 5 it ripples."""
    rows = np.repeat(np.linspace(0, 1, 32, dtype=np.float32)[None, None, :, None], 32, axis=3)

    def bend(severity):
        found = corrupted(np.repeat(rows, 40, axis=0), "elastic_transform", severity)[:, 0]
        middle = found[:, 12:20, 12:20]
        return float(np.abs(np.diff(middle, 2, axis=2)).mean())

    assert bend(1) < 1e-5
    assert bend(5) > 1e-3


def test_elastic_mirrors_the_border():
    rows = np.repeat(np.linspace(0, 1, 32, dtype=np.float32)[None, None, :, None], 32, axis=3)
    for severity in SEVERITIES:
        found = corrupted(np.repeat(rows, 20, axis=0), "elastic_transform", severity)
        assert np.abs(np.diff(found, axis=2)).max() < 0.15  # around the torus it would be 1


def test_flakes_are_few():
    black = np.zeros((20, 3, 32, 32), np.float32)
    found = corrupted(black, "snow", 1)
    untouched = np.isclose(found, 0.05 * 0.5, atol=1e-3)  # 1 - clear of a white of one half
    assert 0.5 < untouched.mean() < 0.95


def test_pixelate_and_jpeg_are_pillows():
    image = Image.fromarray(np.round(PHOTOS[0].transpose(1, 2, 0) * 255).astype(np.uint8))
    box = Image.Resampling.BOX
    for severity, factor in zip(SEVERITIES, (0.95, 0.9, 0.85, 0.75, 0.65), strict=True):
        small = image.resize((int(32 * factor),) * 2, box).resize((32, 32), box)
        found = corrupted(PHOTOS[:1], "pixelate", severity)[0].transpose(1, 2, 0)
        np.testing.assert_allclose(found, np.asarray(small) / 255, atol=2 / 255)
    qualities = [c[0] for c in CORRUPTIONS["jpeg_compression"].constants]
    assert qualities == [80, 65, 58, 50, 40]
    grey = photographs(2, 1)
    assert 1e-5 < np.mean((corrupted(grey, "jpeg_compression", 5) - grey) ** 2) < 1e-2


def test_the_blur_is_a_gaussian():
    spread = gaussian_blur(point(31), 1.5)[0, 0]
    offsets = np.arange(31) - 15
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    assert (spread.sum(1) * offsets**2).sum() == pytest.approx(1.5**2, rel=0.01)
    np.testing.assert_array_equal(gaussian_blur(PHOTOS, 0.0), PHOTOS)


def test_no_image_is_no_image():
    empty = np.zeros((0, 3, 32, 32), np.float32)
    for name in CORRUPTIONS:
        assert corrupted(empty, name, 1).shape == empty.shape


def test_a_corruption_refuses_what_it_cannot_take():
    with pytest.raises(UsageError, match="no corruption 'rain'; there are gaussian_noise"):
        corrupted(PHOTOS, "rain", 1)
    with pytest.raises(UsageError, match="severity is 6; it must be"):
        corrupted(PHOTOS, "fog", 6)
    with pytest.raises(UsageError, match=r"found shape \(32, 32\)"):
        corrupted(PHOTOS[0, 0], "fog", 1)
    with pytest.raises(UsageError, match="before mean and std"):
        corrupted(PHOTOS * 2, "fog", 1)
