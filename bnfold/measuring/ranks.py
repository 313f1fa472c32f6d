"""Several processes that measure one data set together: what each saw is merged at every layer.

Each process takes every N-th batch. Wherever a layer is settled they exchange what their batches
saw; each merges all of it in the same order, from the same bytes, so that all of them go on with
the same numbers: those that one process alone would have found, up to rounding.

What goes to and fro are moments, some kilobytes, once per layer. They travel as safetensors over
torch.distributed (gloo as a rule): nothing is unpickled. A process that fails says so in place of
its next message, and all of them end with its error.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, Self

from bnfold import errors
from bnfold.errors import BnfoldError, RuntimeUnavailableError, UsageError, one_line
from bnfold.measuring.stored import Waiting as Waiting
from bnfold.measuring.stored import from_bytes, to_bytes

TIMEOUT = 3600.0  # seconds that a process waits for the others; a dead one is seen at once


class Ranks(Protocol):
    """The processes that share the work. rank: this one's number.  size: how many there are.

    A context: what is raised within ends all processes with the same error. Every process makes the
    same calls in the same order.
    """

    rank: int
    size: int

    def together(self, waiting: Mapping[str, Waiting]) -> dict[str, Waiting]:
        """What waits at each layer in all processes; every process calls it, and gets the same."""

    def share(self, value: Any) -> list[Any]:
        """The value of each process, JSON, in the order of their numbers."""

    def abandon(self) -> None:
        """Nothing more can be told to the others, who see the connection close at the end."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Alone:
    """One process."""

    rank = 0
    size = 1

    def together(self, waiting: Mapping[str, Waiting]) -> dict[str, Waiting]:
        """See Ranks."""
        return dict(waiting)

    def share(self, value: Any) -> list[Any]:
        """See Ranks."""
        return [value]

    def abandon(self) -> None:
        """See Ranks."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing is held."""


