"""What is wrong with a fold that failed: where the networks part, and why.

The kinds of input are gone through until one shows a difference in float64; on that one the first
wrong values are found, and what spoiled them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from bnfold.errors import BnfoldError
from bnfold.proof.cause import Cause, find_cause
from bnfold.proof.certificate import Gauge
from bnfold.proof.divergence import Divergence, divergences, explain
from bnfold.proof.draws import InputSet

Array = np.ndarray[Any, np.dtype[Any]]


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
    parted: list[Divergence] = []
    kind, feeds = "", dict[str, Array]()
    try:
        for group in sets:
            kind, feeds = group.name, dict(group.batches[0])
            parted = divergences(original, folded, feeds, gauges=gauges, aliases=aliases, unit=unit)
            if parted:
                break
        cause = find_cause(
            original, folded, feeds, parted, gauges=gauges, aliases=aliases, unit=unit
        )
    except BnfoldError as problem:
        first = parted[0] if parted else None
        sentence = explain(first, None if first else problem)
        return Finding(tuple(parted), None, kind, feeds, sentence)
    sentence = explain(parted[0] if parted else None, None)
    if cause is not None:
        sentence += f" {cause.sentence}"
    return Finding(tuple(parted), cause, kind, feeds, sentence)
