"""When enough images were seen: a stop rule for statistics that are estimated batch by batch.

Three things must hold. The last batches moved no channel by more than the tolerance, mean and
deviation, in standard deviations. The standard errors, by image, say that endless images would not
move the median channel of any layer by more, 19 times in 20. And the batches differ no more than
chance explains: in sorted data the next class is still to come, however still the estimate stands.
(A drift that chance hides over all that was read cannot be told, nor can data of which all batches
so far are of one class; shuffled data needs neither.)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bnfold.adapting.moments import Float64, ImageMoments, chance_limit, excess_between
from bnfold.adapting.ranks import Waiting
from bnfold.errors import UsageError

STILL = 3  # batches in a row that moved nothing


def movement(before: ImageMoments, now: ImageMoments, eps: float) -> Float64:
    """How far mean and standard deviation moved, in standard deviations, the larger; (C,)."""
    unit = now.pixels.var + eps
    mean = np.abs(now.pixels.mean - before.pixels.mean) / np.sqrt(unit)
    sd = np.abs(np.log(unit / (before.pixels.var + eps))) / 2
    larger: Float64 = np.maximum(mean, sd)
    return larger


class Convergence:
    """Asked after each batch.

    eps: of each layer.  tolerance: what the statistics may be off, in standard deviations.
    """

    def __init__(self, eps: Mapping[str, float], tolerance: float) -> None:
        if not 0 < tolerance < 1:
            raise UsageError(f"stop is {tolerance:g}; it must lie between 0 and 1.")
        self._eps, self._tolerance = eps, tolerance
        self._before: dict[str, ImageMoments] = {}
        self._still = 0

    def enough(self, seen: Mapping[str, Waiting]) -> bool:
        """Whether what was seen so far will do; all layers, all processes."""
        now = {name: found.moments for name, found in seen.items()}
        is_still = now.keys() == self._before.keys() and all(
            movement(self._before[name], moments, self._eps[name]).max() < self._tolerance
            for name, moments in now.items()
        )
        self._still = self._still + 1 if is_still else 0
        self._before = now
        return (
            bool(now)
            and self._still >= STILL
            and all(self._is_known(name, moments) for name, moments in now.items())
            and not any(map(_is_sorted, seen.values()))
        )

    def _is_known(self, name: str, moments: ImageMoments) -> bool:
        needed = moments.images_needed(self._tolerance, self._eps[name])
        return bool(np.median(needed) <= moments.images)


def excess_of(found: Waiting) -> float | None:
    """How much the batches differ, see `batch_excess`; None where it was not looked at."""
    if found.within is None:
        return None
    return excess_between(found.moments, found.within, found.batches)


def _is_sorted(found: Waiting) -> bool:
    excess = excess_of(found)
    return excess is not None and excess > chance_limit(found.batches)
