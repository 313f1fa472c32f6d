"""Gates B and C: networks run on backends, and their errors held against the original's.

Every backend's outputs are compared with a float64 evaluation of the original, never with each
other, and the error is divided by what the original's own float32 run is off by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from bnfold.errors import InputError, NothingComparedError
from bnfold.proof.counterpart import ROUNDINGS
from bnfold.proof.draws import InputSet, drawn_inputs, given_inputs
from bnfold.proof.reference import Float64Reference, NoReferenceError
from bnfold.proof.runtime import PROTOBUF_LIMIT, Session, open_session, run_torch

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, np.dtype[Any]]
Values = Mapping[str, Any]
Progress = Callable[[int, int | None], None]

R_LIMIT = 4.0
ELEMENT_LIMIT = 10.0
FLOOR = 4.0  # roundings below which an error of the original is luck
ORDINARY = ("given", "normal")  # input sets whose error shows what is usual
FEW = 64  # output elements on given inputs, below which normal draws are compared as well
FLIPS = 1e-3  # share of a discrete output that may differ where the original's does not
UNRELIABLE = 2.0**17  # roundings: an original further off than this (0.8 % in float32)
TENSOR_CORE = (2.0**8, 2.0**14)  # ratios that TF32 and float16 products leave


@dataclass(frozen=True)
class GateResult:
    """One comparison: the gate (A, B or C), what was compared, and the verdict as a sentence.

    name: what kind of figure `value` is; subject: the node, output or backend it is about.
    """

    gate: str
    name: str
    subject: str
    value: float
    limit: float
    passed: bool
    sentence: str


# ------------------------------------------------------------------------------- the backends


@dataclass(frozen=True)
class Backend:
    """Something that maps inputs to outputs by name; gate B or C, and whose network it runs."""

    name: str
    gate: str
    run: Callable[[Mapping[str, Array]], Values]
    session: Session | None = None


@dataclass(frozen=True)
class Backends:
    """The original's session, and all that is compared with it."""

    original: Backend
    compared: tuple[Backend, ...]

    @staticmethod
    def open(original: Any, folded: Any, providers: Sequence[str],
             modules: tuple[torch.nn.Module, torch.nn.Module] | None, threads: int | None
             ) -> Backends:  # fmt: skip
        """Every session that will be needed, before any time is spent on arithmetic."""
        folded = _once(folded)
        optimized = [
            _of_session(
                f"onnxruntime {provider}, optimized", "C",
                open_session(folded, provider, optimize=True, threads=threads),
            )
            for provider in dict.fromkeys(providers)
        ]  # fmt: skip
        first = open_session(original, "cpu", optimize=False, threads=threads)
        second = open_session(folded, "cpu", optimize=False, threads=threads)
        compared = [_of_session("onnxruntime cpu", "B", second), *optimized]
        if modules is not None:
            names = first.input_names
            for role, module in zip(("original", "folded"), modules, strict=True):
                name = f"torch, {role} module"
                run = _torch_runner(module, names, first.output_names, name)
                compared.append(Backend(name, "C", run))
        return Backends(_of_session("original", "B", first), tuple(compared))

    @staticmethod
    def in_torch(original: onnx.ModelProto, modules: tuple[torch.nn.Module, torch.nn.Module]
                 ) -> Backends:  # fmt: skip
        """The two modules alone, for types that onnxruntime has no operators for."""
        held = {tensor.name for tensor in original.graph.initializer}
        names = [value.name for value in original.graph.input if value.name not in held]
        outputs = [value.name for value in original.graph.output]
        first, second = (
            Backend(f"torch, {role} module", "B",
                    _torch_runner(module, names, outputs, f"torch, {role} module"))
            for role, module in zip(("original", "folded"), modules, strict=True)
        )  # fmt: skip
        return Backends(first, (second,))

    @property
    def placement(self) -> dict[str, Mapping[str, Mapping[str, int]]]:
        """Where onnxruntime says that the nodes ran."""
        return {b.name: b.session.assignment for b in self.compared if b.session is not None}


def _once(model: Any) -> Any:
    """A proto as bytes, so that several sessions do not serialize it each."""
    small = isinstance(model, onnx.ModelProto) and model.ByteSize() < PROTOBUF_LIMIT
    return model.SerializeToString() if small else model


def _of_session(name: str, gate: str, session: Session) -> Backend:
    return Backend(name, gate, session.run, session)


def _torch_runner(module: torch.nn.Module, inputs: Sequence[str], outputs: Sequence[str], name: str
                  ) -> Callable[[Mapping[str, Array]], Values]:  # fmt: skip
    def run(feeds: Mapping[str, Array]) -> Values:
        try:
            values = run_torch(module, [feeds[key] for key in inputs])
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{name} cannot run on the model's inputs: {first}") from error
        if len(values) != len(outputs):
            raise InputError(f"{name} has {len(values)} outputs, the model has {len(outputs)}.")
        return dict(zip(outputs, values, strict=True))

    return run


