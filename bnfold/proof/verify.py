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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from bnfold.errors import BnfoldError, InputError, NothingComparedError, VerificationError
from bnfold.proof.backends import Backends, Places, open_in_torch, open_one, open_two
from bnfold.proof.certificate import Certificate, Gauge, certify
from bnfold.proof.comparison import Comparison, GateResult, Progress, computes_in
from bnfold.proof.divergence import Divergence, explain, first_divergence
from bnfold.proof.runtimes import DEFAULT, Runtime, as_runtimes

if TYPE_CHECKING:
    import torch

__all__ = ["GateResult", "Ran", "VerifyReport", "parity", "verify"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Ran:
    """One network's run in one place, and what shows that it ran there.

    name: the runtime as written; role: whose network; gate: B or C. providers: where onnxruntime
    placed the nodes (provider -> operator -> count; empty for torch). libraries: the files of CUDA,
    cuDNN and TensorRT that its process had in memory. noise: the relative difference of two runs of
    one session and of one in another. ratio: its worst error ratio, NaN where nothing was compared.
    """

    name: str
    role: str
    gate: str
    providers: Mapping[str, Mapping[str, int]]
    libraries: tuple[str, ...]
    own_process: bool
    noise: float
    ratio: float


@dataclass(frozen=True)
class VerifyReport:
    """The gates' results; `passed` is true when all ran that could be asked for, and all passed.

    question: the gate without which nothing is proved, B of two networks and C of one. samples:
    rows compared. sets: the kinds of inputs. runtimes: each run and its evidence.
    """

    gates: tuple[GateResult, ...]
    seed: int
    samples: int
    sets: tuple[str, ...]
    runtimes: tuple[Ran, ...] = ()
    question: str = "B"
    certificate: Certificate | None = None
    first_divergence: Divergence | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """True when the gate in question compared something and no gate failed."""
        compared = any(result.gate == self.question for result in self.gates)
        return compared and all(result.passed for result in self.gates)

    @property
    def failures(self) -> tuple[GateResult, ...]:
        """The results that did not pass, gate A first."""
        return tuple(result for result in self.gates if not result.passed)

    @property
    def r(self) -> float:
        """The worst ratio of the gate in question (NaN where it could not be computed)."""
        name = "error ratio" if self.question == "B" else "backend ratio"
        ratios = [result.value for result in self.gates if result.name == name]
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
                "noise": {_key(ran): ran.noise for ran in self.runtimes if ran.gate == "C"},
                "backends": {_key(ran): ran.providers for ran in self.runtimes if ran.providers},
                "runtimes": [vars(ran) for ran in self.runtimes],
                "nodes": [vars(record) for record in certificate.records] if certificate else None,
                "first_divergence": vars(parting) if parting else None,
                "notes": list(self.notes),
                "seconds": self.seconds,
            }
        )
        return fields


