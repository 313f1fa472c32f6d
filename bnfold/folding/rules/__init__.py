"""The table of rules: operator -> family.

A family says what one node asks of the gauges around it, in three kinds of statement:

- ties: what the scale (or the origin) on one side makes of the scale (the origin) on the other;
- sums: the origin of an Add is the sum of the origins of its branches;
- demands: what a single gauge must be, with the sentence that explains why if it is not.

An operator that holds constants absorbs what its ties leave free, and `rewrite` gives its new
constants from the gauges around it. An operator without a row lets nothing pass. A new operator is
one row of RULES and one case in the law test.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array, ChannelAffine
from bnfold.folding.rules.einsum import einsum_rule
from bnfold.folding.rules.embedding import gather_rule
from bnfold.folding.rules.joining import (
    add_rule,
    concat_relations,
    extremum_rule,
    factor_rule,
    mean_relations,
    negation_rule,
    split_relations,
    sum_relations,
)
from bnfold.folding.rules.linear import (
    conv_rule,
    gemm_relations,
    gemm_rewrite,
    matmul_rule,
)
from bnfold.folding.rules.moves import (
    depth_to_space,
    expanded,
    pooled,
    reduced,
    reshaped,
    resized,
    sliced,
    space_to_depth,
    tiled,
    transposed,
)
from bnfold.folding.rules.node import Opaque
from bnfold.folding.rules.normalization import (
    normalization_map,
    normalization_relations,
    normalization_rewrite,
)
from bnfold.folding.rules.passing import (
    average_pool_rule,
    cast_rule,
    dropout_rule,
    free,
    grid_sample_rule,
    homogeneous,
    leaky,
    monotone,
    opaque,
    pad_rule,
    prelu_rule,
    structural,
    summing,
)
from bnfold.folding.rules.recurrent import recurrent_rule
from bnfold.folding.rules.relations import Gauges, Relations, Rule


def _blocks(node: ir.Node) -> bool:
    """True for an operator without a row."""
    return rule_of(node) is None


# --- the table -----------------------------------------------------------------------------------

RULES: dict[str, Rule] = {
    # linear: absorbs any gauge
    "Conv": conv_rule(transposed=False),
    "ConvTranspose": conv_rule(transposed=True),
    "Gemm": Rule(gemm_relations, gemm_rewrite, lambda _node: (1, 2)),
    "MatMul": matmul_rule(_blocks),
    "Einsum": einsum_rule(),
    "RNN": recurrent_rule(),
    "GRU": recurrent_rule(),
    "LSTM": recurrent_rule(),
    # diagonal: absorbs channel by channel
    "BatchNormalization": Rule(
        normalization_relations,
        normalization_rewrite,
        lambda _node: (1, 2, 3),
        lambda node: (0, normalization_map(node)),
    ),
    "Add": add_rule(1),
    "Sub": add_rule(-1),
    "Mul": factor_rule(divide=False, blocked=_blocks),
    "Div": factor_rule(divide=True, blocked=_blocks),
    "Neg": negation_rule(),
    # homogeneous: one positive scale, no shift
    "Relu": homogeneous(lambda _node, x: np.maximum(x, 0)),
    "LeakyRelu": homogeneous(leaky),
    "PRelu": prelu_rule(),
    "Abs": homogeneous(lambda _node, x: np.abs(x)),
    # monotone: one scale that is not negative, any shift
    "MaxPool": monotone(pooled),
    "GlobalMaxPool": monotone(pooled),
    "ReduceMax": monotone(reduced),
    "ReduceMin": monotone(reduced),
    "Max": extremum_rule(np.maximum),
    "Min": extremum_rule(np.minimum),
    # averaging: any gauge
    "AveragePool": average_pool_rule(),
    "GlobalAveragePool": structural(pooled),
    "ReduceMean": structural(reduced),
    "Resize": structural(resized),
    "Upsample": structural(resized),
    "GridSample": grid_sample_rule(),
    # additive: any scale, no shift
    "ReduceSum": summing(reduced),
    # structural: the gauge re-indexed
    "Identity": structural(),
    "Dropout": dropout_rule(),
    "Cast": cast_rule(),
    "Reshape": structural(reshaped),
    "Flatten": structural(reshaped),
    "Squeeze": structural(reshaped),
    "Unsqueeze": structural(reshaped),
    "Transpose": structural(transposed),
    "Expand": structural(expanded),
    "Tile": structural(tiled),
    "Slice": structural(sliced),
    "Gather": gather_rule(),
    "DepthToSpace": structural(depth_to_space),
    "SpaceToDepth": structural(space_to_depth),
    "Pad": pad_rule(),
    # several values
    "Sum": Rule(sum_relations),
    "Mean": Rule(mean_relations),
    "Concat": Rule(concat_relations),
    "Split": Rule(split_relations),
    # no element is looked at
    "Shape": Rule(free),
    "Size": Rule(free),
}


def rule_of(node: ir.Node) -> Rule | None:
    """The row of a node's operator; None for an operator without one, or of another domain."""
    return RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None


def rewritable_slots(node: ir.Node) -> tuple[int, ...]:
    """The operands of a node that its row may rewrite."""
    rule = rule_of(node)
    if rule is None or rule.rewrite is None:
        return ()
    try:
        return rule.constants(node)
    except Opaque:
        return ()


def rewritten(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
    """The new constants of a node by slot, given the gauges around it; none where it has none."""
    rule = rule_of(node)
    if rule is None or rule.rewrite is None or not rewritable_slots(node):
        return {}
    return rule.rewrite(node, gauges)


def affine_of(node: ir.Node) -> tuple[int, ChannelAffine]:
    """The operand of which a node is a per-channel map, and the map.

    Raises Opaque for a node that is none, and InputError for impossible statistics.
    """
    rule = rule_of(node)
    if rule is None or rule.affine is None:
        raise Opaque("it is no map of one operand")
    return rule.affine(node)


def relations_of(node: ir.Node) -> Relations:
    """What this node asks of the gauges around it. Raises InputError for impossible statistics."""
    rule = rule_of(node)
    if rule is None:
        return opaque(node)
    try:
        return rule.relations(node)
    except Opaque as why:
        return opaque(node, str(why))
