"""Weights that are held as integers: what a fold may make of them, and how.

DequantizeLinear gives (q - zero_point) * scale, with one scale for all, one along an axis, or one
for each block. A factor along one axis goes into the scales and its sign into the integers,
q -> 2 zero_point - q, so that the weight stays as small as it was. Anything else (a factor along
two axes, a sum) would need floats, and the batch norm stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array
from bnfold.folding.arithmetic import Elements
from bnfold.folding.constants import Constant, readers
from bnfold.folding.rules.node import opset_of

_EQUAL = 2.0**-44  # of a factor, which comes out of products and quotients in float64


class Unquantizable(Exception):  # noqa: N818 - a reason, not an error
    """The text says why a new value is none of these integers times a scale."""


@dataclass(frozen=True)
class Quantized:
    """The new operands of a DequantizeLinear; the axis is None where there is one scale for all."""

    integers: Elements
    scale: Array
    zero_point: Elements
    axis: int | None


def requantized(held: Constant, array: Array) -> Quantized:
    """The integers and scales that give a new value of a constant behind DequantizeLinear.

    array: the new value as the operator sees it. Raises Unquantizable.
    """
    node = held.dequantizer
    assert node is not None
    if len(readers(held.root)) > 1:
        raise Unquantizable("several layers read it")
    new, old = held.as_root(array), held.stored
    integers, scale, zero = operands_of(node)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    axis %= max(1, old.ndim)
    if scale.size > 1 and scale.ndim == old.ndim:  # in blocks along the axis
        at, factor = _factor(old, new, [a for a in range(old.ndim) if a != axis])
        scale_of = np.moveaxis(factor.reshape(-1, *(1,) * (old.ndim - 1)), 0, at)
        block = node.attributes["block_size"].as_int()
        spread = np.repeat(zero, block, axis=axis)
        spread = spread[tuple(slice(0, n) for n in old.shape)] if zero.ndim else zero
        flipped = _flipped(integers, spread, np.broadcast_to(scale_of, old.shape))
        return Quantized(flipped, scale * np.where(scale_of == 0, 1, np.abs(scale_of)), zero, axis)
    at, factor = _factor(old, new, [axis] if scale.size > 1 else list(range(old.ndim)))
    sizes = np.where(factor == 0, 1, np.abs(factor))
    shape = [1] * old.ndim
    shape[at] = factor.size
    along = zero.reshape(shape) if zero.size > 1 else zero.reshape(())
    flipped = _flipped(integers, along, np.broadcast_to(factor.reshape(shape), old.shape))
    if scale.size == 1 and np.all(sizes == sizes[0]):
        return Quantized(flipped, scale * sizes[0], zero, None)
    if scale.size == 1 and opset_of(node) < 13:
        raise Unquantizable("its opset has one scale for all channels only")
    return Quantized(
        flipped,
        scale.reshape(-1) * sizes,
        np.broadcast_to(zero.reshape(-1), factor.shape).astype(zero.dtype),
        at,
    )


def operands_of(node: ir.Node) -> tuple[Elements, Array, Elements]:
    """Integers, scales and zero points of a DequantizeLinear of constants."""
    values = [ir.convenience.get_const_tensor(v) if v is not None else None for v in node.inputs]
    if values[0] is None or values[1] is None:
        raise Unquantizable("its integers or scales are computed")
    integers, scale = values[0].numpy(), values[1].numpy().astype(np.float64)
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return integers, scale, np.zeros(scale.shape, integers.dtype)
    if values[2] is None:
        raise Unquantizable("its zero point is computed")
    return integers, scale, values[2].numpy()


def _factor(old: Array, new: Array, axes: list[int]) -> tuple[int, Array]:
    """The axis along which the new value is a multiple of the old one, and the factors."""
    for axis in axes:
        rows, wanted = (np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1) for a in (old, new))
        largest = np.argmax(np.abs(rows), axis=1)[:, None]
        peak = np.take_along_axis(rows, largest, 1)
        found = np.take_along_axis(wanted, largest, 1) / np.where(peak == 0, 1, peak)
        if np.all(np.abs(wanted - found * rows) <= _EQUAL * np.abs(wanted)):
            return axis, found[:, 0]
    raise Unquantizable("its integers have no scale along that axis")


def _flipped(integers: Elements, zero: Elements, factor: Array) -> Elements:
    """The integers of a weight times the sign of a factor, in their own type."""
    info = ml_dtypes.iinfo(integers.dtype)  # type: ignore[no-untyped-call]
    wide, middle = integers.astype(np.int64), zero.astype(np.int64)
    turned = middle + (wide - middle) * np.sign(factor).astype(np.int64)
    if np.any((turned < info.min) | (turned > info.max)):
        raise Unquantizable(f"{integers.dtype} does not hold the negative of its least number")
    result: np.ndarray[Any, Any] = turned.astype(integers.dtype)
    return result
