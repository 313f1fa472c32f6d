"""Batch norms put back where none is left, so that a network without any can be adapted.

Behind a linear layer that once had a batch norm, source images say what that batch norm gave: mean
beta and deviation |gamma|. A batch norm with the moments that are seen there, both as its
statistics and as its beta and gamma, changes nothing on the source; with the target's statistics it
brings the target to the source's moments (moment matching), and it folds away again. What the
network's own batch norms were is not known, so the result is an approximation, on every
linear layer but the last; it serves weight normalization and nets without any norm as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from bnfold import graph
from bnfold.errors import InputError
from bnfold.folding.constants import FLOATS
from bnfold.folding.rules.node import input_of, is_standard, layer_name
from bnfold.measuring.moments import ImageMoments

EPS = 1e-5
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_PRODUCTS = ("Gemm", "MatMul")


def with_identity_norms(model: ir.Model) -> ir.Model:
    """A clone with idle batch norms behind all linear layers but the last ones.

    They have scale 1, shift 0, mean 0, variance 1 and eps 0 until `set_moments`. Raises InputError
    where there is no place for one.
    """
    model = model.clone()
    names = graph.names_in(model)
    places = [node for node in model.graph if _is_linear(node) and not _is_last(node)]
    for node in places:
        _put_behind(model, node, names)
    if not places:
        raise InputError(
            "The model has neither a batch norm nor a convolution or linear layer before its last"
            " one; there is nothing to adapt."
        )
    return graph.prepare(model)


def set_moments(model: ir.Model, moments: Mapping[str, ImageMoments]) -> None:
    """Give the batch norms of `with_identity_norms` what was seen at them; they stay idle.

    Those that saw nothing are left as they are.
    """
    for node in model.graph:
        if not graph.is_batch_norm(node):
            continue
        seen = moments.get(layer_name(node, 1))
        if seen is None or seen.pixels.count < 2:
            continue
        mean, var = seen.pixels.mean, seen.pixels.var_unbiased
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", EPS)
        for slot, array in enumerate((np.sqrt(var + EPS), mean, mean, var), start=1):
            held = input_of(node, slot)
            assert held.dtype is not None
            held.const_value = ir.Tensor(array.astype(held.dtype.numpy()), name=held.name)


def _is_linear(node: ir.Node) -> bool:
    """A layer of constant weights whose channels lie on axis 1, at more than one place."""
    if not is_standard(node, *_CONVOLUTIONS, *_PRODUCTS) or len(node.inputs) < 2:
        return False
    out, weight = node.outputs[0], node.inputs[1]
    if out.shape is None or out.dtype not in FLOATS or weight is None:
        return False
    sizes = list(out.shape)
    if len(sizes) < 2 or not isinstance(sizes[1], int) or not _is_constant(weight):
        return False
    if node.op_type in _PRODUCTS:
        return len(sizes) == 2
    return any(size != 1 for size in sizes[2:])  # behind a global pooling it is a gate


def _is_constant(weight: ir.Value) -> bool:
    """An initializer, or computed from initializers alone."""
    pending, graph_inputs = [weight], 0
    while pending:
        value = pending.pop()
        producer = value.producer()
        if producer is not None:
            pending += [read for read in producer.inputs if read is not None]
        elif value.const_value is None:
            graph_inputs += 1
    return not graph_inputs


def _is_last(node: ir.Node) -> bool:
    """True if an output of the network can be reached without another linear layer."""
    seen: set[ir.Value] = set()
    pending = list(node.outputs)
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.is_graph_output():
            return True
        for reader in value.consumers():
            if not is_standard(reader, *_CONVOLUTIONS, *_PRODUCTS):
                pending += reader.outputs
    return False


def _put_behind(model: ir.Model, node: ir.Node, names: set[str | None]) -> None:
    """A batch norm between a node and all that reads it."""
    value = node.outputs[0]
    assert value.shape is not None
    assert value.dtype is not None
    name = graph.fresh_name(f"{layer_name(node, 1)}.norm", names)
    size = int(value.shape[1])  # type: ignore[arg-type]
    parameters = [
        _held(model, graph.fresh_name(f"{name}.{leaf}", names), array.astype(value.dtype.numpy()))
        for leaf, array in _identity(size)
    ]
    out = ir.Value(name=graph.fresh_name(f"{name}.out", names), shape=value.shape, type=value.type)
    readers = list(value.uses())
    norm = ir.node(
        "BatchNormalization",
        [value, *parameters],
        attributes={"epsilon": 0.0},
        outputs=[out],
        name=name,
    )
    model.graph.insert_after(node, norm)
    for reader, slot in readers:
        reader.replace_input_with(slot, out)


def _identity(size: int) -> Iterator[tuple[str, np.ndarray]]:
    for leaf, number in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
        yield leaf, np.full(size, number, np.float64)


def _held(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    held = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    model.graph.register_initializer(held)
    if (model.ir_version or 0) < 4:
        model.graph.inputs.append(held)  # IR 3 lists every initializer among the inputs
    return held
