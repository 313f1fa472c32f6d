"""Other statistics into a network that is folded already, through its fold record.

The record gives the original back bit for bit; the statistics are written into its batch norms; it
is folded again with the choices of the first fold. So what comes out is what adapting first and
folding then gives, every bit of it, and no original is needed.

    result = refold("net.folded.onnx", None, statistics)
    result.verify().raise_for_failure()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from bnfold import graph
from bnfold.api import DEAD_CHANNELS, FoldResult, result_of
from bnfold.errors import InputError
from bnfold.folding.apply import Folded, apply
from bnfold.folding.chains import CHAINS
from bnfold.folding.dead import without_dead_channels
from bnfold.folding.plan import FoldPlan, plan
from bnfold.folding.record import Choices, FoldRecord
from bnfold.folding.scope import Scope
from bnfold.folding.selection import Selection
from bnfold.measuring.norms import norms_of, with_statistics
from bnfold.measuring.statistics import Statistics
from bnfold.reading.sniff import Kind
from bnfold.reading.source import Source
from bnfold.unfolding import UnfoldResult, unfold

if TYPE_CHECKING:
    import torch
    from torch import nn


def refold(
    folded: nn.Module | ir.Model | onnx.ModelProto | Path | str,
    record: FoldRecord | Path | str | None,
    statistics: Mapping[str, Statistics],
    *,
    factory: str | None = None,
) -> FoldResult:
    """The fold of the same network with other statistics.

    folded, record, factory: as for `bnfold.unfold`; a path's record is the one beside it, if None.
    statistics: by the batch norms' names; those that are not named keep theirs.
    The batch norms that were folded fold again, none of the others does; where a statistic stands
    in the way of one (a border that would need a repair, a number its type cannot hold) it stays,
    and a note says so. `FoldResult.original` is the adapted network as it was before its fold.
    Raises InputError as `bnfold.unfold`, and for statistics that no batch norm can have.
    """
    return fold_again(unfold(folded, record, factory=factory), statistics)


def fold_again(back: UnfoldResult, statistics: Mapping[str, Statistics]) -> FoldResult:
    """`refold` of what was unfolded already; `back` is not changed."""
    adapted = graph_with(back.graph, statistics)
    chosen, choices = planned(adapted, back.record)
    folded = applied(chosen, choices)
    name = Path("the folded model")
    if back.state_dict is None:
        as_proto = isinstance(back.model, onnx.ModelProto)
        model: Any = graph.to_proto(folded.model) if as_proto else folded.model
        made = result_of(Source(name, Kind.ONNX, adapted), chosen, folded, model)
    else:
        made = _torch_result(back, adapted, statistics, chosen, folded)
    notes = (*back.notes, *_lost(back.record, chosen))
    return replace(made, choices=choices, notes=notes)


def graph_with(model: ir.Model, statistics: Mapping[str, Statistics]) -> ir.Model:
    """A copy of a graph with other statistics. Raises InputError where they do not fit it."""
    found = norms_of(model)
    for name, new in statistics.items():
        if name not in found:
            raise InputError(
                f"The network has no batch norm '{name}' whose statistics could change; it has"
                f" {', '.join(list(found)[:4]) or 'none'}{', ...' if len(found) > 4 else ''}."
            )
        count, layer = found[name].layer.num_features, found[name].layer
        if new.mean.shape != (count,) or new.var.shape != (count,):
            raise InputError(
                f"'{name}' has {count} channels; the statistics are of {new.mean.size} and"
                f" {new.var.size}."
            )
        if not (np.isfinite(new.mean).all() and np.all(new.var + layer.eps > 0)):
            raise InputError(f"The statistics of '{name}' hold NaN, or a variance below 0.")
    return with_statistics(model, statistics)


def planned(model: ir.Model, record: FoldRecord) -> tuple[FoldPlan, Choices]:
    """The plan of the same fold for a network with other statistics, and what it was asked for."""
    choices = record.choices or _choices_of(record)

    def plan_of(selection: Selection) -> FoldPlan:
        return plan(
            model,
            choices.scope,
            repairs=frozenset(choices.repairs),
            selection=selection,
            clean_up=frozenset(choices.clean_up) & CHAINS.keys(),
        )

    chosen = plan_of(Selection(choices.keep, choices.only))
    if _outputs(chosen) <= {norm.output for norm in record.norms}:
        return chosen, choices
    # what stayed would go now, as a channel that has become a constant can let it
    names = tuple(dict.fromkeys(norm.name for norm in record.norms))
    return plan_of(Selection(only=names) if names else Selection(keep=("*",))), choices


def applied(chosen: FoldPlan, choices: Choices) -> Folded:
    """The folded model of a plan, cleaned up as was asked."""
    folded = apply(chosen)
    return without_dead_channels(folded) if DEAD_CHANNELS in choices.clean_up else folded


def _choices_of(record: FoldRecord) -> Choices:
    """The choices behind a record that does not say: a torch source's class, else none."""
    undo = record.undo
    only = tuple(dict.fromkeys(norm.name for norm in record.norms))
    scope = None
    if undo.names:
        scope = Scope(frozenset(undo.names), frozenset(undo.layers), frozenset(undo.norms))
    return Choices(only=only, scope=scope)


