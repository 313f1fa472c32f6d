"""Planning: choose gauges so that as many batch norms as possible disappear.

A batch norm y = s x + t disappears when its two sides become one tensor: scale_x = s * scale_y and
origin_y = s * origin_x + t. Each one is tried as a transaction. For the scale there are up to five
ways (all of it to x, all of it to y, sign and size apart, gamma = 0 told to the readers), for the
origin two (x moves or y moves); a change spreads along the ties of rules.py until nothing is left to
do or a demand is broken. Of the ways that work the one that touches the fewest values is taken.

A plan never changes the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from bnfold.affine import Array, Gauge, canonical
from bnfold.constants import constant
from bnfold.rules import (
    RULES,
    Opaque,
    Relations,
    Sum,
    Tie,
    bypass,
    constants_of_bypass,
    label,
    name_of,
    normalization_map,
    relations_of,
)

Layer = Literal["scale", "origin"]
# far above what any network needs; a plan that needs more is given up, never wrong
_MAX_CHOICES = 64


@dataclass(frozen=True)
class Removed:
    """A batch norm that disappears, and the nodes whose constants take it up."""

    name: str
    node: ir.Node
    into: tuple[str, ...]


@dataclass(frozen=True)
class Kept:
    """A batch norm that stays, and the one reason why."""

    name: str
    node: ir.Node
    reason: str


@dataclass(frozen=True)
class FoldPlan:
    """An assignment of gauges to the values of a model, and what it does to each batch norm."""

    model: ir.Model
    gauges: Mapping[ir.Value, Gauge]
    removed: tuple[Removed, ...]
    kept: tuple[Kept, ...]

    def gauge(self, value: ir.Value) -> Gauge:
        """The gauge of a value; identity where the plan says nothing."""
        found = self.gauges.get(value)
        return found if found is not None else Gauge.identity(len(value.shape or ()))


class Conflict(Exception):  # noqa: N818 - the normal end of a trial, not an error
    """Two gauges are asked of one value; the text says by whom."""


def plan(model: ir.Model, *, clone_weights: bool = True) -> FoldPlan:
    """Which batch norms of the model disappear, into what, and why the others stay.

    clone_weights: a weight that two nodes share may be written once for each of them; without it
    (torch modules, where both are one parameter) they must agree on the new weight.
    Raises InputError for statistics that no network can run with.
    """
    network = _Network(model, clone_weights)
    removed, kept = [], []
    for node in network.nodes:
        if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx"):
            continue
        reason = _unplannable(model, node)
        if reason is None:
            result = _remove(network, node)
            if isinstance(result, str):
                reason = result
            else:
                removed.append(Removed(name_of(node), node, result))
        if reason is not None:
            kept.append(Kept(name_of(node), node, reason))
    gauges = {v: g for v, g in network.gauges.items() if not g.is_identity}
    return FoldPlan(model, gauges, tuple(removed), tuple(kept))


def _unplannable(model: ir.Model, node: ir.Node) -> str | None:
    """Why this batch norm is not an affine map at all, if it is not."""
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    if opset < 7:
        return f"the model uses opset {opset}; convert it to opset 7 or newer first"
    try:
        normalization_map(node)
    except Opaque as why:
        return str(why)
    return None


# --- the network under plan ----------------------------------------------------------------------


@dataclass
class _Network:
    """The model's nodes with what they ask, and the gauges agreed so far."""

    model: ir.Model
    clone_weights: bool
    gauges: dict[ir.Value, Gauge] = field(default_factory=dict)
    gone: set[ir.Node] = field(default_factory=set)
    trying: ir.Node | None = None
    _relations: dict[ir.Node, Relations] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = [node for graph in self.model.graphs() for node in graph]

    def relations(self, node: ir.Node) -> Relations:
        if node not in self._relations:
            asks = bypass(node) if node in self.gone else relations_of(node)
            self._relations[node] = asks
        return self._relations[node]

    def remove(self, node: ir.Node) -> None:
        self.gone.add(node)
        self.trying = node
        self._relations.pop(node, None)

    def restore(self, node: ir.Node) -> None:
        self.gone.discard(node)
        self._relations.pop(node, None)

    def gauge(self, value: ir.Value) -> Gauge:
        found = self.gauges.get(value)
        return found if found is not None else Gauge.identity(len(value.shape or ()))

    def around(self, value: ir.Value) -> Iterator[ir.Node]:
        """The nodes that produce and read a value, each once."""
        producer = value.producer()
        seen = set()
        if producer is not None:
            seen.add(producer)
            yield producer
        for user, _ in value.uses():
            if user not in seen:
                seen.add(user)
                yield user


