"""What an ONNX graph is fed: batches of any make as arrays by input name, as often as asked.

A batch is what `feed` takes: an array, a tuple or list whose first element is the input, a mapping
by name. A graph knows more of its inputs than a module does: their types, to which numbers are
cast, and sometimes the number of images, to which the batches are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from bnfold import graph
from bnfold.errors import InputError
from bnfold.measuring.feed import Passes, describe, told
from bnfold.measuring.shelf import AnyArray

Arrays = dict[str, AnyArray]


class ArrayFeed(Passes):
    """For an ONNX graph: arrays by input name, in the inputs' types.

    A graph with a fixed number of images gets just so many at a time, wherever the batches end;
    what does not fill the last one is left out.
    """

    def __init__(
        self,
        model: ir.Model,
        batches: Iterable[Any],
        *,
        max_bytes: int,
        is_share: bool = False,
    ) -> None:
        super().__init__(batches, max_bytes, is_share)
        self._inputs = graph.graph_inputs(model)
        self.size = _fixed_size(self._inputs)

    def _count(self, ready: Arrays) -> int:
        return image_count(ready)

    # one batch

    def _ready(self, batch: Any, number: int) -> Arrays:
        if isinstance(batch, Mapping):
            given = {name: batch[name] for name in self._inputs if name in batch}
        else:
            first = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
            given = {next(iter(self._inputs)): first} if len(self._inputs) == 1 else {}
        if len(given) < len(self._inputs):
            raise InputError(
                f"Batch {number} is {describe(batch)}, but the graph takes"
                f" {', '.join(self._inputs)}; give mappings with these names."
            )
        return {name: self._input(name, value, number) for name, value in given.items()}

    def _input(self, name: str, value: Any, number: int) -> AnyArray:
        """In the type of the input. Raises InputError where type or shape do not fit."""
        if isinstance(value, Tensor):
            value = _from_torch(value)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            raise InputError(
                f"Batch {number} holds {describe(value)} for '{name}'; a batch is an array of"
                " numbers, a tuple whose first element is one, or a mapping by input name."
            )
        declared = self._inputs[name]
        if declared.shape is not None and not _fits(value.shape, declared.shape):
            extents = ", ".join(str(n) for n in declared.shape)
            raise InputError(
                f"Batch {number} has {describe(value)} for '{name}', which takes ({extents})."
            )
        if declared.dtype is None:
            return np.array(value)
        return _cast(value, declared.dtype, f"Batch {number} for '{name}'")

    # a fixed number of images

    def _all_ready(self) -> Iterator[Arrays]:
        """Batches of the size that the graph takes."""
        rest: Arrays = {}
        for number, batch in enumerate(told(self._given)):
            arrays = self._ready(batch, number)
            if self.size is None or (not rest and image_count(arrays) == self.size):
                yield arrays
                continue
            rest = _joined(rest, arrays)
            while image_count(rest) >= self.size:
                yield {name: array[: self.size] for name, array in rest.items()}
                rest = {name: array[self.size :] for name, array in rest.items()}
        self.left_out = image_count(rest)


def _fixed_size(inputs: Mapping[str, ir.Value]) -> int | None:
    """The number of images that all inputs of a graph declare, if they do."""
    sizes = {
        value.shape[0] if value.shape is not None and len(value.shape) else None
        for value in inputs.values()
    }
    size = sizes.pop() if len(sizes) == 1 else None
    return size if isinstance(size, int) else None


def _fits(shape: tuple[int, ...], declared: ir.Shape) -> bool:
    """Whether the ranks agree, and every extent that is declared but the first."""
    extents = zip(shape[1:], list(declared)[1:], strict=False)
    return len(shape) == len(declared) and all(n == d for n, d in extents if isinstance(d, int))


def image_count(arrays: Mapping[str, AnyArray]) -> int:
    """The number of images: the first extent of the first array that has one."""
    return next((len(array) for array in arrays.values() if array.ndim), 0 if not arrays else 1)


def _joined(rest: Arrays, arrays: Arrays) -> Arrays:
    if not rest:
        return arrays
    return {name: np.concatenate([rest[name], array]) for name, array in arrays.items()}


def _from_torch(tensor: Tensor) -> AnyArray:
    tensor = tensor.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:  # bfloat16
        return tensor.float().numpy()


def _cast(array: AnyArray, dtype: ir.DataType, what: str) -> AnyArray:
    """Numbers as floats of the input's type, integers as integers that hold them."""
    wanted = dtype.numpy()
    if dtype.is_floating_point() or array.dtype == wanted:
        with np.errstate(over="ignore"):  # infinity is found, and told, where it is measured
            return np.array(array, dtype=wanted, order="C")  # some loaders fill one buffer
    if array.dtype.kind in "iu" and wanted.kind in "iu":
        limits = np.iinfo(wanted)
        if not array.size or (array.min() >= limits.min and array.max() <= limits.max):
            return np.array(array, dtype=wanted, order="C")  # some loaders fill one buffer
    raise InputError(f"{what} holds {array.dtype}, but the graph takes {wanted}; convert it.")
