"""Batch normalization: the affine map it is, what it asks when it stays, and when it goes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from bnfold.errors import InputError
from bnfold.folding.affine import Array, ChannelAffine
from bnfold.folding.rules.linear import absorbs, shifted
from bnfold.folding.rules.node import (
    Opaque,
    along,
    dims,
    input_of,
    integer,
    label,
    name_of,
    opset_of,
    real,
    weights,
)
from bnfold.folding.rules.relations import Gauges, Relations, Scales, Tie


def normalization_map(node: ir.Node) -> ChannelAffine:
    """The affine map of an inference BatchNormalization, along axis 1 of its input.

    Raises Opaque where it has none (training mode, computed statistics), and InputError where its
    statistics are not numbers that can be normalised by: a negative variance, NaN, infinity.
    """
    said = integer(node, "training_mode", 0) if opset_of(node) >= 14 else _has_more_outputs(node)
    if said or any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise Opaque("it runs in training mode: its statistics are those of each batch")
    if integer(node, "is_test", 1) == 0 or integer(node, "spatial", 1) == 0:
        raise Opaque("an old opset's training or per-element mode")
    rank = len(dims(input_of(node, 0)))
    if rank < 2:
        raise Opaque("its input has no channel axis")
    gamma, beta, mean, var = (weights(node, slot) for slot in (1, 2, 3, 4))
    eps = real(node, "epsilon", 1e-5)
    spread = np.asarray(var + eps)
    for what, numbers, bad in (
        ("gamma", gamma, ~np.isfinite(gamma)),
        ("beta", beta, ~np.isfinite(beta)),
        ("running_mean", mean, ~np.isfinite(mean)),
        ("running_var + eps", spread, ~np.isfinite(spread) | (spread <= 0)),
    ):
        if np.any(bad):
            channel = int(np.flatnonzero(bad)[0])
            raise InputError(
                f"{label(node)} ({name_of(node)}): {what} is {numbers[channel]:g} in channel"
                f" {channel} ({int(bad.sum())} of {bad.size} channels are like that). The network"
                " cannot run with these statistics; re-estimate them, or retrain."
            )
    scale = gamma / np.sqrt(spread)
    shape = (1, -1) + (1,) * (rank - 2)
    return ChannelAffine(scale.reshape(shape), (beta - scale * mean).reshape(shape))


def _has_more_outputs(node: ir.Node) -> bool:
    """How opsets 7 to 13 say that a batch norm is in training mode, read or not."""
    return opset_of(node) >= 7 and any(output.name for output in node.outputs[1:])


def normalization_relations(node: ir.Node) -> Relations:
    """A batch norm that stays absorbs every gauge, as a linear operator does."""
    normalization_map(node)
    x, y = input_of(node, 0), node.outputs[0]
    return absorbs(node, (x, 1), (y, 1))


def normalization_rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
    """A batch norm that stays: gamma~ = scale_y gamma / scale_x around a moved mean."""
    gamma, beta, mean = (weights(node, slot) for slot in (1, 2, 3))
    x, y = gauges(input_of(node, 0)), gauges(node.outputs[0])
    size = gamma.size
    scale, read = along(y.scale, size), along(x.read_scale, size)
    origin = along(x.origin, size)
    known = read == 0
    normalization = normalization_map(node)
    at_origin = normalization.scale.reshape(-1) * origin + normalization.shift.reshape(-1)
    forward_scale = np.where(known, 1.0, along(x.scale, size))
    return {
        1: scale * gamma * read,
        2: shifted(np.where(known, at_origin, beta), scale, along(y.origin, size)),
        3: np.where(known, mean, forward_scale * (mean - origin)),
    }


def bypass(x: ir.Value, y: ir.Value, m: ChannelAffine) -> Relations:
    """A per-channel map y = s x + t that goes: its two sides become one tensor, x~ = y~.

    scale_x = s * scale_y, and origins move as points do: origin_y = s * origin_x + t. Where s = 0
    the output is t whatever comes in: either x~ is written as that constant (scale_x = 0), or the
    readers of y know it (scale_y = inf).
    """
    s, t = m.scale, m.shift

    def scale_ahead(scale: Array, _scales: Scales) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            ahead = scale / s
        return np.where(np.isinf(ahead), np.inf, np.where((s == 0) & (scale == 0), np.nan, ahead))

    def scale_back(scale: Array, _scales: Scales) -> Array:
        with np.errstate(invalid="ignore"):
            back = s * scale
        # s = 0: under a known constant x keeps its own scale, else the constant must be written
        return np.where((s == 0) & np.isinf(scale), np.nan, np.where(np.isinf(back), np.inf, back))

    def origin_ahead(origin: Array, scales: Scales) -> Array:
        written_x, written_y = scales(x) == 0, scales(y) == 0
        point = np.where(s == 0, t + 0 * np.where(np.isnan(origin), 0, origin), s * origin + t)
        through = np.where(written_x & written_y & (s != 0), origin, point)
        # the constant that is written at x stands for this origin of y
        scale_y = scales(y)
        with np.errstate(divide="ignore", invalid="ignore"):
            implied = np.where(written_y, origin, t - origin / scale_y)
        implied = np.where(np.isinf(scale_y), np.nan, implied)
        return np.where(written_x & (s == 0), implied, through)

    def origin_back(origin: Array, scales: Scales) -> Array:
        scale_x, scale_y = scales(x), scales(y)
        with np.errstate(divide="ignore", invalid="ignore"):
            point = (origin - t) / s
            constant_value = np.where(scale_y == 0, origin, scale_y * (t - origin))
        regular = np.where((scale_x == 0) & (scale_y == 0), origin, point)
        return np.where(s != 0, regular, np.where(scale_x == 0, constant_value, np.nan))

    scale_tie = Tie(x, y, scale_ahead, scale_back, elementwise=True)
    origin_tie = Tie(x, y, origin_ahead, origin_back, elementwise=True)
    return Relations((scale_tie,), (origin_tie,))


def constants_of_bypass(
    x: ir.Value,
    y: ir.Value,
    m: ChannelAffine,
    scales: Scales,
    origins: Callable[[ir.Value], Array],
) -> dict[ir.Value, Array]:
    """Where a batch norm that goes has gamma = 0: the constant to write at x, or to know at y."""
    if np.all(m.scale != 0):
        return {}
    written = (m.scale == 0) & (scales(x) == 0)
    known = (m.scale == 0) & np.isinf(scales(y))
    with np.errstate(invalid="ignore"):
        constant_x = np.where(scales(y) == 0, origins(y), scales(y) * (m.shift - origins(y)))
    return {
        x: np.where(written & ~known, constant_x, np.nan),
        y: np.where(known, m.shift, np.nan),
    }
