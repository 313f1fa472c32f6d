"""Which of several functions is quicker: run in turn, compared within a round.

Every round runs each function once, in an order drawn anew, so that a disturbance of the machine
falls on all. A function's ratios are its time over the measure's time in the same round. As the
order is drawn, two functions that take the same time are as likely to be ahead of one another, so
the count of rounds in which one was ahead is binomial, whatever the noise looks like: the sign
test. Its counterpart, an interval of the median ratio between two order statistics, says how large
a difference is as well, and is what a verdict is made of.

The interval is of the rounds as they were: two sessions of one and the same file differ a little
all the time (where their memory lies), and no number of rounds makes that less. So everything is
opened anew for each of several sittings, a difference is told only beyond a margin, and only where
every sitting by itself shows it. The control, which is the measure once more, says how wide the
margin is; MARGIN is the least. Each verdict stands by itself: none is made stricter because there
are many.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Run = Callable[[], object]
Clock = Literal["processor", "wall"]
Verdict = Literal["quicker", "slower", "no difference seen"]

CLOCKS: Mapping[Clock, Callable[[], float]] = {
    "processor": time.process_time,
    "wall": time.perf_counter,
}
CONFIDENCE = 0.99
FEWEST = 9  # rounds: below 8 no two order statistics hold the median with CONFIDENCE
MARGIN = 0.02
LONG_ENOUGH = 2e-3  # seconds: what is quicker is run several times for one reading of the clock
WARM = 3  # runs before the first that counts


def repeats_of(runs: Sequence[Run]) -> int:
    """How often each is run for one reading of the clock, so that the quickest takes a while.

    Every function is warm afterwards.
    """
    quickest = math.inf
    for run in runs:
        for _ in range(WARM):
            begun = time.perf_counter()
            run()
            quickest = min(quickest, time.perf_counter() - begun)
    return max(1, math.ceil(LONG_ENOUGH / max(quickest, 1e-7)))


def timed_rounds(
    runs: Mapping[str, Run],
    *,
    clock: Clock,
    rounds: int,
    seconds: float,
    repeats: int,
    draw: random.Random,
) -> list[dict[str, float]]:
    """Seconds of one run of each function, by round; `seconds` of wall time end it, or `rounds`.

    At least one round is run, however long it takes.
    """
    read = CLOCKS[clock]
    order, until = list(runs), time.monotonic() + seconds
    done: list[dict[str, float]] = []
    while len(done) < rounds and (not done or time.monotonic() < until):
        draw.shuffle(order)
        taken = {}
        for name in order:
            run = runs[name]
            begun = read()
            for _ in range(repeats):
                run()
            taken[name] = (read() - begun) / repeats
        done.append({name: taken[name] for name in runs})
    return done


@dataclass(frozen=True)
class Spread:
    """Values of several sittings: median, quartiles, and an interval that holds the median of all
    rounds that these sittings could have had with CONFIDENCE. sittings: the median of each.
    """

    median: float
    quartiles: tuple[float, float]
    interval: tuple[float, float]
    sittings: tuple[float, ...]


def spread_of(*sittings: Sequence[float]) -> Spread:
    """The spread of at least two values, by sitting."""
    values = [value for sitting in sittings for value in sitting]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    medians = tuple(statistics.median(sitting) for sitting in sittings)
    return Spread(middle, (low, high), interval_of_median(values), medians)


def interval_of_median(
    values: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The two order statistics that hold the median with this confidence, for any distribution.

    (0, inf) of fewer values than that takes. Source: the number of values below the median is
    binomial with 1/2; Conover, Practical Nonparametric Statistics, chapter 3.2.
    """
    n, ordered = len(values), sorted(values)
    # the largest k with P(fewer than k values below the median) <= (1 - confidence) / 2
    below, k = 0.0, 0
    while k <= n // 2:
        below += math.comb(n, k) / 2**n
        if below > (1 - confidence) / 2:
            break
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (0.0, math.inf)


def margin_of(control: Spread) -> float:
    """How far a ratio must be from 1 to be told: what the control shows, and at least MARGIN.

    The control shows the ends of its interval, and the sitting that was furthest off.
    """
    shown = [*control.interval, *control.sittings]
    return max(MARGIN, max(shown) - 1, 1 / min(shown) - 1 if min(shown) > 0 else math.inf)


def verdict_of(ratios: Spread, margin: float) -> Verdict:
    """Whether the median ratio's interval and every sitting lie beyond the margin, on one side."""
    seen = [*ratios.interval, *ratios.sittings]
    if max(seen) * (1 + margin) < 1:
        return "quicker"
    if min(seen) > 1 + margin:
        return "slower"
    return "no difference seen"
