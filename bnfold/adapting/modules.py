"""Statistics of batch norms on target data, for a torch network in eval mode.

`exact` is Algorithm 1 of the AdaBN paper (Li et al., "Revisiting batch normalization for practical
domain adaptation", 2016) in topological order: a layer is measured over the whole set, with every
layer before it adapted already. The batches walk the network in step and wait at each batch norm,
so that it takes one forward's compute; where their activations do not fit into memory, a pass per
batch norm gives the same numbers. `fast` is one pass in which each batch norm normalises by its
batch, the moments of all batches pooled.

A layer is measured in a hook before it runs, and its running statistics are set before its own
forward reads them: whatever a subclass does behind the normalisation stays as it is. Which they
are for what was measured, the rule says. Several processes, each with batches of its own, settle
the same layers in the same order from their merged moments.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfold.adapting import diagnosis
from bnfold.adapting.convergence import Convergence, movement
from bnfold.adapting.estimate import TOLERANCE, Estimate, Progress
from bnfold.adapting.feed import Feed, byte_count, copied
from bnfold.adapting.lockstep import Steps, task_maker
from bnfold.adapting.meter import Found, Meter, Tally, pooled
from bnfold.adapting.moments import Float64, ImageMoments, Moments, excess_between
from bnfold.adapting.ranks import Alone, Ranks, Waiting
from bnfold.adapting.spill import Mixed, Spill, kept_by
from bnfold.adapting.statistics import Layer, Rule, Statistics
from bnfold.errors import InputError, RuntimeUnavailableError

MAX_ROUNDS = 30  # where a batch norm is used twice

# What a paused batch holds besides the input of the batch norm it waits at: about as much again,
# the residual branch.
_HELD_PER_INPUT = 2

Layers = Mapping[str, nn.Module]
Visit = Callable[[str, Tensor], None]
OnSettled = Callable[[str, ImageMoments], None]


@contextlib.contextmanager
def watching(layers: Layers, visit: Visit) -> Iterator[None]:
    """Calls `visit(name, input)` before each of the layers runs; removes its hooks at the end."""
    handles = [
        layer.register_forward_pre_hook(partial(_before, name, visit), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(
    name: str, visit: Visit, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    x = next(iter((*args, *kwargs.values())), None)
    # what is no input for it, the layer itself refuses
    if isinstance(x, Tensor) and x.dim() >= 2 and x.shape[1] == len(layer.running_mean):  # type: ignore[arg-type]
        visit(name, x)


def layer_of(layer: nn.Module, name: str) -> Layer:
    """What a batch norm of a module is, apart from torch."""
    return Layer(name, float(layer.eps), statistics_of(layer))  # type: ignore[arg-type]


def statistics_of(layer: nn.Module) -> Statistics:
    """The layer's running statistics."""
    mean, var = layer.running_mean, layer.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    return Statistics(*(x.detach().cpu().double().numpy().copy() for x in (mean, var)))


def write(layer: nn.Module, name: str, given: Statistics) -> None:
    """Set the layer's running statistics in place. Raises InputError where they do not fit."""
    for buffer, value in ((layer.running_mean, given.mean), (layer.running_var, given.var)):
        assert isinstance(buffer, Tensor)
        largest = np.abs(value).max()
        if largest > torch.finfo(buffer.dtype).max:
            raise InputError(
                f"A statistic of '{name}' reaches {largest:.3g}, which"
                f" {str(buffer.dtype).removeprefix('torch.')} cannot hold; convert the module to"
                " float32 before it is adapted."
            )
        buffer.copy_(torch.from_numpy(value))


class Writer:
    """Gives the layers what the rule makes of their moments, and keeps what they got.

    described: the layers as they came, with the statistics of the source.
    """

    def __init__(self, layers: Layers, rule: Rule, on_settled: OnSettled | None) -> None:
        self.described = {name: layer_of(layer, name) for name, layer in layers.items()}
        self._layers, self._rule, self._on_settled = layers, rule, on_settled
        self._is_blended = rule != Rule()

    def settle(self, name: str, moments: ImageMoments) -> None:
        """What was measured over the whole set. Raises InputError for less than two values."""
        self.put(name, moments)
        if self._on_settled is not None:
            self._on_settled(name, moments)

    def put(self, name: str, moments: ImageMoments) -> None:
        """The same, where it was told before."""
        write(self._layers[name], name, self._rule(self.described[name], moments))

    def normalise(self, name: str, batch: Found, images: int | None) -> None:
        """For one batch: with its own variance, as in training, the divisor being the count."""
        mean = batch.means.mean(axis=0)
        var = batch.variances.mean(axis=0) + np.square(batch.means - mean).mean(axis=0)
        given = Statistics(mean, var)
        if self._is_blended:
            moments = pooled([batch], name)
            pixels = moments.pixels
            own = Moments(pixels.count + 1, pixels.mean, pixels.m2)  # its unbiased variance
            given = self._rule(self.described[name], replace(moments, pixels=own), images)
        write(self._layers[name], name, given)

    def estimate(self, moments: Mapping[str, ImageMoments], excess: float | None) -> Estimate:
        """What came of it."""
        given = {name: statistics_of(self._layers[name]) for name in moments}
        return Estimate(moments, given, excess)


