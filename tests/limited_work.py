"""Work for a process of its own, in a module that such a process imports quickly."""

import os
import signal
import subprocess
import sys
import tempfile
import time


def endless(folder):
    """Work that no polite request ends, and that started more of its kind."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "child").write_text(str(child.pid))
    (folder / "temporary").write_text(tempfile.gettempdir())
    time.sleep(60)


def ended_by(which):
    os.kill(os.getpid(), which)
    time.sleep(60)


def code_of(code):
    return code
