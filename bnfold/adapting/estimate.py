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

from bnfold.adapting.feed import Feed, byte_count
from bnfold.adapting.lockstep import Steps, task_maker
from bnfold.adapting.moments import Float64, ImageMoments, batch_excess
from bnfold.errors import InputError

# A network is iterated over where a batch norm is used twice: until nothing moves by more than
# this, in standard deviations and relative, or so often.
TOLERANCE = 1e-6
MAX_ROUNDS = 30

# What a paused batch holds besides the input of the batch norm it waits at: about as much again,
# the residual branch.
_HELD_PER_INPUT = 2

_COLLAPSE = 1 << 20  # numbers that a tally keeps before it reduces them

Layers = Mapping[str, nn.Module]
Visit = Callable[[str, Tensor], None]


@dataclass(frozen=True, eq=False)
class Estimate:
    """What was measured: per layer, in the order of the forward, the moments of its input.

    excess: the `batch_excess` at the first layer.  rounds: 1, or more where a batch norm is used
    twice (`reused`), `residual` being what the last round still changed.  passes: over the data, by
    the fallback for small memory, 0 without.
    """

    moments: Mapping[str, ImageMoments]
    excess: float | None
    rounds: int = 1
    passes: int = 0
    reused: tuple[str, ...] = ()
    residual: float = 0.0


class Progress:
    """Counts steps, one per batch and stretch of the network, and tells (done, total)."""

    def __init__(
        self,
        tell: Callable[[int, int | None], None] | None,
        feed: Feed,
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


# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Found:
    """Per image and channel of one batch: mean and population variance, (N, C), over `pixels`."""

    means: Float64
    variances: Float64
    pixels: int
    batch: int


class Meter:
    """Measures inputs of batch norms: (N, C) or (N, C, ...), of any floating type.

    Centred before it is squared, in a buffer that is used again: freshly mapped memory would cost
    more than the arithmetic. (A sum of squares in torch is accurate to 1e-7; its vector_norm was
    seen off by 4e-5 in float32 on 50,000 rectified values.)
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(self, name: str, x: Tensor, batch: int) -> Found:
        """Raises InputError, with the layer's name, where x holds NaN or infinity."""
        x = x.detach()
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        if x.dim() == 2:
            means = x.cpu().double().numpy()
            found = Found(means, np.zeros_like(means), 1, batch)
        else:
            found = self._of_images(x, batch)
        # infinities of either sign, and an overflow of the squares, end up here too
        if not (np.isfinite(found.means).all() and np.isfinite(found.variances).all()):
            raise InputError(
                f"The input of '{name}' holds NaN or infinity in batch {batch}: its statistics"
                " would be NaN. Look for them in the data, or for an overflow in the layers before."
            )
        return found

    def _of_images(self, x: Tensor, batch: int) -> Found:
        y, axis = _pixels_along_one_axis(x)
        pixels = y.shape[axis]
        if not y.numel():
            empty = np.zeros((0, x.shape[1]))
            return Found(empty, empty, max(pixels, 1), batch)
        mean = y.mean(axis, keepdim=True)
        deviation = torch.sub(y, mean, out=self._buffer(y))
        rest = deviation.mean(axis)  # what rounding left in the mean
        square = deviation.square_().sum(axis)
        columns = torch.stack((mean.squeeze(axis), rest, square)).cpu().double().numpy()
        variances = columns[2] / pixels - columns[1] ** 2
        return Found(columns[0] + columns[1], np.maximum(variances, 0.0), pixels, batch)

    def _buffer(self, like: Tensor) -> Tensor:
        key = (like.dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < like.numel():
            buffer = self._buffers[key] = torch.empty(
                like.numel(), dtype=like.dtype, device=like.device
            )
        return buffer[: like.numel()].view(like.shape)


def _pixels_along_one_axis(x: Tensor) -> tuple[Tensor, int]:
    """(N, C, L) and 2, or (N, L, C) and 1 where that is how memory lies (channels last)."""
    channels_last = x.movedim(1, -1)
    if channels_last.is_contiguous() and not x.is_contiguous():
        return channels_last.flatten(1, -2), 1
    return x.flatten(2), 2


def pooled(found: Iterable[Found], name: str) -> ImageMoments:
    """All batches together, images of one size at a time."""
    by_size: dict[int, list[Found]] = {}
    for part in found:
        by_size.setdefault(part.pixels, []).append(part)
    return ImageMoments.pooled(
        ImageMoments.of(
            np.concatenate([part.means for part in parts]),
            np.concatenate([part.variances for part in parts]),
            pixels,
            name=f"The input of '{name}'",
        )
        for pixels, parts in by_size.items()
    )


class Tally:
    """The moments of batch after batch, reduced from time to time so that it stays small."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._recent: list[Found] = []
        self._numbers = 0
        self._total: ImageMoments | None = None
        self.batches: set[int] = set()

    def add(self, found: Found) -> None:
        """One batch more."""
        self._recent.append(found)
        self.batches.add(found.batch)
        self._numbers += found.means.size
        if self._numbers > _COLLAPSE:
            self.total()

    def total(self) -> ImageMoments:
        """Everything so far."""
        if self._recent:
            recent = pooled(self._recent, self._name)
            self._total = recent if self._total is None else self._total.merge(recent)
            self._recent.clear()
            self._numbers = 0
        assert self._total is not None  # a tally is made for its first batch
        return self._total


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
    return Estimate(moments, batch_excess(first))


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
    return Estimate({**run.settled, **reused}, run.excess, rounds, passes, tuple(reused), change)


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