def excess_of(waiting: Waiting) -> float | None:
    """How much the batches differ: see `batch_excess`."""
    if waiting.within is None:
        return None
    return excess_between(waiting.moments, waiting.within, waiting.batches)


# --- fast -----------------------------------------------------------------------------------------


def fast(
    net: nn.Module,
    layers: Layers,
    feed: Feed,
    progress: Progress,
    *,
    rule: Rule = Rule(),  # noqa: B008  # frozen
    ranks: Ranks = Alone(),  # noqa: B008  # holds nothing
    images: int | None = None,
    on_settled: OnSettled | None = None,
    stop: float | None = None,
) -> Estimate:
    """One pass; each layer normalises by its batch, the moments of all batches are pooled.

    Exact for the first layer; deeper, a batch of B images leaves an error of the order 1 / B.
    images: of all processes, if known: what the rule weighs the source against.
    stop: end where the statistics are known to +-stop standard deviations (convergence.py); the
    feed then gives no more than was read, on later passes too.
    """
    writer, meter, tallies = Writer(layers, rule, on_settled), Meter(), dict[str, Tally]()
    number = 0

    def visit(name: str, x: Tensor) -> None:
        found = meter(name, x, number)
        if len(found.means):
            writer.normalise(name, found, images)
            if name not in tallies:
                tallies[name] = Tally(name, compare=not tallies)
            tallies[name].add(found)

    def so_far() -> dict[str, Waiting]:
        return ranks.together({name: tally.waiting() for name, tally in tallies.items()})

    eps = {name: layer.eps for name, layer in writer.described.items()}
    convergence = None if stop is None else Convergence(eps, stop)
    with watching(layers, visit):
        batches = iter(feed)
        for number in itertools.count():
            if (batch := next(batches, None)) is not None:
                feed.call(net, batch, number)
                progress.step()
            goes_on = batch is not None
            if convergence is not None:  # in all processes, as long as one of them has batches
                goes_on = any(ranks.share(goes_on))
                if goes_on and convergence.enough(so_far()):
                    feed.stop()
                    goes_on = next(batches, None) is not None
            if not goes_on:
                break
    firsts = set(ranks.share(next(iter(tallies), None))) - {None}
    merged = so_far()
    moments = {name: waiting.moments for name, waiting in merged.items()}
    for name, found in moments.items():
        writer.settle(name, found)
    excess = excess_of(merged[firsts.pop()]) if len(firsts) == 1 else None
    return writer.estimate(moments, excess)


def read_until_enough(
    net: nn.Module,
    layers: Layers,
    feed: Feed,
    progress: Progress,
    *,
    stop: float,
    rule: Rule = Rule(),  # noqa: B008  # frozen
    ranks: Ranks = Alone(),  # noqa: B008  # holds nothing
    images: int | None = None,
) -> None:
    """Ends the feed where `fast` would stop; the network keeps its statistics.

    `exact` must have all of its batches before it knows anything of the last layer; so it is
    found beforehand how many are enough.
    """
    source = {name: statistics_of(layer) for name, layer in layers.items()}
    try:
        fast(net, layers, feed, progress, rule=rule, ranks=ranks, images=images, stop=stop)
    finally:
        for name, statistics in source.items():
            write(layers[name], name, statistics)


# --- exact ----------------------------------------------------------------------------------------


# How batches get from the first layer to the last, each where the one before does not do.
_IN_MEMORY, _ON_DISK, _BY_PASSES = range(3)


class _OverBudget(BaseException):
    """The paused batches would take more room than there is."""


