"""Training, repeatable from its seed: one loop for any module, in one process or in several.

The module is trained on a copy. Every random draw (shuffling, dropout) of an epoch follows from the
seed and the epoch's number alone, so a run that was interrupted and resumed goes on exactly as it
would have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bnfold.errors import UsageError
from bnfold.measuring.ranks import Alone, Ranks
from bnfold.parts import copied
from bnfold.training.batches import Data, Share, source_of
from bnfold.training.checkpoint import save_checkpoint as save_checkpoint
from bnfold.training.evaluation import EVALUATION_BATCH, device_of
from bnfold.training.evaluation import evaluate as evaluate
from bnfold.training.lone_values import refusing_lone_values
from bnfold.training.population import check_statistics, exact_statistics
from bnfold.training.run import OnStep, Progress, Run
from bnfold.training.run import Step as Step
from bnfold.training.settings import (
    Keep,
    Optimizer,
    Schedule,
    Settings,
    Statistics,
    defaults_of,
    fingerprint,
    optimizer_of,
)
from bnfold.training.settings import schedule_factor as schedule_factor
from bnfold.training.state import EpochMetrics, State
from bnfold.training.task import Loss, task_of
from bnfold.training.team import Team
from bnfold.training.words import check_choice

Augment = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TrainResult:
    """The trained copy, in eval mode on the training device, and how it got there.

    test_loss, test_accuracy: of the module as it is; None without test data.
    epoch: whose network it is, the last one's or the best one's.
    moving: the test loss and accuracy with moving averages, where its statistics are exact.
    unread: samples that could not be read and were left out, and why.
    """

    module: nn.Module
    history: tuple[EpochMetrics, ...]
    test_accuracy: float | None
    test_loss: float | None
    epoch: int
    moving: tuple[float, float | None] | None = None
    unread: Mapping[str, str] = field(default_factory=dict)


def train(
    module: nn.Module,
    train_data: Data,
    *,
    test_data: Data | None = None,
    epochs: int,
    batch_size: int = 64,
    loss: Loss = "cross_entropy",
    optimizer: Optimizer = "sgd",
    lr: float | None = None,
    schedule: Schedule = "onecycle",
    weight_decay: float | None = None,
    momentum: float | None = None,
    label_smoothing: float = 0.0,
    clip_norm: float | None = None,
    amp: bool = False,
    augment: Augment | None = None,
    statistics: Statistics = "moving",
    keep: Keep = "last",
    seed: int = 0,
    device: str | torch.device = "cpu",
    workers: int = 0,
    checkpoint: Path | str | None = None,
    resume: Path | str | None = None,
    progress: Progress | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    on_step: OnStep | None = None,
    ranks: Ranks | None = None,
) -> TrainResult:
    """Train a copy of a module; the module given stays as it is.

    train_data, test_data: `(x, y)`, x float (N, ...), shuffled and cut into near-equal batches of
    at most `batch_size`; `bnfold.data`'s labelled samples, alike; or a re-iterable of batches
    (x, y), taken as they come. An iterable that shuffles by torch's global generator (a DataLoader)
    is repeatable too.
    loss: `cross_entropy` of classes, y integer (N,), or (N, ...) for logits (N, K, ...); `mse` of
    y float, of the output's shape; or a function from output and y to a mean over the batch.
    optimizer: SGD (with Nesterov's `momentum`, 0.9 unless given), Adam, AdamW or RMSprop; weights
    of rank 2 and more decay; biases, gammas and gains do not. lr and weight_decay are the
    optimizer's `settings.DEFAULTS` when absent.
    schedule: `onecycle` (Smith & Topin 2018: up over 30 % of the steps, then a cosine to 0),
    `cosine` (Loshchilov & Hutter 2017), or `constant`.
    clip_norm: the most that the norm of all gradients together may be. amp: forward in bfloat16
    where torch's autocast says so. augment: from the inputs of a training batch, on the device, to
    other ones; what it draws from torch's generators is repeatable.
    statistics: `moving` averages as the layers keep them, or `exact`: after training those of the
    whole training set. keep: the network of the last epoch, or of the best one on the test data,
    by its moving averages.
    workers: processes that read `bnfold.data`'s samples ahead.
    checkpoint: after each epoch the state of the run is written there; `resume` names such a file
    to go on from. On a CPU the resumed run ends at the bits of one that was never interrupted.
    log: is handed each epoch's `EpochMetrics` as a dict, before its state is written. progress:
    steps done, steps in all. on_step: is handed each `Step`.
    ranks: the processes that train together, each with all of the data and `batch_size` samples of
    each step; None: this one alone. Of batches that come as they are, each takes its rows.

    Raises UsageError for data the network does not take (shapes, types, labels above its classes, a
    batch norm with one value per channel), for a loss that is no longer a number and for settings
    that make no sense; InputError for values that are not finite, labels below 0 and a `resume`
    file that does not fit;
    RuntimeUnavailableError for a device that is not there.
    """
    check_choice("statistics", statistics, get_args(Statistics))
    task = task_of(loss, label_smoothing)
    rates = defaults_of(optimizer, lr, weight_decay, momentum)
    team = Team(ranks or Alone(), device_of(device))
    share = Share(team.rank, team.size)
    source = source_of(
        train_data,
        task=task,
        batch_size=batch_size,
        seed=seed,
        name="train_data",
        share=share,
        workers=workers,
    )
    tests = None
    if test_data is not None:
        tests = source_of(
            test_data,
            task=task,
            batch_size=min(max(batch_size, 100), EVALUATION_BATCH),
            seed=None,
            name="test_data",
            share=share,
            workers=workers,
        )
    elif keep == "best":
        raise UsageError("keep is 'best', which needs test_data to be judged by.")
    net = copied(module)
    if statistics == "exact":
        check_statistics(net)
    settings = Settings(
        network=fingerprint(net),
        epochs=epochs,
        batch_size=batch_size,
        loss=task.name,
        label_smoothing=label_smoothing,
        optimizer=optimizer,
        lr=rates[0],
        schedule=schedule,
        weight_decay=rates[1],
        momentum=rates[2],
        clip_norm=clip_norm,
        amp=amp,
        augment=None if augment is None else getattr(augment, "__qualname__", "augment"),
        keep=keep,
        seed=seed,
        processes=team.size,
        data=source.digest() if checkpoint or resume else "",
    )
    settings.check()
    with _own_randomness(team.device):
        team.agree(asdict(settings))
        net = net.to(team.device)
        state = State(net, optimizer_of(net, settings), settings)
        if resume is not None:
            state.load(Path(resume))
        team.agree(len(state.history))
        run = Run(state, task, source, tests, team, augment, progress, on_step)
        with refusing_lone_values(net, processes=team.size):
            for epoch in range(len(state.history) + 1, epochs + 1):
                metrics = run.epoch(epoch)
                with team.guarded():
                    if log is not None:
                        log(asdict(metrics))
                    if checkpoint is not None and team.rank == 0:
                        state.save(Path(checkpoint))
                team.summed([])
        return _finished(run, statistics)


def _finished(run: Run, statistics: Statistics) -> TrainResult:
    """The network that is kept, with the statistics that are asked for, and its scores."""
    state, tests = run.state, run.tests
    unread = run.team.ranks.share(run.source.unread | (tests.unread if tests else {}))
    chosen = state.history[-1]
    if state.best is not None:
        chosen = state.history[state.best.epoch - 1]
        state.module.load_state_dict(state.best.state_dict)
    module = state.module.eval()
    found = TrainResult(
        module,
        tuple(state.history),
        chosen.test_accuracy,
        chosen.test_loss,
        chosen.epoch,
        unread={name: why for part in unread for name, why in part.items()},
    )
    if statistics == "moving":
        return found
    module = exact_statistics(module, run.source, run.team.ranks, state.settings.seed).eval()
    if tests is None:
        return replace(found, module=module)
    now, before = run.score(module, tests), (chosen.test_loss or 0.0, chosen.test_accuracy)
    return replace(
        found, module=module, test_loss=now.loss, test_accuracy=now.accuracy, moving=before
    )


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Leave the caller's generators as they were, and let cuDNN pick repeatable kernels."""
    cuda = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        yield
