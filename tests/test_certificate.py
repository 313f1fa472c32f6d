"""Gate A accepts folds made by hand, and names the node for every planted fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from handmade import (
    BN,
    EPS,
    EPS32,
    Array,
    Fold,
    Gauge,
    Weights,
    affine,
    along,
    draw,
    f32,
    gauge,
    node,
    normalization,
)
from onnx import TensorProto, helper, numpy_helper

import bnfold
from bnfold.proof.algebra.certificate import certify
from bnfold.proof.exact.shapes import Shapes, ValueType

# ------------------------------------------------------------------------------ folds by hand


def conv_then_bn(
    eps: float = EPS32, *, group: int = 2, believed: Weights | None = None, plan_too: bool = False
) -> Fold:
    """Faults: `eps` or the `believed` statistics, in the weights alone or in the plan too."""
    bn = normalization(6)
    weight, bias = draw(1, 6, 6 // group, 3, 3), draw(2, 6)
    slope, shift = affine({**bn, **(believed or {})}, eps)
    planned, moved = (slope, shift) if plan_too else affine(bn)
    conv = {"pads": [1, 1, 1, 1], "group": group}
    return Fold(
        nodes=[
            node("Conv", "x w b", "c", **conv),
            node("BatchNormalization", f"c {BN}", "n", epsilon=EPS),
            node("Relu", "n", "out"),
        ],
        folded_nodes=[node("Conv", "x w b", "c", **conv), node("Relu", "c", "out")],
        weights={"w": weight, "b": bias, **bn},
        folded_weights={
            "w": f32(weight * along(slope, 4, 0)),
            "b": f32(slope * bias + shift),
        },
        x=("N", 6, 8, 8),
        gauges={"c": gauge(planned, -moved / planned, 4)},
        aliases={"n": "c"},
    )


def bn_then_conv(pads: Sequence[int] = (0, 0, 0, 0), axis: int = 1) -> Fold:
    """Every extent is 4: a scale along the wrong axis still has a valid shape."""
    bn, weight = normalization(4), draw(1, 4, 4, 4, 4)
    slope, shift = affine(bn)
    folded = weight * along(slope, 4, axis)
    return Fold(
        nodes=[
            node("BatchNormalization", f"x {BN}", "n", epsilon=EPS),
            node("Conv", "n w", "out", pads=pads),
        ],
        folded_nodes=[node("Conv", "x w b", "out", pads=pads)],
        weights={"w": weight, **bn},
        folded_weights={
            "w": f32(folded),
            "b": f32(np.einsum("oihw,i->o", weight.astype(np.float64), shift)),
        },
        x=(2, 4, 4, 4),
        gauges={"n": gauge(1 / slope, shift, 4)},
        aliases={"n": "x"},
    )


def conv_transpose_then_bn() -> Fold:
    bn, weight = normalization(6), draw(1, 4, 3, 3, 3)
    slope, shift = affine(bn)
    scaled = weight.astype(np.float64).reshape(2, 2, 3, 3, 3) * slope.reshape(2, 1, 3, 1, 1)
    attributes = {"group": 2, "strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}
    return Fold(
        nodes=[
            node("ConvTranspose", "x w", "c", **attributes),
            node("BatchNormalization", f"c {BN}", "out", epsilon=EPS),
        ],
        folded_nodes=[node("ConvTranspose", "x w b", "out", **attributes)],
        weights={"w": weight, **bn},
        folded_weights={"w": f32(scaled.reshape(weight.shape)), "b": f32(shift)},
        x=(1, 4, 5, 5),
        gauges={"c": gauge(slope, -shift / slope, 4)},
        aliases={"c": "out"},
    )


def bn_then_conv_transpose(shifted: bool) -> Fold:
    """Exact only for a normalization without a shift: the border sees fewer taps."""
    bn, weight = normalization(4), draw(1, 4, 4, 3, 3)
    if not shifted:
        bn["beta"] = np.zeros(4, np.float32)
        bn["mean"] = np.zeros(4, np.float32)
    slope, shift = affine(bn)
    return Fold(
        nodes=[
            node("BatchNormalization", f"x {BN}", "n", epsilon=EPS),
            node("ConvTranspose", "n w", "out"),
        ],
        folded_nodes=[node("ConvTranspose", "x w b", "out")],
        weights={"w": weight, **bn},
        folded_weights={
            "w": f32(weight * along(slope, 4, 0)),
            "b": f32(np.einsum("iohw,i->o", weight.astype(np.float64), shift)),
        },
        x=(1, 4, 4, 4),
        gauges={"n": gauge(1 / slope, shift, 4)},
        aliases={"n": "x"},
    )


def gemm_then_bn() -> Fold:
    bn, weight, bias = normalization(5), draw(1, 5, 5), draw(2, 5)
    slope, shift = affine(bn)
    attributes = {"alpha": 0.5, "beta": 2.0, "transB": 1}
    return Fold(
        nodes=[
            node("Gemm", "x w b", "c", **attributes),
            node("BatchNormalization", f"c {BN}", "out", epsilon=EPS),
        ],
        folded_nodes=[node("Gemm", "x w b", "out", **attributes)],
        weights={"w": weight, "b": bias, **bn},
        folded_weights={"w": f32(weight * slope[:, None]), "b": f32(slope * bias + shift / 2)},
        x=("N", 5),
        gauges={"c": gauge(slope, -shift / slope, 2)},
        aliases={"c": "out"},
    )


def matmul_then_bn(form: str) -> Fold:
    """MatMul becomes a Gemm, or keeps its kind with an Add behind it."""
    bn, weight = normalization(5), draw(1, 5, 5)
    slope, shift = affine(bn)
    folded = {
        "gemm": [node("Gemm", "x w b", "out")],
        "add": [node("MatMul", "x w", "raw"), node("Add", "raw b", "out")],
    }[form]
    return Fold(
        nodes=[
            node("Transpose", "wt", "w", perm=[1, 0]),
            node("MatMul", "x w", "c"),
            node("BatchNormalization", f"c {BN}", "out", epsilon=EPS),
        ],
        folded_nodes=folded,
        weights={"wt": weight, **bn},
        folded_weights={"w": f32(weight * slope[:, None]).T.copy(), "b": f32(shift)},
        x=("N", 5),
        gauges={"c": gauge(slope, -shift / slope, 2)},
        aliases={"c": "out"},
    )


def matmul_add_becomes_gemm() -> Fold:
    weight, bias = draw(1, 5, 5), draw(2, 5)
    return Fold(
        nodes=[node("MatMul", "x w", "c"), node("Add", "b c", "out")],
        folded_nodes=[node("Gemm", "x w b", "out")],
        weights={"w": weight, "b": bias},
        folded_weights={"w": weight, "b": bias},
        x=("N", 5),
    )


def tokens_then_bn() -> Fold:
    """A product on the left (W x) with the channels on the last axis but one."""
    bn, weight = normalization(4), draw(1, 4, 4)
    slope, shift = affine(bn)
    return Fold(
        nodes=[
            node("MatMul", "w x", "c"),
            node("BatchNormalization", f"c {BN}", "out", epsilon=EPS),
        ],
        folded_nodes=[node("MatMul", "w x", "raw"), node("Add", "raw b", "out")],
        weights={"w": weight, **bn},
        folded_weights={"w": f32(weight * slope[:, None]), "b": f32(shift.reshape(1, 4, 1))},
        x=(2, 4, 4),
        gauges={"c": gauge(slope, -shift / slope, 3)},
        aliases={"c": "out"},
    )


def long_way(scale: Array | None = None) -> Fold:
    """A positive scale from a Conv through what lets it pass, into a Gemm."""
    scale = np.array([2.0, 0.5, 3.0, 0.7]) if scale is None else scale
    weight, dense = draw(1, 4, 3, 3, 3), draw(2, 2, 4 * 2 * 2)
    per_feature = np.tile(scale, 4)  # channels last after the Transpose
    between = [
        node("Relu", "c", "r"),
        node("MaxPool", "r", "p", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("AveragePool", "p", "a", kernel_shape=[2, 2], strides=[2, 2]),
        node("LeakyRelu", "a", "l"),
        node("Add", "l a", "s"),
        node("Transpose", "s", "t", perm=[0, 2, 3, 1]),
        node("Flatten", "t", "f"),
    ]
    carried = {name: gauge(scale, 0.0, 4) for name in "crpals"}
    carried["t"] = gauge(scale, 0.0, 4, axis=3)
    carried["f"] = gauge(per_feature, 0.0, 2)
    nodes = [
        node("Conv", "x w", "c", pads=[1, 1, 1, 1]),
        *between,
        node("Gemm", "f d", "out", transB=1),
    ]
    return Fold(
        nodes=nodes,
        folded_nodes=nodes,
        weights={"w": weight, "d": dense},
        folded_weights={
            "w": f32(weight * along(scale, 4, 0)),
            "d": f32(dense / per_feature[None, :]),
        },
        x=(2, 3, 8, 8),
        gauges=carried,
    )


def joined() -> Fold:
    """Two convolutions into a Concat, and a sum whose shifts add up."""
    first, second = np.array([2.0, 4.0]), np.array([0.5, 0.25, 8.0])
    weights = {"w1": draw(1, 2, 3, 1, 1), "w2": draw(2, 3, 3, 1, 1), "w3": draw(3, 5, 3, 1, 1),
               "w4": draw(4, 2, 5, 1, 1)}  # fmt: skip
    both = np.concatenate([first, second])
    o1, o3 = np.arange(5.0), np.arange(5.0)[::-1].copy()
    nodes = [
        node("Conv", "x w1", "c1"),
        node("Conv", "x w2", "c2"),
        node("Concat", "c1 c2", "j", axis=1),
        node("Conv", "x w3", "c3"),
        node("Add", "j c3", "s"),
        node("Conv", "s w4", "out"),
    ]
    folded_nodes = [
        node("Conv", "x w1 b1", "c1"),
        node("Conv", "x w2 b2", "c2"),
        *nodes[2:3],
        node("Conv", "x w3 b3", "c3"),
        nodes[4],
        node("Conv", "s w4 b4", "out"),
    ]
    origin = o1 + o3
    return Fold(
        nodes=nodes,
        folded_nodes=folded_nodes,
        weights=weights,
        folded_weights={
            "w1": f32(weights["w1"] * along(first, 4, 0)),
            "b1": f32(-first * o1[:2]),
            "w2": f32(weights["w2"] * along(second, 4, 0)),
            "b2": f32(-second * o1[2:]),
            "w3": f32(weights["w3"] * along(both, 4, 0)),
            "b3": f32(-both * o3),
            "w4": f32(weights["w4"] / along(both, 4, 1)),
            "b4": f32(np.einsum("oihw,i->o", weights["w4"].astype(np.float64), origin)),
        },
        x=("N", 3, "H", "W"),
        gauges={
            "c1": gauge(first, o1[:2], 4),
            "c2": gauge(second, o1[2:], 4),
            "j": gauge(both, o1, 4),
            "c3": gauge(both, o3, 4),
            "s": gauge(both, origin, 4),
        },
    )


def zero_gamma() -> Fold:
    """gamma = 0 makes a channel the constant beta: written in front, or known behind."""
    bn = normalization(4)
    bn["gamma"][1] = 0.0
    slope, shift = affine(bn)
    weight, after = draw(1, 4, 3, 3, 3), draw(2, 2, 4, 1, 1)
    live = slope != 0
    scale = np.where(live, slope, 0.0)
    origin = np.where(live, -shift / np.where(live, slope, 1.0), shift)
    return Fold(
        nodes=[
            node("Conv", "x w", "c"),
            node("BatchNormalization", f"c {BN}", "n", epsilon=EPS),
            node("Conv", "n v", "out"),
        ],
        folded_nodes=[node("Conv", "x w b", "n"), node("Conv", "n v", "out")],
        weights={"w": weight, "v": after, **bn},
        folded_weights={"w": f32(weight * along(slope, 4, 0)), "b": f32(shift), "v": after},
        x=(1, 3, 6, 6),
        gauges={"c": gauge(scale, origin, 4)},
        aliases={"c": "n"},
    )


def zero_gamma_known() -> Fold:
    """BN -> Conv with gamma = 0: whoever reads the channel takes the constant from the gauge."""
    bn = normalization(4)
    bn["gamma"][2] = 0.0
    slope, shift = affine(bn)
    live = slope != 0
    scale = np.where(live, 1 / np.where(live, slope, 1.0), np.inf)
    weight = draw(1, 3, 4, 1, 1)
    return Fold(
        nodes=[
            node("BatchNormalization", f"x {BN}", "n", epsilon=EPS),
            node("Identity", "n", "i"),
            node("Conv", "i w", "out"),
        ],
        folded_nodes=[node("Identity", "x", "i"), node("Conv", "i w b", "out")],
        weights={"w": weight, **bn},
        folded_weights={
            "w": f32(weight * along(slope, 4, 1)),
            "b": f32(np.einsum("oihw,i->o", weight.astype(np.float64), shift)),
        },
        x=(1, 4, 3, 3),
        gauges={"n": gauge(scale, shift, 4), "i": gauge(scale, shift, 4)},
        aliases={"n": "x"},
    )


def bn_that_stays() -> Fold:
    """A gauge in front of a BN that is read twice: its constants absorb it."""
    bn, weight = normalization(3), draw(1, 3, 3, 1, 1)
    scale, origin = np.array([2.0, -3.0, 0.1]), np.array([0.3, 0.0, -2.0])
    slope, shift = affine(bn)
    new = {
        "gamma": f32(bn["gamma"] / scale),
        "mean": np.zeros(3, np.float32),
        "beta": f32(slope * origin + shift),
        "var": bn["var"],
    }
    nodes = [
        node("Conv", "x w", "c"),
        node("BatchNormalization", f"c {BN}", "n", epsilon=EPS),
        node("Sigmoid", "n", "out"),
    ]
    return Fold(
        nodes=nodes,
        folded_nodes=[node("Conv", "x w b", "c"), *nodes[1:]],
        weights={"w": weight, **bn},
        folded_weights={"w": f32(weight * along(scale, 4, 0)), "b": f32(-scale * origin), **new},
        x=(1, 3, 2, 2),
        gauges={"c": gauge(scale, origin, 4)},
    )


def subnormal_gamma() -> Fold:
    """Dead channels of real checkpoints: gamma and variance below the normal floats."""
    fold = bn_that_stays()
    tiny = {"gamma": np.float32([-6e-41, 1, 1]), "var": np.float32([5.6e-45, 1, 1])}
    scale, origin = np.array([2.0, -3.0, 0.1]), np.array([0.3, 0.0, -2.0])
    bn = {**{name: fold.weights[name] for name in BN.split()}, **tiny}
    slope, shift = affine(bn)
    new = {**tiny, "gamma": f32(tiny["gamma"] / scale), "beta": f32(slope * origin + shift)}
    return replace(fold, weights={**fold.weights, **tiny},
                   folded_weights={**fold.folded_weights, **new})  # fmt: skip


def decomposed_bn() -> Fold:
    """Mul and Add by constants, removed into the convolution in front."""
    weight, m, a = draw(1, 3, 3, 3, 3), draw(2, 3, 1, 1), draw(3, 1, 3, 1, 1)
    slope, shift = m.astype(np.float64).ravel(), a.astype(np.float64).ravel()
    return Fold(
        nodes=[
            node("Conv", "x w", "c"),
            node("Mul", "m c", "n"),
            node("Add", "n a", "s"),
            node("Relu", "s", "out"),
        ],
        folded_nodes=[node("Conv", "x w b", "c"), node("Relu", "c", "out")],
        weights={"w": weight, "m": m, "a": a},
        folded_weights={"w": f32(weight * along(slope, 4, 0)), "b": f32(shift)},
        x=(1, 3, 5, 5),
        gauges={"c": gauge(slope, -shift / slope, 4), "n": gauge(1.0, -shift, 4)},
        aliases={"n": "c", "s": "c"},
    )


def clamp() -> Fold:
    """BN and Relu of both signs become one clamp per channel (DenseNet)."""
    bn, weight = normalization(4), draw(1, 2, 4, 1, 1)
    bn["gamma"] = np.abs(bn["gamma"])
    slope, shift = affine(bn)
    low = -shift / slope
    return Fold(
        nodes=[
            node("Sigmoid", "x", "p"),
            node("BatchNormalization", f"p {BN}", "n", epsilon=EPS),
            node("Relu", "n", "r"),
            node("Conv", "r w", "out"),
        ],
        folded_nodes=[
            node("Sigmoid", "x", "p"),
            node("Max", "p low", "r"),
            node("Conv", "r w b", "out"),
        ],
        weights={"w": weight, **bn},
        folded_weights={
            "low": f32(along(low, 4)),
            "w": f32(weight * along(slope, 4)),
            "b": f32(np.einsum("oihw,i->o", weight.astype(np.float64), shift)),
        },
        x=(1, 4, 6, 6),
        gauges={"n": gauge(1 / slope, shift, 4), "r": gauge(1 / slope, shift, 4)},
        aliases={"n": "p"},
    )


def embedding() -> Fold:
    """The table of a Gather absorbs the BN behind it; every row is looked at."""
    bn, table = normalization(4), draw(1, 50, 4)
    slope, shift = affine(bn)
    return Fold(
        nodes=[
            node("Cast", "x", "i", to=TensorProto.INT64),
            node("Gather", "table i", "e"),
            node("BatchNormalization", f"e {BN}", "out", epsilon=EPS),
        ],
        folded_nodes=[
            node("Cast", "x", "i", to=TensorProto.INT64),
            node("Gather", "table i", "out"),
        ],
        weights={"table": table, **bn},
        folded_weights={"table": f32(table * slope + shift)},
        x=("N",),
        gauges={"e": gauge(slope, -shift / slope, 2)},
        aliases={"e": "out"},
    )


def padded_by_hand() -> Fold:
    """BN -> padded Conv, shift / scale the same everywhere: a Pad with the value that means 0."""
    weight = draw(1, 4, 4, 3, 3)
    bn = {
        "gamma": np.array([1, 2, -1, -2], np.float32),
        "beta": np.zeros(4, np.float32),
        "mean": np.full(4, -0.5, np.float32),
        "var": np.array([1, 4, 1, 0.25], np.float32),
    }
    slope, shift = affine(bn)
    return Fold(
        nodes=[
            node("BatchNormalization", f"x {BN}", "n", epsilon=EPS),
            node("Conv", "n w", "out", pads=[1, 1, 1, 1]),
        ],
        folded_nodes=[
            node("Pad", "x pads value", "padded"),
            node("Conv", "padded w b", "out"),
        ],
        weights={"w": weight, **bn},
        folded_weights={
            "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
            "value": np.array(-0.5, np.float32),
            "w": f32(weight * along(slope, 4, 1)),
            "b": f32(np.einsum("oihw,i->o", weight.astype(np.float64), shift)),
        },
        x=(2, 4, 5, 5),
        gauges={"n": gauge(1 / slope, shift, 4)},
        aliases={"n": "x"},
    )


def shuffled() -> Fold:
    """A channel shuffle: Reshape, Transpose, Reshape with computed batch size."""
    scale = np.array([2.0, 3.0, 5.0, 7.0, 11.0, 13.0])
    order = np.arange(6).reshape(2, 3).T.ravel()
    weights = {"w": draw(1, 6, 6, 1, 1), "v": draw(2, 6, 6, 1, 1), "zero": np.array([0]),
               "tail1": np.array([2, 3, 4, 4]), "tail2": np.array([6, 4, 4])}  # fmt: skip
    nodes = [
        node("Conv", "x w", "c"),
        node("Shape", "c", "shape"),
        node("Gather", "shape zero", "batch"),
        node("Concat", "batch tail1", "s1", axis=0),
        node("Concat", "batch tail2", "s2", axis=0),
        node("Reshape", "c s1", "r1"),
        node("Transpose", "r1", "t", perm=[0, 2, 1, 3, 4]),
        node("Reshape", "t s2", "r2"),
        node("Conv", "r2 v", "out"),
    ]
    grid = scale.reshape(1, 2, 3, 1, 1)
    zero5 = np.zeros((1, 1, 1, 1, 1))
    return Fold(
        nodes=nodes,
        folded_nodes=nodes,
        weights=weights,
        folded_weights={
            **weights,
            "w": f32(weights["w"] * along(scale, 4, 0)),
            "v": f32(weights["v"] / along(scale[order], 4, 1)),
        },
        x=("N", 6, 4, 4),
        gauges={
            "c": gauge(scale, 0.0, 4),
            "r1": Gauge(grid, zero5),
            "t": Gauge(grid.swapaxes(1, 2), zero5),
            "r2": gauge(scale[order], 0.0, 4),
        },
    )


def half_precision() -> Fold:
    fold = conv_then_bn()
    weights = {name: value.astype(np.float16) for name, value in fold.weights.items()}
    bn = {name: weights[name] for name in BN.split()}
    slope, shift = affine(bn)
    return replace(
        fold,
        weights=weights,
        folded_weights={
            "w": (weights["w"].astype(np.float64) * along(slope, 4, 0)).astype(np.float16),
            "b": (slope * weights["b"] + shift).astype(np.float16),
        },
        gauges={"c": gauge(slope, -shift / slope, 4)},
        float_type=TensorProto.FLOAT16,
    )


def bn_then_lstm() -> Fold:
    """Two directions; every extent of the weights but the input's is another."""
    bn = normalization(4)
    slope, shift = affine(bn)
    weights = {"w": draw(1, 2, 12, 4), "r": draw(2, 2, 12, 3), "b": draw(3, 2, 24)}
    bias = weights["b"].astype(np.float64)
    bias[:, :12] += weights["w"].astype(np.float64) @ shift
    lstm = {"hidden_size": 3, "direction": "bidirectional"}
    return Fold(
        nodes=[
            node("BatchNormalization", f"x {BN}", "n", epsilon=EPS),
            node("Transpose", "n", "t", perm=[2, 0, 1]),
            node("LSTM", "t w r b", "out", **lstm),
        ],
        folded_nodes=[
            node("Transpose", "x", "t", perm=[2, 0, 1]),
            node("LSTM", "t w r b", "out", **lstm),
        ],
        weights={**weights, **bn},
        folded_weights={**weights, "w": f32(weights["w"] * slope), "b": f32(bias)},
        x=(2, 4, 5),
        gauges={"n": gauge(1 / slope, shift, 3), "t": gauge(1 / slope, shift, 3, axis=2)},
        aliases={"n": "x"},
    )


