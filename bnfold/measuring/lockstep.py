"""Many runs of one program that walk in step: each waits at a place until all have come there.

A task is a plain callable that, somewhere deep inside, says `steps.wait(place, found)`. It stops
there while the other tasks run, one at a time, until they wait or end as well; then what they
found is settled and the tasks at that place walk on. Memory holds one paused task each, and work is
done once.

A task needs its own stack to be paused in. Greenlets give it one inside the caller's thread, so
that arithmetic libraries see a single thread; without the package `greenlet` each task gets a
thread, of which one runs at a time. The results are the same.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Generic, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from bnfold.errors import RuntimeUnavailableError

Found = TypeVar("Found")

_AUTOCAST_DEVICES = ("cpu", "cuda")


class Abandoned(BaseException):
    """Raised where a task waits, to unwind it: another one failed."""


class Task(Protocol):
    """A callable on a stack of its own."""

    def resume(self) -> None:
        """Run until it pauses or ends; what it raises is raised here."""

    def pause(self) -> None:
        """Called on the task's own stack: back to whoever resumed it, until resumed again."""

    def abandon(self) -> None:
        """Unwind it, if it has not ended."""


class Steps(Generic[Found]):
    """Runs tasks in step.

    While a task runs, `current` is its index and `started` the number of tasks there are so far.
    """

    def __init__(self, make_task: Callable[[Callable[[], None]], Task]) -> None:
        self._make_task = make_task
        self._tasks: list[Task] = []
        self._waiting: dict[int, tuple[str, Found]] = {}
        self.current = 0

    @property
    def started(self) -> int:
        """Tasks started so far."""
        return len(self._tasks)

    def wait(self, place: str, found: Found) -> None:
        """Called by the running task: hand over what it found, wait until `place` is settled."""
        self._waiting[self.current] = (place, found)
        self._tasks[self.current].pause()

    def run(
        self,
        calls: Iterable[Callable[[], None]],
        settle: Callable[[Mapping[str, Sequence[Found]]], str | None],
    ) -> None:
        """Run all calls to their ends.

        `calls` is read as the tasks start. `settle` is asked when no task can move: it gets what
        was found at each place where tasks wait, in the order of the tasks, and names the place
        that opens; None ends the run. It is asked also where none waits any more: another process
        may have tasks left. Tasks that take different ways wait at different places: none blocks.
        What a task or `settle` raises ends all tasks and is raised here.
        """
        try:
            for call in calls:
                self._tasks.append(self._make_task(call))
                self._step(self.started - 1)
            while (place := settle(self._by_place())) is not None:
                for index in [i for i, (at, _) in sorted(self._waiting.items()) if at == place]:
                    del self._waiting[index]
                    self._step(index)
        finally:
            self._abandon()

    def _abandon(self) -> None:
        """Unwind all tasks; first the one that an interrupt may have left running."""
        for index in (self.current, *range(self.started)):
            if index < self.started:
                self.current = index
                self._tasks[index].abandon()
        self._waiting.clear()

    def _step(self, index: int) -> None:
        self.current = index
        self._tasks[index].resume()

    def _by_place(self) -> dict[str, list[Found]]:
        places: dict[str, list[Found]] = {}
        for _, (place, found) in sorted(self._waiting.items(), key=lambda item: item[0]):
            places.setdefault(place, []).append(found)
        return places


def task_maker(kind: str | None = None) -> Callable[[Callable[[], None]], Task]:
    """How tasks are made: `greenlet` or `thread`; None takes greenlets where there are any."""
    try:
        library = None if kind == "thread" else importlib.import_module("greenlet")
    except ImportError:
        if kind is not None:
            raise
        library = None
    if library is None:
        return ThreadTask
    return lambda call: GreenletTask(call, library)


class GreenletTask:
    """A task in the caller's thread."""

    def __init__(self, call: Callable[[], None], library: ModuleType) -> None:
        self._hub = library.getcurrent()
        self._greenlet = library.greenlet(call)
        self._modes = _modes_now()

    def resume(self) -> None:
        """See Task."""
        self._greenlet.switch()

    def pause(self) -> None:
        """See Task. The thread's modes are the caller's meanwhile, and the task's own after."""
        with _as_before(self._modes):
            self._hub.switch()

    def abandon(self) -> None:
        """See Task."""
        while self._greenlet:  # started and not ended
            with contextlib.suppress(BaseException):  # what unwinding raises is beside the point
                self._greenlet.throw(Abandoned)


class ThreadTask:
    """A task in a thread of its own, which runs only between `resume` and the next pause."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._abandoned = False
        self._modes = _modes_now()
        self._thread = threading.Thread(target=self._run, name="bnfold-step", daemon=True)

    def resume(self) -> None:
        """See Task."""
        if not self._thread.ident:
            self._start()
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def pause(self) -> None:
        """See Task."""
        if not self._abandoned:
            self._back.release()
            self._go.acquire()
        if self._abandoned:
            raise Abandoned

    def abandon(self) -> None:
        """See Task. A task that is running is unwound at its next pause."""
        if self._thread.ident:
            self._abandoned = True
            self._go.release()
            self._thread.join()

    def _start(self) -> None:
        try:
            self._thread.start()
        except RuntimeError as error:
            raise RuntimeUnavailableError(
                f"The system gives no further thread ({error}): one is needed per batch. Use larger"
                " batches, or install the package greenlet."
            ) from error

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                with _as_before(self._modes):
                    self._call()
        except BaseException as error:
            self._error = error
        finally:
            self._back.release()


# --- torch keeps its modes by thread --------------------------------------------------------------


@dataclass(frozen=True)
class _Modes:
    """Whether torch records gradients, infers only, and casts (by device, and to which type).

    dispatch: the modes that see every operator.
    """

    gradients: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    dispatch: tuple[TorchDispatchMode, ...]


def _modes_now() -> _Modes:
    return _Modes(
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple(
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in _AUTOCAST_DEVICES
        ),
        tuple(_get_current_dispatch_mode_stack()),
    )


@contextlib.contextmanager
def _as_before(modes: _Modes) -> Iterator[None]:
    """The thread's modes as `modes` says; afterwards as they were."""
    with contextlib.ExitStack() as stack:
        now = _modes_now()
        if now.inference != modes.inference:
            stack.enter_context(torch.inference_mode(modes.inference))
        stack.enter_context(torch.set_grad_enabled(modes.gradients))
        for was, wanted in zip(now.autocast, modes.autocast, strict=True):
            if was != wanted:
                device, enabled, dtype = wanted
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        for mode in modes.dispatch:
            if mode not in now.dispatch:
                stack.enter_context(mode)
        yield