# --- one layer of gauges, spreading --------------------------------------------------------------


class _Wave:
    """New scales, or new origins, spreading from a change; NaN is "as before"."""

    def __init__(self, network: _Network, layer: Layer, scales: _Wave | None = None) -> None:
        self.network = network
        self.layer = layer
        self.scales = scales
        self.new: dict[ir.Value, Array] = {}
        self.queue: deque[ir.Node] = deque()
        self.undecided: dict[tuple[ir.Node, int], None] = {}
        # where an elementwise tie or a sum has itself derived one side from the other
        self.settled: dict[object, Array] = {}
        self.came_by: dict[ir.Value, ir.Node | None] = {}
        self.choices = 0

    def fork(self) -> _Wave:
        other = _Wave(self.network, self.layer, self.scales)
        other.new, other.queue = dict(self.new), deque(self.queue)
        other.undecided, other.settled = dict(self.undecided), dict(self.settled)
        other.came_by, other.choices = dict(self.came_by), self.choices
        return other

    def before(self, value: ir.Value) -> Array:
        gauge = self.network.gauge(value)
        if self.layer == "scale":
            return gauge.scale
        if self.scales is None:
            return gauge.origin
        # on channels that have just become constants an earlier origin means nothing
        now = self.scales.now(value)
        special = (now == 0) | np.isinf(now)
        was = (gauge.scale == 0) | np.isinf(gauge.scale)
        return np.where(special & ~was, 0.0, gauge.origin)

    def now(self, value: ir.Value) -> Array:
        """The number at a value as this wave leaves it."""
        old = self.before(value)
        new = self.new.get(value)
        return old if new is None else canonical(np.where(np.isnan(new), old, new))

    def known(self, value: ir.Value) -> Array:
        """The numbers this wave has set at a value, NaN elsewhere."""
        found = self.new.get(value)
        return found if found is not None else np.full((1,) * len(value.shape or ()), np.nan)

    def touched(self) -> list[ir.Value]:
        """The values whose numbers really change."""
        return [v for v in self.new if not np.array_equal(*_spread(self.now(v), self.before(v)))]

    def put(self, value: ir.Value, array: Array | None, by: ir.Node | None) -> None:
        """Ask for new numbers at a value; what they imply is queued. Raises Conflict."""
        if array is None:
            via = "the layer after it" if by is None else label(by)
            raise Conflict(f"{via} mixes channels or positions that need different numbers")
        if np.isnan(array).all():
            return
        self._check_place(value, array)
        had = self.known(value)
        clash = ~np.isnan(had) & ~np.isnan(array) & (had != array)
        if np.any(clash):
            raise Conflict(self._clash(value, clash))
        old = self.before(value)
        merged = canonical(np.where(np.isnan(had), array, had))
        self.new[value] = merged
        changed = ~np.isnan(array) & (array != old) & np.isnan(had)
        if not np.any(changed):
            return
        self.came_by.setdefault(value, by)
        if value.is_graph_input() or value.is_graph_output():
            side = "an input" if value.is_graph_input() else "an output"
            raise Conflict(f"'{value.name}' is {side} of the network and must keep its values")
        self._check_demands(value)
        self.queue.extend(node for node in self.network.around(value) if node is not by)

    def _check_place(self, value: ir.Value, array: Array) -> None:
        if value.shape is None:
            raise Conflict(f"the rank of '{value.name}' is not known")
        for axis, size in enumerate(array.shape):
            if size > 1 and value.shape[axis] != size:
                raise Conflict(f"the extent of '{value.name}' along axis {axis} is not known")

    def _clash(self, value: ir.Value, clash: Array) -> str:
        what = "scales" if self.layer == "scale" else "shifts"
        return f"two different {what} are asked of '{value.name}'{_channels(clash)}"

    def _check_demands(self, value: ir.Value) -> None:
        for node in self.network.around(value):
            for demand in self.network.relations(node).demands:
                if demand.value is value and demand.layer == self.layer:
                    scale = self.now(value) if self.scales is None else self.scales.now(value)
                    held = demand.holds(scale, self.now(value))
                    if not np.all(held):
                        raise Conflict(demand.sentence + _channels(~held) + self._path(value))

    def _path(self, value: ir.Value) -> str:
        """The batch norm, folded before, through which a change of sign came to this value."""
        if self.layer == "origin":
            return ""
        crossed = []
        node = self.came_by.get(value)
        seen = set()
        while node is not None and node not in seen:
            seen.add(node)
            if node in self.network.gone and node is not self.network.trying:
                crossed.append(f"'{name_of(node)}'")
            sources = [v for v in (*node.inputs, *node.outputs) if v is not None and v is not value]
            value = next((v for v in sources if v in self.came_by), value)
            node = self.came_by.get(value)
        if not crossed:
            return ""
        return f"; the folded batch norm {crossed[0]} needs the opposite sign on the same channels"

    # what the nodes imply

    def run(self) -> None:
        """Spread until nothing is left to imply. Raises Conflict."""
        while self.queue:
            self._visit(self.queue.popleft())

    def _visit(self, node: ir.Node) -> None:
        asks = self.network.relations(node)
        for tie in asks.scales if self.layer == "scale" else asks.origins:
            if tie.elementwise:
                self._cross_elementwise(tie, node)
            else:
                if tie.a in self.new:
                    self.put(tie.b, tie.forward(self.new[tie.a], self._scales), node)
                if tie.b in self.new:
                    self.put(tie.a, tie.backward(self.new[tie.b], self._scales), node)
        if self.layer == "origin":
            for index, total in enumerate(asks.sums):
                self._balance(total, node, index)

    def _scales(self, value: ir.Value) -> Array:
        return self.now(value) if self.scales is None else self.scales.now(value)

    def _cross_elementwise(self, tie: Tie, node: ir.Node) -> None:
        """Derive the unknown side of each channel; hold two known sides against each other.

        A channel that this tie has derived itself is not derived back: inverses cancel by
        construction, not up to rounding.
        """
        a, b = _spread(self.known(tie.a), self.known(tie.b))
        done = np.broadcast_to(self.settled.get(tie, np.zeros((1,) * a.ndim, dtype=bool)), a.shape)
        to_b = tie.forward(a, self._scales)
        to_a = tie.backward(b, self._scales)
        if to_b is None or to_a is None:
            raise Conflict(f"{label(node)} multiplies a shifted channel by 0")
        a, b, to_a, to_b, done = np.broadcast_arrays(a, b, to_a, to_b, done)
        both = ~np.isnan(a) & ~np.isnan(b) & ~done
        agree = (to_b == b) | (to_a == a) | (np.isnan(to_a) & np.isnan(to_b))
        if np.any(both & ~agree):
            raise Conflict(self._clash(tie.b, both & ~agree))
        derive_b = np.isnan(b) & ~np.isnan(to_b) & ~np.isnan(a)
        derive_a = np.isnan(a) & ~np.isnan(to_a) & ~np.isnan(b)
        self.settled[tie] = done | derive_a | derive_b
        self.put(tie.b, canonical(np.where(derive_b, to_b, np.nan)), node)
        self.put(tie.a, canonical(np.where(derive_a, to_a, np.nan)), node)

    def _sum_state(self, total: Sum) -> tuple[list[Array], Array, list[ir.Value]]:
        """Known masks of (result, terms...), the residue of the sum, and those values."""
        values = [total.result, *(term.value for term in total.terms)]
        known = [self.known(total.result)]
        now = [self.now(total.result)]
        for term in total.terms:
            known.append(term.lift(self.known(term.value)))
            now.append(term.lift(self.now(term.value)))
        known, now = _spread(*known), _spread(*now)
        residue = now[0].copy()
        for term, number in zip(total.terms, now[1:], strict=True):
            residue = residue - term.sign * number
        residue = np.broadcast_to(residue, np.broadcast_shapes(residue.shape, known[0].shape))
        masks = [np.broadcast_to(~np.isnan(k), residue.shape) for k in known]
        return masks, residue, values

    def _balance(self, total: Sum, node: ir.Node, index: int) -> None:
        """The last unknown of a sum is implied; with two or more unknown, a choice is left open."""
        masks, residue, values = self._sum_state(total)
        settled = np.broadcast_to(
            self.settled.get(total, np.zeros((1,) * residue.ndim, dtype=bool)), residue.shape
        )
        unknown = sum((~mask).astype(int) for mask in masks)
        wrong = (residue != 0) & ~settled
        if np.any(wrong & (unknown == 0)):
            raise Conflict(self._clash(total.result, wrong & (unknown == 0)))
        for position, value in enumerate(values):
            implied = wrong & (unknown == 1) & ~masks[position]
            if np.any(implied):
                self.settled[total] = settled = settled | implied
                self._give(total, position, value, residue, implied, node)
        if np.any(wrong & (unknown >= 2)):
            self.undecided[node, index] = None

    def _give(
        self,
        total: Sum,
        position: int,
        value: ir.Value,
        residue: Array,
        where: Array,
        node: ir.Node,
    ) -> None:
        """Let one value of a sum take the residue on some channels."""
        if position == 0:
            result = self.now(value) - residue
            self.put(value, canonical(np.where(where, result, np.nan)), node)
            return
        term = total.terms[position - 1]
        moved = term.lift(self.now(value)) + term.sign * residue
        self.put(value, term.lower(canonical(np.where(where, moved, np.nan))), node)