# ------------------------------------------------------------------------------ the comparison


@dataclass
class Tally:
    """What one backend's output differs by from the reference, over the batches of an input set.

    peaks, sizes: per sample, the largest error of an element and the largest exact element.
    """

    error: float = 0.0  # sum of squares
    size: float = 0.0  # sum of squares of the reference
    elements: int = 0
    flips: int = 0
    discrete: bool = False
    peaks: list[Array] = field(default_factory=list)
    sizes: list[Array] = field(default_factory=list)
    trouble: str = ""

    def add(self, value: Any, exact: Any) -> None:
        """Count one batch."""
        problem = _unlike(value, exact)
        self.trouble = self.trouble or problem
        if problem:
            return
        # a NaN that both agree on says nothing about two networks
        self.elements += int(np.count_nonzero(np.isfinite(exact)))
        if exact.dtype.kind not in "fc":
            self.discrete = True
            self.flips += int(np.count_nonzero(value != exact))
            return
        difference = _difference(value, exact)
        finite = np.where(np.isfinite(exact), exact, 0.0)
        self.error += float(np.sum(difference**2))
        self.size += float(np.sum(finite**2))
        self.peaks.append(_peaks(difference))
        self.sizes.append(_peaks(finite))


def _unlike(value: Any, exact: Any) -> str:
    """Why two results cannot be compared element by element; empty when they can."""
    if not isinstance(value, np.ndarray) or not isinstance(exact, np.ndarray):
        return "it is no tensor"
    if value.shape != exact.shape:
        return f"its shape is {value.shape}, and should be {exact.shape}"
    if (value.dtype.kind in "biu") != (exact.dtype.kind in "biu"):
        return f"its type is {value.dtype}"
    if exact.dtype.kind == "f":
        got = value.astype(np.float64)
        wrong = ~((np.isfinite(got) & np.isfinite(exact)) | (np.isnan(got) & np.isnan(exact))
                  | (got == exact))  # fmt: skip
        if wrong.any():
            return f"{int(wrong.sum())} of {wrong.size} elements are NaN or infinite"
    return ""


def _peak_share(tally: Tally) -> float:
    """Root mean square over samples of the largest error over the largest element."""
    if not tally.peaks:
        return 0.0
    with np.errstate(all="ignore"):
        shares = np.concatenate(tally.peaks) / np.concatenate(tally.sizes)
    return float(np.sqrt(np.mean(np.nan_to_num(shares, posinf=0.0) ** 2)))


def _difference(value: Array, exact: Array) -> Array:
    with np.errstate(all="ignore"):
        difference = value.astype(np.float64) - exact
    return np.where(np.isfinite(difference), difference, 0.0)


def _peaks(values: Array) -> Array:
    """Largest magnitude per sample (first axis)."""
    flat = np.abs(
        np.atleast_1d(values).reshape(len(np.atleast_1d(values)), -1)
        if values.size
        else np.zeros((1, 1))
    )
    peaks: Array = np.max(flat, axis=1, initial=0.0)
    return peaks


