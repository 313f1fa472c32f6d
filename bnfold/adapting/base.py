"""The network that gets other statistics, in whichever form it is at hand.

An ONNX file or graph, a torch checkpoint or module, or one of these folded, with its fold record.
Which network it is, is told by SHA-256 sums: of its files, and over its weights (`undo.digest_of`),
so that a pack for the original is one for what was folded of it, and the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from bnfold import bare, graph, report
from bnfold.adapting.folded import fold_again, graph_with, set_statistics, state_with
from bnfold.api import FoldResult
from bnfold.errors import InputError, UsageError
from bnfold.folding.record import FoldRecord, load_record
from bnfold.folding.told import AnyArray
from bnfold.folding.undo import digest_of
from bnfold.measuring.norms import norms_of
from bnfold.measuring.statistics import Statistics
from bnfold.outputs import record_path
from bnfold.reading.sniff import Kind, sniff
from bnfold.reading.source import Shapes
from bnfold.unfolding import (
    UnfoldResult,
    check_belongs,
    open_folded,
    unfold,
    unfold_source,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

# the entries of `Base.digests` that are no files
GRAPH, STATE = "weights of the graph", "state_dict"


@dataclass(frozen=True, eq=False)
class Held:
    """The statistics of a batch norm as a network holds them, in its types.

    eps: None where only tensors are at hand. stands: the names of the two tensors.
    """

    eps: float | None
    mean: AnyArray
    var: AnyArray
    stands: tuple[str, str]


@dataclass(frozen=True)
class Base:
    """A network, unfolded.

    label: how to name it. files: SHA-256 sums by name. graph, state_dict, module: as far as they
    are at hand. back: how it was unfolded, where it came folded. description: what a checkpoint
    says of itself. notes: what was done to read it.
    """

    label: str
    files: Mapping[str, str]
    graph: ir.Model | None = field(default=None, repr=False)
    state_dict: Mapping[str, torch.Tensor] | None = field(default=None, repr=False)
    module: nn.Module | None = field(default=None, repr=False)
    back: UnfoldResult | None = field(default=None, repr=False)
    as_proto: bool = False
    description: Mapping[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def formats(self) -> tuple[str, ...]:
        """The suffixes of files that can hold it with other statistics."""
        if self.state_dict is None:
            return (".onnx",)
        return (".onnx", ".pt", ".pth", ".safetensors")

    @cached_property
    def digests(self) -> dict[str, str]:
        """Which network it is: the sums of its files, and those over its weights."""
        found = dict(self.files)
        if self.back is not None:  # the record knows them
            undo = self.back.record.undo
            named = {GRAPH: undo.digests.get("graph"), STATE: undo.digests.get("state")}
            return found | {name: digest for name, digest in named.items() if digest}
        if self.graph is not None:
            found[GRAPH] = digest_of(bare.take_out(self.graph)[1])
        if self.state_dict is not None:
            found[STATE] = digest_of(self.weights())
        return found

    def is_one_of(self, digests: Mapping[str, str]) -> bool:
        """True if a file or the weights of this network have one of these sums."""
        return not set(self.digests.values()).isdisjoint(digests.values())

    @cached_property
    def layers(self) -> dict[str, Held]:
        """Its batch norms with statistics that can change, by name."""
        if self.graph is not None:
            return {
                name: Held(
                    norm.layer.eps,
                    norm.layer.source.mean.astype(_type_of(norm.mean.tensor)),
                    norm.layer.source.var.astype(_type_of(norm.var.tensor)),
                    (str(norm.mean.root.name), str(norm.var.root.name)),
                )
                for name, norm in norms_of(self.graph).items()
            }
        tensors = self.weights()
        names = [n.removesuffix(".running_mean") for n in tensors if n.endswith(".running_mean")]
        stands = {name: (f"{name}.running_mean", f"{name}.running_var") for name in names}
        return {
            name: Held(self._eps_of(name), tensors[mean], tensors[var], (mean, var))
            for name, (mean, var) in stands.items()
            if var in tensors
        }

    def _eps_of(self, name: str) -> float | None:
        layer = dict(self.module.named_modules()).get(name) if self.module is not None else None
        eps = getattr(layer, "eps", None)
        return float(np.float32(eps)) if isinstance(eps, float) else None

    def weights(self) -> dict[str, AnyArray]:
        """All its tensors by name."""
        if self.state_dict is None:
            return bare.weights_of(self.graph) if self.graph is not None else {}
        from bnfold.folding.torch_undo import arrays_of

        return arrays_of(self.state_dict)

    def adapted(self, statistics: Mapping[str, Statistics]) -> Adapted:
        """The network with other statistics, folded again if it came folded; it does not change.

        Raises InputError where they do not fit it.
        """
        if self.back is not None:
            made = fold_again(self.back, statistics)
            return Adapted(made.model, made.original, made.state_dict, made)
        model = graph_with(self.graph, statistics) if self.graph is not None else None
        if self.state_dict is None:
            assert model is not None
            return Adapted(graph.to_proto(model) if self.as_proto else model, model)
        state = state_with(self.state_dict, statistics)
        if self.module is None:
            return Adapted(state if model is None else model, model, state)
        from bnfold.reading.plain import copy_of

        module = copy_of(self.module)
        set_statistics(module, statistics)
        return Adapted(module, model, state)


@dataclass(frozen=True)
class Adapted:
    """A network with other statistics.

    model: of the type that came in (a path gives the module of a checkpoint with a factory, else
    the graph that it holds or carries, else the tensors by name). graph: unfolded. state_dict: for
    torch, folded where the network came folded. fold: the fold, where it did.
    """

    model: Any
    graph: ir.Model | None
    state_dict: Mapping[str, torch.Tensor] | None = None
    fold: FoldResult | None = None


@dataclass(frozen=True)
class Reading:
    """How a file is read: see `reading.source.open_source`."""

    factory: str | None = None
    shapes: Shapes = ()
    opset: int | None = None
    trust_pickle: bool = False
    freeze_inputs: bool = False


def open_base(
    model: nn.Module | ir.Model | onnx.ModelProto | Path | str,
    record: FoldRecord | Path | str | None = None,
    reading: Reading | None = None,
) -> Base:
    """A network of any kind; nothing is run.

    record: of one that is folded; for a path the default is the one beside it, if it is of that
    file. Raises InputError for what cannot be read, or a record that is another file's.
    """
    reading = reading or Reading()
    if isinstance(model, str | Path):
        path = Path(model)
        held = _record_of(path, record)
        return _open_folded(path, held, reading) if held is not None else _open_file(path, reading)
    label = f"the {type(model).__name__}"
    if record is not None:
        held = record if isinstance(record, FoldRecord) else load_record(record)
        return _unfolded(label, unfold(model, held), held.files)
    if isinstance(model, onnx.ModelProto):
        return Base(label, {}, graph.parse_onnx(model.SerializeToString()), as_proto=True)
    if isinstance(model, ir.Model):
        return Base(label, {}, graph.prepare(model.clone()))
    from torch import nn

    if not isinstance(model, nn.Module):
        raise UsageError(
            "Statistics belong to an nn.Module, an ONNX model or a path; this is a"
            f" {type(model).__name__}."
        )
    return Base(label, {}, state_dict=model.state_dict(), module=model)


def _record_of(path: Path, record: FoldRecord | Path | str | None) -> FoldRecord | None:
    """The record of a folded file; None for one that is not folded, as far as is known."""
    if isinstance(record, FoldRecord):
        return record
    if record is not None:
        return load_record(record)
    beside = record_path(path)
    if not path.is_file() or not beside.is_file():
        return None
    held, digest = load_record(beside), report.sha256(path)
    return held if digest in held.files.values() and digest != held.files.get("original") else None


def _open_folded(path: Path, record: FoldRecord, reading: Reading) -> Base:
    check_belongs(path, record)
    source, own = open_folded(
        path,
        factory=reading.factory,
        shapes=reading.shapes,
        opset=reading.opset,
        trust_pickle=reading.trust_pickle,
    )
    back = unfold_source(source, record, own_graph=own, factory=reading.factory)
    found = _unfolded(str(path), back, {**record.files, path.name: report.sha256(path)})
    return replace(found, description=source.description, notes=source.notes)


def _unfolded(label: str, back: UnfoldResult, files: Mapping[str, str]) -> Base:
    module = back.modules[0] if back.modules is not None else None
    return Base(label, files, back.graph, back.state_dict, module, back)


def _open_file(path: Path, reading: Reading) -> Base:
    kind = sniff(path)
    files = {path.name: report.sha256(path)}
    if kind is Kind.EXPORTED_PROGRAM:
        raise InputError(f"{path} is {kind.label}; take the checkpoint or the .onnx beside it.")
    if kind is Kind.ONNX:
        if reading.factory is not None:
            raise UsageError(f"{path} is {kind.label}, which needs no factory: leave --model out.")
        read = graph.read_onnx(path)
        return Base(str(path), files, graph.freeze_inputs(read) if reading.freeze_inputs else read)
    from bnfold.reading.checkpoint import load_checkpoint
    from bnfold.reading.source import network_of

    checkpoint = load_checkpoint(path, trust_pickle=reading.trust_pickle)
    described, notes = checkpoint.description or {}, checkpoint.notes
    module, state = checkpoint.module, checkpoint.state_dict
    if reading.factory is not None or module is not None:
        module, notes = network_of(path, checkpoint, reading.factory)
        state = module.eval().state_dict()
    carried, model = described.get("graph"), None
    if carried is not None and reading.factory is None:
        model = graph.attach_weights(bytes(carried.numpy().tobytes()), checkpoint.state_dict)
    return Base(str(path), files, model, state, module, description=described, notes=notes)


def _type_of(tensor: ir.TensorProtocol | None) -> np.dtype[Any]:
    assert tensor is not None  # a statistic that is computed is none that can change
    return np.dtype(tensor.dtype.numpy())
