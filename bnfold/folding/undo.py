"""What it takes to undo a fold: the original graph, and how its weights are told from the new ones.

A weight that the fold left alone is taken from the folded model; one that it multiplied is told
from the product (told.py); the others (biases, statistics, a kernel that was merged into another)
are kept as they were. So whatever a fold does to the structure, undoing it gives the original bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from bnfold import bare
from bnfold.errors import InputError
from bnfold.folding.apply import Folded
from bnfold.folding.factors import Factors, factors_of
from bnfold.folding.plan import FoldPlan
from bnfold.folding.told import AnyArray, Told, original_of, tell


@dataclass(frozen=True)
class TorchSide:
    """What a graph does not say of a torch network that was folded.

    before, after: its tensors by name. layers, norms: the modules that a fold may change
    (`folding.plan.Scope`). built: how to build each batch norm that is gone, by name.
    """

    before: Mapping[str, AnyArray]
    after: Mapping[str, AnyArray]
    layers: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    built: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Undo:
    """How to get the original back.

    graph: the original without its weights (`bnfold.bare`). told, kept: weights by name; one that
    is in neither is in the folded model under its own name. digests: the SHA-256 over the weights
    of the graph and, for torch sources, over those of the state_dict. names: the state_dict's, in
    order. layers, norms, built: as in TorchSide.
    """

    graph: bytes
    told: Mapping[str, Told]
    kept: Mapping[str, AnyArray]
    digests: Mapping[str, str]
    names: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    built: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def undo_of(plan: FoldPlan, folded: Folded, torch_side: TorchSide | None = None) -> Undo:
    """How to undo a plan that has been applied.

    With a torch side everything is told from the folded state_dict alone, which the folded ONNX
    file holds as well.
    """
    graph, before = bare.take_out(plan.model)
    digests = {"graph": digest_of(before)}
    after = bare.weights_of(folded.model)
    if torch_side is not None:
        before = {**before, **torch_side.before}
        after = dict(torch_side.after)
        digests["state"] = digest_of(torch_side.before)
    factors = factors_of(plan, folded.written)
    told: dict[str, Told] = {}
    kept: dict[str, AnyArray] = {}
    for name, original in before.items():
        if _same(original, after.get(name)):
            continue
        found = _tell(original, folded.written.get(name, ()), factors.get(name), after)
        if found is not None:
            told[name] = found
        else:
            kept[name] = np.array(original)  # a module's own tensors may change later
    if torch_side is None:
        return Undo(graph, told, kept, digests)
    side, names = torch_side, tuple(torch_side.before)
    return Undo(graph, told, kept, digests, names, side.layers, side.norms, side.built)


def _tell(
    original: AnyArray,
    written: tuple[str, ...],
    factors: Factors | None,
    after: Mapping[str, AnyArray],
) -> Told | None:
    """The weight told from the first tensor that the fold wrote for it."""
    folded = after.get(written[0]) if written else None
    if folded is None or factors is None:
        return None
    return tell(original, written[0], folded, factors.view, factors.arrays)


def original_graph(undo: Undo, folded: ir.Model) -> ir.Model:
    """The original graph, its weights bit for bit.

    Raises InputError where the folded model's weights are not those that the fold wrote.
    """
    return _graph(undo, bare.weights_of(folded))


def original_state(
    undo: Undo, folded: Mapping[str, AnyArray]
) -> tuple[dict[str, AnyArray], ir.Model]:
    """The original state_dict, bit for bit, and its graph, from the folded one.

    Raises InputError for a record without a torch side, and as `original_graph`.
    """
    if not undo.names:
        raise InputError(
            "The record is of a folded graph and holds no state_dict: unfold the .onnx beside it."
        )
    state = _originals(undo, undo.names, folded)
    _check(undo, "state", state)
    return state, _graph(undo, folded)


def _graph(undo: Undo, folded: Mapping[str, AnyArray]) -> ir.Model:
    weights = _originals(undo, bare.names_of(undo.graph), folded)
    _check(undo, "graph", weights)
    return bare.put_in(undo.graph, weights)


def _originals(
    undo: Undo, names: Iterable[str], folded: Mapping[str, AnyArray]
) -> dict[str, AnyArray]:
    found: dict[str, AnyArray] = {}
    for name in names:
        told = undo.told.get(name)
        source = told.source if told is not None else name
        if name in undo.kept:
            found[name] = undo.kept[name]
        elif source not in folded:
            raise InputError(
                f"The folded model has no weight '{source}', which it had when folded."
            )
        else:
            weight = folded[source]
            found[name] = weight if told is None else original_of(told, weight)
    return found


def _check(undo: Undo, what: str, weights: Mapping[str, AnyArray]) -> None:
    if digest_of(weights) != undo.digests.get(what):
        raise InputError(
            "The weights that come out are not those that were folded: the folded model has been"
            " changed since, or the record is another one's, or damaged."
        )


def digest_of(weights: Mapping[str, AnyArray]) -> str:
    """The SHA-256 over names, types, shapes and elements, in the order of the names."""
    digest = hashlib.sha256()
    for name, array in sorted(weights.items()):
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(_bytes(array).data)
    return digest.hexdigest()


def _same(a: AnyArray, b: AnyArray | None) -> bool:
    return (
        b is not None
        and a.dtype == b.dtype
        and a.shape == b.shape
        and np.array_equal(_bytes(a), _bytes(b))
    )


def _bytes(array: AnyArray) -> AnyArray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
