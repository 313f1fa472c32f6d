"""The ranges of a network's weights, before and after: what a fold does to quantization.

A fold multiplies output channels by gamma / sigma, which can pull them apart. Where one scale
serves a whole tensor, a channel that is a thousandth of the largest keeps no bits; `spread` says
so. (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from bnfold.folding.constants import FLOATS, constant

EMPTY = 2.0**-24  # a rounding of float32
_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True)
class WeightRange:
    """One weight: its numbers' range, and how far its output channels are apart.

    min, max: of all elements. smallest: the least of the channels' largest |w|. spread: the
    greatest of them over their median. Both leave out the empty channels, those within EMPTY of
    nothing beside the greatest (trained networks have some at 1e-40); empty: how many there are.
    """

    min: float
    max: float
    smallest: float
    spread: float
    empty: int

    @classmethod
    def of(cls, channels: np.ndarray[Any, Any]) -> WeightRange:
        """Of an array (channels, elements of each)."""
        low, high = channels.min(axis=1), channels.max(axis=1)
        peaks = np.maximum(high, -low).astype(np.float64)
        live = peaks[peaks > EMPTY * peaks.max()]
        if not live.size:  # all zeros, or NaN
            return cls(float(low.min()), float(high.max()), 0.0, 0.0, len(peaks))
        return cls(
            min=float(low.min()),
            max=float(high.max()),
            smallest=float(live.min()),
            spread=float(live.max() / np.median(live)),
            empty=len(peaks) - len(live),
        )


def weight_ranges(before: ir.Model, after: ir.Model) -> list[dict[str, Any]]:
    """The ranges of every convolution's and linear layer's weight in two graphs, matched by name.

    Rows {"name", "op", "before", "after"} in the order of the first graph; None where one graph
    has no weight of the name.
    """
    was, now = (dict(_weights(model)) for model in (before, after))
    return [
        {
            "name": name,
            "op": (was.get(name) or now[name])[0],
            "before": _told(was, name),
            "after": _told(now, name),
        }
        for name in {**was, **now}
    ]


def _told(found: Mapping[str, tuple[str, WeightRange]], name: str) -> dict[str, Any] | None:
    return asdict(found[name][1]) if name in found else None


def _weights(model: ir.Model) -> Iterator[tuple[str, tuple[str, WeightRange]]]:
    for graph in model.graphs():
        for node in graph:
            if node.op_type not in _LINEAR or node.domain not in ("", "ai.onnx"):
                continue
            held = constant(node.inputs[1])
            if held is None or held.dtype not in FLOATS or 0 in held.shape:
                continue
            root = held.root if held.dequantizer is None else held.dequantizer.inputs[0]
            name = (root.name if root is not None else None) or node.name or ""
            yield name, (node.op_type, WeightRange.of(_by_channel(node, held.array)))


def _by_channel(node: ir.Node, weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The weight as (output channels, the elements of each)."""
    if node.op_type == "ConvTranspose":  # (C_in, C_out / groups, ...)
        groups = node.attributes.get_int("group", 1)
        parts = weight.reshape(groups, -1, *weight.shape[1:])
        return np.moveaxis(parts, 2, 1).reshape(groups * weight.shape[1], -1)
    if node.op_type == "Gemm" and not node.attributes.get_int("transB", 0):
        return weight.T
    if node.op_type == "MatMul":
        return np.moveaxis(weight, -1, 0).reshape(weight.shape[-1], -1)
    return weight.reshape(len(weight), -1)
