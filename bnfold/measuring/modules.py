"""Statistics of batch norms on target data, for a torch network in eval mode.

`exact` is Algorithm 1 of the AdaBN paper (Li et al., "Revisiting batch normalization for practical
domain adaptation", 2016) in topological order: a layer is measured over the whole set, with every
layer before it adapted already (rounds.py). `fast` is one pass in which each batch norm normalises
by its batch, the moments of all batches pooled.

Which statistics a layer gets for what was measured, the rule says. Several processes, each with
batches of its own, settle the same layers in the same order from their merged moments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from bnfold.measuring import diagnosis
from bnfold.measuring.estimate import MAX_ROUNDS, TOLERANCE, Estimate, Progress
from bnfold.measuring.feed import Feed
from bnfold.measuring.layers import (
    Layers,
    OnSettled,
    Writer,
    layer_of,
    statistics_of,
    watching,
    write,
)
from bnfold.measuring.meter import Meter, Tally
from bnfold.measuring.moments import Float64, ImageMoments, movement
from bnfold.measuring.ranks import Alone, Ranks
from bnfold.measuring.rounds import IN_MEMORY, Round
from bnfold.measuring.statistics import Rule

__all__ = [
    "Layers",
    "exact",
    "fast",
    "layer_of",
    "measure",
    "observe",
    "statistics_of",
    "watching",
    "write",
]


# --- fast -----------------------------------------------------------------------------------------


def fast(
    net: nn.Module,
    layers: Layers,
    feed: Feed,
    progress: Progress,
    *,
    rule: Rule = Rule(),  # noqa: B008  # frozen
    ranks: Ranks = Alone(),  # noqa: B008  # holds nothing
) -> Estimate:
    """One pass; each layer normalises by its batch, the moments of all batches are pooled.

    Exact for the first layer; deeper, a batch of B images leaves an error of the order 1 / B.
    """
    writer, meter, tallies = Writer(layers, rule), Meter(), dict[str, Tally]()
    number = 0

    def visit(name: str, x: Tensor) -> None:
        found = meter(name, x, number)
        if len(found.means):
            writer.normalise(name, found)
            if name not in tallies:
                tallies[name] = Tally(name, compare=not tallies)
            tallies[name].add(found)

    with watching(layers, visit):
        for number, batch in enumerate(feed):
            feed.call(net, batch, number)
            progress.step()
    firsts = set(ranks.share(next(iter(tallies), None))) - {None}
    merged = ranks.together({name: tally.waiting() for name, tally in tallies.items()})
    moments = {name: waiting.moments for name, waiting in merged.items()}
    for name, found in moments.items():
        writer.settle(name, found)
    excess = merged[firsts.pop()].excess if len(firsts) == 1 else None
    return writer.estimate(moments, excess)


# --- exact ----------------------------------------------------------------------------------------


def exact(
    net: nn.Module,
    layers: Layers,
    feed: Feed,
    progress: Progress,
    *,
    rule: Rule = Rule(),  # noqa: B008  # frozen
    ranks: Ranks = Alone(),  # noqa: B008  # holds nothing
    max_bytes: int,
    on_settled: OnSettled | None = None,
    resumed: Mapping[str, ImageMoments] | None = None,
) -> Estimate:
    """Each layer measured over the whole set with all layers before it adapted.

    Where a batch norm is used more than once in a forward, or batches meet two of them in different
    orders, there is no order in which each comes after those before it. Such a layer's statistics
    are those of all its uses together, found as a fixed point: measured with the values of the
    round before, the other layers exactly, until nothing moves any more.

    resumed: what `on_settled` was given, in its order, by a run that was broken off: these layers
    are not measured again, unless the batches visit them more often than it saw.
    """
    writer = Writer(layers, rule, on_settled)
    known = dict(resumed or {})
    reused: dict[str, ImageMoments] = {}
    way, passes, spilled, rounds, change = IN_MEMORY, 0, 0, 0, float("inf")
    while change > TOLERANCE and rounds < MAX_ROUNDS:
        run = Round(net, layers, feed, frozenset(reused), progress, writer, ranks, max_bytes, way)
        run.resume(known)
        run.run()
        passes, spilled = passes + run.passes, max(spilled, run.spilled)
        way = run.way
        complete = run.saw_all_of(known)
        known = {}
        if not complete:
            continue
        rounds, change = rounds + 1, 0.0  # where each layer is used once, one round is all
        extra = ranks.together({name: tally.waiting() for name, tally in run.extra.items()})
        for name, waiting in extra.items():
            settled = run.settled.pop(name, None)
            now = waiting.moments if settled is None else settled.merge(waiting.moments)
            before, eps = reused.get(name), writer.described[name].eps
            moved = float("inf") if before is None else movement(before, now, eps)
            change = max(change, moved)
            writer.settle(name, now)
            reused[name] = now
    found = writer.estimate({**run.settled, **reused}, run.excess)
    return replace(
        found,
        rounds=rounds,
        passes=passes,
        spilled=spilled,
        reused=tuple(reused),
        residual=change,
    )


# --- looking at a network -------------------------------------------------------------------------


def measure(
    net: nn.Module, names: list[str], feed: Feed, progress: Progress
) -> dict[str, ImageMoments]:
    """What the layers `names` see, the network being as it is, in eval mode."""
    watch = _Watch(net, names)
    with watch.open():
        for number, batch in enumerate(feed):
            watch.call(feed, batch, number)
            progress.step()
    return watch.totals()


def observe(
    source: nn.Module, adapted: nn.Module, names: list[str], feed: Feed, progress: Progress
) -> diagnosis.Observed:
    """Run both networks, in eval mode, over the target and watch the layers `names`."""
    before, after = _Watch(source, names), _Watch(adapted, names)
    comparison = diagnosis.Comparison()
    with before.open(), after.open():
        for number, batch in enumerate(feed):
            outputs = [watch.call(feed, batch, number) for watch in (before, after)]
            comparison.add(*map(_class_scores, outputs))
            progress.step()
    return diagnosis.Observed(before.totals(), after.totals(), comparison.result())


class _Watch:
    """A network and the tallies of its layers."""

    def __init__(self, net: nn.Module, names: list[str]) -> None:
        self._net = net
        self._layers: Layers = {name: net.get_submodule(name) for name in names}
        self._meter, self._tallies, self._number = Meter(), dict[str, Tally](), 0

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        with watching(self._layers, self._visit):
            yield

    def call(self, feed: Feed, batch: Any, number: int) -> Any:
        self._number = number
        return feed.call(self._net, batch, number)

    def totals(self) -> dict[str, ImageMoments]:
        return {name: tally.total() for name, tally in self._tallies.items()}

    def _visit(self, name: str, x: Tensor) -> None:
        self._tallies.setdefault(name, Tally(name)).add(self._meter(name, x, self._number))


def _class_scores(output: Any) -> Float64 | None:
    """Scores (N, K) in an output, by its shape; None where there are none."""
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out"))
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.is_floating_point() and output.dim() == 2:
        return output.detach().double().cpu().numpy() if output.shape[1] > 1 else None
    return None
