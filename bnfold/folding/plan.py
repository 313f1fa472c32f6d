"""Planning: choose gauges so that as many batch norms as possible disappear.

Each batch norm is tried as a transaction (`transaction`), and tried again when another one's going
could have freed it. The same search takes out constant multiplications and additions (a batch norm
that some exporter has taken apart, an input's mean and std). A sum of parallel branches that is one
convolution (`parallel`) becomes one, which absorbs what no sum does. Last, where the caller allows
exact repairs, what is left is tried with them.

A plan never changes the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Gauge
from bnfold.folding.chains import CHAINS, Finder
from bnfold.folding.merging import Merge
from bnfold.folding.network import Network
from bnfold.folding.parallel import parallel_sums
from bnfold.folding.range import Guard, OutOfRange
from bnfold.folding.rules import affine_of
from bnfold.folding.rules.node import Opaque, label, layer_name, name_of
from bnfold.folding.rules.repairs import FREE
from bnfold.folding.scope import Scope
from bnfold.folding.selection import Selection
from bnfold.folding.transaction import remove
from bnfold.graph import is_batch_norm


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
    each. restricted: the scope stood in the way of something. scope: what it was restricted to.
    """

    model: ir.Model
    gauges: Mapping[ir.Value, Gauge]
    removed: tuple[Removed, ...]
    kept: tuple[Kept, ...]
    absorbed: tuple[Removed, ...] = ()
    repairs: frozenset[str] = frozenset()
    merges: tuple[Merge, ...] = ()
    restricted: bool = False
    scope: Scope | None = None

    @property
    def merged(self) -> tuple[MergedSum, ...]:
        """The merges by names of layers."""
        return tuple(
            MergedSum(
                merge.result.name or "",
                layer_name(merge.host, 1),
                tuple(_name_of(node) for node in merge.taken),
            )
            for merge in self.merges
        )

    def gauge(self, value: ir.Value) -> Gauge:
        """The gauge of a value; identity where the plan says nothing."""
        found = self.gauges.get(value)
        return found if found is not None else Gauge.identity(len(value.shape or ()))


@dataclass(frozen=True)
class MergedSum:
    """A sum of parallel branches that is one convolution now.

    name: of the sum's value. into: the layer that writes it. layers: those that it took in.
    """

    name: str
    into: str
    layers: tuple[str, ...]


Outcomes = dict[ir.Node, tuple[str, ...] | str]


def plan(
    model: ir.Model,
    scope: Scope | None = None,
    *,
    absorb: bool = True,
    repairs: frozenset[str] = frozenset(),
    merge: bool = True,
    selection: Selection | None = None,
    clean_up: frozenset[str] = frozenset(),
) -> FoldPlan:
    """Which batch norms of the model disappear, into what, and why the others stay.

    scope: restricts the plan to what a torch module can take back; without it every constant may
    change, and a weight that two nodes share may be written once for each of them. absorb: take out
    constant multiplications and additions too. repairs: names of exact repairs that may put
    operators in the place of a batch norm (`rules.repairs`). merge: let sums of parallel branches
    become one convolution each, which a torch module cannot take back. selection: the batch norms
    that the user wants to keep as they are; their statistics and affine parameters do not change
    either. clean_up: names of other nodes in line that may become one convolution (`chains`).
    Raises InputError for statistics that no network can run with, UsageError for a selection that
    names no batch norm.
    """
    network = Network(model)
    found = [node for node in network.nodes if is_batch_norm(node)]
    network.held.update((selection or Selection()).held(found))
    guard = Guard(network)
    norms: Outcomes = {node: "" for node in found if node not in network.held}
    # a module's own arithmetic is code, no parameter, but for what its scope names
    listed = (n for n in network.nodes if absorb and (scope is None or n.name in scope.maps))
    others: Outcomes = {n: "" for n in listed if _is_map(n)}
    progress = True
    while progress:
        _take_out(network, norms, guard, scope)
        progress = _take_out(network, others, guard, scope)
        if scope is None:
            wanted = [parallel_sums] * merge + [CHAINS[name] for name in CHAINS if name in clean_up]
            progress |= any(_merge(network, guard, find, norms, others) for find in wanted)
    _take_out_freely(network, FREE.keys(), (norms, others), guard, scope)
    if repairs and any(isinstance(outcome, str) for outcome in norms.values()):
        network.allow(network.repairs | repairs)
        _take_out(network, norms, guard, scope)
    if "pad" in repairs:
        _take_out_freely(network, {"pad"}, (others,), guard, scope)
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
        scope,
    )


def _merge(network: Network, guard: Guard, find: Finder, *outcomes: Outcomes) -> bool:
    """Let what is found be one convolution each, which absorbs what a sum or a Pad does not."""

    def may_go(node: ir.Node) -> bool:
        listed = any(node in known for known in outcomes)
        return listed and _why_no_map(network, node) is None

    before = len(network.merges)
    for merge in list(find(network, may_go)):
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
        _name_of(node): layer_name(merge.host, 1)
        for merge in network.merges
        for node in merge.taken
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


def _take_out_freely(
    network: Network,
    repairs: Iterable[str],
    kinds: tuple[Outcomes, ...],
    guard: Guard,
    scope: Scope | None,
) -> None:
    """Try what still stays with repairs that bring no more operators than go.

    They take a shift that is one number. Other nodes are not tried, so what stays of an ordinary
    network stays for the reason that it had.
    """
    before, network.room = network.repairs, 1
    network.allow(before | set(repairs))
    any_gone = False
    for outcomes in kinds:
        waiting = {node: why for node, why in outcomes.items() if isinstance(why, str)}
        hopeful: Outcomes = {n: w for n, w in waiting.items() if _shifts_by_one_number(network, n)}
        any_gone |= _take_out(network, hopeful, guard, scope)
        outcomes.update(hopeful)
    network.room = None
    if not any_gone:
        network.allow(before)


def _shifts_by_one_number(network: Network, node: ir.Node) -> bool:
    """True for a map whose shift, ahead or back, is the same in every channel and not 0."""
    try:
        affine = network.map_of(node).affine
    except Opaque:
        return False
    if not np.all(affine.scale) or not np.any(affine.shift):
        return False
    return any(np.ptp(shift) == 0 for shift in (affine.shift, affine.shift / affine.scale))


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
            outcomes[node] = why or remove(network, node, guard, scope)
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


def _name_of(node: ir.Node) -> str:
    return layer_name(node, 1) if node.op_type == "Conv" else label(node)
