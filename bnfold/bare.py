"""A graph without its weights, as bytes, and the weights by name: the two halves of a model.

A weight that is taken out stays in the graph as a tensor of its type and shape whose data lie
elsewhere: ONNX external data whose location is `bnfold`, which is no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from bnfold import graph
from bnfold.errors import InputError

AnyArray = np.ndarray[Any, np.dtype[Any]]
LOCATION = "bnfold"
_SMALLEST = 64  # bytes; what is smaller (an axis, a shape, a scalar) is part of the graph


def take_out(model: ir.Model) -> tuple[bytes, dict[str, AnyArray]]:
    """The two halves of a model, which is not changed.

    Constants behind Constant nodes and in subgraphs are weights like any other.
    """
    bare = model.clone()
    taken: dict[str, AnyArray] = {}
    for name, tensor, put in _places(bare):
        external = isinstance(tensor, ir.ExternalTensor)
        numbers = tensor.dtype not in (ir.DataType.STRING, ir.DataType.UNDEFINED)
        if name in taken or not numbers or (tensor.nbytes < _SMALLEST and not external):
            continue
        taken[name] = tensor.numpy()
        put(elsewhere(tensor))
    with graph.as_declared(bare):
        return bytes(ir.to_proto(bare).SerializeToString()), taken


def put_in(data: bytes, weights: Mapping[str, AnyArray]) -> ir.Model:
    """The model of two halves. Raises InputError where they do not belong together."""
    model = ir.from_proto(_parsed(data))
    for name, tensor, put in _places(model):
        if isinstance(tensor, ir.ExternalTensor):
            array = weights.get(name)
            if array is None or array.shape != tuple(tensor.shape.numpy()):
                raise InputError(f"The graph's weight '{name}' is not there, or of another shape.")
            there = ir.Tensor(array, tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)
            there.metadata_props.update(tensor.metadata_props)
            put(there)
    return graph.parse_onnx(graph.to_bytes(model), "the graph in the record")


def names_of(data: bytes) -> list[str]:
    """The names of the weights that a bare graph lacks. Raises InputError."""
    model = ir.from_proto(_parsed(data))
    return [name for name, tensor, _ in _places(model) if isinstance(tensor, ir.ExternalTensor)]


def weights_of(model: ir.Model) -> dict[str, AnyArray]:
    """Every constant of a model by name, the small ones too."""
    return {
        name: tensor.numpy()
        for name, tensor, _ in _places(model)
        if tensor.dtype is not ir.DataType.STRING
    }


def _places(
    model: ir.Model,
) -> Iterator[tuple[str, ir.TensorProtocol, Callable[[ir.TensorProtocol], None]]]:
    """Name, tensor and a way to replace it, for each initializer and Constant node."""
    for part in model.graphs():
        for value in part.initializers.values():
            if value.const_value is not None:

                def put_value(tensor: ir.TensorProtocol, value: ir.Value = value) -> None:
                    value.const_value = tensor

                yield str(value.name), value.const_value, put_value
        for node in part:
            held = node.attributes.get("value")
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and held is not None:

                def put_node(tensor: ir.TensorProtocol, node: ir.Node = node) -> None:
                    node.attributes["value"] = ir.AttrTensor("value", tensor)

                yield str(node.outputs[0].name), held.as_tensor(), put_node


def elsewhere(tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    """A tensor of this type and shape whose data are not in the model."""
    return ir.ExternalTensor(
        LOCATION,
        None,
        None,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _parsed(data: bytes) -> onnx.ModelProto:
    """The bare graph, which names no file."""
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception as error:  # protobuf raises types of its own
        raise InputError(f"The graph in the record cannot be read: {error}.") from error
    nodes = [node for function in model.functions for node in function.node]
    for tensor in (*_tensors(model.graph), *_attributes(nodes)):
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where and where != {"location": LOCATION}:
            raise InputError("The graph in the record refers to a file, which it never does.")
    return model


def _tensors(part: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from part.initializer
    for sparse in part.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _attributes(part.node)


def _attributes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for part in (attribute.g, *attribute.graphs):
                yield from _tensors(part)
