"""What a run is asked for: settings, the optimizer, the learning rate by step, the seeds."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from bnfold.errors import UsageError
from bnfold.norm.weight import weight_normed
from bnfold.training.words import check_choice

Optimizer = Literal["sgd", "adam", "adamw", "rmsprop"]
Schedule = Literal["onecycle", "cosine", "constant"]
Statistics = Literal["moving", "exact"]
Keep = Literal["last", "best"]

# (learning rate, weight decay) where the caller names none
DEFAULTS: Mapping[str, tuple[float, float]] = {
    "sgd": (0.1, 5e-4),
    "adam": (3e-3, 0.0),
    "adamw": (3e-3, 1e-2),
    "rmsprop": (3e-3, 0.0),
}
MOMENTA: Mapping[str, float] = {"sgd": 0.9, "rmsprop": 0.0}
WARM_UP, START_FACTOR = 0.3, 1 / 25


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run, so that a resumed one must agree in all of it.

    network: a fingerprint of its layers and their options.  data: one of the training data.
    processes: how many share each step.
    """

    network: str
    epochs: int
    batch_size: int
    loss: str
    label_smoothing: float
    optimizer: str
    lr: float
    schedule: Schedule
    weight_decay: float
    momentum: float
    clip_norm: float | None
    amp: bool
    augment: str | None
    keep: str
    seed: int
    processes: int
    data: str

    def check(self) -> None:
        """Raises UsageError for what makes no sense."""
        check_choice("optimizer", self.optimizer, get_args(Optimizer))
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_choice("keep", self.keep, get_args(Keep))
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UsageError(f"{name} is {value}; it must be a whole number, {least} or more.")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} is {value}; it must be a positive number.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UsageError(f"weight_decay is {self.weight_decay}; it must be 0 or more.")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum is {self.momentum}; it must be 0 or more, below 1.")


def defaults_of(
    optimizer: str, lr: float | None, weight_decay: float | None, momentum: float | None
) -> tuple[float, float, float]:
    """Learning rate, weight decay and momentum, the optimizer's own where none is given."""
    check_choice("optimizer", optimizer, get_args(Optimizer))
    own_lr, own_decay = DEFAULTS[optimizer]
    if momentum is not None and optimizer not in MOMENTA:
        raise UsageError(f"momentum is of {' and '.join(MOMENTA)}; {optimizer} has none to set.")
    return (
        own_lr if lr is None else float(lr),
        own_decay if weight_decay is None else float(weight_decay),
        MOMENTA.get(optimizer, 0.0) if momentum is None else float(momentum),
    )


def optimizer_of(module: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters; gains, betas and biases do not decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise UsageError(f"{type(module).__name__} has no parameter to train.")
    gains = {id(gain) for gain in _gains(module)}
    spared = [p for p in trained if p.dim() <= 1 or id(p) in gains]
    names = {id(p) for p in spared}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) not in names]},
        {"params": spared, "weight_decay": 0.0},
    ]
    lr, decay, momentum = settings.lr, settings.weight_decay, settings.momentum
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, lr=lr, weight_decay=decay)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=decay)
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr, weight_decay=decay, momentum=momentum)
    return torch.optim.SGD(
        groups, lr=lr, weight_decay=decay, momentum=momentum, nesterov=momentum > 0
    )


def _gains(module: nn.Module) -> Iterator[Tensor]:
    """What weight norms hold the lengths in; of any shape, and no weights."""
    for part in module.modules():
        if weight_normed(part):
            yield cast(Any, part).parametrizations.weight.original0


def fingerprint(module: nn.Module) -> str:
    """By what a network is known again: its layers and their options, not its weights."""
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(module))  # of functions, other in each process
    return hashlib.sha256(text.encode()).hexdigest()


def schedule_factor(schedule: Schedule, done: float) -> float:
    """What the learning rate is multiplied by when the fraction `done` of the steps is behind."""
    if schedule == "constant":
        return 1.0
    if schedule == "onecycle":
        if done < WARM_UP:
            return START_FACTOR + (1 - START_FACTOR) * done / WARM_UP
        done = (done - WARM_UP) / (1 - WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def seed_by(*numbers: int) -> None:
    """Seed torch's generators."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))