def _outputs(chosen: FoldPlan) -> set[str]:
    return {str(removed.node.outputs[0].name) for removed in chosen.removed}


def _lost(record: FoldRecord, chosen: FoldPlan) -> tuple[str, ...]:
    """A note where fewer batch norms fold than did."""
    was = {norm.output for norm in record.norms}
    stay = [kept for kept in chosen.kept if str(kept.node.outputs[0].name) in was]
    if not stay:
        return ()
    return (
        f"{len(stay)} of the {len(was)} batch norms that were folded stay with these statistics;"
        f" the first is '{stay[0].name}': {stay[0].reason}.",
    )


# --- torch ----------------------------------------------------------------------------------------


def _torch_result(
    back: UnfoldResult,
    adapted: ir.Model,
    statistics: Mapping[str, Statistics],
    chosen: FoldPlan,
    folded: Folded,
) -> FoldResult:
    """The fold as tensors by name, and as a module of the same class where there is one."""
    from bnfold.folding.module import folded_state, write_back
    from bnfold.reading.plain import copy_of

    undo = back.record.undo
    about = {"plain": {"layers": undo.layers, "norms": undo.norms}, "built": undo.built}
    assert back.state_dict is not None
    state = state_with(back.state_dict, statistics)
    source = Source(
        Path("the folded model"), Kind.CHECKPOINT, adapted, state_dict=state, description=about
    )
    if back.modules is None:
        new = folded_state(state, chosen, folded)
        return replace(result_of(source, chosen, folded, folded.model), state_dict=new)
    original = copy_of(back.modules[0])
    set_statistics(original, statistics)
    module = write_back(original, chosen, folded)
    source = replace(source, module=original, plain=original, state_dict=original.state_dict())
    return replace(
        result_of(source, chosen, folded, module),
        state_dict=module.state_dict(),
        modules=(original.eval(), module.eval()),
    )


def state_with(
    state: Mapping[str, torch.Tensor], statistics: Mapping[str, Statistics]
) -> dict[str, torch.Tensor]:
    """A state_dict with other statistics, in the types it holds them in. Raises InputError."""
    return {**state, **_buffers(state, statistics)}


def set_statistics(module: nn.Module, statistics: Mapping[str, Statistics]) -> None:
    """Write statistics into a module's own buffers. Raises InputError before it writes any."""
    own = dict(module.named_buffers())
    for name, tensor in _buffers(own, statistics).items():
        own[name].copy_(tensor)


def _buffers(
    state: Mapping[str, torch.Tensor], statistics: Mapping[str, Statistics]
) -> dict[str, torch.Tensor]:
    import torch

    found = {}
    for layer, new in statistics.items():
        for name, array in (("running_mean", new.mean), ("running_var", new.var)):
            buffer = state.get(f"{layer}.{name}")
            if buffer is None or tuple(buffer.shape) != np.shape(array):
                there = "none" if buffer is None else f"one of shape {tuple(buffer.shape)}"
                raise InputError(
                    f"The statistics of '{layer}' have {np.size(array)} channels; the network has"
                    f" {there} of that name."
                )
            tensor = torch.from_numpy(np.array(array, np.float64)).to(buffer.dtype)
            if not torch.isfinite(tensor).all():
                raise InputError(
                    f"A statistic of '{layer}' reaches {np.abs(array).max():.3g}, which"
                    f" {buffer.dtype} cannot hold; convert the network to float32 first."
                )
            found[f"{layer}.{name}"] = tensor.to(buffer.device)
    return found
