"""Which precision a network is stored in, and what storing one so does to it.

A folded model of float16 weights is off by the rounding of float16, whatever the fold did. Where
the user declared that, it is held against the original with its products in float16 too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bnfold.proof.exact.counterpart import ROUNDINGS
from bnfold.proof.places.runtimes import Runtime

NARROW = {  # the coarser first: its numbers are mostly float16 numbers as well
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
}
TITLES = {"fp16": "float16", "bf16": "bfloat16"}
VIEWS = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def types_of(model: onnx.ModelProto) -> set[int]:
    """The element types of its weights, inputs and outputs."""
    types = {tensor.data_type for tensor in model.graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in model.graph.input}
    return types | {value.type.tensor_type.elem_type for value in model.graph.output}


def unit_of(model: onnx.ModelProto) -> float:
    """Rounding of the type that its convolutions and products compute in, or store weights in.

    The coarsest of those; where there are none, that of its outputs. A table or a constant in a
    narrower type beside them says nothing about how exact the network is.
    """
    held = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    types = {
        kind for node in products for name in node.input for kind in _held_types(name, held, made)
    }
    if not types & ROUNDINGS.keys():
        types = {value.type.tensor_type.elem_type for value in model.graph.output}
    units = [ROUNDINGS[kind].unit for kind in types if kind in ROUNDINGS]
    return max(units, default=ROUNDINGS[TensorProto.FLOAT].unit)


def _held_types(
    name: str, held: Mapping[str, int], made: Mapping[str, onnx.NodeProto]
) -> Iterator[int]:
    """The types that a stored operand has on its way to a product; none for what is computed."""
    while name in made and made[name].op_type in VIEWS and made[name].input:
        yield from (a.i for a in made[name].attribute if a.name == "to")
        name = made[name].input[0]
    if name in held:
        yield held[name]
    elif name in made and made[name].op_type == "Constant":
        yield from (a.t.data_type for a in made[name].attribute if a.name == "value")


def stored_class(original: onnx.ModelProto, folded: onnx.ModelProto) -> str:
    """fp16 or bf16 where the folded model's weights are such numbers and the original's are not.

    By their type, or as float32 numbers that all are of the narrower type; else empty.
    """
    for name, (kind, dtype) in NARROW.items():
        if _is_of(folded, kind, dtype) and not _is_of(original, kind, dtype):
            return name
    return ""


def _is_of(model: onnx.ModelProto, kind: int, dtype: np.dtype[np.generic]) -> bool:
    """Whether every matrix and kernel of the model holds numbers of this type alone."""
    found = False
    for tensor in model.graph.initializer:
        floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
        if len(tensor.dims) < 2 or tensor.data_type not in floats:
            continue
        if tensor.data_type != kind:
            value = numpy_helper.to_array(tensor).astype(np.float32)
            with np.errstate(all="ignore"):
                if not np.array_equal(value, value.astype(dtype).astype(np.float32)):
                    return False
        found = True
    return found


def as_stored(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """The model with float32 tensors that hold a class's numbers alone in its type.

    For gate A, which grants a constant the rounding of its type; it is no model to be run.
    """
    kind, dtype = NARROW[precision]
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(tensor)
            with np.errstate(all="ignore"):
                narrow = value.astype(dtype)
            if np.array_equal(value, narrow.astype(np.float32)):
                raw = helper.make_tensor(tensor.name, kind, value.shape, narrow.tobytes(), raw=True)
                tensor.CopyFrom(raw)
    return made


def effective(runtime: Runtime, stored: str) -> Runtime:
    """The runtime with the class that has an effect there.

    onnxruntime's CPU and CUDA compute in the model's own type, so fp16 and bf16 mean a model that
    is stored so; TensorRT and torch round by themselves.
    """
    own_type = runtime.place.provider in ("cpu", "cuda") and runtime.precision in NARROW
    return Runtime(runtime.name) if own_type and runtime.precision != stored else runtime


def rounded(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """The model with every input of its convolutions and products rounded to a narrow type.

    What storing it so costs, emulated: a pair of casts before each operand.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    nodes = list(made.graph.node)
    del made.graph.node[:]
    narrowed: dict[str, str] = {}
    for node in nodes:
        if node.op_type in PRODUCTS and node.domain in ("", "ai.onnx"):
            for index, name in enumerate(node.input):
                if name and name not in narrowed:
                    narrowed[name] = f"{name}/{precision}"
                    made.graph.node.extend(_there_and_back(name, precision))
                node.input[index] = narrowed.get(name, name)
        made.graph.node.append(node)
    return made


def _there_and_back(name: str, precision: str) -> list[onnx.NodeProto]:
    narrow, wide = f"{name}/{precision}/narrow", f"{name}/{precision}"
    return [
        helper.make_node("Cast", [name], [narrow], to=NARROW[precision][0]),
        helper.make_node("Cast", [narrow], [wide], to=TensorProto.FLOAT),
    ]