def _spread(*arrays: Array) -> list[Array]:
    return list(np.broadcast_arrays(*arrays))


def _channels(where: Array) -> str:
    """' (channels 3, 7, 12 and 4 more)' for the varying axis of a mask; '' if it is all of them."""
    where = canonical(where.astype(float)).astype(bool)
    if where.size == 1 or sum(n > 1 for n in where.shape) != 1:
        return ""
    found = np.flatnonzero(where.reshape(-1))
    shown = ", ".join(str(i) for i in found[:5])
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f" (channel{'s' if len(found) > 1 else ''} {shown}{more} of {where.size})"


def _settle(wave: _Wave) -> _Wave:
    """Run a wave to its end, choosing at each Add which branch takes a shift. Raises Conflict."""
    wave.run()
    while wave.undecided:
        (node, index), _ = wave.undecided.popitem()
        total = wave.network.relations(node).sums[index]
        masks, residue, values = wave._sum_state(total)
        open_ = (residue != 0) & (sum((~m).astype(int) for m in masks) >= 2)
        if not np.any(open_):
            continue
        if wave.choices >= _MAX_CHOICES:
            raise Conflict(f"too many ways to share a shift at {label(node)}")
        return _choose(wave, node, total, masks, residue, values)
    return wave


def _choose(
    wave: _Wave,
    node: ir.Node,
    total: Sum,
    masks: list[Array],
    residue: Array,
    values: list[ir.Value],
) -> _Wave:
    """Try the branches whose producer absorbs anything first, then the result, then the others."""
    unknown = sum((~mask).astype(int) for mask in masks)

    def reluctance(position: int) -> int:
        producer = values[position].producer() if position else None
        bound = producer is None or _binds_origin(wave.network, producer, values[position])
        return (2 if bound else 0) if position else 1

    failure: Conflict | None = None
    for position in sorted(range(len(values)), key=reluctance):
        where = (residue != 0) & (unknown >= 2) & ~masks[position]
        if not np.any(where):
            continue
        trial = wave.fork()
        trial.choices += 1
        settled = trial.settled.get(total, np.zeros((1,) * residue.ndim, dtype=bool))
        trial.settled[total] = settled | where
        try:
            trial._give(total, position, values[position], residue, where, node)
            return _settle(trial)
        except Conflict as conflict:
            failure = failure or conflict
    raise failure or Conflict(f"no branch of {label(node)} takes the shift")


