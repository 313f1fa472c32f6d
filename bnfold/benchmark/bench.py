"""`bnfold.bench`: original, folded and what others make of it, timed in turn on each runtime.

report = bnfold.bench("net.onnx", compare=["onnxsim"], runtimes=["ort-cpu"], batch_sizes=[1, 8])
print(report.row("folded").ratio)

What is timed is first proved to be the same function; what is not is said so and not timed. The
original is timed as it is deployed: onnxruntime optimizes it when it loads, and folds a batch norm
behind a convolution itself. It is timed twice, and the second is the control: what a difference
must exceed to be told from noise (`paired`).
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnx_ir as ir

from bnfold import graph
from bnfold.api import Examples, FoldResult, fold_source
from bnfold.benchmark import timing
from bnfold.benchmark.others import check_others, made_by
from bnfold.benchmark.paired import Clock, Spread, Verdict, margin_of, spread_of, verdict_of
from bnfold.benchmark.timing import Effort, OnnxModel, Timed
from bnfold.errors import InputError, UsageError, VerificationError
from bnfold.proof.figures.draws import drawn_inputs, input_specs
from bnfold.proof.places.installation import machine, require
from bnfold.proof.places.runtimes import DEFAULT, Runtime, as_runtimes
from bnfold.proof.result import VerifyReport
from bnfold.proof.verify import verify
from bnfold.reading.computed import held
from bnfold.reading.sniff import Kind
from bnfold.reading.source import Source

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[int, int], None]
Said = (
    Verdict
    | Literal["the measure", "the control", "not the same function", "not made", "not timed"]
)

ORIGINAL, CONTROL, FOLDED, UNOPTIMIZED = (
    "original",
    "original again",
    "folded",
    "original, unoptimized",
)
ABOUT = (
    "Each model ran once in a round, in an order drawn anew; a ratio is to the original's time in"
    " the same round. A difference is told where the interval of the median ratio, and each of the"
    " sittings by itself, lies beyond what the original shows against itself, and beyond 2 %."
)
DEPLOYED = (
    "The original is timed as it is deployed: onnxruntime optimizes a model when it loads it, and"
    " folds a batch norm behind a convolution itself; a fold is quicker there by what onnxruntime"
    " cannot do."
)


@dataclass(frozen=True)
class BenchRow:
    """One model on one runtime with one batch size.

    median_ms, quartiles_ms: of a run. throughput: rows of the batch in a second. ratio,
    ratio_quartiles: of its time over the original's in the same round; ratio_interval holds the
    median of the sittings' rounds with 99 %. All are None for a model that was not timed. clock:
    "processor", where one thread of a processor computes (what others do to the machine is left
    out), else "wall".
    """

    model: str
    runtime: str
    batch: int
    threads: int
    clock: Clock
    verdict: Said
    sentence: str
    rounds: int = 0
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    throughput: float | None = None
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    ratio_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class BenchReport:
    """What was timed.

    machine: facts about it, without names or paths. faults: models that were not timed, and why.
    proofs: of those that were compared with the original, by name. others: the other optimisers,
    whose faults are not ours. placed: runtime and batch -> model -> provider -> operator -> nodes,
    as onnxruntime tells.
    """

    rows: tuple[BenchRow, ...]
    machine: Mapping[str, Any]
    faults: Mapping[str, str]
    proofs: Mapping[str, VerifyReport]
    placed: Mapping[str, Mapping[str, Any]]
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def row(self, model: str, runtime: str | None = None, batch: int | None = None) -> BenchRow:
        """The first row of a model. Raises UsageError where there is none."""
        for row in self.rows:
            if row.model == model and runtime in (None, row.runtime) and batch in (None, row.batch):
                return row
        raise UsageError(f"There is no row of '{model}' on {runtime or 'any runtime'}.")

    @property
    def passed(self) -> bool:
        """True when the fold, or all that was given, is the original's function.

        What another optimiser made is its own affair: see `faults`.
        """
        return not self._wrong

    @property
    def _wrong(self) -> list[str]:
        return [n for n, proof in self.proofs.items() if not proof.passed and n not in self.others]

    def raise_for_failure(self) -> None:
        """Raise VerificationError with the first model that is another function."""
        for name in self._wrong:
            raise VerificationError(f"'{name}' is not timed: {self.faults[name]}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it: the `bench` key of a report."""
        return {
            "machine": dict(self.machine),
            "about": ABOUT,
            "rows": [_row_dict(row) for row in self.rows],
            "placed": {place: dict(models) for place, models in self.placed.items()},
        }


