"""How many batches are enough: the first ones, twice as many each time, until nothing moves."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnfold.adapting.estimate import Estimate
from bnfold.adapting.networks import Network, Run


@dataclass(frozen=True)
class First(Iterable[Any]):
    """The first `count` batches of what can be read again."""

    batches: Iterable[Any]
    count: int

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.batches), self.count)


def enough(
    network: Network, data: Iterable[Any], run: Run, tolerance: float, max_bytes: int
) -> int:
    """The number of batches of each process after which more change nothing that matters.

    Statistics of the first n batches are compared with those of the first n / 2, by the fast
    method: no mean may have moved by more than `tolerance` standard deviations, no deviation by
    more than that, relative; and by the standard errors of images the median channel of each layer
    is known as well. The whole set, where that is never so. Costs two passes over what is taken.
    """
    before: Estimate | None = None
    count = 1
    while True:
        feed = network.feed(First(data, count), max_bytes, is_share=run.ranks.size > 1)
        try:
            found = network.fast(feed, run)
        finally:
            feed.close()
        is_all = all(n < count for n in run.ranks.share(feed.batches))
        if is_all or (before is not None and _is_settled(network, before, found, tolerance)):
            return count
        before, count = found, 2 * count


def _is_settled(network: Network, before: Estimate, now: Estimate, tolerance: float) -> bool:
    for name, moments in now.moments.items():
        earlier, eps = before.moments.get(name), network.layers[name].eps
        if earlier is None or earlier.pixels.count < 2:
            return False
        unit = moments.pixels.var + eps
        mean = np.abs(moments.pixels.mean - earlier.pixels.mean) / np.sqrt(unit)
        sd = np.abs(np.log(unit / (earlier.pixels.var + eps))) / 2
        if max(mean.max(), sd.max()) > tolerance:
            return False
        if np.median(moments.images_needed(tolerance, eps)) > moments.images:
            return False
    return True
