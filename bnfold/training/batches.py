"""Data to learn from as batches: samples cut anew for each epoch, or batches as somebody made them.

Several processes see the same batches in the same order, and each trains on its own rows of each.
What a network could not learn from is refused here, in words: a shape, a type, a label, a NaN, an
iterator that can be read only once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeGuard, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bnfold.errors import BnfoldError, InputError, UsageError
from bnfold.training.task import Classification, Task
from bnfold.training.words import describe, type_name

Array = Tensor | NDArray[Any]
Index = NDArray[np.int64]


@runtime_checkable
class Samples(Protocol):
    """Samples that are read by number, such as the labelled data of `bnfold.data`.

    name: what errors call them.  take: x and y of these samples, without those that cannot be read.
    """

    @property
    def name(self) -> str:
        """See above."""

    def __len__(self) -> int: ...

    def take(self, index: Index) -> tuple[Array, Array]:
        """See above."""


Pair = tuple[Array, Array]
Data = Pair | Samples | Iterable[Pair]


class Batch(NamedTuple):
    """Inputs and targets. weight: of their mean in the mean over all processes' batches.

    Among several processes a sample that cannot be read counts as one without a gradient.
    """

    x: Tensor
    y: Tensor
    weight: float


class Share(NamedTuple):
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    def of(self, rows: Index) -> Index:
        """Its part of the rows of a batch."""
        return np.array_split(rows, self.size)[self.rank]


class Source(Protocol):
    """Where the batches of each epoch come from. unread: samples left out so far, and why."""

    @property
    def unread(self) -> dict[str, str]:
        """See above."""

    def count(self) -> int:
        """Batches per epoch, of one process."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of one epoch."""

    def digest(self) -> str:
        """A fingerprint by which a resumed run knows its data again."""


def source_of(
    data: Data,
    *,
    task: Task = Classification(),  # noqa: B008  # frozen
    batch_size: int,
    seed: int | None,
    name: str,
    share: Share = Share(),  # noqa: B008  # a tuple
    workers: int = 0,
) -> Source:
    """Data as batches, `name` being what the caller calls it.

    data: `(x, y)` with x float (N, ...) and y as the task takes it (integers (N,) for classes),
    samples that are read by number, or a re-iterable of batches (x, y). The first two are shuffled
    by (seed, epoch), or in their own order without a seed.
    batch_size: of one process; a batch somebody else made is shared out among all of them.
    workers: processes that read samples ahead.
    Raises UsageError for anything else, InputError for values that are not finite.
    """
    for what, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
        if value < least:
            raise UsageError(f"{what} is {value}; it must be at least {least}.")
    if _is_pair(data):
        x, y = _checked(data, name, task)
        arrays = _Arrays(name, x.cpu(), y.cpu())
        return SampleBatches(arrays, task, batch_size, seed, share, 0)
    if isinstance(data, Iterator):
        raise UsageError(
            f"{name} is an iterator, which can be read only once; give a list of batches or an"
            " object that starts anew each time, such as a DataLoader."
        )
    is_one_array = isinstance(data, Tensor | np.ndarray)  # which has the methods of Samples
    if isinstance(data, Samples) and not is_one_array:
        return SampleBatches(data, task, batch_size, seed, share, workers)
    if is_one_array or isinstance(data, str | dict) or not isinstance(data, Iterable):
        raise UsageError(
            f"{name} is {describe(data)}; give arrays (x, y) or an iterable of such batches."
        )
    return GivenBatches(cast(Iterable[Pair], data), name, task, share)


# --- samples that are cut into batches ------------------------------------------------------------


@dataclass(frozen=True)
class _Arrays:
    """All samples at once."""

    name: str
    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Index) -> tuple[Tensor, Tensor]:
        """See Samples."""
        rows = torch.from_numpy(index)
        return self.x[rows], self.y[rows]


_LOOKED_AT = 64  # samples of a large data set by which it is known again


