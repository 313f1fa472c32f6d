"""Statistics of batch norms on target data, for a torch network in eval mode.

`exact` is Algorithm 1 of the AdaBN paper (Li et al., "Revisiting batch normalization for practical
domain adaptation", 2016) in topological order: a layer is measured over the whole set, with every
layer before it adapted already. The batches walk the network in step and wait at each batch norm,
so that it takes one forward's compute; where their activations do not fit into memory, a pass per
batch norm gives the same numbers. `fast` is one pass in which each batch norm normalises by its
batch, the moments of all batches pooled.

A layer is measured in a hook before it runs, and its running statistics are set before its own
forward reads them: whatever a subclass does behind the normalisation stays as it is. The running
variance has the divisor count - 1, as torch's has.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfold.adapting import diagnosis
from bnfold.adapting.estimate import TOLERANCE, Estimate, Progress
from bnfold.adapting.feed import Feed, byte_count
from bnfold.adapting.lockstep import Steps, task_maker
from bnfold.adapting.meter import Found, Meter, Tally, pooled
from bnfold.adapting.moments import Float64, ImageMoments, batch_excess
from bnfold.adapting.statistics import Layer, Statistics
from bnfold.errors import InputError

MAX_ROUNDS = 30  # where a batch norm is used twice

# What a paused batch holds besides the input of the batch norm it waits at: about as much again,
# the residual branch.
_HELD_PER_INPUT = 2

Layers = Mapping[str, nn.Module]
Visit = Callable[[str, Tensor], None]


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


def write(layer: nn.Module, name: str, mean: Float64, var: Float64) -> None:
    """Set the layer's running statistics in place. Raises InputError where they do not fit."""
    for buffer, value in ((layer.running_mean, mean), (layer.running_var, var)):
        assert isinstance(buffer, Tensor)
        buffer.copy_(torch.from_numpy(value))
        if not torch.isfinite(buffer).all():
            raise InputError(
                f"A statistic of '{name}' reaches {np.abs(value).max():.3g}, which"
                f" {str(buffer.dtype).removeprefix('torch.')} cannot hold; convert the module to"
                " float32 before it is adapted."
            )


def write_pooled(layer: nn.Module, name: str, moments: ImageMoments) -> None:
    """Set the layer's running statistics to pooled moments, the variance unbiased."""
    if moments.pixels.count < 2:
        raise InputError(
            f"'{name}' saw {moments.pixels.count} value per channel in all of the target data,"
            " which has no variance; give more images."
        )
    write(layer, name, moments.pixels.mean, moments.pixels.var_unbiased)


# --- fast -----------------------------------------------------------------------------------------


def fast(net: nn.Module, layers: Layers, feed: Feed, progress: Progress) -> Estimate:
    """One pass; each layer normalises by its batch, the moments of all batches are pooled.

    Exact for the first layer; deeper, a batch of B images leaves an error of the order 1 / B.
    """
    meter, tallies = Meter(), dict[str, Tally]()
    first: list[ImageMoments] = []
    number = 0

    def visit(name: str, x: Tensor) -> None:
        found = meter(name, x, number)
        if not len(found.means):
            return
        batch = pooled([found], name)
        write(layers[name], name, batch.pixels.mean, batch.pixels.var)
        tallies.setdefault(name, Tally(name)).add(found)
        if name == next(iter(tallies)):
            first.append(batch)

    with watching(layers, visit):
        for number, batch in enumerate(feed):
            feed.call(net, batch, number)
            progress.step()
    moments = {name: tally.total() for name, tally in tallies.items()}
    for name, found in moments.items():
        write_pooled(layers[name], name, found)
    return Estimate(moments, _statistics(layers, moments), batch_excess(first))


# --- exact ----------------------------------------------------------------------------------------


class _OverBudget(BaseException):
    """The paused batches would take more memory than they may."""


class _Stop(BaseException):
    """A batch has come as far as this pass goes."""


def exact(
    net: nn.Module,
    layers: Layers,
    feed: Feed,
    progress: Progress,
    *,
    max_bytes: int,
    tasks: str | None = None,
) -> Estimate:
    """Each layer measured over the whole set with all layers before it adapted.

    Where a batch norm is used more than once in a forward, or batches meet two of them in different
    orders, there is no order in which each comes after those before it. Such a layer's statistics
    are those of all its uses together, found as a fixed point: measured with the values of the
    round before, the other layers exactly, until nothing moves any more.
    """
    reused: dict[str, ImageMoments] = {}
    by_passes, passes, rounds, change = False, 0, 0, float("inf")
    while change > TOLERANCE and rounds < MAX_ROUNDS:
        run = _Round(net, layers, feed, frozenset(reused), progress, max_bytes, tasks)
        run.run(by_passes)
        by_passes, passes, rounds = run.passes > 0, passes + run.passes, rounds + 1
        change = 0.0  # where each layer is used once, one round is all
        for name, tally in run.extra.items():
            settled = run.settled.pop(name, None)
            now = tally.total() if settled is None else settled.merge(tally.total())
            change = max(change, _change(reused.get(name), now, layers[name]))
            write_pooled(layers[name], name, now)
            reused[name] = now
    moments = {**run.settled, **reused}
    statistics = _statistics(layers, moments)
    return Estimate(moments, statistics, run.excess, rounds, passes, tuple(reused), change)


