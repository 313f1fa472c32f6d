"""RNN, GRU and LSTM: their input weights absorb any gauge, the hidden state keeps its values.

The gates see the input as W x + b, for every direction and either layout, so a gauge at the input
goes into W and into the input's half of B = [Wb, Rb] (with GRU's linear_before_reset too, where Rb
is inside the reset and Wb is not).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array
from bnfold.folding.rules.node import along, input_of, label, weights
from bnfold.folding.rules.relations import (
    Gauges,
    Relations,
    Rule,
    identity_demands,
    only_along,
    readable,
)

_INPUT, _WEIGHT, _BIAS = 0, 1, 3
_FEATURES = 2  # the axis of X that W contracts, in both layouts


def recurrent_rule() -> Rule:
    """W (directions, gates * hidden, input), B (directions, 2 * gates * hidden) or absent."""
    return Rule(_relations, _rewrite, lambda _node: (_WEIGHT, _BIAS))


def _has_bias(node: ir.Node) -> bool:
    return len(node.inputs) > _BIAS and node.inputs[_BIAS] is not None


def _relations(node: ir.Node) -> Relations:
    weights(node, _WEIGHT)
    if _has_bias(node):
        weights(node, _BIAS)
    x = input_of(node, _INPUT)
    sentence = f"{label(node)} lets no scale or shift into its hidden state"
    hidden = {v for v in (*node.inputs[_WEIGHT:], *node.outputs) if v is not None}
    demands = [*only_along(x, _FEATURES, node), readable(x, node)]
    demands += [demand for v in hidden for demand in identity_demands(v, sentence)]
    return Relations(demands=tuple(demands))


def _rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
    weight, x = weights(node, _WEIGHT), gauges(input_of(node, _INPUT))
    directions, rows, ins = weight.shape
    bias = weights(node, _BIAS).copy() if _has_bias(node) else np.zeros((directions, 2 * rows))
    bias[:, :rows] += weight @ along(x.origin, ins)
    return {_WEIGHT: weight * along(x.read_scale, ins), _BIAS: bias}
