"""The law of folding for nodes in a chain: a Pad and a convolution, two convolutions, as one."""

# a table is read by its columns
# fmt: off

from __future__ import annotations

from typing import Any

import numpy as np

from tests.law_models import Law

X = "x[4,4,4,4]"  # square: as many samples as channels, rows and columns
PAD = "pads=[1,1,1,1]"
P = "P{0,0,1,1,0,0,1,1}"


def _chain(name: str, graph: str, removed: int, merges: int = 1, kept: tuple[str, ...] = (), **more: Any) -> Law:
    return Law(f"chain, {name}", "", graph, removed, kept, merges=merges, clean_up=("pad", "conv-chain"), **more)


def _pad(name: str, graph: str, removed: int = 0, merges: int = 1, kept: tuple[str, ...] = (), **more: Any) -> Law:
    return _chain(f"pad, {name}", graph, removed, merges, kept, **more)


CHAIN_LAWS = [
    _pad("conv", f"{X} > y; p = Pad(x, {P}); y = Conv(p, W[4,4,3,3], B[4])"),
    _pad("uneven", f"{X} > y; p = Pad(x, P{{0,0,0,1,0,0,2,1}}); y = Conv(p, W[4,4,3,2])"),
    _pad("padded conv", f"{X} > y; p = Pad(x, P{{0,0,1,0,0,0,0,2}}); y = Conv<pads=[0,1,1,0]>(p, W[4,4,3,3])"),
    _pad("strides, dilations, groups", f"{X} > y; p = Pad(x, {P}); y = Conv<strides=[2,1], dilations=[1,2], group=2>(p, W[4,2,3,3])"),
    _pad("VALID conv", f'{X} > y; p = Pad(x, {P}); y = Conv<auto_pad="VALID">(p, W[4,4,3,3])'),
    _pad("number 0", f"{X} > y; p = Pad(x, {P}, Z); y = Conv(p, W[4,4,3,3])", constants={"Z": np.float32(0)}),
    _pad("axes", f"{X} > y; p = Pad(x, P{{1,2,2,1}}, , A{{2,-1}}); y = Conv(p, W[4,4,3,3])"),
    _pad("one axis", f"{X} > y; p = Pad(x, P{{1,2}}, , A{{-1}}); y = Conv(p, W[4,4,3,3])"),
    _pad("attribute", f"{X} > y; p = Pad<pads=[0,0,1,1,0,0,1,1]>(x); y = Conv(p, W[4,4,3,3])", opset=10, ir_version=5),
    _pad("attribute with a 0", f"{X} > y; p = Pad<pads=[0,0,1,1,0,0,1,1], value=0.0>(x); y = Conv(p, W[4,4,3,3])", opset=9, ir_version=4),
    _pad("1-D", "x[4,4,4] > y; p = Pad(x, P{0,0,1,0,0,2}); y = Conv(p, W[4,4,3])"),
    _pad("3-D", "x[2,2,2,2,2] > y; p = Pad(x, P{0,0,1,0,1,0,0,1,0,0}); y = Conv(p, W[2,2,2,2,2])"),
    _pad("conv, bn", f"{X} > y; p = Pad(x, {P}); c = Conv(p, W[4,4,3,3]); y = BN4:alt0(c)", 1),
    _pad("bn of scale in front", f"{X} > y; b = BN4:altscale(x); p = Pad(b, {P}); y = Conv(p, W[4,4,3,3])", 1),
    _pad("bn in front", f"{X} > y; b = BN4(x); p = Pad(b, {P}); y = Conv(p, W[4,4,3,3])", kept=("pads",)),
    _pad("conv, bn, pad, conv", f"{X} > y; c = Conv(x, V[4,4,1,1]); b = BN4(c); p = Pad(b, {P}); y = Conv(p, W[4,4,3,3])", 1),
    _pad("shared weight", f"{X} > y z; p = Pad(x, {P}); y = Conv(p, W[4,4,3,3]); z = Conv<{PAD}>(x, W)"),
    _pad("a pad of each of two", f"{X} > y z; p = Pad(x, {P}); y = Conv(p, W[4,4,3,3]); q = Pad(x, {P}); z = Conv(q, V[4,4,3,3])", 0, 2),
    _pad("free size", "x[N,4,H,W] > y; p = Pad(x, P{0,0,1,1,0,0,1,1}); y = Conv(p, V[4,4,3,3])"),
    _pad("branches beside it", f"{X} > y; p = Pad(x, {P}); a = Conv(p, W[4,4,3,3]); i = BN4(x); s = Add(a, i); y = Relu(s)", 1, 1),
    _pad("pad, bn, conv", f"{X} > y; p = Pad(x, {P}); b = BN4:alt0(p); y = Conv(b, W[4,4,3,3], B[4])", 1),
    _pad("pad, bn, padded conv, a shift in between", f"{X} > y; p = Pad(x, {P}); b = BN4(p); y = Conv<{PAD}>(b, W[4,4,3,3], B[4])", 0, 0, ("pads",)),
    _pad("pad, scale, padded conv", f"{X} > y; p = Pad(x, {P}); b = BN4:altscale(p); y = Conv<{PAD}>(b, W[4,4,3,3], B[4])", 1),
    _pad("pad, a sum", f"{X} > y; p = Pad(x, {P}); c = Conv<{PAD}>(p, W[4,4,3,3], B[4]); i = BN4:altscale(p); s = Add(c, i); y = Relu(s)", 1),
    _pad("number 1", f"{X} > y; p = Pad(x, {P}, Z); y = Conv(p, W[4,4,3,3])", 0, 0, constants={"Z": np.float32(1)}),
    _pad("attribute with a number", f"{X} > y; p = Pad<pads=[0,0,1,1,0,0,1,1], value=1.5>(x); y = Conv(p, W[4,4,3,3])", 0, 0, opset=10, ir_version=5),
    _pad("reflected", f'{X} > y; p = Pad<mode="reflect">(x, {P}); y = Conv(p, W[4,4,3,3])', 0, 0),
    _pad("channels", "x[4,3,4,4] > y; p = Pad(x, P{0,1,1,1,0,0,1,1}); y = Conv(p, W[4,4,3,3])", 0, 0),
    _pad("samples", "x[3,4,4,4] > y; p = Pad(x, P{1,0,1,1,0,0,1,1}); y = Conv(p, W[4,4,3,3])", 0, 0),
    _pad("cut", f"{X} > y; p = Pad(x, P{{0,0,-1,0,0,0,1,1}}); y = Conv<{PAD}>(p, W[4,4,3,3])", 0, 0),
    _pad("SAME conv", f'{X} > y; p = Pad(x, {P}); y = Conv<auto_pad="SAME_UPPER">(p, W[4,4,3,3])', 0, 0),
    _pad("read twice", f"{X} > y z; p = Pad(x, {P}); y = Conv(p, W[4,4,3,3]); z = Relu(p)", 0, 0),
    _pad("an output", f"{X} > y p; p = Pad(x, {P}); y = Conv(p, W[4,4,3,3])", 0, 0),
    _pad("transposed conv", f"{X} > y; p = Pad(x, {P}); y = ConvTranspose(p, W[4,4,3,3])", 0, 0),
    _pad("computed weight", f"{X} w[4,4,3,3] > y; p = Pad(x, {P}); y = Conv(p, w)", 0, 0),

    _chain("1x1, 1x1", f"{X} > y; c = Conv(x, W[4,4,1,1], A[4]); y = Conv(c, V[4,4,1,1], B[4])", 0),
    _chain("1x1, 1x1, no biases", f"{X} > y; c = Conv(x, W[4,4,1,1]); y = Conv(c, V[4,4,1,1])", 0),
    _chain("1x1, 1x1, wide in between", f"{X} > y; c = Conv(x, W[8,4,1,1], A[8]); y = Conv(c, V[2,8,1,1])", 0),
    _chain("1x1, bn, 1x1", f"{X} > y; c = Conv(x, W[4,4,1,1]); b = BN4:alt0(c); y = Conv(b, V[4,4,1,1])", 1),
    _chain("1x1, 1x1, bn", f"{X} > y; c = Conv(x, W[4,4,1,1]); d = Conv(c, V[4,4,1,1]); y = BN4:alt0(d)", 1),
    _chain("bn, 1x1, bn, 1x1, bn", f"{X} > y; a = BN4(x); c = Conv(a, W[4,4,1,1]); b = BN4:alt0(c); d = Conv(b, V[4,4,1,1]); y = BN4:tla(d)", 3),
    _chain("three", f"{X} > y; c = Conv(x, W[4,4,1,1]); d = Conv(c, V[4,4,1,1], B[4]); y = Conv(d, U[4,4,1,1])", 0),
    _chain("groups", f"{X} > y; c = Conv<group=2>(x, W[4,2,1,1], A[4]); y = Conv<group=2>(c, V[4,2,1,1])", 0),
    _chain("groups and depthwise", f"{X} > y; c = Conv<group=4>(x, W[4,1,1,1], A[4]); y = Conv<group=2>(c, V[4,2,1,1])", 0),
    _chain("depthwise 1x1 and dense", f"{X} > y; c = Conv<group=4>(x, W[4,1,1,1], A[4]); y = Conv(c, V[4,4,1,1])", 0),
    _chain("dense and depthwise 1x1", f"{X} > y; c = Conv<{PAD}>(x, W[4,4,3,3], A[4]); y = Conv<group=4>(c, V[4,1,1,1])", 0),
    _chain("depthwise and one channel", f"{X} > y; c = Conv<{PAD}, group=4>(x, W[4,1,3,3], A[4]); y = Conv(c, V[1,4,1,1])", 0),
    _chain("3x3, 1x1", f"{X} > y; c = Conv<{PAD}, strides=[2,2]>(x, W[4,4,3,3], A[4]); y = Conv(c, V[2,4,1,1], B[2])", 0),
    _chain("1-D", "x[4,4,4] > y; c = Conv<pads=[1,1]>(x, W[4,4,3]); y = Conv(c, V[4,4,1])", 0),
    _chain("pad, conv, 1x1", f"{X} > y; p = Pad(x, {P}); c = Conv(p, W[4,4,3,3]); y = Conv(c, V[4,4,1,1])", 0),
    _chain("a sum, 1x1", f"{X} > y; c = Conv<{PAD}>(x, W[4,4,3,3]); i = BN4(x); s = Add(c, i); y = Conv(s, V[4,4,1,1])", 1),
    _chain("a line beside x", f"{X} > y; c = Conv<{PAD}>(x, W[4,4,3,3]); d = Conv(c, V[4,4,1,1], B[4]); i = BN4(x); s = Sub(i, d); y = Relu(s)", 1),
    _chain("a sum behind", f"{X} > y; c = Conv(x, W[4,4,1,1]); b = BN4(c); d = Conv(b, V[4,4,1,1]); s = Sub(b, d); y = Relu(s)", 1),
    _chain("sums in a row", f"{X} > y; c = Conv(x, W[4,4,1,1]); s = Sub(c, x); d = Conv(s, V[4,4,1,1]); t = Add(s, d); y = BN4:alt0(t)", 1),
    _chain("depthwise and dense", f"{X} > y; c = Conv<{PAD}, group=4>(x, W[4,1,3,3]); y = Conv(c, V[4,4,1,1])", 0, 0),
    _chain("narrow in between", "x[4,8,4,4] > y; c = Conv(x, W[2,8,1,1]); y = Conv(c, V[8,2,1,1])", 0, 0),
    _chain("relu in between", f"{X} > y; c = Conv(x, W[4,4,1,1]); r = Relu(c); y = Conv(r, V[4,4,1,1])", 0, 0),
    _chain("read twice", f"{X} > y c; c = Conv(x, W[4,4,1,1]); y = Conv(c, V[4,4,1,1])", 0, 0),
    _chain("padded 1x1", f"{X} > y; c = Conv(x, W[4,4,1,1], A[4]); y = Conv<{PAD}>(c, V[4,4,1,1])", 0, 0),
    _chain("1x1 with strides", f"{X} > y; c = Conv(x, W[4,4,1,1], A[4]); y = Conv<strides=[2,2]>(c, V[4,4,1,1])", 0, 0),
    _chain("3x3 behind", f"{X} > y; c = Conv(x, W[4,4,1,1], A[4]); y = Conv(c, V[4,4,3,3])", 0, 0),
]

