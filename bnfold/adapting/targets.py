"""What is adapted: whatever comes in as a network to measure, and how its result goes back.

A folded model is unfolded by its record, measured as the network it was, and folded again. A
network that has neither batch norms nor a record gets idle ones, where source samples are at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from bnfold import graph
from bnfold.adapting.base import Adapted, Base, Reading, open_base
from bnfold.adapting.networks import LayerChoice, Network
from bnfold.errors import InputError, UsageError
from bnfold.measuring.statistics import Statistics

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bnfold.folding.record import FoldRecord
    from bnfold.measuring.feed import Forward


@dataclass(frozen=True)
class Target:
    """A network to measure, and what becomes of its statistics.

    warnings: what the result is not, a sentence each.
    """

    base: Base
    network: Network
    finish: Callable[[Mapping[str, Statistics]], Adapted]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """How a target is measured: see `bnfold.adapt`. matched: source samples are at hand."""

    matched: bool = False
    choice: LayerChoice = None
    forward: Forward | None = None
    device: str | torch.device | None = None
    provider: str = "cpu"


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
    reading: Reading | None = None,
) -> Target:
    """The target that `model` is. Raises InputError, UsageError for what cannot be adapted."""
    base = open_base(model, record, reading)
    if base.module is not None:
        return _of_module(base, base.module, options)
    if base.graph is not None:
        return _of_graph(base, base.graph, options)
    raise UsageError(
        f"{base.label} holds weights alone ({len(base.state_dict or ())} tensors). Say which"
        " network they belong to: --model pkg.mod:factory or --model path/to/file.py:factory."
    )


def _of_module(base: Base, module: nn.Module, options: Options) -> Target:
    from bnfold.adapting.module_network import ModuleNetwork

    if options.provider != "cpu" and base.back is None:
        raise UsageError("provider is of an ONNX model; for a torch network give device.")
    network = ModuleNetwork(
        module, choice=options.choice, forward=options.forward, device=options.device
    )
    if base.back is not None:
        return Target(base, network, base.adapted)

    def finish(found: Mapping[str, Statistics]) -> Adapted:
        """In the modes in which the module came."""
        result = network.result(found)
        held = base.adapted(found).graph if base.graph is not None else None
        return Adapted(result, held, result.state_dict())

    return Target(base, network, finish)


def _of_graph(base: Base, model: ir.Model, options: Options) -> Target:
    from bnfold.adapting.graph_network import GraphNetwork, RecoveredNetwork

    if options.forward is not None:
        raise UsageError("forward is of a torch module; an ONNX model takes its inputs by name.")
    if options.device is not None:
        raise UsageError("device is of a torch module; for an ONNX model give provider.")
    if any(graph.is_batch_norm(node) for part in model.graphs() for node in part):
        network = GraphNetwork(model, choice=options.choice, provider=options.provider)
        return Target(base, network, base.adapted)
    if not options.matched:
        raise InputError(_NO_NORMS.format(what=base.label))
    recovered = RecoveredNetwork(model, choice=options.choice, provider=options.provider)

    def finish(found: Mapping[str, Statistics]) -> Adapted:
        """The idle batch norms, which now do something, folded away."""
        from bnfold.api import fold

        adapted = recovered.result(found)
        done = fold(adapted)
        given = graph.to_proto(done.model) if base.as_proto else done.model
        return Adapted(given, adapted, fold=done)

    # what a checkpoint holds by name is not what comes back
    said = _APPROXIMATE.format(count=len(recovered.layers))
    return Target(replace(base, state_dict=None), recovered, finish, (said,))
