"""Channel-affine maps and gauges: the algebra of folding.

A `ChannelAffine` is x -> scale * x + shift with a scale and a shift per channel; inference batch
normalization is one. A `Gauge` says how the folded graph carries a value x of the original graph:

    x~ = scale * (x - origin)        and back        x = x~ / scale + origin

In this form size and position of a channel are independent of each other. Through a map
y = s x + t whose two sides become one tensor, the scales obey  scale_x = s * scale_y  and the
origins move as points do,  origin_y = s * origin_x + t.

Two kinds of channel stand outside the group, where a scale of the network is exactly 0 (gamma = 0):

    scale = 0      written constant: x~ is `origin`, whatever x was; nobody can read x back
    scale = inf    known constant: x is `origin`, whatever x~ holds; readers take it from here

All arrays are float64 and broadcast against the value: the value's rank, size 1 along every axis
along which they are constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def canonical(array: Array) -> Array:
    """The same array with size 1 along every axis along which it is constant (NaN equals NaN)."""
    for axis, size in enumerate(array.shape):
        if size > 1:
            first = array[(slice(None),) * axis + (slice(0, 1),)]
            if identical(first, array):
                array = first
    return array


def identical(a: Array, b: Array) -> bool:
    """Equal element by element after broadcasting, NaN equal to NaN, without any tolerance."""
    return bool(np.all((a == b) | (np.isnan(a) & np.isnan(b))))


@dataclass(frozen=True, eq=False)
class ChannelAffine:
    """x -> scale * x + shift; both arrays broadcast against x."""

    scale: Array
    shift: Array


@dataclass(frozen=True, eq=False)
class Gauge:
    """How the folded graph carries a value: x~ = scale * (x - origin)."""

    scale: Array
    origin: Array

    @staticmethod
    def identity(rank: int) -> Gauge:
        """x~ = x for a value of this rank."""
        one = (1,) * rank
        return Gauge(np.ones(one), np.zeros(one))

    @property
    def is_identity(self) -> bool:
        """True where the folded graph carries the value itself."""
        return bool(np.all(self.scale == 1) and np.all(self.origin == 0))

    @property
    def read_scale(self) -> Array:
        """1 / scale, which is 0 on known constants. Written constants cannot be read: NaN."""
        with np.errstate(divide="ignore"):
            return np.where(self.scale == 0, np.nan, 1 / self.scale)

    def write(self, value: Array) -> Array:
        """scale * (value - origin); on written constants the constant itself.

        Known constants are not written by anybody: their channels come back as 0.
        """
        with np.errstate(invalid="ignore"):
            written = self.scale * (value - self.origin)
        constant = self.origin + 0 * value
        return np.where(self.scale == 0, constant, np.where(np.isinf(self.scale), 0, written))
