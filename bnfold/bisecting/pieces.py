"""Pieces of a graph as models of their own, cut out between values.

A piece holds the nodes that its outputs need, in their order, and the weights that these read; the
values that it is cut at are its inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from bnfold.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]


def cut(
    model: onnx.ModelProto,
    inputs: Mapping[str, onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """The part of `model` that computes `outputs` from `inputs`, with its own weights only.

    inputs: value name -> its type. Raises InputError where an output also needs another input.
    """
    nodes, read = _needed(model.graph, inputs, [value.name for value in outputs])
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    missing = read - held.keys() - inputs.keys() - {n for node in nodes for n in node.output}
    if missing:
        raise InputError(
            f"the piece needs the value '{min(missing)}' besides, which was not given."
        )
    piece = onnx.ModelProto()
    for field in ("ir_version", "producer_name", "producer_version", "domain"):
        setattr(piece, field, getattr(model, field))
    piece.opset_import.extend(model.opset_import)
    piece.functions.extend(model.functions)
    piece.graph.name = model.graph.name or "piece"
    piece.graph.node.extend(nodes)
    piece.graph.initializer.extend(
        tensor for name, tensor in held.items() if name in read and name not in inputs
    )
    piece.graph.input.extend(value for name, value in inputs.items() if name in read)
    piece.graph.output.extend(outputs)
    return piece


def _needed(
    graph: onnx.GraphProto, given: Collection[str], outputs: Sequence[str]
) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes behind `outputs` down to what is given, in order, and all names that they read."""
    wanted = set(outputs)
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if any(name in wanted and name not in given for name in node.output if name):
            kept.append(node)
            wanted.update(names_read(node))
    return kept[::-1], wanted


def names_read(node: onnx.NodeProto) -> Iterator[str]:
    """The values that a node reads, those that its bodies take from outside among them."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            inside = {value.name for value in (*body.input, *body.initializer)}
            inside.update(name for inner in body.node for name in inner.output)
            read = {name for inner in body.node for name in names_read(inner)}
            yield from (read | {value.name for value in body.output}) - inside


def value_info(name: str, array: Array, elem_type: int | None = None) -> onnx.ValueInfoProto:
    """The type of a value that holds such an array, its first axis free."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype) if elem_type is None else elem_type
    shape: list[int | str] = [*array.shape]
    if shape:
        shape[0] = "N"
    return onnx.helper.make_tensor_value_info(name, kind, shape)
