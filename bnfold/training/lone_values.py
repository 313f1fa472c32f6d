"""Batch norms that would get one value per channel in training: their own mean, and no variance."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfold.errors import UsageError
from bnfold.norm.batch import FrozenBatchNorm, GhostBatchNorm


@contextlib.contextmanager
def refusing_lone_values(module: nn.Module, *, processes: int = 1) -> Iterator[None]:
    """Name the batch norm that gets one value per channel. Raises UsageError, from its forward.

    processes: how many train together; SyncBatchNorm then sees the values of all of them.
    """
    fine = (FrozenBatchNorm, nn.SyncBatchNorm) if processes > 1 else (FrozenBatchNorm,)
    handles = [
        layer.register_forward_pre_hook(_refusing(name))
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, fine)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refusing(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def check(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        if not layer.training or not isinstance(x, Tensor) or x.dim() < 2:
            return
        parts = max(len(x) // layer.ghost_size, 1) if isinstance(layer, GhostBatchNorm) else 1
        if len(x) // parts * x[:1, :1].numel() > 1:
            return
        of_each = "in each ghost batch " if parts > 1 else ""
        raise UsageError(
            f"The batch norm '{name}' gets an input of shape {tuple(x.shape)}: one value per"
            f" channel {of_each}is its own mean and has no variance. Train with batches of 2"
            f" samples or more{', and a ghost_size of 2 or more' if parts > 1 else ''}."
        )

    return check
