"""Shared fixtures: where the real checkpoints lie, the GPU, and skips that CI may not take."""

import functools
import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # tests that a shell runs in the background ignore interrupts, and so would all that they start
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real checkpoints and images, or a skip where there is none.

    BNFOLD_SHARED_DATA names it; BNFOLD_REQUIRE_DATA=1 makes its absence a failure.
    """
    folder = Path(os.environ.get("BNFOLD_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if folder.is_dir():
        return folder
    reason = f"no real checkpoints at {folder} (set BNFOLD_SHARED_DATA)"
    if os.environ.get("BNFOLD_REQUIRE_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def why_no_gpu() -> str:
    """Why the tests marked gpu cannot run here; empty where they can."""
    from bnfold.proof.places.installation import runs

    reasons = {name: runs(name) for name in ("torch-cuda", "ort-cuda")}
    missing = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not True]
    return "no CUDA here, so nothing was shown of it (" + " ".join(missing) + ")" if missing else ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests marked gpu with the reason; BNFOLD_REQUIRE_GPU=1 makes it a failure."""
    if item.get_closest_marker("gpu") is None or not why_no_gpu():
        return
    if os.environ.get("BNFOLD_REQUIRE_GPU") == "1":
        pytest.fail(why_no_gpu())
    pytest.skip(why_no_gpu())