def _binds_origin(network: _Network, node: ir.Node, value: ir.Value) -> bool:
    asks = network.relations(node)
    tied = any(value in (tie.a, tie.b) for tie in asks.origins)
    return tied or bool(asks.sums) or node.op_type not in RULES


# --- one batch norm as a transaction -------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """A way that works: the waves, and how many values they touch."""

    scales: _Wave
    origins: _Wave
    cost: int


def _remove(network: _Network, node: ir.Node) -> tuple[str, ...] | str:
    """Try to make one batch norm disappear: what takes it up, or the reason why it stays."""
    network.remove(node)
    best: _Trial | None = None
    failures: dict[str, str] = {}
    for side, scale_seeds in _scale_ways(network, node):
        try:
            scales = _Wave(network, "scale")
            _seed(scales, node, scale_seeds)
        except Conflict as conflict:
            failures.setdefault(side, str(conflict))
            continue
        for origin_side in ("x", "y"):
            try:
                trial = _try_origins(network, node, scales, origin_side)
            except Conflict as conflict:
                failures.setdefault(origin_side, str(conflict))
                continue
            if best is None or trial.cost < best.cost:
                best = trial
    if best is None:
        network.restore(node)
        return _reason(failures)
    return _commit(network, node, best)


def _scale_ways(network: _Network, node: ir.Node) -> Iterator[tuple[str, dict[str, Array]]]:
    """The new scales at x and y to try: {"x": ..., "y": ...}, NaN where a side stays as it is."""
    s = normalization_map(node).scale
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    scale_x, scale_y = network.gauge(x).scale, network.gauge(y).scale
    zero = s == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        to_x, to_y = s * scale_y, np.where(zero, np.inf, scale_x / s)
        sign_x = np.where(zero, np.nan, np.abs(scale_x) * np.sign(to_x))
        sign_y = np.where(zero, np.inf, np.sign(scale_x) * np.sign(s) * np.abs(scale_y))
        told = np.where(zero, np.inf, np.nan)
    yield "x", {"x": to_x}
    if np.any(zero):
        yield "x", {"x": np.where(zero, np.nan, to_x), "y": told}
    yield "y", {"y": to_y}
    if np.any(s < 0):
        with np.errstate(divide="ignore", invalid="ignore"):
            yield "y", {"x": sign_x, "y": np.where(zero, np.inf, sign_x / s)}
            yield "x", {"x": np.where(zero, np.nan, sign_y * s), "y": sign_y}


