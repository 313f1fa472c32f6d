"""Work for a process of its own, in a module that such a process imports quickly."""

import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bnfold import limits


def endless(folder):
    """Work that no polite request ends, and that started more of its kind."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "child").write_text(str(child.pid))
    (folder / "temporary").write_text(tempfile.gettempdir())
    (folder / "parent").write_text(str(os.getpid()))
    time.sleep(60)


def ended_by(which):
    os.kill(os.getpid(), which)
    time.sleep(60)


def code_of(code):
    return code


def computing(folder, model):
    """A runtime's own process that computes for ever."""
    import numpy as np

    from bnfold.proof.places.process import Worker
    from bnfold.proof.places.runtimes import Runtime

    with Worker(Runtime("ort-cpu")) as worker:
        (folder / "child").write_text(str(worker._process.pid))
        session = worker.open(model, optimize=False)
        session.run({"x": np.zeros((1, 4, 8, 8), np.float32)})


def ends(process, seconds=10):
    """Whether a process of this number is gone, or is on the way; one that is killed takes time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{process}/stat")
        if state.exists() and state.read_text().split()[2] == "Z":  # nobody waited for it yet
            return True
        time.sleep(0.05)
    return False


def waiting(folder):
    """A process that waits for one that computes, as the command line does."""
    limits.within(60, functools.partial(endless, folder))
