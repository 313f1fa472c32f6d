"""How an operator moves a per-channel array from its input to its output, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from bnfold.folding import layout
from bnfold.folding.affine import Array, canonical
from bnfold.folding.constants import constant
from bnfold.folding.layout import Dim
from bnfold.folding.rules.node import (
    Opaque,
    dims,
    indices,
    input_of,
    integer,
    integers,
    string,
)
from bnfold.folding.rules.relations import Moves


def same(x: ir.Value, y: ir.Value, _node: ir.Node) -> Moves:
    """Nothing moves."""
    if len(dims(x)) != len(dims(y)):
        raise Opaque(f"'{x.name}' and '{y.name}' differ in rank")
    return (lambda array: array), (lambda array: array)


def operand(value: ir.Value, result: ir.Value) -> Moves:
    """An operand against the result it broadcasts to."""
    rank, shape = len(dims(result)), dims(value)
    return (
        lambda array: layout.broadcast(array, rank),
        lambda array: layout.unbroadcast(array, shape),
    )


def reshaped(x: ir.Value, y: ir.Value, _node: ir.Node) -> Moves:
    """Reshape, Flatten, Squeeze, Unsqueeze."""
    before, after = dims(x), dims(y)
    return (
        lambda array: layout.reshape(array, before, after),
        lambda array: layout.reshape(array, after, before),
    )


def transposed(x: ir.Value, _y: ir.Value, node: ir.Node) -> Moves:
    """Transpose."""
    perm = integers(node, "perm") or list(range(len(dims(x))))[::-1]
    back = layout.inverse(perm)
    return (
        lambda array: layout.transpose(array, perm),
        lambda array: layout.transpose(array, back),
    )


def pooled(x: ir.Value, y: ir.Value, node: ir.Node) -> Moves:
    """Windows over the axes from 2 on; the gauge must be constant along them."""
    same(x, y, node)
    axes = range(2, len(dims(x)))
    return (
        lambda array: layout.constant_along(array, axes),
        lambda array: layout.constant_along(array, axes),
    )


def resized(x: ir.Value, y: ir.Value, node: ir.Node) -> Moves:
    """Resize and Upsample over the axes from 2 on."""
    if string(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise Opaque("it fills with a constant outside the image")
    before, after = dims(x), dims(y)
    if len(before) < 2 or len(before) != len(after):
        raise Opaque("its input has no channel axis")
    if not isinstance(before[1], int) or before[1] != after[1]:
        raise Opaque("its channels may be resized")
    return pooled(x, y, node)


def reduced(x: ir.Value, y: ir.Value, node: ir.Node) -> Moves:
    """A reduction over axes along which the gauge is constant."""
    rank = len(dims(x))
    axes = indices(node, 1, "axes")
    if not axes:
        if integer(node, "noop_with_empty_axes", 0):
            return same(x, y, node)
        axes = list(range(rank))
    axes = [axis % rank for axis in axes]
    kept = [axis for axis in range(rank) if axis not in axes]
    if integer(node, "keepdims", 1):
        return (
            lambda array: layout.constant_along(array, axes),
            lambda array: layout.constant_along(array, axes),
        )

    def ahead(array: Array) -> Array | None:
        inner = layout.constant_along(array, axes)
        return None if inner is None else inner.reshape([inner.shape[axis] for axis in kept])

    def back(array: Array) -> Array:
        shape = [1] * rank
        for position, axis in enumerate(kept):
            shape[axis] = array.shape[position]
        return array.reshape(shape)

    return ahead, back


def expanded(x: ir.Value, y: ir.Value, _node: ir.Node) -> Moves:
    """Expand."""
    before, after = dims(x), dims(y)
    return (
        lambda array: layout.broadcast(array, len(after)),
        lambda array: layout.unbroadcast(array, before),
    )


def sliced(x: ir.Value, _y: ir.Value, node: ir.Node) -> Moves:
    """Slice, forwards or backwards."""
    rank = len(dims(x))
    starts, ends = indices(node, 1, "starts"), indices(node, 2, "ends")
    if starts is None or ends is None:
        raise Opaque("its bounds are not known")
    axes = [a % rank for a in indices(node, 3, "axes") or range(len(starts))]
    steps = indices(node, 4, "steps") or [1] * len(starts)
    before = dims(x)
    cuts = [
        (axis, slice(start, stop, step))
        for axis, start, stop, step in zip(axes, starts, ends, steps, strict=True)
    ]

    def ahead(array: Array) -> Array | None:
        for axis, cut in cuts:
            array = layout.take(array, cut, axis)
        return array

    def back(array: Array) -> Array | None:
        result: Array | None = array
        for axis, cut in cuts:
            if result is not None:
                result = _put_along(result, cut, axis, before[axis])
        return result

    return ahead, back


def _put_along(array: Array, index: slice | Sequence[int], axis: int, size: Dim) -> Array | None:
    """`layout.put` along the axis of the channels; along another one, the whole axis is asked.

    An array that is constant along the cut axis and varies along another has its channels there:
    a producer can give all positions the same number, but hardly some of them.
    """
    if array.shape[axis] == 1 and (array.size > 1 or axis != 1 or not isinstance(size, int)):
        return array
    return layout.put(array, index, axis, size) if isinstance(size, int) else None


def gathered(x: ir.Value, _y: ir.Value, node: ir.Node) -> Moves:
    """Gather; where the indices are computed, along an axis on which the gauge is constant."""
    before = dims(x)
    axis = integer(node, "axis", 0) % len(before)
    held = constant(input_of(node, 1))
    if held is None:
        return _gathered_at_run_time(axis, len(dims(input_of(node, 1))))
    index = [int(i) for i in held.array.reshape(-1)]
    shape = held.array.shape

    def ahead(array: Array) -> Array | None:
        if array.shape[axis] == 1:
            inner = [1] * len(shape)
        else:
            array = np.take(array, index, axis=axis)
            inner = list(shape)
        return canonical(array.reshape(*array.shape[:axis], *inner, *array.shape[axis + 1 :]))

    def back(array: Array) -> Array | None:
        left, inner = array.shape[:axis], array.shape[axis : axis + len(shape)]
        right = array.shape[axis + len(shape) :]
        if all(extent == 1 for extent in inner):
            return _put_along(array.reshape(*left, 1, *right), index, axis, before[axis])
        full = np.broadcast_to(array, (*left, *shape, *right))
        return _put_along(full.reshape(*left, -1, *right), index, axis, before[axis])

    return ahead, back


def _gathered_at_run_time(axis: int, rank: int) -> Moves:
    def ahead(array: Array) -> Array | None:
        ones = (1,) * rank
        inner = layout.constant_along(array, [axis])
        return (
            None
            if inner is None
            else inner.reshape(*inner.shape[:axis], *ones, *inner.shape[axis + 1 :])
        )

    def back(array: Array) -> Array | None:
        inner = layout.constant_along(array, range(axis, axis + rank))
        return (
            None
            if inner is None
            else inner.reshape(*inner.shape[:axis], 1, *inner.shape[axis + rank :])
        )

    return ahead, back


def tiled(x: ir.Value, _y: ir.Value, node: ir.Node) -> Moves:
    """Tile: the whole axis again and again."""
    before = dims(x)
    held = constant(input_of(node, 1))
    if held is None or held.array.size != len(before):
        raise Opaque("its repeats are not known")
    repeats = [(axis, int(n)) for axis, n in enumerate(held.array.reshape(-1)) if n != 1]

    def places(axis: int, count: int) -> list[int] | None:
        size = before[axis]
        return list(range(size)) * count if isinstance(size, int) else None

    def ahead(array: Array) -> Array | None:
        for axis, count in repeats:
            if array.shape[axis] > 1:
                array = np.concatenate([array] * count, axis=axis)
        return array

    def back(array: Array) -> Array | None:
        result: Array | None = array
        for axis, count in repeats:
            chosen = places(axis, count)
            if result is not None and result.shape[axis] > 1:
                result = None if chosen is None else _put_along(result, chosen, axis, before[axis])
        return result

    return ahead, back


def depth_to_space(x: ir.Value, y: ir.Value, node: ir.Node) -> Moves:
    """DepthToSpace."""
    same(x, y, node)
    block, mode = integer(node, "blocksize", 1), string(node, "mode", "DCR")
    return (
        lambda array: layout.depth_to_space(array, block, mode),
        lambda array: layout.space_to_depth(array, block, mode),
    )


def space_to_depth(x: ir.Value, y: ir.Value, node: ir.Node) -> Moves:
    """SpaceToDepth, the inverse of DepthToSpace in DCR mode."""
    ahead, back = depth_to_space(x, y, node)
    return back, ahead  # SpaceToDepth orders its output as DepthToSpace in DCR mode reads it


def pads_of(node: ir.Node) -> list[int]:
    """The pads of a Pad, of all axes. Raises Opaque where they are not known."""
    pads = indices(node, 1, "pads") or indices(node, 1, "paddings")
    if pads is None:
        raise Opaque("its pads are not known")
    rank, axes = len(dims(input_of(node, 0))), indices(node, 3, "axes")
    if axes is None:
        return pads
    full = [0] * (2 * rank)
    for place, axis in enumerate(axes):
        full[axis % rank], full[axis % rank + rank] = pads[place], pads[place + len(axes)]
    return full


def padded(x: ir.Value, y: ir.Value, node: ir.Node) -> Moves:
    """Pad, of axes along which the gauge is constant."""
    same(x, y, node)
    pads, rank = pads_of(node), len(dims(x))
    touched = [axis for axis in range(rank) if pads[axis] or pads[axis + rank]]
    return (
        lambda array: layout.constant_along(array, touched),
        lambda array: layout.constant_along(array, touched),
    )
