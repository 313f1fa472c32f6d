"""The network to train: a factory called with its arguments, with the normalisation asked for.

Three variants want to know the run that they are in. Batch renorm's bounds open over its length.
Weight norm starts from lengths and biases that give the first samples mean 0 and deviation 1 behind
each layer (Salimans & Kingma 2016, section 3). Normalization Propagation takes inputs that are
normalised themselves, which stored pixels are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnfold.errors import UsageError
from bnfold.norm import Clipping, convert, initialise
from bnfold.reading.factory import build_module
from bnfold.training.batches import Data, labelled
from bnfold.training.settings import seed_by
from bnfold.training.task import Task
from bnfold.training.words import one_line

FIRST_SAMPLES = 500  # as many as the authors' code initialises with
_BY_DATA = ("weight", "weight-mean-only")
# SGD's own rate is one of networks whose batch norms divide by a deviation; with these kinds the
# digits' networks of models/ lose half of their accuracy to it, or diverge
_LOWER_RATE: Mapping[str, float] = {"weight": 0.01, "weight-mean-only": 0.01, "normprop": 0.01}


def default_rate(norm: str | None, optimizer: str) -> float | None:
    """The learning rate for a kind where the user names none; None: the optimizer's own."""
    return _LOWER_RATE.get(norm or "") if optimizer == "sgd" else None


def build_network(
    spec: str,
    arguments: Mapping[str, Any],
    *,
    norm: str | None,
    options: Mapping[str, Any],
    steps: int,
    seed: int,
) -> nn.Module:
    """The factory's network, its batch norms as `norm` says, drawn by `seed`.

    options: of the kind, see `bnfold.norm.convert`; of batch renorm also `r_max` and `d_max`, the
    bounds that its clipping reaches over the `steps` of the run. NormProp normalises its input by
    batch statistics unless `input` says otherwise.
    Raises UsageError for arguments and options that there are not, and what `convert` raises.
    """
    torch.manual_seed(seed)
    module = build_module(spec, **arguments)
    if norm is None:
        return module
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    options = dict(options)
    try:
        if norm == "renorm" and "schedule" not in options:
            bounds = {name: options.pop(name) for name in ("r_max", "d_max") if name in options}
            options["schedule"] = Clipping.over(steps, **bounds)
        if norm == "normprop":
            options.setdefault("input", "batch")
        return convert(module, norm, **options)  # type: ignore[arg-type]  # it checks the kind
    except (TypeError, ValueError) as error:
        raise UsageError(f"{norm} does not take {given}: {one_line(error)}.") from error


def is_started_by_data(norm: str | None) -> bool:
    """Whether the kind starts from what the first samples show."""
    return norm in _BY_DATA


def start_by_data(module: nn.Module, data: Data, task: Task, *, batch_size: int, seed: int) -> None:
    """Set weight norm's lengths and biases by the first samples of training, in place.

    Every process takes the same samples, and so comes to the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        seed_by(seed, 1)
        source = labelled(data, task=task, batch_size=batch_size, seed=seed, name="train_data")
        found: list[Tensor] = []
        for batch in source.epoch(1):
            found.append(batch.x)
            if sum(map(len, found)) >= FIRST_SAMPLES:
                break
    first = torch.cat(found)[:FIRST_SAMPLES]
    parameter = next(module.parameters())
    initialise(module, first.to(parameter.device, parameter.dtype))
