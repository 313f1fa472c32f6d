"""What each exact repair costs on onnxruntime, beside the batch norm in whose place it stands.

    .venv/bin/python scripts/measure_repairs.py

Four situations in which a batch norm goes only with a repair, each as a small network at three
sizes. Latency on the CPU provider, all optimisations on, one thread, runs interleaved, the fastest
of each, as a ratio to the original; "gone" leaves the batch norms out altogether (another function:
the least that any fold could reach). A second table is of shifts that are one number for all
channels: constants behind each activation, as normalization propagation has them, and a batch norm
of the input; ratios to the network with these in place.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import bnfold  # noqa: E402
from bnfold.graph import to_bytes  # noqa: E402
from bnfold.proof.places.runtime import open_session  # noqa: E402

SIZES = ((64, 56, 3), (256, 14, 4), (512, 7, 4))
RUNS = 40


class Net:
    """A network under construction."""

    def __init__(self, *, mixed: bool) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)
        self.mixed = mixed

    def const(self, array: np.ndarray) -> str:
        """A constant."""
        name = f"k{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        """An operator."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name, **attributes))
        return name

    def conv(self, x: str, ins: int, outs: int, kernel: int = 3) -> str:
        """A convolution that keeps the size."""
        weight = self.rng.normal(size=(outs, ins, kernel, kernel)) / np.sqrt(ins) / kernel
        bias = self.const(self.rng.normal(size=outs))
        return self.op("Conv", x, self.const(weight), bias, pads=[kernel // 2] * 4)

    def norm(self, x: str, size: int) -> str:
        """A batch norm."""
        gamma = self.rng.uniform(0.5, 2, size)
        if self.mixed:
            gamma *= self.rng.choice([1, -1], size)
        parts = (gamma, self.rng.normal(size=size), self.rng.normal(size=size))
        var = self.const(self.rng.uniform(0.5, 2, size))
        return self.op("BatchNormalization", x, *(self.const(part) for part in parts), var)

    def model(self, y: str, size: int) -> onnx.ModelProto:
        """The network that gives out y."""
        self.nodes.append(helper.make_node("Identity", [y], ["y"], "out"))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, size, size])
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "c", "h", "w"])
        graph = helper.make_graph(self.nodes, "net", [x], [out], self.constants)
        opsets = [helper.make_opsetid("", 17)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


Body = Callable[[Net, str, int, int], str]


def concat_norm_relu(net: Net, x: str, channels: int, depth: int) -> str:
    """DenseNet: every layer reads all layers before it through its own batch norm and Relu."""
    features, width = [x], channels
    for _ in range(depth):
        joined = net.op("Concat", *features, axis=1) if len(features) > 1 else x
        inner = net.conv(net.op("Relu", net.norm(joined, width)), width, 64, 1)
        features.append(net.conv(net.op("Relu", inner), 64, 32))
        width += 32
    return net.op("Concat", *features, axis=1)


def conv_relu_norm_conv(net: Net, x: str, channels: int, depth: int) -> str:
    """A batch norm between a Relu and a padded convolution."""
    for _ in range(depth):
        x = net.norm(net.op("Relu", net.conv(x, channels, channels)), channels)
    return net.conv(x, channels, channels)


def stream_norm_conv(net: Net, x: str, channels: int, depth: int) -> str:
    """A batch norm that reads a residual stream, before a padded convolution."""
    for _ in range(depth):
        inner = net.op("Relu", net.conv(net.norm(x, channels), channels, channels))
        x = net.op("Add", x, net.op("Sigmoid", net.conv(inner, channels, channels)))
    return x


def constants(activation: str) -> Body:
    """Normalization propagation: (act(x) - mean) / std between padded convolutions."""

    def body(net: Net, x: str, channels: int, depth: int) -> str:
        for _ in range(depth):
            x = net.op(activation, net.conv(x, channels, channels))
            x = net.op("Div", net.op("Sub", x, net.const(0.4)), net.const(0.58))
        return net.conv(x, channels, channels)

    return body


def input_norm(net: Net, channels: int, depth: int) -> str:
    """A batch norm of the input, of the same numbers in every channel, before a padded network."""
    parts = [net.const(np.full(3, number)) for number in (1.7, 0.3, 0.5, 2.0)]
    x = net.conv(net.op("BatchNormalization", "x", *parts), 3, channels)
    for _ in range(depth):
        x = net.conv(net.op("Relu", x), channels, channels)
    return x


ONE_NUMBER: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Conv, Relu, Sub, Div, padded Conv: a Clip", "Relu", ()),
    ("Conv, Tanh, Sub, Div, padded Conv: as it is", "Tanh", ()),
    ("Conv, Tanh, Sub, Div, padded Conv: a Pad (pad)", "Tanh", ("pad",)),
    ("batch norm of the input, padded Conv: a Pad", "input", ()),
)


