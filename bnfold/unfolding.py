"""Unfold: a folded model and its record become the original again, bit for bit, with proof.

result = bnfold.unfold("net.folded.onnx")
result.verify().raise_for_failure()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from bnfold import graph, report
from bnfold.errors import InputError, UsageError
from bnfold.folding.record import FoldedNorm, FoldRecord, load_record
from bnfold.folding.undo import original_graph, original_state
from bnfold.outputs import record_path
from bnfold.proof.places.runtimes import DEFAULT, Runtime
from bnfold.reading.checkpoint import Checkpoint, load_checkpoint
from bnfold.reading.factory import build_module
from bnfold.reading.sniff import Kind, sniff
from bnfold.reading.source import Shapes, Source, open_source
from bnfold.reading.weights import load_into

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bnfold.proof.result import VerifyReport


@dataclass(frozen=True)
class UnfoldResult:
    """What unfolding gives.

    model: the original network, of the type that came in (a path gives the module of a checkpoint
    with a factory, else the ONNX graph). graph, folded: the ONNX graphs of the original and of what
    came in; None for a bare module. norms: the batch norms that are back. state_dict: for torch
    sources, the original tensors by name. modules: the original and the folded torch module.
    own_graph: the folded graph is the file's own, with the names that the record knows.
    """

    model: Any
    graph: ir.Model
    folded: ir.Model | None
    record: FoldRecord = field(repr=False)
    state_dict: Mapping[str, torch.Tensor] | None = None
    modules: tuple[nn.Module, nn.Module] | None = None
    own_graph: bool = True
    notes: tuple[str, ...] = ()

    @property
    def norms(self) -> tuple[FoldedNorm, ...]:
        """The batch norms that are back."""
        return self.record.norms

    def verify(
        self,
        inputs: Mapping[str, np.ndarray] | None = None,
        *,
        runtimes: Sequence[str | Runtime] = (DEFAULT,),
        seed: int = 0,
    ) -> VerifyReport:
        """The gates of the fold that was undone, on both models as they are now; `bnfold.verify`.

        Gate A is left out where the folded graph had to be exported anew. Raises UsageError for a
        module without its graph.
        """
        from bnfold.proof.verify import verify

        if self.folded is None:
            raise UsageError("To verify, unfold the module with example_inputs, to be traced.")
        return verify(
            graph.to_proto(self.graph),
            graph.to_proto(self.folded),
            gauges=self.record.gauges if self.own_graph else None,
            aliases=self.record.aliases if self.own_graph else None,
            inputs=inputs,
            runtimes=runtimes,
            seed=seed,
            torch_modules=self.modules,
        )


def unfold(
    model: nn.Module | ir.Model | onnx.ModelProto | Path | str,
    record: FoldRecord | Path | str | None = None,
    *,
    factory: str | None = None,
    example_inputs: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> UnfoldResult:
    """The network that was folded: its graph, its weights and its batch norms, bit for bit.

    model: what a fold gave, or its path; it is not changed. record: the fold record or its path;
    for a path the default is the one beside it. factory: the network of a checkpoint path.
    example_inputs: for an nn.Module or a checkpoint without a graph, to trace it for `verify`.
    Raises InputError where model and record do not belong together, or either was changed since.
    """
    tensors = _tensors(example_inputs)
    if isinstance(model, str | Path):
        path = Path(model)
        held = _held(record if record is not None else record_path(path))
        check_belongs(path, held)
        source, own = open_folded(
            path, factory=factory, shapes=[("", tuple(x.shape)) for x in tensors]
        )
        return unfold_source(source, held, own_graph=own, factory=factory)
    if record is None:
        raise UsageError("A model in memory needs the record of its fold: unfold(model, record).")
    if isinstance(model, onnx.ModelProto):
        read = graph.parse_onnx(model.SerializeToString())
        result = unfold_source(Source(Path("the model"), Kind.ONNX, read), _held(record))
        return replace(result, model=graph.to_proto(result.graph))
    if isinstance(model, ir.Model):
        read = graph.prepare(model.clone())
        return unfold_source(Source(Path("the model"), Kind.ONNX, read), _held(record))
    return _unfold_module(model, _held(record), tensors)


def check_belongs(path: Path, record: FoldRecord) -> None:
    """Raises InputError where the file is not the one that the record was written for."""
    digest = report.sha256(path)
    if digest == record.files.get("original"):
        raise InputError(f"{path} is the original of this fold: there is nothing to undo.")
    if not record.is_of(digest):
        names = ", ".join(name for name in record.files if name != "original")
        raise InputError(
            f"{path} (SHA-256 {digest[:16]}...) is not what its record was written for ({names}),"
            " or was changed since. Unfold the file that `bnfold fold` wrote, or name its --record."
        )


def open_folded(
    path: Path,
    *,
    factory: str | None = None,
    shapes: Shapes = (),
    opset: int | None = None,
    trust_pickle: bool = False,
) -> tuple[Source, bool]:
    """A folded model that was read; True if its graph is its own and not exported anew."""
    if sniff(path) is Kind.EXPORTED_PROGRAM:
        raise InputError(f"{path} is {Kind.EXPORTED_PROGRAM.label}; unfold the .onnx beside it.")
    if sniff(path) not in (Kind.CHECKPOINT, Kind.SAFETENSORS):
        return open_source(path, model=factory), True
    described = load_checkpoint(path, trust_pickle=trust_pickle).description or {}
    own = described.get("graph") is not None
    source = open_source(
        path,
        model=None if own else factory,
        input_shapes=shapes,
        opset=opset,
        trust_pickle=trust_pickle,
    )
    if own and factory is not None:
        from bnfold.folding.module import load_folded

        source = replace(source, module=load_folded(build_module(factory), path))
    return source, own


def unfold_source(
    source: Source, record: FoldRecord, *, own_graph: bool = True, factory: str | None = None
) -> UnfoldResult:
    """Unfold a source that was read; with a factory the torch module too."""
    if source.state_dict is None:
        original = original_graph(record.undo, source.graph)
        return UnfoldResult(original, original, source.graph, record, notes=source.notes)
    from bnfold.folding.torch_undo import arrays_of, tensors_of
    from bnfold.reading.plain import make_plain

    arrays, original = original_state(record.undo, arrays_of(source.state_dict))
    state = tensors_of(arrays)
    modules = None
    if source.module is not None and factory is not None:
        module = build_module(factory)
        make_plain(module)  # the record is of what was folded: computed weights are held there
        load_into(module, Checkpoint(state))
        modules = (module.eval(), source.module.eval())
    return UnfoldResult(
        model=original if modules is None else modules[0],
        graph=original,
        folded=source.graph,
        record=record,
        state_dict=state,
        modules=modules,
        own_graph=own_graph,
        notes=source.notes,
    )


def _unfold_module(
    model: object, record: FoldRecord, example: tuple[torch.Tensor, ...]
) -> UnfoldResult:
    from torch import nn

    if not isinstance(model, nn.Module):
        raise UsageError(
            "bnfold unfolds an nn.Module, an ONNX model or a path; this is a"
            f" {type(model).__name__}."
        )
    from bnfold.folding.torch_undo import arrays_of, unfold_module

    module = unfold_module(model, record.undo)
    _, original = original_state(record.undo, arrays_of(model.state_dict()))
    folded = graph.export_module(model, example) if example else None
    state, modules = module.state_dict(), (module, model)
    return UnfoldResult(module, original, folded, record, state, modules, own_graph=False)


def _held(record: FoldRecord | Path | str) -> FoldRecord:
    return record if isinstance(record, FoldRecord) else load_record(record)


def _tensors(
    example: torch.Tensor | Sequence[torch.Tensor] | None,
) -> tuple[torch.Tensor, ...]:
    if example is None:
        return ()
    import torch

    return (example,) if isinstance(example, torch.Tensor) else tuple(example)
