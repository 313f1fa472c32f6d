"""Streaming moments per channel, float64: count, mean and centred square, merged exactly.

A sum of deviations is only ever taken about a mean of the values themselves, so a mean of 10000
beside a standard deviation of 1 costs no digits. Merging re-centres both sides (Chan, Golub &
LeVeque, "Algorithms for computing the sample variance", 1983): batches, shards and resumed runs
give the same numbers in any order and any grouping, up to rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfold.errors import InputError, UsageError

Float64 = NDArray[np.float64]

_TWO_SIDED_95 = 1.96
_ONE_IN_1000 = 3.09  # standard deviations that a normal variable exceeds so often


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of `count` values per channel.

    mean, m2: (C,) float64, m2 the sum of squared deviations from the mean.
    """

    count: int
    mean: Float64
    m2: Float64

    @classmethod
    def none(cls, num_features: int) -> Moments:
        """The moments of no values: merging them changes nothing."""
        return cls(0, np.zeros(num_features), np.zeros(num_features))

    @classmethod
    def of(cls, array: ArrayLike, axis: int = 1, *, name: str = "the array") -> Moments:
        """Moments of all values of `array`, a channel being an index along `axis`.

        Raises InputError if a value is NaN or infinite, with the channel and `name`; UsageError if
        there is no such axis.
        """
        values = np.asarray(array, dtype=np.float64)
        if not -values.ndim <= axis < values.ndim:
            raise UsageError(f"{name} has shape {values.shape} and therefore no axis {axis}.")
        rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        _check_finite(rows.T, name)
        count = rows.shape[1]
        if not count:
            return cls.none(len(rows))
        mean = rows.mean(axis=1)
        deviations = rows - mean[:, None]
        rest = deviations.mean(axis=1)  # what rounding left in the mean
        return cls(count, mean + rest, np.square(deviations).sum(axis=1) - count * rest**2)

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together, exact up to rounding.

        Raises UsageError if the numbers of channels differ.
        Source: Chan, Golub & LeVeque 1983, eq. 2.1.
        """
        _check_channels(self.mean, other.mean)
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta**2 * (self.count * (other.count / count)),
        )

    @property
    def num_features(self) -> int:
        """The number of channels, C."""
        return len(self.mean)

    @property
    def var(self) -> Float64:
        """Population variance, (C,). Raises InputError if there are no values."""
        return self.m2 / self._divisor(self.count, 1)

    @property
    def var_unbiased(self) -> Float64:
        """Variance with the divisor count - 1, as torch keeps it. Raises InputError below 2."""
        return self.m2 / self._divisor(self.count - 1, 2)

    def _divisor(self, divisor: int, least: int) -> int:
        if divisor < 1:
            raise InputError(
                f"A variance needs at least {least} values per channel; there are {self.count}."
            )
        return divisor


@dataclass(frozen=True, eq=False)
class ImageMoments:
    """Moments of N images: of all their pixels, and of how one image differs from the next.

    Pixels of one image are alike, so what a statistic is worth depends on the number of images.
    With m_i the mean and v_i the population variance of a channel within image i, the sums below
    run over images and give the standard errors of the pooled mean and variance; all (C,) float64.

    pixels: moments of every pixel.  images: N.
    centre, within: the means of m_i and of v_i.
    m2, m3, m4: sums of (m_i - centre)^k.  v2: sum of (v_i - within)^2.
    mv, mmv: sums of (m_i - centre) (v_i - within) and (m_i - centre)^2 (v_i - within).
    """

    pixels: Moments
    images: int
    centre: Float64
    within: Float64
    m2: Float64
    m3: Float64
    m4: Float64
    v2: Float64
    mv: Float64
    mmv: Float64

    @classmethod
    def none(cls, num_features: int) -> ImageMoments:
        """The moments of no image: merging them changes nothing."""
        zero = np.zeros(num_features)
        return cls(Moments.none(num_features), 0, *[zero] * 8)

    @classmethod
    def of(
        cls, means: ArrayLike, variances: ArrayLike, pixels: int, *, name: str = "the images"
    ) -> ImageMoments:
        """Moments of N images of `pixels` pixels each.

        means, variances: (N, C), per image and channel, the variance of the population of pixels.
        Raises InputError if one is NaN or infinite, with the channel and `name`.
        """
        m, v = np.asarray(means, dtype=np.float64), np.asarray(variances, dtype=np.float64)
        if m.ndim != 2 or m.shape != v.shape:
            raise UsageError(
                f"Means and variances of images are arrays (N, C); {name} has {m.shape} and"
                f" {v.shape}."
            )
        _check_finite(m, name)
        _check_finite(v, name)
        if not len(m) or not pixels:
            return cls.none(m.shape[1])
        centre, within = _mean(m), _mean(v)
        d, t = m - centre, v - within
        d_squared = np.square(d)
        m2 = d_squared.sum(axis=0)
        return cls(
            Moments(len(m) * pixels, centre, pixels * (v.sum(axis=0) + m2)),
            len(m),
            centre,
            within,
            m2=m2,
            m3=(d_squared * d).sum(axis=0),
            m4=np.square(d_squared).sum(axis=0),
            v2=np.square(t).sum(axis=0),
            mv=(d * t).sum(axis=0),
            mmv=(d_squared * t).sum(axis=0),
        )

    @classmethod
    def pooled(cls, parts: Iterable[ImageMoments]) -> ImageMoments:
        """All parts together. Raises UsageError if there is none."""
        parts = list(parts)
        if not parts:
            raise UsageError("There are no moments to pool.")
        return functools.reduce(cls.merge, parts)

    def merge(self, other: ImageMoments) -> ImageMoments:
        """Moments of both sets of images together, exact up to rounding.

        The images may differ in their numbers of pixels. Raises UsageError if the numbers of
        channels differ.
        """
        pixels = self.pixels.merge(other.pixels)
        if not self.images or not other.images:
            return self if self.images else other
        share = other.images / (self.images + other.images)
        centre = self.centre + (other.centre - self.centre) * share
        within = self.within + (other.within - self.within) * share
        sums = zip(self._sums_about(centre, within), other._sums_about(centre, within), strict=True)
        return ImageMoments(
            pixels, self.images + other.images, centre, within, *(a + b for a, b in sums)
        )

    def _sums_about(self, centre: Float64, within: Float64) -> tuple[Float64, ...]:
        """m2, m3, m4, v2, mv and mmv, taken about another centre: sums of (d + a)^k (t + b)^l."""
        n, a, b = self.images, self.centre - centre, self.within - within
        return (
            self.m2 + n * a**2,
            self.m3 + 3 * a * self.m2 + n * a**3,
            self.m4 + 4 * a * self.m3 + 6 * a**2 * self.m2 + n * a**4,
            self.v2 + n * b**2,
            self.mv + n * a * b,
            self.mmv + b * self.m2 + 2 * a * self.mv + n * a**2 * b,
        )

    @property
    def mean_error(self) -> Float64:
        """Standard error of the pooled mean, by image; infinite for one image. (C,)."""
        return self._error(self.m2)

    @property
    def var_error(self) -> Float64:
        """Standard error of the pooled variance, by image; infinite for one image. (C,).

        It is that of the mean of q_i = mean over pixels of (x - mean)^2 = v_i + (m_i - mean)^2.
        """
        return self._error(self._q2())

    def scale_error(self, eps: float) -> Float64:
        """Relative standard error of 1 / sqrt(var + eps), the scale that is folded. (C,)."""
        return self.var_error / (2 * (self.pixels.var + eps))

    def images_needed(self, precision: float, eps: float) -> Float64:
        """Images after which chance moves a channel by less than `precision`, 19 times in 20. (C,).

        Both the mean, in units of sqrt(var + eps), and the folded scale, relative, are to be within
        +-precision of what endless images would give.
        """
        if self.images < 2:
            return np.full(len(self.centre), np.inf)
        reach = _TWO_SIDED_95 / precision
        unit = self.pixels.var + eps
        of_mean = self.m2 / (self.images - 1) / unit
        of_scale = self._q2() / (self.images - 1) / (2 * unit) ** 2
        return np.maximum(of_mean, of_scale) * reach**2

    def _q2(self) -> Float64:
        """Sum of squared deviations of q_i from their mean."""
        offset = self.pixels.mean - self.centre  # not 0 where images differ in size
        q2 = (
            self.v2
            + (self.m4 - self.m2**2 / max(self.images, 1))
            + 4 * offset**2 * self.m2
            + 2 * self.mmv
            - 4 * offset * (self.mv + self.m3)
        )
        return np.maximum(q2, 0.0)  # rounding may leave -1e-17 of m4

    def _error(self, squares: Float64) -> Float64:
        if self.images < 2:
            return np.full(len(self.centre), np.inf)
        error: Float64 = np.sqrt(squares / (self.images - 1) / self.images)
        return error


def movement(before: ImageMoments, now: ImageMoments, eps: float) -> float:
    """How far mean and standard deviation moved, in standard deviations, the worst channel."""
    unit = now.pixels.var + eps
    mean = np.abs(now.pixels.mean - before.pixels.mean) / np.sqrt(unit)
    sd = np.abs(np.log(unit / (before.pixels.var + eps))) / 2
    return float(np.maximum(mean, sd).max())


def batch_excess(batches: Sequence[ImageMoments]) -> float | None:
    """How much more the means of batches differ than chance explains: about 1 for shuffled images.

    The ratio of the variance between batches to that within (one-way analysis of variance of the
    images' means), the median over channels. None where it cannot be told: a single batch, or
    batches of one image.
    """
    batches = [batch for batch in batches if batch.images]
    if not batches:
        return None
    within: Float64 = np.sum([batch.m2 for batch in batches], axis=0)
    return excess_between(ImageMoments.pooled(batches), within, len(batches))


def excess_between(whole: ImageMoments, within: Float64, batches: int) -> float | None:
    """The `batch_excess` of `batches` batches that are `whole` together.

    within: the sum over batches of the m2 of each, (C,).
    """
    freedom = whole.images - batches
    alive = within > 0
    if batches < 2 or not freedom or not alive.any():
        return None
    between = np.maximum(whole.m2 - within, 0.0)[alive] / (batches - 1)
    return float(np.median(between / (within[alive] / freedom)))


def chance_limit(batches: int, images: int | None = None) -> float:
    """The `batch_excess` that shuffled images stay below, 999 times in 1000.

    The quantile of Fisher's F with batches - 1 and images - batches degrees of freedom (None: more
    images than counts), as Paulson approximates it (Annals of Mathematical Statistics 13, 1942);
    the median over channels scatters less. Never less than 1.5: what chance does not explain in
    thousands of batches may still be too little to matter. Seen at first layers, in batches of 8
    and of 250: CIFAR-10 sorted by class 2.2 and 40, MNIST 6.2 and 120; in the order of their files
    USPS 2.4 and 3.5, the MNIST test images 3.0 and 39; shuffled, 199 times in 200, all of them
    below 1.2 and 1.9.
    """
    if batches < 2:
        return math.inf
    a = 0.0 if images is None else 2 / (9 * max(images - batches, 1))
    b = 2 / (9 * (batches - 1))
    square = (1 - a) ** 2 - _ONE_IN_1000**2 * a
    if square <= 0:  # too few images to tell anything
        return math.inf
    product, rest = (1 - a) * (1 - b), (1 - b) ** 2 - _ONE_IN_1000**2 * b
    root = (product + math.sqrt(product**2 - square * rest)) / square
    return max(1.5, root**3)


def _mean(rows: Float64) -> Float64:
    """Column means, with a second pass for what rounding left in the first."""
    mean: Float64 = rows.mean(axis=0)
    mean += (rows - mean).mean(axis=0)
    return mean


def _check_finite(rows: Float64, name: str) -> None:
    """rows: (values, channels)."""
    finite = np.isfinite(rows)
    if not finite.all():
        bad = np.flatnonzero(~finite.all(axis=0))
        raise InputError(
            f"{name} holds NaN or infinity in {len(bad)} of {rows.shape[1]} channels, first in"
            f" channel {bad[0]}; no statistic follows from it."
        )


def _check_channels(a: Float64, b: Float64) -> None:
    if len(a) != len(b):
        raise UsageError(f"Moments of {len(a)} and of {len(b)} channels cannot be merged.")
