"""Arrays put away until they are needed again: in memory as long as there is room, then on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfold.errors import RuntimeUnavailableError

AnyArray = NDArray[Any]

_LEFT_FREE = 1 << 30  # bytes of the disk that are never taken


@dataclass(frozen=True, eq=False)
class Bundle:
    """Arrays by name that were put away together: themselves, or where they lie on disk."""

    arrays: Mapping[str, AnyArray]
    folder: Path | None = None
    size: int = 0


class Shelf:
    """Takes bundles of arrays and gives each back once. Close it when done.

    max_bytes: what may stay in memory; the rest goes to a temporary folder (TMPDIR).
    on_disk: bytes that lie on disk now.
    """

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0
        self.on_disk = 0

    def put(self, arrays: Mapping[str, AnyArray]) -> Bundle:
        """Put arrays away; they must not be written to until they are taken back.

        Raises RuntimeUnavailableError where the disk has no room.
        """
        size = sum(array.nbytes for array in arrays.values())
        if size <= self._room:
            self._room -= size
            return Bundle(arrays, size=size)
        folder = self._new_folder(size)
        try:
            for index, array in enumerate(arrays.values()):
                np.save(folder / f"{index}.npy", array, allow_pickle=False)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise RuntimeUnavailableError(
                f"Activations cannot be kept in {folder.parent}: {error}. Set TMPDIR to a larger"
                " disk, or give fewer images (samples)."
            ) from error
        self.on_disk += size
        return Bundle(dict.fromkeys(arrays, np.empty(0)), folder, size)

    def take(self, bundle: Bundle) -> dict[str, AnyArray]:
        """The arrays of a bundle, which is gone from the shelf then."""
        if bundle.folder is None:
            self._room += bundle.size
            return dict(bundle.arrays)
        arrays = {
            name: np.load(bundle.folder / f"{index}.npy", allow_pickle=False)
            for index, name in enumerate(bundle.arrays)
        }
        shutil.rmtree(bundle.folder)
        self.on_disk -= bundle.size
        return arrays

    def close(self) -> None:
        """Remove what lies on disk."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self.on_disk = 0

    def _new_folder(self, size: int) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="bnfold-")
        root = Path(self._folder.name)
        free = shutil.disk_usage(root).free
        if size + _LEFT_FREE > free:
            raise RuntimeUnavailableError(
                f"Activations do not fit into memory, and {root} has {free >> 20} MiB left. Set"
                " TMPDIR to a larger disk, raise max_bytes, or give fewer images (samples)."
            )
        self._count += 1
        folder = root / str(self._count)
        folder.mkdir()
        return folder