class _Stop(BaseException):
    """A batch has come as far as this pass goes."""


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
    tasks: str | None = None,
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
    way, passes, spilled, rounds, change = _IN_MEMORY, 0, 0, 0, float("inf")
    while change > TOLERANCE and rounds < MAX_ROUNDS:
        run = _Round(
            net, layers, feed, frozenset(reused), progress, writer, ranks, max_bytes, tasks, way
        )
        run.resume(known)
        run.run()
        passes, spilled = passes + run.passes, max(spilled, run.spilled)
        way = run.way
        if any(ranks.share(run.may_be_mixed())):
            way, passes = max(way, _ON_DISK), passes + 1
            continue
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
            moved = float("inf") if before is None else float(movement(before, now, eps).max())
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


@dataclass
class _Round:
    """All layers but the `reused`, from the first to the last.

    settled: moments of the layers that are done, of all processes.  visitors: the batches in them.
    extra: visits that were not waited for, as the layer was settled already or is reused.
    """

    net: nn.Module
    layers: Layers
    feed: Feed
    reused: frozenset[str]
    progress: Progress
    writer: Writer
    ranks: Ranks
    max_bytes: int
    tasks: str | None
    way: int
    settled: dict[str, ImageMoments] = field(default_factory=dict)
    visitors: dict[str, set[int]] = field(default_factory=dict)
    extra: dict[str, Tally] = field(default_factory=dict)
    excess: float | None = None
    passes: int = 0
    spilled: int = 0
    meter: Meter = field(default_factory=Meter)
    _input_bytes: int = 0
    _visits: Counter[tuple[str, int]] = field(default_factory=Counter)
    _resumed: Counter[str] = field(default_factory=Counter)  # images that visited these layers

    def run(self) -> None:
        """In step, or for the rest in another way where that does not do."""
        self._kept = kept_by(self.net)
        while self.way != _BY_PASSES:
            settled = len(self.settled)
            try:
                self._run_in_step()
                return
            except _OverBudget:
                self.way += 1
            except Mixed:  # from the start, what is settled is passed without a pause
                self.passes += 1
                again = self.way == _IN_MEMORY or len(self.settled) > settled
                self.way = _ON_DISK if again else _BY_PASSES
        self._run_by_passes()

    def may_be_mixed(self) -> bool:
        """Whether the network keeps something of the batches, and nobody saw what became of it."""
        return self.way == _IN_MEMORY and [*map(id, self._kept)] != [*map(id, kept_by(self.net))]

    def resume(self, known: Mapping[str, ImageMoments]) -> None:
        """Layers that are settled already."""
        for name, moments in known.items():
            self.writer.put(name, moments)
            self.settled[name] = moments
            self._resumed[name] = 0

    def saw_all_of(self, known: Mapping[str, ImageMoments]) -> bool:
        """Whether all images in the moments of resumed layers came by, and no others did."""
        shares = self.ranks.share(dict(self._resumed)) if known else []
        return all(sum(s[name] for s in shares) == found.images for name, found in known.items())

    def _is_known(self, name: str, x: Tensor, number: int) -> bool:
        """Whether a settled layer's moments hold this visit: the first one of a batch in them."""
        self._visits[name, number] += 1
        if name not in self.settled or self._visits[name, number] > 1:
            return False
        if name in self._resumed:
            self._resumed[name] += len(x)
            return True
        return number in self.visitors[name]

    def _settle(self, waiting: Mapping[str, Tally]) -> str | None:
        """The layer where most batches of all processes wait; the first where as many do.

        None where no process has any left.
        """
        while not self.settled and any(self.ranks.share(self.may_be_mixed())):
            if self.way == _IN_MEMORY:
                raise Mixed
        together = self.ranks.together({name: tally.waiting() for name, tally in waiting.items()})
        if not together:
            return None
        order = list(self.layers)
        name = max(together, key=lambda name: (together[name].batches, -order.index(name)))
        found = together[name]
        if not self.settled:
            self.excess = excess_of(found)
        self.writer.settle(name, found.moments)
        self.settled[name] = found.moments
        self.visitors[name] = waiting[name].batches if name in waiting else set()
        return name

    # in step

    def _run_in_step(self) -> None:
        self.steps: Steps[Found] = Steps(task_maker(self.tasks))
        self._begin()
        with contextlib.ExitStack() as stack:
            self.spill: Spill | None = None
            if self.way == _ON_DISK:
                self.spill = Spill(self.net, self.max_bytes)
                stack.callback(self.spill.close)
                stack.enter_context(self.spill.ledger)
            stack.enter_context(watching(self.layers, self._visit_in_step))
            try:
                self.steps.run(self._forwards(), self._settle_waiting)
            finally:
                self.spilled = self.spill.most if self.spill else 0

    def _begin(self) -> None:
        """All batches start at the network's input."""
        self.meter = Meter()  # measures about what it saw first: any start gives the same bits
        self.extra.clear()
        self._visits.clear()
        self._resumed = Counter(dict.fromkeys(self._resumed, 0))

    def _forwards(self) -> Iterator[Callable[[], None]]:
        for number, batch in enumerate(self.feed):
            self._input_bytes += byte_count(batch)
            yield partial(self._forward, [batch], number)

    def _forward(self, given: list[Any], number: int) -> None:
        if self.spill is None:
            self.feed.call(self.net, given.pop(), number)
        else:
            with self.spill.running(number):  # a copy, which can go to disk; nobody holds the other
                self.feed.call(self.net, copied(given.pop()), number)
        self.progress.step()

    def _visit_in_step(self, name: str, x: Tensor) -> None:
        if self.spill is None:
            if (found := self._found_in_step(name, x)) is not None:
                self._check_budget(byte_count(x))
                self.steps.wait(name, found)
            return
        with self.spill.ledger.nobodys():
            found = self._found_in_step(name, x)
        if found is not None:
            try:
                with self.spill.paused():
                    self.steps.wait(name, found)
            except RuntimeUnavailableError as error:
                raise _OverBudget from error

    def _found_in_step(self, name: str, x: Tensor) -> Found | None:
        """What a batch found at a layer where it is to wait."""
        if self._is_known(name, x, self.steps.current):
            return None
        found = self.meter(name, x, self.steps.current)
        self.progress.step()
        if name in self.reused or name in self.settled:
            self.extra.setdefault(name, Tally(name)).add(found)
            return None
        return found

    def _check_budget(self, size: int) -> None:
        """If all batches held as much as this one: would it be too much?"""
        count = self.feed.batches or self.steps.started
        inputs = self._input_bytes / self.steps.started
        if count > 1 and count * (inputs + _HELD_PER_INPUT * size) > self.max_bytes:
            raise _OverBudget

    def _settle_waiting(self, waiting: Mapping[str, Sequence[Found]]) -> str | None:
        first = not self.settled
        return self._settle(
            {name: Tally(name, found, compare=first) for name, found in waiting.items()}
        )

    # by passes

    def _run_by_passes(self) -> None:
        """A pass for each layer: every batch goes as far as its first unsettled one."""
        name: str | None = ""
        while name is not None:
            self._stopped: dict[str, Tally] = {}
            self._begin()
            with watching(self.layers, self._visit_in_pass):
                for number, batch in enumerate(self.feed):
                    self._number = number
                    with contextlib.suppress(_Stop):
                        self.feed.call(self.net, batch, number)
                    self.progress.step()
            self.passes += 1
            name = self._settle(self._stopped)

    def _visit_in_pass(self, name: str, x: Tensor) -> None:
        if self._is_known(name, x, self._number):
            return
        found = self.meter(name, x, self._number)
        if name in self.reused or name in self.settled:
            self.extra.setdefault(name, Tally(name)).add(found)
            return
        self._stopped.setdefault(name, Tally(name, compare=not self.settled)).add(found)
        raise _Stop


# --- looking at a network -------------------------------------------------------------------------


def observe(
    source: nn.Module,
    adapted: nn.Module,
    names: list[str],
    feed: Feed,
    progress: Progress,
    *,
    ranks: Ranks = Alone(),  # noqa: B008  # holds nothing
) -> diagnosis.Observed:
    """Run both networks, in eval mode, over the target and watch the layers `names`.

    The moments are those of all processes; the outputs are compared for this one's batches.
    """
    before, after = _Watch(source, names), _Watch(adapted, names)
    comparison = diagnosis.Comparison()
    with before.open(), after.open():
        for number, batch in enumerate(feed):
            outputs = [watch.call(feed, batch, number) for watch in (before, after)]
            comparison.add(*map(_class_scores, outputs))
            progress.step()
    return diagnosis.Observed(before.totals(ranks), after.totals(ranks), comparison.result())


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

    def totals(self, ranks: Ranks) -> dict[str, ImageMoments]:
        merged = ranks.together({name: t.waiting() for name, t in self._tallies.items()})
        return {name: found.moments for name, found in merged.items()}

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
