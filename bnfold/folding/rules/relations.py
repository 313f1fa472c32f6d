"""What a node can ask of the gauges around it: ties, sums and demands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array, ChannelAffine, Gauge, Mask
from bnfold.folding.rules.node import dims, label

Moves = tuple[Callable[[Array], Array | None], Callable[[Array], Array | None]]
Scales = Callable[[ir.Value], Array]
Transfer = Callable[[Array, Scales], Array | None]
Gauges = Callable[[ir.Value], Gauge]
Rewrite = Callable[[ir.Node, Gauges], dict[int, Array]]


@dataclass(frozen=True, eq=False)
class Tie:
    """What a number at value `a` makes of the number at value `b`, and back.

    elementwise: both sides have one layout and the two transfers are inverse up to rounding.
    """

    a: ir.Value
    b: ir.Value
    forward: Transfer
    backward: Transfer
    elementwise: bool = False


@dataclass(frozen=True, eq=False)
class Term:
    """A signed operand of a sum, and how its array broadcasts to the result's and back."""

    value: ir.Value
    sign: int
    moves: Moves

    def lift(self, array: Array) -> Array:
        """The operand's array against the result."""
        lifted = self.moves[0](array)
        assert lifted is not None  # an operand always broadcasts to its result
        return lifted

    def lower(self, array: Array) -> Array | None:
        """The result's array against the operand; None where it varies along other axes."""
        return self.moves[1](array)


@dataclass(frozen=True, eq=False)
class Sum:
    """origin(result) = sum of sign * origin(term)."""

    result: ir.Value
    terms: tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Demand:
    """What a node asks of the scale or the origin at one value.

    holds(scale, origin) is an array of bool, False on the channels where the demand is broken.
    of_sign: it is about the sign of the scale.
    """

    value: ir.Value
    layer: Literal["scale", "origin"]
    holds: Callable[[Array, Array], Mask]
    sentence: str
    of_sign: bool = False


@dataclass(frozen=True, eq=False)
class Relations:
    """Everything that one node asks of the gauges around it."""

    scales: tuple[Tie, ...] = ()
    origins: tuple[Tie, ...] = ()
    sums: tuple[Sum, ...] = ()
    demands: tuple[Demand, ...] = ()


@dataclass(frozen=True, eq=False)
class Rule:
    """A row of the table: what the operator asks, and its new constants if it holds any.

    constants: the operands that `rewrite` may change. affine: the slot of the one operand of which
    the operator is a per-channel map, and that map: what can be folded away.
    """

    relations: Callable[[ir.Node], Relations]
    rewrite: Rewrite | None = None
    constants: Callable[[ir.Node], tuple[int, ...]] = field(default=lambda _node: ())
    affine: Callable[[ir.Node], tuple[int, ChannelAffine]] | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """An operator of two operands, of which the second is this constant (Max, Min, Add)."""

    op_type: str
    constant: Array


@dataclass(frozen=True, eq=False)
class Padding:
    """A Pad of the spatial axes with one number: how much in front of each, how much behind."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    number: float


@dataclass(frozen=True, eq=False)
class Form:
    """What stands in the folded graph for a node that is repaired.

    constants: the node's new ones by slot. steps: the operators behind it; without constants they
    take the node's place. padding: a Pad in front of the node, which does not pad any more.
    """

    steps: tuple[Step, ...]
    constants: dict[int, Array] | None = None
    padding: Padding | None = None

    @property
    def extra_operators(self) -> int:
        """How many operators more there are."""
        return len(self.steps) - (self.constants is None) + (self.padding is not None)


@dataclass(frozen=True, eq=False)
class Repair:
    """Another form of one node: what it asks then, and how it looks with given gauges around it.

    form: None where the node's own form does.
    """

    relations: Relations
    form: Callable[[Gauges], Form | None]


def identity_demands(value: ir.Value, sentence: str) -> tuple[Demand, Demand]:
    """Scale 1 and origin 0."""
    return (
        Demand(value, "scale", lambda scale, _o: scale == 1, sentence),
        Demand(value, "origin", lambda _s, origin: origin == 0, sentence),
    )


def positive(value: ir.Value, node: ir.Node) -> Demand:
    """A scale above 0 (a known constant counts as such)."""
    sentence = f"{label(node)} takes only positive scales"
    return Demand(value, "scale", lambda scale, _o: scale > 0, sentence, of_sign=True)


def not_negative(value: ir.Value, node: ir.Node) -> Demand:
    """A scale of 0 or above."""
    sentence = f"{label(node)} takes no negative scale"
    return Demand(value, "scale", lambda scale, _o: scale >= 0, sentence, of_sign=True)


def readable(value: ir.Value, node: ir.Node) -> Demand:
    """No written constant: its channels could not be read back."""
    sentence = f"{label(node)} reads channels whose batch norm has gamma = 0"
    return Demand(value, "scale", lambda scale, _o: scale != 0, sentence)


def writable(value: ir.Value, node: ir.Node) -> Demand:
    """No known constant: nobody would tell its readers."""
    sentence = f"{label(node)} cannot make its output a known constant"
    return Demand(value, "scale", lambda scale, _o: np.isfinite(scale), sentence)


def no_shift(value: ir.Value, sentence: str, *, known_constants: bool = False) -> Demand:
    """Origin 0; with `known_constants`, channels of infinite scale may have any."""
    return Demand(
        value,
        "origin",
        lambda s, o: (o == 0) | (np.isinf(s) if known_constants else False),
        sentence,
    )


def only_along(value: ir.Value, axis: int, node: ir.Node) -> tuple[Demand, Demand]:
    """The gauge of this value varies along one axis alone."""
    rank = len(dims(value))

    def constant_elsewhere(array: Array) -> Mask:
        fits = all(n == 1 or i == axis % rank for i, n in enumerate(array.shape))
        return np.full(array.shape, fits)

    sentence = f"the channels of {label(node)} lie along axis {axis % rank} of '{value.name}' only"
    return (
        Demand(value, "scale", lambda scale, _o: constant_elsewhere(scale), sentence),
        Demand(value, "origin", lambda _s, origin: constant_elsewhere(origin), sentence),
    )
