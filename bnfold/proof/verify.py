"""Are two networks the same function? Three gates, and the first layer where they part.

A, the algebra: every constant of the folded graph against the exact one, without data
   (certificate.py). It needs the plan's gauges; without them the weights of a plain fold are held
   against the batch norms' (plain.py), and the report says so.
B, the network: on onnxruntime's CPU, without its graph optimization,
       R = error of the folded network / max(error of the original, 4u),
   both errors relative 2-norms against a float64 evaluation of the original, u the rounding of the
   model's dtype. A right fold has R near 1 whatever the network's conditioning; R <= 4 passes.
   Besides, no element of a sample may be further off than ten times the original's worst element,
   and no channel than ten times the original's own.
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from bnfold.errors import BnfoldError, InputError, NothingComparedError
from bnfold.proof.algebra.certificate import Certificate, Gauge, certify
from bnfold.proof.algebra.plain import doubt
from bnfold.proof.algebra.plain import judge as judge_plain_fold
from bnfold.proof.exact.reference import Float64Reference, NoReferenceError
from bnfold.proof.fault.finding import Finding, find_fault
from bnfold.proof.fault.profile import Profile
from bnfold.proof.fault.profile import profile as profile_of
from bnfold.proof.figures.comparison import Comparison, Progress, few, other_names
from bnfold.proof.figures.draws import input_sets, input_specs
from bnfold.proof.figures.tally import relative_differences, unlike
from bnfold.proof.figures.verdicts import FEW, GateResult, not_run
from bnfold.proof.places.backends import Backends, Places, open_in_torch, open_one, open_two
from bnfold.proof.places.precision import (
    as_stored,
    effective,
    rounded,
    stored_class,
    types_of,
    unit_of,
)
from bnfold.proof.places.runtimes import DEFAULT, Runtime, as_runtimes
from bnfold.proof.result import Ran, VerifyReport

if TYPE_CHECKING:
    import torch

MEASURED = ("weights", "channel map")  # gate A's checks that hold a written number for wrong
NOT_PROVED = "not proved"  # where it could not read what is written
NEAR = 2.0**10  # roundings that two right networks may be apart in float64

Array = np.ndarray[Any, np.dtype[Any]]


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
    profile: bool = False,
    own_process: bool = False,
    time_limit: float | None = None,
) -> VerifyReport:
    """Compare `folded` with `original` and report; a failed gate is no exception.

    original, folded: a ModelProto, the bytes of a file, or a path. gauges, aliases: the plan's, by
    value name of the original (certificate.certify). inputs: arrays by input name, all rows are
    compared; default: draws (draws.drawn_inputs) from `seed`. runtimes: where gate C runs the
    folded network, such as "ort-cpu" or "ort-cuda:tf32" (runtimes.RUNTIMES). torch_modules: the
    original and the folded module, compared in gate C; their forward takes the model's inputs in
    order. profile: measure the error at every former batch norm, as is done where a gate fails.
    own_process: onnxruntime's CPU runs in a process of its own too, as a GPU's always does;
    time_limit: seconds for each answer of a process of its own. Why a gate failed is looked for in
    this process.

    Raises RuntimeUnavailableError when a runtime cannot run here (never a pass),
    NothingComparedError when there is no output or no sample, InputError for unreadable models or
    unfit inputs, UsageError for no runtime, an unknown one, or torch where there is no module.
    """
    begun = time.perf_counter()
    asked = as_runtimes(runtimes)
    before, after = _load(original, "original"), _load(folded, "folded")
    _check_outputs(before)
    known = Known(gauges, aliases)
    notes = _other_interface(before, after)
    stored = stored_class(before, after)
    notes += _without_effect(asked, stored)
    with Places(threads, own_process=own_process, time_limit=time_limit) as places:
        try:
            backends = open_two(
                places, original, folded, asked, torch_modules, partial(rounded, before), stored
            )
        except InputError as refused:
            elsewhere = types_of(before) & {onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
            if torch_modules is None or not elsewhere or asked != (Runtime(DEFAULT),):
                raise
            backends = open_in_torch(before, torch_modules)
            notes.append(
                f"The networks were compared in torch; the ONNX file was not run: {refused}"
            )
        given = {name: np.shape(value) for name, value in (inputs or {}).items()}
        declared = stored if any(runtime.precision == stored for runtime in asked) else ""
        gates, certificate = _gate_a(before, after, declared, known, input_shapes or given, notes)
        ask = Asked(seed, samples, input_shapes, inputs, progress)
        refusal = _refusal(before, after)
        compared = _compare(before, backends, ask, "B", stored, refusal, after)
    gates += compared.gates
    comparison, finding, drawn = compared.comparison, None, None
    if not all(result.passed for result in gates) and comparison is not None:
        finding = _find(before, after, comparison, known, gates)
        # where nothing was measured to be off, as with another type, rounding is no explanation
        measured = any(math.isfinite(r.value) for r in gates if not r.passed)
        if finding.first is not None or (measured and _agree(after, comparison)):
            notes.append(finding.sentence)
    if comparison is not None and (profile or finding is not None):
        kind = finding.kind if finding is not None else ""
        drawn, why = _profile(before, after, comparison, known, kind, threads)
        notes = [*why, *notes] if profile else notes
    warnings = _warnings(compared) + (() if gauges is not None else _constant(compared))
    if gauges is None and not declared and (unclear := doubt(before, after)):
        warnings += (unclear,)
    return VerifyReport(
        gates=tuple(gates),
        seed=seed,
        certificate=certificate,
        fault=finding,
        profile=drawn,
        notes=(*compared.notes, *notes),
        warnings=warnings,
        seconds=time.perf_counter() - begun,
        **compared.fields,
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
    profile: bool = False,
    own_process: bool = False,
    time_limit: float | None = None,
) -> VerifyReport:
    """Does one network compute the same on every runtime? Gate C alone.

    Each run is held against the float64 evaluation of the model, and its error against that of
    onnxruntime's CPU without graph optimization. torch_module: the module that the model was
    exported from, for the runtimes of torch. The rest, and what is raised, is as for `verify`.
    """
    begun = time.perf_counter()
    asked = as_runtimes(runtimes)
    proto = _load(model, "given")
    _check_outputs(proto)
    with Places(threads, own_process=own_process, time_limit=time_limit) as places:
        backends = open_one(places, model, asked, torch_module)
        ask = Asked(seed, samples, input_shapes, inputs, progress)
        compared = _compare(proto, backends, ask, "C")
    drawn, why = None, list[str]()
    if profile and compared.comparison is not None:
        drawn, why = _profile(proto, None, compared.comparison, Known(), "", threads)
    return VerifyReport(
        gates=tuple(compared.gates),
        seed=seed,
        question="C",
        profile=drawn,
        notes=(*why, *compared.notes),
        warnings=(*_warnings(compared), *_constant(compared)),
        seconds=time.perf_counter() - begun,
        **compared.fields,
    )


@dataclass(frozen=True)
class Known:
    """The fold's plan, if it is known."""

    gauges: Mapping[str, Gauge] | None = None
    aliases: Mapping[str, str] | None = None


