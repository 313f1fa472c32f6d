"""Python code in several processes at once, as torchrun starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_in(size, code, *arguments, timeout=60, joined=False):
    """Run `code` in `size` processes that find each other; (exit code, stdout) of each.

    joined: they have found each other before the code begins, and may form groups of bnfold's more
    than once. What they print on stderr goes to the test's own, where pytest shows it after a
    failure.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if joined:
        join = "import torch.distributed as dist\ndist.init_process_group('gloo')\n"
        # gloo's threads now and then abort an interpreter that ends (SIGABRT, after the last line):
        # that end is this harness's, and nothing that is tested
        leave = "dist.destroy_process_group()\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
        code = f"{join}{code}\n{leave}"
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={
                **os.environ,
                **shared,
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=timeout)[0] for process in started]
        return [(p.returncode, out) for p, out in zip(started, said, strict=True)]
    finally:
        for process in started:
            process.kill()
            process.wait()
