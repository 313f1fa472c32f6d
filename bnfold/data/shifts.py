"""Shifts: ways in which a target domain differs from the source, made on purpose.

Each is a pure function of images (N, C, H, W) in [0, 1], an amount and a seed, and gives float32
images in [0, 1]. The same arguments give the same images. Corruptions of fixed severity, for
comparison with what others measured: corruptions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfold.errors import UsageError

Images = NDArray[np.float32]
Shift = Callable[[Images, float, int], Images]


def shifted(images: NDArray[Any], name: str, amount: float, seed: int = 0) -> Images:
    """The images under the shift `name` of SHIFTS.

    Raises UsageError for an unknown name, another shape, or values outside of [0, 1].
    """
    if name not in SHIFTS:
        raise UsageError(f"There is no shift {name!r}; there are {', '.join(SHIFTS)}.")
    x = images_in_unit_range(images, "A shift")
    made: Images = np.clip(SHIFTS[name](x, amount, seed), 0, 1, dtype=np.float32)
    return made


def images_in_unit_range(images: NDArray[Any], what: str) -> Images:
    """The images as float32. Raises UsageError unless they are (N, C, H, W) in [0, 1]."""
    x = np.asarray(images, dtype=np.float32)
    if x.ndim != 4:
        raise UsageError(f"{what} takes images (N, C, H, W); found shape {x.shape}.")
    if x.size and not (x.min() >= 0 and x.max() <= 1):
        raise UsageError(
            f"{what} takes images in [0, 1]; found values from {x.min():.3g} to {x.max():.3g}."
            " Apply it before mean and std."
        )
    return x


def gaussian_noise(x: Images, sigma: float, seed: int) -> Images:
    """Independent normal noise of standard deviation `sigma` on each value."""
    noise = np.random.default_rng(seed).standard_normal(x.shape, dtype=np.float32)
    noise *= np.float32(sigma)
    return x + noise


def salt_and_pepper(x: Images, share: float, seed: int) -> Images:
    """A `share` of the pixels black or white, in all channels."""
    draw = np.random.default_rng(seed).random((len(x), 1, *x.shape[2:]), dtype=np.float32)
    return np.where(draw < share / 2, 0, np.where(draw < share, 1, x)).astype(np.float32)


def contrast(x: Images, factor: float, seed: int) -> Images:
    """Distances from mid-grey times `factor`."""
    del seed
    return (x - np.float32(0.5)) * np.float32(factor) + np.float32(0.5)


def brightness(x: Images, amount: float, seed: int) -> Images:
    """`amount` added to each value."""
    del seed
    return x + np.float32(amount)


def blur(x: Images, sigma: float, seed: int) -> Images:
    """A Gaussian blur of `sigma` pixels; the border is repeated."""
    del seed
    if sigma <= 0:
        return x
    reach = int(np.ceil(3 * sigma))
    taps = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (2, 3):
        padding = [(0, 0)] * 4
        padding[axis] = (reach, reach)
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(x, padding, mode="edge"), len(taps), axis=axis
        )
        x = windows @ taps
    return x


def pixelate(x: Images, size: float, seed: int) -> Images:
    """Squares of `size` pixels, each of the colour of its centre."""
    del seed
    step = max(int(size), 1)
    rows, columns = (
        np.minimum(np.arange(n) // step * step + step // 2, n - 1) for n in x.shape[2:]
    )
    return x[:, :, rows[:, None], columns[None, :]]


def invert(x: Images, share: float, seed: int) -> Images:
    """Mixed with its negative: 1 is the negative itself."""
    del seed
    return x + np.float32(share) * (1 - 2 * x)


SHIFTS: Mapping[str, Shift] = {
    "gaussian_noise": gaussian_noise,
    "salt_and_pepper": salt_and_pepper,
    "contrast": contrast,
    "brightness": brightness,
    "blur": blur,
    "pixelate": pixelate,
    "invert": invert,
}
