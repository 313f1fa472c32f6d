"""Activations of batches that wait, on disk where memory has no room for them.

A batch that waits in the middle of a network holds tensors in frames that nobody can reach. Every
operator's output is seen as it is made, though, and its storage is remembered, weakly: what is left
of a batch's storages where it pauses is what it holds. They are written to disk and freed in place,
as torch's FSDP frees parameters, and filled again before the batch goes on; the tensors and views
in the frames never notice. Only a storage that an operator made from nothing counts: parameters,
buffers and what the caller holds stay where they are.

A storage that one batch made and another one reads was kept in the network between two forwards,
and the batches would mix. It is seen here too; `Kept` says where to look for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from bnfold.measuring.shelf import Shelf

Bytes = NDArray[np.uint8]

_GIVE_BACK = 64 << 20  # bytes freed, after which the allocator is told to give pages back


class Mixed(BaseException):
    """A batch reads what another one left in the network."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which batch made which storage, while it is on.

    What follows from parameters and buffers alone (a cast weight, a grid of positions) belongs to
    none: it is the same for all.

    batch: the number of the one whose forward runs now; None where what is made is nobody's.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch: int | None = None
        self._net = net  # as long as it lives, the addresses are its own
        self._given = {
            tensor.untyped_storage()._cdata
            for tensor in _tensors((*net.parameters(), *net.buffers()))
        }
        # by the storage's address, which a weak reference keeps from being used again
        self._constant: dict[int, StorageWeakRef] = {}
        self._makers: dict[int, int] = {}
        self._made: dict[int, dict[int, StorageWeakRef]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator; note who made what comes out. Raises Mixed where batches do."""
        batch = self.batch
        if batch is None:
            return func(*args, **(kwargs or {}))
        read = {
            tensor.untyped_storage()._cdata
            for tensor in _tensors((*args, *kwargs.values()) if kwargs else args)
        }
        if any(self._makers.get(address, batch) != batch for address in read):
            raise Mixed
        out = func(*args, **(kwargs or {}))
        constant = all(address in self._given or address in self._constant for address in read)
        for tensor in _tensors((out,)):
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address in self._makers or (address in read and address not in self._constant):
                continue
            if constant:
                self._constant.setdefault(address, _weak(storage))
            else:
                self._constant.pop(address, None)  # a constant no more, where it is written to
                self._makers[address] = batch
                self._made.setdefault(batch, {})[address] = _weak(storage)
        return out

    @contextlib.contextmanager
    def nobodys(self) -> Iterator[None]:
        """What is made meanwhile belongs to no batch."""
        batch, self.batch = self.batch, None
        try:
            yield
        finally:
            self.batch = batch

    def held_by(self, batch: int) -> list[UntypedStorage]:
        """The storages that the batch made and that still are."""
        made, held = self._made.get(batch, {}), []
        for address, reference in list(made.items()):
            storage = UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del made[address], self._makers[address]
            elif storage.nbytes() and storage.resizable() and storage.device.type != "meta":
                held.append(storage)
        return held


class Kept:
    """What a network holds besides parameters and buffers, its hooks included, as it is now."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._holders = list(_holders(map(vars, net.modules())))
        self._before = self._values()
        self._tensors = self._kept()

    def has_changed(self) -> bool:
        """Whether it holds other tensors than then."""
        if self._values() == self._before:  # a tenth of a millisecond, for what is asked often
            return False
        return [*map(id, self._tensors)] != [*map(id, self._kept())]

    def _values(self) -> list[int]:
        values = (h.values() if isinstance(h, Mapping) else h for h in self._holders)
        return [*map(id, chain.from_iterable(values))]

    def _kept(self) -> list[Tensor]:
        holders = _holders(map(vars, self._net.modules()))
        values = (h.values() if isinstance(h, Mapping) else h for h in holders)
        return [v for v in chain.from_iterable(values) if isinstance(v, Tensor)]


_OWN = {"_parameters", "_buffers", "_modules"}
_EMPTY = set(vars(nn.Module()))  # its many mappings of hooks, as a rule
_HOLDING = (Mapping, list, tuple, set)


def _holders(values: Iterable[Any], depth: int = 4) -> Iterator[Any]:
    """The containers among values, and what lies in them, objects by their attributes."""
    for value in values:
        if isinstance(value, Tensor | nn.Module | type | ModuleType):
            continue
        if not isinstance(value, _HOLDING):
            value = getattr(getattr(value, "__self__", value), "__dict__", None)  # of a method too
            if not value:
                continue
        if depth:
            yield value
            inside = value
            if isinstance(value, Mapping):
                inside = [v for k, v in value.items() if k not in _OWN and (k not in _EMPTY or v)]
            yield from _holders(inside, depth - 1)


def _weak(storage: UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _tensors(values: Any) -> Iterator[Tensor]:
    """All that lie in strided memory, in lists and tuples too."""
    for value in values:
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class Spill:
    """Room for what paused batches hold: in memory up to max_bytes, then on disk. Close it.

    most: bytes that lay on disk at the worst moment.
    """

    def __init__(self, net: nn.Module, max_bytes: int) -> None:
        self.ledger = Ledger(net)
        self.most = 0
        self._room, self._freed = max_bytes, 0
        self._shelf = Shelf(0)

    @contextlib.contextmanager
    def running(self, batch: int) -> Iterator[None]:
        """Around the forward of a batch, pauses and all."""
        self.ledger.batch = batch
        try:
            yield
        finally:
            self.ledger.held_by(batch)  # forget what is gone
            self.ledger.batch = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around the pause of the running batch.

        Raises RuntimeUnavailableError where the disk has no room; nothing is lost then.
        """
        batch = self.ledger.batch
        assert batch is not None
        with self.ledger.nobodys():
            held = self.ledger.held_by(batch)
            size = sum(storage.nbytes() for storage in held)
            if size <= self._room:
                del held[:]
                self._room -= size
                try:
                    yield
                finally:
                    self._room += size
                return
            with self._on_disk(held):
                yield

    @contextlib.contextmanager
    def _on_disk(self, held: list[UntypedStorage]) -> Iterator[None]:
        sizes = [storage.nbytes() for storage in held]
        bundle = self._shelf.put({str(i): _bytes_of(s) for i, s in enumerate(held)})
        self.most = max(self.most, self._shelf.on_disk)
        for storage in held:
            storage.resize_(0)
        self._give_back(sum(sizes))
        try:
            yield
        finally:  # also where it is unwound: no tensor is left without memory
            for storage, size in zip(held, sizes, strict=True):
                storage.resize_(size)
        for storage, array in zip(held, self._shelf.take(bundle).values(), strict=True):
            _fill(storage, array)

    def _give_back(self, size: int) -> None:
        """What was freed, from time to time, to the system: glibc keeps it in pieces otherwise."""
        self._freed += size
        if self._freed > _GIVE_BACK:
            self._freed = 0
            if sys.platform == "linux":
                getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # int: another libc, no-op

    def close(self) -> None:
        """Remove what lies on disk."""
        self._shelf.close()


def _bytes_of(storage: UntypedStorage) -> Bytes:
    """The bytes of a storage; on the CPU the very ones.

    Not by way of Tensor.numpy, after which a storage can no longer be freed.
    """
    if storage.device.type != "cpu":
        return _as_tensor(storage).cpu().numpy()
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    return np.ctypeslib.as_array(memory)


def _fill(storage: UntypedStorage, array: Bytes) -> None:
    if storage.device.type == "cpu":
        np.copyto(_bytes_of(storage), array)
    else:
        _as_tensor(storage).copy_(torch.from_numpy(array))


def _as_tensor(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
