"""All batches walk a network in step, from its first batch norm to its last.

They wait at each batch norm until all have come there; it is measured, gets its statistics, and
they go on: one forward's compute. What a waiting batch holds lies in memory, then on disk. Where
that has no room either, or where the network carries something from one batch to the next, so that
they cannot be interleaved, a pass per batch norm gives the same numbers.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from bnfold.errors import RuntimeUnavailableError
from bnfold.measuring.estimate import Progress
from bnfold.measuring.feed import Feed, byte_count, copied
from bnfold.measuring.layers import Layers, Writer, watching
from bnfold.measuring.lockstep import Steps, task_maker
from bnfold.measuring.meter import Found, Meter, Tally
from bnfold.measuring.moments import ImageMoments
from bnfold.measuring.ranks import Ranks
from bnfold.measuring.spill import Kept, Mixed, Spill

# What a paused batch holds besides the input of the batch norm it waits at: about as much again,
# the residual branch.
_HELD_PER_INPUT = 2

# How batches get from the first layer to the last, each where the one before does not do.
IN_MEMORY, ON_DISK, BY_PASSES = range(3)


class _OverBudget(BaseException):
    """The paused batches would take more room than there is."""


class _Stop(BaseException):
    """A batch has come as far as this pass goes."""


@dataclass
class Round:
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
        self._kept = Kept(self.net)
        while self.way != BY_PASSES:
            settled = len(self.settled)
            try:
                self._run_in_step()
                return
            except _OverBudget:
                self.way += 1
            except Mixed:  # from the start, what is settled is passed without a pause
                self.passes += 1
                again = self.way == IN_MEMORY or len(self.settled) > settled
                self.way = ON_DISK if again else BY_PASSES
        self._run_by_passes()

    def _may_be_mixed(self) -> bool:
        """Whether the network keeps something of the batches, and nobody sees what becomes of it.

        What it keeps is kept since the last layer was settled: it has not been read yet where it
        no longer is the batch's own.
        """
        if self.way != IN_MEMORY or self.steps.started == 1:
            return False
        return self._kept.has_changed()

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
        while any(self.ranks.share(bool(waiting) and self._may_be_mixed())):
            if self.way == IN_MEMORY:  # else until these processes are here again
                raise Mixed
        together = self.ranks.together({name: tally.waiting() for name, tally in waiting.items()})
        if not together:
            return None
        order = list(self.layers)
        name = max(together, key=lambda name: (together[name].batches, -order.index(name)))
        found = together[name]
        if not self.settled:
            self.excess = found.excess
        self.writer.settle(name, found.moments)
        self.settled[name] = found.moments
        self.visitors[name] = waiting[name].batches if name in waiting else set()
        return name

    # in step

    def _run_in_step(self) -> None:
        self.steps: Steps[Found] = Steps(task_maker())
        self._begin()
        with contextlib.ExitStack() as stack:
            self.spill: Spill | None = None
            if self.way == ON_DISK:
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
