"""Planning: choose gauges so that as many batch norms as possible disappear.

A batch norm y = s x + t disappears when its two sides become one tensor: scale_x = s * scale_y and
origin_y = s * origin_x + t. Each one is tried as a transaction. For the scale there are up to five
ways (all of it to x, all of it to y, sign and size apart, gamma = 0 told to the readers), for the
origin two (x moves or y moves). Scale to x and origin to x is folding backward, both to y is
folding forward; size to y and origin to x passes a Relu and telescopes whole residual streams. Of
the ways that work the one that touches the fewest values is taken.

A plan never changes the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array, Gauge
from bnfold.folding.constants import Constant, constant, readers
from bnfold.folding.holds import broken
from bnfold.folding.network import Network
from bnfold.folding.rules import RULES, constant_slots, is_batch_norm
from bnfold.folding.rules.node import Opaque, input_of, name_of, real, weights
from bnfold.folding.rules.normalization import constants_of_bypass, normalization_map
from bnfold.folding.rules.relations import Gauges
from bnfold.folding.wave import Conflict, Wave


@dataclass(frozen=True)
class Removed:
    """A batch norm that disappears, and the layers whose constants take it up."""

    name: str
    node: ir.Node
    into: tuple[str, ...]


@dataclass(frozen=True)
class Kept:
    """A batch norm that stays, and the reason why."""

    name: str
    node: ir.Node
    reason: str


@dataclass(frozen=True)
class FoldPlan:
    """An assignment of gauges to the values of a model, and what becomes of each batch norm."""

    model: ir.Model
    gauges: Mapping[ir.Value, Gauge]
    removed: tuple[Removed, ...]
    kept: tuple[Kept, ...]

    def gauge(self, value: ir.Value) -> Gauge:
        """The gauge of a value; identity where the plan says nothing."""
        found = self.gauges.get(value)
        return found if found is not None else Gauge.identity(len(value.shape or ()))


@dataclass(frozen=True)
class Scope:
    """What may change where the result goes back into a torch module: all by name.

    parameters: the names of its state_dict. layers: the modules that can be given a bias.
    norms: the modules that can become an Identity, each called once.
    """

    parameters: frozenset[str]
    layers: frozenset[str]
    norms: frozenset[str]


def plan(model: ir.Model, scope: Scope | None = None) -> FoldPlan:
    """Which batch norms of the model disappear, into what, and why the others stay.

    scope: restricts the plan to what a torch module can take back; without it every constant may
    change, and a weight that two nodes share may be written once for each of them.
    Raises InputError for statistics that no network can run with.
    """
    network = Network(model)
    outcomes: dict[ir.Node, tuple[str, ...] | str] = {
        node: "" for node in network.nodes if is_batch_norm(node)
    }
    progress = True
    while progress:  # a batch norm that goes can free one that was tried before it
        progress = False
        for node, before in outcomes.items():
            if isinstance(before, str):
                outcomes[node] = _why_no_map(model, node) or _remove(network, node, scope)
                progress |= isinstance(outcomes[node], tuple)
    removed = [Removed(name_of(n), n, o) for n, o in outcomes.items() if isinstance(o, tuple)]
    kept = [Kept(name_of(n), n, o) for n, o in outcomes.items() if isinstance(o, str)]
    gauges = {value: g for value, g in network.gauges.items() if not g.is_identity}
    return FoldPlan(model, gauges, tuple(removed), tuple(kept))


def _why_no_map(model: ir.Model, node: ir.Node) -> str | None:
    """Why this batch norm is no fixed affine map, if it is none."""
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    if opset < 7:
        return f"the model uses opset {opset}; convert it to opset 7 or newer first"
    try:
        normalization_map(node)
    except Opaque as why:
        return str(why)
    return None


# --- one batch norm as a transaction -------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """A way that works: the new scales and origins."""

    scales: Wave
    origins: Wave

    @cached_property
    def touched(self) -> list[ir.Value]:
        return list(dict.fromkeys((*self.scales.touched(), *self.origins.touched())))

    def gauge(self, value: ir.Value) -> Gauge:
        return Gauge(self.scales.now(value), self.origins.now(value))


def _remove(network: Network, node: ir.Node, scope: Scope | None) -> tuple[str, ...] | str:
    """Make one batch norm disappear: the layers that take it up, or the reason why it stays."""
    if scope is not None and name_of(node) not in scope.norms:
        return "it is not a batch norm module of its own, called once, that could be taken out"
    network.try_without(node)
    best: _Trial | None = None
    failures: dict[str, str] = {}
    for side, numbers in _scale_ways(network, node):
        try:
            scales = Wave(network)
            scales.start(network.relations(node).scales[0], numbers, node)
        except Conflict as conflict:
            failures.setdefault(side, str(conflict))
            continue
        for origin_side in ("x", "y"):
            if best is not None and len(scales.touched()) >= len(best.touched):
                break
            try:
                trial = _Trial(scales, _move_origin(network, node, scales, origin_side))
                _check_result(network, trial)
                _check_precision(network, trial)
                _check_cost(network, trial)
                if scope is not None:
                    _check_scope(network, trial, scope)
                if best is None or len(trial.touched) < len(best.touched):
                    best = trial
            except Conflict as conflict:
                failures.setdefault(origin_side, str(conflict))
    if best is None:
        network.put_back(node)
        return _reason(failures)
    network.gauges.update({value: best.gauge(value) for value in best.touched})
    return _takers(network, best.touched)


def _scale_ways(network: Network, node: ir.Node) -> Iterator[tuple[str, dict[ir.Value, Array]]]:
    """The new scales at x and y to try, each with the side that takes the size; NaN: as it is."""
    s = network.map_of(node).scale
    x, y = input_of(node, 0), node.outputs[0]
    zero = s == 0
    scale_x, scale_y = network.gauge(x).scale, network.gauge(y).scale
    with np.errstate(divide="ignore", invalid="ignore"):
        all_x = s * scale_y
        yield "x", {x: all_x}
        if np.any(zero):
            # gamma = 0: the output is a constant; its readers may be told instead of its writer
            told = np.where(zero, np.inf, np.nan)
            yield "x", {x: np.where(zero, np.nan, all_x), y: told}
        yield "y", {y: np.where(zero, np.inf, scale_x / s)}
        if np.any(s < 0):
            known = zero | np.isinf(scale_x)
            sign = np.where(known, np.nan, np.abs(scale_x) * np.sign(all_x))
            yield "y", {x: sign, y: np.where(known, np.inf, sign / s)}
            flipped = np.where(zero, np.inf, np.sign(scale_x / s) * np.abs(scale_y))
            yield "x", {x: np.where(zero, np.nan, s * flipped), y: flipped}


def _move_origin(network: Network, node: ir.Node, scales: Wave, side: str) -> Wave:
    """The origins, given the scales, if one side of the batch norm moves. Raises Conflict."""
    x, y = input_of(node, 0), node.outputs[0]
    wave, m = Wave(network, scales), network.map_of(node)
    tie = network.relations(node).origins[0]
    to_x = tie.backward(wave.before(y), scales.now)
    to_y = tie.forward(wave.before(x), scales.now)
    assert to_x is not None  # a bypass answers for every channel
    assert to_y is not None
    # what is known of x is a fact; only y can follow
    moves_y = np.isinf(scales.now(x)) if side == "x" else np.True_
    numbers = {
        x: np.where((m.scale != 0) & ~moves_y, to_x, np.nan),
        y: np.where((m.scale != 0) & moves_y, to_y, np.nan),
    }
    for place, array in constants_of_bypass(node, m, scales.now, wave.now).items():
        before = numbers.get(place, np.nan)
        numbers[place] = np.where(np.isnan(array), before, array)
    wave.start(tie, numbers, node)
    for touched in scales.touched():
        for other in network.around(touched):
            if other in network.gone and other is not node:
                # gamma = 0 in a batch norm that is gone already: its constant follows the scale
                for place, array in constants_of_bypass(
                    other, network.map_of(other), scales.now, wave.now
                ).items():
                    wave.put(place, array, other)
    wave = wave.settle()
    for touched in scales.touched():
        wave.check_demands(touched)
    return wave


def _check_result(network: Network, trial: _Trial) -> None:
    """Read the whole result back, knowing nothing of how it was found. Raises Conflict."""
    around = {node for value in trial.touched for node in network.around(value)}
    assert network.trying is not None
    fault = broken(network, {network.trying, *around}, trial.scales.now, trial.origins.now)
    if fault is not None:
        raise Conflict(fault)


# Measured on pre-activation networks: a stream moved 18 of its spreads away from its mean costs a
# factor 1.8 in R, 45 spreads 3, 300 spreads 22. Where there is no such channel nothing changes.
_FARTHEST = 32


def _check_precision(network: Network, trial: _Trial) -> None:
    """A value that several layers read stays near its own mean. Raises Conflict.

    A batch norm knows mean and spread of what it reads. A channel of small gamma and ordinary beta
    asks for an origin beta / gamma spreads away, and the digits that this costs are lost to the
    other readers, of this value or of one that it is only a view of.
    """
    moved = trial.origins.touched()
    if all(len({user for user, _ in value.uses()}) < 2 for value in moved):
        return
    norms = {user for value in moved for user, _ in value.uses() if is_batch_norm(user)}
    assert network.trying is not None
    for node in {network.trying, *norms}:
        if _why_no_map(network.model, node):
            continue
        value, shape = input_of(node, 0), network.map_of(node).scale.shape
        mean = weights(node, 3).reshape(shape)
        spread = np.sqrt(weights(node, 4).reshape(shape) + real(node, "epsilon", 1e-5))
        scale = trial.scales.now(value)
        distance = np.abs(mean - trial.origins.now(value))
        far = distance > np.maximum(np.abs(mean), _FARTHEST * spread)
        far &= np.isfinite(scale) & (scale != 0)
        if np.any(far):
            raise Conflict(
                f"'{name_of(node)}' would see '{value.name}' moved"
                f" {np.max(np.where(far, distance / spread, 0)):.0f} of its spreads away, which"
                " would cost the other layers that read it their digits"
            )


def _check_cost(network: Network, trial: _Trial) -> None:
    """One operator goes; no more than one may come. Raises Conflict."""
    around = {node for value in trial.touched for node in network.around(value)}
    products = [node for node in around if node.op_type == "MatMul"]
    added = sum(
        _needs_bias(network, node, trial.gauge) and not _needs_bias(network, node, network.gauge)
        for node in products
    )
    if added > 1:
        raise Conflict(f"it would put {added} additions in the place of one batch norm")


def _needs_bias(network: Network, node: ir.Node, gauge: Gauges) -> bool:
    """True for a MatMul that, with these gauges, needs an Add behind it."""
    slots = _constant_slots(network, node)
    rewrite = RULES[node.op_type].rewrite if slots else None
    return rewrite is not None and bool(np.any(rewrite(node, gauge)[2]))


def _check_scope(network: Network, trial: _Trial, scope: Scope) -> None:
    """Every constant that changes must be a parameter of the module. Raises Conflict."""
    for node in {node for value in trial.touched for node in network.around(value)}:
        slots = _constant_slots(network, node)
        rewrite = RULES[node.op_type].rewrite if slots else None
        for slot, array in rewrite(node, trial.gauge).items() if rewrite else ():
            held = constant(node.inputs[slot]) if slot < len(node.inputs) else None
            if held is None:
                layer, weight = _layer_name(node, slots[0]), constant(node.inputs[slots[0]])
                if not np.any(array):
                    continue
                if layer not in scope.layers or array.ndim != 1:
                    raise Conflict(f"'{layer}' is no module that could be given a bias")
                if weight is None or len(readers(weight.root)) > 1:
                    raise Conflict(f"'{layer}' is used in several places, which would share a bias")
            elif not np.array_equal(array, held.array):
                fits = held.in_place and array.shape == held.array.shape
                if held.root.name not in scope.parameters or not fits:
                    raise Conflict(f"'{held.root.name}' cannot take its new value in the module")
                _check_shared(network, trial, held, array)


def _check_shared(network: Network, trial: _Trial, held: Constant, array: Array) -> None:
    """All who read a parameter must ask for one new value. Raises Conflict."""
    users = readers(held.root)
    for user, at in users:
        rewritable = at in _constant_slots(network, user)
        rewrite = RULES[user.op_type].rewrite if rewritable else None
        asked = rewrite(user, trial.gauge)[at] if rewrite else held.array
        if asked.shape != array.shape or np.any(asked != array):
            raise Conflict(
                f"the parameter '{held.root.name}' is used in {len(users)} places, which would need"
                " different values of it"
            )


def _constant_slots(network: Network, node: ir.Node) -> tuple[int, ...]:
    """The operands of a node that a rewrite may change; none for a batch norm that is gone."""
    return () if node in network.gone else constant_slots(node)


def _takers(network: Network, touched: Iterable[ir.Value]) -> tuple[str, ...]:
    """The names of the layers whose constants change with the gauges of these values."""
    names: dict[str, None] = {}
    for value in touched:
        for node in network.around(value):
            slots = _constant_slots(network, node)
            if slots:
                names[_layer_name(node, slots[0])] = None
    return tuple(names)


def _layer_name(node: ir.Node, slot: int) -> str:
    """The name of the layer that holds a node's weight, or the node's own."""
    if node.op_type == "BatchNormalization":
        return name_of(node)
    held = constant(node.inputs[slot])
    root = held.root.name if held is not None else None
    if root and root.endswith(".weight"):
        return root.removesuffix(".weight")
    return node.name or node.outputs[0].name or node.op_type


def _reason(failures: Mapping[str, str]) -> str:
    """One sentence from what stopped the two directions."""
    back, ahead = failures.get("x"), failures.get("y")
    if back and ahead and back != ahead:
        return f"backward, {back}; forward, {ahead}"
    return back or ahead or "no way works"
