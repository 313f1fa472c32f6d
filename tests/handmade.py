"""Folds made by hand: a graph, the folded graph, and the gauges between them, from numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bnfold.proof.algebra.certificate import Certificate, certify

Array = np.ndarray[Any, Any]
Weights = dict[str, Array]
EPS = 1e-5
EPS32 = float(np.float32(EPS))


@dataclass(frozen=True)
class Gauge:
    scale: Array
    origin: Array


@dataclass(frozen=True)
class Fold:
    """A fold made by hand: two lists of nodes, two sets of weights, gauges and aliases."""

    nodes: Sequence[onnx.NodeProto]
    folded_nodes: Sequence[onnx.NodeProto]
    weights: Weights
    folded_weights: Weights
    x: tuple[int | str, ...]
    gauges: Mapping[str, Gauge] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("out",)
    opset: int = 17
    float_type: int = TensorProto.FLOAT

    def model(self, nodes: Sequence[onnx.NodeProto], weights: Weights) -> onnx.ModelProto:
        graph = helper.make_graph(
            list(nodes),
            "g",
            [helper.make_tensor_value_info("x", self.float_type, self.x)],
            [helper.make_tensor_value_info(o, self.float_type, None) for o in self.outputs],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    def models(self) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        return (
            self.model(self.nodes, self.weights),
            self.model(self.folded_nodes, self.folded_weights),
        )

    def certify(self) -> Certificate:
        return certify(*self.models(), self.gauges, self.aliases)

    def with_weights(self, **changed: Array) -> Fold:
        return replace(self, folded_weights={**self.folded_weights, **changed})


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"{op}_{outputs}",
                            **attributes)  # fmt: skip


def draw(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def normalization(channels: int, seed: int = 5) -> Weights:
    """gamma of both signs, a variance that is anything but 1."""
    rng = np.random.default_rng(seed)
    return {
        "gamma": (rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels)).astype(np.float32),
        "beta": rng.standard_normal(channels).astype(np.float32),
        "mean": rng.standard_normal(channels).astype(np.float32),
        "var": rng.uniform(0.1, 4, channels).astype(np.float32),
    }


BN = "gamma beta mean var"


def affine(bn: Weights, eps: float = EPS32) -> tuple[Array, Array]:
    """(slope, shift) of the normalization, float64."""
    gamma, beta, mean, var = (bn[name].astype(np.float64) for name in BN.split())
    slope = gamma / np.sqrt(var + eps)
    return slope, beta - slope * mean


def along(values: Array, rank: int, axis: int = 1) -> Array:
    shape = [1] * rank
    shape[axis] = -1
    return np.asarray(values, np.float64).reshape(shape)


def gauge(scale: Any, origin: Any, rank: int, axis: int = 1) -> Gauge:
    scale, origin = np.broadcast_arrays(np.atleast_1d(scale), np.atleast_1d(origin))
    return Gauge(along(scale, rank, axis), along(origin, rank, axis))


def f32(value: Array) -> Array:
    return np.asarray(value, np.float64).astype(np.float32)
