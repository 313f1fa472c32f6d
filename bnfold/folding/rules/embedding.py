"""Gather: rows of a constant table absorb any gauge; chosen elements of a value re-index it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array, Gauge, Mask
from bnfold.folding.constants import constant
from bnfold.folding.rules.moves import gathered
from bnfold.folding.rules.node import Opaque, dims, input_of, integer, label, weights
from bnfold.folding.rules.passing import structural
from bnfold.folding.rules.relations import Demand, Gauges, Relations, Rule, writable


def gather_rule() -> Rule:
    """An embedding where the table is constant and the indices are computed, else a selection."""
    selection = structural(gathered)

    def relations(node: ir.Node) -> Relations:
        return _relations(node) if _is_embedding(node) else selection.relations(node)

    def rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
        table, y = weights(node, 0), gauges(node.outputs[0])
        axis, count = _index_axes(node)

        def against_table(array: Array) -> Array:
            return array.reshape(*array.shape[:axis], 1, *array.shape[axis + count :])

        return {0: Gauge(against_table(y.scale), against_table(y.origin)).write(table)}

    return Rule(relations, rewrite, lambda node: (0,) if _is_embedding(node) else ())


def _is_embedding(node: ir.Node) -> bool:
    table, indices = input_of(node, 0), input_of(node, 1)
    return constant(table) is not None and constant(indices) is None


def _index_axes(node: ir.Node) -> tuple[int, int]:
    """The first axis of the result that the indices span, and how many there are."""
    return integer(node, "axis", 0) % len(dims(input_of(node, 0))), len(dims(input_of(node, 1)))


def _relations(node: ir.Node) -> Relations:
    y = node.outputs[0]
    axis, count = _index_axes(node)
    if len(dims(y)) != len(dims(input_of(node, 0))) - 1 + count:
        raise Opaque(f"'{y.name}' is declared with a rank that it does not have")

    def same_for_all_rows(array: Array) -> Mask:
        fits = all(extent == 1 for extent in array.shape[axis : axis + count])
        return np.full(array.shape, fits)

    sentence = f"{label(node)} chooses rows of its table at run time, which need one gauge"
    return Relations(
        demands=(
            Demand(y, "scale", lambda scale, _o: same_for_all_rows(scale), sentence),
            Demand(y, "origin", lambda _s, origin: same_for_all_rows(origin), sentence),
            writable(y, node),
        )
    )
