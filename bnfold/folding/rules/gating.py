"""Products of two computed values, y = x g: a scale passes through x, and the gate g stays.

Squeeze-and-excitation and gated linear units multiply element by element, attention multiplies
matrices. The scales of the two would multiply; one of them, the gate, keeps its own values, so that
the scales of the other and of the result are tied. No shift passes: what it adds to the result
depends on the gate. Only attention itself is an average: the rows of a Softmax sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from bnfold.folding import layout
from bnfold.folding.affine import Array
from bnfold.folding.constants import constant
from bnfold.folding.rules.moves import operand
from bnfold.folding.rules.node import (
    Opaque,
    dims,
    input_of,
    integer,
    is_standard,
    label,
    opset_of,
)
from bnfold.folding.rules.passing import connect, drops_nothing
from bnfold.folding.rules.relations import Moves, Relations, identity_demands, no_shift

# operators that only hand on what their input is
_VIEWS = frozenset(
    {"Cast", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split"}
    | {"Squeeze", "Transpose", "Unsqueeze"}
)
Blocked = Callable[[ir.Node], bool]  # true for an operator that lets no gauge pass


def product_relations(node: ir.Node, blocked: Blocked, *, divide: bool) -> Relations:
    """Mul and Div of two computed values; a divisor is always the gate."""
    gate = 1 if divide else _gate(node, blocked)
    x, y = input_of(node, 1 - gate), node.outputs[0]
    return _gated(node, gate, operand(x, y))


def matmul_relations(node: ir.Node, blocked: Blocked) -> Relations:
    """MatMul of two computed values: scales along the axes that it does not sum over.

    Behind a Softmax over the axis that it sums over it averages, and shifts pass too.
    """
    gate = _gate(node, blocked)
    x, y = input_of(node, 1 - gate), node.outputs[0]
    summed = -1 if gate == 1 else -2
    if len(dims(x)) < 2 or len(dims(input_of(node, gate))) < 2:
        raise Opaque("one of its operands is a vector")
    ahead, back = operand(x, y)

    def forward(array: Array) -> Array | None:
        inner = layout.constant_along(array, [summed])
        return None if inner is None else ahead(inner)

    def backward(array: Array) -> Array | None:
        inner = layout.constant_along(array, [summed])
        return None if inner is None else back(inner)

    relations = _gated(node, gate, (forward, backward))
    if gate == 0 and _rows_sum_to_one(input_of(node, 0)):
        kept = tuple(d for d in relations.demands if d.value is input_of(node, 0))
        return Relations(relations.scales, relations.scales, (), kept)
    return relations


def _rows_sum_to_one(value: ir.Value) -> bool:
    """True for what a Softmax over the last axis gives."""
    node = value.producer()
    while node is not None and is_standard(node, "Identity", "Dropout") and drops_nothing(node):
        value = input_of(node, 0)
        node = value.producer()
    if node is None or not is_standard(node, "Softmax"):
        return False
    rank = len(dims(value))
    return integer(node, "axis", -1 if opset_of(node) >= 13 else 1) % rank == rank - 1


def _gate(node: ir.Node, blocked: Blocked) -> int:
    """The slot of the operand that keeps its values.

    The one that can take no scale anyway, else the smaller one of a broadcast, else the second.
    """
    for slot in (1, 0):
        if _is_fixed(input_of(node, slot), blocked):
            return slot
    left, right = dims(input_of(node, 0)), dims(input_of(node, 1))
    smaller = len(left) < len(right) or any(
        a == 1 != b for a, b in zip(reversed(left), reversed(right), strict=False)
    )
    return 0 if smaller else 1


def _is_fixed(value: ir.Value, blocked: Blocked) -> bool:
    """True where an input, or an operator that lets nothing pass, makes the value."""
    while True:
        node = value.producer()
        if node is None or blocked(node):
            return True
        if node.op_type not in _VIEWS:
            return False
        value = input_of(node, 0)


def _gated(node: ir.Node, gate: int, moves: Moves) -> Relations:
    x, g, y = input_of(node, 1 - gate), input_of(node, gate), node.outputs[0]
    if x is g:
        raise Opaque("it multiplies a value by itself")
    if constant(x) is not None or constant(g) is not None:
        raise Opaque("it reads constants alone")
    kept = f"{label(node)} multiplies by '{g.name}', which keeps its values"
    sentence = f"{label(node)} passes no shift"
    demands = (
        *identity_demands(g, kept),
        no_shift(x, sentence),
        no_shift(y, sentence),
    )
    return Relations((connect(x, y, moves),), (), (), demands)