def _gate_a(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    declared: str,
    known: Known,
    shapes: Mapping[str, Sequence[int]],
    notes: list[str],
) -> tuple[list[GateResult], Certificate | None]:
    """Every node by the plan; where that is not known, the weights of a plain fold.

    declared: the narrower class that the folded weights are stored in, where the user said so. The
    plan's constants are held to one rounding of the original's type, so it is no measure for those.
    """
    if known.gauges is None or declared:
        gates, note = judge_plain_fold(before, as_stored(after, declared) if declared else after)
        notes.append(note)
        return list(gates), None
    aliases = known.aliases or {}
    certificate = certify(before, after, known.gauges, aliases, input_shapes=shapes)
    return _algebra(certificate), certificate


def _find(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    comparison: Comparison,
    known: Known,
    gates: Sequence[GateResult],
) -> Finding:
    """Why the gates failed; a written number that gate A measured to be off is no guess."""
    wrong = [result for result in gates if result.gate == "A" and not result.passed]
    return find_fault(
        before,
        after,
        comparison.sets,
        gauges=known.gauges,
        aliases=known.aliases,
        unit=comparison.unit,
        certain={
            r.subject: r.sentence
            for r in wrong
            if r.name in MEASURED and NOT_PROVED not in r.sentence
        },
    )


def _agree(after: onnx.ModelProto, comparison: Comparison) -> bool:
    """Whether the outputs are the same in float64, so that a failure is a runtime's alone.

    Where no value was found to part, that is said; it is not true of what could not be run, or of
    outputs that are called as others are.
    """
    feeds = comparison.sets[0].batches[0]
    names = comparison.outputs
    try:
        exact = comparison.reference.run(feeds, names)
        other = Float64Reference(after).run(feeds, names)
    except BnfoldError:
        return False
    unlike_ones = [name for name in names if unlike(other[name], exact[name])]
    apart = relative_differences(other, exact, exact)
    return not unlike_ones and max(apart.values(), default=0.0) <= NEAR * comparison.unit


def _profile(
    before: onnx.ModelProto,
    after: onnx.ModelProto | None,
    comparison: Comparison,
    known: Known,
    kind: str,
    threads: int | None,
) -> tuple[Profile | None, list[str]]:
    """The error at every former batch norm on inputs of a kind, or why there is none."""
    group = next((s for s in comparison.sets if s.name == kind), comparison.sets[0])
    try:
        made = profile_of(
            before,
            after,
            group.batches[0],
            gauges=known.gauges,
            aliases=known.aliases,
            unit=comparison.unit,
            kind=group.name,
            threads=threads,
        )
    except BnfoldError as why:
        return None, [f"There is no profile: {why}"]
    return made, []