@dataclass
class Comparison:
    """The runs of all backends on all inputs, and what they come to."""

    backends: Backends
    reference: Float64Reference | None
    refusal: str
    sets: list[InputSet]
    outputs: list[str]
    unit: float
    noise: dict[str, float] = field(default_factory=dict)
    tallies: dict[tuple[str, str, str], Tally] = field(default_factory=dict)
    trouble: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(before: onnx.ModelProto, after: onnx.ModelProto, backends: Backends, seed: int,
           samples: int | None, input_shapes: Mapping[str, Sequence[int]] | None,
           inputs: Mapping[str, Array] | None) -> Comparison:  # fmt: skip
        """Prepare the reference and the inputs."""
        reference, refusal = None, ""
        try:
            reference = Float64Reference(before)
        except NoReferenceError as error:
            refusal = str(error)
        sets = [] if inputs is None else given_inputs(before, inputs)
        if inputs is None or _few(sets, backends.original):
            shapes = dict(input_shapes or {})
            if inputs is not None:
                shapes |= {name: np.shape(value) for name, value in inputs.items()}
            drawn = drawn_inputs(before, reference, seed=seed, samples=samples, input_shapes=shapes)
            sets += drawn if inputs is None else drawn[:1]
        names = [value.name for value in before.graph.output]
        if names != [value.name for value in after.graph.output]:
            refusal = refusal or "the two models have other outputs"
        return Comparison(backends, reference, refusal, sets, names, _unit(before))

    @property
    def samples(self) -> int:
        """Rows compared."""
        return sum(group.samples if group.batches[0] else 1 for group in self.sets)

    def judge(self, progress: Progress | None) -> list[GateResult]:
        """Gates B and C."""
        if self.refusal or self.reference is None:
            return [self._not_run(self.refusal)]
        total = sum(len(group.batches) for group in self.sets)
        done = 0
        try:
            for group in self.sets:
                for feeds in group.batches:
                    self._run(group.name, feeds)
                    done += 1
                    if progress is not None:
                        progress(done, total)
        except NoReferenceError as error:
            return [self._not_run(str(error))]
        if not any(tally.elements or tally.trouble for tally in self.tallies.values()):
            raise NothingComparedError("every output is empty, so nothing was compared.")
        return list(self._results())

    def _not_run(self, reason: str) -> GateResult:
        sentence = f"not run, so the fold is not proved: {reason.rstrip('.')}."
        return GateResult("B", "not run", "the network", math.nan, R_LIMIT, False, sentence)

    def _run(self, group: str, feeds: Mapping[str, Array]) -> None:
        assert self.reference is not None
        base = self._run_original(feeds)
        exact = self.reference.run(feeds, self.outputs)
        for name in self.outputs:
            self._tally("original", group, name).add(base[name], exact[name])
        for backend in self.backends.compared:
            if backend.name in self.trouble:
                continue
            try:
                values = backend.run(feeds)
                if backend.name not in self.noise and backend.gate == "C":
                    self.noise[backend.name] = _noise(values, backend.run(feeds), exact)
            except InputError as error:
                self.trouble[backend.name] = str(error)
                continue
            for name in self.outputs:
                self._tally(backend.name, group, name).add(values.get(name), exact[name])

    def _run_original(self, feeds: Mapping[str, Array]) -> Values:
        try:
            return self.backends.original.run(feeds)
        except InputError as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
            raise InputError(
                f"the original model does not run on inputs of the shapes {shapes}; give the "
                f"shapes that it takes. {error}"
            ) from error

    def _tally(self, backend: str, group: str, output: str) -> Tally:
        return self.tallies.setdefault((backend, group, output), Tally())

    # ------------------------------------------------------------------------------- verdicts

    def _results(self) -> Iterator[GateResult]:
        for output in self.outputs:
            yield from self._reliable(output)
        for backend in self.backends.compared:
            if backend.name in self.trouble:
                sentence = self.trouble[backend.name]
                yield GateResult(backend.gate, "not run", backend.name, math.inf, R_LIMIT, False,
                                 sentence)  # fmt: skip
                continue
            for output in self.outputs:
                yield from self._judge_output(backend, output)

    def _reliable(self, output: str) -> Iterator[GateResult]:
        """A failure where the original itself is too far from its float64 evaluation."""
        limit = min(UNRELIABLE * self.unit, 0.25)
        for group in self.sets:
            tally = self.tallies["original", group.name, output]
            error = self._relative(tally, output)
            if tally.trouble or not error <= limit:
                why = tally.trouble or f"it is {error:.2g} of its size away"
                sentence = (
                    f"the original's own output '{output}' on onnxruntime does not match its "
                    f"float64 evaluation ({why}, on '{group.name}' inputs), so nothing can be said "
                    f"about the folded one."
                )
                yield GateResult("B", "original", output, error, limit, False, sentence)
                return

    def _judge_output(self, backend: Backend, output: str) -> Iterator[GateResult]:
        name = "error ratio" if backend.gate == "B" else "backend ratio"
        subject = f"{output}, {backend.name}"
        ratios, peaks = [], []
        if any(self.tallies["original", group.name, output].trouble for group in self.sets):
            return  # there is nothing to hold it against, which has failed already
        for group in self.sets:
            tally = self.tallies[backend.name, group.name, output]
            if tally.trouble:
                sentence = (
                    f"{backend.name}: the output '{output}' cannot be compared on '{group.name}' "
                    f"inputs: {tally.trouble}."
                )
                yield GateResult(backend.gate, name, subject, math.inf, R_LIMIT, False, sentence)
                return
            ratios.append((self._ratio(backend, group.name, tally, output), group.name))
            peaks.append((self._peak(group.name, tally, output), group.name))
        ratio, where = max(ratios)
        sentence = (
            f"{backend.name}: the error of '{output}' is {ratio:.3g} times the original's "
            f"(worst on '{where}' inputs; at most {R_LIMIT:g} passes)."
        )
        yield GateResult(backend.gate, name, subject, ratio, R_LIMIT, ratio <= R_LIMIT,
                         sentence + _diagnosis(backend, ratio))  # fmt: skip
        if backend.gate == "B":
            peak, where = max(peaks)
            sentence = (
                f"{backend.name}: the largest error of an element of '{output}' is {peak:.3g} "
                f"times the original's (worst on '{where}' inputs; at most {ELEMENT_LIMIT:g} "
                f"passes)."
            )
            yield GateResult("B", "largest element", subject, peak, ELEMENT_LIMIT,
                             peak <= ELEMENT_LIMIT, sentence)  # fmt: skip

    def _ratio(self, backend: Backend, group: str, tally: Tally, output: str) -> float:
        """R: the backend's error over the original's, or over the usual one if that is luckier."""
        base = self.tallies["original", group, output]
        if tally.discrete:
            return tally.flips / max(base.flips, FLIPS * tally.elements, 1e-9)
        error = max(self._relative(tally, output) - self.noise.get(backend.name, 0.0), 0.0)
        usual = self._usual(lambda other: self._relative(other, output), output)
        ratio = error / max(self._relative(base, output), usual, FLOOR * self.unit)
        return math.inf if math.isnan(ratio) else ratio

    def _peak(self, group: str, tally: Tally, output: str) -> float:
        """Worst over samples: largest error of an element over the original's largest."""
        base = self.tallies["original", group, output]
        if tally.discrete or not tally.peaks:
            return 0.0
        usual = self._usual(_peak_share, output)
        sizes, peaks = np.concatenate(tally.sizes), np.concatenate(tally.peaks)
        own = np.concatenate(base.peaks)
        alike = np.sqrt(np.mean(own**2))  # an element can cross zero, and its error come out right
        allowed = np.maximum(np.maximum(own, alike), sizes * max(usual, FLOOR * self.unit))
        with np.errstate(all="ignore"):
            return float(np.max(np.where(peaks == 0, 0.0, peaks / allowed), initial=0.0))

    def _usual(self, measure: Callable[[Tally], float], output: str) -> float:
        """What the original's error comes to on ordinary inputs, or on half of all input sets.

        A single number can come out right by luck; a ratio to luck says nothing.
        """
        measured = {
            group.name: measure(self.tallies["original", group.name, output]) for group in self.sets
        }
        ordinary = [error for name, error in measured.items() if name in ORDINARY]
        return max([*ordinary, float(np.median(list(measured.values())))])

    def _relative(self, tally: Tally, output: str) -> float:
        """Error over size; where the exact output is 0, over the output's size on other inputs.

        For integers and booleans, the share that differs.
        """
        if tally.discrete:
            return tally.flips / max(tally.elements, 1)
        if tally.error == 0:
            return 0.0
        size = tally.size
        if size == 0:
            typical = max(
                other.size / max(other.elements, 1)
                for (_, _, name), other in self.tallies.items()
                if name == output
            )
            size = typical * tally.elements
        return math.sqrt(tally.error / size) if size else math.inf


