"""The law of folding for parallel branches: sums that are one convolution, and sums that are not."""

# a table is read by its columns
# fmt: off

from __future__ import annotations

from typing import Any

import numpy as np

from tests.law_models import Law

X = "x[4,4,4,4]"  # square: as many samples as channels, rows and columns
PAD = "pads=[1,1,1,1]"


def _parallel(name: str, graph: str, removed: int, merges: int = 1, kept: tuple[str, ...] = (), **more: Any) -> Law:
    """A sum of branches of one tensor: one convolution, whatever is on the branches."""
    return Law(f"parallel, {name}", "", graph, removed, kept, merges=merges, **more)


PARALLEL = [
    _parallel("repvgg", f"{X} > y; a = Conv<{PAD}>(x, W[4,4,3,3]); m = BN4(a); b = Conv(x, V[4,4,1,1]); n = BN4:tla(b); i = BN4:alt0(x); s = Sum(m, n, i); y = Relu(s)", 3),
    _parallel("repvgg, biases", f"{X} > y; a = Conv<{PAD}>(x, W[4,4,3,3], A[4]); m = BN4(a); b = Conv(x, V[4,4,1,1], B[4]); n = BN4:tla(b); i = BN4:alt(x); s = Add(i, n); t = Add(s, m); y = Relu(t)", 3),
    _parallel("repvgg, stride", f"{X} > y; a = Conv<{PAD}, strides=[2,2]>(x, W[4,4,3,3]); m = BN4(a); b = Conv<strides=[2,2]>(x, V[4,4,1,1]); n = BN4:tla(b); s = Add(m, n); y = Relu(s)", 2),
    _parallel("mobileone, depthwise", f"{X} > y; a = Conv<{PAD}, group=4>(x, W[4,1,3,3]); m = BN4(a); b = Conv<group=4>(x, V[4,1,1,1]); n = BN4:tla(b); i = BN4:alt0(x); s = Add(n, i); t = Add(s, m); c = Conv<{PAD}, group=4>(x, U[4,1,3,3]); o = BN4:pos(c); u = Add(t, o); y = Relu(u)", 4),
    _parallel("repvit", f"{X} > y; a = Conv<{PAD}, group=4>(x, W[4,1,3,3]); m = BN4(a); b = Conv<group=4>(x, V[4,1,1,1], B[4]); s = Add(m, b); t = Add(s, x); y = BN4:alt0(t)", 2),
    _parallel("fastvit", f"{X} > y; a = Conv<{PAD}, group=4>(x, W[4,1,3,3]); m = BN4(a); i = BN4(x); p = Add(m, i); n = BN4:tla(x); d = Sub(p, n); l = Mul(d, L:pow[4,1,1]); s = Add(x, l); y = Relu(s)", 3, absorbed=1),
    _parallel("fastvit, a layer scale of 0 stays", f"{X} > y; a = Conv<{PAD}, group=4>(x, W[4,1,3,3]); i = BN4(x); p = Add(a, i); l = Mul(p, L); s = Add(x, l); y = Relu(s)", 1, absorbed=0, constants={"L": np.array([0, 2, -1, 0], np.float32).reshape(4, 1, 1)}),
    _parallel("x + conv", f"{X} > y; a = Conv<{PAD}>(x, W[4,4,3,3], B[4]); s = Add(x, a); y = Relu(s)", 0),
    _parallel("x - conv", f"{X} > y; a = Conv<{PAD}>(x, W[4,4,3,3], B[4]); s = Sub(x, a); y = Relu(s)", 0),
    _parallel("conv - x", f"{X} > y; a = Conv(x, W[4,4,1,1], B[4]); s = Sub(a, x); y = Relu(s)", 0),
    _parallel("x added twice", f"{X} > y; a = Conv(x, W[4,4,1,1], B[4]); s = Add(a, x); t = Add(x, s); y = Relu(t)", 0),
    _parallel("conv + conv", f"{X} > y; a = Conv<{PAD}>(x, W[2,4,3,3]); b = Conv<pads=[0,1,0,1]>(x, V[2,4,1,3]); s = Add(b, a); y = Relu(s)", 0),
    _parallel("difference of a difference", f"{X} > y; a = Conv(x, W[4,4,1,1], A[4]); b = Conv(x, V[4,4,1,1], B[4]); i = BN4(x); s = Sub(i, b); t = Sub(a, s); y = Relu(t)", 1),
    _parallel("sum, bn, sum", f"{X} > y; a = Conv(x, W[4,4,1,1], A[4]); s = Add(a, x); n = BN4:alt0(s); i = BN4(x); t = Sub(n, i); y = Relu(t)", 2),
    _parallel("bn of bn", f"{X} > y; a = Conv(x, W[4,4,1,1]); i = BN4:alt0(x); j = BN4:tla(i); s = Add(a, j); y = Relu(s)", 2),
    _parallel("sum, bn", f"{X} > y; a = Conv<{PAD}>(x, W[4,4,3,3]); s = Add(x, a); y = BN4:alt0(s)", 1),
    _parallel("bn, sum", f"{X} > y; b = BN4(x); a = Conv(b, W[4,4,1,1], A[4]); s = Add(b, a); y = Relu(s)", 1),
    _parallel("bn, sum, padding", f"{X} > y; b = BN4(x); a = Conv<{PAD}>(b, W[4,4,3,3], A[4]); s = Add(b, a); y = Relu(s)", 0, kept=("pads",)),
    _parallel("bn of scale 0, sum, padding", f"{X} > y; b = BN4:alt0scale(x); a = Conv<{PAD}>(b, W[4,4,3,3], A[4]); s = Add(b, a); y = Relu(s)", 1),
    _parallel("gauge from before", f"{X} > y; c = Conv(x, U[4,4,1,1]); b = BN4(c); a = Conv<{PAD}>(b, W[4,4,3,3]); m = BN4:tla(a); i = BN4:alt(b); s = Add(m, i); y = Relu(s)", 3),
    _parallel("branches on both sides of a bn that goes", f"{X} > y; c = Conv(x, U[4,4,1,1]); b = BN4(c); a = Conv(c, W[4,4,1,1]); d = Conv(b, V[4,4,1,1]); s = Add(a, d); t = Sub(s, b); y = Relu(t)", 1),
    _parallel("two blocks", f"{X} > y; a = Conv<{PAD}>(x, W[4,4,3,3]); i = BN4(x); s = Add(a, i); b = Conv<{PAD}>(s, V[4,4,3,3]); j = BN4:alt0(s); t = Add(b, j); y = Relu(t)", 2, 2),
    _parallel("two blocks, relu in between", f"{X} > y; a = Conv<{PAD}>(x, W[4,4,3,3]); i = BN4(x); s = Add(a, i); r = Relu(s); b = Conv<{PAD}>(r, V[4,4,3,3]); j = BN4:alt0(r); t = Sub(j, b); y = Relu(t)", 2, 2),
    _parallel("groups", f"{X} > y; a = Conv<group=2, {PAD}>(x, W[4,2,3,3]); b = Conv<group=4>(x, V[4,1,1,1]); i = BN4(x); s = Add(a, b); t = Sub(i, s); y = Relu(t)", 1),
    _parallel("groups, wide", "x[4,4,4,4] > y; a = Conv<group=2>(x, W[8,2,1,1]); b = Conv<group=4>(x, V[8,1,1,1]); s = Sub(a, b); y = Relu(s)", 0),
    _parallel("groups, narrow", "x[4,8,4,4] > y; a = Conv<group=2>(x, W[4,4,1,1]); b = Conv<group=4>(x, V[4,2,1,1]); s = Sub(a, b); y = Relu(s)", 0),
    _parallel("1-D", "x[4,4,4] > y; a = Conv<pads=[1,1]>(x, W[4,4,3]); i = BN4(x); b = Conv(x, V[4,4,1]); s = Sum(a, i, b); y = Relu(s)", 1),
    _parallel("3-D", "x[2,2,2,2,2] > y; a = Conv<pads=[1,1,1,1,1,1]>(x, W[2,2,3,3,3]); i = BN2(x); b = Conv<pads=[0,1,0,0,1,0]>(x, V[2,2,1,3,1]); s = Sum(a, i, b); y = Relu(s)", 1),
    _parallel("kernels of several sizes", "x[4,4,5,5] > y; a = Conv<pads=[2,2,2,2]>(x, W[4,4,5,5]); b = Conv<pads=[1,1,1,1]>(x, V[4,4,3,3]); c = Conv<pads=[1,1,1,1], dilations=[1,1]>(x, U[4,4,3,3]); s = Add(a, b); t = Sub(s, c); y = Relu(t)", 0),
    _parallel("dilated kernel inside a large one", "x[4,4,5,5] > y; a = Conv<pads=[2,2,2,2]>(x, W[4,4,5,5]); b = Conv<pads=[2,2,2,2], dilations=[2,2]>(x, V[4,4,3,3]); s = Add(b, a); y = Relu(s)", 0),
    _parallel("dilated kernels", "x[4,4,5,5] > y; a = Conv<pads=[2,2,2,2], dilations=[2,2]>(x, W[4,4,3,3]); b = Conv<pads=[0,2,0,2], dilations=[1,2]>(x, V[4,4,1,3]); i = BN4(x); s = Add(b, a); t = Add(i, s); y = Relu(t)", 1),
    _parallel("uneven padding", f"{X} > y; a = Conv<pads=[1,0,0,1]>(x, W[4,4,2,2]); i = BN4(x); s = Add(a, i); y = Relu(s)", 1),
    _parallel("uneven padding of two", f"{X} > y; a = Conv<pads=[1,2,2,1]>(x, W[4,4,4,4]); b = Conv<pads=[1,0,0,1]>(x, V[4,4,2,2]); s = Add(b, a); y = Relu(s)", 0),
    _parallel("SAME_UPPER", f'{X} > y; a = Conv<auto_pad="SAME_UPPER">(x, W[4,4,2,4]); i = BN4(x); s = Add(a, i); y = Relu(s)', 1),
    _parallel("SAME_LOWER", f'{X} > y; a = Conv<auto_pad="SAME_LOWER">(x, W[4,4,2,4]); i = BN4(x); s = Add(a, i); y = Relu(s)', 1),
    _parallel("VALID", f'{X} > y; a = Conv<auto_pad="VALID">(x, W[4,4,3,3]); b = Conv<pads=[0,0,0,0]>(x, V[4,4,3,3]); s = Add(a, b); y = Relu(s)', 0),
    _parallel("shared weight", f"{X} > y z; a = Conv<{PAD}>(x, W[4,4,3,3]); i = BN4(x); y = Add(a, i); z = Conv<{PAD}>(x, W)", 1),
    _parallel("one weight in two branches", f"{X} > y; a = Conv<{PAD}>(x, W[4,4,3,3]); b = Conv<{PAD}>(x, W); s = Add(a, b); y = Relu(s)", 0),
    _parallel("through identity and dropout", f"{X} > y; u = Identity(x); d = Dropout(u); a = Conv<{PAD}>(u, W[4,4,3,3]); n = Identity(a); i = BN4(d); e = Dropout(i); s = Add(n, e); y = Relu(s)", 1),
    _parallel("sum is an output and read", f"{X} > y z; a = Conv<{PAD}>(x, W[4,4,3,3]); i = BN4(x); y = Add(a, i); z = Relu(y)", 1),
    _parallel("a tensor that is an output", f"{X} > t y; t = Relu(x); a = Conv<{PAD}>(t, W[4,4,3,3]); i = BN4(t); y = Add(a, i)", 1),
    _parallel("constants as nodes", f"{X} > y; a = Conv<{PAD}>(x, W[4,4,3,3]); m = BN4(a); i = BN4:alt0(x); s = Add(m, i); y = Relu(s)", 2, nodes=True),
    _parallel("initializers listed", f"{X} > y; a = Conv<{PAD}>(x, W[4,4,3,3]); m = BN4(a); i = BN4:alt0(x); s = Add(m, i); y = Relu(s)", 2, opset=7, ir_version=3, listed=True),
    _parallel("free size", "x[N,4,H,W] > y; a = Conv<pads=[1,1,1,1]>(x, V[4,4,3,3]); i = BN4(x); s = Add(a, i); y = Relu(s)", 1),
    _parallel("only a part of a sum", f"{X} u[4,4,4,4] > y; a = Conv<{PAD}>(x, W[4,4,3,3]); i = BN4(x); s = Add(a, i); t = Add(u, s); y = Relu(t)", 1),
    _parallel("bn, sum, padding, repaired", f"{X} > y; b = BN4(x); a = Conv<{PAD}>(b, W[4,4,3,3], A[4]); s = Add(b, a); y = Relu(s)", 1, repairs=("border",)),
    _parallel("bn, repvgg, repaired", f"{X} > y; b = BN4(x); a = Conv<{PAD}>(b, W[4,4,3,3], A[4]); m = BN4(a); i = BN4(b); c = Conv(b, V[4,4,1,1]); s = Add(i, m); t = Sub(c, s); y = BN4:alt0(t)", 4, repairs=("border",)),
    _parallel("bn, two padded branches, repaired", f"{X} > y; b = BN4(x); a = Conv<{PAD}>(b, W[4,4,3,3]); c = Conv<{PAD}>(b, V[4,4,3,3]); s = Sub(c, a); y = Relu(s)", 1, repairs=("border",)),
    # what is no convolution, or would cost more than its branches
    _parallel("a branch is read elsewhere", f"{X} > y a; a = Conv<{PAD}>(x, W[4,4,3,3]); i = BN4(x); s = Add(a, i); y = Relu(s)", 0, 0, ("input",)),
    _parallel("the map is read elsewhere", f"{X} > y z; a = Conv<{PAD}>(x, W[4,4,3,3]); i = BN4(x); s = Add(a, i); y = Relu(s); z = Relu(i)", 0, 0, ("Relu",)),
    _parallel("another tensor", f"{X} u[4,4,4,4] > y; a = Conv<{PAD}>(u, W[4,4,3,3]); i = BN4(x); s = Add(a, i); y = Relu(s)", 0, 0, ("input",)),
    _parallel("relu on a branch", f"{X} > y; a = Conv<{PAD}>(x, W[4,4,3,3]); r = Relu(a); i = BN4(x); s = Add(r, i); y = Relu(s)", 0, 0, ("input",)),
    _parallel("depthwise and dense", f"{X} > y; a = Conv<{PAD}, group=4>(x, W[4,1,3,3]); b = Conv(x, V[4,4,1,1]); s = Add(a, b); y = Relu(s)", 0, 0),
    _parallel("crossed kernels", f"{X} > y; a = Conv<pads=[1,0,1,0]>(x, W[4,4,3,1]); b = Conv<pads=[0,1,0,1]>(x, V[4,4,1,3]); s = Add(a, b); y = Relu(s)", 0, 0),
    _parallel("a branch that spreads", "x[4,4,4,4] > y; p = GlobalAveragePool(x); a = Conv(p, W[4,4,1,1]); b = Conv(x, V[4,4,1,1]); s = Add(a, b); y = Relu(s)", 0, 0),
    _parallel("channels that spread", "x[4,1,4,4] > y; a = Conv(x, W[4,1,1,1]); s = Add(a, x); y = Relu(s)", 0, 0),
    _parallel("a value that spreads over one", "x[4,4,4,4] > y; a = Conv(x, W[1,4,1,1]); s = Add(a, x); y = Relu(s)", 0, 0),
    _parallel("a row that spreads", "x[4,4,1,4] > y; a = Conv<pads=[1,0,1,0]>(x, W[4,4,1,1]); s = Add(a, x); y = Relu(s)", 0, 0),
    _parallel("a row that spreads under a kernel", "x[4,4,1,4] > y; a = Conv<pads=[2,0,2,0]>(x, W[4,4,3,1]); s = Add(a, x); y = Relu(s)", 0, 0),
    _parallel("opposite paddings", f"{X} > y; a = Conv<pads=[0,0,1,1]>(x, W[4,4,2,2]); b = Conv<pads=[1,1,0,0]>(x, V[4,4,2,2]); s = Add(a, b); y = Relu(s)", 0, 0),
    _parallel("a convolution that spreads over one", f"{X} > y; a = Conv(x, W[4,4,1,1]); b = Conv(x, V[1,4,1,1]); s = Add(a, b); y = Relu(s)", 0, 0),
    _parallel("strides that spread", "x[4,4,2,2] > y; a = Conv<strides=[2,2]>(x, W[4,4,1,1]); s = Add(a, x); y = Relu(s)", 0, 0),
    _parallel("computed weight", f"{X} w[4,4,1,1] > y; a = Conv(x, w); b = Conv(x, V[4,4,1,1]); s = Add(a, b); y = Relu(s)", 0, 0),
    _parallel("computed bias", f"{X} b[4] > y; a = Conv(x, W[4,4,1,1], b); c = Conv(x, V[4,4,1,1]); s = Add(a, c); y = Relu(s)", 0, 0),
    _parallel("SAME with strides", f'{X} > y; a = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, W[4,4,3,3]); b = Conv<strides=[2,2]>(x, V[4,4,1,1]); s = Add(a, b); y = Relu(s)', 0, 0),
    _parallel("a constant along the columns", f"{X} > y; a = Conv(x, W[4,4,1,1]); m = Mul(x, M:pow[4]); s = Add(a, m); y = Relu(s)", 0, 0, absorbed=0),
]
