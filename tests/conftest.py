"""Shared fixtures: where the real checkpoints lie, and a skip that CI may not take."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
