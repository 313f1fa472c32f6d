"""Batch normalization as torch has it, and the variants that differ in whose statistics they take.

Every class here is torch's own batch norm with another training forward: at inference it is an
affine map of each channel by `running_mean`, `running_var`, `weight` and `bias`. A name without a
rank takes inputs of any rank (N, C, ...); `1d`, `2d` and `3d` hold the user to one, as torch does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, functional
from torch.nn.modules.batchnorm import _BatchNorm

from bnfold.norm.options import check_options

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "FrozenBatchNorm",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GhostBatchNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "MeanOnlyBatchNorm",
    "MeanOnlyBatchNorm1d",
    "MeanOnlyBatchNorm2d",
    "MeanOnlyBatchNorm3d",
]


class BatchNorm(_BatchNorm):
    """Torch's batch norm on inputs (N, C, ...) of any rank.

    Ioffe & Szegedy: Batch Normalization, 2015, algorithm 1; momentum, unbiased running variance and
    cumulative average (momentum None) as in `torch.nn.BatchNorm2d`.

    Raises UsageError for an eps or a momentum that is none.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options({"eps": eps, "momentum": momentum})
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def count(self) -> float:
        """Count one batch; the weight that it gets in the running statistics."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum


# --- ghost batch norm ----------------------------------------------------------------------------


class GhostBatchNorm(BatchNorm):
    """Batch norm over parts of the batch, each normalised by itself.

    Hoffer, Hubara & Soudry: Train longer, generalize better, 2017, algorithm 1: the running
    statistics take in one ghost batch after the other. A batch of N samples becomes
    `N // ghost_size` parts (at least one) of nearly equal size, so none is smaller than
    `ghost_size`; with one part this is torch's batch norm, bit for bit. `num_batches_tracked`
    counts ghost batches.

    Raises UsageError for a ghost size that is no whole number, 1 or more.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        ghost_size: int = 32,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        check_options({"ghost_size": ghost_size})
        self.ghost_size = ghost_size

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape."""
        if not self.training:  # before the size is looked at, which an export leaves open
            return super().forward(input)
        count = len(input) // self.ghost_size
        if count <= 1:
            return super().forward(input)
        return torch.cat(
            [super(GhostBatchNorm, self).forward(p) for p in input.tensor_split(count)]
        )

    def extra_repr(self) -> str:
        """The arguments."""
        inherited = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{inherited}, ghost_size={self.ghost_size}"


# --- mean-only batch norm ------------------------------------------------------------------------


class MeanOnlyBatchNorm(BatchNorm):
    """The batch's mean taken off each channel, and a bias added.

    Salimans & Kingma: Weight Normalization, 2016, section 4. It has `bias` and `running_mean`; its
    `eps` is 0, its `weight` None and its `running_var` ones for ever, so that at inference it is a
    batch norm in every bit.
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, 0.0, momentum, device=device, dtype=dtype)
        self.weight = None  # type: ignore[assignment]

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.num_features}, momentum={self.momentum}, bias={self.bias is not None}"

    def reset_parameters(self) -> None:
        """Start anew: mean 0, bias 0."""
        self.reset_running_stats()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        assert self.running_mean is not None
        if input.numel() == input.shape[1]:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size"
                f" {tuple(input.shape)}"
            )
        others = [dim for dim in range(input.dim()) if dim != 1]
        mean = input.mean(others, dtype=torch.promote_types(input.dtype, torch.float32))
        rate = self.count()
        if input.numel():  # of no sample there is no mean; torch's own counts it and leaves it too
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        shift = -mean if self.bias is None else self.bias - mean
        return (input + shift.view(-1, *[1] * (input.dim() - 2))).to(input.dtype)


# --- frozen batch norm ---------------------------------------------------------------------------


class FrozenBatchNorm(BatchNorm):
    """A batch norm of four buffers: nothing is learnt and nothing is measured, in any mode.

    Its state_dict is that of torchvision's and detectron2's `FrozenBatchNorm2d`; it loads a batch
    norm's, whose batch count it leaves out, and a batch norm loads it.
    """

    _version = 1  # of torch's batch norm: the state before there was a batch count

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, device=device, dtype=dtype)
        for name in ("weight", "bias"):
            value = getattr(self, name).detach()
            delattr(self, name)
            self.register_buffer(name, value)
        self.num_batches_tracked = None

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1."""
        assert self.running_mean is not None
        assert self.running_var is not None
        self.running_mean.zero_()
        self.running_var.fill_(1)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape."""
        self._check_input_dim(input)
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.num_features}, eps={self.eps}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": 2}, *rest)


# --- one rank each -------------------------------------------------------------------------------


class GhostBatchNorm1d(nn.BatchNorm1d, GhostBatchNorm):
    """GhostBatchNorm on (N, C) or (N, C, L)."""


class GhostBatchNorm2d(nn.BatchNorm2d, GhostBatchNorm):
    """GhostBatchNorm on (N, C, H, W)."""


class GhostBatchNorm3d(nn.BatchNorm3d, GhostBatchNorm):
    """GhostBatchNorm on (N, C, D, H, W)."""


class MeanOnlyBatchNorm1d(nn.BatchNorm1d, MeanOnlyBatchNorm):
    """MeanOnlyBatchNorm on (N, C) or (N, C, L)."""


class MeanOnlyBatchNorm2d(nn.BatchNorm2d, MeanOnlyBatchNorm):
    """MeanOnlyBatchNorm on (N, C, H, W)."""


class MeanOnlyBatchNorm3d(nn.BatchNorm3d, MeanOnlyBatchNorm):
    """MeanOnlyBatchNorm on (N, C, D, H, W)."""


class FrozenBatchNorm1d(nn.BatchNorm1d, FrozenBatchNorm):
    """FrozenBatchNorm on (N, C) or (N, C, L)."""


class FrozenBatchNorm2d(nn.BatchNorm2d, FrozenBatchNorm):
    """FrozenBatchNorm on (N, C, H, W)."""


class FrozenBatchNorm3d(nn.BatchNorm3d, FrozenBatchNorm):
    """FrozenBatchNorm on (N, C, D, H, W)."""
