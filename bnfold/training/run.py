"""A run: epochs of steps down the gradient, each epoch's randomness decided by its number alone."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnfold.errors import Diverged, UsageError, one_line
from bnfold.training.batches import Batch, Source
from bnfold.training.evaluation import Score, output_of, score, to_device
from bnfold.training.settings import schedule_factor, seed_by
from bnfold.training.state import Best, EpochMetrics, State
from bnfold.training.task import Task
from bnfold.training.team import Team
from bnfold.training.words import check_finite, diverged, explaining_memory

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Step:
    """A step that was taken. number: 1, 2, ... over the run.  loss: of the batch, before the step.

    module: the network, in training mode. A hook may look at it and run it, and leaves its modes,
    buffers and the random generators as they were.
    """

    number: int
    epoch: int
    loss: float
    lr: float
    module: nn.Module
    x: Tensor
    y: Tensor


OnStep = Callable[[Step], None]


@dataclass
class Run:
    """The parts of a run, and its epochs."""

    state: State
    task: Task
    source: Source
    tests: Source | None
    team: Team
    augment: Callable[[Tensor], Any] | None = None
    progress: Progress | None = None
    on_step: OnStep | None = None

    def __post_init__(self) -> None:
        self.steps = self.source.count()
        self.network = self.team.wrap(self.state.module)  # as it is called in training

    def epoch(self, number: int) -> EpochMetrics:
        """One pass over the training data, then the score on the test data."""
        started = time.perf_counter()
        learned, lr = self._learn(number)
        check_finite(self.state.module, number)
        tested = None if self.tests is None else self.score(self.state.module, self.tests)
        metrics = EpochMetrics(
            number,
            learned.loss,
            learned.accuracy,
            tested and tested.loss,
            tested and tested.accuracy,
            lr,
            time.perf_counter() - started,
        )
        self.state.history.append(metrics)
        self._keep(metrics)
        return metrics

    def score(self, module: nn.Module, source: Source) -> Score:
        """Of a network by the run's task, over all processes."""
        return score(module, source, self.task, self.team)

    def _learn(self, epoch: int) -> tuple[Score, float]:
        """The steps of an epoch: the scores of its batches, and the last learning rate."""
        settings = self.state.settings
        self.state.module.train()
        before, total = (epoch - 1) * self.steps, settings.epochs * self.steps
        loss_sum = right_sum = seen = 0.0
        lr, is_classified = settings.lr, True
        drawn = self.team.in_step(self._drawn(epoch))
        for step, batch in enumerate(drawn, start=1):
            lr = self._set_lr((before + step - 1) / max(total, 1))
            x, y = batch.x, batch.y
            with self.team.guarded():
                with explaining_memory(x):
                    loss, right = self._forward(x, y)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise Diverged(diverged(x, value, epoch, step, lr))
            sums = self.team.summed([value * len(y), right or 0.0, len(y)])
            with self.team.averaging(), explaining_memory(x):
                self._down(loss * batch.weight)
            loss_sum, right_sum, seen = (
                a + b for a, b in zip((loss_sum, right_sum, seen), sums, strict=True)
            )
            is_classified &= right is not None
            with self.team.guarded():
                if self.on_step is not None:
                    told = (before + step, epoch, sums[0] / sums[2], lr)
                    self.on_step(Step(*told, self.state.module, x, y))
                if self.progress is not None:
                    self.progress(before + step, total)
        if not seen:
            raise UsageError(f"train_data gave no batch in epoch {epoch}.")
        return Score(loss_sum / seen, right_sum / seen if is_classified else None), lr

    def _drawn(self, epoch: int) -> Iterator[Batch]:
        """The epoch's batches, ready: the same in all processes, which then draw on their own."""
        seed_by(self.state.settings.seed, epoch)
        for number, batch in enumerate(self.source.epoch(epoch)):
            if not number and self.team.size > 1:
                seed_by(self.state.settings.seed, epoch, self.team.rank)
            with explaining_memory(batch.x):
                x, y = to_device(self.state.module, batch.x, batch.y, self.team.device)
                yield Batch(self._augmented(x), y, batch.weight)

    def _augmented(self, x: Tensor) -> Tensor:
        if self.augment is None:
            return x
        try:
            made = self.augment(x)
        except Exception as error:  # the user's code may raise anything
            raise UsageError(
                f"augment failed on a batch of shape {tuple(x.shape)}: {one_line(error)}."
            ) from error
        if not isinstance(made, Tensor) or len(made) != len(x):
            raise UsageError("augment must return the batch, as a tensor of as many samples.")
        return made.to(x.device, x.dtype)

    def _forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, float | None]:
        """The loss, and how many samples were classified right."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.state.settings.amp):
            output = output_of(self.network, x, y, self.task)
        if self.state.settings.amp:
            output = output.float()
        loss = self.task.loss(output, y)
        if not loss.requires_grad:
            raise UsageError(
                "The loss has no gradient: the network's output does not depend on a parameter that"
                " is trained, or was detached on the way."
            )
        return loss, self.task.right(output.detach(), y)

    def _down(self, loss: Tensor) -> None:
        """One step down the gradient."""
        self.state.optimizer.zero_grad()
        torch.autograd.backward(loss)
        if self.state.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.state.module.parameters(), self.state.settings.clip_norm)
        self.state.optimizer.step()
        self.team.unite(self.state.module)

    def _set_lr(self, done: float) -> float:
        settings = self.state.settings
        lr = settings.lr * schedule_factor(settings.schedule, done)
        for group in self.state.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _keep(self, metrics: EpochMetrics) -> None:
        """Take the network down where it is the best so far and the best is asked for."""
        if self.state.settings.keep == "best" and metrics == best_of(self.state.history):
            state_dict = self.state.module.state_dict()
            copied = copy.deepcopy({name: _at_rest(value) for name, value in state_dict.items()})
            self.state.best = Best(metrics.epoch, copied)


def _at_rest(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def best_of(history: list[EpochMetrics]) -> EpochMetrics:
    """The first epoch of the highest accuracy on the test data, or of the lowest loss there."""
    if history[0].test_accuracy is not None:
        return max(history, key=lambda metrics: metrics.test_accuracy or 0.0)
    return min(history, key=lambda metrics: metrics.test_loss or 0.0)
