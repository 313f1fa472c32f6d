"""What an estimate of statistics gives, and how it tells how far it is; whatever is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bnfold.measuring.feed import Passes
from bnfold.measuring.moments import ImageMoments
from bnfold.measuring.statistics import Statistics

# A network is iterated over where a batch norm is used twice: until nothing moves by more than
# this, in standard deviations and relative.
TOLERANCE = 1e-6
MAX_ROUNDS = 30


@dataclass(frozen=True, eq=False)
class Estimate:
    """What was measured: per layer, in the order of the forward, the moments of its input.

    statistics: what each layer got for it.
    excess: the `batch_excess` at the first layer.  rounds: 1, or more where a batch norm is used
    twice (`reused`), `residual` being what the last round still changed.  spilled: bytes of
    activations that lay on disk, at most.  passes: over the data where batches could not walk in
    step, 0 where they could.
    """

    moments: Mapping[str, ImageMoments]
    statistics: Mapping[str, Statistics]
    excess: float | None
    rounds: int = 1
    passes: int = 0
    spilled: int = 0
    reused: tuple[str, ...] = ()
    residual: float = 0.0


class Progress:
    """Counts steps, one per batch and stretch of the network, and tells (done, total)."""

    def __init__(
        self,
        tell: Callable[[int, int | None], None] | None,
        feed: Passes,
        stretches: int,
        diagnose: bool,
    ) -> None:
        self._tell, self._feed, self._done = tell, feed, 0
        self._per_batch = stretches + diagnose

    def step(self) -> None:
        """One batch got one layer further."""
        self._done += 1
        if self._tell is not None:
            total = self._total()
            self._tell(self._done if total is None else min(self._done, total), total)

    def finish(self) -> None:
        """All is done, whatever was expected."""
        if self._tell is not None:
            total = self._total() or self._done
            self._tell(total, total)

    def _total(self) -> int | None:
        return None if self._feed.batches is None else self._feed.batches * self._per_batch
