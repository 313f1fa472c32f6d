"""Are two networks the same function? Three gates, and the first layer where they part.

A, the algebra: every constant of the folded graph against the exact one, without data
   (certificate.py). It needs the plan's gauges; without them it is not run, and the report says so.
B, the network: on onnxruntime's CPU, without its graph optimization,
       R = error of the folded network / max(error of the original, 4u),
   both errors relative 2-norms against a float64 evaluation of the original, u the rounding of the
   model's dtype. A right fold has R near 1 whatever the network's conditioning; R <= 4 passes.
   Besides, no element of a sample may be further off than ten times the original's worst element.
C, the runtime: every backend that was asked for, with its own optimization, by the same ratio.

An original that is itself far from its float64 evaluation (an operator that the runtime and the
reference read differently, a threshold that rounding crosses) proves nothing: that fails too, and
so does a model that the float64 reference cannot run. What could not be compared never passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from bnfold.errors import (
    BnfoldError,
    InputError,
    NothingComparedError,
    UsageError,
    VerificationError,
)
from bnfold.proof.certificate import Certificate, Gauge, certify
from bnfold.proof.comparison import Backends, Comparison, GateResult, Progress, computes_in
from bnfold.proof.divergence import Divergence, explain, first_divergence

if TYPE_CHECKING:
    import torch

__all__ = ["GateResult", "VerifyReport", "verify"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class VerifyReport:
    """The gates' results; `passed` is true when all ran that could be asked for, and all passed.

    samples: rows compared. sets: the kinds of inputs. noise: backend -> relative difference of two
    runs of one session. backends: backend -> where its nodes ran (provider -> operator -> count).
    """

    gates: tuple[GateResult, ...]
    seed: int
    samples: int
    sets: tuple[str, ...]
    noise: Mapping[str, float] = field(default_factory=dict)
    backends: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    certificate: Certificate | None = None
    first_divergence: Divergence | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """True when the network gate compared something and no gate failed."""
        compared = any(result.gate == "B" for result in self.gates)
        return compared and all(result.passed for result in self.gates)

    @property
    def failures(self) -> tuple[GateResult, ...]:
        """The results that did not pass, gate A first."""
        return tuple(result for result in self.gates if not result.passed)

    @property
    def r(self) -> float:
        """The worst ratio of gate B (NaN where it could not be computed)."""
        ratios = [result.value for result in self.gates if result.name == "error ratio"]
        return max(ratios) if ratios else math.nan

    def raise_for_failure(self) -> None:
        """Raise VerificationError with the first failure, or NothingComparedError."""
        if self.failures:
            first = self.failures[0]
            more = f" ({len(self.failures)} checks failed.)" if len(self.failures) > 1 else ""
            where = f" {self.notes[-1]}" if self.notes else ""
            raise VerificationError(f"Gate {first.gate}: {first.sentence}{more}{where}")
        if not self.passed:
            raise NothingComparedError("no output of the two networks was compared.")

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it; infinities and NaN as strings."""
        parting = self.first_divergence
        certificate = self.certificate
        fields: dict[str, Any] = _jsonable(
            {
                "passed": self.passed,
                "r": self.r,
                "gates": [vars(result) for result in self.gates],
                "seed": self.seed,
                "samples": self.samples,
                "inputs": list(self.sets),
                "noise": dict(self.noise),
                "backends": {
                    name: {k: dict(v) for k, v in placed.items()}
                    for name, placed in self.backends.items()
                },
                "nodes": [vars(record) for record in certificate.records] if certificate else None,
                "first_divergence": vars(parting) if parting else None,
                "notes": list(self.notes),
                "seconds": self.seconds,
            }
        )
        return fields


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else str(float(value))
    return value.item() if isinstance(value, np.generic) else value


# --------------------------------------------------------------------------------- the gates