def _diagnosis(backend: Backend, ratio: float) -> str:
    """A likely cause, where the size of the ratio names one."""
    low, high = TENSOR_CORE
    if backend.gate == "C" and "cuda" in backend.name and low < ratio < high:
        return (
            " It looks like TF32 or float16 products: set NVIDIA_TF32_OVERRIDE=0 before the "
            "process starts."
        )
    return ""


def _noise(first: Values, second: Values, exact: Values) -> float:
    """Worst relative difference of two runs of one session."""
    worst = 0.0
    for name, value in exact.items():
        a, b = first.get(name), second.get(name)
        if _unlike(a, value) or _unlike(b, value) or value.dtype.kind != "f":
            continue
        assert isinstance(a, np.ndarray)
        assert isinstance(b, np.ndarray)
        size = float(np.linalg.norm(np.where(np.isfinite(value), value, 0.0).ravel()))
        distance = float(np.linalg.norm(_difference(a, b.astype(np.float64)).ravel()))
        worst = max(worst, distance / size if size else 0.0)
    return worst


def _few(sets: Sequence[InputSet], original: Backend) -> bool:
    """True when the given inputs lead to so few numbers that their errors may all be luck."""
    batch = sets[0].batches[0]
    rows = sets[0].samples / max(len(next(iter(batch.values()), [0])), 1) if batch else 1
    values = original.run(batch).values()
    smallest = min((v.size for v in values if isinstance(v, np.ndarray)), default=0)
    return smallest * rows < FEW


def computes_in(model: onnx.ModelProto, *types: int) -> bool:
    """Whether the model's tensors, inputs or outputs have one of these types."""
    return bool(_types(model) & set(types))


def _types(model: onnx.ModelProto) -> set[int]:
    types = {tensor.data_type for tensor in model.graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in model.graph.input}
    return types | {value.type.tensor_type.elem_type for value in model.graph.output}


def _unit(model: onnx.ModelProto) -> float:
    """Rounding of the dtype that the model computes in: the coarsest of its float tensors."""
    units = [ROUNDINGS[kind].unit for kind in _types(model) if kind in ROUNDINGS]
    return max(units, default=ROUNDINGS[onnx.TensorProto.FLOAT].unit)
