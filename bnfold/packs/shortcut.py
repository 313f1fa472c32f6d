"""The short way of folding again, for the fold that most networks have.

Where each batch norm went into the convolution or product ahead of it, and nothing else changed, a
weight is W * s and a bias s * (b - origin), with s = gamma / sqrt(var + eps): other statistics
change s and the origin, and no plan is needed. Whether a fold is of this kind is not argued but
tried: computed from the record's own statistics, every weight must be the folded file's, bit by
bit. For any other fold there is no shortcut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array
from bnfold.folding.constants import constant
from bnfold.folding.record import FoldedNorm
from bnfold.folding.rules.node import integer, optional_input
from bnfold.folding.told import AnyArray
from bnfold.measuring.statistics import Statistics
from bnfold.unfolding import UnfoldResult

Weights = Mapping[str, AnyArray]


@dataclass(frozen=True, eq=False)
class _Taken:
    """A batch norm that went into the layer ahead: that layer before, and where it is now."""

    norm: FoldedNorm
    weight: AnyArray
    bias: Array
    names: tuple[str, str]  # of weight and bias in the folded graph

    def folded(self, statistics: Statistics, like: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Weight and bias; the arithmetic of `rules.linear` and `rules.normalization`."""
        gamma, beta = self.norm.statistics["gamma"], self.norm.statistics["beta"]
        s = gamma / np.sqrt(statistics.var + self.norm.eps)
        t = beta - s * statistics.mean
        with np.errstate(all="ignore"):
            origin = np.where(s != 0, (0 - t) / s, t)
            bias = np.where(s == 0, origin, s * (self.bias - origin)).astype(like.dtype)
            return _scaled(self.weight, s.reshape(-1, *(1,) * (self.weight.ndim - 1))), bias


def _scaled(weight: AnyArray, scale: Array) -> AnyArray:
    """In float64, rounded once; piece by piece where numpy can, which spares the memory."""
    if weight.dtype.isbuiltin != 1:
        return np.asarray(weight.astype(np.float64) * scale).astype(weight.dtype)
    return np.multiply(weight, scale, out=np.empty_like(weight), casting="same_kind")


class Shortcut:
    """New weights of a folded graph from statistics alone; see `shortcut_of`."""

    def __init__(self, taken: Mapping[str, _Taken], own: Weights) -> None:
        self._taken, self._own = taken, own

    def weights(self, statistics: Mapping[str, Statistics]) -> dict[str, AnyArray] | None:
        """The weights that change, by their names in the folded graph.

        None where a batch norm is unknown or a type cannot hold a weight: a plan says what then.
        """
        found: dict[str, AnyArray] = {}
        for name, new in statistics.items():
            taken = self._taken.get(name)
            if taken is None:
                return None
            pair = taken.folded(new, self._own[taken.names[1]])
            if not all(np.isfinite(array).all() for array in pair):
                return None
            found.update(zip(taken.names, pair, strict=True))
        return found


def shortcut_of(back: UnfoldResult, folded: Weights) -> Shortcut | None:
    """The shortcut of a fold that was undone, if it has one; `folded`: its weights by name."""
    if back.folded is None:
        return None
    found = [_taken(norm, back.graph, back.folded, folded) for norm in back.record.norms]
    taken = {one.norm.name: one for one in found if one is not None}
    if len(taken) != len(back.record.norms):
        return None
    made = Shortcut(taken, folded)
    own = {
        name: Statistics(one.norm.statistics["mean"], one.norm.statistics["var"])
        for name, one in taken.items()
    }
    again = made.weights(own) or {}
    if len(again) != 2 * len(taken) or not all(_same(again[n], folded[n]) for n in again):
        return None
    before = {str(n): v.const_value for n, v in back.graph.graph.initializers.items()}
    for name, array in folded.items():
        tensor = before.get(name)
        if name not in again and tensor is not None and not _same(tensor.numpy(), array):
            return None  # something else changed, which other statistics may change too
    return made


def _taken(norm: FoldedNorm, original: ir.Model, now: ir.Model, folded: Weights) -> _Taken | None:
    node = _producer(original, norm.input)
    if node is None or node.op_type not in ("Conv", "Gemm"):
        return None
    if node.op_type == "Gemm" and not integer(node, "transB", 0):
        return None
    weight, bias = (constant(optional_input(node, slot)) for slot in (1, 2))
    if weight is None or weight.views or weight.tensor is None or weight.root.name not in folded:
        return None
    there = now.graph.initializers.get(str(weight.root.name))
    users = [] if there is None else [user for user, _ in there.uses()]
    held = optional_input(users[0], 2) if len(users) == 1 else None
    if held is None or held.name not in folded:
        return None
    size = len(norm.statistics["gamma"])
    array = weight.tensor.numpy()
    if array.shape[0] != size or (bias is not None and bias.array.shape != (size,)):
        return None
    old = np.zeros(size) if bias is None else bias.array
    return _Taken(norm, array, old, (str(weight.root.name), str(held.name)))


def _producer(model: ir.Model, value: str) -> ir.Node | None:
    return next((node for node in model.graph if node.outputs[0].name == value), None)


def _same(a: AnyArray, b: AnyArray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
