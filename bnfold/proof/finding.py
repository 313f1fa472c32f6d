"""What is wrong with a fold that failed: where the networks part, and why.

The kinds of input are gone through until one shows a difference in float64; on that one the first
wrong values are found, and what spoiled them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from bnfold.errors import BnfoldError
from bnfold.proof.cause import Cause, find_cause
from bnfold.proof.certificate import Gauge
from bnfold.proof.divergence import NOISE, Divergence, divergences, output_errors
from bnfold.proof.draws import InputSet

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
) -> Finding:
    """Where and why two networks part, on the first kind of input that shows it.

    gauges, aliases: the plan's, if it is known. unit: rounding of the weights' type. Never raises
    for what cannot be found: the sentence says so.
    """
    plan: dict[str, Any] = {"gauges": gauges, "aliases": aliases, "unit": unit}
    parted: list[Divergence] = []
    kind, feeds = "", dict[str, Array]()
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
            sentence = _capital(parted[0].sentence)
        return Finding(tuple(parted), None, kind, feeds, sentence)
    sentence = f"{_capital(parted[0].sentence)} {cause.sentence}"
    return Finding(tuple(parted), cause, kind, feeds, sentence)


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


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
