"""One node as a transaction: the ways in which it could go, and the best of those that work.

A map y = s x + t disappears when its two sides become one tensor: scale_x = s * scale_y and
origin_y = s * origin_x + t. For the scale there are up to five ways (all of it to x, all of it to
y, sign and size apart, gamma = 0 told to the readers), for the origin two (x moves or y moves).
Scale to x and origin to x is folding backward, both to y is folding forward; size to y and origin
to x passes a Relu and telescopes whole residual streams. Of the ways that work the one that brings
the fewest operators, then the one that touches the fewest values, is taken; or none, and the
network is as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array
from bnfold.folding.network import Network
from bnfold.folding.range import Guard, OutOfRange, remedies, rescaled
from bnfold.folding.rules import rewritable_slots
from bnfold.folding.rules.node import layer_name, name_of
from bnfold.folding.rules.normalization import constants_of_bypass
from bnfold.folding.scope import OutOfScope, Scope, check_scope
from bnfold.folding.trial import (
    Trial,
    check_cost,
    check_precision,
    check_quantized,
    check_result,
    extra_operators,
)
from bnfold.folding.wave import Conflict, Wave

_NO_MODULE = "it is not a batch norm module of its own, called once, that could be taken out"


def remove(
    network: Network, node: ir.Node, guard: Guard, scope: Scope | None
) -> tuple[str, ...] | str:
    """Make one node disappear: the layers that take it up, or the reason why it stays."""
    may_go = scope is None or name_of(node) in scope.norms or node.name in scope.maps
    if scope is not None and (scope.closed or not may_go):
        network.restricted = True
        return scope.closed or _NO_MODULE
    network.try_without(node)
    best: Trial | None = None
    failures: dict[str, str] = {}
    out_of_range: list[tuple[Trial, OutOfRange]] = []
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
                trial = Trial(network, scales, _move_origin(network, node, scales, origin_side))
                trial = _checked(trial, guard, scope)
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


def _checked(trial: Trial, guard: Guard, scope: Scope | None) -> Trial:
    """The trial, with the operators that it brings counted. Raises Conflict."""
    check_result(trial)
    check_precision(trial)
    check_cost(trial)
    check_quantized(trial)
    if scope is not None:
        check_scope(trial, scope)
    guard.check(trial.network, trial.touched, trial.gauge)
    extra, room = extra_operators(trial), trial.network.room
    if room is not None and extra > room:
        raise Conflict(f"{extra} operators would come in the place of one")
    return replace(trial, extra=extra)


def _rescaled(
    network: Network,
    trial: Trial,
    fault: OutOfRange,
    guard: Guard,
    scope: Scope | None,
    rounds: int = 2,
) -> Trial | None:
    """A trial that leaves the range of a type, with some values carried at 2^k times their size."""
    changed = {value: trial.gauge(value) for value in trial.touched}
    there = replace(network, gauges=network.gauges | changed)
    for value, factor in remedies(fault, trial.gauge):
        try:
            waves = rescaled(there, value, factor)
            again = Trial(network, *waves, earlier=tuple(trial.touched))
            return _checked(again, guard, scope)
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
    return wave.follow_scales(besides=node)


def _takers(network: Network, touched: Iterable[ir.Value]) -> tuple[str, ...]:
    """The names of the layers whose constants change with the gauges of these values."""
    names: dict[str, None] = {}
    for value in touched:
        for near in network.around(value):
            merge = network.merged(near)
            node = merge.host if merge is not None else near
            slots = () if node in network.gone else rewritable_slots(node)
            if slots:
                names[layer_name(node, slots[0])] = None
    return tuple(names)


def _reason(failures: Mapping[str, str]) -> str:
    """One sentence from what stopped the two directions."""
    back, ahead = failures.get("x"), failures.get("y")
    if back and ahead and back != ahead:
        return f"backward, {back}; forward, {ahead}"
    return back or ahead or "no way works"
