"""Where images lie: an .npy or .npz file, a folder, scikit-learn's digits. Read as they are stored.

A reader knows how many samples there are and gives any of them by index. Nothing is unpickled, an
archive is measured before it is unpacked, and an image that cannot be read is left out by name.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bnfold.errors import InputError, RuntimeUnavailableError, UnsafeInputError, UsageError

Stored = NDArray[Any]
Samples = Sequence[Stored] | Stored  # of several shapes, or of one along the first axis
Labels = NDArray[np.int64]

# Pillow's own names; formats that call other programs (EPS) or render (PDF, WMF) are not among them
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)


class Reader(Protocol):
    """Samples that can be read by index.

    name: what errors call it.  labels: (N,), or None.  skipped: what could not be read, and why.
    """

    name: str
    labels: Labels | None
    skipped: dict[str, str]

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.int64]) -> tuple[Samples, NDArray[np.int64]]:
        """The samples as they are stored, and the indices of those that could be read."""


class ArrayReader:
    """Samples along the first axis of an array, which may be mapped from a file."""

    def __init__(self, name: str, x: Stored, y: Stored | None = None) -> None:
        if x.ndim < 2 or not len(x):
            raise InputError(
                f"{name} holds an array of shape {x.shape}; samples lie along the first axis, such"
                " as (N, H, W, 3) bytes or (N, C, H, W) floats, and there must be one."
            )
        if x.dtype != np.uint8 and x.dtype.kind != "f":
            raise InputError(
                f"{name} holds {x.dtype}; images are bytes (uint8) or floats. Convert the array."
            )
        self.name, self._x, self.labels = name, x, None
        self.skipped: dict[str, str] = {}
        if y is not None:
            if y.shape != (len(x),) or y.dtype.kind not in "iu":
                raise InputError(
                    f"{name} has labels of shape {y.shape} and type {y.dtype}; expected"
                    f" {len(x)} integers."
                )
            self.labels = y.astype(np.int64)

    def __len__(self) -> int:
        return len(self._x)

    def read(self, indices: NDArray[np.int64]) -> tuple[Samples, NDArray[np.int64]]:
        """See Reader."""
        return np.asarray(self._x[indices]), indices


def open_array(path: Path, max_bytes: int) -> ArrayReader:
    """An .npy file, mapped, or an .npz file: its array `x`, or the only one, and labels `y`.

    Raises InputError; UnsafeInputError for pickled objects and for an archive that unpacks to more
    than `max_bytes`.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(6)
        if magic == b"\x93NUMPY":
            return ArrayReader(path.name, np.load(path, mmap_mode="r", allow_pickle=False))
        if magic[:4] == b"PK\x03\x04":
            return _open_archive(path, max_bytes)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        what = " ".join(str(error).split())
        if "allow_pickle" in what or "Python objects" in what:
            raise UnsafeInputError(
                f"{path} holds pickled Python objects, which could run code; save a plain array."
            ) from error
        raise InputError(f"{path} cannot be read as a NumPy file: {what}.") from error
    raise InputError(
        f"{path} is no data that bnfold reads: .npy, .npz, a folder of images, or a factory"
        " (pkg.mod:factory, path.py:factory)."
    )


def _open_archive(path: Path, max_bytes: int) -> ArrayReader:
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename.removesuffix(".npy"): entry.file_size for entry in archive.filelist}
    arrays = [name for name in sizes if name != "y"]
    if "x" not in sizes and len(arrays) != 1:
        raise InputError(
            f"{path} holds the arrays {', '.join(sizes) or '(none)'}; name the images 'x' (and"
            " labels 'y'), or store one array only."
        )
    chosen = "x" if "x" in sizes else arrays[0]
    if sizes[chosen] + sizes.get("y", 0) > max_bytes:
        raise UnsafeInputError(
            f"'{chosen}' in {path} unpacks to {sizes[chosen]} bytes, more than the {max_bytes} that"
            " are allowed; save it as .npy, which is read piece by piece."
        )
    with np.load(path, allow_pickle=False) as file:
        return ArrayReader(path.name, file[chosen], file["y"] if "y" in sizes else None)


def open_digits(part: str) -> ArrayReader:
    """Scikit-learn's 1797 handwritten digits, (N, 1, 8, 8) in [0, 1].

    part: `all`, `train` (1437) or `test` (the other 360, drawn once and for all).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeUnavailableError(
            "The digits come with scikit-learn, which is not installed; bnfold[digits] brings it."
        ) from error
    data = load_digits()
    x = (data.images[:, None] / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(x))
    parts = {"all": np.arange(len(x)), "train": order[360:], "test": order[:360]}
    if part not in parts:
        raise UsageError(f"The digits have no part {part!r}; write digits, digits:train or :test.")
    return ArrayReader("digits", x[parts[part]], data.target[parts[part]])


class FolderReader:
    """The images of a folder and its subfolders, in the order of their paths.

    An image is (H, W, C) bytes with C = `channels`, or, where that is None, 1 if the first image is
    grey and 3 if not. Of 16-bit grey images the upper byte is read. Where every image lies in a
    subfolder of its own class, `labels` number the subfolders in order (`classes`).
    """

    def __init__(self, folder: Path, channels: int | None) -> None:
        found = (p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
        self._paths = sorted(found, key=lambda path: path.relative_to(folder).parts)
        if not self._paths:
            raise InputError(f"{folder} holds no image ({', '.join(_SUFFIXES[:5])}, ...).")
        if channels not in (None, 1, 3, 4):
            raise InputError(
                f"{folder} holds images, which have 1, 3 or 4 channels; the network takes"
                f" {channels}."
            )
        self.name, self._folder, self._channels = folder.name, folder, channels
        self.skipped: dict[str, str] = {}
        parents = [path.relative_to(folder).parts[:-1] for path in self._paths]
        self.classes: tuple[str, ...] = ()
        self.labels: Labels | None = None
        if all(len(parent) == 1 for parent in parents):
            self.classes = tuple(sorted({parent[0] for parent in parents}))
            self.labels = np.array([self.classes.index(parent[0]) for parent in parents], np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, indices: NDArray[np.int64]) -> tuple[Samples, NDArray[np.int64]]:
        """See Reader."""
        images, kept = [], []
        for index in indices:
            image = self._image(self._paths[index])
            if image is not None:
                images.append(image)
                kept.append(index)
        return images, np.array(kept, dtype=np.int64)

    def _image(self, path: Path) -> Stored | None:
        from PIL import Image

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about odd metadata
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path, formats=_FORMATS) as image:
                    if self._channels is None:
                        self._channels = 1 if image.mode in ("1", "L", "LA", "I;16") else 3
                    return _pixels(image, self._channels)
        except Exception as error:  # decoders raise types of their own on broken files
            self.skipped[path.relative_to(self._folder).as_posix()] = (
                " ".join(str(error).split()) or type(error).__name__
            )
            return None


def _pixels(image: Any, channels: int) -> Stored:
    """(H, W, C) bytes of a Pillow image."""
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], channels, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels have {image.mode} type (32 bits), not bytes")
    pixels = np.asarray(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)
