"""Data as users name it, turned into batches of network inputs.

A folder of images, a file of arrays, webdataset tars, a Hugging Face data set, a factory or
`digits` becomes `Batches`: float32 arrays (N, C, H, W), the same in each pass. How a stored image
becomes an input is said once, in `Preparation`: its layout, its scale, its size, mean and std.
Shifts for experiments: `SHIFTS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfold.data.corruptions import CORRUPTIONS as CORRUPTIONS
from bnfold.data.corruptions import corrupted as corrupted
from bnfold.data.hub import is_saved, open_dataset
from bnfold.data.images import FolderReader
from bnfold.data.labelled import LabelledSamples as LabelledSamples
from bnfold.data.readers import (
    Labels,
    Reader,
    Samples,
    Stored,
    open_array,
    open_digits,
)
from bnfold.data.sets import SETS, open_set
from bnfold.data.shifts import SHIFTS as SHIFTS
from bnfold.data.shifts import shifted as shifted
from bnfold.data.tars import TarReader
from bnfold.errors import BnfoldError, InputError, UsageError, one_line

Inputs = NDArray[np.float32]
Preprocess = Callable[[Any], Any]
Shape = Sequence[int | str | None]

MAX_ARCHIVE_BYTES = 4 << 30  # what an .npz may unpack to
_AT_ONCE = 8  # images decoded before they are resized
_NO_INDEX = np.zeros(0, np.int64)


def open_data(
    spec: str | Path,
    *,
    batch_size: int = 64,
    samples: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    preprocess: Preprocess | str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: int | Sequence[int] | None = None,
    input_scale: float | None = None,
    input_shape: Shape | None = None,
    max_bytes: int = MAX_ARCHIVE_BYTES,
    download: bool = False,
) -> Batches:
    """The data that `spec` names, as batches.

    spec: a folder of images; an .npy, .npz or .safetensors file (array `x`, or the only one, labels
    `y`); webdataset tars, `data.tar` or `data-{000..009}.tar`; a Hugging Face data set,
    `hf:NAME[:split]` from the hub or `hf:FOLDER[:split]` as save_to_disk wrote it; `digits`,
    `digits:train`, `digits:test`; `mnist:DIR`, `usps:DIR`, `cifar10:DIR` and their like (sets.py),
    with `:train` or `:test` behind, through torchvision; `pkg.mod:factory` or `path.py:factory`,
    called without arguments for each pass and giving any iterable of batches.
    samples: use so many, drawn by `seed` (the first ones without `shuffle`). The order is drawn
    once and is the same in each pass.
    Stored images are bytes (N, H, W), (N, H, W, C) or (N, C, H, W), or floats (N, C, H, W); floats
    of other ranks pass as they are. They are multiplied by `input_scale` (1/255 for bytes, else 1),
    resized to `resize` (one number: a square) bilinearly, antialiased when they shrink, then
    (x - mean) / std per channel.
    preprocess: a function, or `path.py:function`, from one stored image to one input (for a
    factory: from batch to batch), instead of all that.
    input_shape: what the network takes, (N, C, H, W) with None or a name where anything goes: it
    decides what a channel axis is, and is checked.
    max_bytes: the most that a compressed .npz file may unpack to. download: torchvision may fetch
    a data set that the folder lacks.

    Raises UsageError for arguments that contradict each other, InputError for data that cannot be
    read or does not fit, UnsafeInputError for pickles and zip bombs, RuntimeUnavailableError when
    the library for a format is missing.
    """
    _check_numbers(batch_size, samples)
    if isinstance(preprocess, str):
        preprocess = _resolve(preprocess)
    options = {"mean": mean, "std": std, "resize": resize, "input_scale": input_scale}
    given = [name for name, value in options.items() if value is not None]
    path, text = Path(spec).expanduser(), str(spec)
    named = text.partition(":")[0] in ("digits", "hf", *SETS)
    is_factory = ":" in text and not named and not path.exists()
    if given and (preprocess is not None or is_factory):
        why = f"{text} is a factory" if is_factory else "preprocess makes the whole input"
        raise UsageError(f"{' and '.join(given)} cannot be given as well: {why}.")
    if is_factory:
        return FactoryBatches(text, _resolve(text), preprocess, samples)
    prepare = Preparation.of(mean, std, resize, input_scale, input_shape, preprocess)
    reader = _reader(text, path, prepare.channels, max_bytes, download)
    count = len(reader) if samples is None else min(samples, len(reader))
    order = np.arange(len(reader))
    if shuffle:
        order = np.random.default_rng(seed).permutation(len(reader))
    starts = range(0, count, batch_size)
    return ImageBatches(reader, prepare, [order[:count][i : i + batch_size] for i in starts])


def _reader(text: str, path: Path, channels: int | None, max_bytes: int, download: bool) -> Reader:
    head, _, rest = text.partition(":")
    if head == "digits" and not path.exists():
        return open_digits(rest or "all")
    if head == "hf" and rest and not path.exists():
        return open_dataset(rest, channels)
    if head in SETS and not path.exists():
        return open_set(head, rest, download=download)
    if path.is_dir():
        return open_dataset(text, channels) if is_saved(path) else FolderReader(path, channels)
    if path.suffix == ".tar":
        return TarReader(text, channels)
    if path.is_file():
        return open_array(path, max_bytes)
    from bnfold.reading.sniff import did_you_mean_file

    raise InputError(f"{path} does not exist{did_you_mean_file(path)}")


def _check_numbers(batch_size: int, samples: int | None) -> None:
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be at least 1.")
    if samples is not None and samples < 1:
        raise UsageError(f"samples is {samples}; it must be at least 1.")


def _resolve(spec: str) -> Callable[..., Any]:
    from bnfold.reading.factory import resolve_factory

    return resolve_factory(spec)


# --- batches --------------------------------------------------------------------------------------


class ImageBatches:
    """Samples of a reader, prepared, `batch_size` at a time; the same in each pass.

    An image that cannot be read is left out of its batch when its turn comes: `images`, `labels`
    and `skipped` are right after a pass.
    """

    def __init__(
        self, reader: Reader, prepare: Preparation, parts: Sequence[NDArray[np.int64]]
    ) -> None:
        self._reader, self._prepare, self._parts = reader, prepare, list(parts)
        self._is_shard = False

    @property
    def name(self) -> str:
        """What errors call it."""
        return self._reader.name

    @property
    def images(self) -> int:
        """How many there are."""
        return sum(map(len, self._parts))

    @property
    def labels(self) -> Labels | None:
        """(images,) in the order of the batches; None where there are none."""
        labels = self._reader.labels
        return None if labels is None else labels[self.order]

    @property
    def order(self) -> NDArray[np.int64]:
        """(images,) which of the reader's samples these are."""
        return np.concatenate([_NO_INDEX, *self._parts])

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; none where there are but numbers."""
        return getattr(self._reader, "classes", ())

    @property
    def skipped(self) -> Mapping[str, str]:
        """Unreadable images and the reasons."""
        return self._reader.skipped

    def shard(self, rank: int, size: int) -> ImageBatches:
        """The batches `rank`, `rank + size`, ...; there may be none. See `shard`."""
        made = ImageBatches(self._reader, self._prepare, self._parts[rank::size])
        made._is_shard = True
        return made

    def __len__(self) -> int:
        return sum(1 for part in self._parts if len(part))

    def __iter__(self) -> Iterator[Inputs]:
        """Float32 arrays. Raises InputError for what does not fit, or if nothing can be read."""
        for number, part in enumerate(self._parts):
            ready, self._parts[number] = self.read(part)
            if ready is not None:
                yield ready
        if not self.images and not self._is_shard:
            first, reason = next(iter(self.skipped.items()))
            raise InputError(
                f"None of the {len(self.skipped)} images in {self.name} can be read;"
                f" {first}: {reason}."
            )

    def read(self, part: NDArray[np.int64]) -> tuple[Inputs | None, NDArray[np.int64]]:
        """The inputs of some of the reader's samples, and which of them could be read.

        Where they become smaller on the way, a few at a time: 64 photographs would take gigabytes.
        """
        step = _AT_ONCE if self._prepare.changes_size else max(len(part), 1)
        made, read = [], [_NO_INDEX]
        for start in range(0, len(part), step):
            stored, kept = self._reader.read(part[start : start + step])
            if len(kept):
                made.append(self._prepare(stored, self.name))
                _check_finite(made[-1], kept, self.name)
                read.append(kept)
        if not made:
            return None, _NO_INDEX
        return _joined(made, self.name), np.concatenate(read)


def _joined(parts: list[Inputs], name: str) -> Inputs:
    if len(parts) == 1:
        return parts[0]
    shapes = sorted({part.shape[1:] for part in parts})
    if len(shapes) > 1:
        raise InputError(
            f"{name}: preprocess returned different shapes, such as {shapes[0]} and {shapes[-1]};"
            " a batch needs one."
        )
    return np.concatenate(parts)


class FactoryBatches:
    """Batches as a user's factory gives them, called anew for each pass.

    `images` is None until a pass has counted them; labels stay inside the batches.
    """

    def __init__(
        self,
        name: str,
        factory: Callable[[], Any],
        preprocess: Preprocess | None,
        samples: int | None,
    ) -> None:
        self.name = name
        self.images: int | None = None
        self.labels: Labels | None = None
        self.skipped: Mapping[str, str] = {}
        self._factory, self._preprocess, self._samples = factory, preprocess, samples

    def __iter__(self) -> Iterator[Any]:
        """The factory's batches, the last one cut where `samples` are reached."""
        made = self._factory()
        is_batch = not isinstance(made, list) and _length(made) is not None
        if is_batch or isinstance(made, str) or not isinstance(made, Iterable):
            what = f"an array of shape {made.shape}" if hasattr(made, "shape") else type(made)
            raise UsageError(
                f"{self.name} returned {what}; it must return an iterable of batches, such as a"
                " list of arrays or a DataLoader."
            )
        left, images = self._samples, 0
        for batch in made:
            size = _length(batch) or 0
            if left is not None:
                if left <= 0:
                    break
                batch = _head(batch, left) if size > left else batch
                size = min(size, left)
                left -= size
            images += size
            yield batch if self._preprocess is None else _called(self._preprocess, batch)
        self.images = images


