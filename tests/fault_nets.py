"""Networks to plant faults in, and the faults: a wrong fold is a right fold of a wrong original.

Hand-made ONNX graphs of four kinds, with statistics such as training leaves. A fault spoils a batch
norm's parameters before a tool folds it, or the weights that the tool wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
EPS = 1e-5


class Net:
    """A graph under construction; every method gives the name of its result."""

    def __init__(self, *shape: int, seed: int = 0, spread: float = 0.02) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape, self.spread = shape, spread
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Any operator."""
        result = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [result], name=f"node_{result}",
                                           **attributes))  # fmt: skip
        return result

    def held(self, name: str, array: Array) -> str:
        """A weight."""
        self.weights[name] = np.asarray(array, np.float32)
        return name

    def conv(self, x: str, name: str, into: int, out: int, size: int = 3, *, pad: int = 0,
             group: int = 1, bias: bool = False) -> str:  # fmt: skip
        """A convolution of He's size."""
        shape = (out, into // group, size, size)
        scale = np.sqrt(2 / np.prod(shape[1:]))
        names = [self.held(f"{name}.weight", self.rng.standard_normal(shape) * scale)]
        if bias:
            names.append(self.held(f"{name}.bias", self.rng.standard_normal(out) * 0.3))
        return self.op("Conv", x, *names, pads=[pad] * 4, group=group)

    def gemm(self, x: str, name: str, into: int, out: int) -> str:
        """A linear layer with a bias."""
        weight = self.rng.standard_normal((out, into)) * np.sqrt(2 / into)
        names = (self.held(f"{name}.weight", weight),
                 self.held(f"{name}.bias", self.rng.standard_normal(out) * 0.1))  # fmt: skip
        return self.op("Gemm", x, *names, transB=1)

    def norm(self, x: str, name: str, channels: int) -> str:
        """A batch norm; its variances are small enough for eps to count."""
        parts = {
            "weight": self.rng.uniform(0.6, 1.6, channels),
            "bias": self.rng.standard_normal(channels) * 0.4,
            "running_mean": self.rng.standard_normal(channels) * 0.3,
            "running_var": self.spread * self.rng.uniform(0.5, 2, channels),
        }
        names = [self.held(f"{name}.{key}", value) for key, value in parts.items()]
        return self.op("BatchNormalization", x, *names, epsilon=EPS)

    def model(self, result: str) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *self.shape])],
            [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in self.weights.items()],
        )
        opsets = [helper.make_opsetid("", 17)]
        made = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return onnx.shape_inference.infer_shapes(made)


def residual(seed: int = 0) -> onnx.ModelProto:
    """Convolution and batch norm, a block with a sum, a classifier."""
    net = Net(3, 10, 10, seed=seed)
    x = net.op("Relu", net.norm(net.conv("x", "stem", 3, 8, pad=1), "bn0", 8))
    y = net.op("Relu", net.norm(net.conv(x, "conv1", 8, 8, pad=1, bias=True), "bn1", 8))
    y = net.norm(net.conv(y, "conv2", 8, 8, pad=1), "bn2", 8)
    y = net.op("Relu", net.op("Add", x, y))
    y = net.op("Flatten", net.op("GlobalAveragePool", y))
    return net.model(net.gemm(y, "fc", 8, 5))


