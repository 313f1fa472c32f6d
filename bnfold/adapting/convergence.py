"""How many batches are enough: the first ones, twice as many each time, until nothing moves.

Three things must hold. Twice as many batches moved no channel by more than the tolerance, mean and
deviation, in standard deviations. The standard errors, by image, say that endless images would not
move the median channel of any layer by more, 19 times in 20. And the batches differ no more than
chance explains: in sorted data the next class is still to come, however still the estimate stands.
(A drift that chance hides over all that was read cannot be told, nor can data of which all batches
so far are of one class; shuffled data needs neither.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnfold.adapting.networks import Network, Run
from bnfold.measuring.estimate import Estimate
from bnfold.measuring.moments import chance_limit, movement


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

    Estimated by the fast method, which costs two passes over what is taken. The whole set, where
    that is never so.
    """
    before: Estimate | None = None
    count = 1
    while True:
        feed = network.feed(First(data, count), max_bytes, is_share=run.ranks.size > 1)
        try:
            now = network.fast(feed, run)
        finally:
            feed.close()
        batches, images = (run.ranks.share(n) for n in (feed.batches, feed.images))
        is_all = all(n < count for n in batches)
        limit = chance_limit(sum(batches), sum(images))
        is_mixed = now.excess is None or now.excess <= limit
        if is_all or (is_mixed and before and _is_settled(network, before, now, tolerance)):
            return count
        before, count = now, 2 * count


def _is_settled(network: Network, before: Estimate, now: Estimate, tolerance: float) -> bool:
    for name, moments in now.moments.items():
        earlier, eps = before.moments.get(name), network.layers[name].eps
        if earlier is None or movement(earlier, moments, eps) > tolerance:
            return False
        if np.median(moments.images_needed(tolerance, eps)) > moments.images:
            return False
    return True