Batches = ImageBatches | FactoryBatches


# --- shards ---------------------------------------------------------------------------------------


def shard(batches: Iterable[Any], rank: int, size: int) -> Iterable[Any]:
    """The batches `rank`, `rank + size`, ...: the part of one of `size` processes.

    Of `ImageBatches` only that part is read, and it knows its own length, images, labels and
    skipped. Any other iterable is read whole in each process, and the batches of the others are
    dropped; each must find the same ones in the same order. An iterator stays one, and gives its
    part once. A part may hold no batch.
    """
    if size == 1:
        return batches
    if isinstance(batches, ImageBatches):
        return batches.shard(rank, size)
    if isinstance(batches, Iterator):
        return itertools.islice(batches, rank, None, size)
    return Shard(batches, rank, size)


class Shard:
    """Every `size`-th batch of an iterable, from the one numbered `rank` on; see `shard`."""

    def __init__(self, batches: Iterable[Any], rank: int, size: int) -> None:
        self._batches, self._rank, self._size = batches, rank, size

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._batches), self._rank, None, self._size)

    def __getattr__(self, name: str) -> Any:
        """What the whole says of itself, such as its name."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._batches, name)


def _length(batch: Any) -> int | None:
    """The length of the first array in a batch; None without one."""
    if hasattr(batch, "shape") and hasattr(batch, "dtype"):
        return int(batch.shape[0]) if len(batch.shape) else None
    values: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, tuple | list):
        values = batch
    return next((n for n in map(_length, values) if n is not None), None)


def _head(batch: Any, count: int) -> Any:
    """The first samples of a batch, in each of its arrays."""
    if isinstance(batch, Mapping):
        return {name: _head(value, count) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_head(value, count) for value in batch)
    return batch[:count] if hasattr(batch, "shape") and len(batch.shape) else batch


def _called(function: Preprocess, value: Any) -> Any:
    try:
        return function(value)
    except BnfoldError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise InputError(
            f"preprocess failed with {type(error).__name__}: {one_line(error)}."
        ) from error


def _check_finite(inputs: Inputs, indices: NDArray[np.int64], name: str) -> None:
    finite = np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1)
    if not finite.all():
        raise InputError(
            f"Sample {int(indices[~finite][0])} of {name} holds NaN or infinity; leave it out."
        )


# --- from a stored image to an input --------------------------------------------------------------


@dataclass(frozen=True)
class Preparation:
    """How stored images become inputs.

    shape: of one input, None where anything goes; None altogether if it is not known.
    """

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: tuple[int, int] | None
    scale: float | None
    shape: tuple[int | None, ...] | None
    preprocess: Preprocess | None

    @classmethod
    def of(
        cls,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        resize: int | Sequence[int] | None,
        scale: float | None,
        input_shape: Shape | None,
        preprocess: Preprocess | None,
    ) -> Preparation:
        """Checked. Raises UsageError for numbers that make no sense, or contradict each other."""
        shape = None
        if input_shape is not None:
            shape = tuple(n if isinstance(n, int) else None for n in input_shape[1:])
        if std is not None and not all(value > 0 for value in std):
            raise UsageError(f"std is {_listed(std)}; every value must be above 0.")
        if (
            mean is not None
            and std is not None
            and len(mean) != len(std)
            and 1
            not in (
                len(mean),
                len(std),
            )
        ):
            raise UsageError(f"mean has {len(mean)} values and std {len(std)}.")
        if scale is not None and not (np.isfinite(scale) and scale > 0):
            raise UsageError(f"input_scale is {scale}; it must be above 0.")
        made = cls(
            None if mean is None else tuple(mean),
            None if std is None else tuple(std),
            None if resize is None else _size(resize),
            scale,
            shape,
            preprocess,
        )
        for name, values in (("mean", made.mean), ("std", made.std)):
            if values is not None and len(values) not in (1, made.channels or len(values)):
                raise UsageError(
                    f"{name} has {len(values)} values, and the network takes {made.channels}"
                    " channels."
                )
        return made

    @property
    def changes_size(self) -> bool:
        """Whether an input may be smaller than its image."""
        return self.size is not None or self.preprocess is not None

    @property
    def channels(self) -> int | None:
        """Of an input; None if it is not known."""
        if self.shape is not None and len(self.shape) == 3 and self.shape[0] is not None:
            return self.shape[0]
        lengths = {len(values) for values in (self.mean, self.std) if values} - {1}
        return lengths.pop() if lengths else None

    def __call__(self, stored: Samples, name: str) -> Inputs:
        """Float32 (N, ...). Raises InputError where shapes do not fit, with both."""
        if self.preprocess is not None:
            inputs = [np.asarray(_called(self.preprocess, image)) for image in stored]
            made = _stacked(inputs, name, "preprocess returned").astype(np.float32)
            return self._checked(made, name)
        if isinstance(stored, np.ndarray):
            return self._prepared(stored, name)
        if self.size is not None:
            return np.concatenate([self._prepared(image[None], name) for image in stored])
        return self._prepared(_stacked(stored, name, "found images of"), name)

    def _prepared(self, stored: Stored, name: str) -> Inputs:
        x = self._channels_first(stored, name).astype(np.float32)
        scale = self.scale if self.scale is not None else 1 / 255 if stored.dtype == np.uint8 else 1
        if scale != 1:
            x *= np.float32(scale)
        if self.size is not None:
            if x.ndim != 4:
                raise UsageError(f"resize takes images; {name} holds samples of {x.shape[1:]}.")
            x = resized(x, self.size)
        x = self._checked(x, name)
        for values, apply in ((self.mean, np.subtract), (self.std, np.divide)):
            if values is not None:
                apply(x, self._per_channel(values, x, name), out=x)
        return x

    def _per_channel(self, values: tuple[float, ...], x: Inputs, name: str) -> Inputs:
        if len(values) not in (1, x.shape[1]):
            raise InputError(
                f"{name} has {x.shape[1]} channels; mean and std have {len(values)} values."
            )
        return np.array(values, np.float32).reshape(-1, *[1] * (x.ndim - 2))

    def _channels_first(self, x: Stored, name: str) -> Stored:
        """(N, C, H, W) of images, whatever the layout; other samples as they are."""
        expects_images = self.shape is None or len(self.shape) == 3
        if x.ndim == 3 and (x.dtype == np.uint8 or self.shape is not None) and expects_images:
            return x[:, None]
        if x.ndim != 4 or not self._channels_are_last(x, name):
            return x
        if x.shape[3] == 4 and self.channels in (None, 3):
            x = x[..., :3]  # transparency is left out
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))

    def _channels_are_last(self, x: Stored, name: str) -> bool:
        """Decided by the network's shape where it is known, else by the usual numbers."""
        first, last, bytes_ = x.shape[1], x.shape[3], x.dtype == np.uint8
        if self.channels is not None:
            takes = {self.channels, 4} if self.channels == 3 and bytes_ else {self.channels}
            if first == self.channels and last in takes:  # (N, 3, 3, 3): floats lie channels first
                return bytes_
            return first != self.channels and last in takes
        if not bytes_:
            return False
        if first in (1, 3) and last in (1, 3, 4):
            raise InputError(
                f"{name} holds bytes of shape {x.shape}: it cannot be told whether the channels"
                " come first or last. Give input_shape."
            )
        return last in (1, 3, 4)

    def _checked(self, x: Inputs, name: str) -> Inputs:
        shape = self.shape
        if shape is None:
            return x
        found = x.shape[1:]
        if len(found) == len(shape) and all(
            n in (None, m) for n, m in zip(shape, found, strict=True)
        ):
            return x
        hint = ""
        if len(found) == len(shape) == 3 and found[1:] != shape[1:] and found[0] == shape[0]:
            hint = " Give resize."
        raise InputError(
            f"{name} gives inputs of shape ({', '.join(map(str, found))}), but the network takes"
            f" ({', '.join('any' if n is None else str(n) for n in shape)}).{hint}"
        )


