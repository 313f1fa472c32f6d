"""Measuring what a batch norm reads: mean and variance of each image and channel, accumulated.

Sums over the pixels of an image are taken in the activation's own type, of deviations from a value
near the channel's mean, and of their squares; everything between images is float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnfold.adapting.moments import Float64, ImageMoments
from bnfold.adapting.ranks import Waiting
from bnfold.errors import InputError

_COLLAPSE = 1 << 17  # numbers that a tally keeps before it reduces them
_STRETCH = 1 << 19  # values that are measured at a time: what a processor's cache holds
_NEAR = 2.0  # standard deviations from the mean, within which a difference of squares is accurate


@dataclass(frozen=True, eq=False)
class _Near:
    """The value of each channel that a layer is measured about, as a tensor and as numbers (C,)."""

    value: Tensor
    exact: Float64

    @classmethod
    def of(cls, value: Tensor, axis: int) -> _Near:
        exact = value.cpu().double().numpy()
        return cls(value.unsqueeze(-1) if axis == 2 else value, exact)


@dataclass(frozen=True, eq=False)
class Found:
    """Per image and channel of one batch: mean and population variance, (N, C), over `pixels`."""

    means: Float64
    variances: Float64
    pixels: int
    batch: int


class Meter:
    """Measures inputs of batch norms: (N, C) or (N, C, ...), of any floating type.

    A variance is the mean squared deviation from a value, less the square of the mean deviation.
    That is accurate where the value lies near the mean, as the mean of the batch before does; where
    it does not, the batch is measured again, about its own. In one pass over memory: a stretch of
    images at a time, in a buffer that is used again. (A sum in torch is accurate to 1e-7; its
    vector_norm was seen off by 4e-5 in float32 on 50,000 rectified values.)
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._near: dict[str, _Near] = {}

    def __call__(self, name: str, x: Tensor, batch: int) -> Found:
        """Raises InputError, with the layer's name, where x holds NaN or infinity."""
        x = x.detach()
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        if not x.numel():
            empty = np.zeros((0, x.shape[1]))
            return Found(empty, empty, max(math.prod(x.shape[2:]), 1), batch)
        if x.dim() == 2:
            means = x.to("cpu", torch.float64, copy=True).numpy()
            found = Found(means, np.zeros_like(means), 1, batch)
        else:
            found = self._of_images(name, x, batch)
        # infinities of either sign, and an overflow of the squares, end up here too
        if not np.isfinite(found.means.sum() + found.variances.sum()):
            raise InputError(
                f"The input of '{name}' holds NaN or infinity in batch {batch}: its statistics"
                " would be NaN. Look for them in the data, or for an overflow in the layers before."
            )
        return found

    def _of_images(self, name: str, x: Tensor, batch: int) -> Found:
        y, axis = _pixels_along_one_axis(x)
        near = self._near.get(name)
        if near is None:
            near = _Near.of(y[0].mean(axis - 1), axis)
        means, variances, is_near = self._about(near, y, axis)
        if not is_near:
            near = _Near.of(torch.from_numpy(means.mean(axis=0)).to(y), axis)
            means, variances, _ = self._about(near, y, axis)
        self._near[name] = near
        return Found(means, variances, y.shape[axis], batch)

    def _about(self, near: _Near, y: Tensor, axis: int) -> tuple[Float64, Float64, bool]:
        """Means, variances, (N, C) each, and whether `near` was near enough to trust them."""
        count = len(y)
        sums = torch.empty((2, count, len(near.exact)), dtype=y.dtype, device=y.device)
        step = max(_STRETCH * count // y.numel(), 1)
        for start in range(0, count, step):
            stop = min(start + step, count)
            part = y[start:stop]
            deviation = torch.sub(part, near.value, out=self._buffer(part))
            torch.sum(deviation, axis, out=sums[0, start:stop])
            torch.sum(deviation.square_(), axis, out=sums[1, start:stop])
        offsets, squares = sums.cpu().numpy().astype(np.float64) / y.shape[axis]
        variances = squares - np.square(offsets)
        offset, square = offsets.mean(axis=0), squares.mean(axis=0)
        is_near = bool((np.square(offset) <= _NEAR**2 * (square - np.square(offset))).all())
        offsets += near.exact
        return offsets, np.maximum(variances, 0.0, out=variances), is_near

    def _buffer(self, like: Tensor) -> Tensor:
        key = (like.dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < like.numel():
            buffer = self._buffers[key] = torch.empty(
                like.numel(), dtype=like.dtype, device=like.device
            )
        return buffer[: like.numel()].view(like.shape)


def _pixels_along_one_axis(x: Tensor) -> tuple[Tensor, int]:
    """(N, C, L) and 2, or (N, L, C) and 1 where that is how memory lies (channels last)."""
    if not x.is_contiguous() and (channels_last := x.movedim(1, -1)).is_contiguous():
        return channels_last.flatten(1, -2), 1
    return x.flatten(2), 2


def pooled(found: Iterable[Found], name: str) -> ImageMoments:
    """All batches together, images of one size at a time."""
    by_size: dict[int, list[Found]] = {}
    for part in found:
        by_size.setdefault(part.pixels, []).append(part)
    return ImageMoments.pooled(
        ImageMoments.of(
            np.concatenate([part.means for part in parts]),
            np.concatenate([part.variances for part in parts]),
            pixels,
            name=f"The input of '{name}'",
        )
        for pixels, parts in by_size.items()
    )


class Tally:
    """The moments of batch after batch, reduced from time to time so that it stays small.

    batches: their numbers.  compare: keep `Waiting.within` too.
    """

    def __init__(self, name: str, found: Iterable[Found] = (), *, compare: bool = False) -> None:
        self._name = name
        self._recent: list[Found] = []
        self._numbers = 0
        self._total: ImageMoments | None = None
        self._filled = 0
        self._within: Float64 | float | None = 0.0 if compare else None
        self.batches: set[int] = set()
        for part in found:
            self.add(part)

    def add(self, found: Found) -> None:
        """One batch more."""
        self._recent.append(found)
        self.batches.add(found.batch)
        if len(found.means):
            self._filled += 1
            if self._within is not None:
                self._within = self._within + np.square(found.means - found.means.mean(0)).sum(0)
        self._numbers += found.means.size
        if self._numbers > _COLLAPSE:
            self.total()

    def total(self) -> ImageMoments:
        """Everything so far."""
        if self._recent:
            recent = pooled(self._recent, self._name)
            self._total = recent if self._total is None else self._total.merge(recent)
            self._recent.clear()
            self._numbers = 0
        assert self._total is not None  # a tally is made for its first batch
        return self._total

    def waiting(self) -> Waiting:
        """Everything so far, as other processes are told it; batches without image do not count."""
        moments, within = self.total(), self._within
        if within is not None:
            within = np.broadcast_to(within, moments.centre.shape)
        return Waiting(self._filled, moments, within)
