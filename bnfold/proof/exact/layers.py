"""The batch norms of a graph as layers: what each is called, reads and computes.

A batch norm is the map y = slope * x + shift per channel, with slope = gamma / sqrt(var + eps) and
shift = beta - slope * mean. In a graph without batch norms there is none; what a torch exporter
writes as Mul and Add by constants is not taken for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from bnfold.proof.exact.counterpart import View

Array = np.ndarray[Any, np.dtype[Any]]

PARAMETERS = ("gamma", "beta", "mean", "var")


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm of a graph: its layer's name, its node's, the values it reads and writes.

    gamma, beta, mean, var: (channels,) float64, None where they are no constants of the graph.
    training: whether it normalizes by the statistics of the batch.
    """

    name: str
    node: str
    input: str
    output: str
    eps: float
    training: bool
    parameters: Mapping[str, Array] | None

    @property
    def slope(self) -> Array:
        """gamma / sqrt(var + eps), per channel."""
        assert self.parameters is not None
        with np.errstate(all="ignore"):
            slope: Array = self.parameters["gamma"] / np.sqrt(self.parameters["var"] + self.eps)
        return slope

    @property
    def shift(self) -> Array:
        """beta - slope * mean, per channel."""
        assert self.parameters is not None
        shift: Array = self.parameters["beta"] - self.slope * self.parameters["mean"]
        return shift


def norms_of(view: View) -> list[Norm]:
    """The batch norms of a main graph, in order of execution; those in bodies are left out."""
    return [_norm(node, view) for node in view.nodes if is_norm(node)]


def is_norm(node: onnx.NodeProto) -> bool:
    """Whether the node is ONNX's BatchNormalization."""
    return node.op_type == "BatchNormalization" and node.domain in ("", "ai.onnx")


def _norm(node: onnx.NodeProto, view: View) -> Norm:
    held = [view.constant(name).value for name in node.input[1:5] if view.is_constant(name)]
    fits = len(held) == len(PARAMETERS) and all(array.ndim == 1 for array in held)
    eps = next((a.f for a in node.attribute if a.name == "epsilon"), float(np.float32(1e-5)))
    return Norm(
        layer_name(node, view),
        view.label(node),
        node.input[0],
        node.output[0],
        float(eps),
        in_training(node, view.opsets.get("", 1)),
        dict(zip(PARAMETERS, held, strict=True)) if fits else None,
    )


def layer_name(node: onnx.NodeProto, view: View) -> str:
    """The module's path where its running mean's name tells it, else the node's name."""
    name = node.input[3]
    while name in view.producers and len(view.producers[name].input) == 1:
        name = view.producers[name].input[0]
    if name.endswith(".running_mean"):
        return str(name.removesuffix(".running_mean"))
    return view.label(node)


def in_training(node: onnx.NodeProto, opset: int) -> bool:
    """Whether the node takes the statistics of the batch, as its version of ONNX says it."""
    flags = {attribute.name: attribute.i for attribute in node.attribute}
    if opset >= 14:
        return bool(flags.get("training_mode", 0))
    return any(node.output[1:]) if opset >= 7 else not flags.get("is_test", 0)
