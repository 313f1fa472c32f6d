"""Batch renormalization: training normalises, in effect, by the running statistics.

Ioffe: Batch Renormalization, 2017, algorithm 1. A batch of mean mB and deviation sB (epsilon in
the root) is normalised by itself and then corrected, xh r + d. There r = sB / s and
d = (mB - mu) / s are clipped and have no gradient. Since gamma (xh r + d) + beta =
xh (gamma r) + (gamma d + beta), this is torch's own batch norm with another weight and bias, and so
it is computed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bnfold.errors import UsageError
from bnfold.norm.batch import BatchNorm
from bnfold.norm.options import check_options


@dataclass(frozen=True)
class Clipping:
    """How far r and d may go, by training step (section 4 of the paper, and its numbers).

    Until step `start` r is 1 and d is 0, which is plain batch norm; from there the bounds grow
    linearly, 1/r_max <= r <= r_max until `r_end` and |d| <= d_max until `d_end`. A bound of
    infinity holds nothing back, and comes at once, at its end.

    Raises UsageError for an r_max below 1, a d_max below 0, or steps out of order.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    start: int = 5_000
    r_end: int = 40_000
    d_end: int = 25_000

    def __post_init__(self) -> None:
        check_options(asdict(self))
        if not 0 <= self.start <= min(self.r_end, self.d_end):
            raise UsageError(
                f"Batch renorm's bounds cannot start at step {self.start} and end at {self.r_end}"
                f" and {self.d_end}; give 0 <= start <= r_end and d_end."
            )

    @classmethod
    def over(cls, steps: int, r_max: float = 3.0, d_max: float = 5.0) -> Clipping:
        """The paper's schedule, of 150 000 steps, on a run of `steps`."""
        start, r_end, d_end = (
            round(steps * part / 150_000) for part in (cls.start, cls.r_end, cls.d_end)
        )
        return cls(r_max, d_max, start, r_end, d_end)

    @classmethod
    def fixed(cls, r_max: float, d_max: float) -> Clipping:
        """The same bounds from the first step on; `math.inf` for none."""
        return cls(r_max, d_max, 0, 0, 0)

    def at(self, step: int) -> tuple[float, float]:
        """(r_max, d_max) after `step` batches."""
        r_max, d_max = self.bounds(torch.tensor(step), torch.float64)
        return float(r_max), float(d_max)

    def bounds(self, step: Tensor, dtype: torch.dtype) -> tuple[Any, Any]:
        """As `at`, numbers or tensors, from a tensor: on a GPU nothing waits for the count."""
        step = step.to(dtype)
        return (
            _ramp(step, self.start, self.r_end, 1.0, self.r_max),
            _ramp(step, self.start, self.d_end, 0.0, self.d_max),
        )


def _ramp(step: Tensor, start: int, end: int, first: float, last: float) -> Tensor | float:
    if end == 0:
        return last
    if start == end or math.isinf(last):
        return torch.where(step >= end, last, first).to(step.dtype)
    return ((step - start) / (end - start)).clamp_(0, 1).mul_(last - first).add_(first)


class BatchRenorm(BatchNorm):
    """Batch renormalization on inputs (N, C, ...) of any rank.

    It has torch's batch norm's state, and its inference. `running_var` holds s^2 - eps, so that
    s = sqrt(running_var + eps) is the average of the batches' deviations, as in the paper.
    `momentum` is the weight of a new batch (the paper's alpha), None for a cumulative average. The
    step of the schedule is `num_batches_tracked`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        *,
        schedule: Clipping | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device=device, dtype=dtype)
        if not isinstance(schedule, Clipping | None):
            raise UsageError(f"schedule is {schedule!r}; it must be a Clipping, or None.")
        self.schedule = schedule or Clipping()

    @property
    def running_std(self) -> Tensor:
        """The running standard deviation s, (C,), float32 or wider."""
        assert self.running_var is not None
        return (_wide(self.running_var) + self.eps).sqrt()

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape."""
        if not (self.training and input.numel()):  # of no sample torch keeps no statistics
            return super().forward(input)
        self._check_input_dim(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        with torch.no_grad():
            mean, var = moments(input)
            s, std = self.running_std, (var + self.eps).sqrt()
            r, d = self._correction(mean, std, s)
        weight, bias = r, d
        if self.weight is not None:
            weight, bias = self.weight * r, self.weight * d
        if self.bias is not None:
            bias = bias + self.bias
        dtype, rate = self.running_var.dtype, self.count()
        output = functional.batch_norm(
            input,
            self.running_mean,
            torch.empty_like(self.running_var),  # for an average of variances, which is not kept
            weight.to(dtype),
            bias.to(dtype),
            training=True,
            momentum=rate,
            eps=self.eps,
        )
        with torch.no_grad():
            self.running_var.copy_((s.lerp_(std, rate).square_() - self.eps).clamp_(min=0))
        return output

    def _correction(self, mean: Tensor, std: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """r and d of a batch."""
        assert self.running_mean is not None
        assert self.num_batches_tracked is not None
        r_max, d_max = self.schedule.bounds(self.num_batches_tracked, s.dtype)
        r = (std / s).clamp_(1 / r_max, r_max)
        d = ((mean - self.running_mean) / s).clamp_(-d_max, d_max)
        return r, d

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, schedule={self.schedule}"  # type: ignore[no-untyped-call]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of (N, C, ...), in float32 or wider."""
    x = _wide(x).flatten(2) if x.dim() > 2 else _wide(x).unsqueeze(2)
    if not x.is_cpu:
        var, mean = torch.var_mean(x, (0, 2), correction=0)
        return mean, var
    # by sample first: many times faster on a CPU than torch's own var_mean
    means = x.mean(2, keepdim=True)
    mean = means.mean(0)
    within = torch.linalg.vector_norm(x - means, dim=2).square().mean(0) / x.shape[2]
    return mean[:, 0], within + (means - mean).square().mean(0)[:, 0]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class BatchRenorm1d(nn.BatchNorm1d, BatchRenorm):
    """BatchRenorm on (N, C) or (N, C, L)."""


class BatchRenorm2d(nn.BatchNorm2d, BatchRenorm):
    """BatchRenorm on (N, C, H, W)."""


class BatchRenorm3d(nn.BatchNorm3d, BatchRenorm):
    """BatchRenorm on (N, C, D, H, W)."""
