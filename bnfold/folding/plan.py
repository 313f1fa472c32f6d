"""Planning: choose gauges so that as many batch norms as possible disappear.

A batch norm y = s x + t disappears when its two sides become one tensor: scale_x = s * scale_y and
origin_y = s * origin_x + t. Each one is tried as a transaction. For the scale there are up to five
ways (all of it to x, all of it to y, sign and size apart, gamma = 0 told to the readers), for the
origin two (x moves or y moves). Scale to x and origin to x is folding backward, both to y is
folding forward; size to y and origin to x passes a Relu and telescopes whole residual streams. Of
the ways that work the one that touches the fewest values is taken.

The same search takes out constant multiplications and additions (a batch norm that some exporter
has taken apart, an input's mean and std). A sum of parallel branches that is one convolution
(`parallel`) becomes one, which absorbs what no sum does. Last, where the caller allows exact
repairs, what is left is tried with them, and of the ways that work the one with the fewest
operators is taken.

A plan never changes the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array, Gauge
from bnfold.folding.constants import Constant, constant, readers
from bnfold.folding.holds import broken
from bnfold.folding.merging import Merge
from bnfold.folding.network import Network
from bnfold.folding.parallel import parallel_sums
from bnfold.folding.quantized import Unquantizable, requantized
from bnfold.folding.range import Guard, OutOfRange, remedies, rescaled
from bnfold.folding.rules import RULES, affine_of, constant_slots, is_batch_norm
from bnfold.folding.rules.linear import matmul_bias
from bnfold.folding.rules.node import Opaque, input_of, name_of, optional_input, real, weights
from bnfold.folding.rules.normalization import constants_of_bypass
from bnfold.folding.rules.relations import Gauges
from bnfold.folding.selection import Selection
from bnfold.folding.wave import Conflict, Wave


@dataclass(frozen=True)
class Removed:
    """A per-channel map that disappears, and the layers whose constants take it up.

    slot: the operand that it maps.
    """

    name: str
    node: ir.Node
    into: tuple[str, ...]
    slot: int = 0


@dataclass(frozen=True)
class Kept:
    """A batch norm that stays, and the reason why."""

    name: str
    node: ir.Node
    reason: str


@dataclass(frozen=True)
class FoldPlan:
    """An assignment of gauges to the values of a model, and what becomes of each batch norm.

    absorbed: the constant multiplications and additions that disappear besides. repairs: the exact
    repairs that the plan may use. merges: the sums of parallel branches that become one convolution
    each. restricted: the scope stood in the way of something.
    """

    model: ir.Model
    gauges: Mapping[ir.Value, Gauge]
    removed: tuple[Removed, ...]
    kept: tuple[Kept, ...]
    absorbed: tuple[Removed, ...] = ()
    repairs: frozenset[str] = frozenset()
    merges: tuple[Merge, ...] = ()
    restricted: bool = False

    @property
    def merged(self) -> tuple[MergedSum, ...]:
        """The merges by names of layers."""
        return tuple(
            MergedSum(
                merge.result.name or "",
                layer_name(merge.host, 1),
                tuple(layer_name(conv, 1) for conv in merge.convs if conv is not merge.host),
            )
            for merge in self.merges
        )

    def gauge(self, value: ir.Value) -> Gauge:
        """The gauge of a value; identity where the plan says nothing."""
        found = self.gauges.get(value)
        return found if found is not None else Gauge.identity(len(value.shape or ()))


@dataclass(frozen=True)
class Scope:
    """What may change where the result goes back into torch: all by name.

    parameters: the tensors that can be given a new value. layers: those that can be given a bias.
    norms: the batch norms that can be taken out. one_value: a tensor has one value wherever it is
    read, as a module's parameters do; a graph can hold a copy for each reader. watched: the values
    that must stay as they are, each with the hooked module that looks at it. closed: why nothing
    may change at all, if so.
    """

    parameters: frozenset[str]
    layers: frozenset[str]
    norms: frozenset[str]
    one_value: bool = True
    watched: Mapping[str, str] = field(default_factory=dict)
    closed: str = ""


@dataclass(frozen=True)
class MergedSum:
    """A sum of parallel branches that is one convolution now.

    name: of the sum's value. into: the layer that writes it. layers: those that it took in.
    """

    name: str
    into: str
    layers: tuple[str, ...]


_NO_MODULE = "it is not a batch norm module of its own, called once, that could be taken out"


class OutOfScope(Conflict):
    """A way that works, and that the scope does not allow."""


Outcomes = dict[ir.Node, tuple[str, ...] | str]


def plan(
    model: ir.Model,
    scope: Scope | None = None,
    *,
    absorb: bool = True,
    repairs: frozenset[str] = frozenset(),
    merge: bool = True,
    selection: Selection | None = None,
) -> FoldPlan:
    """Which batch norms of the model disappear, into what, and why the others stay.

    scope: restricts the plan to what a torch module can take back; without it every constant may
    change, and a weight that two nodes share may be written once for each of them. absorb: take out
    constant multiplications and additions too. repairs: names of exact repairs that may put
    operators in the place of a batch norm (`rules.repairs`). merge: let sums of parallel branches
    become one convolution each, which a torch module cannot take back. selection: the batch norms
    that the user wants to keep as they are; their statistics and affine parameters do not change
    either.
    Raises InputError for statistics that no network can run with, UsageError for a selection that
    names no batch norm.
    """
    network = Network(model)
    found = [node for node in network.nodes if is_batch_norm(node)]
    network.held.update((selection or Selection()).held(found))
    guard = Guard(network)
    norms: Outcomes = {node: "" for node in found if node not in network.held}
    absorb = absorb and scope is None  # a module's own arithmetic is code, no parameter
    others: Outcomes = {n: "" for n in network.nodes if absorb and _is_map(n)}
    progress = True
    while progress:
        _take_out(network, norms, guard, scope)
        progress = _take_out(network, others, guard, scope)
        progress |= merge and scope is None and _merge(network, guard, norms, others)
    if repairs and any(isinstance(outcome, str) for outcome in norms.values()):
        network.allow(repairs)
        _take_out(network, norms, guard, scope)
    reasons = {node: network.held.get(node) or norms[node] for node in found}
    kept = [Kept(name_of(n), n, why) for n, why in reasons.items() if isinstance(why, str)]
    kept += [Kept(name_of(node), node, why) for node, why in _inside_functions(model)]
    gauges = {value: g for value, g in network.gauges.items() if not g.is_identity}
    removed, absorbed = _removed(network, norms), _removed(network, others)
    merges = tuple(network.merges)
    return FoldPlan(
        model,
        gauges,
        removed,
        tuple(kept),
        absorbed,
        network.repairs,
        merges,
        network.restricted,
    )


def _merge(network: Network, guard: Guard, *outcomes: Outcomes) -> bool:
    """Let sums of parallel branches be one convolution each, which absorbs what no sum does."""

    def may_go(node: ir.Node) -> bool:
        listed = any(node in known for known in outcomes)
        return listed and _why_no_map(network, node) is None

    before = len(network.merges)
    for merge in list(parallel_sums(network, may_go)):
        try:
            guard.check_merge(merge, network.gauge)
        except OutOfRange:
            continue
        network.merge(merge)
        for known in outcomes:
            known.update(dict.fromkeys(merge.inner & known.keys(), (layer_name(merge.host, 1),)))
    return len(network.merges) > before


def _as_merged(network: Network, layers: tuple[str, ...]) -> tuple[str, ...]:
    """Names of layers; one that is merged into another goes by the name of that one."""
    now = {
        layer_name(conv, 1): layer_name(merge.host, 1)
        for merge in network.merges
        for conv in merge.convs
    }
    return tuple(dict.fromkeys(now.get(layer, layer) for layer in layers))


def _removed(network: Network, outcomes: Outcomes) -> tuple[Removed, ...]:
    return tuple(
        Removed(
            name_of(node),
            node,
            _as_merged(network, outcome),
            list(node.inputs).index(network.map_of(node).x),
        )
        for node, outcome in outcomes.items()
        if isinstance(outcome, tuple)
    )


def _inside_functions(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """The batch norms in local functions that reading could not inline."""
    for function in model.functions.values():
        for node in function.all_nodes():
            if is_batch_norm(node):
                yield node, f"it is part of the function '{function.name}', which is not inlined"


def _is_map(node: ir.Node) -> bool:
    """True for a multiplication or addition of a constant that may go."""
    if is_batch_norm(node):
        return False
    try:
        affine_of(node)
    except Opaque:
        return False
    return True


def _take_out(network: Network, outcomes: Outcomes, guard: Guard, scope: Scope | None) -> bool:
    """Try each node that still stays; one that goes can free one that was tried before it."""
    waiting = [node for node, outcome in outcomes.items() if isinstance(outcome, str)]
    any_gone = False
    while waiting:
        network.changed.clear()
        reached: dict[ir.Node, set[ir.Value]] = {}
        for node in waiting:
            network.visited = reached[node] = set()
            why = _why_no_map(network, node)
            outcomes[node] = why or _remove(network, node, guard, scope)
        any_gone |= bool(network.changed)
        # what a trial did not reach cannot have stopped it; but a module's parameters may be tied
        waiting = [
            node
            for node in waiting
            if isinstance(outcomes[node], str)
            and (reached[node] & network.changed or (scope and network.changed))
        ]
    return any_gone


def _why_no_map(network: Network, node: ir.Node) -> str | None:
    """Why this node is no fixed per-channel map, if it is none."""
    imports = network.model.opset_imports
    opset = imports.get("", imports.get("ai.onnx", 0))
    if opset < 7:
        return f"the model uses opset {opset}; convert it to opset 7 or newer first"
    try:
        network.map_of(node)
    except Opaque as why:
        return str(why)
    return None


# --- one batch norm as a transaction -------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """A way that works: the new scales and origins, and the operators that they bring."""

    scales: Wave
    origins: Wave
    extra: int = 0
    earlier: tuple[ir.Value, ...] = ()  # touched before these waves set in

    @cached_property
    def touched(self) -> list[ir.Value]:
        touched = (*self.earlier, *self.scales.touched(), *self.origins.touched())
        return list(dict.fromkeys(touched))

    @property
    def burden(self) -> tuple[int, int]:
        """What a better way has less of."""
        return self.extra, len(self.touched)

    def gauge(self, value: ir.Value) -> Gauge:
        return Gauge(self.scales.now(value), self.origins.now(value))


def _remove(
    network: Network, node: ir.Node, guard: Guard, scope: Scope | None
) -> tuple[str, ...] | str:
    """Make one node disappear: the layers that take it up, or the reason why it stays."""
    if scope is not None and (scope.closed or name_of(node) not in scope.norms):
        network.restricted = True
        return scope.closed or _NO_MODULE
    network.try_without(node)
    best: _Trial | None = None
    failures: dict[str, str] = {}
    out_of_range: list[tuple[_Trial, OutOfRange]] = []
    for side, numbers in _scale_ways(network, node):
        if best is not None and best.burden <= (0, 1):
            break  # there is no better way
        try:
            scales = Wave(network)
            scales.start(network.relations(node).scales[0], numbers, node)
        except Conflict as conflict:
            failures.setdefault(side, str(conflict))
            continue
        for origin_side in ("x", "y"):
            if best is not None and not best.extra and len(scales.touched()) >= len(best.touched):
                break
            try:
                trial = _Trial(scales, _move_origin(network, node, scales, origin_side))
                trial = _checked(network, trial, guard, scope)
                if best is None or trial.burden < best.burden:
                    best = trial
            except OutOfRange as fault:
                out_of_range.append((trial, fault))
                failures.setdefault(origin_side, str(fault))
            except Conflict as conflict:
                failures.setdefault(origin_side, str(conflict))
                network.restricted |= isinstance(conflict, OutOfScope)
    for trial, beyond in out_of_range if best is None else ():
        best = best or _rescaled(network, trial, beyond, guard, scope)
    if best is None:
        network.put_back(node)
        return _reason(failures)
    network.agree({value: best.gauge(value) for value in best.touched})
    return _takers(network, best.touched)


def _checked(network: Network, trial: _Trial, guard: Guard, scope: Scope | None) -> _Trial:
    """The trial, with the operators that it brings counted. Raises Conflict."""
    _check_result(network, trial)
    _check_precision(network, trial)
    _check_cost(network, trial)
    _check_quantized(network, trial)
    if scope is not None:
        _check_scope(network, trial, scope)
    guard.check(network, trial.touched, trial.gauge)
    return replace(trial, extra=_extra_operators(network, trial))


def _rescaled(
    network: Network,
    trial: _Trial,
    fault: OutOfRange,
    guard: Guard,
    scope: Scope | None,
    rounds: int = 2,
) -> _Trial | None:
    """A trial that leaves the range of a type, with some values carried at 2^k times their size."""
    changed = {value: trial.gauge(value) for value in trial.touched}
    there = replace(network, gauges=network.gauges | changed)
    for value, factor in remedies(fault, trial.gauge):
        try:
            again = _Trial(*rescaled(there, value, factor), earlier=tuple(trial.touched))
            return _checked(network, again, guard, scope)
        except OutOfRange as left:
            rest = rounds - 1
            found = _rescaled(network, again, left, guard, scope, rest) if rest else None
            if found is not None:
                return found
        except Conflict:
            continue
    return None


def _scale_ways(network: Network, node: ir.Node) -> Iterator[tuple[str, dict[ir.Value, Array]]]:
    """The new scales at x and y to try, each with the side that takes the size; NaN: as it is."""
    m = network.map_of(node)
    x, y, s = m.x, m.y, m.affine.scale
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
    m = network.map_of(node)
    x, y, s, wave = m.x, m.y, m.affine.scale, Wave(network, scales)
    tie = network.relations(node).origins[0]
    to_x = tie.backward(wave.before(y), scales.now)
    to_y = tie.forward(wave.before(x), scales.now)
    assert to_x is not None  # a bypass answers for every channel
    assert to_y is not None
    # what is known of x is a fact; only y can follow
    moves_y = np.isinf(scales.now(x)) if side == "x" else np.True_
    numbers = {
        x: np.where((s != 0) & ~moves_y, to_x, np.nan),
        y: np.where((s != 0) & moves_y, to_y, np.nan),
    }
    for place, array in constants_of_bypass(x, y, m.affine, scales.now, wave.now).items():
        before = numbers.get(place, np.nan)
        numbers[place] = np.where(np.isnan(array), before, array)
    wave.start(tie, numbers, node)
    for touched in scales.touched():
        for other in network.around(touched):
            if other in network.gone and other is not node:
                # gamma = 0 in a batch norm that is gone already: its constant follows the scale
                o = network.map_of(other)
                found = constants_of_bypass(o.x, o.y, o.affine, scales.now, wave.now)
                for place, array in found.items():
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
    norms = {user for value in moved for user, _ in value.uses()}
    for node in {network.trying, *norms}:
        if node is None or not is_batch_norm(node) or _why_no_map(network, node):
            continue
        value, shape = input_of(node, 0), network.map_of(node).affine.scale.shape
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
    """A batch norm that goes leaves room for one addition; anything else for none. Conflict."""
    around = {node for value in trial.touched for node in network.around(value)}
    products = [node for node in around if node.op_type == "MatMul"]
    added = sum(
        _needs_bias(network, node, trial.gauge) and not _needs_bias(network, node, network.gauge)
        for node in products
    )
    assert network.trying is not None
    if added > (1 if is_batch_norm(network.trying) else 0):
        what = "batch norm" if is_batch_norm(network.trying) else network.trying.op_type
        raise Conflict(f"it would put {added} additions in the place of one {what}")


def _check_quantized(network: Network, trial: _Trial) -> None:
    """A weight that is held as integers stays so. Raises Conflict."""
    for node in {node for value in trial.touched for node in network.around(value)}:
        held = {
            slot: constant(optional_input(node, slot)) for slot in _constant_slots(network, node)
        }
        if not any(c is not None and c.dequantizer is not None for c in held.values()):
            continue
        rewrite = RULES[node.op_type].rewrite
        for slot, array in rewrite(node, trial.gauge).items() if rewrite else ():
            c = held.get(slot)
            if c is not None and c.dequantizer is not None:
                try:
                    requantized(c, array)
                except Unquantizable as why:
                    name = c.dequantizer.inputs[0].name  # type: ignore[union-attr]
                    raise Conflict(f"the quantised weight '{name}' cannot take it: {why}") from None


def _extra_operators(network: Network, trial: _Trial) -> int:
    """How many operators the repairs bring that these gauges ask for."""
    extra = 0
    for node in {node for value in trial.touched for node in network.around(value)}:
        repair = network.repair(node)
        if repair is not None:
            before, after = repair.form(network.gauge), repair.form(trial.gauge)
            extra += after.extra_operators if after is not None else 0
            extra -= before.extra_operators if before is not None else 0
    return extra


def _needs_bias(network: Network, node: ir.Node, gauge: Gauges) -> bool:
    """True for a MatMul that, with these gauges, needs an Add behind it."""
    return bool(_constant_slots(network, node)) and bool(np.any(matmul_bias(node, gauge)))


def _check_scope(network: Network, trial: _Trial, scope: Scope) -> None:
    """Every constant that changes must be a parameter of the module. Raises OutOfScope."""
    for value in trial.touched:
        watcher = scope.watched.get(str(value.name))
        if watcher is not None and not trial.gauge(value).is_identity:
            raise OutOfScope(f"a hook on '{watcher}' looks at '{value.name}', which would change")
    for node in {node for value in trial.touched for node in network.around(value)}:
        slots = _constant_slots(network, node)
        rewrite = RULES[node.op_type].rewrite if slots else None
        for slot, array in rewrite(node, trial.gauge).items() if rewrite else ():
            held = constant(optional_input(node, slot))
            if held is None:
                layer, weight = (
                    layer_name(node, slots[0]),
                    constant(optional_input(node, slots[0])),
                )
                if not np.any(array):
                    continue
                if layer not in scope.layers or array.ndim != 1:
                    raise OutOfScope(f"'{layer}' is no module that could be given a bias")
                if scope.one_value and (weight is None or len(readers(weight.root)) > 1):
                    raise OutOfScope(
                        f"'{layer}' is used in several places, which would share a bias"
                    )
            elif not np.array_equal(array, held.array):
                fits = held.in_place and array.shape == held.array.shape
                if held.root.name not in scope.parameters or not fits:
                    raise OutOfScope(f"'{held.root.name}' cannot take its new value in the module")
                if scope.one_value:
                    _check_shared(network, trial, held, array)


def _check_shared(network: Network, trial: _Trial, held: Constant, array: Array) -> None:
    """All who read a parameter must ask for one new value. Raises OutOfScope."""
    users = readers(held.root)
    for user, at in users:
        rewritable = at in _constant_slots(network, user)
        rewrite = RULES[user.op_type].rewrite if rewritable else None
        asked = rewrite(user, trial.gauge)[at] if rewrite else held.array
        if asked.shape != array.shape or np.any(asked != array):
            raise OutOfScope(
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
        for near in network.around(value):
            merge = network.merged(near)
            node = merge.host if merge is not None else near
            slots = _constant_slots(network, node)
            if slots:
                names[layer_name(node, slots[0])] = None
    return tuple(names)


def layer_name(node: ir.Node, slot: int) -> str:
    """The name of the layer that holds a node's weight, or the node's own."""
    if node.op_type == "BatchNormalization":
        return name_of(node)
    held = constant(optional_input(node, slot))
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
