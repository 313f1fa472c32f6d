"""Statistics of batch norms on target data, for an ONNX graph, through onnxruntime.

What modules.py does for a torch network, with the same result: `exact` measures each layer over the
whole set with every layer before it adapted already, `fast` is one pass in which each batch norm
normalises by its batch. The graph is cut at its batch norms (segments.py). For `exact` all batches
pass one segment before any passes the next, and what they hold in between goes to a shelf; for
`fast` a batch passes all segments in turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import onnx_ir as ir
import torch

from bnfold.errors import InputError
from bnfold.measuring import diagnosis
from bnfold.measuring.arrays import ArrayFeed, Arrays, image_count
from bnfold.measuring.estimate import MAX_ROUNDS, TOLERANCE, Estimate, Progress
from bnfold.measuring.meter import Found, Meter, Tally, batch_statistics
from bnfold.measuring.moments import Float64, ImageMoments, movement
from bnfold.measuring.norms import Norm, stored
from bnfold.measuring.ranks import Alone, Ranks, Waiting
from bnfold.measuring.segments import Cut, Use
from bnfold.measuring.shelf import AnyArray, Bundle, Shelf
from bnfold.measuring.statistics import Layer, Rule, Statistics
from bnfold.proof.places.runtime import Session, open_session

Norms = Mapping[str, Norm]
OnSettled = Callable[[str, ImageMoments], None] | None


class _Walker:
    """Takes batches through a graph, segment by segment, and measures what batch norms read.

    Sessions are opened when the first batch comes, whose arrays tell the types.
    """

    def __init__(self, cut: Cut, norms: Norms, provider: str, threads: int | None) -> None:
        self.cut = cut
        self._provider, self._threads = provider, threads
        self._sessions: dict[int, Session] = {}
        self._meter = Meter()
        self._readers = {use.value: norms[use.layer].layer for use in reversed(cut.uses)}

    def walk(
        self, index: int, held: Arrays, given: Mapping[Use, Arrays], number: int
    ) -> tuple[dict[str, Found], Arrays]:
        """One segment: what was found of the values that batch norms read, and what is held now."""
        segment = self.cut.segments[index]
        known = held
        if segment.gives:
            feeds = {name: held[name] for name in segment.reads}
            for use in segment.uses:
                feeds |= given[use]
            known = held | self._session(index, feeds).run(feeds)
        found = {
            value: self._measure(self._readers[value], known[value], number)
            for value in segment.measured
        }
        return found, {name: known[name] for name in segment.held}

    def close(self, index: int) -> None:
        """Forget the session of a segment."""
        self._sessions.pop(index, None)

    def _session(self, index: int, feeds: Arrays) -> Session:
        if index not in self._sessions:
            model = self.cut.model_of(self.cut.segments[index], feeds)
            self._sessions[index] = open_session(
                model, self._provider, optimize=True, threads=self._threads, part=True
            )
        return self._sessions[index]

    def _measure(self, layer: Layer, array: AnyArray, number: int) -> Found:
        if array.ndim < 2 or array.shape[1] != layer.num_features:
            raise InputError(
                f"'{layer.name}' has {layer.num_features} channels, but in batch {number} its"
                f" input has shape {array.shape}."
            )
        return self._meter(layer.name, torch.from_numpy(array), number)


# --- fast -----------------------------------------------------------------------------------------


def fast(
    model: ir.Model,
    norms: Norms,
    feed: ArrayFeed,
    progress: Progress,
    *,
    rule: Rule | None = None,
    ranks: Ranks | None = None,
    provider: str = "cpu",
    threads: int | None = None,
) -> Estimate:
    """One pass; each layer normalises by its batch, the moments of all batches are pooled."""
    rule, ranks = rule or Rule(), ranks or Alone()
    cut = Cut(model, norms)
    walker = _Walker(cut, norms, provider, threads)
    tallies: dict[str, Tally] = {}
    for number, batch in enumerate(feed):
        if not image_count(batch):
            continue
        held, given, found = batch, dict[Use, Arrays](), dict[str, Found]()
        for index in range(cut.waves + 1):
            now, held = walker.walk(index, held, given, number)
            found |= now
            for use in cut.wave(index + 1):
                norm, seen = norms[use.layer], found[use.value]
                statistics = stored(norm, batch_statistics(rule, norm.layer, seen))
                given[use] = cut.feeds(use, statistics)
                if use.layer not in tallies:
                    tallies[use.layer] = Tally(use.layer, compare=not tallies)
                tallies[use.layer].add(seen)
        progress.step()
    together = ranks.together({name: tally.waiting() for name, tally in tallies.items()})
    moments = {name: together[name].moments for name in norms if name in together}
    statistics_of = {}
    for name, whole in moments.items():
        statistics_of[name] = stored(norms[name], rule(norms[name].layer, whole))
    first = cut.uses[0].layer
    once = first in together and len(norms[first].nodes) == 1
    excess = together[first].excess if once else None
    return Estimate(moments, statistics_of, excess)


# --- exact ----------------------------------------------------------------------------------------


def exact(
    model: ir.Model,
    norms: Norms,
    feed: ArrayFeed,
    progress: Progress,
    *,
    rule: Rule | None = None,
    ranks: Ranks | None = None,
    max_bytes: int,
    on_settled: OnSettled = None,
    resumed: Mapping[str, ImageMoments] | None = None,
    provider: str = "cpu",
    threads: int | None = None,
) -> Estimate:
    """Each layer measured over the whole set with all layers before it adapted.

    A layer that is used more than once gets the statistics of all its uses together, found as a
    fixed point; see modules.exact. resumed: layers that an earlier run has settled; the graph is
    cut and run as it was then, so that the others get the same bits.
    max_bytes: what the batches may hold in memory between two segments; the rest goes to disk.
    """
    rule, ranks = rule or Rule(), ranks or Alone()
    run = _Exact(model, norms, feed, progress, rule, ranks, max_bytes, on_settled)
    run.known = dict(resumed or {})
    run.run(provider, threads)
    return Estimate(
        {name: run.moments[name] for name in norms},
        {name: run.statistics[name] for name in norms},
        run.excess,
        run.rounds,
        reused=tuple(run.reused),
        residual=run.residual,
    )


@dataclass
class _Exact:
    """All layers from the first to the last, and again until those used twice stay as they are."""

    model: ir.Model
    norms: Norms
    feed: ArrayFeed
    progress: Progress
    rule: Rule
    ranks: Ranks
    max_bytes: int
    on_settled: OnSettled
    known: Mapping[str, ImageMoments] = field(default_factory=dict)
    moments: dict[str, ImageMoments] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    excess: float | None = None
    rounds: int = 0
    residual: float = 0.0

    def __post_init__(self) -> None:
        self.reused = [name for name, norm in self.norms.items() if len(norm.nodes) > 1]

    def run(self, provider: str, threads: int | None) -> None:
        if self.known.keys() >= self.norms.keys():
            for name in self.norms:
                self._set(name, self.known[name])
            return
        if self.reused:
            self.known = {}  # told when all was done, and not before
        self.cut = Cut(self.model, self.norms)
        self.walker = _Walker(self.cut, self.norms, provider, threads)
        while True:
            self._round()
            self.rounds += 1
            self.residual = self._settle_reused()
            if self.residual <= TOLERANCE or self.rounds >= MAX_ROUNDS:
                break
        if self.reused:
            for name in self.norms:
                self._tell(name)

    def _round(self) -> None:
        """Segment after segment, each for all batches."""
        first = self.cut.uses[0]
        self.tallies = {
            use.value: Tally(use.layer, compare=use.value == first.value)
            for use in reversed(self.cut.uses)
        }
        shelf = Shelf(self.max_bytes)
        try:
            waiting = self._walk(0, self.feed, shelf)
            for wave in range(1, self.cut.waves + 1):
                self._settle(wave)
                waiting = self._walk(wave, _taken(waiting, shelf), shelf)
        finally:
            shelf.close()

    def _walk(self, index: int, batches: Iterable[Arrays], shelf: Shelf) -> deque[Bundle]:
        given = {
            use: self.cut.feeds(use, self.statistics[use.layer])
            for use in self.cut.segments[index].uses
        }
        waiting = deque[Bundle]()
        for number, held in enumerate(batches):
            found, held = self.walker.walk(index, held, given, number)
            waiting.append(shelf.put(held))
            for value, seen in found.items():
                self.tallies[value].add(seen)
                self.progress.step()
        self.walker.close(index)
        return waiting

    def _settle(self, wave: int) -> None:
        """The layers first used in this wave; those used twice in the first round alone."""
        fresh = [
            use
            for use in self.cut.wave(wave)
            if use.first and not (self.rounds and use.layer in self.reused)
        ]
        own = {use.layer: [self.tallies[use.value]] for use in fresh if use.layer not in self.known}
        together = self._together(own)
        first = together.get(self.cut.uses[0].layer)
        if self.excess is None and first is not None:
            self.excess = first.excess
        for use in fresh:
            if use.layer in self.known:
                self._set(use.layer, self.known[use.layer])
                continue
            self._set(use.layer, _found(use.layer, together))
            if not self.reused:
                self._tell(use.layer)

    def _settle_reused(self) -> float:
        """Those used twice, by all their uses; how far they moved, the worst channel."""
        if not self.reused:
            return 0.0
        before = dict(self.moments) if self.rounds > 1 else {}
        own = dict[str, list[Tally]]()
        for use in self.cut.uses:
            if use.layer in self.reused:
                own.setdefault(use.layer, []).append(self.tallies[use.value])
        together = self._together(own)
        for name in self.reused:
            self._set(name, _found(name, together))
        return max(
            movement(before[name], self.moments[name], self.norms[name].layer.eps)
            if name in before
            else float("inf")
            for name in self.reused
        )

    def _together(self, own: Mapping[str, list[Tally]]) -> Mapping[str, Waiting]:
        """What the layers saw in all processes."""
        return self.ranks.together(
            {
                name: reduce(Waiting.merge, [tally.waiting() for tally in tallies])
                for name, tallies in own.items()
                if tallies[0].batches
            }
        )

    def _set(self, name: str, moments: ImageMoments) -> None:
        layer = self.norms[name].layer
        self.moments[name] = moments
        self.statistics[name] = stored(self.norms[name], self.rule(layer, moments))

    def _tell(self, name: str) -> None:
        if self.on_settled is not None:
            self.on_settled(name, self.moments[name])


def _found(name: str, together: Mapping[str, Waiting]) -> ImageMoments:
    if name not in together:
        raise InputError("The target data holds no image; nothing can be estimated from it.")
    return together[name].moments


def _taken(waiting: deque[Bundle], shelf: Shelf) -> Iterator[Arrays]:
    """The batches that wait, each let go of as it is taken."""
    while waiting:
        yield shelf.take(waiting.popleft())


# --- looking at a graph ---------------------------------------------------------------------------


def measure(
    model: ir.Model,
    norms: Norms,
    feed: ArrayFeed,
    progress: Progress,
    *,
    provider: str = "cpu",
    threads: int | None = None,
) -> dict[str, ImageMoments]:
    """What the layers `norms` see, the graph being as it is."""
    watch = _Watch(model, norms, provider, threads)
    source = watch.side({name: norm.layer.source for name, norm in norms.items()})
    for number, batch in enumerate(feed):
        watch.call(source, batch, number)
        progress.step()
    return source.totals()


def observe(
    model: ir.Model,
    statistics: Mapping[str, Statistics],
    norms: Norms,
    feed: ArrayFeed,
    progress: Progress,
    *,
    provider: str = "cpu",
    threads: int | None = None,
) -> diagnosis.Observed:
    """Run the graph as it is and with `statistics` over the target and watch the layers `norms`."""
    watch = _Watch(model, norms, provider, threads)
    before = watch.side({name: norm.layer.source for name, norm in norms.items()})
    after = watch.side(statistics)
    comparison = diagnosis.Comparison()
    for number, batch in enumerate(feed):
        outputs = [watch.call(side, batch, number) for side in (before, after)]
        comparison.add(*(_class_scores(held, model) for held in outputs))
        progress.step()
    return diagnosis.Observed(before.totals(), after.totals(), comparison.result())


class _Side:
    """A graph with certain statistics, and what its layers saw."""

    def __init__(self, given: Mapping[Use, Arrays], names: Iterable[str]) -> None:
        self.given = given
        self.tallies = {name: Tally(name) for name in names}

    def totals(self) -> dict[str, ImageMoments]:
        return {name: tally.total() for name, tally in self.tallies.items() if tally.batches}


class _Watch:
    """The sessions of one graph, whatever its statistics."""

    def __init__(self, model: ir.Model, norms: Norms, provider: str, threads: int | None) -> None:
        self._cut = Cut(model, norms, to_outputs=True)
        self._walker = _Walker(self._cut, norms, provider, threads)
        self._names = list(norms)

    def side(self, statistics: Mapping[str, Statistics]) -> _Side:
        given = {use: self._cut.feeds(use, statistics[use.layer]) for use in self._cut.uses}
        return _Side(given, self._names)

    def call(self, side: _Side, batch: Arrays, number: int) -> Arrays:
        """The outputs for one batch."""
        held = batch
        for index in range(self._cut.waves + 1):
            found, held = self._walker.walk(index, held, side.given, number)
            for use in self._cut.uses:
                if use.value in found:
                    side.tallies[use.layer].add(found[use.value])
        return held


def _class_scores(held: Arrays, model: ir.Model) -> Float64 | None:
    """Scores (N, K) in the first output, by its shape; None where there are none."""
    array = held.get(str(model.graph.outputs[0].name)) if model.graph.outputs else None
    if array is None or array.dtype.kind != "f" or array.ndim != 2 or array.shape[1] < 2:
        return None
    return array.astype(np.float64)
