"""Arrays as data: .npy, .npz and safetensors files, scikit-learn's digits. Read as they are stored.

A reader knows how many samples there are and gives any of them by index, so that files may be
larger than memory. Nothing is unpickled, and an archive is measured before it is unpacked. Images
in files of their own, one by one: images.py, tars.py, hub.py.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from bnfold.errors import InputError, RuntimeUnavailableError, UnsafeInputError, UsageError

Stored = NDArray[Any]
Samples = Sequence[Stored] | Stored  # of several shapes, or of one along the first axis
Labels = NDArray[np.int64]

_PIECE = 1 << 20  # bytes read at a time


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


@dataclass(frozen=True)
class Rows:
    """What looks like an array along its first axis, and is read when it is indexed."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[NDArray[np.int64]], Stored]

    def __getitem__(self, indices: NDArray[np.int64]) -> Stored:
        return self.read(indices)


class ArrayReader:
    """Samples along the first axis of an array, which may be mapped from a file."""

    def __init__(self, name: str, x: Stored | Rows, y: Stored | None = None) -> None:
        if len(x.shape) < 2 or not x.shape[0]:
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
            if y.shape != x.shape[:1] or y.dtype.kind not in "iu":
                raise InputError(
                    f"{name} has labels of shape {y.shape} and type {y.dtype}; expected"
                    f" {x.shape[0]} integers."
                )
            self.labels = y.astype(np.int64)

    def __len__(self) -> int:
        return self._x.shape[0]

    def read(self, indices: NDArray[np.int64]) -> tuple[Samples, NDArray[np.int64]]:
        """See Reader."""
        return np.asarray(self._x[indices]), indices


def open_array(path: Path, max_bytes: int) -> ArrayReader:
    """An .npy, .npz or .safetensors file: its array `x`, or the only one, and labels `y`.

    Samples are read as they are asked for; only a compressed .npz is unpacked into memory. Raises
    InputError; UnsafeInputError for pickled objects and for an archive that unpacks to more than
    `max_bytes`.
    """
    kind = "NumPy file"
    try:
        with path.open("rb") as file:
            magic = file.read(9)
        if magic[:6] == b"\x93NUMPY":
            return ArrayReader(path.name, np.load(path, mmap_mode="r", allow_pickle=False))
        if magic[:4] == b"PK\x03\x04":
            return _open_archive(path, max_bytes)
        if path.suffix.lower() == ".safetensors" or magic[8:] == b"{":
            kind = "safetensors file"
            return _open_safetensors(path)
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        what = " ".join(str(error).split()).rstrip(".")
        if "allow_pickle" in what or "Python objects" in what:
            raise UnsafeInputError(
                f"{path} holds pickled Python objects, which could run code; save a plain array."
            ) from error
        raise InputError(f"{path} cannot be read as a {kind}: {what}.") from error
    raise InputError(
        f"{path} is no data that bnfold reads: .npy, .npz, .safetensors, a webdataset's .tar, a"
        " folder of images, hf:NAME, or a factory (pkg.mod:factory, path.py:factory)."
    )


def _chosen(names: Sequence[str], path: Path) -> str:
    """The name of the images: `x`, or what is not `y`."""
    arrays = [name for name in names if name != "y"]
    if "x" not in names and len(arrays) != 1:
        listed = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
        raise InputError(
            f"{path} holds the arrays {listed or '(none)'}; name the images 'x' (and labels 'y'),"
            " or store one array only."
        )
    return "x" if "x" in names else arrays[0]


def _open_archive(path: Path, max_bytes: int) -> ArrayReader:
    """An .npz file. What lies in it uncompressed, as np.savez writes it, is mapped."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.filelist}
        chosen = _chosen(list(entries), path)
        needed = [entries[name] for name in (chosen, "y") if name in entries]
        packed = [entry for entry in needed if entry.compress_type != zipfile.ZIP_STORED]
        size = sum(entry.file_size for entry in packed)
        if size > max_bytes:
            raise UnsafeInputError(
                f"'{chosen}' in {path} unpacks to {size} bytes, more than the {max_bytes} that are"
                " allowed; save it by np.savez or as .npy, which are read piece by piece."
            )
        return ArrayReader(path.name, *(_member(path, archive, entry) for entry in needed))


def _member(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Stored:
    """An array of an .npz file: mapped where it lies uncompressed, its checksum found right."""
    if entry.compress_type != zipfile.ZIP_STORED:
        with archive.open(entry) as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    with archive.open(entry) as file:
        shape, by_column, dtype = _array_header(file)
        start = file.tell()
        while file.read(_PIECE):  # at the end zipfile compares the checksum
            pass
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if start + dtype.itemsize * math.prod(shape) != entry.file_size:
        raise ValueError(f"{entry.filename} holds {entry.file_size - start} bytes for {shape}")
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)  # the lengths of a name and of an extra field,
        lengths = np.frombuffer(file.read(4), "<u2")
    offset = entry.header_offset + 30 + int(lengths.sum()) + start  # both before the content
    order: Literal["F", "C"] = "F" if by_column else "C"
    return np.memmap(path, dtype, "r", offset, shape, order)


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and type: all that stands before an array's values."""
    if np.lib.format.read_magic(file) == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


_SAFETENSORS_TYPES = {"U8": np.uint8, "F16": np.float16, "F32": np.float32, "F64": np.float64}


def _open_safetensors(path: Path) -> ArrayReader:
    """A safetensors file, mapped by its own library."""
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="numpy")
        names = list(file.keys())
        chosen = _chosen(names, path)
        rows = file.get_slice(chosen)
        y = file.get_tensor("y") if "y" in names else None
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    kind = rows.get_dtype()
    if kind not in _SAFETENSORS_TYPES:
        raise InputError(
            f"'{chosen}' in {path} holds {kind}; images are bytes (U8) or floats (F16, F32, F64)."
        )

    def read(indices: NDArray[np.int64]) -> Stored:
        return np.concatenate([rows[i : i + 1] for i in indices.tolist()])

    x = Rows(tuple(rows.get_shape()), np.dtype(_SAFETENSORS_TYPES[kind]), read)
    return ArrayReader(path.name, x, y)


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
