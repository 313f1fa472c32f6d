"""Webdataset tars: image and label of a sample are neighbours with the same name, `7.jpg`, `7.cls`.

The tars are indexed once, by their headers; then any sample is read where it lies, so that order,
seed, samples and shards work as they do for a folder. Which files make a sample is for the library
`webdataset` to say. Nothing is unpacked to disk, no pickle in a tar is opened, and only local files
are read: the library would run what stands behind `pipe:`.
"""

from __future__ import annotations

import importlib
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from bnfold.data.images import SUFFIXES, ImageReader
from bnfold.data.readers import Labels
from bnfold.errors import InputError, RuntimeUnavailableError, one_line

_LABEL_BYTES = 64  # a number needs no more


class TarReader(ImageReader):
    """The samples of webdataset tars, in the order of the tars and of their places within.

    Samples without an image are passed over. `labels` are there where each sample has an integer
    in its `.cls`.
    """

    def __init__(self, spec: str, channels: int | None) -> None:
        super().__init__(Path(spec).name, channels)
        samples = list(_samples(spec))
        if not samples:
            raise InputError(
                f"{spec} holds no sample with an image ({', '.join(SUFFIXES[:5])}, ...)."
            )
        self._samples = [(tar, key, place) for tar, key, place, _ in samples]
        classes = [label for *_, label in samples]
        if None not in classes:
            self.labels: Labels | None = np.array(classes, np.int64)

    def __len__(self) -> int:
        return len(self._samples)

    def _file(self, index: int) -> BytesIO:
        tar, _, place = self._samples[index]
        with tar.open("rb") as file:
            return BytesIO(_content(file, place))

    def _title(self, index: int) -> str:
        tar, key, _ = self._samples[index]
        return f"{tar.name}/{key}"


def _samples(spec: str) -> Iterator[tuple[Path, str, tarfile.TarInfo, int | None]]:
    """Tar, key, place of the image and class of each sample with an image."""
    braceexpand, group_by_keys = _library()
    for name in braceexpand(spec):
        path = Path(name).expanduser()
        try:
            with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                members = (
                    {"fname": member.name, "data": member, "__url__": name}
                    for member in tar
                    if member.isreg()
                )
                for sample in group_by_keys(members):
                    place = _image_of(sample, path)
                    if place is not None:
                        yield path, sample["__key__"], place, _class_of(sample, file)
        except (OSError, ValueError, tarfile.TarError) as error:
            # an OSError's first argument is its number; webdataset adds arguments of its own
            told = getattr(error, "strerror", None) or (error.args[0] if error.args else error)
            what = one_line(told)
            raise InputError(
                f"{path} cannot be read as a tar: {what}. It must lie here, uncompressed."
            ) from error


def _library() -> tuple[Any, Any]:
    try:
        shards = importlib.import_module("braceexpand")
        tars = importlib.import_module("webdataset.tariterators")
    except ImportError as error:
        raise RuntimeUnavailableError(
            "What a tar's samples are is for webdataset to say, which is not installed;"
            " bnfold[webdataset] brings it."
        ) from error
    return shards.braceexpand, tars.group_by_keys


def _image_of(sample: dict[str, Any], path: Path) -> tarfile.TarInfo | None:
    images = [key for key in sample if f".{key.rpartition('.')[2]}" in SUFFIXES]
    if len(images) > 1:
        raise InputError(
            f"The sample {sample['__key__']} in {path} holds several images ({', '.join(images)});"
            " bnfold reads one per sample. Give a factory instead."
        )
    return sample[images[0]] if images else None


def _class_of(sample: dict[str, Any], file: Any) -> int | None:
    place = sample.get("cls")
    if place is None or place.size > _LABEL_BYTES:
        return None
    text = _content(file, place).strip()
    return int(text) if text.isdigit() else None


def _content(file: Any, place: tarfile.TarInfo) -> bytes:
    file.seek(place.offset_data)
    content: bytes = file.read(place.size)
    return content
