"""Small arithmetic on constants: what operators that read nothing but constants compute.

Exporters take batch norms apart (gamma / sqrt(var + eps) as Add, Sqrt, Div of initializers), build
the weights of recurrent layers by Slice and Concat, and compute standardised or normalised weights
in the graph. Floats are float64 here, so that a constant is rounded only once, when it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from bnfold.errors import InputError

Elements = np.ndarray[Any, np.dtype[Any]]
Operands = Sequence[Elements | None]
Evaluate = Callable[[ir.Node, list[Any]], Elements]


def compute(node: ir.Node, operands: Operands) -> Elements:
    """The first output of an operator of `ARITHMETIC`; floats in float64.

    Raises InputError where the operands do not fit together.
    """
    try:
        with np.errstate(all="ignore"):
            return ARITHMETIC[node.op_type](node, list(operands))
    except (ValueError, IndexError, TypeError) as error:
        name = node.name or node.outputs[0].name
        raise InputError(
            f"{node.op_type} '{name}' reads constants that do not fit together: {error}."
        ) from error


def _pointwise(function: Callable[..., Elements]) -> Evaluate:
    return lambda _node, operands: np.asarray(function(*operands))


def _folded(function: Callable[[Elements, Elements], Elements]) -> Evaluate:
    """An operator of any number of operands."""

    def evaluate(_node: ir.Node, operands: list[Any]) -> Elements:
        total = operands[0]
        for operand in operands[1:]:
            total = function(total, operand)
        return np.asarray(total)

    return evaluate


def _divide(_node: ir.Node, operands: list[Any]) -> Elements:
    a, b = operands
    if a.dtype.kind == "f":
        return np.asarray(a / b)
    whole = np.abs(a) // np.abs(b)  # integers are divided towards 0
    return np.asarray(whole * np.sign(a) * np.sign(b))


def _clip(node: ir.Node, operands: list[Any]) -> Elements:
    x, low, high = (*operands, None, None)[:3]
    low = _attribute(node, "min", -np.inf) if low is None else low
    high = _attribute(node, "max", np.inf) if high is None else high
    return np.asarray(np.minimum(np.maximum(x, low), high).astype(x.dtype))


def _reduction(function: Callable[..., Elements]) -> Evaluate:
    def evaluate(node: ir.Node, operands: list[Any]) -> Elements:
        x, axes = (*operands, None)[:2]
        chosen = _attribute(node, "axes", ()) if axes is None else axes.reshape(-1)
        over = tuple(int(axis) for axis in chosen)
        everything = not over and not _attribute(node, "noop_with_empty_axes", 0)
        kept = bool(_attribute(node, "keepdims", 1))
        return np.asarray(function(x, axis=None if everything else over, keepdims=kept))

    return evaluate


def _slice(node: ir.Node, operands: list[Any]) -> Elements:
    x, starts, ends, axes, steps = (*operands, None, None, None, None)[:5]
    starts = _attribute(node, "starts", ()) if starts is None else starts.reshape(-1)
    ends = _attribute(node, "ends", ()) if ends is None else ends.reshape(-1)
    axes = _attribute(node, "axes", range(len(starts))) if axes is None else axes.reshape(-1)
    steps = [1] * len(starts) if steps is None else steps.reshape(-1)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut = slice(int(start), int(end), int(step))
        x = np.moveaxis(np.moveaxis(x, int(axis), 0)[cut], 0, int(axis))
    return np.asarray(x)


def _gather(node: ir.Node, operands: list[Any]) -> Elements:
    x, index = operands
    return np.asarray(np.take(x, index.astype(np.int64), axis=_attribute(node, "axis", 0)))


def _concat(node: ir.Node, operands: list[Any]) -> Elements:
    return np.concatenate(operands, axis=_attribute(node, "axis", 0))


def _expand(_node: ir.Node, operands: list[Any]) -> Elements:
    x, shape = operands
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(n) for n in shape)))


def _fill(node: ir.Node, operands: list[Any]) -> Elements:
    value = node.attributes.get("value")
    number = np.zeros(1) if value is None else value.as_tensor().numpy()
    number = number if number.dtype.kind in "iub" else number.astype(np.float64)
    # one number seen everywhere: a file of 200 bytes may ask for terabytes of it
    return np.broadcast_to(number.reshape(-1)[0], tuple(int(n) for n in operands[0]))


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def _norm(x: Elements, **options: Any) -> Elements:
    return np.asarray(np.sqrt(np.sum(np.square(x), **options)))


def _dequantize(node: ir.Node, operands: list[Any]) -> Elements:
    x, scale, zero = (*operands, None)[:3]
    axis, block = _attribute(node, "axis", 1), _attribute(node, "block_size", 0)

    def spread(parameter: Elements) -> Elements:
        if parameter.size == 1 and not block:
            return parameter.reshape(())
        if block:
            wide = np.repeat(parameter, block, axis=axis)
            return np.asarray(wide[tuple(slice(0, size) for size in x.shape)])
        return parameter.reshape(-1, *(1,) * (x.ndim - 1 - axis % x.ndim))

    middle = 0.0 if zero is None else spread(zero.astype(np.float64))
    return np.asarray((x.astype(np.float64) - middle) * spread(scale))


ARITHMETIC: dict[str, Evaluate] = {
    "Add": _pointwise(np.add),
    "Sub": _pointwise(np.subtract),
    "Mul": _pointwise(np.multiply),
    "Div": _divide,
    "Neg": _pointwise(np.negative),
    "Abs": _pointwise(np.abs),
    "Sqrt": _pointwise(np.sqrt),
    "Reciprocal": _pointwise(np.reciprocal),
    "Pow": _pointwise(np.power),
    "Exp": _pointwise(np.exp),
    "Log": _pointwise(np.log),
    "Max": _folded(np.maximum),
    "Min": _folded(np.minimum),
    "Clip": _clip,
    "ReduceMean": _reduction(np.mean),
    "ReduceSum": _reduction(np.sum),
    "ReduceSumSquare": _reduction(lambda x, **options: np.sum(np.square(x), **options)),
    "ReduceL2": _reduction(_norm),
    "Slice": _slice,
    "Gather": _gather,
    "Concat": _concat,
    "Expand": _expand,
    "ConstantOfShape": _fill,
    "DequantizeLinear": _dequantize,
}
