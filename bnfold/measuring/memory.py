"""How much memory there is to take."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

_UNKNOWN = 2 << 30  # bytes, where the system does not say


def available_bytes(device: torch.device) -> int:
    """Free memory of the device, in bytes: of the GPU, or of the machine and its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [room for room in (_machine(), _control_group()) if room is not None]
    return min(known, default=_UNKNOWN)


def _machine() -> int | None:
    """What Linux calls available; elsewhere a quarter of the memory, as nobody says."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no sysconf on Windows
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return None


def _control_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container may still take (cgroup v2); None without a limit."""
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        limit = int((root / "memory.max").read_text())
        return max(limit - int((root / "memory.current").read_text()), 0)
    return None
