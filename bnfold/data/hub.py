"""Data sets of Hugging Face `datasets`: from the hub by name, or saved by `save_to_disk`.

`hf:NAME[:split]` with a local folder reads that folder, and the network is not touched; any other
name is the hub's, and is loaded by the library. No data set's own code is ever run: the versions
that this extra asks for have no such thing any more. Images are decoded here (images.py), under the
same guards as those of a folder.
"""

from __future__ import annotations

import importlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfold.data.images import ImageReader
from bnfold.data.readers import ArrayReader, Reader, Rows, Stored
from bnfold.errors import InputError, RuntimeUnavailableError, UsageError, one_line

_IMAGES = ("image", "img", "pixel_values")
_LABELS = ("label", "labels")


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


def open_dataset(spec: str, channels: int | None) -> Reader:
    """The data set `NAME[:split]`; its images are the column image, img or pixel_values.

    Raises RuntimeUnavailableError without the library, UsageError where a split has to be chosen,
    InputError for what cannot be loaded or holds no images.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise RuntimeUnavailableError(
            "hf: is read by Hugging Face datasets, which is not installed; bnfold[hf] brings it."
        ) from error
    name, _, split = (spec, "", "") if Path(spec).exists() else spec.partition(":")
    path = Path(name).expanduser()
    try:
        data = _saved(datasets, path, split) if path.exists() else _hubs(datasets, name, split)
    except (UsageError, InputError):
        raise
    except Exception as error:  # the library, and the network behind it, raise many types
        raise InputError(
            f"The data set {name} cannot be loaded ({type(error).__name__}: {one_line(error)})."
        ) from error
    return _reader(datasets, data, path.name if path.exists() else name, channels, path.exists())


def _saved(datasets: Any, path: Path, split: str) -> Any:
    if not is_saved(path):
        raise InputError(
            f"{path} holds no data set as save_to_disk writes it; of other files, such as images in"
            " folders, give the path without hf:."
        )
    data = datasets.load_from_disk(str(path))
    if not isinstance(data, datasets.DatasetDict):
        if split:
            raise UsageError(f"{path} holds one data set, without splits; leave :{split} out.")
        return data
    return data[_split(list(data), split, str(path))]


def _hubs(datasets: Any, name: str, split: str) -> Any:
    splits = datasets.get_dataset_split_names(name)
    return datasets.load_dataset(name, split=_split(splits, split, name))


def _split(splits: list[str], wanted: str, name: str) -> str:
    if wanted in splits:
        return wanted
    if not wanted and len(splits) == 1:
        return splits[0]
    raise UsageError(
        f"{name} has the splits {', '.join(splits)}"
        + (f", and no {wanted!r}." if wanted else f"; write hf:{name}:{splits[-1]}, for example.")
    )


def _reader(datasets: Any, data: Any, name: str, channels: int | None, local: bool) -> Reader:
    features = data.features
    encoded = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    named = [key for key in _IMAGES if key in features]
    column = (*named, *(encoded if len(encoded) == 1 else ()), None)[0]
    if column is None:
        raise InputError(
            f"{name} has the columns {', '.join(features)}; images are looked for in"
            f" {', '.join(_IMAGES)}. Rename one, or give a factory."
        )
    labels = _labels(data)
    if column in encoded:
        images = data.cast_column(column, datasets.Image(decode=False))
        return _Images(name, images.select_columns([column]), channels, labels, local)
    if not len(data):
        raise InputError(f"{name} holds no sample.")
    rows = data.select_columns([column]).with_format("numpy")

    def read(indices: NDArray[np.int64]) -> Stored:
        try:
            return np.stack([np.asarray(row) for row in rows[indices.tolist()][column]])
        except ValueError as error:
            raise InputError(f"{name}: samples of {column} differ in shape: {error}.") from error

    first = read(np.zeros(1, np.int64))
    return ArrayReader(name, Rows((len(data), *first.shape[1:]), first.dtype, read), labels)


def _labels(data: Any) -> NDArray[np.int64] | None:
    """Integers of the column label or labels; None where there are none."""
    for column in _LABELS:
        if column in data.features:
            column_alone = data.select_columns([column])  # no image is decoded for its label
            values = np.asarray(column_alone.with_format("numpy")[:][column])
            if values.ndim == 1 and values.dtype.kind in "iu":
                return values.astype(np.int64)
    return None


class _Images(ImageReader):
    """A column of encoded images.

    A saved data set holds its images itself. A path in it could lead to any file here, and is not
    followed; those of the hub lead to what the library has just loaded.
    """

    def __init__(
        self,
        name: str,
        rows: Any,
        channels: int | None,
        labels: NDArray[np.int64] | None,
        local: bool,
    ) -> None:
        super().__init__(name, channels)
        self._rows, self._column, self._local = rows, rows.column_names[0], local
        self.labels = labels
        if not len(rows):
            raise InputError(f"{name} holds no image.")

    def __len__(self) -> int:
        return len(self._rows)

    def _file(self, index: int) -> BytesIO | Path:
        image = self._rows[index][self._column]
        if image is None:
            raise ValueError("there is no image")
        if image["bytes"] is not None:
            return BytesIO(image["bytes"])
        if self._local:
            raise ValueError("the data set holds the image's path only, not the image")
        return Path(image["path"])

    def _title(self, index: int) -> str:
        return f"sample {index}"