def _statistics(layers: Layers, moments: Mapping[str, ImageMoments]) -> dict[str, Statistics]:
    return {name: statistics_of(layers[name]) for name in moments}


def _change(before: ImageMoments | None, now: ImageMoments, layer: nn.Module) -> float:
    """How far mean and standard deviation moved, in standard deviations, the worst channel."""
    if before is None:
        return float("inf")
    eps = layer_eps(layer)
    unit = now.pixels.var + eps
    mean = np.abs(now.pixels.mean - before.pixels.mean) / np.sqrt(unit)
    sd = np.abs(np.log(unit / (before.pixels.var + eps))) / 2
    return float(np.maximum(mean, sd).max())


def layer_eps(layer: nn.Module) -> float:
    """The eps of a batch norm."""
    return float(layer.eps)  # type: ignore[arg-type]


@dataclass
class _Round:
    """All layers but the `reused`, from the first to the last.

    settled: moments of the layers that are done.  visitors: the batches in them.  extra: visits
    that were not waited for, as the layer was settled already or is reused.
    """

    net: nn.Module
    layers: Layers
    feed: Feed
    reused: frozenset[str]
    progress: Progress
    max_bytes: int
    tasks: str | None
    settled: dict[str, ImageMoments] = field(default_factory=dict)
    visitors: dict[str, set[int]] = field(default_factory=dict)
    extra: dict[str, Tally] = field(default_factory=dict)
    excess: float | None = None
    passes: int = 0
    meter: Meter = field(default_factory=Meter)
    _input_bytes: int = 0

    def run(self, by_passes: bool) -> None:
        """In step; by passes if asked, or for the rest where memory gives out."""
        if not by_passes:
            try:
                self._run_in_step()
            except _OverBudget:
                by_passes = True
        if by_passes:
            self._run_by_passes()

    def _settle(self, name: str, moments: ImageMoments, visitors: Iterable[int]) -> None:
        write_pooled(self.layers[name], name, moments)
        self.settled[name] = moments
        self.visitors[name] = set(visitors)

    def _next(self, waiting: Mapping[str, int]) -> str:
        """Where most batches wait; the first in the module's order where as many do."""
        order = list(self.layers)
        return max(waiting, key=lambda name: (waiting[name], -order.index(name)))

    # in step

    def _run_in_step(self) -> None:
        self.steps: Steps[Found] = Steps(task_maker(self.tasks))
        with watching(self.layers, self._visit_in_step):
            self.steps.run(self._forwards(), self._settle_waiting)

    def _forwards(self) -> Iterator[Callable[[], None]]:
        for number, batch in enumerate(self.feed):
            self._input_bytes += byte_count(batch)
            yield partial(self._forward, batch, number)

    def _forward(self, batch: Any, number: int) -> None:
        self.feed.call(self.net, batch, number)
        self.progress.step()

    def _visit_in_step(self, name: str, x: Tensor) -> None:
        found = self.meter(name, x, self.steps.current)
        self.progress.step()
        if name in self.reused or name in self.settled:
            self.extra.setdefault(name, Tally(name)).add(found)
            return
        self._check_budget(byte_count(x))
        self.steps.wait(name, found)

    def _check_budget(self, size: int) -> None:
        """If all batches held as much as this one: would it be too much?"""
        count = self.feed.batches or self.steps.started
        inputs = self._input_bytes / self.steps.started
        if count > 1 and count * (inputs + _HELD_PER_INPUT * size) > self.max_bytes:
            raise _OverBudget

    def _settle_waiting(self, waiting: Mapping[str, Sequence[Found]]) -> str:
        name = self._next({name: len(found) for name, found in waiting.items()})
        if not self.settled:
            self.excess = batch_excess([pooled([found], name) for found in waiting[name]])
        moments = pooled(waiting[name], name)
        self._settle(name, moments, (found.batch for found in waiting[name]))
        return name

    # by passes

    def _run_by_passes(self) -> None:
        """A pass for each layer: every batch goes as far as its first unsettled one."""
        while True:
            self._stopped: dict[str, Tally] = {}
            self._firsts: list[ImageMoments] = []
            self.extra.clear()
            with watching(self.layers, self._visit_in_pass):
                for number, batch in enumerate(self.feed):
                    self._number, self._seen = number, Counter[str]()
                    with contextlib.suppress(_Stop):
                        self.feed.call(self.net, batch, number)
                    self.progress.step()
            self.passes += 1
            if not self._stopped:
                return
            name = self._next({name: len(t.batches) for name, t in self._stopped.items()})
            if not self.settled:
                self.excess = batch_excess(self._firsts)
            tally = self._stopped[name]
            self._settle(name, tally.total(), tally.batches)

    def _visit_in_pass(self, name: str, x: Tensor) -> None:
        self._seen[name] += 1
        if name in self.settled and self._seen[name] == 1 and self._number in self.visitors[name]:
            return
        found = self.meter(name, x, self._number)
        if name in self.reused or name in self.settled:
            self.extra.setdefault(name, Tally(name)).add(found)
            return
        if not self.settled:
            self._firsts.append(pooled([found], name))
        self._stopped.setdefault(name, Tally(name)).add(found)
        raise _Stop


# --- looking at a network -------------------------------------------------------------------------


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
