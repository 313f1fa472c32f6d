"""Where two networks part: the first value, in order of execution, that is not what it should be.

Both are run in float64, so that only the written weights' rounding and real faults are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from bnfold.errors import BnfoldError
from bnfold.proof.certificate import Gauge
from bnfold.proof.counterpart import View
from bnfold.proof.reference import Float64Reference

Array = np.ndarray[Any, np.dtype[Any]]

NOISE = 16  # roundings of the weights' dtype that a value may carry without being suspected
JUMP = 1000  # an error this many times that of its sources is not inherited from them


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

    With gauges, every value is held against scale * (x - origin). Without, values are compared by
    name, as far as both graphs have it. unit: rounding of the weights' dtype. Raises BnfoldError
    where a model cannot be run in float64.
    """
    view = View.of(original)
    names = [
        name
        for node in view.nodes
        for name in node.output
        if name and not view.is_constant(name)
    ]  # fmt: skip
    aliases = aliases or {}
    target = View.of(folded)
    there = {name: aliases.get(name, name) for name in names}
    names = [name for name in names if target.knows(there[name])]
    before = Float64Reference(original).run(inputs, names)
    after = Float64Reference(folded).run(inputs, [there[name] for name in names])
    errors = {
        name: _error(before[name], after[there[name]], (gauges or {}).get(name)) for name in names
    }
    name = _origin(view, [value.name for value in original.graph.output], errors, NOISE * unit)
    if name is None:
        return None
    node = view.producers[name]
    return Divergence(name, view.label(node), node.op_type, errors[name])


def _origin(
    view: View, outputs: list[str], errors: Mapping[str, float], limit: float
) -> str | None:
    """Back from the wrong outputs through wrong values to the first whose sources are right.

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
            for source in _compared_sources(view, name, errors)
            if errors[source] > limit and not error > JUMP * errors[source]
        ]
        pending.extend(inherited)
        if not inherited:
            found.append(name)
    order = {name: index for index, name in enumerate(errors)}
    return min(found, key=order.__getitem__, default=None)


def _compared_sources(view: View, name: str, errors: Mapping[str, float]) -> list[str]:
    """The nearest values behind this one that were compared."""
    nearest: list[str] = []
    pending = view.sources(view.producers[name])
    seen: set[str] = set()
    while pending:
        source = pending.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in errors:
            nearest.append(source)
        elif source in view.producers:
            pending.extend(view.sources(view.producers[source]))
    return nearest


def _error(x: Any, z: Any, gauge: Gauge | None) -> float:
    """Relative distance of z from what it should be, by the 2-norm; inf for another shape."""
    if not isinstance(x, np.ndarray) or not isinstance(z, np.ndarray):
        return 0.0
    if x.shape != z.shape:
        return np.inf
    if x.dtype.kind != "f":
        return 0.0 if np.array_equal(x, z) else np.inf
    with np.errstate(all="ignore"):
        if gauge is not None:
            scale = np.asarray(gauge.scale, np.float64)
            usable = np.broadcast_to(np.isfinite(scale) & (scale != 0), x.shape)
            x = np.where(usable, scale * (x - gauge.origin), 0.0)
            z = np.where(usable, z, 0.0)
        same = (x == z) | (np.isnan(x) & np.isnan(z))
        distance = float(np.linalg.norm(np.where(same, 0.0, z - x).ravel()))
        size = float(np.linalg.norm(np.where(np.isfinite(x), x, 0.0).ravel()))
    if distance == 0:
        return 0.0
    return distance / size if size and np.isfinite(distance) else np.inf


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
