"""The error at every batch norm that was, one after the other: where it arises, how it goes on.

At the result of each batch norm of the original stand three relative 2-norm errors against a
float64 evaluation of the original: of the original itself on onnxruntime, which is what its own
rounding does; of the folded network there; and of the folded network in float64, where no rounding
is left but that of its weights, so that a fault stands out even where rounding would hide it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from bnfold.errors import NothingComparedError
from bnfold.jsonable import plain
from bnfold.proof.algebra.certificate import Gauge
from bnfold.proof.exact.alignment import Alignment, relative_error
from bnfold.proof.exact.counterpart import View
from bnfold.proof.exact.layers import Norm, norms_of
from bnfold.proof.exact.reference import Float64Reference
from bnfold.proof.fault.divergence import lockstep
from bnfold.proof.fault.measured import measured
from bnfold.proof.figures.verdicts import FLOOR

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class LayerError:
    """The errors at a batch norm's result.

    norm: the layer; value: its result in the original. original: of the original in its own type;
    folded, exact: of the folded network in its own type and in float64, None where it holds no such
    value. ratio: of `folded` to `original`, or to 4 roundings where that is less.
    """

    norm: str
    value: str
    original: float
    folded: float | None = None
    exact: float | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Profile:
    """The layers in order of execution; inputs: the kind they were measured on; unit: u."""

    inputs: str
    unit: float
    layers: tuple[LayerError, ...]

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON takes it; infinities and NaN as strings."""
        layers = [plain(vars(layer)) for layer in self.layers]
        return {"inputs": self.inputs, "unit": self.unit, "layers": layers}


def profile(
    original: onnx.ModelProto,
    folded: onnx.ModelProto | None,
    inputs: Mapping[str, Array],
    *,
    gauges: Mapping[str, Gauge] | None = None,
    aliases: Mapping[str, str] | None = None,
    unit: float = 2.0**-24,
    kind: str = "given",
    threads: int | None = None,
) -> Profile:
    """The error at every batch norm of `original`, for one batch of inputs.

    folded: None for the original's own errors alone. gauges, aliases: the plan's, if it is known.
    unit: rounding of the type that the models compute in. kind: what the inputs are, for a report.
    Raises NothingComparedError where there is no batch norm, InputError where a model does not run.
    """
    view = View.of(original)
    norms = {norm.output: norm for norm in norms_of(view)}
    if not norms:
        raise NothingComparedError("the original has no batch norm, so there is no profile of any.")
    before = Float64Reference(original)
    own = measured(original, norms, inputs, threads)
    errors: dict[str, dict[str, Any]] = {name: {} for name in norms}
    there: dict[str, str] = {}
    if folded is not None:
        alignment = Alignment.of(view, View.of(folded), gauges, aliases)
        there = {name: alignment.there[name] for name in norms if name in alignment.there}
        got = measured(folded, there.values(), inputs, threads)
        after = Float64Reference(folded)
        for name, x, z in lockstep(before, after, inputs, alignment, names=list(there)):
            errors[name] = {
                "original": relative_error(x, own.pop(name).astype(np.float64)),
                "folded": _read_error(alignment, name, x, got[there[name]]),
                "exact": _read_error(alignment, name, x, z),
            }
    for name, x in before.stream(inputs, [name for name in norms if name not in there]):
        errors[name] = {"original": relative_error(x, own.pop(name).astype(np.float64))}
    return Profile(kind, unit, tuple(_layer(norm, errors[n], unit) for n, norm in norms.items()))


def _read_error(alignment: Alignment, name: str, x: Array, z: Array) -> float:
    value, usable = alignment.read_back(name, z.astype(np.float64))
    return relative_error(x, value, usable)


def _layer(norm: Norm, errors: Mapping[str, float], unit: float) -> LayerError:
    ratio = None
    if "folded" in errors:
        with np.errstate(all="ignore"):
            ratio = errors["folded"] / max(errors["original"], FLOOR * unit)
    return LayerError(norm.name, norm.output, **errors, ratio=ratio)