def _row_dict(row: BenchRow) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(row).items()}


Timeable = Any  # nn.Module | ExportedProgram | ir.Model | onnx.ModelProto | Path | str


def bench(
    model: nn.Module | ExportedProgram | ir.Model | onnx.ModelProto | Path | str,
    folded: Mapping[str, Timeable] | None = None,
    example_inputs: Examples | None = None,
    *,
    compare: Sequence[str] = (),
    runtimes: Sequence[str | Runtime] = (DEFAULT,),
    batch_sizes: Sequence[int] | None = None,
    threads: int = 1,
    rounds: int = 200,
    seconds: float = 10.0,
    seed: int = 0,
    unoptimized: bool = False,
    check: bool = True,
    factory: str | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Time a network, its fold and what other optimisers make of it, in turn.

    model, example_inputs, factory: as for `bnfold.fold`. folded: other models to time, by name,
    in the place of the fold that is made on the way. compare: other optimisers, "onnxsim" and
    "onnxslim", each run through its own command. runtimes: `NAME[:CLASS]`, where torch runs modules
    and onnxruntime ONNX. batch_sizes: default 1, or the model's own where it is fixed. threads: of
    a run on a processor. rounds, seconds: of one runtime and batch size, whichever ends first.
    seed: of the inputs and of the order within rounds. unoptimized: the original with onnxruntime's
    own optimization off, too. check: prove first that each is the same function; what is not is not
    timed, see `BenchReport.faults`.
    Raises RuntimeUnavailableError for a runtime or an optimiser that cannot run here, UsageError
    and InputError for what cannot be timed.
    """
    from bnfold.api import _source

    source = held(_source(model, example_inputs, None, False, factory))
    given = {
        name: held(_source(other, example_inputs, None, False, factory))
        for name, other in (folded or {}).items()
    }
    return bench_sources(
        source,
        given,
        compare=compare,
        runtimes=runtimes,
        batch_sizes=batch_sizes,
        threads=threads,
        effort=Effort(rounds, seconds, seed),
        unoptimized=unoptimized,
        check=check,
        progress=progress,
    )


def bench_sources(
    source: Source,
    given: Mapping[str, Source],
    *,
    compare: Sequence[str] = (),
    runtimes: Sequence[str | Runtime] = (DEFAULT,),
    batch_sizes: Sequence[int] | None = None,
    threads: int = 1,
    effort: Effort | None = None,
    unoptimized: bool = False,
    check: bool = True,
    shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """The same of sources that were read. shapes: of inputs whose axes are dynamic, by name."""
    effort = effort or Effort()
    places = as_runtimes(runtimes)
    _check(given, compare, batch_sizes, threads, effort)
    check_others(compare)
    _check_modules(source, places)
    require(place.name for place in places)
    proto = graph.to_proto(source.graph)
    batches = dict(_batches(proto, batch_sizes, shapes, effort))
    total = (len(given) or 1) + len(compare) + len(places) * len(batches)
    done = itertools.count()

    def step() -> None:
        if progress is not None:
            progress(next(done), total)

    with tempfile.TemporaryDirectory(prefix="bnfold-") as folder:
        field = _entrants(source, proto, given, compare, Path(folder), check=check, step=step)
        made: list[BenchRow] = []
        placed: dict[str, Mapping[str, Any]] = {}
        for place, (batch, feeds) in itertools.product(places, batches.items()):
            step()
            timed = _timed(field, place, feeds, threads, effort, unoptimized)
            made += _rows(field, timed, str(place), batch, threads)
            if timed.placed:
                placed[f"{place}, batch {batch}"] = timed.placed
    step()
    onnxruntime = any(place.place.library == "onnxruntime" for place in places)
    return BenchReport(
        rows=tuple(made),
        machine=machine(gpu=any(place.place.device == "cuda" for place in places)),
        faults=field.faults,
        proofs=field.proofs,
        placed=placed,
        others=tuple(compare),
        notes=(*source.notes, *field.notes, *_proved(field), *([DEPLOYED] if onnxruntime else [])),
    )


def _check(
    given: Mapping[str, Source],
    compare: Sequence[str],
    batch_sizes: Sequence[int] | None,
    threads: int,
    effort: Effort,
) -> None:
    taken = {ORIGINAL, CONTROL, UNOPTIMIZED, *compare} & given.keys()
    if taken:
        raise UsageError(
            f"'{min(taken)}' is the name of another model of this comparison; give it another one."
        )
    sizes = list(batch_sizes or ())
    wrong = [what for what, bad in (
        ("a batch size", any(size < 1 for size in sizes)), ("the number of threads", threads < 1),
        ("the number of rounds", effort.rounds < 1), ("the time", not effort.seconds > 0),
    ) if bad]  # fmt: skip
    if wrong:
        raise UsageError(f"{wrong[0]} must be more than 0.")
    most = os.cpu_count() or 1
    if threads > most:
        raise UsageError(f"{threads} threads were asked for; this machine has {most} cores.")


# --- what is timed -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Field:
    """All that is timed, the original first: files for onnxruntime, modules for torch."""

    files: Mapping[str, Path]
    modules: Mapping[str, nn.Module]
    faults: Mapping[str, str]
    proofs: Mapping[str, VerifyReport]
    notes: tuple[str, ...]


def _entrants(
    source: Source,
    proto: onnx.ModelProto,
    given: Mapping[str, Source],
    compare: Sequence[str],
    folder: Path,
    *,
    check: bool,
    step: Callable[[], None],
) -> _Field:
    """The models, each proved to be the original's function or among the faults."""
    files = {ORIGINAL: _file_of(source, folder / "original.onnx")}
    modules = {ORIGINAL: source.module} if source.module is not None else {}
    faults: dict[str, str] = {}
    proofs: dict[str, VerifyReport] = {}
    notes: list[str] = []

    def prove(name: str, proof: Callable[[], VerifyReport]) -> bool:
        if not check:
            return True
        proofs[name] = found = proof()
        if not found.passed:
            first = found.failures[0].sentence if found.failures else "nothing was compared."
            faults[name] = f"It is not the same function: {first}"
        return found.passed

    if given:
        for place, (name, other) in enumerate(given.items()):
            step()
            if prove(name, lambda other=other: _proof(source, other, proto)):  # type: ignore[misc]
                files[name] = _file_of(other, folder / f"given{place}.onnx")
                if other.module is not None:
                    modules[name] = other.module
    else:
        step()
        result = fold_source(source)
        notes += _about_fold(result)
        if prove(FOLDED, result.verify):
            graph.write_onnx(result.graph, folder / "folded.onnx")
            files[FOLDED] = folder / "folded.onnx"
            if result.modules is not None:
                modules[FOLDED] = result.modules[1]
    for name in compare:
        step()
        target = folder / f"{name}.onnx"
        fault = made_by(name, files[ORIGINAL], target)
        if fault:
            faults[name] = fault
        elif prove(name, lambda target=target: verify(proto, target)):  # type: ignore[misc]
            files[name] = target
    return _Field(files, modules, faults, proofs, tuple(notes))


def _proof(source: Source, other: Source, proto: onnx.ModelProto) -> VerifyReport:
    both = source.module is not None and other.module is not None
    modules: Any = (source.module, other.module) if both else None
    return verify(proto, graph.to_proto(other.graph), torch_modules=modules)


def _about_fold(result: FoldResult) -> list[str]:
    found = len(result.folded) + len(result.kept)
    return [*result.notes, f"The fold took {len(result.folded)} of {found} batch norms."]


def _proved(field: _Field) -> list[str]:
    good = [f"{name} (R = {proof.r:.2f})" for name, proof in field.proofs.items() if proof.passed]
    return [f"Proved to be the original's function: {', '.join(good)}."] if good else []


def _file_of(source: Source, written: Path) -> Path:
    """The user's own ONNX file, untouched; of anything else its graph."""
    if source.kind is Kind.ONNX and source.path.is_file():
        return source.path.resolve()
    graph.write_onnx(source.graph, written)
    return written


def _check_modules(source: Source, places: Sequence[Runtime]) -> None:
    if source.module is None and any(place.place.library == "torch" for place in places):
        raise UsageError(
            "torch runs a network's module, and none is at hand: give a checkpoint with its"
            " --model, or time the ONNX file on ort-cpu or ort-cuda."
        )


def _batches(
    proto: onnx.ModelProto,
    sizes: Sequence[int] | None,
    shapes: Mapping[str, Sequence[int]] | None,
    effort: Effort,
) -> Iterator[tuple[int, dict[str, Array]]]:
    """Each batch size, and normal draws of that many rows. Raises UsageError for one not taken."""
    fixed = {spec.dims[0] for spec in input_specs(proto) if spec.dims} - {None}
    for size in dict.fromkeys(sizes or (max((d for d in fixed if d), default=1),)):
        if fixed and fixed != {size}:
            raise UsageError(
                f"The model takes batches of {', '.join(map(str, sorted(d for d in fixed if d)))};"
                f" it cannot be timed with {size}. Export it with a dynamic batch."
            )
        drawn = drawn_inputs(proto, None, seed=effort.seed, samples=size, input_shapes=shapes)
        parts = drawn[0].batches[:1] if fixed else drawn[0].batches
        feeds = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        strange = [name for name, array in feeds.items() if array.dtype.isbuiltin != 1]
        if strange:
            raise InputError(
                f"The input '{strange[0]}' is of type {feeds[strange[0]].dtype}, which numpy does"
                " not have: it cannot be timed."
            )
        yield size, feeds


# --- the figures ---------------------------------------------------------------------------------


def _timed(field: _Field, place: Runtime, feeds: Mapping[str, Array], threads: int, effort: Effort,
           unoptimized: bool) -> Timed:  # fmt: skip
    if place.place.library == "torch":
        modules = {**field.modules, CONTROL: field.modules[ORIGINAL]}
        return timing.time_torch(modules, list(feeds.values()), place, threads, effort)
    models = {name: OnnxModel(str(path)) for name, path in field.files.items()}
    if unoptimized:
        models[UNOPTIMIZED] = replace(models[ORIGINAL], optimize=False)
    models[CONTROL] = models[ORIGINAL]
    return timing.time_onnx(models, feeds, place, threads, effort)


def _rows(field: _Field, timed: Timed, runtime: str, batch: int, threads: int) -> list[BenchRow]:
    """The table of one place, what was not timed at its end."""
    names = list(timed.rounds[0])
    ratios = {
        name: spread_of(
            *([taken[name] / taken[ORIGINAL] for taken in sitting] for sitting in timed.sittings)
        )
        for name in names
    }
    margin = margin_of(ratios[CONTROL])
    rows = []
    for name in names:
        verdict, sentence = _said(name, ratios[name], margin, len(timed.rounds))
        own = spread_of([taken[name] for taken in timed.rounds])
        rows.append(
            BenchRow(
                model=name,
                runtime=runtime,
                batch=batch,
                threads=threads,
                clock=timed.clock,
                verdict=verdict,
                sentence=sentence,
                rounds=len(timed.rounds),
                median_ms=1000 * own.median,
                quartiles_ms=(1000 * own.quartiles[0], 1000 * own.quartiles[1]),
                throughput=batch / own.median,
                ratio=ratios[name].median,
                ratio_quartiles=ratios[name].quartiles,
                ratio_interval=ratios[name].interval,
            )
        )
    for name in (name for name in field.files if name not in names):  # of torch's places
        sentence = "It holds no torch module."
        rows.append(BenchRow(name, runtime, batch, threads, timed.clock, "not timed", sentence))
    for name, fault in field.faults.items():
        verdict = "not the same function" if name in field.proofs else "not made"
        rows.append(BenchRow(name, runtime, batch, threads, timed.clock, verdict, fault))
    return rows


def _said(name: str, ratios: Spread, margin: float, rounds: int) -> tuple[Said, str]:
    if name == ORIGINAL:
        return "the measure", "The others' ratios are to it, within a round."
    low, high = ratios.interval
    between = f"the median ratio is {ratios.median:.3f}, between {low:.3f} and {high:.3f} (99 %)"
    if name == CONTROL:
        return "the control", f"The same model once more: {between}."
    verdict = verdict_of(ratios, margin)
    if not math.isfinite(high):
        return verdict, f"{rounds} rounds are too few to tell a difference from noise."
    return verdict, f"{between}; told is what differs by more than {margin:.1%}."
