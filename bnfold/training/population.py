"""Population statistics after training: of the whole training set, in place of moving averages.

A moving average is of the last batches, of a network that changed meanwhile. At inference batch
norm stands for the population (Ioffe & Szegedy 2015, Algorithm 2); measured over the training set,
layer after layer, its statistics are what the finished network has there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfold.adapting.adapt import adapt
from bnfold.errors import UsageError
from bnfold.measuring.ranks import Ranks
from bnfold.norm.batch import FrozenBatchNorm
from bnfold.parts import parts
from bnfold.training.batches import Source
from bnfold.training.settings import seed_by


def check_statistics(module: nn.Module) -> None:
    """Raises UsageError for a network that has no statistics to measure."""
    if not any(_has_statistics(part) for _, part in parts(module)):
        raise UsageError(
            "statistics are 'exact', and the network has none to measure: no batch norm that is"
            " trained. Leave them 'moving'."
        )


def _has_statistics(part: nn.Module) -> bool:
    is_norm = isinstance(part, _BatchNorm) and not isinstance(part, FrozenBatchNorm)
    return is_norm and part.running_mean is not None


def exact_statistics(module: nn.Module, source: Source, ranks: Ranks, seed: int) -> nn.Module:
    """A copy with the statistics of the data in its batch norms; see `bnfold.adapt`, `exact`.

    The inputs are measured as they are stored: an augmentation is of the training only.
    Raises InputError where the forward does not pass its batch norms.
    """
    frozen = {name for name, part in parts(module) if isinstance(part, FrozenBatchNorm)}
    result = adapt(
        module,
        _Inputs(source, seed),
        layers=lambda name: name not in frozen,
        diagnose=False,
        ranks=ranks,
    )
    model: nn.Module = result.model
    return model


class _Inputs:
    """This process's inputs, the same in each pass, whatever random draws the data make."""

    def __init__(self, source: Source, seed: int) -> None:
        self._source, self._seed = source, seed

    def __iter__(self) -> Iterator[Tensor]:
        with torch.random.fork_rng(devices=[]):
            seed_by(self._seed, 0)
            yield from (batch.x for batch in self._source.epoch(0))