def verify(
    original: onnx.ModelProto | bytes | str | Path,
    folded: onnx.ModelProto | bytes | str | Path,
    *,
    gauges: Mapping[str, Gauge] | None = None,
    aliases: Mapping[str, str] | None = None,
    inputs: Mapping[str, Array] | None = None,
    providers: Sequence[str] = ("cpu",),
    seed: int = 0,
    samples: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    torch_modules: tuple[torch.nn.Module, torch.nn.Module] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare `folded` with `original` and report; a failed gate is no exception.

    original, folded: a ModelProto, the bytes of a file, or a path. gauges, aliases: the plan's, by
    value name of the original (certificate.certify). inputs: arrays by input name, all rows are
    compared; default: draws (draws.drawn_inputs) from `seed`. providers: "cpu", "cuda", for gate C.
    torch_modules: the original and the folded module, compared as backends of gate C; their
    forward takes the model's inputs in order.

    Raises RuntimeUnavailableError when a provider cannot run here (never a pass),
    NothingComparedError when there is no output or no sample, InputError for unreadable models or
    unfit inputs, UsageError for no provider at all.
    """
    begun = time.perf_counter()
    if not providers:
        raise UsageError("no provider was given to compare on; use cpu, cuda or both.")
    before, after = _load(original, "original"), _load(folded, "folded")
    if not before.graph.output:
        raise NothingComparedError("the original model has no outputs, so nothing can be compared.")
    gates: list[GateResult] = []
    certificate = None
    notes = []
    try:
        backends = Backends.open(original, folded, providers, torch_modules, threads)
    except InputError as refused:
        elsewhere = computes_in(before, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
        if torch_modules is None or not elsewhere or tuple(providers) != ("cpu",):
            raise
        backends = Backends.in_torch(before, torch_modules)
        notes.append(f"The networks were compared in torch; the ONNX file was not run: {refused}")
    if gauges is None:
        notes.append("Gate A was not run: the plan of this fold is not known.")
    else:
        shapes = input_shapes or {name: np.shape(array) for name, array in (inputs or {}).items()}
        certificate = certify(before, after, gauges, aliases or {}, input_shapes=shapes)
        gates += _algebra(certificate)
    comparison = Comparison.of(before, after, backends, seed, samples, input_shapes, inputs)
    gates += comparison.judge(progress)
    parting, where = None, ""
    if not all(result.passed for result in gates) and comparison.reference is not None:
        parting, where = _where(before, after, comparison, gauges, aliases)
        notes.append(where)
    return VerifyReport(
        gates=tuple(gates),
        seed=seed,
        samples=comparison.samples,
        sets=tuple(group.name for group in comparison.sets),
        noise=comparison.noise,
        backends=backends.placement,
        certificate=certificate,
        first_divergence=parting,
        notes=tuple(notes),
        seconds=time.perf_counter() - begun,
    )


def _load(model: onnx.ModelProto | bytes | str | Path, role: str) -> onnx.ModelProto:
    if isinstance(model, onnx.ModelProto):
        return model
    try:
        if isinstance(model, bytes):
            return onnx.load_from_string(model)
        return onnx.load(str(model))
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the {role} model cannot be read as ONNX: {first}") from error


def _algebra(certificate: Certificate) -> list[GateResult]:
    """Gate A: every failure, or one line for all that held."""
    if certificate.passed:
        worst = certificate.worst
        ulps = worst.ulps if worst else 0.0
        count = len(certificate.records)
        sentence = f"{count} checks hold; the worst constant is {ulps:.2g} roundings off."
        return [GateResult("A", "roundings", "every node", ulps, 1.0, True, sentence)]
    return [
        GateResult("A", record.check, record.node, record.ulps, 1.0, False, record.sentence)
        for record in certificate.failures
    ]


def _where(before: onnx.ModelProto, after: onnx.ModelProto, comparison: Comparison,
           gauges: Mapping[str, Gauge] | None, aliases: Mapping[str, str] | None
           ) -> tuple[Divergence | None, str]:  # fmt: skip
    """The first divergence on the first kind of input that shows one, and a sentence about it."""
    try:
        for group in comparison.sets:
            feeds = min(group.batches, key=lambda batch: sum(x.size for x in batch.values()))
            parting = first_divergence(before, after, feeds, gauges=gauges, aliases=aliases,
                                       unit=comparison.unit)  # fmt: skip
            if parting is not None:
                return parting, explain(parting, None)
    except BnfoldError as error:
        return None, explain(None, error)
    return None, explain(None, None)
