"""Einsum of a value and a constant: linear, along whichever axes the two share.

The constant absorbs scales along every axis that it has: those it sums over (W / scale_x) and those
of the result (scale_y W). It has no bias, so a shift goes on to the result, where an addition of a
constant may take it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array, Mask, canonical
from bnfold.folding.rules.node import Opaque, dims, input_of, one_constant, operand_slots, string
from bnfold.folding.rules.node import label as name_of_node
from bnfold.folding.rules.relations import (
    Demand,
    Gauges,
    Relations,
    Rule,
    Scales,
    Tie,
    readable,
    writable,
)


@dataclass(frozen=True)
class _Product:
    """An Einsum of two operands, one of them constant: the letters of its axes."""

    slot: int  # of the constant
    constant: Array
    x: ir.Value
    y: ir.Value
    of_x: str
    of_constant: str
    of_y: str

    def against_constant(self, array: Array, letters: str) -> Array:
        """An array against x or y, which varies along shared axes only, against the constant."""
        shared = [letters.index(letter) for letter in self.of_constant if letter in letters]
        rest = [axis for axis in range(array.ndim) if axis not in shared]
        moved = np.transpose(array, shared + rest).reshape([array.shape[axis] for axis in shared])
        sizes = iter(moved.shape)
        return moved.reshape([next(sizes) if c in letters else 1 for c in self.of_constant])

    def only_shared(self, value: ir.Value, letters: str, node: ir.Node) -> tuple[Demand, Demand]:
        """The gauge varies along axes that the constant has too."""

        def fits(array: Array) -> Mask:
            free = [n for n, letter in zip(array.shape, letters, strict=True)
                    if letter not in self.of_constant]  # fmt: skip
            return np.full(array.shape, all(n == 1 for n in free))

        sentence = f"the constant of {name_of_node(node)} lacks an axis of '{value.name}'"
        return (
            Demand(value, "scale", lambda scale, _o: fits(scale), sentence),
            Demand(value, "origin", lambda _s, origin: fits(origin), sentence),
        )

    def of_origin(self, origin: Array) -> Array:
        """The result for the origin of x in the place of x, where it varies along shared axes."""
        wide = np.broadcast_to(self.against_constant(origin, self.of_x), self.constant.shape)
        summed = [c for c in self.of_x if c not in self.of_constant and c not in self.of_y]
        sizes = dict(zip(self.of_x, dims(self.x), strict=True))
        total = self.constant * wide
        for letter in summed:
            size = sizes[letter]
            total = total * (size if isinstance(size, int) else np.nan)
        kept = "".join(c for c in self.of_y if c in self.of_constant)
        moved = np.einsum(f"{self.of_constant}->{kept}", total)
        places = iter(moved.shape)
        return canonical(moved.reshape([next(places) if c in kept else 1 for c in self.of_y]))


def _product(node: ir.Node) -> _Product:
    held = one_constant(node) if len(node.inputs) == 2 else None
    if held is None:
        raise Opaque("it does not multiply one value by one constant")
    slot, c = held
    terms, arrow, result = string(node, "equation", "").replace(" ", "").partition("->")
    letters = terms.split(",")
    if not arrow or len(letters) != 2 or not "".join([*letters, result]).isalpha():
        raise Opaque("its equation is of another form")
    if any(len(set(word)) != len(word) for word in (*letters, result)):
        raise Opaque("its equation takes a diagonal")
    x, y = input_of(node, 1 - slot), node.outputs[0]
    found = _Product(slot, c.array, x, y, letters[1 - slot], letters[slot], result)
    if len(found.of_x) != len(dims(x)) or len(found.of_constant) != c.array.ndim:
        raise Opaque("its equation does not fit its operands")
    sizes = dict(zip(found.of_constant, c.array.shape, strict=True))
    if any(sizes.get(c, n) != n for c, n in zip(found.of_x, dims(x), strict=True)):
        raise Opaque("one operand is stretched to the other, or of unknown size")
    if len(found.of_y) != len(dims(y)):
        raise Opaque(f"'{y.name}' is declared with a rank that it does not have")
    return found


def einsum_rule() -> Rule:
    """y = einsum(x, W): W~ = scale_y W / scale_x, origin_y = einsum(origin_x, W)."""

    def relations(node: ir.Node) -> Relations:
        p = _product(node)
        unknown = np.full((1,) * len(p.of_x), np.nan)

        def ahead(origin: Array, _scales: Scales) -> Array | None:
            fits = all(
                n == 1 or c in p.of_constant for n, c in zip(origin.shape, p.of_x, strict=True)
            )
            return p.of_origin(origin) if fits else None

        tie = Tie(p.x, p.y, ahead, lambda _origin, _s: unknown)
        scale_only, _ = p.only_shared(p.y, p.of_y, node)
        demands = (
            *p.only_shared(p.x, p.of_x, node),
            scale_only,
            readable(p.x, node),
            readable(p.y, node),  # a constant could be written by a bias only
            writable(p.y, node),
        )
        return Relations((), (tie,), (), demands)

    def rewrite(node: ir.Node, gauges: Gauges) -> dict[int, Array]:
        p = _product(node)
        read = p.against_constant(gauges(p.x).read_scale, p.of_x)
        return {p.slot: p.constant * read * p.against_constant(gauges(p.y).scale, p.of_y)}

    return Rule(relations, rewrite, operand_slots)
