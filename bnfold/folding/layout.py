"""How a per-channel array follows a tensor through operators that only move elements.

An array here broadcasts against a tensor (size 1 along the axes along which it is constant). Each
function answers with the array that broadcasts against the tensor on the operator's other side, or
None where no such array exists: the channels were mixed, or an extent that matters is not known.
NaN stands for "not known yet" and travels like any other number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bnfold.folding.affine import Array, canonical

Dim = int | str | None  # a known extent, a symbol, or nothing known
Shape = Sequence[Dim]


def reshape(array: Array, before: Shape, after: Shape) -> Array | None:
    """The array behind a Reshape from shape `before` to shape `after` (row-major, as ONNX has it).

    Axes are matched in groups of equal extent; inside a group the array is spread out and reshaped.
    A group of unknown extents can be passed only where the array is constant along it.
    """
    groups = _matching_axes(before, after)
    if groups is None:
        return array.reshape((1,) * len(after)) if array.size == 1 else None
    spread, result = [1] * len(before), [1] * len(after)
    for sources, targets in groups:
        if all(array.shape[axis] == 1 for axis in sources):
            continue
        for axis in sources:
            if not isinstance(before[axis], int):
                return None
            spread[axis] = before[axis]  # type: ignore[assignment]
        for axis in targets:
            if not isinstance(after[axis], int):
                return None
            result[axis] = after[axis]  # type: ignore[assignment]
    return canonical(np.broadcast_to(array, spread).reshape(result))


def _matching_axes(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]] | None:
    """Groups of axes (of before, of after) that hold the same elements, or None if in doubt."""
    left = [axis for axis, dim in enumerate(before) if dim != 1]
    right = [axis for axis, dim in enumerate(after) if dim != 1]
    head: list[tuple[list[int], list[int]]] = []
    tail: list[tuple[list[int], list[int]]] = []

    def same(a: Dim, b: Dim) -> bool:
        return a is not None and a == b

    while left and right and same(before[left[0]], after[right[0]]):
        head.append(([left.pop(0)], [right.pop(0)]))
    while left and right and same(before[left[-1]], after[right[-1]]):
        tail.append(([left.pop()], [right.pop()]))
    if left and right and _one_unknown_in_front(before, left, after, right):
        head.append(([left.pop(0)], [right.pop(0)]))
    while left or right:
        group = _next_group(before, left, after, right)
        if group is None:
            return None
        head.append(group)
    return head + tail


def _one_unknown_in_front(before: Shape, left: list[int], after: Shape, right: list[int]) -> bool:
    """Both sides start with their only unknown extent and agree on the product of the others."""
    a, b = [before[axis] for axis in left], [after[axis] for axis in right]
    if isinstance(a[0], int) or isinstance(b[0], int):
        return False
    if not all(isinstance(dim, int) for dim in (*a[1:], *b[1:])):
        return False
    return int(np.prod(a[1:], dtype=np.int64)) == int(np.prod(b[1:], dtype=np.int64))  # type: ignore[arg-type]


def _next_group(
    before: Shape, left: list[int], after: Shape, right: list[int]
) -> tuple[list[int], list[int]] | None:
    """Take the shortest run of axes from both fronts whose extents have the same product."""
    if not all(isinstance(before[axis], int) for axis in left) or not all(
        isinstance(after[axis], int) for axis in right
    ):
        group = (list(left), list(right))  # one group for all that is left
        left.clear()
        right.clear()
        return group
    if not left or not right:
        return None
    sources, targets = [left.pop(0)], [right.pop(0)]
    while (m := _extent(before, sources)) != (n := _extent(after, targets)):
        if not (left if m < n else right):
            return None
        if m < n:
            sources.append(left.pop(0))
        else:
            targets.append(right.pop(0))
    return sources, targets


def _extent(shape: Shape, axes: list[int]) -> int:
    return int(np.prod([int(shape[axis] or 0) for axis in axes], dtype=np.int64))


def transpose(array: Array, perm: Sequence[int]) -> Array:
    """The array behind a Transpose."""
    return np.transpose(array, perm)


def inverse(perm: Sequence[int]) -> list[int]:
    """The permutation that undoes `perm`."""
    return [int(axis) for axis in np.argsort(perm)]


def broadcast(array: Array, rank: int) -> Array:
    """The array against a tensor of higher rank, as ONNX broadcasts: new axes in front."""
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def unbroadcast(array: Array, shape: Shape) -> Array | None:
    """The array of an operand of this shape, from the array of a result that it broadcasts to.

    None where the array varies along an axis that the operand does not have.
    """
    extra = array.ndim - len(shape)
    if any(size > 1 for size in array.shape[:extra]):
        return None
    inner = array.reshape(array.shape[extra:])
    if any(inner.shape[axis] > 1 and dim != inner.shape[axis] for axis, dim in enumerate(shape)):
        return None
    return inner


def take(array: Array, index: Array | Sequence[int] | slice, axis: int) -> Array:
    """The array behind a selection along one axis: Slice, Split, Gather."""
    if array.shape[axis] == 1:
        return array
    chosen = np.arange(array.shape[axis])[index]
    return canonical(np.take(array, chosen, axis=axis))


def put(array: Array, index: Array | Sequence[int] | slice, axis: int, size: Dim) -> Array | None:
    """The array in front of a selection: NaN where nothing was selected.

    None where two selected copies of one channel carry different numbers, or the extent is unknown.
    """
    if not isinstance(size, int):
        return array if array.size == 1 and not np.isnan(array).any() else None
    chosen = np.arange(size)[index]
    shape: list[int] = list(array.shape)
    shape[axis] = size
    full = np.full(shape, np.nan)
    picked = list(array.shape)
    picked[axis] = len(chosen)
    moved, rows = np.moveaxis(full, axis, 0), np.moveaxis(np.broadcast_to(array, picked), axis, 0)
    unset = np.isnan(rows).all(axis=tuple(range(1, rows.ndim)))
    moved[chosen[~unset]] = rows[~unset]
    # a channel that was selected twice holds the last of its numbers; the others must be the same
    if not np.array_equal(moved[chosen], rows, equal_nan=True):
        return None
    return canonical(full)


def depth_to_space(array: Array, block: int, mode: str) -> Array | None:
    """The array behind DepthToSpace; None unless the block's sub-channels carry equal numbers."""
    channels = array.shape[1]
    if channels == 1:
        return array
    if any(size > 1 for axis, size in enumerate(array.shape) if axis != 1):
        return None
    split = (block * block, channels // block**2)
    rows = array.reshape(split if mode == "DCR" else split[::-1])
    rows = rows if mode == "DCR" else rows.T
    first: Array = rows[0]
    if not all(np.array_equal(row, first, equal_nan=True) for row in rows):
        return None
    return first.reshape(1, -1, *array.shape[2:])


def space_to_depth(array: Array, block: int, mode: str) -> Array | None:
    """The array in front of DepthToSpace (the inverse of `depth_to_space`)."""
    if array.shape[1] == 1:
        return array if array.size == 1 else None
    if any(size > 1 for axis, size in enumerate(array.shape) if axis != 1):
        return None
    row = array.reshape(-1)
    spread = np.tile(row, block**2) if mode == "DCR" else np.repeat(row, block**2)
    return spread.reshape(1, -1, *array.shape[2:])


def constant_along(array: Array, axes: Sequence[int]) -> Array | None:
    """The array itself if it is constant along these axes, else None."""
    return array if all(array.shape[axis] == 1 for axis in axes) else None