def _key(ran: Ran) -> str:
    return f"{ran.name}, gate {ran.gate}, {ran.role}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
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
    runtimes: Sequence[str | Runtime] = (DEFAULT,),
    seed: int = 0,
    samples: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    torch_modules: tuple[torch.nn.Module, torch.nn.Module] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    own_process: bool = False,
    time_limit: float | None = None,
) -> VerifyReport:
    """Compare `folded` with `original` and report; a failed gate is no exception.

    original, folded: a ModelProto, the bytes of a file, or a path. gauges, aliases: the plan's, by
    value name of the original (certificate.certify). inputs: arrays by input name, all rows are
    compared; default: draws (draws.drawn_inputs) from `seed`. runtimes: where gate C runs the
    folded network, such as "ort-cpu" or "ort-cuda:tf32" (runtimes.RUNTIMES). torch_modules: the
    original and the folded module, compared in gate C; their forward takes the model's inputs in
    order. own_process: onnxruntime's CPU runs in a process of its own too, as a GPU's always does;
    time_limit: seconds for each of its answers.

    Raises RuntimeUnavailableError when a runtime cannot run here (never a pass),
    NothingComparedError when there is no output or no sample, InputError for unreadable models or
    unfit inputs, UsageError for no runtime, an unknown one, or torch where there is no module.
    """
    begun = time.perf_counter()
    places = as_runtimes(runtimes)
    before, after = _load(original, "original"), _load(folded, "folded")
    _check_outputs(before)
    gates: list[GateResult] = []
    certificate = None
    notes = []
    with Places(threads, own_process=own_process, time_limit=time_limit) as opened:
        try:
            backends = open_two(opened, original, folded, places, torch_modules)
        except InputError as refused:
            elsewhere = computes_in(before, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
            if torch_modules is None or not elsewhere or places != (Runtime(DEFAULT),):
                raise
            backends = open_in_torch(before, torch_modules)
            notes.append(
                f"The networks were compared in torch; the ONNX file was not run: {refused}"
            )
        if gauges is None:
            notes.append("Gate A was not run: the plan of this fold is not known.")
        else:
            shapes = input_shapes or {name: np.shape(x) for name, x in (inputs or {}).items()}
            certificate = certify(before, after, gauges, aliases or {}, input_shapes=shapes)
            gates += _algebra(certificate)
        comparison = Comparison.of(before, after, backends, seed, samples, input_shapes, inputs)
        gates += comparison.judge(progress)
        evidence = _evidence(backends, comparison)
    parting, where = None, ""
    if not all(result.passed for result in gates) and comparison.reference is not None:
        parting, where = _where(before, after, comparison, gauges, aliases)
        notes.append(where)
    return VerifyReport(
        gates=tuple(gates),
        seed=seed,
        samples=comparison.samples,
        sets=tuple(group.name for group in comparison.sets),
        runtimes=evidence,
        certificate=certificate,
        first_divergence=parting,
        notes=tuple(notes),
        seconds=time.perf_counter() - begun,
    )


def parity(
    model: onnx.ModelProto | bytes | str | Path,
    *,
    runtimes: Sequence[str | Runtime] = (DEFAULT,),
    inputs: Mapping[str, Array] | None = None,
    seed: int = 0,
    samples: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    torch_module: torch.nn.Module | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    own_process: bool = False,
    time_limit: float | None = None,
) -> VerifyReport:
    """Does one network compute the same on every runtime? Gate C alone.

    Each run is held against the float64 evaluation of the model, and its error against that of
    onnxruntime's CPU without graph optimization. torch_module: the module that the model was
    exported from, for the runtimes of torch. The rest, and what is raised, is as for `verify`.
    """
    begun = time.perf_counter()
    places = as_runtimes(runtimes)
    proto = _load(model, "given")
    _check_outputs(proto)
    with Places(threads, own_process=own_process, time_limit=time_limit) as opened:
        backends = open_one(opened, model, places, torch_module)
        comparison = Comparison.of(proto, proto, backends, seed, samples, input_shapes, inputs, "C")
        gates = comparison.judge(progress)
        evidence = _evidence(backends, comparison)
    return VerifyReport(
        gates=tuple(gates),
        seed=seed,
        samples=comparison.samples,
        sets=tuple(group.name for group in comparison.sets),
        runtimes=evidence,
        question="C",
        seconds=time.perf_counter() - begun,
    )


def _check_outputs(model: onnx.ModelProto) -> None:
    if not model.graph.output:
        raise NothingComparedError("the original model has no outputs, so nothing can be compared.")


def _evidence(backends: Backends, comparison: Comparison) -> tuple[Ran, ...]:
    """What shows where each network ran, read while the processes still run."""
    return tuple(
        Ran(
            name=str(backend.runtime),
            role=backend.role,
            gate=backend.gate,
            providers=backend.placement,
            libraries=backend.libraries(),
            own_process=backend.own_process,
            noise=comparison.noise.get(backend.name, 0.0),
            ratio=comparison.ratios.get(backend.name, math.nan),
        )
        for backend in backends.compared
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
