"""Where two networks part: the first value, in order of execution, that is not what it should be.

Both are run in float64, so that only the written weights' rounding and real faults are left. Where
there may be several faults, the first wrong values are put right in the folded network and it is
run again: what then is still wrong is another fault, and where nothing is, these were all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from bnfold.errors import BnfoldError
from bnfold.proof.alignment import Alignment
from bnfold.proof.certificate import Gauge
from bnfold.proof.counterpart import View
from bnfold.proof.reference import Float64Reference

Array = np.ndarray[Any, np.dtype[Any]]

NOISE = 16  # roundings of the weights' dtype that a value may carry without being suspected
JUMP = 1000  # an error this many times that of its sources is not inherited from them
ROUNDS = 8  # times that the first wrong values are put right to look for more


@dataclass(frozen=True)
class Divergence:
    """A value of the original, the node that computes it, and the relative error there."""

    value: str
    node: str
    op_type: str
    error: float

    @property
    def sentence(self) -> str:
        """Where to look."""
        return (
            f"the two part at {self.op_type} '{self.node}', whose result '{self.value}' is off by "
            f"{self.error:.2g} of its size."
        )


def first_divergence(
    original: onnx.ModelProto,
    folded: onnx.ModelProto,
    inputs: Mapping[str, Array],
    *,
    gauges: Mapping[str, Gauge] | None,
    aliases: Mapping[str, str] | None,
    unit: float,
) -> Divergence | None:
    """The first value whose error jumps, or None where the two agree in float64.

    With gauges, every value is held against scale * (x - origin). Without, values are told by what
    they are computed from, and by name (alignment.py). unit: rounding of the weights' dtype. Raises
    BnfoldError where a model cannot be run in float64.
    """
    found = divergences(
        original, folded, inputs, gauges=gauges, aliases=aliases, unit=unit, rounds=1
    )
    return found[0] if found else None


def divergences(
    original: onnx.ModelProto,
    folded: onnx.ModelProto,
    inputs: Mapping[str, Array],
    *,
    gauges: Mapping[str, Gauge] | None,
    aliases: Mapping[str, str] | None,
    unit: float,
    rounds: int = ROUNDS,
) -> list[Divergence]:
    """Every value that is wrong while what it is computed from is right, in order of execution.

    rounds: how often the values found are put right in the folded network to look behind them.
    Arguments and errors as for `first_divergence`.
    """
    view = View.of(original)
    alignment = Alignment.of(view, View.of(folded), gauges, aliases)
    before, after = Float64Reference(original), Float64Reference(folded)
    outputs = [value.name for value in original.graph.output]
    found: dict[str, float] = {}
    given: dict[str, Array] = {}
    for _ in range(rounds):
        errors = {
            name: alignment.error(name, x, z)
            for name, x, z in lockstep(before, after, inputs, alignment, given)
        }
        limit = NOISE * unit
        ends = outputs if gauges is None or _any(outputs, errors, limit) else list(errors)
        new = [name for name in suspects(view, ends, errors, limit) if name not in found]
        found |= {name: errors[name] for name in new}
        if not new or rounds == 1:
            break
        right = before.run(inputs, new)
        given |= {alignment.there[name]: alignment.written(name, right[name]) for name in new}
    order = {name: index for index, name in enumerate(alignment.there)}
    return [
        Divergence(name, view.label(view.producers[name]), view.producers[name].op_type, error)
        for name, error in sorted(found.items(), key=lambda item: order[item[0]])
    ]


def _any(names: Sequence[str], errors: Mapping[str, float], limit: float) -> bool:
    """Whether one of them is wrong. If no output is, only a plan says what is wrong before it."""
    return any(errors.get(name, 0.0) > limit for name in names)


def lockstep(
    before: Float64Reference,
    after: Float64Reference,
    inputs: Mapping[str, Array],
    alignment: Alignment,
    given: Mapping[str, Array] | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[tuple[str, Any, Any]]:
    """(name, value of the original, its counterpart) for every aligned value, or for `names`.

    given: values of the folded network that it is to take for right. No more is held at a time than
    the two runs need.
    """
    there = alignment.there if names is None else {name: alignment.there[name] for name in names}
    waiting = Counter(there.values())
    arriving = after.stream({**inputs, **(given or {})}, there.values())
    held: dict[str, Any] = {}
    for name, x in before.stream(inputs, there):
        while there[name] not in held:
            arrived, z = next(arriving)
            held[arrived] = z
        yield name, x, held[there[name]]
        waiting[there[name]] -= 1
        if not waiting[there[name]]:
            del held[there[name]]


def suspects(
    view: View, outputs: Sequence[str], errors: Mapping[str, float], limit: float
) -> list[str]:
    """Back from the wrong outputs through wrong values to those whose sources are right.

    So a value that a fold carries otherwise, with right values behind it, is not taken for a fault.
    """
    pending = [name for name in outputs if errors.get(name, 0.0) > limit]
    seen: set[str] = set()
    found: list[str] = []
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        error = errors[name]
        inherited = [
            source
            for source in compared_sources(view, name, errors)
            if errors[source] > limit and not error > JUMP * errors[source]
        ]
        pending.extend(inherited)
        if not inherited:
            found.append(name)
    order = {name: index for index, name in enumerate(errors)}
    return sorted(found, key=order.__getitem__)


def compared_sources(view: View, name: str, compared: Mapping[str, Any]) -> list[str]:
    """The nearest values behind this one that were compared."""
    nearest: list[str] = []
    pending = view.sources(view.producers[name]) if name in view.producers else []
    seen: set[str] = set()
    while pending:
        source = pending.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in compared:
            nearest.append(source)
        elif source in view.producers:
            pending.extend(view.sources(view.producers[source]))
    return nearest


def explain(divergence: Divergence | None, problem: BnfoldError | None) -> str:
    """One sentence about where the two part, for the end of a failure."""
    if problem is not None:
        return f"Where they part could not be found: {problem}"
    if divergence is None:
        return (
            "In exact arithmetic the two graphs agree: what differs is a runtime's rounding, or a"
            " torch module that is not its graph."
        )
    return divergence.sentence[0].upper() + divergence.sentence[1:]
