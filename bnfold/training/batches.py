"""Labelled data as batches: arrays cut anew for each epoch, or batches as somebody else makes them.

What a network could not learn from is refused here, in words: a shape, a type, a label, a NaN, an
iterator that can be read only once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnfold.errors import InputError, UsageError

Array = Tensor | NDArray[Any]
Batch = tuple[Array, Array]
Data = Batch | Iterable[Batch]


@dataclass(frozen=True)
class ArrayBatches:
    """All samples at once: shuffled by (seed, epoch), or in their own order without a seed."""

    x: Tensor
    y: Tensor
    batch_size: int
    seed: int | None

    def count(self) -> int:
        """Batches per epoch."""
        return -(-len(self.x) // self.batch_size)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, near-equal in size.

        A short last batch would weigh as much as the others in a moving average of statistics, and
        with one sample it would have no variance.
        """
        order = np.arange(len(self.x))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, number]).permutation(len(self.x))
        for part in np.array_split(order, self.count()):
            index = torch.from_numpy(part)
            yield self.x[index], self.y[index]

    def digest(self) -> str:
        """A fingerprint by which a resumed run knows its data again."""
        digest = hashlib.sha256(repr((tuple(self.x.shape), self.x.dtype)).encode())
        for tensor in (self.x, self.y):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class GivenBatches:
    """Any object that gives batches (x, y) each time it is iterated, such as a DataLoader."""

    data: Iterable[Batch]
    name: str

    def count(self) -> int:
        """Batches per epoch, counted by one pass where the object has no length."""
        try:
            return len(self.data)  # type: ignore[arg-type]
        except TypeError:
            return sum(1 for _ in self.data)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The object's batches, in its order."""
        del number
        for batch in self.data:
            if not _is_pair(batch):
                raise UsageError(
                    f"{self.name} gave {describe(batch)} where a batch (x, y) of two arrays was"
                    " expected."
                )
            yield _checked(*batch, self.name)

    def digest(self) -> str:
        """No fingerprint: the batches may be made on the fly."""
        return "batches"


def labelled(
    data: Data, *, batch_size: int, seed: int | None, name: str
) -> ArrayBatches | GivenBatches:
    """Data as batches, `name` being what the caller calls it.

    data: `(x, y)` with x float (N, ...) and y integer (N,), or a re-iterable of such batches.
    Raises UsageError for anything else, InputError for values that are not finite.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be at least 1.")
    if _is_pair(data):
        x, y = _checked(*data, name)
        return ArrayBatches(x.cpu(), y.cpu(), batch_size, seed)
    if isinstance(data, Iterator):
        raise UsageError(
            f"{name} is an iterator, which can be read only once; give a list of batches or an"
            " object that starts anew each time, such as a DataLoader."
        )
    if isinstance(data, Tensor | np.ndarray | str | dict) or not isinstance(data, Iterable):
        raise UsageError(
            f"{name} is {describe(data)}; give arrays (x, y) or an iterable of such batches."
        )
    return GivenBatches(cast(Iterable[Batch], data), name)


def describe(value: object) -> str:
    """A value in the words of an error message."""
    if isinstance(value, Tensor | np.ndarray):
        return f"an array of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a value of type {type(value).__name__}"


def _is_pair(data: object) -> TypeGuard[Batch]:
    return (
        isinstance(data, tuple | list)
        and len(data) == 2
        and all(isinstance(array, Tensor | np.ndarray) for array in data)
    )


def _checked(x_array: Array, y_array: Array, name: str) -> tuple[Tensor, Tensor]:
    """x float (N, ...), finite; y int64 (N,), one class per sample."""
    x, y = _tensor(x_array, f"x of {name}"), _tensor(y_array, f"y of {name}")
    if x.dim() < 2 or not x.is_floating_point():
        raise UsageError(
            f"{name} has x of shape {tuple(x.shape)} and type {_type_name(x)}; it must be floats,"
            " scaled as the network expects them, with the samples along the first axis."
        )
    if y.dim() != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UsageError(
            f"{name} has y of shape {tuple(y.shape)} and type {_type_name(y)}; it must be one"
            " integer class per sample."
        )
    if len(x) != len(y) or not len(x):
        raise UsageError(f"{name} has {len(x)} samples in x and {len(y)} labels in y.")
    finite = torch.isfinite(x.flatten(1)).all(dim=1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise InputError(
            f"{name}: {int((~finite).sum())} of {len(x)} samples hold NaN or infinity, the first is"
            f" number {first}."
        )
    y = y.to(torch.int64)
    if int(y.min()) < 0:
        raise UsageError(f"{name} has the label {int(y.min())}; classes count from 0.")
    return x, y


def _tensor(array: Array, name: str) -> Tensor:
    """The array as a tensor, copied only where torch cannot share its memory."""
    if isinstance(array, Tensor):
        return array.detach()
    try:
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.require(native, requirements=["C", "W"]))
    except TypeError:
        raise UsageError(f"{name} has the type {array.dtype}; it must hold numbers.") from None


def _type_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
