"""What a path becomes: a graph, and behind it a torch module or a state_dict where there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from bnfold import graph
from bnfold.errors import UsageError
from bnfold.graph import Exported
from bnfold.reading.checkpoint import Checkpoint, load_checkpoint
from bnfold.reading.factory import build_module
from bnfold.reading.sniff import Kind, sniff
from bnfold.reading.weights import check_batchnorm_statistics, load_into

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

Shapes = Sequence[tuple[str, Sequence[int]]]  # (name, or "" where it is not known; shape)


@dataclass(frozen=True)
class Source:
    """A model that was read.

    graph: its inference graph, batch norms in place. module: the torch module, in the mode in which
    it came, if there is one; `plain`: the module that was exported, which is the same or a copy
    whose computed weights are held (`reading.plain`). state_dict: the tensors by name, for every
    torch source. exported: the program behind the graph. notes: what was done on the way, a
    sentence each. computed: the layers whose weights were computed, and are held now.
    """

    path: Path
    kind: Kind
    graph: ir.Model
    module: nn.Module | None = None
    plain: nn.Module | None = None
    state_dict: Mapping[str, torch.Tensor] | None = None
    exported: Exported | None = None
    example: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()
    description: Mapping[str, Any] = field(default_factory=dict)
    computed: tuple[str, ...] = ()


def open_source(
    path: Path | str,
    *,
    model: str | None = None,
    input_shapes: Shapes | None = None,
    opset: int | None = None,
    trust_pickle: bool = False,
    freeze_inputs: bool = False,
) -> Source:
    """Read a model file of any kind; the kind is told by its content.

    model: the factory of a checkpoint's network ("pkg.mod:factory", "path.py:factory").
    opset: of an export; None: 20, or what the file carries.
    input_shapes: (name or "", shape) of each argument of forward; needed for torch modules.
    freeze_inputs: treat initializers that a caller could override as constants.
    Raises InputError, UnsafeInputError, UsageError: a sentence about the file and what to do.
    """
    path = Path(path)
    kind = sniff(path)
    if kind in (Kind.ONNX, Kind.EXPORTED_PROGRAM) and model is not None:
        raise UsageError(f"{path} is {kind.label}, which needs no factory: leave --model out.")
    if kind is Kind.ONNX:
        read = graph.read_onnx(path)
        return Source(path, kind, graph.freeze_inputs(read) if freeze_inputs else read)
    if kind is Kind.EXPORTED_PROGRAM:
        from bnfold.reading.exported import load_exported_program

        return source_of_program(load_exported_program(path), path, opset)
    return _open_checkpoint(path, kind, model, input_shapes or (), opset, trust_pickle)


def _open_checkpoint(
    path: Path,
    kind: Kind,
    model: str | None,
    shapes: Shapes,
    opset: int | None,
    trust_pickle: bool,
) -> Source:
    checkpoint = load_checkpoint(path, trust_pickle=trust_pickle)
    described = checkpoint.description or {}
    carried = described.get("graph")
    if model is None and checkpoint.module is None and carried is not None:
        attached = graph.attach_weights(bytes(carried.numpy().tobytes()), checkpoint.state_dict)
        found = attached.opset_imports.get("")
        if opset not in (None, found):
            raise UsageError(
                f"{path} carries a graph of opset {found}; for opset {opset} pass --model."
            )
        return Source(
            path,
            kind,
            attached,
            state_dict=checkpoint.state_dict,
            notes=(*checkpoint.notes, "the graph that the checkpoint carries was used"),
            description=described,
        )
    module, notes = network_of(path, checkpoint, model)
    shapes = shapes or list((described.get("input") or {}).items())
    example = example_inputs(path, shapes)
    if checkpoint.module is not None and any(child.training for child in module.modules()):
        notes = (*notes, "the model was in training mode; it is folded as it runs in eval mode")
    source = source_of_module(module, example, path, opset, names=_names(shapes))
    return replace(source, kind=kind, notes=(*notes, *source.notes), description=described)


def source_of_module(
    module: nn.Module,
    example: Sequence[Any],
    path: Path,
    opset: int | None = None,
    *,
    names: Sequence[str] | None = None,
) -> Source:
    """A torch module as a source: exported, after it was made plain where it was not.

    Raises InputError where its statistics are impossible, or torch cannot export it.
    """
    from bnfold.reading.plain import computed_layers, plain

    check_batchnorm_statistics(module)
    exported_from, notes = plain(module)
    exported = graph.trace_module(
        exported_from, example, opset=opset or graph.DEFAULT_OPSET, input_names=names
    )
    return Source(
        path,
        Kind.CHECKPOINT,
        exported.model,
        module,
        exported_from,
        exported_from.state_dict(),
        exported,
        tuple(example),
        notes,
        computed=computed_layers(module),
    )


def source_of_program(program: ExportedProgram, path: Path, opset: int | None = None) -> Source:
    """An exported program as a source. Raises InputError where torch cannot convert it."""
    exported = graph.trace_program(program, opset=opset or graph.DEFAULT_OPSET)
    return Source(path, Kind.EXPORTED_PROGRAM, exported.model, exported=exported)


def network_of(
    path: Path, checkpoint: Checkpoint, model: str | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """The torch module of a checkpoint, its weights loaded, and notes on how.

    Raises UsageError where nothing says which network it is, InputError where the weights do not
    fit or hold statistics that no network can run with.
    """
    notes = checkpoint.notes
    if model is not None:
        module = build_module(model)
        if (checkpoint.description or {}).get("kind") == "fold":
            from bnfold.folding.module import take_shape_of

            take_shape_of(module, checkpoint)
        notes = (*notes, *load_into(module, checkpoint))
    elif checkpoint.module is not None:
        module = checkpoint.module
    else:
        spec = (checkpoint.description or {}).get("model")
        hint = f" It was made from {spec}: pass --model {spec} to run that file." if spec else ""
        raise UsageError(
            f"{path} holds weights alone ({len(checkpoint.state_dict)} tensors). Say which network"
            f" they belong to: --model pkg.mod:factory or --model path/to/file.py:factory.{hint}"
        )
    check_batchnorm_statistics(module)
    return module, notes


def example_inputs(path: Path, shapes: Shapes) -> tuple[torch.Tensor, ...]:
    """One seeded random tensor per input. Raises UsageError without shapes."""
    import torch

    if not shapes:
        raise UsageError(
            f"{path} does not say what its input looks like: pass --input-shape, for example"
            " --input-shape 1,3,224,224."
        )
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(tuple(shape), generator=generator) for _, shape in shapes)


def _names(shapes: Shapes) -> list[str] | None:
    names = [name for name, _ in shapes]
    return names if all(names) else None