def _stacked(images: Sequence[Stored], name: str, what: str) -> Stored:
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        raise InputError(
            f"{name}: {what} different shapes, such as {shapes[0]} and {shapes[-1]}; a batch needs"
            " one. Give resize."
        )
    stacked = np.stack(images)
    if stacked.dtype.kind not in "fiub":
        raise InputError(f"{name}: {what} type {stacked.dtype}, which is no number.")
    return stacked


def _size(resize: int | Sequence[int]) -> tuple[int, int]:
    sizes = (resize,) if isinstance(resize, int) else tuple(resize)
    if len(sizes) not in (1, 2) or not all(n > 0 for n in sizes):
        raise UsageError(f"resize is {_listed(sizes)}; give one size, or height and width.")
    return sizes[0], sizes[-1]


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def resized(x: Inputs, size: tuple[int, int]) -> Inputs:
    """Images (N, C, H, W) at another size: bilinear, antialiased when they shrink, as Pillow does.

    Without shrinking it is torch's `interpolate(mode="bilinear", align_corners=False)`.
    """
    for axis, length in ((2, size[0]), (3, size[1])):
        if x.shape[axis] != length:
            weights = _bilinear(x.shape[axis], length)
            x = np.moveaxis(np.moveaxis(x, axis, -1) @ weights.T, -1, axis)
    return np.ascontiguousarray(x)


def _bilinear(source: int, target: int) -> Inputs:
    """(target, source): a triangle about each target pixel's centre, wider when shrinking."""
    step = source / target
    reach = max(step, 1.0)
    centres = (np.arange(target) + 0.5) * step
    distances = np.abs(np.arange(source) + 0.5 - centres[:, None])
    weights = np.maximum(0, 1 - distances / reach)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32)
