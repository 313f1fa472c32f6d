"""Where the fold of a torch network goes: into its own class, else into a graph module.

The class is asked first: same class in, same class out. A graph module takes more (a functional
batch norm, one that is called twice, a tied weight that would need two values); it is the answer
where it takes more, and where nothing of the user's own code would be lost with the class.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as tree

from bnfold.errors import InputError, UsageError, one_line
from bnfold.folding.apply import Folded, apply
from bnfold.folding.module import (
    folded_state,
    hooked_parts,
    scope_of,
    scope_of_names,
    write_back,
)
from bnfold.folding.plan import FoldPlan, plan
from bnfold.folding.program import FoldedGraph, fold_program, scope_of_program
from bnfold.folding.scope import Scope
from bnfold.folding.selection import Selection
from bnfold.parts import parts
from bnfold.reading.source import Source

Way = Literal["auto", "class", "graph"]


@dataclass(frozen=True)
class TorchFold:
    """A fold, and what it is in torch.

    module: the folded module, of its own class or a graph module; None where only tensors are at
    hand. compared: the original and the folded module as the proof runs them. program: of a graph
    module. notes: why it is what it is, a sentence each.
    """

    plan: FoldPlan
    folded: Folded
    module: nn.Module | None = None
    compared: tuple[nn.Module, nn.Module] | None = None
    program: ExportedProgram | None = None
    state_dict: Mapping[str, torch.Tensor] | None = None
    notes: tuple[str, ...] = ()


def fold_torch(
    source: Source,
    way: Way = "auto",
    selection: Selection | None = None,
    repairs: Collection[str] = (),
) -> TorchFold:
    """Fold a torch source the way that is asked for, or the one that takes most.

    repairs: the exact repairs that a graph module may use; a class holds none that is asked for.

    Raises UsageError for a way that the source does not have or a selection that matches nothing,
    InputError where torch cannot hold the fold.
    """
    if way not in ("auto", "class", "graph"):
        raise UsageError(f"writeback is {way!r}; it is 'auto', 'class' or 'graph'.")
    return _Task(source, way, selection, frozenset(repairs)).done()


def class_scope(source: Source) -> Scope:
    """What a fold may change where a source goes back into its own class or its state_dict."""
    if source.plain is not None:
        return scope_of(source.plain, source.graph)
    assert source.state_dict is not None
    return scope_of_names(source.state_dict, source.description.get("plain") or {})


@dataclass(frozen=True)
class _Task:
    """A torch source to fold, and what the user wants of it."""

    source: Source
    way: Way
    selection: Selection | None
    repairs: frozenset[str] = frozenset()

    def done(self) -> TorchFold:
        source = self.source
        if self.way == "graph" or (source.module is None and source.exported is not None):
            return self.into_graph(self.for_graph(), ())
        chosen = self.planned(class_scope(source))
        if source.exported is None or not chosen.restricted:
            return self.into_class(chosen, chosen)
        better = self.for_graph()
        assert source.plain is not None
        stays = self.way == "class" or hooked_parts(source.plain)
        if stays or _taken_out(better) <= _taken_out(chosen):
            return self.into_class(chosen, better)
        return self.into_graph(better, _why_not_class(source, chosen, better))

    def planned(self, scope: Scope | None) -> FoldPlan:
        return plan(self.source.graph, scope, selection=self.selection)

    def for_graph(self) -> FoldPlan:
        if self.source.exported is None:
            raise UsageError(
                f"{self.source.path} carries an ONNX graph and weights, from which no graph module"
                " can be made; name its network with --model."
            )
        scope = scope_of_program(self.source.exported)
        return plan(self.source.graph, scope, selection=self.selection, repairs=self.repairs)

    def into_class(self, chosen: FoldPlan, better: FoldPlan) -> TorchFold:
        source, folded = self.source, apply(chosen)
        notes = _beyond_class(source, chosen, better) or self.beyond_torch(chosen)
        if source.plain is None:
            assert source.state_dict is not None
            state = folded_state(source.state_dict, chosen, folded)
            return TorchFold(chosen, folded, state_dict=state, notes=notes)
        try:
            module = write_back(source.plain, chosen, folded)
        except InputError as why:
            if self.way == "class" or source.exported is None:
                raise
            return self.into_graph(self.for_graph(), (str(why),))
        assert source.module is not None
        fault = _fault_of(module, source)
        if fault is not None:
            if self.way == "class" or source.exported is None:
                raise InputError(f"{fault} Ask for a graph module, or for ONNX alone.")
            return self.into_graph(self.for_graph(), (fault,))
        compared = (_on_tensors(source.module, source), _on_tensors(module, source))
        return TorchFold(chosen, folded, module, compared, None, module.state_dict(), notes)

    def into_graph(self, chosen: FoldPlan, why: Sequence[str]) -> TorchFold:
        source, folded = self.source, apply(chosen)
        assert source.exported is not None
        try:
            program = fold_program(source.exported.program, chosen)
        except InputError as error:
            if self.way != "auto":
                raise
            return self.onnx_alone(str(error))
        module = FoldedGraph(program)
        if source.module is not None:
            compared = (_on_tensors(source.module, source), _on_tensors(module, source))
        else:  # the proof draws sizes where the ONNX graph leaves them open
            before, after = source.exported.program, program
            compared = (FoldedGraph(before, guarded=False), FoldedGraph(after, guarded=False))
        notes = (*why, *self.beyond_torch(chosen), *_hooks_left_out(source), *_fixed(source))
        return TorchFold(chosen, folded, module, compared, program, module.state_dict(), notes)

    def onnx_alone(self, why: str) -> TorchFold:
        """The fold as ONNX, where torch cannot follow."""
        chosen = self.planned(None)
        return TorchFold(chosen, apply(chosen), notes=(f"The result is ONNX alone: {why}",))

    def beyond_torch(self, chosen: FoldPlan) -> tuple[str, ...]:
        """A note where ONNX alone would hold more of the fold."""
        more = len(self.planned(None).removed) - len(chosen.removed) if chosen.restricted else 0
        if more <= 0:
            return ()
        return (f"{more} more batch norms would fold in ONNX alone (-o NAME.onnx, no torch file).",)


def _taken_out(plan: FoldPlan) -> int:
    """How many batch norms go, and operators of propagated constants."""
    return len(plan.removed) + len(plan.absorbed)


def _why_not_class(source: Source, chosen: FoldPlan, better: FoldPlan) -> tuple[str, ...]:
    gone = {removed.node for removed in better.removed}
    first = next((kept for kept in chosen.kept if kept.node in gone), None)
    more = len(better.removed) - len(chosen.removed)
    if first is None:
        return (
            f"The result is a graph module: it takes {_taken_out(better) - _taken_out(chosen)} more"
            f" operators of propagated constants than the class {type(source.plain).__name__} can."
            " (writeback 'class', or -o NAME.pt, keeps the class.)",
        )
    return (
        f"The result is a graph module: it takes {more} more batch norms than the class"
        f" {type(source.plain).__name__} can. '{first.name}' would stay in the class:"
        f" {first.reason}. (writeback 'class', or -o NAME.pt, keeps the class.)",
    )


def _beyond_class(source: Source, chosen: FoldPlan, better: FoldPlan) -> tuple[str, ...]:
    """A note where a graph module would hold more of the fold than the class."""
    more = len(better.removed) - len(chosen.removed)
    if more <= 0:
        return ()
    note = f"{more} more batch norms would fold in a graph module (writeback 'graph', -o NAME.pt2)"
    hooks = hooked_parts(source.plain) if source.plain is not None else []
    return (f"{note}, which does not call the hooks of {_listed(hooks)}." if hooks else f"{note}.",)


# of the largest output: far above what rounding leaves of a network, far below a wrong constant
_SAME = 0.01


def _fault_of(folded: nn.Module, source: Source) -> str | None:
    """Why the class does not hold the fold, if it does not: its forward, run on the example.

    A forward can read its modules without calling them: a weight without the bias that came to it,
    a batch norm's eps, the class that a layer is of. No graph says so.
    """
    assert source.module is not None
    name = type(source.module).__name__
    read = f"The forward of {name} reads its layers in other ways than by calling them"
    with torch.no_grad():
        expected = _outputs(source.module, source)
        try:
            found = _outputs(folded, source)
        except Exception as error:  # whatever the user's own code raises
            text = one_line(error)
            return f"{read}: without its batch norms it fails ({type(error).__name__}: {text})."
    for a, b in zip(expected, found, strict=True):
        size = float(a.abs().max()) if a.numel() else 0.0
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=_SAME * size):
            return f"{read}: without its batch norms it computes something else."
    return None


def _outputs(module: nn.Module, source: Source) -> list[torch.Tensor]:
    """The floating outputs of a network in eval mode on its example."""
    example = tree.tree_map_only(torch.Tensor, torch.clone, source.example)
    modes = [(part, part.training) for _, part in parts(module)]
    try:
        for part, _ in modes:
            part.training = False
        found, _ = tree.tree_flatten(module(*example))
    finally:
        for part, training in modes:
            part.training = training
    return [x.float() for x in found if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _fixed(source: Source) -> tuple[str, ...]:
    """A note on the sizes that a graph module asks for."""
    tensors = [x for x in tree.tree_flatten(source.example)[0] if isinstance(x, torch.Tensor)]
    sizes = ", ".join("x".join(str(n) for n in x.shape[1:]) for x in tensors)
    if not sizes:
        return ()
    return (f"The graph module takes inputs of the example's size: {sizes} for each sample.",)


def _hooks_left_out(source: Source) -> tuple[str, ...]:
    """A note where a graph module does what hooks do to tensors and does not call them."""
    hooks = hooked_parts(source.plain) if source.plain is not None else []
    if not hooks:
        return ()
    return (
        f"The graph module does what the hooks of {_listed(hooks)} do to tensors, and does not"
        " call them: what else they do, such as recording, is not in it.",
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{name or 'the network'}'" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class _Flat(nn.Module):
    """A network whose inputs are nested, as one that takes their tensors in order."""

    def __init__(self, network: nn.Module, spec: tree.TreeSpec) -> None:
        super().__init__()
        self.network, self.spec = network, spec

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.network(*tree.tree_unflatten(list(tensors), self.spec))


def _on_tensors(module: nn.Module, source: Source) -> nn.Module:
    """The module, or where its inputs are nested, one that takes their tensors in order."""
    _, spec = tree.tree_flatten(source.example)
    nested = not all(isinstance(argument, torch.Tensor) for argument in source.example)
    return _Flat(module, spec) if nested else module
