"""Where two networks part: the first value, in order of execution, that is not what it should be.

Both are run in float64, so that only the written weights' rounding and real faults are left. The
first wrong values are put right in the folded network and it is run again: what then is still wrong
is another fault, and where nothing is, these were all. What is off by no more than the original is
on onnxruntime is rounding of an ill-conditioned layer, and is told where there is nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx

from bnfold.errors import BnfoldError
from bnfold.proof.algebra.certificate import Gauge
from bnfold.proof.exact.alignment import Alignment, relative_error
from bnfold.proof.exact.counterpart import View
from bnfold.proof.exact.reference import Float64Reference
from bnfold.proof.fault.measured import own_errors
from bnfold.proof.places.runtimes import R_LIMIT

Array = np.ndarray[Any, np.dtype[Any]]

NOISE = 16  # roundings of the weights' dtype that a value may carry without being suspected
SLIGHT = 4  # roundings that are followed back all the same, where the error grew to no more than
GROWN = 4  # this many times
JUMP = 1000  # an error this many times that of its sources is not inherited from them
FEW = 64  # elements of a slice of an output, below which its error may be luck
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
        how = f"is off by {self.error:.2g} of its size"
        if not np.isfinite(self.error):
            how = "has NaN or infinite elements, or another shape"
        return f"the two part at {self.op_type} '{self.node}', whose result '{self.value}' {how}."


def divergences(
    original: onnx.ModelProto,
    folded: onnx.ModelProto,
    inputs: Mapping[str, Array],
    *,
    gauges: Mapping[str, Gauge] | None,
    aliases: Mapping[str, str] | None,
    unit: float,
    rounding: bool = True,
) -> list[Divergence]:
    """Every value that is wrong while what it is computed from is right, in order of execution.

    With gauges, every value is held against scale * (x - origin). Without, values are told by what
    they are computed from, and by name (alignment.py). unit: rounding of the weights' dtype.
    rounding: where there is none, give those that the original's own rounding explains. Raises
    BnfoldError where a model cannot be run in float64.
    """
    view = View.of(original)
    alignment = Alignment.of(view, View.of(folded), gauges, aliases)
    before, after = Float64Reference(original), Float64Reference(folded)
    outputs = [value.name for value in original.graph.output]
    limit = NOISE * unit
    found: dict[str, float] = {}
    rounded: dict[str, float] = {}
    given: dict[str, Array] = {}
    explained = partial(_right_with, before, after, inputs, alignment, given, limit)
    for _ in range(ROUNDS):
        errors, slices = {}, {}
        for name, x, z in lockstep(before, after, inputs, alignment, given):
            if alignment.comparable(name, x, z):
                errors[name] = alignment.error(name, x, z)
            if name in outputs:
                slices[name] = max(_worst_slice(x, z), peak_error(x, z))
        wrong = [name for name in outputs if errors.get(name, 0.0) > limit]
        wrong = wrong or [name for name in outputs if slices.get(name, 0.0) > limit]
        known = found.keys() | rounded.keys()
        new = [n for n in suspects(view, wrong, errors, unit, explained) if n not in known]
        if not new:
            break
        usual = own_errors(original, before, new, inputs, alignment)
        faults = [name for name in new if errors[name] > R_LIMIT * usual[name]]
        found |= {name: errors[name] for name in faults}
        rounded |= {name: errors[name] for name in new if name not in faults}
        right = before.run(inputs, new)
        given |= {alignment.there[name]: alignment.written(name, right[name]) for name in new}
    found = found or (rounded if rounding else {})
    order = {name: index for index, name in enumerate(alignment.there)}
    return [
        Divergence(name, view.label(view.producers[name]), view.producers[name].op_type, error)
        for name, error in sorted(found.items(), key=lambda item: order[item[0]])
    ]


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


def _right_with(
    before: Float64Reference,
    after: Float64Reference,
    inputs: Mapping[str, Array],
    alignment: Alignment,
    given: Mapping[str, Array],
    limit: float,
    name: str,
    sources: Sequence[str],
) -> bool:
    """Whether the folded network computes a value rightly from right sources."""
    right = before.run(inputs, [*sources, name])
    put = {alignment.there[s]: alignment.written(s, right[s]) for s in sources}
    there = alignment.there[name]
    if there in put:
        return False
    try:
        z = after.run({**inputs, **given, **put}, [there])[there]
    except BnfoldError:
        return False
    return alignment.error(name, right[name], z) <= limit


def _worst_slice(x: Any, z: Any) -> float:
    """The largest error among the channels of an output, and among the elements of its last axis.

    A small head beside a large one is lost in the size of both.
    """
    if not isinstance(x, np.ndarray) or np.shape(x) != np.shape(z) or x.ndim < 2:
        return 0.0
    errors = [
        relative_error(np.take(x, [index], axis), np.take(z, [index], axis))
        for axis in {1, x.ndim - 1}
        for index in range(x.shape[axis])
        if x.size >= FEW * x.shape[axis]
    ]
    return max(errors, default=0.0)


def suspects(
    view: View,
    wrong: Sequence[str],
    errors: Mapping[str, float],
    unit: float,
    explained: Callable[[str, Sequence[str]], bool] | None = None,
) -> list[str]:
    """Back from wrong outputs through wrong values to those whose sources are right.

    So a value that a fold carries otherwise, with right values behind it, is not taken for a fault.
    An error just above what is suspected is followed to where it is just below. explained: whether
    a value is right once its sources are, asked where its error jumps.
    """
    pending = list(wrong)
    seen: set[str] = set()
    found: list[str] = []
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        sources = compared_sources(view, name, errors)
        inherited = [s for s in sources if _inherits(errors[name], errors[s], unit)]
        off = any(errors[source] for source in sources)
        if not inherited and off and explained is not None and explained(name, sources):
            # a threshold, a logarithm: no error of its own, however large
            pending.extend(s for s in sources if errors[s] > NOISE * unit)
            continue
        pending.extend(inherited)
        if not inherited:
            found.append(name)
    order = {name: index for index, name in enumerate(errors)}
    return sorted(found, key=order.__getitem__)


def _inherits(error: float, behind: float, unit: float) -> bool:
    """Whether an error may come from that of a source."""
    if behind > NOISE * unit:
        return not error > JUMP * behind
    return behind > SLIGHT * unit and error <= GROWN * behind


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


def output_errors(
    original: onnx.ModelProto, folded: onnx.ModelProto, inputs: Mapping[str, Array]
) -> float:
    """The largest error of an element of an output in float64, over the largest element there.

    Raises BnfoldError where a model cannot be run in float64, or lacks an output of the original.
    """
    names = [value.name for value in original.graph.output]
    before, after = (Float64Reference(model).run(inputs, names) for model in (original, folded))
    return max((peak_error(before[name], after[name]) for name in names), default=0.0)


def peak_error(x: Any, z: Any) -> float:
    """The largest error of an element over the largest element; inf for another shape."""
    if not isinstance(x, np.ndarray) or np.shape(x) != np.shape(z) or x.dtype.kind != "f":
        return relative_error(x, z)
    with np.errstate(all="ignore"):
        same = (x == z) | (np.isnan(x) & np.isnan(z))
        error = float(np.max(np.abs(np.where(same, 0.0, z - x)), initial=0.0))
        size = float(np.max(np.abs(np.where(np.isfinite(x), x, 0.0)), initial=0.0))
    if error == 0:
        return 0.0
    return error / size if size and np.isfinite(error) else np.inf