@dataclass(frozen=True)
class Asked:
    """What the caller said about the inputs."""

    seed: int
    samples: int | None
    input_shapes: Mapping[str, Sequence[int]] | None
    inputs: Mapping[str, Array] | None
    progress: Progress | None


@dataclass(frozen=True)
class Compared:
    """What the runs came to; comparison is None where none could be made.

    fields: the parts of the report that are told of the runs.
    """

    gates: list[GateResult]
    comparison: Comparison | None
    fields: Mapping[str, Any]
    notes: Sequence[str] = ()


def _compare(
    model: onnx.ModelProto,
    backends: Backends,
    ask: Asked,
    question: str,
    stored: str = "",
    refusal: str = "",
    folded: onnx.ModelProto | None = None,
) -> Compared:
    """Gates B and C, and the evidence, read while the processes still run."""
    reference = None
    try:
        reference = Float64Reference(model)
    except NoReferenceError as error:
        refusal = str(error)
    sets = input_sets(
        model,
        reference,
        seed=ask.seed,
        samples=ask.samples,
        input_shapes=ask.input_shapes,
        inputs=ask.inputs,
        few=lambda given: few(given, backends.original, FEW),
    )
    if reference is None or refusal:
        fields = {"samples": 0, "sets": (), "runtimes": _evidence(backends, None)}
        return Compared([not_run(question, refusal)], None, fields)
    outputs = [value.name for value in model.graph.output]
    comparison = Comparison(
        backends, reference, sets, outputs, unit_of(model), question, stored, folded
    )
    gates = comparison.judge(ask.progress)
    fields = {
        "samples": comparison.samples,
        "sets": tuple(group.name for group in comparison.sets),
        "runtimes": _evidence(backends, comparison),
        "decisions": comparison.decisions,
    }
    return Compared(gates, comparison, fields, comparison.notes)


def _refusal(before: onnx.ModelProto, after: onnx.ModelProto) -> str:
    """Why the two cannot be compared value by value; empty where they can."""
    outputs = [[value.name for value in model.graph.output] for model in (before, after)]
    inputs = [sorted(spec.name for spec in input_specs(model)) for model in (before, after)]
    return other_names(outputs[0], outputs[1], "outputs") or other_names(
        inputs[0], inputs[1], "inputs"
    )


def _other_interface(before: onnx.ModelProto, after: onnx.ModelProto) -> list[str]:
    """Notes about inputs that a caller of the original could give, and of the folded one not."""
    names = [{value.name for value in model.graph.input} for model in (before, after)]
    held = {tensor.name for tensor in before.graph.initializer}
    gone = sorted((names[0] & held) - names[1])
    listed = ", ".join(f"'{name}'" for name in gone[:4]) + (", ..." if len(gone) > 4 else "")
    return [f"The folded model no longer takes {listed} as an input."] if gone else []


def _without_effect(asked: Sequence[Runtime], stored: str) -> list[str]:
    """Notes about declared classes that change nothing, so that the limits of fp32 hold."""
    return [
        f"{runtime} was declared, but {runtime.name} computes in the model's own type and the "
        f"folded one is not stored so: the limits of fp32 hold."
        for runtime in asked
        if effective(runtime, stored) != runtime
    ]


def _warnings(compared: Compared) -> tuple[str, ...]:
    """What passed because float64 says that it is no fault of the fold."""
    comparison = compared.comparison
    if comparison is None or comparison.measures is None:
        return ()
    return tuple(comparison.measures.warnings)


def _constant(compared: Compared) -> tuple[str, ...]:
    """Warnings about outputs that tell little, because nothing changed them."""
    comparison = compared.comparison
    if comparison is None or not comparison.backends.original.takes_inputs:
        return ()
    return tuple(
        f"The output '{name}' was the same for every row that was compared, so little is proved of "
        f"it: give data (--data)."
        for name in comparison.constant_outputs
    )


def _check_outputs(model: onnx.ModelProto) -> None:
    if not model.graph.output:
        raise NothingComparedError("the original model has no outputs, so nothing can be compared.")


def _evidence(backends: Backends, comparison: Comparison | None) -> tuple[Ran, ...]:
    """What shows where each network ran."""
    noise = {} if comparison is None else comparison.noise
    ratios = {} if comparison is None or comparison.measures is None else comparison.measures.ratios
    return tuple(
        Ran(
            name=str(backend.runtime) + ", unoptimized" * (backend.gate == "B"),
            role=backend.role,
            gate=backend.gate,
            providers=backend.placement,
            libraries=backend.libraries(),
            own_process=backend.own_process,
            noise=max(noise[backend.name].values(), default=0.0) if backend.name in noise else None,
            ratio=ratios.get(backend.name),
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