def group_from_environment(*, backend: str = "gloo", timeout: float = TIMEOUT) -> Ranks:
    """The processes that torchrun started with this one, or a process group that is there already.

    backend: of a group that is made here; `nccl` sends the moments by way of the GPUs, which gains
    nothing but where gloo finds no network.  timeout: seconds that one process waits for another.
    A group that was there already keeps its own of both, and is not taken down.

    Raises UsageError for an environment that names half a group, RuntimeUnavailableError where the
    others cannot be reached.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return Group(own=False)
    named = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    if None in named.values():
        return Alone()
    rank, size = (_number(name, value) for name, value in named.items())
    if size == 1:
        return Alone()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or rank >= size:
        what = f"{' and '.join(missing)} not" if missing else f"RANK {rank} of {size} processes"
        raise UsageError(
            f"RANK and WORLD_SIZE are set, as torchrun does, but {what}. Start all processes by"
            " torchrun --nproc-per-node=N -m bnfold adapt ..., or unset RANK."
        )
    try:
        if backend == "nccl":
            import torch

            torch.cuda.set_device(own_device("cuda"))
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError, AttributeError, AssertionError) as error:
        raise RuntimeUnavailableError(
            f"The other processes cannot be reached by {backend} at"
            f" {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {one_line(error)}."
        ) from error
    return Group(own=True)


def own_device(device: str | None) -> str | None:
    """`cuda` as the GPU of this process, of those that torchrun started; others as they are."""
    local = os.environ.get("LOCAL_RANK")
    if device != "cuda" or local is None:
        return device
    import torch

    return f"cuda:{_number('LOCAL_RANK', local) % max(torch.cuda.device_count(), 1)}"


def _number(name: str, value: str | None) -> int:
    if value is None or not value.isdecimal():
        raise UsageError(f"{name} is {value!r} in the environment; torchrun sets a number.")
    return int(value)


class Group:
    """The processes of torch.distributed's default group; see Ranks."""

    def __init__(self, own: bool) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # nccl moves nothing but what lies on a GPU
        self._device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        self._own, self._over = own, False
        self._first_failed: int | None = None

    def together(self, waiting: Mapping[str, Waiting]) -> dict[str, Waiting]:
        """See Ranks. Merged in the order of the processes, layers in the order they come up."""
        merged: dict[str, Waiting] = {}
        for _, theirs in self._exchange("together", {}, waiting):
            for name, found in theirs.items():
                merged[name] = merged[name].merge(found) if name in merged else found
        return merged

    def share(self, value: Any) -> list[Any]:
        """See Ranks."""
        return [facts["value"] for facts, _ in self._exchange("share", {"value": value}, {})]

    def abandon(self) -> None:
        """See Ranks."""
        self._over = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the others. Raises what one of them raised; the first one's where many did."""
        import torch.distributed as dist

        try:
            if self._over:
                return  # the others know
            if error is None:
                self._exchange("end", {}, {})
            elif isinstance(error, Exception):
                self._tell(error)
            # at an interrupt they are not waited for: they see the connection close
        finally:
            self._over = True
            if self._own and dist.is_initialized():
                # a DistributedDataParallel holds the group, in a cycle; where it outlives the group
                # the process can abort when it ends
                gc.collect()
                dist.destroy_process_group()

    def _tell(self, error: Exception) -> None:
        """That this process failed. Raises another one's error where all end with that."""
        known = isinstance(error, BnfoldError)
        words = str(error) if known else f"Process {self.rank} failed with {_named(error)}."
        told = {"class": type(error).__name__, "words": words}
        try:
            self._exchange("failure", told, {})
        except BnfoldError as first:
            # where the others cannot be told either, what went wrong here says more
            if self._first_failed not in (None, self.rank):
                raise first from None

    def _exchange(
        self, kind: str, facts: Mapping[str, Any], layers: Mapping[str, Waiting]
    ) -> list[tuple[dict[str, Any], dict[str, Waiting]]]:
        """One message of each process. Raises the error of the first that failed."""
        if self._over:
            raise BnfoldError("A process was asked for more after the group had ended.")
        messages = [
            from_bytes(data, f"The message of process {rank}")
            for rank, data in enumerate(self._gathered(to_bytes({"kind": kind, **facts}, layers)))
        ]
        kinds = [told["kind"] for told, _ in messages]
        if "failure" in kinds:
            self._over = True
            self._first_failed = kinds.index("failure")
            raise _error(messages[self._first_failed][0])
        if len(set(kinds)) > 1:
            self._over = True
            raise UsageError(
                f"The processes have come apart ({', '.join(kinds)}): start all of them with the"
                " same arguments, on the same data."
            )
        return messages

    def _gathered(self, data: bytes) -> list[bytes]:
        """The bytes of every process, by number."""
        import torch
        import torch.distributed as dist

        try:
            size = torch.tensor([len(data)], device=self._device)
            sizes = [torch.empty_like(size) for _ in range(self.size)]
            dist.all_gather(sizes, size)
            room = max(int(n) for n in sizes)
            mine = torch.frombuffer(bytearray(data.ljust(room, b"\0")), dtype=torch.uint8)
            mine = mine.to(self._device)
            all_of_them = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(all_of_them, mine)
        except RuntimeError as error:  # of torch.distributed: closed connections, timeouts
            self._over = True
            raise RuntimeUnavailableError(
                f"Process {self.rank} of {self.size} lost the others ({one_line(error)}): one has"
                " ended without a word, or did not answer in time. Start all of them again."
            ) from error
        return [
            part[: int(n)].cpu().numpy().tobytes()
            for part, n in zip(all_of_them, sizes, strict=True)
        ]


def _error(told: Mapping[str, Any]) -> BnfoldError:
    """The error that another process told, of its own class where it is one of bnfold's."""
    kind = getattr(errors, told["class"], BnfoldError)
    return (kind if issubclass(kind, BnfoldError) else BnfoldError)(told["words"])


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
