"""How a change of gauges spreads through a network.

Scales obey equations of their own, and so do origins once the scales are known; a `Wave` is the
change of one of the two. It starts from the numbers put at the two sides of a batch norm and
follows ties and sums until nothing is left to imply, or until a demand is broken. Numbers are
partial: NaN means "as before", channel by channel. A wave never changes what the network has
agreed, and notes which values it reached.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array, Mask, canonical
from bnfold.folding.network import Network
from bnfold.folding.rules import rule_of
from bnfold.folding.rules.node import label, name_of
from bnfold.folding.rules.normalization import constants_of_bypass
from bnfold.folding.rules.relations import Sum, Tie

Layer = Literal["scale", "origin"]
# far above what any network needs; a plan that needs more is given up, never wrong
_MAX_CHOICES = 256
_NOWHERE = np.zeros((), dtype=bool)


class Conflict(Exception):  # noqa: N818 - the normal end of a trial, not an error
    """Two gauges are asked of one value; the text says by whom."""


class Wave:
    """New scales, or (given the wave of the scales) new origins."""

    def __init__(self, network: Network, scales: Wave | None = None) -> None:
        self.network = network
        self.scales = scales
        self.layer: Layer = "scale" if scales is None else "origin"
        self.new: dict[ir.Value, Array] = {}
        self._now: dict[ir.Value, Array] = {}
        # what is left to do, in turn: a node, and the value beside it whose numbers have changed
        self._queue: OrderedDict[tuple[ir.Node, ir.Value], None] = OrderedDict()
        self._undecided: dict[tuple[ir.Node, Sum], None] = {}
        # where an elementwise tie or a sum has itself derived one side from the others
        self._settled: dict[Tie | Sum, Mask] = {}
        self._came_by: dict[ir.Value, ir.Node | None] = {}
        # what is left of the choices that one trial may make, shared by its forks
        self._budget = [_MAX_CHOICES]

    def _fork(self) -> Wave:
        other = Wave(self.network, self.scales)
        other.new, other._queue = dict(self.new), self._queue.copy()
        other._undecided, other._settled = dict(self._undecided), dict(self._settled)
        other._came_by, other._budget = dict(self._came_by), self._budget
        return other

    # --- numbers at a value

    def before(self, value: ir.Value) -> Array:
        """The number at a value before this wave."""
        gauge = self.network.gauge(value)
        if self.scales is None:
            return gauge.scale
        # on channels that have only now become constants an earlier origin means nothing
        now = self.scales.now(value)
        if now is gauge.scale:
            return gauge.origin
        special = (now == 0) | np.isinf(now)
        was = (gauge.scale == 0) | np.isinf(gauge.scale)
        return np.where(special & ~was, 0.0, gauge.origin)

    def known(self, value: ir.Value) -> Array:
        """The numbers that this wave has set at a value, NaN elsewhere."""
        found = self.new.get(value)
        return found if found is not None else np.full((1,) * len(value.shape or ()), np.nan)

    def now(self, value: ir.Value) -> Array:
        """The number at a value as this wave leaves it."""
        if value not in self._now:
            old, new = self.before(value), self.new.get(value)
            merged = old if new is None else canonical(np.where(np.isnan(new), old, new))
            self._now[value] = merged
        return self._now[value]

    def scale_now(self, value: ir.Value) -> Array:
        """The scale at a value, whichever of the two this wave is about."""
        return self.now(value) if self.scales is None else self.scales.now(value)

    def touched(self) -> list[ir.Value]:
        """The values whose numbers really change."""
        return [value for value in self.new if np.any(self.now(value) != self.before(value))]

    # --- asking for numbers

    def start(self, tie: Tie, numbers: dict[ir.Value, Array], by: ir.Node) -> None:
        """Put the first numbers at the sides of a tie that is thereby settled; let them spread."""
        unset = np.full((1,), np.nan)
        a, b = numbers.get(tie.a, unset), numbers.get(tie.b, unset)
        self._settled[tie] = ~np.isnan(a) | ~np.isnan(b)
        # the side that is not asked for is held where it is, unless the other says nothing about it
        ahead, back = tie.forward(a, self.scale_now), tie.backward(b, self.scale_now)
        for value, array, implied in ((tie.a, a, back), (tie.b, b, ahead)):
            held = np.isnan(array) & ~np.isnan(np.nan if implied is None else implied)
            self.put(value, canonical(np.where(held, self.before(value), array)), by)
        self._run()

    def put(self, value: ir.Value, array: Array | None, by: ir.Node) -> None:
        """Ask for new numbers at a value; what they imply is queued. Raises Conflict."""
        if array is None:
            raise Conflict(f"{label(by)} mixes channels or positions that need different numbers")
        if np.isnan(array).all():
            return
        self.network.visited.add(value)
        self._check_place(value, array)
        had, news = self.new.get(value), ~np.isnan(array)
        if had is not None:
            open_ = np.isnan(had)
            clash = ~open_ & news & (had != array)
            if clash.any():
                raise self._clash(value, clash)
            news = news & open_
            if not news.any():
                return
            array = np.where(open_, array, had)
        self.new[value] = canonical(array)
        self._now.pop(value, None)
        self._check_facts(value)
        if not (news & (array != self.before(value))).any():
            return
        self._came_by.setdefault(value, by)
        if value.is_graph_input() or value.is_graph_output():
            side = "an input" if value.is_graph_input() else "an output"
            raise Conflict(f"'{value.name}' is {side} of the network and must keep its values")
        if value.producer() is None:
            raise Conflict(f"'{value.name}' is a constant that is used as data and stays as it is")
        self.check_demands(value)
        self._queue.update(((node, value), None) for node in self.network.around(value))

    def check_demands(self, value: ir.Value) -> None:
        """Hold the numbers at a value against what its nodes demand. Raises Conflict."""
        for node in self.network.around(value):
            for demand in self.network.relations(node).demands:
                if demand.value is value and demand.layer == self.layer:
                    held = demand.holds(self.scale_now(value), self.now(value))
                    if not np.all(held):
                        path = self._path(value) if demand.of_sign else ""
                        raise Conflict(demand.sentence + _channels(~held) + path)

    def _check_facts(self, value: ir.Value) -> None:
        """A channel that was known to be a constant and still is keeps that constant."""
        if self.scales is not None:
            gauge = self.network.gauge(value)
            known = np.isinf(gauge.scale) & np.isinf(self.scales.now(value))
            if np.any(known & (self.now(value) != gauge.origin)):
                raise Conflict(f"some channels of '{value.name}' are known to be constants")

    def _check_place(self, value: ir.Value, array: Array) -> None:
        if value.shape is None:
            raise Conflict(f"the rank of '{value.name}' is not known")
        if len(array.shape) != len(value.shape):
            raise Conflict(f"'{value.name}' is declared with a rank that it does not have")
        for axis, size in enumerate(array.shape):
            if size > 1 and value.shape[axis] != size:
                raise Conflict(f"the extent of '{value.name}' along axis {axis} is not known")

    def _clash(self, value: ir.Value, where: Mask) -> Conflict:
        what = "scales" if self.layer == "scale" else "shifts"
        return Conflict(f"two different {what} are asked of '{value.name}'{_channels(where)}")

    def _path(self, value: ir.Value) -> str:
        """The batch norm, folded before, through which a change of scale came to this value."""
        node, seen = self._came_by.get(value), set[ir.Node]()
        while self.layer == "scale" and node is not None and node not in seen:
            seen.add(node)
            if node in self.network.gone and node is not self.network.trying:
                other = name_of(node)
                return f"; the folded batch norm '{other}' needs the other sign on those channels"
            around = [v for v in (*node.inputs, *node.outputs) if v is not None and v is not value]
            value = next((v for v in around if v in self._came_by), value)
            node = self._came_by.get(value)
        return ""

    # --- what the nodes imply

    def settle(self) -> Wave:
        """Spread to the end, choosing at each sum which branch takes a shift. Raises Conflict.

        The wave that comes back holds the result; this one may be left half-way.
        """
        self._run()
        while self._undecided:
            (node, total), _ = self._undecided.popitem()
            self._balance(total, node)  # it may have become determined meanwhile
            self._run()
            self._undecided.pop((node, total), None)
            masks, residue = self._state(total)
            if np.any((residue != 0) & (_count_unknown(masks) >= 2)):
                return self._choose(node, total)
        return self

    def follow_scales(self, besides: ir.Node | None = None) -> Wave:
        """Origins, spread to the end after the scales have changed. Raises Conflict.

        Where gamma = 0 in a batch norm that is gone, its constant follows the scale; besides: the
        one whose constants have been put already.
        """
        assert self.scales is not None
        touched = self.scales.touched()
        for node in (node for value in touched for node in self.network.around(value)):
            if node in self.network.gone and node is not besides:
                m = self.network.map_of(node)
                found = constants_of_bypass(m.x, m.y, m.affine, self.scales.now, self.now)
                for place, array in found.items():
                    self.put(place, array, node)
        wave = self.settle()
        for value in touched:
            wave.check_demands(value)
        return wave

    def _run(self) -> None:
        while self._queue:
            (node, changed), _ = self._queue.popitem(last=False)
            asks = self.network.relations(node)
            for tie in asks.scales if self.layer == "scale" else asks.origins:
                if tie.elementwise:
                    self._cross_elementwise(tie, node)
                elif tie.a is changed:
                    self.put(tie.b, tie.forward(self.new[tie.a], self.scale_now), node)
                elif tie.b is changed:
                    self.put(tie.a, tie.backward(self.new[tie.b], self.scale_now), node)
            for total in asks.sums if self.layer == "origin" else ():
                self._balance(total, node)

    def _cross_elementwise(self, tie: Tie, node: ir.Node) -> None:
        """Derive the unknown side of each channel; hold two known sides against each other.

        A channel that this tie has derived itself is not derived back: inverses cancel by
        construction, not up to rounding.
        """
        a, b = self.known(tie.a), self.known(tie.b)
        ahead, back = tie.forward(a, self.scale_now), tie.backward(b, self.scale_now)
        if ahead is None or back is None:
            raise Conflict(f"{label(node)} multiplies a shifted channel by 0")
        a, b, ahead, back = np.broadcast_arrays(a, b, ahead, back)
        has_a, has_b = ~np.isnan(a), ~np.isnan(b)
        done = self._settled.get(tie, _NOWHERE)
        silent = np.isnan(ahead) & np.isnan(back)
        wrong = has_a & has_b & ~done & (ahead != b) & (back != a) & ~silent
        if np.any(wrong):
            raise self._clash(tie.b, wrong)
        to_b, to_a = has_a & ~has_b & ~np.isnan(ahead), has_b & ~has_a & ~np.isnan(back)
        self._settled[tie] = done | to_a | to_b
        self.put(tie.b, canonical(np.where(to_b, ahead, np.nan)), node)
        self.put(tie.a, canonical(np.where(to_a, back, np.nan)), node)

    # --- sums

    def _state(self, total: Sum) -> tuple[list[Mask], Array]:
        """Which of (result, terms...) this wave has set, and result - sum(terms) as it stands."""
        self.network.visited.update((total.result, *(term.value for term in total.terms)))
        known = [self.known(total.result)]
        now = [self.now(total.result)]
        for term in total.terms:
            known.append(term.lift(self.known(term.value)))
            now.append(term.lift(self.now(term.value)))
        spread = np.broadcast_arrays(*known, *now)
        residue = spread[len(known)].copy()
        for term, number in zip(total.terms, spread[len(known) + 1 :], strict=True):
            residue -= term.sign * number
        return [~np.isnan(array) for array in spread[: len(known)]], residue

    def _balance(self, total: Sum, node: ir.Node) -> None:
        """The last unknown of a sum is implied; with two or more unknown, a choice is left open."""
        masks, residue = self._state(total)
        unknown = _count_unknown(masks)
        done = self._settled.get(total, _NOWHERE)
        wrong = (residue != 0) & ~done
        if np.any(wrong & (unknown == 0)):
            raise self._clash(total.result, wrong & (unknown == 0))
        for position in range(len(masks)):
            implied = wrong & (unknown == 1) & ~masks[position]
            if np.any(implied):
                self._give(total, position, residue, implied, node)
        if np.any(wrong & (unknown >= 2)):
            self._undecided[node, total] = None

    def _give(self, total: Sum, position: int, residue: Array, where: Mask, node: ir.Node) -> None:
        """Let the result (position 0) or a term take the residue on some channels."""
        self._settled[total] = self._settled.get(total, _NOWHERE) | where
        if position == 0:
            moved = self.now(total.result) - residue
            self.put(total.result, canonical(np.where(where, moved, np.nan)), node)
            return
        term = total.terms[position - 1]
        moved = term.lift(self.now(term.value)) + term.sign * residue
        self.put(term.value, term.lower(canonical(np.where(where, moved, np.nan))), node)

    def _choose(self, node: ir.Node, total: Sum) -> Wave:
        """Try the branches whose producer absorbs anything, then the result, then the others."""
        masks, residue = self._state(total)
        open_ = (residue != 0) & (_count_unknown(masks) >= 2)
        failure: Conflict | None = None
        for position in sorted(range(len(masks)), key=lambda i: self._reluctance(total, i)):
            where = open_ & ~masks[position]
            if not np.any(where):
                continue
            if not self._budget[0]:
                raise Conflict(f"there are too many ways to share a shift at {label(node)}")
            self._budget[0] -= 1
            trial = self._fork()
            try:
                trial._hold(total, position, where, node)
                trial._give(total, position, residue, where, node)
                return trial.settle()
            except Conflict as conflict:
                failure = failure or conflict
        raise failure or Conflict(f"no branch of {label(node)} takes the shift")

    def _hold(self, total: Sum, taker: int, where: Mask, node: ir.Node) -> None:
        """Keep everything but the taker as it is where the taker settles the sum."""
        for position in range(len(total.terms) + 1):
            if position == taker:
                continue
            if position == 0:
                now = self.now(total.result)
                self.put(total.result, canonical(np.where(where, now, np.nan)), node)
            else:
                term = total.terms[position - 1]
                now = np.where(where, term.lift(self.now(term.value)), np.nan)
                self.put(term.value, term.lower(canonical(now)), node)

    def _reluctance(self, total: Sum, position: int) -> int:
        """0 for a branch whose producer leaves its origin free, 1 for the result, 2 otherwise."""
        if position == 0:
            return 1
        value = total.terms[position - 1].value
        producer = value.producer()
        if producer is None or rule_of(producer) is None:
            return 2
        asks = self.network.relations(producer)
        tied = any(value in (tie.a, tie.b) for tie in asks.origins) or bool(asks.sums)
        return 2 if tied else 0


def _count_unknown(masks: list[Mask]) -> Array:
    return np.asarray(sum(np.where(mask, 0.0, 1.0) for mask in masks))


def _channels(where: Mask) -> str:
    """' (channels 3, 7 and 4 more of 64)' for the one varying axis of a mask; '' for all of it."""
    where = canonical(where.astype(float)).astype(bool)
    if where.size == 1 or sum(n > 1 for n in where.shape) != 1:
        return ""
    found = np.flatnonzero(where.reshape(-1))
    shown = ", ".join(str(i) for i in found[:5])
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f" (channel{'s' if len(found) > 1 else ''} {shown}{more} of {where.size})"
