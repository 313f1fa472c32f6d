"""What is put on the shelf comes back as it was, from memory or disk."""

import numpy as np
import pytest

from bnfold.errors import RuntimeUnavailableError
from bnfold.measuring import shelf as shelves
from bnfold.measuring.shelf import Shelf


@pytest.fixture
def disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {
        "x/0": rng.random((3, 4)),
        "y": rng.integers(0, 9, 5),
        "": np.float32(rng.random())[None],
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        x.dtype == b[k].dtype and np.array_equal(x, b[k]) for k, x in a.items()
    )


@pytest.mark.parametrize("room", [0, 200, 1 << 20])
def test_bundles_come_back_in_any_order(disk, room):
    shelf = Shelf(room)
    bundles = [shelf.put(arrays(seed)) for seed in range(4)]
    for seed in (2, 0, 3, 1):
        assert same(shelf.take(bundles[seed]), arrays(seed))
    assert shelf.on_disk == 0
    shelf.close()
    assert not list(disk.iterdir())


def test_memory_that_was_given_back_is_used_again(disk):
    size = sum(array.nbytes for array in arrays(0).values())
    shelf = Shelf(size)
    for seed in range(3):
        assert same(shelf.take(shelf.put(arrays(seed))), arrays(seed))
    assert not list(disk.iterdir())


def test_a_disk_without_room_is_told(monkeypatch):
    monkeypatch.setattr(shelves, "_LEFT_FREE", 1 << 62)
    shelf = Shelf(0)
    with pytest.raises(RuntimeUnavailableError, match="TMPDIR"):
        shelf.put(arrays(0))
    shelf.close()
