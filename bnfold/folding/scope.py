"""What a torch module or program can take back of a fold, and whether a trial stays within it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from bnfold.folding.affine import Array
from bnfold.folding.constants import Constant, constant, readers
from bnfold.folding.rules import rewritable_slots, rewritten
from bnfold.folding.rules.node import label, layer_name, optional_input
from bnfold.folding.trial import Trial
from bnfold.folding.wave import Conflict


@dataclass(frozen=True)
class Scope:
    """What may change where the result goes back into torch: all by name.

    parameters: the tensors that can be given a new value. layers: those that can be given a bias.
    norms: the batch norms that can be taken out. maps: the constant additions and multiplications
    that can, by the nodes' names. forms: the nodes that can take another form (`rules.repairs`), by
    name, each with the module that it is. one_value: a tensor has one value wherever it is
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
    maps: frozenset[str] = frozenset()
    forms: Mapping[str, str] = field(default_factory=dict)


class OutOfScope(Conflict):
    """A way that works, and that the scope does not allow."""


def check_scope(trial: Trial, scope: Scope) -> None:
    """Every constant that changes must be a parameter of the module. Raises OutOfScope."""
    for value in trial.touched:
        watcher = scope.watched.get(str(value.name))
        if watcher is not None and not trial.gauge(value).is_identity:
            raise OutOfScope(f"a hook on '{watcher}' looks at '{value.name}', which would change")
    for node, slots in trial.around.items():
        repair = trial.network.repair(node)
        if repair and repair.form(trial.gauge) and node.name not in scope.forms:
            raise OutOfScope(f"{label(node)} would take another form, which the module cannot hold")
        for slot, array in rewritten(node, trial.gauge).items() if slots else ():
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
                    _check_shared(trial, held, array)


def _check_shared(trial: Trial, held: Constant, array: Array) -> None:
    """All who read a parameter must ask for one new value. Raises OutOfScope."""
    users = readers(held.root)
    for user, at in users:
        rewritable = user not in trial.network.gone and at in rewritable_slots(user)
        asked = rewritten(user, trial.gauge)[at] if rewritable else held.array
        if asked.shape != array.shape or np.any(asked != array):
            raise OutOfScope(
                f"the parameter '{held.root.name}' is used in {len(users)} places, which would need"
                " different values of it"
            )