# a graph with a batch norm b of gamma 0, and how many of the first layer's channels are left
DEAD = {
    "written": (f"{X} > y; c = Conv(x, W[4,4,1,1]); b = BN4:alt0(c); r = Relu(b); y = Conv<{PAD}>(r, V[4,4,3,3], B[4])", 3),
    "unpadded": (f"{X} > y; c = Conv(x, W[4,4,1,1]); b = BN4:pos0(c); r = Abs(b); y = Conv(r, V[4,4,3,3], B[4])", 3),
    "behind pooling": (f"{X} > y; c = Conv(x, W[4,4,1,1]); b = BN4:pos0(c); r = LeakyRelu<alpha=0.5>(b); p = MaxPool<kernel_shape=[2,2]>(r); y = Conv(p, V[4,4,3,3], B[4])", 3),
    "all": (f"{X} > y; c = Conv(x, W[4,4,1,1]); b = BN4:all0(c); r = Abs(b); y = Conv(r, V[4,4,3,3], B[4])", 1),
    "border": (f"{X} > y; c = Conv(x, W[4,4,1,1]); b = BN4:pos0(c); r = Abs(b); y = Conv<{PAD}>(r, V[4,4,3,3], B[4])", 4),
    "no bias": (f"{X} > y; c = Conv(x, W[4,4,1,1]); b = BN4:pos0(c); r = Abs(b); y = Conv(r, V[4,4,3,3])", 4),
    "counted padding": (f"{X} > y; c = Conv(x, W[4,4,1,1]); b = BN4:pos0(c); r = Abs(b); p = AveragePool<kernel_shape=[3,3], {PAD}, count_include_pad=1>(r); y = Conv(p, V[4,4,3,3], B[4])", 4),
    "read elsewhere": (f"{X} > y r; c = Conv(x, W[4,4,1,1]); b = BN4:alt0(c); r = Relu(b); y = Conv(r, V[4,4,3,3], B[4])", 4),
    "groups": (f"{X} > y; c = Conv(x, W[4,4,1,1]); b = BN4:alt0(c); r = Relu(b); y = Conv<group=2>(r, V[4,2,3,3], B[4])", 4),
    "shared weight": (f"{X} > y z; c = Conv(x, W[4,4,1,1]); b = BN4:alt0(c); r = Relu(b); y = Conv(r, V[4,4,1,1], B[4]); z = Conv(x, V)", 4),
}
