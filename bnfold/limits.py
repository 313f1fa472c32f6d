"""Work in a process of its own, ended when it takes too long.

A hostile model can compute for ever, or take all memory, inside libraries that no exception
reaches. So `--timeout` runs the verb in a fresh process: this one only waits, ends the whole group
of processes when the time is over, and says what happened. On Linux the other process is also the
first one that the system ends where memory runs out, so that no neighbour is.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from bnfold.errors import LimitError

_ENDED = (128 + signal.SIGTERM, -signal.SIGTERM, -9)  # exit codes of a process that was ended
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux's prctl
GRACE = 2.0  # seconds to leave no temporary file behind, between the request to end and the end


def within(seconds: float, work: Callable[[], int]) -> int:
    """What `work` returns, an exit code, from a process of its own; it must be picklable.

    Raises LimitError when it takes longer, or is ended from outside (out of memory, a crash).
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="bnfold-") as folder:
        process = context.Process(target=_inside, args=(work, folder))
        process.start()
        request: signal.Signals | None = signal.SIGTERM
        try:
            if _ends(process, seconds):
                request = None
        except KeyboardInterrupt:
            request = signal.SIGINT
            raise
        finally:
            _end(process, request)
    # it may have come to its end while it was asked to
    if request is not None and process.exitcode in _ENDED:
        raise LimitError(
            f"It was not done within {seconds:g} seconds (--timeout) and was ended; nothing was"
            " proved.",
            code="E_TIMEOUT",
        )
    return _judged(process.exitcode)


def _inside(work: Callable[[], int], folder: str) -> None:
    """The other process: a group of its own, temporary files in the folder, first to be ended."""
    if hasattr(os, "setsid"):
        os.setsid()
    end_with_parent()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None
    sys.exit(work())


def end_with_parent() -> None:
    """This process ends with the one that waits for it, computing or not (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)


def _ends(process: BaseProcess, seconds: float) -> bool:
    """Whether it ends by itself; its number stays its own until it is joined."""
    return bool(wait([process.sentinel], seconds))


def _end(process: BaseProcess, request: signal.Signals | None) -> None:
    """Ask the group to end, unless it has, and end it; what it started must not go on either."""
    if request is not None:
        _signal(process, request)
        _ends(process, GRACE)
    _signal(process, getattr(signal, "SIGKILL", signal.SIGTERM))
    process.join()


def _signal(process: BaseProcess, which: signal.Signals) -> None:
    assert process.pid is not None
    try:
        os.killpg(process.pid, which)
    except (AttributeError, OSError):  # no group yet; Windows has none
        with contextlib.suppress(OSError):
            os.kill(process.pid, which)


def _judged(code: int | None) -> int:
    """An exit code of the work's own; LimitError where a signal ended it."""
    if code is not None and code >= 0:
        return code
    name = signal.Signals(-(code or 0)).name
    if name == "SIGKILL":
        raise LimitError(
            "The system ended it (SIGKILL), as it does where memory runs out; nothing was proved.",
            code="E_MEMORY",
        )
    raise LimitError(f"It crashed ({name}); nothing was proved.", code="E_CRASH")