def _seed(wave: _Wave, node: ir.Node, seeds: Mapping[str, Array]) -> None:
    """Put the first numbers on both sides of the batch norm and let them spread."""
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    tie = (bypass_tie := wave.network.relations(node)).scales[0]
    if wave.layer == "origin":
        tie = bypass_tie.origins[0]
    masks = [~np.isnan(array) for array in seeds.values()]
    wave.settled[tie] = np.logical_or.reduce(np.broadcast_arrays(*masks))
    for value, side in ((x, "x"), (y, "y")):
        if side in seeds:
            wave.put(value, canonical(seeds[side]), node)
    wave.run()


def _try_origins(network: _Network, node: ir.Node, scales: _Wave, side: str) -> _Trial:
    m = normalization_map(node)
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    wave = _Wave(network, "origin", scales)
    tie = network.relations(node).origins[0]
    constants = constants_of_bypass(node, scales.now, wave.now)
    regular = m.scale != 0
    if side == "x":
        moved = {"x": tie.backward(wave.before(y), scales.now)}
    else:
        moved = {"y": tie.forward(wave.before(x), scales.now)}
    seeds = {}
    for key, value in (("x", x), ("y", y)):
        wanted = moved.get(key)
        array = (
            np.full(m.scale.shape, np.nan) if wanted is None else np.where(regular, wanted, np.nan)
        )
        if value in constants:
            array = np.where(np.isnan(constants[value]), array, constants[value])
        seeds[key] = array
    _seed(wave, node, seeds)
    _restate_constants(network, scales, wave, node)
    wave = _settle(wave)
    _check_special(network, scales, wave)
    if not network.clone_weights:
        _check_shared(network, scales, wave)
    touched = {*scales.touched(), *wave.touched()}
    return _Trial(scales, wave, len(touched))


