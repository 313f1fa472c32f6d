"""Encoded images, one file each: decoded by Pillow, those that cannot be read left out by name.

What a file holds is not trusted: only formats that Pillow decodes itself, no decompression bombs,
and whatever a decoder raises is the reason why that image is left out. Pixels come as they are
stored, as torchvision's ImageFolder gives them: an orientation in the metadata is not applied, of
an animation the first frame is read, transparency is dropped.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfold.data.readers import Labels, Samples, Stored
from bnfold.errors import InputError, one_line

# Pillow's own names; formats that call other programs (EPS) or render (PDF, WMF) are not among them
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
_GREY = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N")


class ImageReader(ABC):
    """A Reader of encoded images.

    An image is (H, W, C) bytes with C = `channels`, or, where that is None, 1 if the first image
    that can be opened is grey and 3 if not. 16-bit grey images are read as the nearest bytes.
    """

    def __init__(self, name: str, channels: int | None) -> None:
        if channels not in (None, 1, 3, 4):
            raise InputError(
                f"{name} holds images, which have 1, 3 or 4 channels; the network takes {channels}."
            )
        self.name, self._channels = name, channels
        self.labels: Labels | None = None
        self.skipped: dict[str, str] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _file(self, index: int) -> Path | BytesIO:
        """Where the encoded image lies, or its bytes."""

    @abstractmethod
    def _title(self, index: int) -> str:
        """What it is called where it is left out."""

    def read(self, indices: NDArray[np.int64]) -> tuple[Samples, NDArray[np.int64]]:
        """See Reader."""
        if self._channels is None:
            self._channels = self._channels_of_the_first()
        images, kept = [], []
        for index in indices.tolist():
            try:
                with opened(self._file(index)) as image:
                    images.append(pixels_of(image, self._channels))
                kept.append(index)
            except Exception as error:  # decoders raise types of their own on broken files
                what = one_line(error)
                self.skipped[self._title(index)] = what
        return images, np.array(kept, dtype=np.int64)

    def _channels_of_the_first(self) -> int:
        """Of the first that can be opened, whatever is read first: the same in each process."""
        for index in range(len(self)):
            with contextlib.suppress(Exception), opened(self._file(index)) as image:
                return 1 if image.mode in _GREY else 3
        return 3


@contextlib.contextmanager
def opened(file: Path | BytesIO) -> Iterator[Any]:
    """A Pillow image, its pixels not decoded yet. Raises whatever its decoder raises."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=_FORMATS) as image:
            yield image


def pixels_of(image: Any, channels: int) -> Stored:
    """(H, W, C) bytes of a Pillow image."""
    if image.mode.startswith("I;16"):
        grey = np.rint(np.asarray(image).astype(np.uint16) / 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], channels, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels have {image.mode} type (32 bits), not bytes")
    pixels = np.asarray(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


class FolderReader(ImageReader):
    """The images of a folder and its subfolders, in the order of their paths, told by their suffix.

    Where every image lies in a subfolder of its own class, `labels` number the subfolders in order
    (`classes`). Links to folders are followed, each folder once.
    """

    def __init__(self, folder: Path, channels: int | None) -> None:
        super().__init__(folder.name, channels)
        self._folder = folder
        found = (path for path in self._walk() if path.suffix.lower() in SUFFIXES)
        self._paths = sorted(found, key=lambda path: path.relative_to(folder).parts)
        if not self._paths:
            raise InputError(f"{folder} holds no image ({', '.join(SUFFIXES[:5])}, ...).")
        parents = [path.relative_to(folder).parts[:-1] for path in self._paths]
        self.classes: tuple[str, ...] = ()
        if all(len(parent) == 1 for parent in parents):
            self.classes = tuple(sorted({parent[0] for parent in parents}))
            number = {name: index for index, name in enumerate(self.classes)}
            self.labels = np.array([number[parent[0]] for parent in parents], np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def _file(self, index: int) -> Path:
        return self._paths[index]

    def _title(self, index: int) -> str:
        return self._paths[index].relative_to(self._folder).as_posix()

    def _walk(self) -> Iterator[Path]:
        """All files. A folder that cannot be listed is told as skipped."""
        seen: set[tuple[int, int]] = set()

        def unlisted(error: OSError) -> None:
            self.skipped[str(error.filename)] = f"{error.strerror or error} (a folder)"

        for root, folders, files in os.walk(self._folder, onerror=unlisted, followlinks=True):
            here = Path(root).stat()
            if (here.st_dev, here.st_ino) in seen:
                folders.clear()  # a link back, which would have no end
                continue
            seen.add((here.st_dev, here.st_ino))
            folders.sort()
            yield from (path for name in files if (path := Path(root, name)).is_file())
