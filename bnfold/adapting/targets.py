"""What is adapted: whatever comes in as a network to measure, and how its result goes back.

A folded model is unfolded by its record, measured as the network it was, and folded again. A
network that has neither batch norms nor a record gets idle ones, where source samples are at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from bnfold import graph
from bnfold.adapting.networks import LayerChoice, Network
from bnfold.adapting.statistics import Statistics
from bnfold.errors import InputError, UsageError
from bnfold.outputs import record_path
from bnfold.reading.sniff import Kind, sniff
from bnfold.reading.source import Source

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bnfold.adapting.feed import Forward
    from bnfold.api import FoldResult
    from bnfold.folding.record import FoldRecord
    from bnfold.unfolding import UnfoldResult


@dataclass(frozen=True)
class Adapted:
    """What goes back.

    model: of the type that came in. graph: the adapted ONNX graph, where it was measured or folded
    as one. state_dict: of a checkpoint, the tensors. fold: where the target is folded, its fold.
    """

    model: Any
    graph: ir.Model | None = None
    state_dict: Mapping[str, torch.Tensor] | None = None
    fold: FoldResult | None = None


@dataclass(frozen=True)
class Target:
    """A network to measure, and what becomes of its statistics.

    source: the graph that was read, of a path that holds one. description: what a checkpoint says
    of itself. formats: suffixes of the files that can hold the result. notes: what was done to read
    it. warnings: what the result is not, a sentence each.
    """

    network: Network
    finish: Callable[[Mapping[str, Statistics]], Adapted]
    source: Source | None = None
    description: Mapping[str, Any] = field(default_factory=dict)
    formats: tuple[str, ...] = (".onnx",)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """What says how a target is opened: see `bnfold.adapt`. matched: source samples are at hand."""

    matched: bool = False
    choice: LayerChoice = None
    forward: Forward | None = None
    device: str | torch.device | None = None
    provider: str = "cpu"
    factory: str | None = None
    shapes: Any = ()
    opset: int | None = None
    trust_pickle: bool = False
    freeze_inputs: bool = False


_TORCH = (".onnx", ".pt", ".pth")
_APPROXIMATE = (
    "The network has no batch norms and no fold record: the outputs of its {count} linear layers"
    " were brought to the moments that they had on the source samples, which is an approximation of"
    " what its own batch norms would have done."
)
_NO_NORMS = (
    "{what} holds no batch norm. A folded model is adapted with its fold record (--record), any"
    " network with samples of its source domain besides (--source-data), as an approximation."
)


def target_of(
    model: nn.Module | ir.Model | onnx.ModelProto | Path | str,
    options: Options,
    record: FoldRecord | Path | str | None = None,
) -> Target:
    """The target that `model` is. Raises InputError, UsageError for what cannot be adapted."""
    if isinstance(model, str | Path):
        return _of_path(Path(model), options, record)
    if isinstance(model, onnx.ModelProto):
        target = target_of(graph.parse_onnx(model.SerializeToString()), options, record)
        return replace(target, finish=lambda found: _as_proto(target.finish(found)))
    if record is not None:
        from bnfold.unfolding import unfold

        return _folded(unfold(model, record), options)
    if isinstance(model, ir.Model):
        return _of_graph(graph.prepare(model.clone()), options, "The model")
    from torch import nn

    if not isinstance(model, nn.Module):
        raise UsageError(
            "bnfold adapts an nn.Module, an ONNX model or a path; this is a"
            f" {type(model).__name__}."
        )
    return _of_module(model, options)


def _as_proto(adapted: Adapted) -> Adapted:
    return replace(adapted, model=graph.to_proto(adapted.model))


def _of_path(path: Path, options: Options, record: FoldRecord | Path | str | None) -> Target:
    kind = sniff(path)
    if kind is Kind.EXPORTED_PROGRAM:
        raise InputError(
            f"{path} is {kind.label}; adapt the checkpoint or the ONNX model that it was made from."
        )
    if kind is Kind.ONNX and options.factory is not None:
        raise UsageError(f"{path} is {kind.label}, which needs no factory: leave --model out.")
    held = _record_of(path, record)
    if held is not None:
        from bnfold.unfolding import open_folded, unfold_source

        source, own = open_folded(
            path,
            factory=options.factory,
            shapes=options.shapes,
            opset=options.opset,
            trust_pickle=options.trust_pickle,
        )
        back = unfold_source(source, held, own_graph=own, factory=options.factory)
        return replace(_folded(back, options), source=source, notes=source.notes)
    if kind is Kind.ONNX:
        read = graph.read_onnx(path)
        read = graph.freeze_inputs(read) if options.freeze_inputs else read
        return replace(_of_graph(read, options, str(path)), source=Source(path, kind, read))
    return _of_checkpoint(path, options)


def _record_of(path: Path, given: FoldRecord | Path | str | None) -> FoldRecord | None:
    """The record that was given, or the one beside a file that it was written for."""
    from bnfold import report
    from bnfold.folding.record import FoldRecord, load_record
    from bnfold.unfolding import check_belongs

    if given is None:
        beside = record_path(path)
        if not beside.is_file():
            return None
        found = load_record(beside)
        return found if found.is_of(report.sha256(path)) else None
    found = given if isinstance(given, FoldRecord) else load_record(given)
    check_belongs(path, found)
    return found


def _of_checkpoint(path: Path, options: Options) -> Target:
    """A checkpoint with its factory, one that is a module, or one that carries its graph."""
    from bnfold.reading.checkpoint import load_checkpoint
    from bnfold.reading.source import network_of, open_source

    checkpoint = load_checkpoint(path, trust_pickle=options.trust_pickle)
    carried = (checkpoint.description or {}).get("graph") is not None
    if options.factory is None and checkpoint.module is None and carried:
        source = open_source(path, opset=options.opset)
        target = _of_graph(source.graph, options, str(path))
        assert source.state_dict is not None
        state = source.state_dict

        def finish(found: Mapping[str, Statistics]) -> Adapted:
            from bnfold.adapting.folded import state_with

            return replace(target.finish(found), state_dict=state_with(state, found))

        described = source.description
        return replace(
            target,
            finish=finish,
            source=source,
            description=described,
            formats=_TORCH,
            notes=source.notes,
        )
    module, notes = network_of(path, checkpoint, options.factory)
    described = checkpoint.description or {}
    return replace(_of_module(module.eval(), options), description=described, notes=notes)


def _of_module(module: nn.Module, options: Options) -> Target:
    from bnfold.adapting.module_network import ModuleNetwork

    network = ModuleNetwork(
        module, choice=options.choice, forward=options.forward, device=options.device
    )
    return Target(network, lambda found: Adapted(network.result(found)), formats=_TORCH)


def _of_graph(model: ir.Model, options: Options, what: str) -> Target:
    from bnfold.adapting.graph_network import GraphNetwork, RecoveredNetwork

    _check_graph_options(options)
    if any(graph.is_batch_norm(node) for part in model.graphs() for node in part):
        network = GraphNetwork(model, choice=options.choice, provider=options.provider)

        def finish(found: Mapping[str, Statistics]) -> Adapted:
            adapted = network.result(found)
            return Adapted(adapted, adapted)

        return Target(network, finish)
    if not options.matched:
        raise InputError(_NO_NORMS.format(what=what))
    recovered = RecoveredNetwork(model, choice=options.choice, provider=options.provider)
    said = _APPROXIMATE.format(count=len(recovered.layers))
    return Target(recovered, lambda found: _plain_again(recovered.result(found)), warnings=(said,))


def _plain_again(adapted: ir.Model) -> Adapted:
    """The idle batch norms, which now do something, folded away."""
    from bnfold.api import fold

    done = fold(adapted)
    return Adapted(done.model, done.graph, fold=done)


def _check_graph_options(options: Options) -> None:
    if options.forward is not None:
        raise UsageError("forward is of a torch module; an ONNX model takes its inputs by name.")
    if options.device is not None:
        raise UsageError("device is of a torch module; for an ONNX model give provider.")


def _folded(back: UnfoldResult, options: Options) -> Target:
    """A model that was unfolded: measured as it was, and folded again."""
    from bnfold.adapting.folded import fold_again

    if back.modules is not None:
        target = _of_module(back.modules[0].eval(), options)
    else:
        target = _of_graph(back.graph, options, "The unfolded model")

    def finish(found: Mapping[str, Statistics]) -> Adapted:
        done = fold_again(back, found)
        return Adapted(done.model, done.graph, done.state_dict, done)

    formats = (".onnx",) if back.state_dict is None else (*_TORCH, ".safetensors")
    return replace(target, finish=finish, formats=formats)