def _restate_constants(network: _Network, scales: _Wave, wave: _Wave, but: ir.Node) -> None:
    """Batch norms already gone, with gamma = 0 somewhere: their constants follow a new scale."""
    for value in scales.touched():
        for node in network.around(value):
            if node in network.gone and node is not but:
                for target, array in constants_of_bypass(node, scales.now, wave.now).items():
                    wave.put(target, canonical(array), node)


def _check_special(network: _Network, scales: _Wave, wave: _Wave) -> None:
    """Origin demands at values whose scale alone has changed."""
    for value in scales.touched():
        if value not in wave.new:
            wave._check_demands(value)


def _check_shared(network: _Network, scales: _Wave, wave: _Wave) -> None:
    """A parameter read in several places must be asked for one new value in all of them."""
    values = {*scales.touched(), *wave.touched()}

    def gauge(value: ir.Value) -> Gauge:
        return Gauge(scales.now(value), wave.now(value))

    for node in {n for value in values for n in network.around(value)}:
        rule = RULES.get(node.op_type)
        if node in network.gone or rule is None or rule.rewrite is None:
            continue
        for slot in rule.constants(node):
            held = constant(node.inputs[slot]) if slot < len(node.inputs) else None
            if held is None or len(readers := _readers(held.root)) < 2:
                continue
            asked = []
            for reader, at in readers:
                other = RULES.get(reader.op_type)
                if other is None or other.rewrite is None or reader in network.gone:
                    asked.append(held.array)
                    continue
                asked.append(other.rewrite(reader, gauge).get(at, held.array))
            if any(a.shape != asked[0].shape or not np.array_equal(a, asked[0]) for a in asked[1:]):
                raise Conflict(
                    f"the parameter '{held.root.name}' is used by {len(readers)} layers, which"
                    " would need different values of it"
                )


def _readers(root: ir.Value) -> list[tuple[ir.Node, int]]:
    """Every operator slot that reads a constant, directly or through views."""
    found: list[tuple[ir.Node, int]] = []
    for node, slot in root.uses():
        through = constant(node.outputs[0]) if node.outputs else None
        if through is not None and through.root is root:
            found.extend(_readers(node.outputs[0]))
        else:
            found.append((node, slot))
    return found


def _commit(network: _Network, node: ir.Node, trial: _Trial) -> tuple[str, ...]:
    touched = {*trial.scales.touched(), *trial.origins.touched()}
    fresh = {value: Gauge(trial.scales.now(value), trial.origins.now(value)) for value in touched}
    network.gauges.update(fresh)
    takers: dict[str, None] = {}
    for value in touched:
        for other in network.around(value):
            rule = RULES.get(other.op_type)
            if other not in network.gone and rule is not None and rule.rewrite is not None:
                if rule.constants(other):
                    takers[_layer_name(other)] = None
    return tuple(takers)


def _layer_name(node: ir.Node) -> str:
    """The name of the layer that holds a node's weight, or the node's own."""
    rule = RULES[node.op_type]
    if node.op_type == "BatchNormalization":
        return name_of(node)
    held = constant(node.inputs[rule.constants(node)[0]])
    root = held.root.name if held is not None else None
    if root and root.endswith(".weight"):
        return root.removesuffix(".weight")
    return node.name or node.outputs[0].name or node.op_type


def _reason(failures: Mapping[str, str]) -> str:
    """One sentence from what stopped the two directions."""
    back, ahead = failures.get("x"), failures.get("y")
    if back and ahead and back != ahead:
        return f"backward: {back}. Forward: {ahead}"
    return back or ahead or "no way works"