@dataclass(frozen=True)
class SampleBatches:
    """Samples in an order that each epoch draws anew, cut into near-equal batches."""

    samples: Samples
    task: Task
    batch_size: int
    seed: int | None
    share: Share
    workers: int
    unread: dict[str, str] = field(default_factory=dict)

    def count(self) -> int:
        """See Source."""
        return -(-len(self.samples) // (self.batch_size * self.share.size))

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of one epoch, near-equal in size.

        A short last batch would weigh as much as the others in a moving average of statistics, and
        with one sample it would have no variance.
        """
        order = np.arange(len(self.samples))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, number]).permutation(len(self.samples))
        parts = np.array_split(order, self.count())
        own = [self.share.of(part) for part in parts]
        for part, (x, y) in zip(parts, self._read(own), strict=True):
            if self.share.size == 1:
                if len(x):
                    yield Batch(x, y, 1.0)
                continue
            if len(part) < self.share.size:
                raise UsageError(
                    f"{self.samples.name} is cut into batches of {len(part)}, which"
                    f" {self.share.size} processes cannot share; start fewer."
                )
            if not len(x):
                raise InputError(
                    f"None of the samples that process {self.share.rank} was to take from"
                    f" {self.samples.name} can be read; take the broken ones out, or give a larger"
                    " batch_size."
                )
            yield Batch(x, y, len(x) * self.share.size / len(part))

    def _read(self, parts: list[Index]) -> Iterator[tuple[Tensor, Tensor]]:
        """x and y of each part, read ahead where there are workers for it."""
        reading = _Reading(self.samples)
        read: Iterable[Any] = map(reading.__getitem__, parts)
        if self.workers:
            # a generator of its own: what the loop draws must not depend on who reads
            read = DataLoader(
                reading,
                sampler=cast(Any, parts),
                batch_size=None,
                num_workers=self.workers,
                collate_fn=_as_it_is,
                generator=torch.Generator(),
            )
        for found in read:
            if isinstance(found, BnfoldError):
                raise found
            pair, unread = found
            self.unread.update(unread)
            yield _checked(pair, self.samples.name, self.task, may_be_empty=True)

    def digest(self) -> str:
        """See Source. Of arrays all of it; else of the labels and some samples."""
        if isinstance(self.samples, _Arrays):
            return _digest((self.samples.x, self.samples.y))
        count = len(self.samples)
        some = np.unique(np.linspace(0, count - 1, min(count, _LOOKED_AT)).astype(np.int64))
        labels = getattr(self.samples, "labels", None)
        known = [np.array([count]), *self.samples.take(some), *([] if labels is None else [labels])]
        return _digest(map(torch.as_tensor, known))


class _Reading(Dataset[Any]):
    """Samples for a DataLoader; what is wrong with them comes back as a value, not as traceback."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, index: Index) -> Any:
        try:
            return self._samples.take(index), dict(getattr(self._samples, "skipped", {}))
        except BnfoldError as error:
            return error


def _as_it_is(found: Any) -> Any:
    return found


def _digest(arrays: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(repr((tuple(array.shape), array.dtype)).encode())
        found.update(array.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


# --- batches that somebody else made --------------------------------------------------------------


@dataclass(frozen=True)
class GivenBatches:
    """Any object that gives batches (x, y) each time it is iterated, such as a DataLoader."""

    data: Iterable[Pair]
    name: str
    task: Task
    share: Share
    unread: dict[str, str] = field(default_factory=dict)

    def count(self) -> int:
        """See Source. By one pass where the object has no length."""
        try:
            return len(self.data)  # type: ignore[arg-type]
        except TypeError:
            return sum(1 for _ in self.data)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The object's batches, in its order."""
        del number  # it begins anew by itself
        for batch in self.data:
            if not _is_pair(batch):
                raise UsageError(
                    f"{self.name} gave {describe(batch)} where a batch (x, y) of two arrays was"
                    " expected."
                )
            x, y = _checked(batch, self.name, self.task)
            yield self._own(x, y)

    def _own(self, x: Tensor, y: Tensor) -> Batch:
        size = self.share.size
        if size == 1:
            return Batch(x, y, 1.0)
        if len(x) < size:
            raise UsageError(
                f"{self.name} gave a batch of {len(x)}, which {size} processes cannot share."
            )
        rows = torch.from_numpy(self.share.of(np.arange(len(x))))
        return Batch(x[rows], y[rows], len(rows) * size / len(x))

    def digest(self) -> str:
        """No fingerprint: the batches may be made on the fly."""
        return "batches"


# --- what a batch must be -------------------------------------------------------------------------


def _is_pair(data: object) -> TypeGuard[Pair]:
    return (
        isinstance(data, tuple | list)
        and len(data) == 2
        and all(isinstance(array, Tensor | np.ndarray) for array in data)
    )


def _checked(
    pair: Pair, name: str, task: Task, *, may_be_empty: bool = False
) -> tuple[Tensor, Tensor]:
    """x float (N, ...), finite; y as the task takes it."""
    x, y = _tensor(pair[0], f"x of {name}"), _tensor(pair[1], f"y of {name}")
    if x.dim() < 2 or not x.is_floating_point():
        raise UsageError(
            f"{name} has x of shape {tuple(x.shape)} and type {type_name(x)}; it must be floats,"
            " scaled as the network expects them, with the samples along the first axis."
        )
    y = task.targets(y, name)
    if len(x) != len(y) or not (len(x) or may_be_empty):
        raise UsageError(f"{name} has {len(x)} samples in x and {len(y)} labels in y.")
    finite = torch.isfinite(x.flatten(1)).all(dim=1)
    if y.is_floating_point():
        finite &= torch.isfinite(y.reshape(len(y), -1)).all(dim=1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise InputError(
            f"{name}: {int((~finite).sum())} of {len(x)} samples hold NaN or infinity, the first is"
            f" number {first}."
        )
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
