"""From errors to verdicts: a backend's error over the original's, and what it may come to.

R = error / max(the original's error, 4u), both relative 2-norms against float64; the same for the
worst element of a sample, and for every channel of its own, so that no small part of an output
hides behind a large one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np

from bnfold.proof.figures.draws import InputSet
from bnfold.proof.figures.tally import Slices, Tally, peak_share
from bnfold.proof.places.backends import Backend, beyond
from bnfold.proof.places.precision import TITLES
from bnfold.proof.places.runtimes import R_LIMIT, Runtime, ceiling

Array = np.ndarray[Any, np.dtype[Any]]

ELEMENT_LIMIT = 10.0
CLASS_LIMIT = 2.0  # folded over original, both in the class that was declared
FLOOR = 4.0  # roundings below which an error of the original is luck
ORDINARY = ("given", "normal")  # input sets whose error shows what is usual
FEW = 64  # elements below which errors may all be luck
FEW_OF_SLICE = 8  # the same for one channel, whose errors are held against the usual one too
SETTLED = 8.0  # times a limit, up to which the folded network in float64 settles whether it fails
FLOAT64_LIMIT = 2.0  # what it may be off by there: a right fold has the rounding of its weights
FLOAT64, TOGETHER = "the folded network in float64", "all inputs together"
FLIPS = 1e-3  # share of a discrete output that may differ where the original's does not
UNRELIABLE = 2.0**17  # roundings: an original further off than this (0.8 % in float32)
TENSOR_CORE = (2.0**8, 2.0**15)  # ratios that TF32 and float16 products leave


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


@dataclass(frozen=True)
class Decisions:
    """How often a backend's largest element of a row is another than the exact one.

    outside: of these flips, those where the exact two largest are further apart than twice the
    original's own largest error, which its rounding does not explain. It is told, not judged.
    """

    backend: str
    output: str
    rows: int
    flips: int
    outside: int


def not_run(gate: str, reason: str) -> GateResult:
    """The failure where nothing could be compared."""
    what = "the fold" if gate == "B" else "parity"
    sentence = f"not run, so {what} is not proved: {reason.rstrip('.')}."
    return GateResult(gate, "not run", "the network", math.nan, R_LIMIT, False, sentence)


@dataclass
class Measures:
    """The tallies of a comparison, by backend, input set and output, and what follows from them.

    noise: by backend and output. in_float64: the folded network's outputs in float64 on an input
    set, None where there is none. warnings: what passed by those. notes: what was not judged.
    """

    sets: Sequence[InputSet]
    outputs: Sequence[str]
    unit: float
    tallies: dict[tuple[str, str, str], Tally]
    noise: Mapping[str, Mapping[str, float]]
    backends: Sequence[Backend]
    in_float64: Callable[[str], Mapping[str, Tally]] | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _where: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    _worst_channel: dict[tuple[str, str], float] = field(default_factory=dict)

    def results(
        self, question: str, trouble: Mapping[str, str], stored: str
    ) -> Iterator[GateResult]:
        """Every gate result, the original's own failures first."""
        for output in self.outputs:
            yield from self._reliable(output, question)
            yield from self._seen(output, question)
        for backend in self.backends:
            if backend.role == "measure":
                continue
            limit = ceiling(backend.runtime.precision, self.unit)
            if backend.name in trouble:
                yield GateResult(
                    backend.gate, "not run", backend.name, math.inf, limit, False,
                    trouble[backend.name],
                )  # fmt: skip
                continue
            for output in self.outputs:
                own = backend.gate == question or not beyond(backend.runtime)
                whole = own and backend.role != "original"
                yield from self._judge_output(backend, output, limit, whole, stored)

    def decisions(self) -> tuple[Decisions, ...]:
        """Of every output of two axes, on every backend, over all inputs."""
        found = []
        for backend in self.backends:
            for output in self.outputs:
                flipped = self._rows(backend.name, output, lambda tally: tally.flipped)
                if len(flipped):
                    margins = self._rows(backend.name, output, lambda tally: tally.margins)
                    own = self._rows("original", output, lambda tally: tally.peaks)
                    if len(own) != len(flipped):
                        continue
                    outside = flipped & (margins > 2 * own)
                    found.append(Decisions(backend.name, output, len(flipped),
                                           int(flipped.sum()), int(outside.sum())))  # fmt: skip
        return tuple(found)

    def _rows(self, backend: str, output: str, part: Callable[[Tally], list[Array]]) -> Array:
        tallies = [self.tallies.get((backend, group.name, output), Tally()) for group in self.sets]
        parts = [array for tally in tallies for array in part(tally)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _reliable(self, output: str, gate: str) -> Iterator[GateResult]:
        """A failure where the original itself is too far from its float64 evaluation."""
        limit = min(UNRELIABLE * self.unit, 0.25)
        about = "the folded one" if gate == "B" else "other runtimes"
        for group in self.sets:
            tally = self.tallies["original", group.name, output]
            error = self._relative(tally, output)
            if tally.trouble or not error <= limit:
                why = tally.trouble or f"it is {error:.2g} of its size away"
                sentence = (
                    f"the original's own output '{output}' on onnxruntime does not match its "
                    f"float64 evaluation ({why}, on '{group.name}' inputs), so nothing can be said "
                    f"about {about}."
                )
                yield GateResult(gate, "original", output, error, limit, False, sentence)
                return

    def _seen(self, output: str, gate: str) -> Iterator[GateResult]:
        """A failure where an output had no number at all; a warning about NaN and infinities."""
        tallies = [self.tallies["original", group.name, output] for group in self.sets]
        if any(tally.trouble for tally in tallies):
            return
        absent = sum(tally.not_finite for tally in tallies)
        if not any(tally.elements for tally in tallies):
            why = "is NaN or infinite" if absent else "is empty"
            sentence = (
                f"the original's output '{output}' {why} on every input, so it was not compared: "
                f"give data for which it is not."
            )
            yield GateResult(gate, "not compared", output, math.inf, R_LIMIT, False, sentence)
        elif absent:
            self.warnings.append(
                f"The original's own output '{output}' has {absent} elements that are NaN or "
                f"infinite."
            )

    def _judge_output(
        self, backend: Backend, output: str, limit: float, whole: bool, stored: str
    ) -> Iterator[GateResult]:
        """The ratio, and where the gate is the one in question that of elements and channels."""
        name = "error ratio" if backend.gate == "B" else "backend ratio"
        subject = f"{output}, {backend.name}"
        if any(self.tallies["original", group.name, output].trouble for group in self.sets):
            return  # there is nothing to hold it against, which has failed already
        for group in self.sets:
            tally = self.tallies[backend.name, group.name, output]
            if tally.trouble:
                sentence = (
                    f"{backend.name}: the output '{output}' cannot be compared on '{group.name}' "
                    f"inputs: {tally.trouble}.{_undeclared(stored, backend)}"
                )
                yield GateResult(backend.gate, name, subject, math.inf, limit, False, sentence)
                return
        ratio, where = self._worst(lambda group: self._ratio(backend, group, output))
        self.ratios[backend.name] = max(ratio, self.ratios.get(backend.name, 0.0))
        most = self._allowed(backend, limit, output, "R", self._ratio)
        declared = f" in {backend.runtime.precision}" if beyond(backend.runtime) else ""
        own = self.noise.get(backend.name, {}).get(output)
        noise = "" if own is None else f"; noise {own:.2g}"
        sentence = (
            f"{backend.name}: the error of '{output}' is {ratio:.3g} times the original's "
            f"(worst on '{where}' inputs; at most {most:g} passes{declared}{noise})."
        )
        if ratio > most:
            sentence += _undeclared(stored, backend) or _diagnosis(backend.runtime, ratio)
        yield GateResult(backend.gate, name, subject, ratio, most, ratio <= most, sentence)
        if own is not None:
            yield from self._repeatable(backend, output, limit, own)
        if backend.original:
            yield from self._within_class(backend, output)
        if whole:
            yield from self._of_parts(backend, output, ELEMENT_LIMIT * limit / R_LIMIT)

    def _repeatable(
        self, backend: Backend, output: str, limit: float, noise: float
    ) -> Iterator[GateResult]:
        """A failure where runs differ among themselves by more than they may from the original."""
        usual = self._usual(lambda tally: self._relative(tally, output), output)
        discrete = self.tallies[backend.name, self.sets[0].name, output].discrete
        share = noise / max(usual, FLIPS if discrete else FLOOR * self.unit)
        if share > limit:
            sentence = (
                f"{backend.name}: two runs on the same input differ by {noise:.2g} of the size of "
                f"'{output}', {share:.3g} times the original's error: what cannot be repeated "
                f"proves nothing."
            )
            subject = f"{output}, {backend.name}"
            yield GateResult(backend.gate, "noise", subject, share, limit, False, sentence)

    def _allowed(
        self,
        backend: Backend,
        limit: float,
        output: str,
        title: str,
        measure: Callable[[Backend, str, str], float],
    ) -> float:
        """The limit, or SETTLED times it where float64 shows that the folded weights are right.

        There is no rounding at run time in float64; a fold that is wrong is as wrong there.
        """
        found = {group.name: measure(backend, group.name, output) for group in self.sets}
        over = {name: value for name, value in found.items() if value > limit}
        may = backend.role == "folded" and backend.runtime.place.device == "cpu"
        if not over or not may or beyond(backend.runtime) or self.in_float64 is None:
            return limit
        if max(over.values()) > SETTLED * limit:
            return limit
        exact = replace(backend, name=FLOAT64)
        for name in over:
            if (FLOAT64, name, output) not in self.tallies:
                for key, tally in self.in_float64(name).items():
                    self.tallies[FLOAT64, name, key] = tally
        if any(self.tallies[FLOAT64, name, output].trouble for name in over):
            return limit
        worst = max(measure(exact, name, output) for name in over)
        if not worst <= FLOAT64_LIMIT:
            return limit
        self.warnings.append(
            f"{backend.name}: {title} of '{output}' is {max(over.values()):.3g}. In float64 the "
            f"folded network is off by {worst:.2g} times the original's error, so this is rounding "
            f"at run time, not the fold."
        )
        return SETTLED * limit

    def _of_parts(self, backend: Backend, output: str, limit: float) -> Iterator[GateResult]:
        """The worst element of a sample, and the worst channel."""
        peak, where = self._worst(lambda group: self._peak(backend, group, output))
        subject, limit_of_one = f"{output}, {backend.name}", limit
        limit = self._allowed(backend, limit_of_one, output, "the largest element", self._peak)
        sentence = (
            f"{backend.name}: the largest error of an element of '{output}' is {peak:.3g} "
            f"times the original's (worst on '{where}' inputs; at most {limit:g} passes)."
        )
        yield GateResult(
            backend.gate, "largest element", subject, peak, limit, peak <= limit, sentence
        )
        if not self.tallies["original", self.sets[0].name, output].slices:
            return
        if not self._groups_of_slices(output):
            self.notes.append(
                f"The channels of '{output}' were not judged one by one: there are too few numbers "
                f"of each."
            )
            return
        limit = self._allowed(backend, limit_of_one, output, "a channel", self._channel)
        worst, where = self._worst(lambda group: self._channel(backend, group, output))
        axis, index = self._where[backend.name, output]
        sentence = (
            f"{backend.name}: the error of '{output}' at index {index} of axis {axis} is "
            f"{worst:.3g} times the original's (worst on '{where}' inputs; at most {limit:g} "
            f"passes)."
        )
        yield GateResult(backend.gate, "channel", subject, worst, limit, worst <= limit, sentence)

    def _within_class(self, backend: Backend, output: str) -> Iterator[GateResult]:
        """The folded network's error over the original's, both in the same place and class."""
        share, where = self._worst(lambda group: self._class_ratio(backend, group, output))
        sentence = (
            f"{backend.name}: the error of '{output}' is {share:.3g} times the one of "
            f"{backend.original} (worst on '{where}' inputs; at most {CLASS_LIMIT:g} passes)."
        )
        subject = f"{output}, {backend.name}"
        passed = share <= CLASS_LIMIT
        yield GateResult(backend.gate, "class ratio", subject, share, CLASS_LIMIT, passed, sentence)
        if not math.isfinite(share) or not self._groups_of_slices(output):
            return
        limit = CLASS_LIMIT * ELEMENT_LIMIT / R_LIMIT
        worst, where = self._worst(
            lambda group: self._channel(backend, group, output, backend.original)
        )
        sentence = (
            f"{backend.name}: the error of a channel of '{output}' is up to {worst:.3g} times the "
            f"one of {backend.original} (worst on '{where}' inputs; at most {limit:g} passes)."
        )
        yield GateResult(
            backend.gate, "class channel", subject, worst, limit, worst <= limit, sentence
        )

    # ------------------------------------------------------------------------------- figures

    def _worst(self, measure: Callable[[str], float]) -> tuple[float, str]:
        """The largest over the input sets, and which set it is of."""
        return max((measure(group.name), group.name) for group in self.sets)

    def _ratio(self, backend: Backend, group: str, output: str) -> float:
        """R: the backend's error over the original's, or over the usual one if that is luckier."""
        tally, base = (
            self.tallies[backend.name, group, output],
            self.tallies["original", group, output],
        )
        if tally.discrete:
            return tally.flips / max(base.flips, FLIPS * tally.elements, 1e-9)
        error = self._beyond_noise(backend, tally, output)
        usual = self._usual(lambda other: self._relative(other, output), output)
        ratio = error / max(self._relative(base, output), usual, FLOOR * self.unit)
        return math.inf if math.isnan(ratio) else ratio

    def _class_ratio(self, backend: Backend, group: str, output: str) -> float:
        tally = self.tallies[backend.name, group, output]
        base = self.tallies.get((backend.original, group, output))
        if base is None or base.trouble:
            return math.inf
        if tally.discrete:
            return tally.flips / max(base.flips, FLIPS * tally.elements, 1e-9)
        usual = self._usual(
            lambda other: self._relative(other, output), output, of=backend.original
        )
        least = max(self._relative(base, output), usual, FLOOR * self.unit)
        return self._beyond_noise(backend, tally, output) / least

    def _beyond_noise(self, backend: Backend, tally: Tally, output: str) -> float:
        noise = self.noise.get(backend.name, {}).get(output, 0.0)
        return max(self._relative(tally, output) - noise, 0.0)

    def _peak(self, backend: Backend, group: str, output: str) -> float:
        """Worst over samples: largest error of an element over the original's largest."""
        tally, base = (
            self.tallies[backend.name, group, output],
            self.tallies["original", group, output],
        )
        if tally.discrete or not tally.peaks:
            return 0.0
        usual = self._usual(peak_share, output)
        sizes, peaks = np.concatenate(tally.sizes), np.concatenate(tally.peaks)
        own = np.concatenate(base.peaks)
        alike = np.sqrt(np.mean(own**2))  # an element can cross zero, and its error come out right
        allowed = np.maximum(np.maximum(own, alike), sizes * max(usual, FLOOR * self.unit))
        return float(np.max(_shares(peaks, allowed), initial=0.0))

    def _groups_of_slices(self, output: str) -> list[str]:
        """The input sets with enough numbers of each channel; all together, if they have."""
        counts = {
            group.name: min(
                (own.count for own in self.tallies["original", group.name, output].slices.values()),
                default=0,
            )
            for group in self.sets
        }
        enough = [name for name, count in counts.items() if count >= FEW_OF_SLICE]
        return enough or [TOGETHER] * (sum(counts.values()) >= FEW_OF_SLICE)

    def _channel(self, backend: Backend, group: str, output: str, of: str = "original") -> float:
        """Worst index of the axes that may hold channels: its error over the original's there.

        Those that are exactly zero are left out. Where no input set has enough numbers of each,
        all sets are taken together, and told as the first one's.
        """
        groups = self._groups_of_slices(output)
        if groups == [TOGETHER]:
            names = [s.name for s in self.sets] if group == self.sets[0].name else []
        else:
            names = [group] if group in groups else []
        worst = 0.0
        for axis in self._axes(output) if names else ():
            found = self._pooled(backend.name, names, output, axis)
            own = self._pooled(of, names, output, axis)
            if found is None or own is None or found.error.shape != own.error.shape:
                continue
            usual = self._usual(lambda other: self._relative(other, output), output, of)
            size = np.sqrt(own.size)
            allowed = np.maximum(np.sqrt(own.error), size * max(usual, FLOOR * self.unit))
            shares = np.where(size > 0, _shares(np.sqrt(found.error), allowed), 0.0)
            if shares.size and shares.max() >= worst:
                worst = float(shares.max())
                if worst >= self._worst_channel.get((backend.name, output), 0.0):
                    self._worst_channel[backend.name, output] = worst
                    self._where[backend.name, output] = axis, int(shares.argmax())
        return worst

    def _axes(self, output: str) -> list[int]:
        return sorted(self.tallies["original", self.sets[0].name, output].slices)

    def _pooled(self, backend: str, groups: Sequence[str], output: str, axis: int) -> Slices | None:
        parts = [self.tallies[backend, name, output].slices.get(axis) for name in groups
                 if (backend, name, output) in self.tallies]  # fmt: skip
        known = [part for part in parts if part is not None]
        return reduce(Slices.plus, known) if known else None

    def _usual(self, measure: Callable[[Tally], float], output: str, of: str = "original") -> float:
        """What an error comes to on ordinary inputs, or on half of all input sets.

        A single number can come out right by luck; a ratio to luck says nothing.
        """
        tallies = {group.name: self.tallies.get((of, group.name, output)) for group in self.sets}
        measured = {name: measure(tally) for name, tally in tallies.items() if tally is not None}
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
        share = math.sqrt(tally.error / size) if size else math.inf
        return math.inf if math.isnan(share) else share


def _shares(errors: Array, allowed: Array) -> Array:
    """Errors over what is allowed; no error is never too much."""
    with np.errstate(all="ignore"):
        return np.where(errors == 0, 0.0, errors / allowed)


# ------------------------------------------------------------------------------------ causes


def _diagnosis(runtime: Runtime, ratio: float) -> str:
    """What the size of a ratio on a GPU looks like, where the class was not declared."""
    low, high = TENSOR_CORE
    if runtime.place.device != "cuda" or beyond(runtime) or not low < ratio < high:
        return ""
    return (
        f" It looks like TF32 or float16 products, which were not declared: if they are meant, say "
        f"{runtime.name}:tf32 (or :fp16)."
    )


def _undeclared(stored: str, backend: Backend) -> str:
    """That the folded weights are numbers of a narrower type, where that was not declared."""
    if not stored or backend.role != "folded" or beyond(backend.runtime):
        return ""
    return (
        f" All of its weights are {TITLES[stored]} numbers, and the original's are not: if that is "
        f"meant, declare the class {stored}."
    )
