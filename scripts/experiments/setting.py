"""What the experiments train on, and a training run that is allowed to fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfold.data import open_data
from bnfold.errors import UsageError
from bnfold.training.train import evaluate, train

Labelled = tuple[Tensor, Tensor]
CHANCE = 10.0  # percent, of ten classes


def digits(part: str) -> Labelled:
    """Scikit-learn's digits, (N, 1, 8, 8) in [0, 1] and classes: 1437 in `train`, 360 in `test`."""
    batches = open_data(f"digits:{part}", shuffle=False)
    x, y = np.concatenate(list(batches)), batches.labels
    assert y is not None
    return torch.from_numpy(x), torch.from_numpy(y)


def fitted(module: nn.Module, data: Any, **options: Any) -> nn.Module | None:
    """`bnfold.training`'s trained copy; None where training diverged."""
    try:
        return train(module, data, **options).module
    except UsageError as error:
        if "training diverged" not in str(error):
            raise
        return None


def accuracy(module: nn.Module | None, data: Labelled) -> float:
    """Percent right in eval mode; of a run that diverged, what guessing gives."""
    return CHANCE if module is None else 100 * evaluate(module, data)
