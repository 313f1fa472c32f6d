"""What is wrong with a fold that failed: where the networks part, and why.

Where gate A holds written numbers of a layer for wrong, that layer is the one: no search by values
may name another, and what they tell counts where it is of the same layer. Else the kinds of input
are gone through until one shows a difference in float64; on that one the first wrong values are
found, and what spoiled them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from bnfold.errors import BnfoldError, capital
from bnfold.proof.algebra.certificate import Gauge
from bnfold.proof.exact.alignment import Alignment
from bnfold.proof.exact.counterpart import View
from bnfold.proof.exact.layers import Norm, norms_of
from bnfold.proof.exact.reference import Float64Reference
from bnfold.proof.fault.cause import Cause, find_cause
from bnfold.proof.fault.divergence import NOISE, Divergence, divergences, lockstep, output_errors
from bnfold.proof.fault.sites import folded_into
from bnfold.proof.figures.draws import InputSet

Array = np.ndarray[Any, np.dtype[Any]]

MORE = 8  # further batches that are looked at where the first of each kind shows nothing


@dataclass(frozen=True, eq=False)
class Finding:
    """The first wrong values in order of execution, and the cause of the first.

    kind, inputs: what they were found on. sentence: all of it, for the end of a failure.
    """

    divergences: tuple[Divergence, ...]
    cause: Cause | None
    kind: str
    inputs: Mapping[str, Array]
    sentence: str

    @property
    def first(self) -> Divergence | None:
        """The first of them."""
        return self.divergences[0] if self.divergences else None


def find_fault(
    original: onnx.ModelProto,
    folded: onnx.ModelProto,
    sets: Sequence[InputSet],
    *,
    gauges: Mapping[str, Gauge] | None,
    aliases: Mapping[str, str] | None,
    unit: float,
    certain: Mapping[str, str] | None = None,
) -> Finding:
    """Where and why two networks part, on the first kind of input that shows it.

    gauges, aliases: the plan's, if it is known. unit: rounding of the weights' type. certain: the
    original's nodes whose written numbers are wrong, in order of execution, and gate A's sentences.
    Never raises for what cannot be found: the sentence says so.
    """
    plan: dict[str, Any] = {"gauges": gauges, "aliases": aliases, "unit": unit}
    if certain and (blamed := _blamed(original, folded, certain, gauges, aliases)):
        return _by_the_algebra(original, folded, sets, blamed, plan)
    parted: list[Divergence] = []
    rounding, kind, feeds = False, "", dict[str, Array]()
    try:
        for rounding, name, batch in _tried(sets):
            kind, feeds = name, dict(batch)
            parted = divergences(original, folded, feeds, **plan, rounding=rounding)
            if parted:
                break
        cause = find_cause(original, folded, feeds, parted, **plan)
        if cause is None:
            sentence = _agreement(original, folded, sets, unit)
            return Finding((), None, kind, feeds, sentence)
    except BnfoldError as problem:
        sentence = f"Where they part could not be found: {problem}"
        if parted:
            sentence = capital(parted[0].sentence)
        return Finding(tuple(parted), None, kind, feeds, sentence)
    if rounding and cause.fault == "unknown":  # a name would be a guess
        sentence = (
            "No value is off by more than the original's own rounding explains; the first that"
            f" is off by as much is the result of {parted[0].op_type} '{parted[0].node}'"
            f" ({parted[0].error:.2g} of its size)."
        )
        return Finding((), None, kind, feeds, sentence)
    sentence = f"{capital(parted[0].sentence)} {cause.sentence}"
    return Finding(tuple(parted), cause, kind, feeds, sentence)


# ------------------------------------------------------------------------ what gate A has named


@dataclass(frozen=True, eq=False)
class _Blamed:
    """A layer that gate A holds for wrong: its sentence, the batch norms that went into it.

    value: of the original, where it shows: its result, or that of the batch norm behind it.
    """

    node: str
    op_type: str
    sentence: str
    norms: tuple[Norm, ...]
    value: str


def _blamed(
    original: onnx.ModelProto,
    folded: onnx.ModelProto,
    certain: Mapping[str, str],
    gauges: Mapping[str, Gauge] | None,
    aliases: Mapping[str, str] | None,
) -> list[_Blamed]:
    """The layers of the main graph that gate A has named, in order of execution."""
    view, other = View.of(original), View.of(folded)
    alignment = Alignment.of(view, other, gauges, aliases)
    norms = norms_of(view)
    found = []
    for node in view.nodes:
        label = view.label(node)
        if label not in certain:
            continue
        taken = folded_into(node, view, norms, other, alignment)
        behind = [norm for norm in taken if norm.own]
        value = node.output[0]
        if value not in alignment.there and len(behind) == 1:
            value = behind[0].norm.output
        held = tuple(one.norm for one in taken)
        found.append(_Blamed(label, node.op_type, certain[label], held, value))
    return found


def _by_the_algebra(
    original: onnx.ModelProto,
    folded: onnx.ModelProto,
    sets: Sequence[InputSet],
    blamed: Sequence[_Blamed],
    plan: Mapping[str, Any],
) -> Finding:
    """The layers that gate A has named; why the first is wrong, as far as its values tell."""
    first = blamed[0]
    kind, feeds, errors = _shown(original, folded, sets, blamed, plan)
    parted = tuple(
        Divergence(each.value, each.node, each.op_type, errors.get(each.value, math.nan))
        for each in blamed
    )
    names = [norm.name for norm in first.norms]
    told = None
    if errors.get(first.value, 0.0) > NOISE * plan["unit"]:
        try:
            told = find_cause(original, folded, feeds, parted[:1], **plan)
        except BnfoldError:
            told = None
    sentence = f"The fault is at {first.sentence}"
    unnamed = [repr(name) for name in names if repr(name) not in first.sentence]
    if told is not None and told.fault != "unknown" and _of_these(told, names):
        cause = replace(told, node=first.node)
        sentence += f" {told.sentence}"
    else:
        if unnamed:
            verb = "were" if len(unnamed) > 1 else "was"
            plural = "s" * (len(unnamed) > 1)
            sentence += f" Batch norm{plural} {' and '.join(unnamed)} {verb} folded into it."
        name = names[0] if len(names) == 1 else None
        cause = Cause(name, first.value, first.node, parted[0].error, "weights", sentence)
    others = tuple(each.norms[0].name if each.norms else each.node for each in blamed[1:])
    if others := tuple(dict.fromkeys(other for other in others if other != cause.norm)):
        further = f" Further faults lie at {', '.join(map(repr, others))}."
        cause = replace(cause, others=others, sentence=cause.sentence + further)
        sentence += further
    return Finding(parted, cause, kind, feeds, sentence)


def _of_these(told: Cause, names: Sequence[str]) -> bool:
    return told.norm in names if names else told.norm is None


def _shown(
    original: onnx.ModelProto,
    folded: onnx.ModelProto,
    sets: Sequence[InputSet],
    blamed: Sequence[_Blamed],
    plan: Mapping[str, Any],
) -> tuple[str, dict[str, Array], dict[str, float]]:
    """The first kind of input that shows the first layer's fault, else where it shows most."""
    view, other = View.of(original), View.of(folded)
    alignment = Alignment.of(view, other, plan["gauges"], plan["aliases"])
    names = [each.value for each in blamed if each.value in alignment.there]
    best = (sets[0].name, dict(sets[0].batches[0]), dict[str, float]())
    most = -1.0
    for group in sets:
        feeds = dict(group.batches[0])
        try:
            before, after = Float64Reference(original), Float64Reference(folded)
            errors = {
                name: alignment.error(name, x, z)
                for name, x, z in lockstep(before, after, feeds, alignment, names=names)
                if alignment.comparable(name, x, z)
            }
        except BnfoldError:
            continue
        shown = errors.get(blamed[0].value, 0.0)
        if shown > most:
            best, most = (group.name, feeds, errors), shown
        if shown > NOISE * plan["unit"]:
            break
    return best


# ---------------------------------------------------------------------------- what the values show


def _tried(sets: Sequence[InputSet]) -> Iterator[tuple[bool, str, Mapping[str, Array]]]:
    """(whether rounding counts, kind, batch): a batch of each kind, then more, then all again."""
    firsts = [(group.name, group.batches[0]) for group in sets]
    more = [(group.name, batch) for group in sets for batch in group.batches[1:]]
    for kind, batch in (*firsts, *more[:MORE]):
        yield False, kind, batch
    for kind, batch in firsts:
        yield True, kind, batch


def _agreement(
    original: onnx.ModelProto, folded: onnx.ModelProto, sets: Sequence[InputSet], unit: float
) -> str:
    """What float64 says of two networks that part nowhere."""
    worst = max(output_errors(original, folded, group.batches[0]) for group in sets)
    if worst > NOISE * unit:
        return (
            f"In float64 too an element of the outputs is off by {worst:.2g} of the largest, and no"
            " value before it stands out."
        )
    return (
        f"In float64 the outputs of the two agree, to {worst:.2g} of their largest element: what"
        " differs is a runtime's rounding, or a torch module that is not its graph."
    )
