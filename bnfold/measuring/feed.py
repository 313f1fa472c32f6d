"""What a network is fed: batches of any make, as its arguments, read as often as asked.

A batch is an array, a tuple or list whose first element is the input (labels behind it are
ignored), or a mapping of arguments by name. An iterator gives its batches once; they are kept, in
memory at first and on disk beyond a limit, so that a second pass sees them again.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfold.errors import BnfoldError, InputError, UsageError, one_line

Forward = Callable[[nn.Module, Any], Any]


class Passes:
    """The batches of one data set, made ready for a network, in as many passes as are asked for.

    Iterating gives each batch ready. Close it when done.
    images, batches: what was given, known after a pass.  left_out: images that were not.
    is_share: other processes have the rest of the data; this one's share may be empty.
    """

    def __init__(self, batches: Iterable[Any], max_bytes: int, is_share: bool) -> None:
        if isinstance(batches, Tensor | np.ndarray | str | Mapping) or not isinstance(
            batches, Iterable
        ):
            raise UsageError(
                f"batches is {describe(batches)}; give an iterable of batches, such as a list of"
                " arrays or a DataLoader."
            )
        self._given, self._is_share = Replay(batches, max_bytes), is_share
        self.images: int | None = None
        self.batches: int | None = None
        self.left_out = 0

    def __iter__(self) -> Iterator[Any]:
        """Each batch, ready for the network.

        Raises InputError for a batch that does not fit it, if there is no image, or if the number
        differs from the first pass.
        """
        images = count = 0
        for ready in self._all_ready():
            images, count = images + self._count(ready), count + 1
            yield ready
        if not images and self.images is None and not self._is_share:
            raise InputError(
                "The target data holds no image; nothing can be estimated from it."
                + (f" ({self.left_out} do not fill a batch of the model.)" if self.left_out else "")
            )
        if self.images not in (None, images):
            raise InputError(
                f"The target data gave {self.images} images on the first pass and {images} on"
                " another; give an iterable that starts anew each time, such as a list."
            )
        self.images, self.batches = images, count

    def close(self) -> None:
        """Remove what was kept on disk."""
        self._given.close()

    def _all_ready(self) -> Iterator[Any]:
        raise NotImplementedError

    def _count(self, ready: Any) -> int:
        raise NotImplementedError


class Feed(Passes):
    """For a torch module: on its device, floats in the type of its parameters."""

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        *,
        forward: Forward | None,
        max_bytes: int,
        is_share: bool = False,
    ) -> None:
        super().__init__(batches, max_bytes, is_share)
        self._forward = forward
        self._accepted = _argument_names(module)
        floats = [p for p in module.parameters() if p.is_floating_point()]
        self.device = floats[0].device if floats else torch.device("cpu")
        self.dtype = floats[0].dtype if floats else torch.float32

    def _all_ready(self) -> Iterator[Any]:
        for number, batch in enumerate(told(self._given)):
            yield self._ready(batch, number)

    def _count(self, ready: Any) -> int:
        return image_count(ready)

    def call(self, module: nn.Module, batch: Any, number: int) -> Any:
        """The module's output for one batch. Raises InputError for what the module raises."""
        try:
            if self._forward is not None:
                return self._forward(module, batch)
            return module(**batch) if isinstance(batch, dict) else module(batch)
        except (BnfoldError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's code may raise anything
            what = one_line(error)
            raise InputError(
                f"The network failed on batch {number} ({describe(batch)}) with"
                f" {type(error).__name__}: {what}."
            ) from error

    def _ready(self, batch: Any, number: int) -> Any:
        if self._forward is not None:
            return _mapped(batch, self._move)
        if isinstance(batch, Mapping):
            chosen = {
                name: value
                for name, value in batch.items()
                if self._accepted is None or name in self._accepted
            }
            if not chosen:
                raise InputError(
                    f"Batch {number} holds {', '.join(map(str, batch))}, but the network takes"
                    f" {', '.join(sorted(self._accepted or ()))}; name the entries so, or give"
                    " forward=."
                )
            return _mapped(chosen, self._input)
        first = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
        if not isinstance(first, Tensor | np.ndarray):
            raise InputError(
                f"Batch {number} is {describe(batch)}; a batch is an array, a tuple whose first"
                " element is one, or a mapping of arguments. For anything else give forward=."
            )
        return _mapped(first, self._input)

    def _move(self, array: Tensor) -> Tensor:
        return _own(array, array.detach().to(self.device))

    def _input(self, array: Tensor) -> Tensor:
        """On the network's device, floats in the type of its parameters."""
        floats = array.is_floating_point()
        return _own(array, array.detach().to(self.device, self.dtype if floats else array.dtype))


def _own(given: Tensor, array: Tensor) -> Tensor:
    """Memory that the data's own code does not write to, as loaders do that fill one buffer."""
    return array.clone() if array.data_ptr() == given.data_ptr() else array


class Replay(Iterable[Any]):
    """Batches that can be read again, an iterator's too: they are kept as they come.

    Beyond `max_bytes` they go to a temporary folder, until `close`.
    """

    def __init__(self, source: Iterable[Any], max_bytes: int) -> None:
        self._source = source
        self._once = source if isinstance(source, Iterator) else None
        self._kept: list[Any] = []
        self._free = max_bytes
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __iter__(self) -> Iterator[Any]:
        """The batches from the first on, whether or not an earlier pass was broken off."""
        if self._once is None:
            yield from self._source
            return
        for index in range(len(self._kept)):
            kept = self._kept[index]
            yield torch.load(kept, weights_only=True) if isinstance(kept, Path) else kept
        for batch in self._once:
            self._kept.append(self._keep(_mapped(batch, lambda array: array.clone())))
            yield batch

    def close(self) -> None:
        """Remove the temporary folder."""
        self._kept.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _keep(self, batch: Any) -> Any:
        self._free -= byte_count(batch)
        if self._free >= 0 or not _is_plain(batch):
            return batch
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="bnfold-")
        path = Path(self._folder.name) / f"{len(self._kept)}.pt"
        try:
            torch.save(batch, path)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"The target data is an iterator, and its batches cannot be kept in"
                f" {self._folder.name}: {error}. Give an iterable that can be read twice, or set"
                " TMPDIR to a larger disk."
            ) from error
        return path


