"""How well a network does on data that it does not learn from, in eval mode."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnfold.errors import BnfoldError, RuntimeUnavailableError, UsageError, one_line
from bnfold.measuring.ranks import Alone
from bnfold.training.batches import Data, Source, source_of
from bnfold.training.task import Classification, Task
from bnfold.training.team import Team
from bnfold.training.words import explaining_memory

EVALUATION_BATCH = 500


class Score(NamedTuple):
    """Means over the samples. accuracy: None where nothing is classified."""

    loss: float
    accuracy: float | None


def evaluate(
    module: nn.Module,
    data: Data,
    *,
    batch_size: int = EVALUATION_BATCH,
    device: str | torch.device | None = None,
) -> float:
    """The fraction of `data`, as `train` takes it, that the module classifies right in eval mode.

    device: where to run, the module's own unless given; the module's parameters have to be there.
    The module's training flags are as before afterwards. Raises what `train` raises for its data.
    """
    if device is None:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
    target = device_of(device)
    source = source_of(data, batch_size=batch_size, seed=None, name="the data")
    found = score(module, source, Classification(), Team(Alone(), target))
    assert found.accuracy is not None  # of a classifier
    return found.accuracy


def score(module: nn.Module, source: Source, task: Task, team: Team) -> Score:
    """Loss and accuracy over all processes' parts of the data."""
    loss_sum = right_sum = seen = 0.0
    is_classified = True
    with in_eval_mode(module), torch.no_grad():
        for batch in team.in_step(source.epoch(0)):
            with team.guarded():
                x, y = to_device(module, batch.x, batch.y, team.device)
                with explaining_memory(x):
                    output = output_of(module, x, y, task)
                    loss_sum += float(task.test_loss(output, y)) * len(y)
                right = task.right(output, y)
                is_classified &= right is not None
                right_sum += right or 0.0
                seen += len(y)
    loss_sum, right_sum, seen = team.summed([loss_sum, right_sum, seen])
    if not seen:
        raise UsageError("There is no sample in the data to evaluate on.")
    return Score(loss_sum / seen, right_sum / seen if is_classified else None)


@contextlib.contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Every part in eval mode; afterwards each is as it was."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def to_device(
    module: nn.Module, x: Tensor, y: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The batch where the module is, x in the type of its parameters."""
    floats = (p.dtype for p in module.parameters() if p.is_floating_point())
    return x.to(device, next(floats, torch.float32)), y.to(device)


def output_of(module: nn.Module, x: Tensor, y: Tensor, task: Task) -> Tensor:
    """What the module says to x, if it can be held against the targets y."""
    shape = tuple(x.shape)
    try:
        output = module(x)
    except (BnfoldError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the user's forward may raise anything
        raise UsageError(
            f"The network does not take a batch of shape {shape}: {one_line(error)}.{_hint(error)}"
        ) from error
    return task.check(output, shape, y)


def _hint(error: BaseException) -> str:
    """What to do where it is the number of channels that does not fit."""
    found = re.search(r"to have (\d+) channels, but got (\d+) channels", str(error))
    if found is None:
        return ""
    return (
        f" It takes {found[1]} channels and the data has {found[2]}: build it for the data, with"
        f" in_channels={found[2]} or the like (bnfold train: --set in_channels={found[2]}), or read"
        f" images with {found[1]} (--channels {found[1]})."
    )


def device_of(device: str | torch.device) -> torch.device:
    """The device, once it has held something."""
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise RuntimeUnavailableError(
            f"The device '{device}' cannot be used here: {one_line(error)}."
        ) from error