def depthwise(seed: int = 0) -> onnx.ModelProto:
    """A separable convolution with a batch norm behind each part."""
    net = Net(3, 10, 10, seed=seed)
    x = net.op("Relu", net.norm(net.conv("x", "stem", 3, 6), "bn0", 6))
    x = net.op("Relu", net.norm(net.conv(x, "depth", 6, 6, group=6, pad=1), "bn1", 6))
    x = net.op("Relu", net.norm(net.conv(x, "point", 6, 9, 1), "bn2", 9))
    return net.model(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", x)), "fc", 9, 5))


def preactivation(seed: int = 0) -> onnx.ModelProto:
    """Batch norm between an activation and the next convolution, which takes it up."""
    net = Net(3, 10, 10, seed=seed)
    x = net.op("Relu", net.conv("x", "stem", 3, 6))
    x = net.op("Relu", net.conv(net.norm(x, "bn1", 6), "conv1", 6, 8))
    x = net.op("Relu", net.conv(net.norm(x, "bn2", 8), "conv2", 8, 8))
    return net.model(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", x)), "fc", 8, 5))


def dense(seed: int = 0) -> onnx.ModelProto:
    """Linear layers, one batch norm behind one, one in front of another."""
    net = Net(12, seed=seed)
    x = net.op("Relu", net.norm(net.gemm("x", "fc1", 12, 10), "bn1", 10))
    x = net.op("Relu", net.gemm(x, "fc2", 10, 10))
    return net.model(net.gemm(net.norm(x, "bn2", 10), "fc3", 10, 6))


NETS: dict[str, Callable[[], onnx.ModelProto]] = {
    "residual": residual,
    "depthwise": depthwise,
    "preactivation": preactivation,
    "dense": dense,
}
# the batch norm to spoil in each, and the weight that takes it up
SPOILED = {"residual": "bn1", "depthwise": "bn1", "preactivation": "bn2", "dense": "bn1"}
TAKES = {"residual": "conv1", "depthwise": "depth", "preactivation": "conv2", "dense": "fc1"}


def inputs(model: onnx.ModelProto, rows: int = 8, seed: int = 1) -> dict[str, Array]:
    """Normal draws."""
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    drawn = np.random.default_rng(seed).standard_normal((rows, *shape))
    return {model.graph.input[0].name: drawn.astype(np.float32)}


# --------------------------------------------------------------------------------- the faults


def changed(model: onnx.ModelProto, **weights: Callable[[Array], Array]) -> onnx.ModelProto:
    """The model with some weights replaced by what a function makes of them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = dict(weights)
    for tensor in copy.graph.initializer:
        if tensor.name in names:
            array = names.pop(tensor.name)(numpy_helper.to_array(tensor).copy())
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    assert not names, f"no weight {names}"
    return copy


def _norm_node(model: onnx.ModelProto, norm: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if f"{norm}.running_mean" in node.input)


def with_attribute(model: onnx.ModelProto, norm: str, name: str, value: Any) -> onnx.ModelProto:
    """The model with another attribute of a batch norm."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    node = _norm_node(copy, norm)
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
    return copy


def in_training(model: onnx.ModelProto, norm: str) -> onnx.ModelProto:
    """The model with a batch norm left in training mode."""
    copy = with_attribute(model, norm, "training_mode", 1)
    node = _norm_node(copy, norm)
    node.output.extend([f"{norm}.mean_out", f"{norm}.var_out"])
    return copy


def swapped(array: Array) -> Array:
    array[[1, 3]] = array[[3, 1]]
    return array


def one_off(array: Array) -> Array:
    array[2] *= 1.001
    return array


PARAMETERS = ("weight", "bias", "running_mean", "running_var")
Fault = Callable[[onnx.ModelProto, str], onnx.ModelProto]
# of the original before it is folded: fault -> what is told of it
FAULTS: dict[str, tuple[Fault, str, str]] = {
    "eps dropped": (lambda m, n: with_attribute(m, n, "epsilon", 0.0),
                    "eps dropped", "without its eps (1e-05)"),
    "eps 1e-3 for 1e-5": (lambda m, n: with_attribute(m, n, "epsilon", 1e-3),
                          "eps", "with eps 0.001 instead of 1e-05"),
    "one gamma off by 1e-3": (lambda m, n: changed(m, **{f"{n}.weight": one_off}),
                              "gamma", "the gamma of channel 2 times 1.001"),
    "two channels swapped": (
        lambda m, n: changed(m, **{f"{n}.{part}": swapped for part in PARAMETERS}),
        "parameters swapped", "channels 1 and 3"),
    "gammas swapped": (lambda m, n: changed(m, **{f"{n}.weight": swapped}),
                       "gammas swapped", "the gammas of channels 1 and 3"),
    "variance x 0.999": (
        lambda m, n: changed(m, **{f"{n}.running_var": lambda v: v * np.float32(0.999)}),
        "variance", "its variance times 0.999"),
    "mean's sign": (lambda m, n: changed(m, **{f"{n}.running_mean": lambda v: -v}),
                    "mean's sign", "the sign of its mean flipped"),
    "no mean": (lambda m, n: changed(m, **{f"{n}.running_mean": lambda v: 0 * v}),
                "mean left out", "without its mean"),
    "no beta": (lambda m, n: changed(m, **{f"{n}.bias": lambda v: 0 * v}),
                "beta left out", "without its beta"),
}  # fmt: skip


def narrowed(model: onnx.ModelProto, kind: Any, only: str = "") -> onnx.ModelProto:
    """The model with its weights rounded to a narrower type and stored as before."""
    names = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) > 1}
    rounded = {name: lambda v: v.astype(kind).astype(np.float32) for name in names if only in name}
    return changed(model, **rounded)


def weights_of(model: onnx.ModelProto) -> Iterator[str]:
    """Names of the weights."""
    yield from (tensor.name for tensor in model.graph.initializer)