def copied(batch: Any) -> Any:
    """The batch in memory of its own."""
    return _mapped(batch, torch.clone)


def describe(value: Any) -> str:
    """A batch in the words of an error message."""
    if isinstance(value, Tensor | np.ndarray):
        return f"shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return "a mapping of " + "; ".join(f"{k}: {describe(v)}" for k, v in value.items())
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"of type {type(value).__name__}"


def image_count(batch: Any) -> int:
    """The length of the first array in a batch; 1 where no array can be seen."""
    return next((len(array) for array in _arrays(batch) if array.dim()), 1)


def told(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, an exception of the code that makes them told in a sentence."""
    number = 0
    try:
        for batch in batches:
            number += 1
            yield batch
    except BnfoldError:
        raise
    except Exception as error:  # the user's code may raise anything
        what = one_line(error)
        raise InputError(
            f"The target data could not be read after {number} batches: {type(error).__name__}:"
            f" {what}."
        ) from error


def _argument_names(module: nn.Module) -> frozenset[str] | None:
    """The names that the module's forward takes; None where it takes any."""
    with contextlib.suppress(TypeError, ValueError):
        parameters = inspect.signature(module.forward).parameters.values()
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            return frozenset(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL)
    return None


def _mapped(batch: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """The batch with `f` of each array in it, numpy's arrays as tensors."""
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "fiub":
        return f(_from_numpy(batch))
    if isinstance(batch, Tensor):
        return f(batch)
    if isinstance(batch, Mapping):
        return {name: _mapped(value, f) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_mapped(value, f) for value in batch))
    if type(batch) in (tuple, list):
        return type(batch)(_mapped(value, f) for value in batch)
    return batch


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor of the array, copied where torch cannot share its memory."""
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        return torch.from_numpy(np.require(native, requirements=["C", "W"]))
    except TypeError as error:
        raise InputError(f"torch has no type for {array.dtype}: {error}") from error


def _arrays(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _arrays(value)


def byte_count(batch: Any) -> int:
    """The memory that a batch's arrays take."""
    return sum(array.numel() * array.element_size() for array in _arrays(batch))


def _is_plain(batch: Any) -> bool:
    """Whether torch reads the saved batch back without running code."""
    if type(batch) in (tuple, list):
        return all(map(_is_plain, batch))
    if type(batch) is dict:
        return all(isinstance(k, str) and _is_plain(v) for k, v in batch.items())
    return type(batch) in (Tensor, str, int, float, bool, type(None))
