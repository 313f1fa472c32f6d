"""The network to train: a factory called with its arguments, with the normalisation asked for.

Three variants want to know the run that they are in. Batch renorm's bounds open over its length.
Weight norm starts from lengths and biases that give the first samples mean 0 and deviation 1 behind
each layer (Salimans & Kingma 2016, section 3). Normalization Propagation takes inputs that are
normalised themselves, which stored pixels are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn

from bnfold.errors import UsageError
from bnfold.norm import Clipping, convert, initialise
from bnfold.reading.factory import build_module
from bnfold.training.batches import Batch, Data, source_of
from bnfold.training.evaluation import output_of, to_device
from bnfold.training.settings import seed_by
from bnfold.training.task import Task

FIRST_SAMPLES = 500  # as many as the authors' code initialises with
_INITIALISED_BY_DATA = ("weight", "weight-mean-only")
# SGD's own rate is one of networks whose batch norms divide by a deviation; with these kinds the
# digits' networks of models/ lose half of their accuracy to it, or diverge
_LOWER_RATE: Mapping[str, float] = {"weight": 0.01, "weight-mean-only": 0.01, "normprop": 0.01}


_BOUNDS = tuple(part.name for part in fields(Clipping))


def default_rate(norm: str | None, optimizer: str) -> float | None:
    """The learning rate for a kind where the user names none; None: the optimizer's own."""
    return _LOWER_RATE.get(norm or "") if optimizer == "sgd" else None


def options_in_run(norm: str | None, options: Mapping[str, Any], *, steps: int) -> dict[str, Any]:
    """The options of a kind with those that a run of so many steps decides, as plain values.

    Batch renorm gets the five numbers of its `Clipping`, of which `r_max` and `d_max` may be given
    alone; NormProp `input`: "batch" statistics. Raises UsageError for what makes no sense.
    """
    if norm == "normprop":
        return {"input": "batch", **options}
    if norm != "renorm":
        return dict(options)
    if unknown := set(options) - {*_BOUNDS, "eps", "momentum"}:
        raise UsageError(
            f"'renorm' has no option '{min(unknown)}' here; its options are: eps, momentum,"
            f" {', '.join(_BOUNDS)}."
        )
    bounds = {name: options[name] for name in ("r_max", "d_max") if name in options}
    clipping = Clipping.over(steps, **bounds)
    return {**asdict(clipping), **options}


def build_network(
    spec: str,
    arguments: Mapping[str, Any],
    *,
    norm: str | None = None,
    options: Mapping[str, Any] | None = None,
    example: Tensor,
    seed: int,
) -> nn.Module:
    """The factory's network, its batch norms as `norm` says, drawn by `seed`.

    options: of `bnfold.norm.convert`, by `options_in_run`. example: an input (1, ...), whose shape
    the batch statistics of an input are made for.
    Raises UsageError for arguments and options that there are not, and what `convert` raises.
    """
    torch.manual_seed(seed)
    module = build_module(spec, **arguments)
    if norm is None:
        return module
    given = dict(options or {})
    if norm == "renorm":
        bounds = {name: given.pop(name) for name in _BOUNDS if name in given}
        given["schedule"] = Clipping(**bounds)
    if norm == "normprop" and given.get("input") == "batch":
        # made here: behind a Flatten, the first layer does not tell the input's channels
        given["input"] = _input_norm(example)
    return convert(module, norm, **given)  # type: ignore[arg-type]  # it checks the kind


def _input_norm(example: Tensor) -> nn.Module:
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    if example.dim() not in kinds:
        raise UsageError(
            f"Inputs of shape {tuple(example.shape[1:])} have no batch norm; normalise them"
            " yourself, and say so by input=null."
        )
    return kinds[example.dim()](example.shape[1], affine=False)


def initialise_by_data(
    module: nn.Module, norm: str | None, data: Data, task: Task, *, batch_size: int, seed: int
) -> None:
    """Set weight norm's lengths and biases by the first samples, in place; other kinds need none.

    Every process takes the same samples, and so comes to the same weights. Raises UsageError for
    samples that the network does not take.
    """
    if norm not in _INITIALISED_BY_DATA:
        return
    with torch.random.fork_rng(devices=[]):
        seed_by(seed, 1)
        source = source_of(data, task=task, batch_size=batch_size, seed=seed, name="train_data")
        found: list[Batch] = []
        for batch in source.epoch(1):
            found.append(batch)
            if sum(len(batch.x) for batch in found) >= FIRST_SAMPLES:
                break
    x, y = (
        torch.cat(arrays)[:FIRST_SAMPLES] for arrays in zip(*(b[:2] for b in found), strict=True)
    )
    device = next(module.parameters()).device
    initialise(
        module,
        to_device(module, x, y, device),
        lambda net, batch: output_of(net, batch[0], batch[1], task),
    )
