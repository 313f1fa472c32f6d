"""Gates B and C: networks run on backends, and their errors held against the original's.

Every backend's outputs are compared with a float64 evaluation of the original, never with each
other; what they come to is told by `verdicts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from bnfold.errors import InputError, NothingComparedError
from bnfold.proof.exact.reference import Float64Reference, NoReferenceError
from bnfold.proof.figures.draws import InputSet, rows_of
from bnfold.proof.figures.tally import Tally, relative_differences
from bnfold.proof.figures.verdicts import Decisions, GateResult, Measures, not_run
from bnfold.proof.places.backends import Backend, Backends, Values, beyond

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[int, int | None], None]


@dataclass
class Comparison:
    """The runs of all backends on all inputs.

    question: the gate that has to be answered, B of two networks and C of one. unit: the rounding
    of the original's type. stored: the class that the folded weights are numbers of, if narrower.
    folded: the other network, of two. noise: by backend and output, the relative difference of its
    runs. notes: what was not compared, and why.
    """

    backends: Backends
    reference: Float64Reference
    sets: list[InputSet]
    outputs: list[str]
    unit: float
    question: str = "B"
    stored: str = ""
    folded: onnx.ModelProto | None = None
    noise: dict[str, dict[str, float]] = field(default_factory=dict)
    tallies: dict[tuple[str, str, str], Tally] = field(default_factory=dict)
    trouble: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    measures: Measures | None = None
    _first: dict[str, Array] = field(default_factory=dict)
    _varied: set[str] = field(default_factory=set)

    @property
    def samples(self) -> int:
        """Rows compared."""
        return sum(group.samples if group.batches[0] else 1 for group in self.sets)

    @property
    def constant_outputs(self) -> list[str]:
        """Outputs that were the same for every row of every input."""
        return [name for name in self.outputs if name not in self._varied]

    @property
    def decisions(self) -> tuple[Decisions, ...]:
        """How often the largest element is another one, of every output of two axes."""
        return () if self.measures is None else self.measures.decisions()

    def judge(self, progress: Progress | None) -> list[GateResult]:
        """Gates B and C. Raises NothingComparedError where no number was compared."""
        total = sum(len(group.batches) for group in self.sets)
        done = 0
        try:
            for group in tuple(self.sets):
                for feeds in group.batches:
                    self._run(group, feeds)
                    done += 1
                    if progress is not None:
                        progress(done, total)
        except NoReferenceError as error:
            return [not_run(self.question, str(error))]
        if not any(tally.elements or tally.trouble for tally in self.tallies.values()):
            raise NothingComparedError(self._nothing())
        self.measures = Measures(
            self.sets,
            self.outputs,
            self.unit,
            self.tallies,
            self.noise,
            self.backends.compared,
            None if self.folded is None else self._in_float64,
        )
        results = list(self.measures.results(self.question, self.trouble, self.stored))
        self.notes += self.measures.notes
        return results

    def _in_float64(self, group: str) -> dict[str, Tally]:
        """The folded network in float64 on an input set, by output."""
        tallies = {name: Tally() for name in self.outputs}
        batches = next(s.batches for s in self.sets if s.name == group)
        try:
            folded = Float64Reference(self.folded)
            for feeds in batches:
                exact = self.reference.run(feeds, self.outputs)
                values = folded.run(feeds, self.outputs)
                for name, tally in tallies.items():
                    tally.add(values[name], exact[name])
        except InputError as error:
            return {name: Tally(trouble=str(error)) for name in self.outputs}
        return tallies

    def _nothing(self) -> str:
        if any(value.size for value in self._first.values()):
            return "every element of every output is NaN or infinite, so nothing was compared."
        return "every output is empty, so nothing was compared."

    def _run(self, group: InputSet, feeds: Mapping[str, Array]) -> None:
        try:
            base = self._run_original(feeds)
            exact = self.reference.run(feeds, self.outputs)
        except InputError as error:
            if not group.optional:
                raise
            unread = isinstance(error, NoReferenceError)
            who = "its float64 evaluation" if unread else "the original"
            self.sets.remove(group)
            self.notes.append(f"Not compared: {group.name}, which {who} does not take.")
            return
        for name in self.outputs:
            self._watch(name, exact[name])
            self._tally("original", group.name, name).add(base[name], exact[name])
        for backend in self.backends.compared:
            if backend.name in self.trouble:
                continue
            try:
                values = backend.run(feeds)
                if backend.name not in self.noise and backend.gate == "C":
                    self.noise[backend.name] = noise_of(backend, feeds, values, exact)
            except InputError as error:
                self.trouble[backend.name] = f"{backend.name}, on '{group.name}' inputs: {error}"
                continue
            for name in self.outputs:
                kind = _kind_of(base[name], backend)
                tally = self._tally(backend.name, group.name, name)
                tally.add(values.get(name), exact[name], kind)

    def _run_original(self, feeds: Mapping[str, Array]) -> Values:
        try:
            return self.backends.original.run(feeds)
        except InputError as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
            raise InputError(
                f"the original model does not run on inputs of the shapes {shapes}; give the "
                f"shapes that it takes. {error}"
            ) from error

    def _watch(self, name: str, exact: Any) -> None:
        """Remember whether an output depends on the input at all."""
        if name in self._varied or not isinstance(exact, np.ndarray):
            return
        rows = exact if exact.ndim else exact[None]
        first = self._first.setdefault(name, np.asarray(rows[0] if len(rows) else rows))
        if first.shape != rows.shape[1:] or not all(
            np.array_equal(row, first, equal_nan=first.dtype.kind == "f") for row in rows
        ):
            self._varied.add(name)

    def _tally(self, backend: str, group: str, output: str) -> Tally:
        return self.tallies.setdefault((backend, group, output), Tally())


def _kind_of(value: Any, backend: Backend) -> np.dtype[Any] | None:
    """The type that a backend's output must have: the original's, where no class was declared."""
    if backend.session is None or beyond(backend.runtime) or not isinstance(value, np.ndarray):
        return None
    kind: np.dtype[Any] = value.dtype
    return kind


def noise_of(
    backend: Backend, feeds: Mapping[str, Array], values: Values, exact: Values
) -> dict[str, float]:
    """By output, the relative difference of a run from its session's next and a new session's."""
    found = relative_differences(values, backend.run(feeds), exact)
    if backend.again is None:
        return found
    other = relative_differences(values, backend.again(feeds), exact)
    return {name: max(noise, other[name]) for name, noise in found.items()}


def few(sets: Sequence[InputSet], original: Backend, least: int) -> bool:
    """True when the given inputs lead to so few numbers that their errors may all be luck."""
    batch = sets[0].batches[0]
    values = original.run(batch).values()
    smallest = min((v.size for v in values if isinstance(v, np.ndarray)), default=0)
    rows = rows_of(next(iter(batch.values()))) if batch else 1
    return smallest * sets[0].samples < least * max(rows, 1)


def other_names(original: Sequence[str], folded: Sequence[str], what: str) -> str:
    """How two lists of names differ; empty where they do not."""
    if list(original) == list(folded):
        return ""
    if sorted(original) == sorted(folded):
        return f"the folded model has its {what} in another order ({_listed(folded)})"
    return (
        f"the folded model has the {what} {_listed(folded)}; the original has {_listed(original)}"
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4]) or "none"
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