RIGHT: dict[str, Callable[[], Fold]] = {
    "Conv -> BN, grouped, padded": conv_then_bn,
    "Conv -> BN, depthwise": lambda: conv_then_bn(group=6),
    "BN -> Conv, unpadded": bn_then_conv,
    "ConvTranspose -> BN, grouped": conv_transpose_then_bn,
    "BN -> ConvTranspose, no shift": lambda: bn_then_conv_transpose(shifted=False),
    "Gemm -> BN, alpha, beta, transB": gemm_then_bn,
    "MatMul -> BN as Gemm": lambda: matmul_then_bn("gemm"),
    "MatMul -> BN with an Add": lambda: matmul_then_bn("add"),
    "MatMul + Add as Gemm": matmul_add_becomes_gemm,
    "W x -> BN": tokens_then_bn,
    "scale through Relu, pools, Add, Transpose, Flatten": long_way,
    "Concat and Add with shifts": joined,
    "gamma = 0 in front": zero_gamma,
    "gamma = 0 behind": zero_gamma_known,
    "BN that stays": bn_that_stays,
    "BN that stays, dead channel": subnormal_gamma,
    "decomposed BN": decomposed_bn,
    "BN and Relu as a clamp": clamp,
    "Embedding -> BN": embedding,
    "BN -> LSTM": bn_then_lstm,
    "BN -> padded Conv with a Pad": padded_by_hand,
    "channel shuffle with dynamic batch": shuffled,
    "float16": half_precision,
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_fold_is_certified(name: str) -> None:
    certificate = RIGHT[name]().certify()
    assert certificate.passed, [record.sentence for record in certificate.failures]
    assert certificate.worst.ulps <= 1


def test_an_epsilon_that_is_not_written_is_a_float32() -> None:
    fold = conv_then_bn()
    bare = [onnx.NodeProto.FromString(n.SerializeToString()) for n in fold.nodes]
    del bare[1].attribute[:]
    assert replace(fold, nodes=bare).certify().passed


def test_weights_of_an_lstm_are_read_not_probed() -> None:
    checks = {record.op_type: record.check for record in bn_then_lstm().certify().records}
    assert checks["LSTM"] == "weights"


def swapped(values: Array) -> Array:
    values = values.copy()
    values[[0, 1]] = values[[1, 0]]
    return values


def one_off(values: Array, factor: float, index: int = 1) -> Array:
    values = values.copy()
    values[index] *= factor
    return values


def one_ulp(values: Array) -> Array:
    values = values.copy()
    values.flat[3] = np.nextafter(values.flat[3], np.inf, dtype=np.float32)
    return values


def changed(fold: Fold, name: str, change: Callable[[Array], Array]) -> Fold:
    return fold.with_weights(**{name: change(fold.folded_weights[name])})


def with_node(fold: Fold, index: int, *new: onnx.NodeProto) -> Fold:
    nodes = list(fold.folded_nodes)
    nodes[index : index + 1] = new
    return replace(fold, folded_nodes=nodes)


def padded_average(count_include_pad: int) -> Fold:
    """A shift through an average that counts its zero padding."""
    scale, origin = np.array([1.0, 2.0]), np.array([0.5, 0.0])
    weights = {"w": draw(1, 2, 2, 1, 1), "v": draw(2, 1, 2, 1, 1)}
    pool = node("AveragePool", "c", "p", kernel_shape=[3, 3], pads=[1, 1, 1, 1],
                count_include_pad=count_include_pad)  # fmt: skip
    shift = np.einsum("oihw,i->o", weights["v"].astype(np.float64), origin)
    return Fold(
        nodes=[node("Conv", "x w", "c"), pool, node("Conv", "p v", "out")],
        folded_nodes=[node("Conv", "x w b", "c"), pool, node("Conv", "p v d", "out")],
        weights=weights,
        folded_weights={
            "w": f32(weights["w"] * along(scale, 4, 0)),
            "b": f32(-scale * origin),
            "v": f32(weights["v"] / along(scale, 4, 1)),
            "d": f32(shift),
        },
        x=(1, 2, 8, 8),
        gauges={"c": gauge(scale, origin, 4), "p": gauge(scale, origin, 4)},
    )


BELIEVED = {
    "variance * 0.999": {"var": normalization(6)["var"] * np.float32(0.999)},
    "mean with the wrong sign": {"mean": -normalization(6)["mean"]},
    "one gamma off by 1e-3": {"gamma": one_off(normalization(6)["gamma"], 1.001)},
    "two channels of gamma swapped": {"gamma": swapped(normalization(6)["gamma"])},
    "two channels of beta swapped": {"beta": swapped(normalization(6)["beta"])},
}

# fault -> (the fold, the node that must be named)
WRONG: dict[str, tuple[Callable[[], Fold], str]] = {
    "eps dropped": (lambda: conv_then_bn(0.0), "Conv_c"),
    "eps dropped in the plan too": (
        lambda: conv_then_bn(0.0, plan_too=True), "BatchNormalization_n"),
    "eps 1e-3 for 1e-5": (lambda: conv_then_bn(1e-3), "Conv_c"),
    "eps as a double": (lambda: conv_then_bn(2 * EPS), "Conv_c"),
    **{fault: (lambda b=b: conv_then_bn(believed=b), "Conv_c") for fault, b in BELIEVED.items()},
    **{f"{fault}, in the plan too": (
        lambda b=b: conv_then_bn(believed=b, plan_too=True), "BatchNormalization_n")
       for fault, b in BELIEVED.items()},
    "weights rounded to float16": (
        lambda: changed(conv_then_bn(), "w", lambda w: w.astype(np.float16).astype(np.float32)),
        "Conv_c"),
    "one weight one ULP off": (lambda: changed(conv_then_bn(), "w", one_ulp), "Conv_c"),
    "one bias one ULP off": (lambda: changed(conv_then_bn(), "b", one_ulp), "Conv_c"),
    "one weight NaN": (lambda: changed(conv_then_bn(), "w", lambda w: one_off(w, np.nan)),
                       "Conv_c"),
    "two output channels swapped": (lambda: changed(conv_then_bn(), "w", swapped), "Conv_c"),
    "old bias forgotten": (
        lambda: changed(conv_then_bn(), "b", lambda _: f32(affine(normalization(6))[1])),
        "Conv_c"),
    "shift through zero padding": (lambda: bn_then_conv([1, 1, 1, 1]), "Conv_out"),
    "wrong axis of a square weight": (lambda: bn_then_conv(axis=0), "Conv_out"),
    "kernel axis for channel axis": (lambda: bn_then_conv(axis=3), "Conv_out"),
    "groups of ConvTranspose transposed": (
        lambda: changed(conv_transpose_then_bn(), "w",
                        lambda w: w.reshape(2, 2, 3, 3, 3)[::-1].reshape(w.shape).copy()),
        "ConvTranspose_c"),
    "shift into ConvTranspose": (lambda: bn_then_conv_transpose(shifted=True),
                                 "ConvTranspose_out"),
    "beta of Gemm forgotten": (
        lambda: changed(gemm_then_bn(), "b", lambda b: f32(2 * b)), "Gemm_c"),
    "rows for columns of Gemm": (
        lambda: changed(gemm_then_bn(), "w", lambda w: w.T.copy()), "Gemm_c"),
    "bias of the added Add off": (
        lambda: changed(matmul_then_bn("add"), "b", lambda b: one_off(b, 1.001)), "MatMul_c"),
    "bias along the wrong axis": (
        lambda: changed(tokens_then_bn(), "b", lambda b: b.reshape(1, 1, 4).copy()), "MatMul_c"),
    "negative scale through Relu": (lambda: long_way(np.array([2.0, -0.5, 3.0, 0.7])), "Relu_r"),
    "order of Flatten mistaken": (
        lambda: replace(long_way(), gauges={
            **long_way().gauges, "f": gauge(np.repeat([2.0, 0.5, 3.0, 0.7], 4), 0.0, 2)}),
        "Flatten_f"),
    "branches of Concat mistaken": (
        lambda: replace(joined(), gauges={
            **joined().gauges, "j": gauge([0.5, 0.25, 8.0, 2.0, 4.0], np.arange(5.0), 4)}),
        "Concat_j"),
    "shifts of Add not added": (
        lambda: replace(joined(), gauges={
            **joined().gauges, "s": gauge(joined().gauges["s"].scale.ravel(), 0.0, 4)}),
        "Add_s"),
    "shift through counted padding": (lambda: padded_average(1), "AveragePool_p"),
    "channel shuffle not followed": (
        lambda: replace(shuffled(), gauges={
            **shuffled().gauges, "r2": shuffled().gauges["c"]}),
        "Reshape_r2"),
    "constant written wrong": (
        lambda: changed(zero_gamma(), "b", lambda b: one_off(b, 1.001)), "Conv_c"),
    "a constant that is none": (
        lambda: replace(bn_then_conv(), gauges={
            "n": gauge([np.inf, 1, 1, 1], 0.0, 4)}), "BatchNormalization_n"),
    "known constant read wrong": (
        lambda: replace(zero_gamma_known(), gauges={
            **zero_gamma_known().gauges,
            "i": gauge(zero_gamma_known().gauges["i"].scale.ravel(), 0.0, 4)}),
        "Identity_i"),
    "gamma of the BN that stays": (
        lambda: changed(bn_that_stays(), "gamma", lambda g: one_off(g, 1.00001)),
        "BatchNormalization_n"),
    "beta of the BN that stays": (
        lambda: changed(bn_that_stays(), "beta", lambda g: one_off(g, 1.00001)),
        "BatchNormalization_n"),
    "factor of a decomposed BN": (
        lambda: changed(decomposed_bn(), "w", lambda w: one_off(w, -1)), "Conv_c"),
    "clamp a little off": (
        lambda: changed(clamp(), "low", lambda low: one_off(low, 1.0001, (0, 1))), "Relu_r"),
    "one row of a table": (
        lambda: changed(embedding(), "table", lambda t: one_off(t, 1.00001, 40)), "Gather_e"),
    "input weight of an LSTM one ULP off": (
        lambda: changed(bn_then_lstm(), "w", one_ulp), "LSTM_out"),
    "shift into one direction of an LSTM": (
        lambda: changed(bn_then_lstm(), "b", lambda b: np.stack([b[0], draw(3, 2, 24)[1]])),
        "LSTM_out"),
    "recurrent weight of an LSTM": (
        lambda: changed(bn_then_lstm(), "r", lambda r: one_off(r, 1.001)), "LSTM_out"),
    "padding with zero": (
        lambda: changed(padded_by_hand(), "value", np.zeros_like), "Conv_out"),
    "another stride": (
        lambda: with_node(conv_then_bn(), 0, node(
            "Conv", "x w b", "c", pads=[1, 1, 1, 1], group=2, strides=[2, 2])), "Conv_c"),
    "Relu gone": (
        lambda: with_node(conv_then_bn(), 1, node("Identity", "c", "out")), "Relu_out"),
    "Relu twice": (
        lambda: with_node(conv_then_bn(), 0, node("Conv", "x w b", "d", pads=[1, 1, 1, 1], group=2),
                          node("Relu", "d", "c")), "Conv_c"),
    "another source": (
        lambda: with_node(long_way(), 6, node("Transpose", "l", "t", perm=[0, 2, 3, 1])),
        "Transpose_t"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_planted_fault_is_found_at_its_node(fault: str) -> None:
    make, where = WRONG[fault]
    certificate = make().certify()
    assert not certificate.passed
    assert where in [record.node for record in certificate.failures]
    assert all(record.sentence.endswith(".") for record in certificate.failures)


def test_uncounted_padding_lets_a_shift_pass() -> None:
    assert padded_average(0).certify().passed


# ------------------------------------------------------------------------- what else may go wrong


def test_depth_is_no_limit() -> None:
    """Real networks are a thousand nodes deep, deeper than a stack of calls."""
    fold = conv_then_bn()
    deep = [node("Relu", f"r{i}", f"r{i + 1}") for i in range(1500)]
    deep[0].input[0], deep[-1].output[0] = "n", "out"
    folded_deep = [onnx.NodeProto.FromString(relu.SerializeToString()) for relu in deep]
    folded_deep[0].input[0] = "c"
    deepened = replace(
        fold,
        nodes=[*fold.nodes[:-1], *deep],
        folded_nodes=[*fold.folded_nodes[:-1], *folded_deep],
    )
    assert deepened.certify().passed


def test_every_node_is_accounted_for() -> None:
    records = conv_then_bn().certify().records
    assert [record.op_type for record in records] == ["graph", "Conv", "BatchNormalization", "Relu"]
    assert [record.check for record in records] == [
        "interface", "weights", "channel map", "unchanged",
    ]  # fmt: skip


def spoil_output_name(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "other"


def spoil_input_type(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def spoil_input_shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3


def spoil_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 16


def spoil_outputs(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))


@pytest.mark.parametrize(
    "spoil",
    [spoil_output_name, spoil_input_type, spoil_input_shape, spoil_opset, spoil_outputs],
)
def test_another_interface_is_refused(spoil: Callable[[onnx.ModelProto], None]) -> None:
    fold = conv_then_bn()
    original, folded = fold.models()
    spoil(folded)
    certificate = certify(original, folded, fold.gauges, fold.aliases)
    assert not certificate.passed
    assert certificate.worst is not None
    assert certificate.worst.check == "interface"


def test_gauge_at_the_border_is_refused() -> None:
    fold = conv_then_bn()
    gauges = {**fold.gauges, "x": gauge(np.full(6, 2.0), 0.0, 4)}
    assert not certify(*fold.models(), gauges, fold.aliases).passed


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_gauge_that_is_no_number_is_refused(wrong: float) -> None:
    fold = conv_then_bn()
    spoiled = Gauge(fold.gauges["c"].scale, np.full((1, 6, 1, 1), wrong))
    certificate = certify(*fold.models(), {"c": spoiled}, fold.aliases)
    assert "no number" in certificate.failures[0].sentence


def test_missing_tensor_is_named() -> None:
    fold = with_node(conv_then_bn(), 0)
    certificate = fold.certify()
    assert any("no tensor 'c'" in record.sentence for record in certificate.failures)


def test_node_without_a_gauge_must_keep_its_constants() -> None:
    fold = matmul_add_becomes_gemm()
    assert not changed(fold, "w", one_ulp).certify().passed
    assert not changed(fold, "b", one_ulp).certify().passed


def test_node_without_a_gauge_must_keep_its_attributes() -> None:
    nodes = [node("LeakyRelu", "x", "out", alpha=0.1)]
    other = [node("LeakyRelu", "x", "out", alpha=0.2)]
    fold = Fold(nodes, other, {}, {}, (2, 3))
    assert not fold.certify().passed
    assert replace(fold, folded_nodes=nodes).certify().passed


def test_weights_in_a_coarser_dtype_are_refused() -> None:
    fold = conv_then_bn()
    coarse = with_node(
        fold.with_weights(h=fold.folded_weights["w"].astype(np.float16)),
        0,
        node("Cast", "h", "v", to=TensorProto.FLOAT),
        node("Conv", "x v b", "c", pads=[1, 1, 1, 1], group=2),
    )
    assert [record.node for record in coarse.certify().failures] == ["Conv_c"]


def listed(model: onnx.ModelProto, name: str, ir_version: int = 8) -> onnx.ModelProto:
    """The model with an initializer that is an input too."""
    value = next(t for t in model.graph.initializer if t.name == name)
    model.graph.input.append(helper.make_tensor_value_info(name, value.data_type, list(value.dims)))
    model.ir_version = ir_version
    return model


def test_default_that_a_caller_may_replace_must_stay() -> None:
    fold = conv_then_bn()
    original, folded = fold.models()
    both = certify(listed(original, "w"), listed(folded, "w"), fold.gauges, fold.aliases)
    assert "default of the input 'w'" in both.failures[0].sentence


def test_default_that_was_frozen_is_a_constant() -> None:
    fold = conv_then_bn()
    original, folded = fold.models()
    assert certify(listed(original, "w"), folded, fold.gauges, fold.aliases).passed


def test_before_ir_4_a_listed_initializer_is_a_constant() -> None:
    fold = conv_then_bn()
    original, folded = fold.models()
    certificate = certify(
        listed(original, "w", 3), listed(folded, "w", 3), fold.gauges, fold.aliases
    )
    assert certificate.passed


def branching(fold: Fold, weights: Weights, folded: bool) -> onnx.ModelProto:
    """The fold's nodes inside the branch of an If, reading an outer value and outer constants."""
    nodes = list(fold.folded_nodes if folded else fold.nodes)
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    other = helper.make_tensor_value_info("other", TensorProto.FLOAT, None)
    then = helper.make_graph(nodes, "then", [], [result])
    otherwise = helper.make_graph([node("Relu", "x", "other")], "else", [], [other])
    whole = helper.make_node("If", ["flag"], ["y"], name="If_y", then_branch=then,
                             else_branch=otherwise)  # fmt: skip
    graph = helper.make_graph(
        [whole],
        "g",
        [
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, fold.x),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_fold_inside_a_branch_is_certified_and_its_fault_found() -> None:
    fold = conv_then_bn()
    original = branching(fold, fold.weights, folded=False)
    right = branching(fold, fold.folded_weights, folded=True)
    wrong = branching(changed(fold, "w", swapped), changed(fold, "w", swapped).folded_weights, True)
    assert certify(original, right, fold.gauges, fold.aliases).passed
    certificate = certify(original, wrong, fold.gauges, fold.aliases)
    assert certificate.failures[0].node == "If_y"
    assert "Conv_c" in certificate.failures[0].sentence


def test_nothing_is_shared_with_the_folder() -> None:
    sources = Path(bnfold.__file__).parent / "proof"
    for name in ("certificate", "counterpart", "equations", "probe", "shapes", "reference"):
        text = next(sources.rglob(f"{name}.py")).read_text()
        assert "torch" not in text.split("def ")[0]
        assert "bnfold.folding" not in text
        assert "bnfold.graph" not in text


def test_shapes_follow_arithmetic_that_inference_leaves_out() -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s last", "w"),
        node("Div", "w two", "half"),
        node("Concat", "zero minus half two", "target", axis=0),
        node("Reshape", "x target", "r"),
        node("Relu", "r", "out"),
    ]
    weights = {
        "last": np.array([3]), "two": np.array([2]), "zero": np.array([0]), "minus": np.array([-1])
    }  # fmt: skip
    original, _ = Fold(nodes, nodes, weights, weights, ("N", 3, "H", "W")).models()
    shapes = Shapes(original)
    assert shapes.integer("target") is not None
    assert shapes.of("out") == ValueType(TensorProto.FLOAT, (2, 3 * 224, 112, 2))
    small = Shapes(original, {"x": (1, 3, 6, 8)})
    assert small.of("out") == ValueType(TensorProto.FLOAT, (1, 3 * 6, 4, 2))
