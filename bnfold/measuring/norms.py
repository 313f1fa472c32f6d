"""The batch norms of an ONNX graph as layers: found, their statistics read, and written anew.

A layer is a pair of running statistics. Two nodes that read the same pair are one layer used twice.
The statistics are constants of the graph, whichever way they are held: initializers or Constant
nodes, read directly or through views.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from bnfold.errors import InputError, UsageError
from bnfold.folding.apply import correspondence, set_root
from bnfold.folding.constants import Constant, constant
from bnfold.folding.rules.node import (
    Opaque,
    constant_at,
    integer,
    label,
    layer_name,
    opset_of,
    optional_input,
    real,
)
from bnfold.graph import fresh_name, is_batch_norm
from bnfold.measuring.moments import Float64
from bnfold.measuring.statistics import Layer, Statistics

MEAN, VAR = 3, 4  # where a BatchNormalization reads them


@dataclass(frozen=True, eq=False)
class Norm:
    """A layer, the nodes that are its uses, and the constants that hold its statistics."""

    layer: Layer
    nodes: tuple[ir.Node, ...]
    mean: Constant
    var: Constant


def norms_of(model: ir.Model) -> dict[str, Norm]:
    """The layers whose statistics can be adapted, by name, in the order of the graph."""
    return {name: norm for name, norm in _census(model) if isinstance(norm, Norm)}


def refused(model: ir.Model) -> dict[str, str]:
    """The other batch norms by name, each with the reason why it keeps its statistics."""
    return {name: reason for name, reason in _census(model) if isinstance(reason, str)}


def stored(norm: Norm, statistics: Statistics) -> Statistics:
    """The statistics as the model holds them, rounded to its type.

    Raises InputError, with the layer's name, where the type cannot hold them.
    """
    return Statistics(
        *(
            _rounded(norm, held, array).astype(held.dtype.numpy()).astype(np.float64)
            for held, array in ((norm.mean, statistics.mean), (norm.var, statistics.var))
        )
    )


def with_statistics(model: ir.Model, statistics: Mapping[str, Statistics]) -> ir.Model:
    """A copy of the model with new running statistics, under their own names and in their types.

    All other weights are shared with `model`. Raises UsageError for a name that is none of
    `norms_of(model)`, InputError where a type cannot hold a statistic.
    """
    norms = norms_of(model)
    for name in statistics:
        if name not in norms:
            raise UsageError(f"The model has no batch norm '{name}' whose statistics can be set.")
    adapted = model.clone()
    nodes = correspondence(model, adapted)
    for name, new in statistics.items():
        norm = norms[name]
        for held, array in ((norm.mean, new.mean), (norm.var, new.var)):
            assert held.tensor is not None  # else it would have been refused
            tensor = ir.Tensor(
                held.as_root(_rounded(norm, held, array)), held.tensor.dtype, name=held.tensor.name
            )
            set_root(_same_value(held.root, adapted, nodes), tensor)
    return adapted


def _same_value(value: ir.Value, model: ir.Model, nodes: Mapping[ir.Node, ir.Node]) -> ir.Value:
    """The value in a copy of its model."""
    node = value.producer()
    return model.graph.initializers[str(value.name)] if node is None else nodes[node].outputs[0]


def _rounded(norm: Norm, held: Constant, array: Float64) -> np.ndarray[Any, Any]:
    """In the type of the constant; what casts make of it must be finite too."""
    assert held.tensor is not None
    with np.errstate(over="ignore"):
        rounded = np.asarray(array, np.float64).astype(held.tensor.dtype.numpy())
        if np.isfinite(rounded.astype(held.dtype.numpy())).all():
            return rounded
    raise InputError(
        f"A statistic of '{norm.layer.name}' reaches {np.abs(array).max():.3g}, which"
        f" {held.dtype.name.lower()} cannot hold; convert the model to float32 before it is"
        " adapted."
    )


# --- finding --------------------------------------------------------------------------------------


def _census(model: ir.Model) -> Iterator[tuple[str, Norm | str]]:
    """Every batch norm of the model: a layer, or the reason why it is none."""
    taken: set[str | None] = set()
    layers: dict[tuple[ir.Value, ...], list[ir.Node]] = {}
    reasons: list[tuple[str, str]] = []
    for graph in _graphs(model):
        for node in filter(is_batch_norm, graph):
            try:
                _check_place(node, model)
                held = [_statistic(node, slot) for slot in (MEAN, VAR)]
                layers.setdefault(tuple(c.root for c in held), []).append(node)
            except Opaque as why:
                reasons.append((layer_name(node, 1), _sentence(why)))
    for nodes in layers.values():
        name = fresh_name(layer_name(nodes[0], 1), taken)
        try:
            yield name, _norm(name, nodes)
        except Opaque as why:
            yield name, _sentence(why)
    for name, reason in reasons:
        yield fresh_name(name, taken), reason


def _sentence(why: Opaque) -> str:
    text = str(why)
    return f"{text[:1].upper()}{text[1:]}."


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """All graphs of the model, those of its functions too."""
    yield from model.graphs()
    for function in model.functions.values():
        yield function.graph
        yield from function.subgraphs()


def _check_place(node: ir.Node, model: ir.Model) -> None:
    """Raises Opaque for a node that is no inference batch norm of the graph itself."""
    if node.graph is not model.graph:
        raise Opaque(
            "it stands inside the body of an If, Loop, Scan or function, which runs as one piece"
        )
    more = opset_of(node) >= 7 and any(output.name for output in node.outputs[1:])
    if integer(node, "training_mode", 0) if opset_of(node) >= 14 else more:
        raise Opaque("it runs in training mode: its statistics are those of each batch")
    if integer(node, "is_test", 1) == 0 or integer(node, "spatial", 1) == 0:
        raise Opaque("it is in an old opset's training or per-element mode")


def _statistic(node: ir.Node, slot: int) -> Constant:
    """The running mean or variance of a node. Raises Opaque where it is no constant vector."""
    what = "running_mean" if slot == MEAN else "running_var"
    value = optional_input(node, slot)
    if value is not None and value.is_graph_input() and not value.is_initializer():
        raise Opaque(f"its {what} '{value.name}' is an input of the model")
    held = constant_at(node, slot)
    if held.tensor is None:
        raise Opaque(f"its {what} is computed from other constants")
    if len(held.shape) != 1:
        raise Opaque(f"its {what} has shape {held.shape}, not one number per channel")
    if held.root.is_graph_output():
        raise Opaque(f"its {what} '{held.root.name}' is an output of the model too")
    return held


def _norm(name: str, nodes: list[ir.Node]) -> Norm:
    """The layer of all nodes that share both statistics. Raises Opaque where others do too."""
    mean, var = (constant_at(nodes[0], slot) for slot in (MEAN, VAR))
    for what, slot, held in (("running_mean", MEAN, mean), ("running_var", VAR, var)):
        views = {view for node in nodes for view in constant_at(node, slot).views}
        for value in (held.root, *(view.outputs[0] for view in views)):
            for user, used in value.uses():
                if user not in views and (user not in nodes or used != slot):
                    raise Opaque(f"its {what} '{held.root.name}' is read by {label(user)} too")
    if any(constant(node.inputs[0]) is not None for node in nodes):
        raise Opaque("its input is a constant")
    if mean.shape != var.shape:
        raise Opaque(f"its running_mean has shape {mean.shape}, its running_var {var.shape}")
    source = Statistics(mean.array.copy(), var.array.copy())
    return Norm(Layer(name, real(nodes[0], "epsilon", 1e-5), source), tuple(nodes), mean, var)
