"""Gates B and C: networks run on backends, and their errors held against the original's.

Every backend's outputs are compared with a float64 evaluation of the original, never with each
other, and the error is divided by what the original's own float32 run is off by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from bnfold.errors import InputError, NothingComparedError
from bnfold.proof.backends import Backend, Backends, Values, beyond
from bnfold.proof.counterpart import ROUNDINGS
from bnfold.proof.draws import InputSet, drawn_inputs, given_inputs
from bnfold.proof.reference import Float64Reference, NoReferenceError
from bnfold.proof.runtimes import R_LIMIT, Runtime, ceiling
from bnfold.proof.tally import Tally, peak_share, relative_difference

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[int, int | None], None]

ELEMENT_LIMIT = 10.0
CLASS_LIMIT = 2.0  # folded over original, both in the class that was declared
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


@dataclass
class Comparison:
    """The runs of all backends on all inputs, and what they come to."""

    backends: Backends
    reference: Float64Reference | None
    refusal: str
    sets: list[InputSet]
    outputs: list[str]
    unit: float
    question: str = "B"
    noise: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    tallies: dict[tuple[str, str, str], Tally] = field(default_factory=dict)
    trouble: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(before: onnx.ModelProto, after: onnx.ModelProto, backends: Backends, seed: int,
           samples: int | None, input_shapes: Mapping[str, Sequence[int]] | None,
           inputs: Mapping[str, Array] | None, question: str = "B"
           ) -> Comparison:  # fmt: skip
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
        return Comparison(backends, reference, refusal, sets, names, _unit(before), question)

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
        what = "the fold" if self.question == "B" else "parity"
        sentence = f"not run, so {what} is not proved: {reason.rstrip('.')}."
        return GateResult(
            self.question, "not run", "the network", math.nan, R_LIMIT, False, sentence
        )

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
                    self.noise[backend.name] = _noise(backend, feeds, values, exact)
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
                    f"about {'the folded one' if self.question == 'B' else 'other runtimes'}."
                )
                yield GateResult(self.question, "original", output, error, limit, False, sentence)
                return

    def _judge_output(self, backend: Backend, output: str) -> Iterator[GateResult]:
        name = "error ratio" if backend.gate == "B" else "backend ratio"
        subject = f"{output}, {backend.name}"
        limit = ceiling(backend.runtime.precision, self.unit)
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
                yield GateResult(backend.gate, name, subject, math.inf, limit, False, sentence)
                return
            ratios.append((self._ratio(backend, group.name, tally, output), group.name))
            peaks.append((self._peak(group.name, tally, output), group.name))
        ratio, where = max(ratios)
        self.ratios[backend.name] = max(ratio, self.ratios.get(backend.name, 0.0))
        declared = f" in {backend.runtime.precision}" if beyond(backend.runtime) else ""
        sentence = (
            f"{backend.name}: the error of '{output}' is {ratio:.3g} times the original's "
            f"(worst on '{where}' inputs; at most {limit:g} passes{declared})."
        )
        yield GateResult(backend.gate, name, subject, ratio, limit, ratio <= limit,
                         sentence + _diagnosis(backend.runtime, ratio))  # fmt: skip
        if backend.original:
            yield self._within_class(backend, output)
        if backend.gate == "B":
            peak, where = max(peaks)
            most = ELEMENT_LIMIT * limit / R_LIMIT
            sentence = (
                f"{backend.name}: the largest error of an element of '{output}' is {peak:.3g} "
                f"times the original's (worst on '{where}' inputs; at most {most:g} passes)."
            )
            yield GateResult("B", "largest element", subject, peak, most, peak <= most, sentence)

    def _within_class(self, backend: Backend, output: str) -> GateResult:
        """The folded network's error over the original's, both in the same place and class."""
        shares = []
        for group in self.sets:
            mine = self.tallies[backend.name, group.name, output]
            other = self.tallies[backend.original, group.name, output]
            if other.trouble:
                shares.append((math.inf, group.name))
                continue
            noise = self.noise.get(backend.name, 0.0)
            error = max(self._relative(mine, output) - noise, 0.0)
            base = max(self._relative(other, output), FLOOR * self.unit)
            if mine.discrete:
                base = max(base, FLIPS)
            shares.append((error / base, group.name))
        share, where = max(shares)
        sentence = (
            f"{backend.name}: the error of '{output}' is {share:.3g} times the one of "
            f"{backend.original} (worst on '{where}' inputs; at most {CLASS_LIMIT:g} passes)."
        )
        return GateResult("C", "class ratio", f"{output}, {backend.name}", share, CLASS_LIMIT,
                          share <= CLASS_LIMIT, sentence)  # fmt: skip

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
        usual = self._usual(peak_share, output)
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


def _diagnosis(runtime: Runtime, ratio: float) -> str:
    """What the size of a ratio on a GPU looks like, where the class was not declared."""
    low, high = TENSOR_CORE
    if runtime.place.device != "cuda" or beyond(runtime) or not low < ratio < high:
        return ""
    return (
        f" It looks like TF32 or float16 products, which were not declared: if they are meant, say "
        f"--runtime {runtime.name}:tf32 (or :fp16)."
    )


def _noise(backend: Backend, feeds: Mapping[str, Array], values: Values, exact: Values) -> float:
    """Worst relative difference of a run from another of its session, and from a new session's."""
    noise = relative_difference(values, backend.run(feeds), exact)
    if backend.again is None:
        return noise
    return max(noise, relative_difference(values, backend.again(feeds), exact))


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
