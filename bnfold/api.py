"""The verbs as functions. Pure: a model in, a result back, nothing printed.

result = bnfold.fold(module, example_inputs=torch.zeros(1, 3, 32, 32))
result.verify().raise_for_failure()
deploy(result.model)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnx_ir as ir

from bnfold import graph
from bnfold.errors import UsageError
from bnfold.folding.apply import Folded, apply
from bnfold.folding.chains import CHAINS
from bnfold.folding.dead import without_dead_channels
from bnfold.folding.plan import FoldPlan, MergedSum, plan
from bnfold.folding.record import (
    Choices,
    FoldedNorm,
    FoldRecord,
    gauges_of,
    norms_of,
    record_of,
)
from bnfold.folding.rules.repairs import REPAIRS
from bnfold.folding.selection import Selection, check_enough
from bnfold.folding.undo import TorchSide
from bnfold.proof.places.runtimes import DEFAULT, Runtime
from bnfold.reading.computed import held
from bnfold.reading.sniff import Kind
from bnfold.reading.source import (
    Source,
    open_source,
    source_of_module,
    source_of_program,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

    from bnfold.proof.result import VerifyReport


# One tensor per argument of forward, or a dict or list of tensors for one.
Examples = Any


DEAD_CHANNELS = "dead-channels"
CLEAN_UPS = (*CHAINS, DEAD_CHANNELS)


@dataclass(frozen=True)
class KeptNorm:
    """A batch norm that stays, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class FoldResult:
    """What a fold gives.

    model: the folded network, of the type that came in (a path gives the type of what it holds); a
    module comes back in its own class, or as a graph module where its class cannot hold the fold.
    original, graph: the ONNX graphs before and after. folded, kept: what became of each batch norm.
    absorbed: names of the constant multiplications and additions that are gone besides. merged:
    sums of parallel branches that are one convolution now. state_dict: for torch sources, the
    folded tensors by name. program: of a graph module, what torch.export.save writes. notes: what
    was done on the way and why, a sentence each. choices: what was asked for. plan, applied,
    source: what it was made of.
    """

    model: Any
    original: ir.Model
    graph: ir.Model
    folded: tuple[FoldedNorm, ...]
    kept: tuple[KeptNorm, ...]
    plan: FoldPlan = field(repr=False)
    applied: Folded = field(repr=False)
    source: Source = field(repr=False)
    state_dict: Mapping[str, torch.Tensor] | None = None
    modules: tuple[nn.Module, nn.Module] | None = None
    program: ExportedProgram | None = None
    notes: tuple[str, ...] = ()
    absorbed: tuple[str, ...] = ()
    merged: tuple[MergedSum, ...] = ()
    choices: Choices = field(default_factory=Choices, repr=False)

    @cached_property
    def record(self) -> FoldRecord:
        """What verifies, undoes and re-adapts the fold; made when it is first asked for."""
        side = self._torch_side()
        choices = replace(self.choices, scope=self.plan.scope)
        return record_of(self.plan, self.applied, side, choices)

    def _torch_side(self) -> TorchSide | None:
        if self.state_dict is None or self.program is not None:
            return None
        from bnfold.folding.torch_undo import torch_side_of

        before, gone = self.source.state_dict, [norm.name for norm in self.folded]
        assert before is not None  # the folded one was made from it
        if any(f"{name}.running_mean" not in before for name in gone):
            return None  # the module's state_dict() is its own affair
        own, plain = self.source.module, self.source.plain
        pair = (own, plain) if own is not None and plain is not None else None
        assert self.plan.scope is not None  # it went back into the class
        side = torch_side_of(before, self.state_dict, self.plan.scope, pair, gone)
        known = self.source.description.get("built") or {}
        return replace(
            side, built={**{name: known[name] for name in gone if name in known}, **side.built}
        )

    def verify(
        self,
        inputs: Mapping[str, np.ndarray] | None = None,
        *,
        runtimes: Sequence[str | Runtime] = (DEFAULT,),
        seed: int = 0,
        profile: bool = False,
        input_shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> VerifyReport:
        """Gates A, B and C of this fold; see `bnfold.verify`. profile: each layer's error too."""
        from bnfold.proof.verify import verify

        return verify(
            graph.to_proto(self.original),
            graph.to_proto(self.graph),
            gauges=gauges_of(self.plan),
            aliases=self.applied.aliases,
            inputs=inputs,
            runtimes=runtimes,
            seed=seed,
            torch_modules=self.modules,
            profile=profile,
            input_shapes=input_shapes,
        )

    def require_folded(self, count: int | Literal["all"] = "all") -> None:
        """Raise DemandError where fewer batch norms folded than `count`."""
        check_enough(len(self.folded), len(self.kept), count)

    def save(self, path: Path | str, *, overwrite: bool = False) -> Path:
        """Write the folded model, and beside it its record, which is bound to it: both or neither.

        path: .onnx, .pt, .safetensors or .pt2, as for `bnfold fold -o`. Gives the record's path.
        Nothing is proved here: see `verify`. Raises UsageError for files that cannot be written, or
        are there already.
        """
        from bnfold.outputs import save_fold

        return save_fold(self, Path(path), overwrite=overwrite)


@dataclass(frozen=True)
class Inspection:
    """What a fold would do: each batch norm's way, and the operators before."""

    folded: tuple[FoldedNorm, ...]
    kept: tuple[KeptNorm, ...]
    operators: Mapping[str, int]

    def require_folded(self, count: int | Literal["all"] = "all") -> None:
        """Raise DemandError where fewer batch norms would fold than `count`."""
        check_enough(len(self.folded), len(self.kept), count)


def fold(
    model: nn.Module | ExportedProgram | ir.Model | onnx.ModelProto | Path | str,
    example_inputs: Examples | None = None,
    *,
    opset: int | None = None,
    freeze_inputs: bool = False,
    factory: str | None = None,
    repair: Sequence[str] = (),
    keep: Sequence[str] = (),
    only: Sequence[str] = (),
    writeback: Literal["auto", "class", "graph"] = "auto",
    clean_up: Sequence[str] = (),
) -> FoldResult:
    """Fold every batch norm that folds exactly into the neighbouring weights.

    model: an nn.Module (with `example_inputs`, one tensor, or dict or list of tensors, per argument
    of forward), an exported program, an onnx_ir or onnx model, or the path of a model file. It is
    not changed. factory: the network of a checkpoint path ("path.py:name").
    freeze_inputs: treat initializers that a caller could override as constants. repair: exact
    repairs ("clamp", "pad", "border") that may put other operators in the place of a batch norm;
    they are of the graph, so the result of a module is its folded ONNX graph then, or a graph
    module with writeback "graph". clean_up: what may be
    simplified besides, in the graph too: "pad" (a Pad with zeros becomes the convolution's own),
    "conv-chain" (a 1x1 convolution of a convolution, where one costs no more), "dead-channels".
    keep, only: shell-style patterns of batch norms' names (`layer1.*`). One that matches keep, or
    that does not match only, stays with its parameters unchanged, to be tuned or re-estimated.
    writeback: what a module comes back as. "class": a copy of its own class in eval mode, with what
    that can hold. "graph": a graph module (torch.fx), which can hold more. "auto": its class,
    unless a graph module takes more batch norms and no hook of the user's would be lost with it.
    Raises BnfoldError with a sentence: an unreadable or unsupported model, impossible statistics, a
    pattern that matches nothing.
    """
    return fold_source(
        _source(model, example_inputs, opset, freeze_inputs, factory),
        model,
        writeback=None if clean_up or (repair and writeback != "graph") else writeback,
        repair=repair,
        selection=_selection(keep, only),
        clean_up=clean_up,
    )


def inspect(
    model: nn.Module | ExportedProgram | ir.Model | onnx.ModelProto | Path | str,
    example_inputs: Examples | None = None,
    *,
    freeze_inputs: bool = False,
    factory: str | None = None,
    keep: Sequence[str] = (),
    only: Sequence[str] = (),
) -> Inspection:
    """Where each batch norm would go, or why it would stay; arguments as for `fold`."""
    source = _source(model, example_inputs, None, freeze_inputs, factory)
    result = fold_source(source, selection=_selection(keep, only))
    return Inspection(result.folded, result.kept, count_operators(source.graph))


def verify(
    original: ir.Model | onnx.ModelProto | bytes | Path | str,
    folded: ir.Model | onnx.ModelProto | bytes | Path | str,
    inputs: Mapping[str, np.ndarray] | None = None,
    *,
    record: FoldRecord | None = None,
    runtimes: Sequence[str | Runtime] = (DEFAULT,),
    seed: int = 0,
    samples: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    profile: bool = False,
) -> VerifyReport:
    """Compare two ONNX models: gates B and C, and gate A where the record of the fold is given.

    inputs: arrays by input name; drawn from `seed` if there are none. runtimes: where gate C runs
    the folded one, such as "ort-cpu", "ort-cuda" or "ort-cuda:tf32", which declares that precision.
    samples: rows that are drawn; input_shapes: sizes of dynamic axes, by input name. profile: the
    error at every former batch norm too.
    A failed gate is no exception: see `VerifyReport.passed` and `raise_for_failure`.
    Raises RuntimeUnavailableError when a runtime cannot run here (never a pass),
    NothingComparedError when there is no output, InputError for models that cannot be read,
    UsageError for an unknown runtime.
    """
    from bnfold.proof.verify import verify as prove

    return prove(
        graph.to_proto(original) if isinstance(original, ir.Model) else original,
        graph.to_proto(folded) if isinstance(folded, ir.Model) else folded,
        gauges=record.gauges if record else None,
        aliases=record.aliases if record else None,
        inputs=inputs,
        runtimes=runtimes,
        seed=seed,
        samples=samples,
        input_shapes=input_shapes,
        profile=profile,
    )


def parity(
    model: nn.Module | ExportedProgram | ir.Model | onnx.ModelProto | Path | str,
    inputs: Mapping[str, np.ndarray] | None = None,
    *,
    example_inputs: Examples | None = None,
    factory: str | None = None,
    runtimes: Sequence[str | Runtime] = (DEFAULT,),
    seed: int = 0,
    samples: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> VerifyReport:
    """Compare one model on several runtimes with its float64 evaluation: gate C.

    model, example_inputs, factory: as for `fold`. inputs: arrays by input name; drawn from `seed`
    if there are none. runtimes: such as "torch" (of a torch model), "ort-cpu", "ort-cuda:tf32".
    Raises as `verify`.
    """
    from bnfold.proof.verify import parity as prove

    source = held(_source(model, example_inputs, None, False, factory))
    return prove(
        graph.to_proto(source.graph),
        runtimes=runtimes,
        inputs=inputs,
        seed=seed,
        samples=samples,
        input_shapes=input_shapes,
        torch_module=source.module,
    )


def export(
    module: nn.Module,
    example_inputs: Examples,
    path: Path | str | None = None,
    *,
    opset: int = graph.DEFAULT_OPSET,
    dynamic_batch: bool = True,
) -> ir.Model:
    """The inference graph of a torch module, batch norms in place; written to `path` if given."""
    exported = graph.export_module(
        module, _arguments(example_inputs), opset=opset, dynamic_batch=dynamic_batch
    )
    if path is not None:
        graph.write_onnx(exported, path)
    return exported


def fold_source(
    source: Source,
    given: object = None,
    *,
    writeback: Literal["auto", "class", "graph"] | None = "auto",
    repair: Sequence[str] = (),
    selection: Selection | None = None,
    clean_up: Sequence[str] = (),
) -> FoldResult:
    """Fold a source that was read; `given` is what the caller passed, whose type comes back.

    writeback: what a torch network comes back as, see `fold`; None: the ONNX graph alone, which can
    hold more than torch can. repair, clean_up: as for `fold`, of the ONNX graph alone. selection:
    the batch norms that the user wants to keep.
    """
    _check_names("repair", repair, REPAIRS)
    _check_names("clean-up", clean_up, CLEAN_UPS)
    source = held(source) if source.state_dict is not None else source
    asked = selection or Selection()
    choices = Choices(tuple(repair), tuple(clean_up), asked.keep, asked.only)
    is_torch = source.state_dict is not None or source.exported is not None
    if writeback is None or not is_torch:
        repairs, chains = frozenset(repair), frozenset(clean_up) & CHAINS.keys()
        chosen = plan(source.graph, repairs=repairs, selection=selection, clean_up=chains)
        folded = apply(chosen)
        if DEAD_CHANNELS in clean_up:
            folded = without_dead_channels(folded)
        as_proto = isinstance(given, onnx.ModelProto)
        model: object = graph.to_proto(folded.model) if as_proto else folded.model
        return _with_record(replace(result_of(source, chosen, folded, model), choices=choices))
    from bnfold.writeback import fold_torch

    found = fold_torch(source, writeback, selection, repair)
    model = found.module if found.module is not None else found.folded.model
    if source.kind is Kind.EXPORTED_PROGRAM and found.program is not None:
        model = found.program
    made = replace(
        result_of(source, found.plan, found.folded, model),
        state_dict=found.state_dict,
        modules=found.compared,
        program=found.program,
        notes=(*source.notes, *found.notes),
        choices=choices,
    )
    return _with_record(made)


def _with_record(made: FoldResult) -> FoldResult:
    """A module's record is made at once: the caller's may have other weights later."""
    if made.source.exported is not None:
        _ = made.record
    return made


def result_of(source: Source, chosen: FoldPlan, folded: Folded, model: object) -> FoldResult:
    """What a plan that was applied gives; `model` is what the caller gets."""
    return FoldResult(
        model=model,
        original=source.graph,
        graph=folded.model,
        folded=norms_of(chosen),
        kept=tuple(KeptNorm(kept.name, kept.reason) for kept in chosen.kept),
        absorbed=tuple(removed.name for removed in chosen.absorbed),
        plan=chosen,
        applied=folded,
        source=source,
        notes=source.notes,
        merged=chosen.merged,
    )


def _check_names(what: str, given: Sequence[str], known: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UsageError(f"There is no {what} '{unknown[0]}'; there are {', '.join(known)}.")


def _selection(keep: Sequence[str], only: Sequence[str]) -> Selection:
    if isinstance(keep, str) or isinstance(only, str):
        raise UsageError("keep and only are lists of patterns, such as keep=['layer1.*'].")
    return Selection(tuple(keep), tuple(only))


def count_operators(model: ir.Model) -> dict[str, int]:
    """How many nodes of each operator the model has, most frequent first."""
    return dict(Counter(node.op_type for g in model.graphs() for node in g).most_common())


def _source(
    model: nn.Module | ExportedProgram | ir.Model | onnx.ModelProto | Path | str,
    example_inputs: Examples | None,
    opset: int | None,
    freeze_inputs: bool,
    factory: str | None,
) -> Source:
    """Whatever the caller passed, as a source."""
    if isinstance(model, str | Path):
        shapes = None
        if example_inputs is not None:
            shapes = [("", tuple(x.shape)) for x in _arguments(example_inputs)]
        return open_source(
            model, model=factory, input_shapes=shapes, opset=opset, freeze_inputs=freeze_inputs
        )
    if isinstance(model, onnx.ModelProto):
        read = graph.parse_onnx(model.SerializeToString())
        read = graph.freeze_inputs(read) if freeze_inputs else read
        return Source(Path("the model"), Kind.ONNX, read)
    if isinstance(model, ir.Model):
        read = graph.prepare(model.clone())
        read = graph.freeze_inputs(read) if freeze_inputs else read
        return Source(Path("the model"), Kind.ONNX, read)
    from torch import nn
    from torch.export import ExportedProgram

    if isinstance(model, ExportedProgram):
        return source_of_program(model, Path("the program"), opset)
    if not isinstance(model, nn.Module):
        raise UsageError(
            "bnfold folds an nn.Module, an exported program, an ONNX model or a path; this is a"
            f" {type(model).__name__}."
        )
    if example_inputs is None:
        raise UsageError(
            "An nn.Module needs example_inputs, such as torch.zeros(1, 3, 224, 224), to be traced."
        )
    name = Path(type(model).__name__)
    source = source_of_module(model, _arguments(example_inputs), name, opset)
    if not any(part.training for part in model.modules()):
        return source
    note = "The network came in training mode; what is folded is what it computes in eval mode."
    return replace(source, notes=(*source.notes, note))


def _arguments(example_inputs: Examples) -> tuple[Any, ...]:
    """One item per argument of forward. Raises UsageError for what holds no tensors."""
    import torch
    from torch.utils import _pytree as tree

    alone = isinstance(example_inputs, torch.Tensor | Mapping)
    arguments = (example_inputs,) if alone else tuple(example_inputs)
    leaves = tree.tree_leaves(arguments)
    if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise UsageError(
            "example_inputs are tensors: one, or a dict or list of them, per argument of forward."
        )
    return arguments