SITUATIONS: tuple[tuple[str, Body, bool, tuple[str, ...]], ...] = (
    ("Concat, BN, Relu, 1x1 Conv (clamp, one sign)", concat_norm_relu, False, ("clamp",)),
    ("Concat, BN, Relu, 1x1 Conv (clamp, both signs)", concat_norm_relu, True, ("clamp",)),
    ("Conv, Relu, BN, padded Conv (clamp)", conv_relu_norm_conv, False, ("clamp",)),
    ("stream, BN, padded Conv (border map)", stream_norm_conv, False, ("border",)),
)


def without_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network with each batch norm left out: another function, with the least work."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for node in bare.graph.node:
        if node.op_type == "BatchNormalization":
            node.op_type = "Identity"
            del node.input[1:]
            del node.attribute[:]
    return bare


def fastest(models: dict[str, bytes], x: np.ndarray) -> dict[str, float]:
    """Seconds of the thread's own time of the fastest of interleaved runs."""
    sessions = {k: open_session(m, "cpu", optimize=True, threads=1) for k, m in models.items()}
    best = dict.fromkeys(models, np.inf)
    for _ in range(RUNS):
        for name, session in sessions.items():
            started = time.thread_time()  # not the clock's: other programs run beside it
            session.run({"x": x})
            best[name] = min(best[name], time.thread_time() - started)
    return best


def without_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network without the shifts: another function, with the least work."""
    bare = without_norms(model)
    for node in bare.graph.node:
        if node.op_type in ("Sub", "Div"):
            node.op_type = "Identity"
            del node.input[1:]
    return bare


def main_of_one_number() -> None:
    """Print the second table."""
    print()
    print("| situation | channels, size | operators | folded | gone |")
    print("| --- | --- | --- | --- | --- |")
    for name, kind, repairs in ONE_NUMBER:
        for channels, size, depth in SIZES:
            net = Net(mixed=False)
            if kind == "input":
                y = input_norm(net, channels, depth)
            else:
                y = constants(kind)(net, net.conv("x", 3, channels), channels, depth)
            model = net.model(y, size)
            folded = bnfold.fold(model, repair=repairs)
            took = fastest(
                {
                    "plain": model.SerializeToString(),
                    "folded": to_bytes(folded.graph),
                    "gone": without_constants(model).SerializeToString(),
                },
                np.random.default_rng(1).normal(size=(1, 3, size, size)).astype(np.float32),
            )
            ratios = [f"{took[k] / took['plain']:.3f}" for k in ("folded", "gone")]
            nodes = f"{len(model.graph.node)} to {len(list(folded.graph.graph))}"
            print(
                "| " + " | ".join([name, f"{channels}, {size}", nodes, *ratios]) + " |", flush=True
            )


def main() -> None:
    """Print the tables."""
    print("| situation | channels, size | BN | left | operators | repaired | gone |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, body, mixed, repairs in SITUATIONS:
        for channels, size, depth in SIZES:
            net = Net(mixed=mixed)
            y = body(net, net.conv("x", 3, channels), channels, depth)
            model = net.model(y, size)
            plain, repaired = bnfold.fold(model), bnfold.fold(model, repair=repairs)
            found = len(plain.kept) + len(plain.folded)
            nodes = [len(list(graph.graph)) for graph in (plain.graph, repaired.graph)]
            took = fastest(
                {
                    "plain": to_bytes(plain.graph),
                    "repaired": to_bytes(repaired.graph),
                    "gone": without_norms(model).SerializeToString(),
                },
                np.random.default_rng(1).normal(size=(1, 3, size, size)).astype(np.float32),
            )
            ratios = [f"{took[k] / took['plain']:.3f}" for k in ("repaired", "gone")]
            left = f"{len(plain.kept)} to {len(repaired.kept)}"
            cells = [name, f"{channels}, {size}", str(found), left, f"{nodes[0]} to {nodes[1]}"]
            print("| " + " | ".join([*cells, *ratios]) + " |", flush=True)


if __name__ == "__main__":
    main()
    main_of_one_number()
