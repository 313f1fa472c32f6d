"""Measuring what a batch norm reads: mean and variance of each image and channel, accumulated.

Centred before it is squared, in the activation's own type; everything between images is float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnfold.adapting.moments import Float64, ImageMoments
from bnfold.adapting.ranks import Waiting
from bnfold.errors import InputError

_COLLAPSE = 1 << 20  # numbers that a tally keeps before it reduces them


@dataclass(frozen=True, eq=False)
class Found:
    """Per image and channel of one batch: mean and population variance, (N, C), over `pixels`."""

    means: Float64
    variances: Float64
    pixels: int
    batch: int


class Meter:
    """Measures inputs of batch norms: (N, C) or (N, C, ...), of any floating type.

    Centred before it is squared, in a buffer that is used again: freshly mapped memory would cost
    more than the arithmetic. (A sum of squares in torch is accurate to 1e-7; its vector_norm was
    seen off by 4e-5 in float32 on 50,000 rectified values.)
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(self, name: str, x: Tensor, batch: int) -> Found:
        """Raises InputError, with the layer's name, where x holds NaN or infinity."""
        x = x.detach()
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        if x.dim() == 2:
            means = x.cpu().double().numpy()
            found = Found(means, np.zeros_like(means), 1, batch)
        else:
            found = self._of_images(x, batch)
        # infinities of either sign, and an overflow of the squares, end up here too
        if not (np.isfinite(found.means).all() and np.isfinite(found.variances).all()):
            raise InputError(
                f"The input of '{name}' holds NaN or infinity in batch {batch}: its statistics"
                " would be NaN. Look for them in the data, or for an overflow in the layers before."
            )
        return found

    def _of_images(self, x: Tensor, batch: int) -> Found:
        y, axis = _pixels_along_one_axis(x)
        pixels = y.shape[axis]
        if not y.numel():
            empty = np.zeros((0, x.shape[1]))
            return Found(empty, empty, max(pixels, 1), batch)
        mean = y.mean(axis, keepdim=True)
        deviation = torch.sub(y, mean, out=self._buffer(y))
        rest = deviation.mean(axis)  # what rounding left in the mean
        square = deviation.square_().sum(axis)
        columns = torch.stack((mean.squeeze(axis), rest, square)).cpu().double().numpy()
        variances = columns[2] / pixels - columns[1] ** 2
        return Found(columns[0] + columns[1], np.maximum(variances, 0.0), pixels, batch)

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
    channels_last = x.movedim(1, -1)
    if channels_last.is_contiguous() and not x.is_contiguous():
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

    batches: their numbers.
    """

    def __init__(self, name: str, found: Iterable[Found] = ()) -> None:
        self._name = name
        self._recent: list[Found] = []
        self._numbers = 0
        self._total: ImageMoments | None = None
        self._filled, self._within = 0, np.zeros(())
        self.batches: set[int] = set()
        for part in found:
            self.add(part)

    def add(self, found: Found) -> None:
        """One batch more."""
        self._recent.append(found)
        self.batches.add(found.batch)
        if len(found.means):
            self._filled += 1
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
        moments = self.total()
        return Waiting(self._filled, moments, np.broadcast_to(self._within, moments.centre.shape))
