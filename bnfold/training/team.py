"""Several processes that train one network: its gradients averaged, its statistics kept one.

Gradients are averaged by torch's DistributedDataParallel. Each process normalises by its own part
of a batch (unless the network is of SyncBatchNorm), so each would have running statistics of its
own: after every step they are averaged, and all processes hold the same network. Other buffers are
the first process's, which DistributedDataParallel sends round before each forward.

At fixed places of each step the processes exchange a few numbers. A process that fails says so
there in place of its numbers, so that nobody waits for it; measuring/ranks.py tells its error to
the others. In the backward pass alone nothing can be told, as the others are in the middle of
averaging: there it leaves, and they see the connection close.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfold.errors import BnfoldError, RuntimeUnavailableError, UsageError, one_line
from bnfold.measuring.ranks import Ranks
from bnfold.norm import BatchRenorm, FrozenBatchNorm

Item = TypeVar("Item")


class Team:
    """This process and those that train with it; one alone needs no exchange."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        self.rank, self.size = ranks.rank, ranks.size

    def agree(self, value: Any) -> None:
        """Raises UsageError where another process has another value, JSON."""
        if any(other != value for other in self.ranks.share(value)):
            raise UsageError(
                "The processes were started with different arguments, on different data, or from"
                " different states; start all of them alike."
            )

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module as it is to be called in training."""
        if self.size == 1:
            return module
        _check_sync(module, self.device)
        return nn.parallel.DistributedDataParallel(module)

    def in_step(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The batches, each once every process has its own. Raises the error of one that failed."""
        while True:
            with self.guarded():
                batch = next(batches, None)
            (over,) = self.summed([batch is None])
            if over == self.size:
                return
            if over or batch is None:
                raise UsageError(
                    f"The processes got different numbers of batches: {over:.0f} of {self.size} are"
                    " through. The training data must give each process the same batches."
                )
            yield batch

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """What may fail in one process alone: the others learn of it at the next exchange."""
        try:
            yield
        except Exception:
            with contextlib.suppress(
                RuntimeError
            ):  # with the others gone, what went wrong says more
                self._exchanged([1.0])
            raise

    @contextlib.contextmanager
    def averaging(self) -> Iterator[None]:
        """Where all processes average together: what fails there cannot be told to the others."""
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            self.ranks.abandon()
            if isinstance(error, BnfoldError | torch.OutOfMemoryError):
                raise
            raise RuntimeUnavailableError(
                f"Process {self.rank} of {self.size} failed while the processes averaged, or lost"
                f" the others there: {one_line(error)}."
            ) from error

    def summed(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes. Raises the error of one that failed."""
        with self.averaging():
            failed, *sums = self._exchanged([0.0, *values])
        if failed:
            self.ranks.share(None)  # raises what that process tells
            raise BnfoldError("A process failed and did not say how.")
        return sums

    def _exchanged(self, values: Sequence[float]) -> list[float]:
        if self.size == 1:
            return list(values)
        import torch.distributed as dist

        row = torch.zeros(_ROOM, dtype=torch.float64, device=self.device)
        row[: len(values)] = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(row)
        return row[: len(values)].tolist()

    def unite(self, module: nn.Module) -> None:
        """Average the running statistics of the processes, in place."""
        if self.size == 1:
            return
        import torch.distributed as dist

        running = [held for held in _running(module) if held[0].numel()]
        for dtype in {buffer.dtype for buffer, _ in running}:
            group = [held for held in running if held[0].dtype == dtype]
            flat = torch.cat(
                [buffer if eps is None else _std(buffer, eps) for buffer, eps in group]
            )
            dist.all_reduce(flat)
            means = torch.split(flat / self.size, [len(buffer) for buffer, _ in group])
            for (buffer, eps), mean in zip(group, means, strict=True):
                buffer.copy_(mean if eps is None else (mean.square() - eps).clamp(min=0))


_ROOM = 8  # numbers in an exchange: of one size, wherever a process is when another one fails


def _std(var: Tensor, eps: float) -> Tensor:
    return (var + eps).sqrt()


def _running(module: nn.Module) -> Iterator[tuple[Tensor, float | None]]:
    """The statistics that training moves, of each process differently.

    eps: of those that are averaged as deviations, which is what batch renormalization does.
    """
    layers = (
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm)
        and not isinstance(layer, nn.SyncBatchNorm | FrozenBatchNorm)
        and layer.training
    )
    for layer in layers:
        if layer.running_mean is not None:
            yield layer.running_mean, None
        if layer.running_var is not None:
            yield layer.running_var, layer.eps if isinstance(layer, BatchRenorm) else None


def _check_sync(module: nn.Module, device: torch.device) -> None:
    if device.type == "cpu" and any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
        raise UsageError(
            "SyncBatchNorm exchanges its statistics on GPUs only; train on cuda, or with another"
            " normalisation."
        )
