"""Weights that a checkpoint's graph computes, held instead: parametrizations, where no module is.

A checkpoint of a network with weight norm holds lengths and directions, so that it loads into its
class, and its graph computes the weights from them. They are constants: each is computed once and
takes their place, in the graph and among the tensors, under the name that it has in the class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass

from bnfold.errors import InputError, one_line
from bnfold.reading.source import Source

_PARAMETRIZED = re.compile(r"(.*\.|)parametrizations\.([^.]+)\..+")


def held(source: Source) -> Source:
    """The source, its computed weights held; the same one where there are none.

    Raises InputError where a weight cannot be told from what the checkpoint holds.
    """
    if source.state_dict is None or source.plain is not None:
        return source
    made_of: dict[str, list[str]] = {}
    for key in source.state_dict:
        if match := _PARAMETRIZED.fullmatch(key):
            made_of.setdefault(match[1] + match[2], []).append(key)
    if not made_of:
        return source
    import torch

    model, state = source.graph.clone(), dict(source.state_dict)
    fixed = _fixed(model)
    for name, keys in made_of.items():
        first = next(key for key in keys if key.rpartition(".")[2].startswith("original"))
        like: Any = source.state_dict[first]
        weight = _hold(model, name, keys, fixed)
        state = {k: v for k, v in state.items() if k not in keys}
        wide = weight if weight.dtype.isbuiltin == 1 else weight.astype(np.float32)
        state[name] = torch.from_numpy(wide).to(like.dtype)
    RemoveUnusedNodesPass()(model)
    note = (
        f"the computed weights of {len(made_of)} layers (weight norm or another parametrization)"
        " were replaced by their values"
    )
    layers = tuple(name.rpartition(".")[0] for name in made_of)
    notes = (*source.notes, note)
    return replace(source, graph=model, state_dict=state, notes=notes, computed=layers)


def _fixed(model: ir.Model) -> set[ir.Value]:
    """The values that no input enters."""
    graph = model.graph
    fixed = {v for v in graph.initializers.values() if not v.is_graph_input()}
    for node in graph:
        given = [value for value in node.inputs if value is not None]
        if node.op_type == "Constant" or (given and fixed.issuperset(given)):
            fixed.update(node.outputs)
    return fixed


def _hold(
    model: ir.Model, name: str, keys: list[str], fixed: set[ir.Value]
) -> np.ndarray[Any, Any]:
    """Put an initializer in the place of what is computed from these tensors; its elements."""
    roots = [value for key in keys if (value := model.graph.initializers.get(key)) is not None]
    reached, ends = set(roots), []
    for node in model.graph:
        if reached.isdisjoint(v for v in node.inputs if v is not None):
            continue
        if node.outputs[0] in fixed:
            reached.update(node.outputs)
        else:
            ends += [v for v in node.inputs if v in reached]
    if len(set(ends)) != 1 or ends[0] is None:
        raise InputError(
            f"The graph of the checkpoint computes '{name}' in a way that is not known; name its"
            " network with --model."
        )
    try:
        weight = _evaluated(model, ends[0])
    except Exception as error:  # whatever the reference does not know
        raise InputError(
            f"The weight '{name}' of the checkpoint cannot be computed from its graph"
            f" ({one_line(error)}); name its network with --model."
        ) from error
    shape = ir.Shape(weight.shape)
    tensor = ir.Tensor(weight, name=name)
    value = ir.Value(name=name, shape=shape, type=ends[0].type, const_value=tensor)
    model.graph.register_initializer(value)
    ends[0].replace_all_uses_with(value)
    return weight


def _evaluated(model: ir.Model, value: ir.Value) -> np.ndarray[Any, Any]:
    """The elements of a value that no input enters, in its own type."""
    nodes, constants, pending = [], {}, [value]
    while pending:
        at = pending.pop()
        node = at.producer()
        if node is None:
            constants[str(at.name)] = at
        elif node not in nodes:
            nodes.append(node)
            pending += [v for v in node.inputs if v is not None]
    order = [node for node in model.graph if node in nodes]
    opsets: Mapping[str, int] = model.opset_imports
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in order],
        "weight",
        [],
        [onnx.helper.make_empty_tensor_value_info(str(value.name))],
        [onnx.numpy_helper.from_array(v.const_value.numpy(), n) for n, v in constants.items()],  # type: ignore[union-attr]
    )
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    found = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=imports)).run(None, {})
    return np.ascontiguousarray(found[0])
