"""An input's mean and std as operators of the network, so that they fold into its first layers.

Deployed networks are often fed (x - mean) / std, computed by the caller. Written into the graph,
the division goes into the first convolution's weights; the subtraction goes too where nothing pads
it with zeros, else it stays as one operator on the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from bnfold import graph
from bnfold.errors import UsageError
from bnfold.folding.constants import FLOATS


def scale_input(
    model: ir.Model, mean: Sequence[float], std: Sequence[float], name: str | None = None
) -> ir.Model:
    """A new model that normalises its input itself: it computes with (x - mean) / std.

    mean, std: one number, or one per channel (axis 1), in the units of the new input. name: the
    input, where the model has several. Raises UsageError for numbers or an input that do not fit.
    """
    model = model.clone()
    value = _input(model, name)
    channels = value.shape[1] if value.shape is not None and len(value.shape) > 1 else None
    for what, numbers in (("--input-mean", mean), ("--input-std", std)):
        if len(numbers) not in (1, channels) or not np.all(np.isfinite(numbers)):
            raise UsageError(
                f"{what} needs one finite number or one for each of the {channels} channels of"
                f" '{value.name}'; it has {len(numbers)}."
            )
    if np.any(np.asarray(std) <= 0):
        raise UsageError("--input-std needs numbers above 0: the input is divided by them.")
    opset = model.opset_imports.get("", 0)
    if opset < 7:
        raise UsageError(f"The model uses opset {opset}; convert it to opset 7 or newer first.")
    if value.is_graph_output() or not value.uses():
        raise UsageError(
            f"'{value.name}' is given out as it is, or read by nothing: it cannot be normalised."
        )
    _put_behind(model, value, [("Sub", mean), ("Div", std)])
    return graph.prepare(model)


def _input(model: ir.Model, name: str | None) -> ir.Value:
    found = {n: v for n, v in graph.graph_inputs(model).items() if v.dtype in FLOATS}
    if name is None and len(found) != 1:
        raise UsageError(
            f"The model has {len(found)} inputs of floats ({', '.join(found)}); say which one, as"
            " in --input-mean NAME:0.5."
        )
    if name is not None and name not in found:
        raise UsageError(f"The model has no input of floats '{name}'; it has {', '.join(found)}.")
    return found[name] if name is not None else next(iter(found.values()))


def _put_behind(
    model: ir.Model, value: ir.Value, steps: Sequence[tuple[str, Sequence[float]]]
) -> None:
    """Operators with a per-channel constant between an input and all that reads it."""
    assert value.dtype is not None
    rank = len(value.shape or ())
    readers = list(value.uses())
    names = graph.names_in(model)
    nodes, last = [], value
    for op_type, numbers in steps:
        stem = f"{value.name}_{'mean' if op_type == 'Sub' else 'std'}"
        array = np.asarray(numbers, np.float64)
        if array.size > 1:
            array = array.reshape(1, -1, *(1,) * (rank - 2))
        tensor = ir.Tensor(
            array.reshape(array.shape if array.size > 1 else ()).astype(value.dtype.numpy()),
            dtype=value.dtype,
            name=graph.fresh_name(stem, names),
        )
        held = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.shape),
            type=ir.TensorType(value.dtype),
            const_value=tensor,
        )
        model.graph.register_initializer(held)
        if (model.ir_version or 0) < 4:
            model.graph.inputs.append(held)  # IR 3 lists every initializer among the inputs
        out = ir.Value(
            name=graph.fresh_name(f"{stem}_out", names),
            shape=value.shape,
            type=ir.TensorType(value.dtype),
        )
        nodes.append(ir.node(op_type, [last, held], name=f"{stem}_{op_type}", outputs=[out]))
        last = out
    first = next(iter(model.graph))
    model.graph.insert_before(first, nodes)
    for node, slot in readers:
        node.replace_input_with(slot, last)
