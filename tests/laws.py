"""The law of folding, one line per case: which batch norms must go, and which must stay and why.

Law(name, operator through which a gauge must go, graph, batch norms that go, a word of each reason).
`tests.law_models` says how a graph is written. Both directions wherever they make sense.
"""

# a table is read by its columns
# fmt: off

from __future__ import annotations

import numpy as np

from tests.chain_laws import CHAIN_LAWS
from tests.constant_laws import CONSTANT_LAWS
from tests.law_models import Law, equal_parts, equal_shift
from tests.parallel_laws import PARALLEL

X = "x[4,4,4,4]"  # square: as many samples as channels, rows and columns
PAD = "pads=[1,1,1,1]"

LINEAR = [
    Law("conv", "Conv", f"{X} > y; c = Conv(x, W[4,4,3,3], B[4]); y = BN4(c)", 1),
    Law("conv, no bias", "Conv", f"{X} > y; c = Conv(x, W[4,4,3,3]); y = BN4(c)", 1),
    Law("conv 1-D", "Conv", "x[4,4,4] > y; c = Conv(x, W[4,4,3], B[4]); y = BN4(c)", 1),
    Law("conv 3-D", "Conv", "x[2,2,2,2,2] > y; c = Conv(x, W[2,2,2,2,2]); y = BN2(c)", 1),
    Law("conv, groups", "Conv", f"{X} > y; c = Conv<group=2>(x, W[4,2,3,3]); y = BN4(c)", 1),
    Law("conv, depthwise", "Conv", f"{X} > y; c = Conv<group=4>(x, W[4,1,3,3]); y = BN4(c)", 1),
    Law("conv, depthwise twice", "Conv", f"{X} > y; c = Conv<group=4>(x, W[8,1,3,3]); y = BN8(c)", 1),
    Law("conv, gamma 0", "Conv", f"{X} > y; c = Conv<{PAD}>(x, W[4,4,3,3], B[4]); y = BN4:alt0(c)", 1),
    Law("conv, gamma all 0", "Conv", f"{X} > y; c = Conv<{PAD}>(x, W[4,4,3,3], B[4]); y = BN4:all0(c)", 1),
    Law("bn, conv", "Conv", f"{X} > y; b = BN4(x); y = Conv(b, W[4,4,3,3], B[4])", 1),
    Law("bn, conv without bias", "Conv", f"{X} > y; b = BN4(x); y = Conv(b, W[4,4,3,3])", 1),
    Law("bn, conv, stride, dilation", "Conv", "x[4,4,6,6] > y; b = BN4(x); y = Conv<strides=[2,2], dilations=[2,2]>(b, W[4,4,2,2])", 1),
    Law("bn, conv 1-D", "Conv", "x[4,4,4] > y; b = BN4(x); y = Conv(b, W[4,4,3])", 1),
    Law("bn, conv 3-D", "Conv", "x[2,2,2,2,2] > y; b = BN2(x); y = Conv(b, W[2,2,2,2,2])", 1),
    Law("bn, conv, groups", "Conv", f"{X} > y; b = BN4(x); y = Conv<group=2>(b, W[4,2,3,3], B[4])", 1),
    Law("bn, conv, depthwise", "Conv", f"{X} > y; b = BN4(x); y = Conv<group=4>(b, W[4,1,3,3])", 1),
    Law("bn, conv, gamma 0", "Conv", f"{X} > y; b = BN4:alt0(x); y = Conv(b, W[4,4,3,3])", 1),
    Law("bn, conv, gamma all 0", "Conv", f"{X} > y; b = BN4:all0(x); y = Conv(b, W[4,4,3,3])", 1),
    Law("bn, padded conv", "", f"{X} > y; b = BN4(x); y = Conv<{PAD}>(b, W[4,4,3,3])", 0, ("pads with zeros",)),
    Law("bn of scale, padded conv", "Conv", f"{X} > y; b = BN4:altscale(x); y = Conv<{PAD}>(b, W[4,4,3,3])", 1),
    Law("bn, padded 1x1 conv", "", f"{X} > y; b = BN4(x); y = Conv<{PAD}>(b, W[4,4,1,1])", 0, ("pads with zeros",)),
    Law("bn, gamma 0, padded conv", "", f"{X} > y; b = BN4:alt0(x); y = Conv<{PAD}>(b, W[4,4,3,3])", 0, ("pads with zeros",)),
    Law("bn of scale 0, padded conv", "Conv", f"{X} > y; b = BN4:alt0scale(x); y = Conv<{PAD}>(b, W[4,4,3,3])", 1),
    Law("bn, SAME_UPPER conv", "", f'{X} > y; b = BN4(x); y = Conv<auto_pad="SAME_UPPER">(b, W[4,4,3,3])', 0, ("pads with zeros",)),
    Law("bn, SAME_LOWER conv", "", f'{X} > y; b = BN4(x); y = Conv<auto_pad="SAME_LOWER">(b, W[4,4,2,2])', 0, ("pads with zeros",)),
    Law("bn, SAME_UPPER 1x1 conv", "Conv", f'{X} > y; b = BN4(x); y = Conv<auto_pad="SAME_UPPER">(b, W[4,4,1,1])', 1),
    Law("bn, VALID conv", "Conv", f'{X} > y; b = BN4(x); y = Conv<auto_pad="VALID">(b, W[4,4,3,3])', 1),
    Law("bn, conv padded at one end", "", f"{X} > y; b = BN4(x); y = Conv<pads=[0,0,0,1]>(b, W[4,4,3,3])", 0, ("pads with zeros",)),
    Law("conv, bn, conv", "Conv", f"{X} > y; c = Conv(x, W[4,4,1,1]); b = BN4(c); y = Conv<{PAD}>(b, V[4,4,3,3])", 1),
    Law("transposed conv", "ConvTranspose", f"{X} > y; c = ConvTranspose(x, W[4,4,3,3], B[4]); y = BN4(c)", 1),
    Law("transposed conv, groups", "ConvTranspose", f"{X} > y; c = ConvTranspose<group=2>(x, W[4,2,3,3]); y = BN4(c)", 1),
    Law("transposed conv, groups wide", "ConvTranspose", f"{X} > y; c = ConvTranspose<group=2>(x, W[4,4,2,2], B[8]); y = BN8(c)", 1),
    Law("transposed conv, depthwise", "ConvTranspose", f"{X} > y; c = ConvTranspose<group=4>(x, W[4,1,3,3]); y = BN4(c)", 1),
    Law("transposed conv 1-D", "ConvTranspose", "x[4,4,4] > y; c = ConvTranspose<group=2>(x, W[4,2,3]); y = BN4(c)", 1),
    Law("transposed conv 3-D", "ConvTranspose", "x[2,2,2,2,2] > y; c = ConvTranspose(x, W[2,2,2,2,2]); y = BN2(c)", 1),
    Law("transposed conv, stride, pads", "ConvTranspose", f"{X} > y; c = ConvTranspose<strides=[2,2], {PAD}, output_padding=[1,1]>(x, W[4,4,3,3]); y = BN4:alt0(c)", 1),
    Law("bn of scale, transposed conv", "ConvTranspose", f"{X} > y; b = BN4:altscale(x); y = ConvTranspose(b, W[4,4,3,3])", 1),
    Law("bn of scale, transposed conv, groups", "ConvTranspose", f"{X} > y; b = BN4:altscale(x); y = ConvTranspose<group=2>(b, W[4,2,3,3], B[4])", 1),
    Law("bn, transposed conv", "", f"{X} > y; b = BN4(x); y = ConvTranspose(b, W[4,4,3,3])", 0, ("border",)),
    Law("matmul", "MatMul", "x[4,4] > y; c = MatMul(x, W[4,4]); y = BN4(c)", 1),
    Law("bn, matmul", "MatMul", "x[4,4] > y; b = BN4(x); y = MatMul(b, W[4,4])", 1),
    Law("bn, matmul, gamma 0", "MatMul", "x[4,4] > y; b = BN4:alt0(x); y = MatMul(b, W[4,4])", 1),
    Law("matmul, gamma 0", "MatMul", "x[4,4] > y; b = MatMul(x, W[4,4]); y = BN4:alt0(b)", 1),
    Law("matmul, bias", "MatMul", "x[4,4] > y; c = MatMul(x, W[4,4]); d = Add(c, B[4]); y = BN4(d)", 1),
    Law("matmul, bias first", "Add", "x[4,4] > y; c = MatMul(x, W[4,4]); d = Add(B[4], c); y = BN4(d)", 1),
    Law("matmul from the left", "MatMul", "x[4,4,4] > y; c = MatMul(W[4,4], x); y = BN4(c)", 1),
    Law("bn, matmul from the left", "MatMul", "x[4,4,4] > y; b = BN4(x); y = MatMul(W[4,4], b)", 1),
    Law("bn, matmul from the left, batched", "MatMul", "x[4,4,4] > y; b = BN4(x); y = MatMul(W[4,4,4], b)", 1),
    Law("batched matmul from the left", "MatMul", "x[4,4,4] > y; c = MatMul(W[4,4,4], x); y = BN4(c)", 1),
    Law("batched matmul", "MatMul", "x[4,4,4] > y; c = MatMul(x, W[4,4,4]); t = Transpose<perm=[0,2,1]>(c); y = BN4(t)", 1),
    Law("bn, batched matmul", "MatMul", "x[4,4,4] > y; b = BN4(x); t = Transpose<perm=[0,2,1]>(b); y = MatMul(t, W[4,4,4])", 1),
    Law("bn, matmul 4-D", "MatMul", f"{X} > y; b = BN4(x); t = Transpose<perm=[0,2,3,1]>(b); y = MatMul(t, W[4,4])", 1),
    Law("matmul on tokens", "MatMul", "x[4,4,4] > z; c = MatMul(x, W[4,4]); t = Transpose<perm=[0,2,1]>(c); y = BN4(t); z = Transpose<perm=[0,2,1]>(y)", 1),
    Law("matmul on tokens through reshape", "MatMul", "x[4,4,4] > z; c = MatMul(x, W[4,4]); f = Reshape(c, S{16,4}); y = BN4(f); z = Reshape(y, T{4,4,4})", 1),
    Law("matmul on tokens, free batch", "MatMul", "x[N,4,4] > z; c = MatMul(x, W[4,4]); f = Reshape(c, S{-1,4}); y = BN4(f); z = Reshape(y, T{-1,4,4})", 1),
    Law("matmul on tokens, bn over the tokens", "", "x[4,4,4] > y; c = MatMul(x, W[4,4]); y = BN4(c)", 0, ("axis",)),
    Law("matmul, reshape, bn over the rows", "", "x[4,4] > y; c = MatMul(x, W[4,4]); f = Reshape(c, S{1,4,4}); y = BN4(f)", 0, ("axis",)),
    Law("matmul of two values", "", "x[4,4,4] > y; c = MatMul(x, x); y = BN4(c)", 0, ("MatMul",)),
    Law("bn, attention projections", "", "x[4,4,4] > o; b = BN4(x); t = Transpose<perm=[0,2,1]>(b); q = MatMul(t, Q[4,4]); k = MatMul(t, K[4,4]); v = MatMul(t, V[4,4]); u = Transpose<perm=[0,2,1]>(k); a = MatMul(q, u); o = MatMul(a, v)", 0, ("additions",)),
    Law("attention averages, bn", "MatMul", "x[4,4,4] u[4,4,4] > y; c = MatMul(x, W[4,4]); d = Sub(u, u); s = Softmax(d); o = MatMul(s, c); t = Transpose<perm=[0,2,1]>(o); y = BN4:alt(t)", 1),
    Law("attention averages, opset 11, bn", "MatMul", "x[4,4,4] u[4,4,4] > y; c = MatMul(x, W[4,4]); d = Sub(u, u); s = Softmax<axis=2>(d); i = Identity(s); o = MatMul(i, c); t = Transpose<perm=[0,2,1]>(o); y = BN4:alt(t)", 1, opset=11, ir_version=6),
    Law("softmax over the rows is no average", "", "x[4,4,4] u[4,4,4] > y; c = MatMul(x, W[4,4]); d = Sub(u, u); s = Softmax<axis=1>(d); o = MatMul(s, c); t = Transpose<perm=[0,2,1]>(o); y = BN4:alt(t)", 0, ("passes no shift",)),
    Law("softmax, dropout in training mode, no average", "", "x[4,4,4] u[4,4,4] > y; c = MatMul(x, W[4,4]); d = Sub(u, u); s = Softmax(d); p = Dropout<seed=3>(s, R, T); o = MatMul(p, c); t = Transpose<perm=[0,2,1]>(o); y = BN4:alt(t)", 0, ("passes no shift",), reference=False, constants={"R": np.float32(0.5), "T": np.array(True)}),
    Law("attention averages, dropout at rest, bn", "MatMul", "x[4,4,4] u[4,4,4] > y; c = MatMul(x, W[4,4]); d = Sub(u, u); s = Softmax(d); p = Dropout(s, R, T); o = MatMul(p, c); t = Transpose<perm=[0,2,1]>(o); y = BN4:alt(t)", 1, constants={"R": np.float32(0.5), "T": np.array(False)}),
    Law("bn, attention projections with biases", "MatMul", "x[4,4,4] > q k; b = BN4(x); t = Transpose<perm=[0,2,1]>(b); m = MatMul(t, Q[4,4]); q = Add(m, A[4]); n = MatMul(t, K[4,4]); k = Add(D[4], n)", 1),
    Law("bn, one matmul without bias and one with", "MatMul", "x[4,4,4] > q k; b = BN4(x); t = Transpose<perm=[0,2,1]>(b); m = MatMul(t, Q[4,4]); q = Add(m, A[4]); k = MatMul(t, K[4,4])", 1),
    Law("bn of scale, three matmuls", "MatMul", "x[4,4,4] > q k v; b = BN4:altscale(x); t = Transpose<perm=[0,2,1]>(b); q = MatMul(t, Q[4,4]); k = MatMul(t, K[4,4]); v = MatMul(t, V[4,4])", 1),
]

_C_SHAPES = {"no C": "", "C of N": "4", "C of 1xN": "1,4", "C of Mx1": "4,1", "C of MxN": "4,4", "C of 1": "1", "scalar C": None}


def _gemms() -> list[Law]:
    """Every shape of C, both directions, with transposes and factors."""
    laws = []
    for label, shape in _C_SHAPES.items():
        c = "" if shape == "" else f", C[{shape or ''}]"
        for flags in ("alpha=2.0, beta=0.5", "transB=1, beta=2.0", "transA=1, alpha=0.5", "transA=1, transB=1, alpha=2.0"):
            laws.append(Law(f"gemm, {label}, {flags}", "Gemm", f"x[4,4] > y; c = Gemm<{flags}>(x, W[4,4]{c}); y = BN4:alt0(c)", 1))
            ahead = f"x[4,4] > y; b = BN4:alt0(x); y = Gemm<{flags}>(b, W[4,4]{c})"
            turned = f"x[4,4] > y; b = BN4:alt0(x); t = Transpose(b); y = Gemm<{flags}>(t, W[4,4]{c})"
            laws.append(Law(f"bn, gemm, {label}, {flags}", "Gemm", turned if "transA" in flags else ahead, 1))
    return laws


GEMM = [
    *_gemms(),
    Law("gemm, beta 0", "", "x[4,4] > y; c = Gemm<beta=0.0>(x, W[4,4], C[4]); y = BN4(c)", 0, ("beta",)),
    Law("gemm, beta 0, no C", "", "x[4,4] > y; c = Gemm<beta=0.0>(x, W[4,4]); y = BN4(c)", 0, ("beta",)),
    Law("bn over the rows of a transposed A", "", "x[4,4] > y; b = BN4(x); y = Gemm<transA=1>(b, W[4,4])", 0, ("axis",)),
    Law("gemm of a computed B", "", "x[4,4] > y; c = Gemm(W[4,4], x); y = BN4(c)", 0, ("computed",)),
    Law("gemm with a computed C", "", "x[4,4] > y; c = Gemm(x, W[4,4], x); y = BN4(c)", 0, ("computed",)),
    Law("bn, flatten, gemm", "Gemm", "x[4,4,2,2] > y; b = BN4(x); f = Flatten(b); y = Gemm(f, W[16,4])", 1),
    Law("bn, pooled head", "Gemm", f"{X} > y; b = BN4(x); g = GlobalAveragePool(b); f = Flatten(g); y = Gemm<transB=1>(f, W[4,4], B[4])", 1),
    Law("bn, reshape that mixes channels, gemm", "", "x[4,4,2,2] > y; b = BN4(x); f = Reshape(b, S{16,4}); y = Gemm(f, W[4,4])", 0, ("axis",)),
]

DIAGONAL = [
    Law("conv, max without a bound, bn", "", f"{X} > y; c = Conv(x, W[4,4,1,1], B[4]); m = Max(c, L); y = BN4(m)", 0, ("not finite",), constants={"L": np.array([-np.inf, 0, 1, -1], np.float32).reshape(4, 1, 1)}),
    Law("conv, add of infinity, bn", "", f"{X} > z; c = Conv(x, W[4,4,1,1], B[4]); a = Add(c, L); y = BN4:pos(a); z = Relu(y)", 0, ("not finite",), reference=False, constants={"L": np.array([-np.inf, 0, 1, -1], np.float32).reshape(4, 1, 1)}),
    Law("a vector, resized", "", "x[4,4] > y; b = BN4(x); v = ReduceMean<keepdims=0>(b, A{0}); y = Resize(v, , S)", 0, ("Resize",), constants={"S": np.array([2.0], np.float32)}),
    Law("conv, mul, bn", "Mul", f"{X} > y; c = Conv(x, W[4,4,1,1]); m = Mul(c, M:pow[4,1,1]); y = BN4(m)", 1),
    Law("relu, mul, add, bn", "Mul", f"{X} > y; r = Relu(x); m = Mul(r, M:pow[4,1,1]); a = Add(m, A[4,1,1]); y = BN4(a)", 1),
    Law("relu, scalar mul, add, bn", "Mul", f"{X} > y; r = Relu(x); m = Mul(M:pow[], r); a = Add(A[], m); y = BN4(a)", 1),
    Law("bn, mul, conv", "Mul", f"{X} > y; b = BN4(x); m = Mul(b, M:pow[1,4,1,1]); y = Conv(m, W[4,4,3,3])", 1),
    Law("bn, mul by 0, conv", "Mul", f"{X} > y; b = BN4(x); m = Mul(b, M); y = Conv(m, W[4,4,3,3])", 1, constants={"M": np.array([0, 2, -1, 0], np.float32).reshape(4, 1, 1)}),
    Law("conv, mul by 0, bn", "Mul", f"{X} > y; c = Conv(x, W[4,4,3,3]); m = Mul(c, M); a = Add(m, A[4,1,1]); y = BN4(a)", 1, constants={"M": np.array([0, 2, -1, 0], np.float32).reshape(4, 1, 1)}),
    Law("mul along the columns", "Mul", f"{X} > y; c = Conv(x, W[4,4,1,1]); m = Mul(c, M:pow[4]); y = BN4:altscale(m)", 1),
    Law("bn, mul along the columns, bn's own shift", "", f"{X} > y; r = Relu(x); m = Mul(r, M:pow[4]); y = BN4(m)", 0, ("Relu",)),
    Law("bn, mul along the columns, matmul", "Mul", f"{X} > y; b = BN4:altscale(x); m = Mul(b, M:pow[1,1,1,4]); y = Conv<{PAD}>(m, W[4,4,3,3])", 1),
    Law("conv, div, bn", "Div", f"{X} > y; c = Conv(x, W[4,4,1,1]); d = Div(c, D:pow[4,1,1]); y = BN4(d)", 1),
    Law("relu, div, add, bn", "Div", f"{X} > y; r = Relu(x); d = Div(r, D:pow[4,1,1]); a = Add(d, A[4,1,1]); y = BN4(a)", 1),
    Law("bn, div, conv", "Div", f"{X} > y; b = BN4(x); d = Div(b, D:pow[4,1,1]); y = Conv(d, W[4,4,3,3])", 1),
    Law("constant / conv", "", f"{X} > y; c = Conv(x, W[4,4,1,1]); a = Abs(c); b = Add(a, O); d = Div(D:pow[4,1,1], b); y = BN4(d)", 0, ("Div",), constants={"O": np.float32(1)}),
    Law("conv, add, bn", "Add", f"{X} > y; c = Conv(x, W[4,4,1,1]); a = Add(c, A[1,4,1,1]); y = BN4:alt0(a)", 1),
    Law("conv, a position map, bn", "Add", f"{X} > y; c = Conv(x, W[4,4,1,1]); a = Add(c, A[4,4,4]); y = BN4:alt0(a)", 1),
    Law("bn, a position map, conv", "Add", f"{X} > y; b = BN4(x); a = Add(A[4,4,4], b); y = Conv<{PAD}>(a, W[4,4,3,3])", 1),
    Law("conv, add along the columns, bn", "Add", f"{X} > y; c = Conv(x, W[4,4,1,1]); a = Add(c, A[4]); y = BN4:alt0(a)", 1),
    Law("one constant subtracted from two", "Sub", f"{X} > y z; c = Conv(x, W[4,4,1,1]); a = Sub(c, A[4,1,1]); y = BN4:alt0(a); z = Sub(y, A)", 1),
    Law("one constant added to a folded and an unfolded value", "Add", f"{X} > y z; c = Conv(x, W[4,4,1,1]); a = Add(c, A[4,1,1]); y = BN4:alt0(a); z = Add(x, A)", 1),
    Law("conv, sub, bn", "Sub", f"{X} > y; c = Conv(x, W[4,4,1,1]); a = Sub(c, A[4,1,1]); y = BN4:alt0(a)", 1),
    Law("relu, sub, bn", "Sub", f"{X} > y; r = Relu(x); m = Mul(r, M:pow[4,1,1]); a = Sub(m, A[4,1,1]); y = BN4(a)", 1),
    Law("constant - conv, bn", "Sub", f"{X} > y; c = Conv(x, W[4,4,1,1]); a = Sub(A[4,1,1], c); y = BN4:alt0(a)", 1),
    Law("bn, constant - value, conv", "Sub", f"{X} > y; b = BN4(x); a = Sub(A[4,1,1], b); y = Conv<{PAD}>(a, W[4,4,3,3])", 1),
    Law("relu, constant - value, bn", "Sub", f"{X} > y; r = Relu(x); m = Mul(r, M:pow[4,1,1]); a = Sub(A[4,1,1], m); y = BN4(a)", 1),
    Law("sub, div, mul, add", "Mul", f"{X} > z; s = Sub(x, M[4,1,1]); d = Div(s, D:pow[4,1,1]); m = Mul(d, G:pow[4,1,1]); a = Add(m, A[4,1,1]); y = BN4(a); z = Floor(y)", 1),
    Law("mean and std of an input, bn kept by padding", "Mul", f"{X} > y; s = Sub(x, M[4,1,1]); m = Mul(s, G:pow[4,1,1]); b = BN4(m); y = Conv<{PAD}>(b, W[4,4,3,3])", 1),
    Law("bn, bn", "BatchNormalization", f"{X} > z; f = Floor(x); a = BN4(f); y = BN4:tla(a); z = Floor(y)", 1, ("Floor",)),
    Law("bn, bn, gamma 0 first", "BatchNormalization", f"{X} > z; f = Floor(x); a = BN4:alt0(f); y = BN4:tla(a); z = Floor(y)", 1, ("Floor",)),
    Law("bn, bn, gamma 0 second", "BatchNormalization", f"{X} > z; f = Floor(x); a = BN4:alt(f); y = BN4:alt0(a); z = Floor(y)", 1, ("Floor",)),
    Law("bn, bn, bn, conv", "Conv", f"{X} > y; a = BN4(x); b = BN4:tla(a); c = BN4:alt0(b); y = Conv(c, W[4,4,3,3])", 3),
    Law("conv, bn, bn, padded conv", "Conv", f"{X} > y; w = Conv(x, W[4,4,1,1]); a = BN4(w); b = BN4:alt0(a); y = Conv<{PAD}>(b, V[4,4,3,3])", 2),
    Law("conv, bn of gamma 0, bn, padded conv", "Conv", f"{X} > y; c = Conv(x, V[4,4,1,1]); a = BN4:all0(c); b = BN4(a); y = Conv<{PAD}>(b, W[4,4,3,3])", 2),
    Law("a constant between four batch norms", "Conv", f"{X} > y z; c = Conv(x, V[4,4,1,1]); a = BN4:all0(c); b = BN4:pos(a); d = BN4:all0(b); y = BN4:pos(d); z = BN4:all0(a)", 4, ("output",)),
    Law("known and written constants meet", "Add", f"{X} > y; f = Floor(x); a = BN4:all0scale(f); r = LeakyRelu(a); b = BN4:altscale(r); s = Add(K[4,1,1], b); d = BN4:all0(s); y = BN4:pos(d)", 3),
    Law("bn of gamma 0, bn, conv", "Conv", f"{X} > y; f = Floor(x); a = BN4:all0(f); b = BN4(a); y = Conv(b, W[4,4,1,1])", 2),
    Law("bn of gamma 0, bn, padded conv", "BatchNormalization", f"{X} > y; f = Floor(x); a = BN4:all0(f); b = BN4(a); y = Conv<{PAD}>(b, W[4,4,3,3])", 1, ("pads",)),
]


def _passing() -> list[Law]:
    """Relu and its kin: a positive scale passes, and nothing else but a known constant."""
    laws = []
    for op, text in {
        "Relu": "Relu({})", "LeakyRelu": "LeakyRelu<alpha=0.25>({})", "Abs": "Abs({})", "PRelu": "PRelu({}, P[4,1,1])",
    }.items():
        back, ahead = text.format("c"), text.format("b")
        laws += [
            Law(f"conv, {op}, bn of positive scale", op, f"{X} > z; c = Conv(x, W[4,4,1,1]); r = {back}; y = BN4:posscale(r); z = Floor(y)", 1),
            Law(f"conv, {op}, add, bn of positive scale", op, f"{X} > z; c = Conv(x, W[4,4,1,1], B[4]); r = {back}; a = Add(r, A[4,1,1]); y = BN4:pos(a); z = Floor(y)", 1),
            Law(f"conv, {op}, bn of mixed signs", "", f"{X} > z; c = Conv(x, W[4,4,1,1]); r = {back}; y = BN4:altscale(r); z = Floor(y)", 0, ("positive",)),
            Law(f"conv, {op}, bn with a shift", "", f"{X} > z; c = Conv(x, W[4,4,1,1]); r = {back}; y = BN4:pos(r); z = Floor(y)", 0, ("shift",)),
            Law(f"bn of positive scale, {op}, conv", op, f"{X} > y; f = Floor(x); b = BN4:posscale(f); r = {ahead}; y = Conv<{PAD}>(r, W[4,4,3,3])", 1),
            Law(f"bn of gamma 0 and positive, {op}, conv", op, f"{X} > y; f = Floor(x); b = BN4:pos0scale(f); r = {ahead}; y = Conv(r, W[4,4,3,3])", 1),
            Law(f"constants through {op}", op, f"{X} > y; f = Floor(x); b = BN4:all0(f); r = {ahead}; y = Conv(r, W[4,4,3,3])", 1),
            Law(f"constants through {op}, padded conv", "", f"{X} > y; f = Floor(x); b = BN4:all0(f); r = {ahead}; y = Conv<{PAD}>(r, W[4,4,3,3], B[4])", 0, ("pads",)),
            Law(f"conv, bn of gamma 0, {op}, padded conv", "Conv", f"{X} > y; c = Conv<{PAD}>(x, V[4,4,3,3]); b = BN4:alt0(c); r = {ahead}; y = Conv<{PAD}>(r, W[4,4,3,3])", 1),
            Law(f"conv, {op}, bn of gamma 0, conv", "Conv", f"{X} > y; c = Conv<{PAD}>(x, V[4,4,3,3]); r = {back}; b = BN4:alt0(r); y = Conv(b, W[4,4,3,3])", 1),
            Law(f"bn of mixed signs, {op}, conv", "", f"{X} > y; f = Floor(x); b = BN4:altscale(f); r = {ahead}; y = Conv(r, W[4,4,3,3])", 0, ("positive",)),
        ]
    return laws


def _clamps() -> list[Law]:
    """Max and Min with a constant: a positive scale and any shift, the constant follows."""
    laws = []
    for op in ("Max", "Min"):
        laws += [
            Law(f"conv, {op}, bn", op, f"{X} > y; c = Conv(x, W[4,4,1,1], B[4]); r = {op}(c, L[4,1,1]); y = BN4:pos0(r)", 1),
            Law(f"bn, {op}, conv", op, f"{X} > y; f = Floor(x); b = BN4:pos0(f); r = {op}(L[1,4,1,1], b); y = Conv(r, W[4,4,3,3])", 1),
            Law(f"bn, {op} by one number, conv", op, f"{X} > y; f = Floor(x); b = BN4:pos(f); r = {op}(b, L[]); y = Conv(r, W[4,4,3,3])", 1),
            Law(f"bn of all gammas 0, {op}, conv", op, f"{X} > y; f = Floor(x); b = BN4:all0(f); r = {op}(b, L[]); y = Conv(r, W[4,4,3,3])", 1),
            Law(f"bn of both signs, {op}, conv", "", f"{X} > y; f = Floor(x); b = BN4:alt(f); r = {op}(b, L[4,1,1]); y = Conv(r, W[4,4,3,3])", 0, ("negative",)),
            Law(f"bn, {op} over positions, conv", op, f"{X} > y; f = Floor(x); b = BN4:pos(f); r = {op}(b, L[4,4]); y = Conv(r, W[4,4,3,3])", 1),
            Law(f"bn, {op}, conv, opset 7", op, f"{X} > y; f = Floor(x); b = BN4:pos(f); r = {op}(b, L[4,4,4,4]); y = Conv(r, W[4,4,3,3])", 1, opset=7, ir_version=3, listed=True),
            Law(f"{op} of constants, bn", "", f"x[4,4] > y; r = {op}(A[4,4], B[4,4]); b = BN4:altscale(r); y = Add(x, b)", 0, ("",)),
        ]
    return laws


PASSING = [
    *_passing(),
    Law("relu, bn, conv", "Conv", f"{X} > y; c = Conv(x, V[4,4,1,1]); r = Relu(c); b = BN4(r); y = Conv(b, W[4,4,3,3])", 1),
    Law("relu, bn, padded conv", "", f"{X} > y; c = Conv(x, V[4,4,1,1]); r = Relu(c); b = BN4(r); y = Conv<{PAD}>(b, W[4,4,3,3])", 0, ("Relu",)),
    Law("leaky relu of a negative slope", "LeakyRelu", f"{X} > y; f = Floor(x); b = BN4:posscale(f); r = LeakyRelu<alpha=-0.5>(b); y = Conv(r, W[4,4,3,3])", 1),
    Law("prelu, slope of one number", "PRelu", f"{X} > y; f = Floor(x); b = BN4:pos0scale(f); r = PRelu(b, P[1]); y = Conv(r, W[4,4,3,3])", 1),
    Law("prelu, slope over positions, constants", "", f"{X} > y; f = Floor(x); b = BN4:all0(f); r = PRelu(b, P[4,4]); y = Conv(r, W[4,4,3,3])", 0, ("axis",)),
    Law("prelu, computed slope", "", f"{X} > y; c = Conv(x, V[4,4,1,1]); r = PRelu(c, x); b = BN4:posscale(r); y = Floor(b)", 0, ("computed",)),
    *_clamps(),
    Law("largest of three, bn", "Max", f"{X} > y; c = Conv(x, V[4,4,1,1], A[4]); d = Conv(x, W[4,4,1,1]); e = Conv(x, U[4,4,1,1]); r = Max(c, d, e, L[4,1,1]); y = BN4:pos0(r)", 1),
    Law("bn, largest of two, conv", "", f"{X} u[4,4,4,4] > y; f = Floor(x); b = BN4:pos(f); r = Max(b, u); y = Conv(r, W[4,4,1,1])", 0, ("'u'",)),
    Law("known constants, largest of two", "", f"{X} > y; f = Floor(x); b = BN4:all0(f); c = Conv(f, V[4,4,1,1]); r = Max(b, c); y = Conv(r, W[4,4,1,1])", 0, ("constant",)),
    Law("known constants, largest of them and a bound", "", f"{X} > y; f = Floor(x); b = BN4:all0(f); i = Identity(b); r = Max(b, i, L); y = Conv(r, W[4,4,1,1])", 0, ("constant",), constants={"L": np.float32(8)}),
    Law("smallest of two, one broadcasts, bn", "Min", f"{X} > y; c = Conv(x, V[4,4,1,1], A[4]); d = Conv(x, W[4,4,4,4]); r = Min(c, d); y = BN4:pos(r)", 1),
    Law("mean of two, bn of scale", "Mean", f"{X} > z; c = Conv(x, V[4,4,1,1]); d = Conv(x, W[4,4,1,1]); r = Mean(c, d); y = BN4:altscale(r); z = Floor(y)", 1),
    Law("mean of two, bn", "", f"{X} > z; c = Conv(x, V[4,4,1,1]); d = Conv(x, W[4,4,1,1]); r = Mean(c, d); y = BN4(r); z = Floor(y)", 0, ("no shift",)),
    Law("mean of a value and a constant, bn", "", f"{X} > z; c = Conv(x, V[4,4,1,1]); r = Mean(c, K[4,1,1]); y = BN4:altscale(r); z = Floor(y)", 0, ("constant",)),
    Law("clip stops everything", "", f"{X} > y; c = Conv(x, V[4,4,1,1]); r = Clip(c, L[], H:pos[]); b = BN4:posscale(r); y = Floor(b)", 0, ("Clip",)),
    Law("instance norm is left alone", "", f"{X} > y; c = Conv(x, V[4,4,1,1]); r = InstanceNormalization(c, S[4], T[4]); b = Floor(r); y = BN4(b)", 0, ("Floor",)),
]


def _both_ways(op: str, text: str, channels: int = 4, *, shape: str = X, weight: str = "W[4,4,1,1]", kinds: tuple[str, str] = ("alt0", "alt0"), **options: object) -> list[Law]:
    """An operator between a conv and a batch norm, and between a batch norm and a conv."""
    name = text.format("_") + (f", opset {options['opset']}" if "opset" in options else "")
    back, ahead = kinds
    return [
        Law(f"conv, {name}, bn", op, f"{shape} > y; c = Conv(x, V[4,4,1,1], D0[4]); o = {text.format('c')}; y = BN{channels}:{back}(o)", 1, **options),  # type: ignore[arg-type]
        Law(f"bn, {name}, conv", op, f"{shape} > y; f = Floor(x); b = BN4:{ahead}(f); o = {text.format('b')}; y = Conv(o, {weight}, B0[4])", 1, **options),  # type: ignore[arg-type]
    ]


WINDOWS = [
    *_both_ways("GridSample", 'GridSample<mode="linear", padding_mode="border", align_corners=1>({}, G)', constants={"G": np.array([[-3, 1], [0, 0.5]], np.float32).reshape(1, 2, 1, 2).repeat(4, 0)}),
    *_both_ways("GridSample", 'GridSample<align_corners=1>({}, G)', kinds=("altscale", "altscale"), constants={"G": np.array([[-3, 1], [0, 0.5]], np.float32).reshape(1, 2, 1, 2).repeat(4, 0)}),
    Law("bn, grid that points outside", "", f"{X} g[4,2,2,2] > y; b = BN4(x); o = GridSample(b, g); y = Conv(o, W[4,4,1,1])", 0, ("shift",)),
    Law("bn of the grid", "", f"{X} g[4,2,2,2] > y; b = BN2:scale(g); o = GridSample(x, b); y = Conv(o, W[4,4,1,1])", 0, ("places",)),
    *_both_ways("MaxPool", "MaxPool<kernel_shape=[2,2], pads=[1,1,1,1]>({})", kinds=("pos0", "pos0")),
    *_both_ways("GlobalMaxPool", "GlobalMaxPool({})", kinds=("pos0", "pos0")),
    *_both_ways("AveragePool", "AveragePool<kernel_shape=[2,2], strides=[2,2]>({})"),
    *_both_ways("AveragePool", "AveragePool<kernel_shape=[1,2], pads=[0,1,0,1], count_include_pad=0>({})"),
    *_both_ways("AveragePool", "AveragePool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>({})", shape="x[4,4,5,5]"),
    *_both_ways("GlobalAveragePool", "GlobalAveragePool({})"),
    *_both_ways("ReduceMax", "ReduceMax({}, A{{2,3}})", kinds=("pos0", "pos0")),
    *_both_ways("ReduceMin", "ReduceMin({}, A{{-1}})", kinds=("pos0", "pos0")),
    *_both_ways("ReduceMean", "ReduceMean({}, A{{2,-1}})"),
    *_both_ways("ReduceMean", "ReduceMean<axes=[2,3]>({})", opset=13, ir_version=8),
    *_both_ways("ReduceSum", "ReduceSum({}, A{{2,3}})", kinds=("alt0scale", "alt0scale")),
    *_both_ways("ReduceSum", "ReduceSum<axes=[2,3]>({})", kinds=("altscale", "altscale"), opset=11, ir_version=6),
    *_both_ways("Resize", 'Resize<mode="nearest">({}, , S)', constants={"S": np.array([1, 1, 2, 2], np.float32)}),
    *_both_ways("Resize", 'Resize<mode="linear", coordinate_transformation_mode="half_pixel">({}, , S)', constants={"S": np.array([1, 1, 2, 2], np.float32)}),
    *_both_ways("Resize", 'Resize<mode="nearest">({}, S)', constants={"S": np.array([1, 1, 2, 2], np.float32)}, opset=10, ir_version=5),
    *_both_ways("Resize", 'Resize<mode="nearest">({}, , , Z{{4,4,8,8}})', opset=13, ir_version=8),
    *_both_ways("Upsample", 'Upsample<mode="nearest">({}, S)', constants={"S": np.array([1, 1, 2, 2], np.float32)}, opset=9, ir_version=4),
    *_both_ways("Upsample", 'Upsample<mode="nearest", scales=[1.0,1.0,2.0,2.0]>({})', opset=7, ir_version=3, listed=True),
    Law("maxpool, negative scale", "", f"{X} > z; c = Conv(x, W[4,4,1,1]); p = MaxPool<kernel_shape=[2,2]>(c); y = BN4:alt(p); z = Floor(y)", 0, ("MaxPool",)),
    Law("maxpool, gamma 0, its places are read", "", f"{X} > y i:int; c = Conv(x, W[4,4,1,1]); p, i = MaxPool<kernel_shape=[2,2]>(c); y = BN4:pos0(p)", 0, ("MaxPool",)),
    Law("maxpool, positive, its places are read", "MaxPool", f"{X} > y i:int; c = Conv(x, W[4,4,1,1]); p, i = MaxPool<kernel_shape=[2,2]>(c); y = BN4:pos(p)", 1),
    Law("a scale along the rows does not pass a pool", "", f"{X} > y; t = Transpose<perm=[0,2,1,3]>(x); b = BN4:pos(t); u = Transpose<perm=[0,2,1,3]>(b); p = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(u); m = Mul(p, M:pow[4,1]); a = Add(m, A[4,1]); y = Floor(a)", 0, ("MaxPool",)),
    Law("average of padded zeros", "", f"{X} > y; b = BN4(x); o = AveragePool<kernel_shape=[2,2], pads=[1,1,1,1], count_include_pad=1>(b); y = Conv(o, W[4,4,1,1])", 0, ("AveragePool",)),
    Law("sum over channels", "", "x[4,4,4] > y; b = BN4(x); s = ReduceSum<keepdims=0>(b, A{1}); y = MatMul(s, W[4,4])", 0, ("ReduceSum",)),
    Law("sum of a shift", "", "x[4,4,4] > y; b = BN4(x); s = ReduceSum<keepdims=0>(b, A{2}); y = MatMul(s, W[4,4])", 0, ("shift",)),
    Law("mean over channels", "", "x[4,4,4] > y; b = BN4(x); s = ReduceMean<keepdims=0>(b, A{1}); y = MatMul(s, W[4,4])", 0, ("ReduceMean",)),
    Law("mean without axes", "", "x[4,4] > y; b = BN4(x); s = ReduceMean(b); y = Mul(s, M[4])", 0, ("ReduceMean",)),
    Law("mean without axes, noop", "ReduceMean", "x[4,4] > y; b = BN4(x); s = ReduceMean<noop_with_empty_axes=1>(b); y = MatMul(s, W[4,4])", 1),
    Law("mean, bn, gemm", "ReduceMean", f"{X} > y; b = BN4(x); s = ReduceMean<keepdims=0>(b, A{{3,2}}); y = Gemm(s, W[4,4])", 1),
    Law("resize that fills in", "", f'{X} > y; b = BN4(x); s = Resize<mode="linear", coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=3.0>(b, R, S); y = Conv(s, W[4,4,1,1])', 0, ("Resize",), constants={"R": np.array([0, 0, 0, 0, 1, 1, 1.5, 1.5], np.float32), "S": np.array([1, 1, 2, 2], np.float32)}),
    Law("resize of the channels", "", 'x[4,4,4] > y; b = BN4(x); s = Resize<mode="nearest">(b, , S); y = Conv(s, W[4,8,1])', 0, ("Resize",), constants={"S": np.array([1, 2, 1], np.float32)}),
]

STRUCTURE = [
    *_both_ways("Identity", "Identity({})"),
    *_both_ways("Dropout", "Dropout({})"),
    *_both_ways("Dropout", "Dropout({})", opset=7, ir_version=3, listed=True),
    *_both_ways("Dropout", "Dropout({}, R, T)", constants={"R": np.float32(0.5), "T": np.array(False)}),
    *_both_ways("Reshape", "Reshape({}, S{{4,4,2,8}})"),
    *_both_ways("Reshape", "Reshape({}, S{{0,4,-1,8}})", shape="x[N,4,4,4]"),
    *_both_ways("Transpose", "Transpose<perm=[0,1,3,2]>({})"),
    *_both_ways("Expand", "Expand({}, S{{4,4,4,4}})", shape="x[4,4,1,1]"),
    _both_ways("Slice", "Slice({}, A{{1}}, E{{3}}, X{{-1}})")[1],
    _both_ways("Slice", "Slice<starts=[1], ends=[3], axes=[2]>({})", opset=9, ir_version=4)[1],
    *_both_ways("Slice", "Slice<starts=[1], ends=[3], axes=[1]>({})", 2, weight="W[4,2,1,1]", opset=9, ir_version=4),
    *_both_ways("Slice", "Slice({}, A{{3}}, E{{-9223372036854775807}}, X{{1}}, P{{-1}})"),
    *_both_ways("Gather", "Gather<axis=1>({}, I{{2,0,-1,1}})"),
    _both_ways("DepthToSpace", "DepthToSpace<blocksize=2>({})", 1)[0],
    _both_ways("SpaceToDepth", "SpaceToDepth<blocksize=2>({})", 16, weight="W[4,16,1,1]")[1],
    Law("bn of equal parts, depth to space DCR, conv", "DepthToSpace", "x[1,8,2,2] > y; b = BN8(x); o = DepthToSpace<blocksize=2>(b); y = Conv(o, W[1,2,1,1])", 1, constants=equal_parts("b", 2, lambda v: np.tile(v, 4))),
    Law("bn of equal parts, depth to space CRD, conv", "DepthToSpace", 'x[1,8,2,2] > y; b = BN8(x); o = DepthToSpace<blocksize=2, mode="CRD">(b); y = Conv(o, W[1,2,1,1])', 1, constants=equal_parts("b", 2, lambda v: np.repeat(v, 4))),
    Law("conv, space to depth, bn of equal parts", "SpaceToDepth", "x[1,2,4,4] > y; c = Conv(x, W[2,2,1,1]); o = SpaceToDepth<blocksize=2>(c); y = BN8(o)", 1, constants=equal_parts("y", 2, lambda v: np.tile(v, 4))),
    Law("conv, space to depth, bn of unequal parts", "", "x[1,2,4,4] > y; c = Conv(x, W[2,2,1,1]); o = SpaceToDepth<blocksize=2>(c); y = BN8(o)", 0, ("SpaceToDepth",), constants=equal_parts("y", 2, lambda v: np.repeat(v, 4))),
    Law("bn of parts in the other order, depth to space", "", "x[1,8,2,2] > y; b = BN8(x); o = DepthToSpace<blocksize=2>(b); y = Conv(o, W[1,2,1,1])", 0, ("DepthToSpace",), constants=equal_parts("b", 2, lambda v: np.repeat(v, 4))),
    *_both_ways("Pad", 'Pad<mode="reflect">({}, P{{0,0,1,1,0,0,1,1}})'),
    *_both_ways("Pad", 'Pad<mode="edge", pads=[0,0,1,1,0,0,1,1]>({})', opset=9, ir_version=4),
    *_both_ways("Pad", "Pad({}, P{{0,0,1,1,0,0,1,1}})", kinds=("altscale", "alt0scale")),
    *_both_ways("Pad", "Pad<pads=[0,0,1,1,0,0,1,1]>({})", kinds=("altscale", "alt0scale"), opset=10, ir_version=5),
    Law("conv, flatten, bn", "Flatten", f"{X} > y; c = Conv(x, W[4,4,4,4]); f = Flatten(c); y = BN4(f)", 1),
    Law("conv, flatten, bn of many", "", "x[4,4,2,2] > y; c = Conv(x, W[4,4,1,1]); f = Flatten(c); y = BN16(f)", 0, ("axis",)),
    Law("conv, squeeze, bn", "Squeeze", f"{X} > y; c = Conv(x, W[4,4,4,4]); f = Squeeze(c, A{{2,3}}); y = BN4:alt0(f)", 1),
    Law("conv, squeeze with attribute, bn", "Squeeze", f"{X} > y; c = Conv(x, W[4,4,4,4]); f = Squeeze<axes=[2,3]>(c); y = BN4:alt0(f)", 1, opset=11, ir_version=6),
    Law("bn, squeeze, matmul", "Squeeze", "x[4,4,1,4] > y; b = BN4(x); f = Squeeze(b, A{2}); y = Conv(f, W[4,4,1])", 1),
    Law("bn, unsqueeze, conv", "Unsqueeze", "x[4,4,4] > y; b = BN4:alt0(x); f = Unsqueeze(b, A{-1}); y = Conv(f, W[4,4,1,1])", 1),
    Law("matmul, unsqueeze, bn", "Unsqueeze", "x[4,4] > y; c = MatMul(x, W[4,4]); f = Unsqueeze<axes=[2,3]>(c); y = BN4:alt0(f)", 1, opset=11, ir_version=6),
    Law("cast up and down", "Cast", f"{X} > y; c = Conv(x, V[4,4,1,1]); d = Cast<to=11>(c); e = Cast<to=1>(d); y = BN4:alt0(e)", 1),
    Law("bn, cast, conv", "Cast", f"{X} > y; b = BN4:alt0(x); d = Cast<to=11>(b); e = Cast<to=1>(d); y = Conv(e, W[4,4,1,1])", 1),
    Law("cast to integers", "", f"{X} > y; c = Conv(x, V[4,4,1,1]); d = Cast<to=7>(c); e = Cast<to=1>(d); y = BN4(e)", 0, ("Cast",)),
    Law("shape of a value", "Shape", "x[4,4,4] > y s:int; c = Conv(x, V[4,4,1]); s = Shape(c); t = Reshape(c, s); y = BN4(t)", 1),
    Law("size of a value", "Size", "x[4,4,4] > y s:int; c = Conv(x, V[4,4,1]); s = Size(c); y = BN4(c)", 1),
    Law("shape of a batch norm's output", "Shape", "x[4,4,4] > y s:int; b = BN4(x); s = Shape(b); y = Conv(b, V[4,4,1])", 1),
    Law("reshape into groups, bn over the groups", "Reshape", "x[4,4,4] > y; c = Conv(x, V[4,4,1]); g = Reshape(c, S{4,2,8}); y = BN2:alt0(g)", 1),
    Law("reshape, transpose, reshape: channel shuffle", "Transpose", f"{X} > y; c = Conv(x, V[4,4,1,1]); g = Reshape(c, S{{4,2,2,4,4}}); t = Transpose<perm=[0,2,1,3,4]>(g); s = Reshape(t, T{{4,4,4,4}}); y = BN4:alt0(s)", 1),
    Law("bn, channel shuffle, conv", "Transpose", f"{X} > y; b = BN4:alt0(x); g = Reshape(b, S{{4,2,2,4,4}}); t = Transpose<perm=[0,2,1,3,4]>(g); s = Reshape(t, T{{4,4,4,4}}); y = Conv(s, W[4,4,1,1])", 1),
    Law("reshape instead of transpose", "", "x[4,4,4] > y; c = Conv(x, V[4,4,1]); g = Reshape(c, S{4,2,2,4}); h = Reshape(g, T{2,4,2,4}); y = BN4(h)", 0, ("axis",)),
    Law("transpose of samples and channels", "", f"{X} > y; c = Conv(x, V[4,4,1,1]); g = Transpose<perm=[1,0,2,3]>(c); y = BN4(g)", 0, ("axis",)),
    Law("nhwc and back", "Transpose", f"{X} > y; c = Conv(x, V[4,4,1,1]); g = Transpose<perm=[0,2,3,1]>(c); h = Transpose<perm=[0,3,1,2]>(g); y = BN4:alt0(h)", 1),
    Law("bn of unequal parts, depth to space", "", "x[1,4,2,2] > y; b = BN4(x); o = DepthToSpace<blocksize=2>(b); y = Conv(o, W[1,1,1,1])", 0, ("DepthToSpace",)),
    Law("conv, depth to space CRD, bn", "DepthToSpace", 'x[1,8,2,2] > y; c = Conv(x, V[8,8,1,1]); o = DepthToSpace<blocksize=2, mode="CRD">(c); y = BN2:alt0(o)', 1),
    Law("conv, depth to space DCR, bn", "DepthToSpace", 'x[1,8,2,2] > y; c = Conv(x, V[8,8,1,1]); o = DepthToSpace<blocksize=2, mode="DCR">(c); y = BN2:alt0(o)', 1),
    Law("pads with 2", "", f"{X} > y; b = BN4:altscale(x); o = Pad(b, P{{0,0,1,1,0,0,1,1}}, T); y = Conv(o, W[4,4,3,3])", 0, ("pads",), constants={"T": np.float32(2)}),
    Law("pads with 2, by attribute", "", f"{X} > y; b = BN4:altscale(x); o = Pad<pads=[0,0,1,1,0,0,1,1], value=2.0>(b); y = Conv(o, W[4,4,3,3])", 0, ("pads",), opset=10, ir_version=5),
    Law("pads a shift with zeros", "", f"{X} > y; b = BN4(x); o = Pad(b, P{{0,0,1,1,0,0,1,1}}); y = Conv(o, W[4,4,3,3])", 0, ("Pad",)),
    *_both_ways("Pad", "Pad({}, P{{0,0,1,1,0,0,1,1}}, T)", kinds=("altscale", "altscale"), constants={"T": np.float32(0)}),
    Law("pads all channels with one shift", "Pad", f"{X} > y; b = BN4:one<epsilon=0.0>(x); o = Pad(b, P{{0,0,1,1,0,0,1,1}}); y = Conv(o, W[4,4,3,3])", 1, constants=equal_shift("b", 4)),
    Law("pads all channels with one shift, opset 10", "", f"{X} > y; b = BN4:one<epsilon=0.0>(x); o = Pad<pads=[0,0,1,1,0,0,1,1]>(b); y = Conv(o, W[4,4,3,3])", 0, ("Pad",), constants=equal_shift("b", 4), opset=10, ir_version=5),
    Law("pads with 2, one shift", "Pad", f"{X} > y; b = BN4:one<epsilon=0.0>(x); o = Pad(b, P{{0,0,1,1,0,0,1,1}}, T); y = Conv(o, W[4,4,3,3])", 1, constants=equal_shift("b", 4) | {"T": np.float32(2)}),
    Law("one pad value for two pads", "Pad", f"{X} u[4,4,4,4] > y z; b = BN4:one<epsilon=0.0>(x); o = Pad(b, P{{0,0,1,1,0,0,1,1}}, T); y = Conv(o, W[4,4,3,3]); z = Pad(u, P, T)", 1, constants=equal_shift("b", 4) | {"T": np.float32(2)}),
    Law("pads known constants with zeros", "", f"{X} > y; f = Floor(x); b = BN4:all0(f); o = Pad(b, P{{0,0,1,1,0,0,1,1}}); y = Conv(o, W[4,4,3,3])", 0, ("Pad",), constants={"b.beta": np.array([1, 2, 3, 4], np.float32)}),
    Law("pads nothing, any gauge", "Pad", f"{X} > y; b = BN4:alt0(x); o = Pad(b, P{{0,0,0,0,0,0,0,0}}, , ); y = Conv(o, W[4,4,3,3])", 1),
    *_both_ways("Tile", "Tile({}, R{{1,1,2,3}})"),
    *_both_ways("Tile", "Tile({}, R{{1,2,1,1}})", 8, weight="W[4,8,1,1]", kinds=("alt0", "alt0"))[1:],
    Law("conv, tile of the channels, bn of equal parts", "Tile", f"{X} > y; c = Conv(x, V[4,4,1,1]); o = Tile(c, R{{1,2,1,1}}); y = BN8(o)", 1, constants=equal_parts("y", 4, lambda v: np.tile(v, 2))),
    Law("conv, tile of the channels, bn of unequal parts", "", f"{X} > y; c = Conv(x, V[4,4,1,1]); o = Tile(c, R{{1,2,1,1}}); y = BN8(o)", 0, ("Tile",), constants=equal_parts("y", 4, lambda v: np.repeat(v, 2))),
    *_both_ways("Neg", "Neg({})"),
    Law("neg goes", "Neg", f"{X} > y; f = Floor(x); r = Relu(f); c = Conv(r, W[4,4,1,1]); n = Neg(c); y = Floor(n)", 0, absorbed=1),
    Law("pads the channels", "", "x[4,4,4] > y; b = BN4:altscale(x); o = Pad(b, P{0,1,0,0,0,0}); y = Conv(o, W[4,5,1])", 0, ("Pad",)),
    Law("pads by axes", "Pad", "x[4,4,4] > y; b = BN4:altscale(x); o = Pad(b, P{1,1}, , X{2}); y = Conv(o, W[4,4,3])", 1),
    Law("dropout in training mode", "", f"{X} > y; c = Conv(x, W[4,4,1,1]); o = Dropout(c, R, T); y = BN4(o)", 0, ("Dropout",), constants={"R": np.float32(0), "T": np.array(True)}),
]

SEVERAL = [
    Law("two convs, add, bn", "Add", f"{X} > y; a = Conv(x, V[4,4,1,1], A[4]); b = Conv<{PAD}>(x, W[4,4,3,3]); s = Add(a, b); y = BN4:alt0(s)", 1),
    Law("bn, bn, add, conv", "Add", f"{X} u[4,4,4,4] > y; a = BN4(x); b = BN4:alt(u); s = Add(a, b); y = Conv(s, W[4,4,1,1])", 1, ("'u'",)),
    Law("bn, conv: add: conv", "Add", f"{X} u[4,4,4,4] > y; a = BN4(x); b = Conv(u, V[4,4,1,1]); s = Add(b, a); y = Conv(s, W[4,4,1,1])", 1),
    Law("two convs, sub, bn", "Sub", f"{X} > y; a = Conv(x, V[4,4,1,1], A[4]); b = Conv<{PAD}>(x, W[4,4,3,3]); s = Sub(a, b); y = BN4:alt0(s)", 1),
    Law("a known constant and a conv, add", "", f"{X} > y; f = Floor(x); a = BN4:all0(f); c = Conv(x, V[4,4,1,1]); s = Add(a, c); y = Conv(s, W[4,4,1,1])", 0, ("known constant",)),
    Law("bn of a shift less a conv, the result is an output", "Sub", f"{X} u[4,4,4,4] > s; f = Floor(x); a = BN4:shift(f); c = Conv(u, V[4,4,1,1]); s = Sub(a, c)", 1),
    Law("conv less a bn of a shift, the result is an output", "Sub", f"{X} u[4,4,4,4] > s; f = Floor(x); a = BN4:shift(f); c = Conv(u, V[4,4,1,1]); s = Sub(c, a)", 1),
    Law("a shift through sums of sums", "Sum", f"{X} w[4,4,4,4] > y; f = Floor(x); g = Floor(w); a = BN4(f); s = Sub(a, f); b = BN4(s); u = Add(b, s); e = BN4(g); v = Add(e, u); n = BN4:shift(v); y = Sum(a, n, v)", 1, ("Floor",)),
    Law("a split shift that meets itself in sums of sums", "Add", f"{X} > y z; f = Floor(x); n = BN4:shift(f); a, b = Split<axis=1>(n, S{{2,2}}); c = Conv(b, V[2,2,1,1]); d = Sub(b, c); e = Add(d, a); y = Conv(e, W[4,2,1,1]); z = Conv(b, U[4,2,1,1])", 1),
    Law("bn second in a sub", "Sub", f"{X} u[4,4,4,4] > y; a = BN4(x); b = Conv(u, V[4,4,1,1]); s = Sub(b, a); y = Conv(s, W[4,4,1,1])", 1),
    Law("three convs, sum, bn", "Sum", f"{X} > y; a = Conv(x, V[4,4,1,1], A[4]); b = Conv<{PAD}>(x, W[4,4,3,3]); c = Conv(x, U[4,4,1,1]); s = Sum(a, b, c); y = BN4:alt0(s)", 1),
    Law("conv, bn, conv: sum: bn", "Sum", f"{X} > y; a = Conv(x, V[4,4,1,1]); b = BN4(a); c = Conv(x, U[4,4,1,1]); d = BN4:tla(c); s = Sum(b, d); y = BN4:alt0(s)", 3),
    Law("a value added to itself", "", f"{X} > y; a = Conv(x, V[4,4,1,1]); s = Add(a, a); y = BN4(s)", 0, ("twice",)),
    Law("one sample added to all", "Add", "x[4,4,4] u[1,4,4] > y; a = Conv(x, V[4,4,1]); b = Conv(u, W[4,4,1]); s = Add(a, b); y = BN4:alt0(s)", 1),
    Law("pooled added to all", "Add", f"{X} > y; a = Conv(x, V[4,4,1,1]); b = Conv(x, W[4,4,1,1]); p = GlobalAveragePool(b); s = Add(p, a); y = BN4:alt0(s)", 1),
    Law("a vector added along the columns", "", f"{X} u[4] > y; a = Conv(x, V[4,4,1,1]); s = Add(a, u); y = BN4(s)", 0, ("Add",)),
    Law("identity branch beside a conv", "", f"{X} > z; c = Conv(x, V[4,4,1,1]); y = BN4(c); a = Add(c, y); z = Conv(a, W[4,4,1,1])", 0, ("scales",)),
    Law("identity branch of a shift beside a conv", "Add", f"{X} > z; c = Conv(x, V[4,4,1,1]); y = BN4:shift(c); a = Add(c, y); z = Conv(a, W[4,4,1,1])", 1),
    Law("a sum read twice in one stream", "", f"{X} > q; f = Floor(x); a = BN4:shift(f); c = Conv(x, V[4,4,1,1]); b = Identity(c); r = Add(a, b); q = Add(r, b)", 0, ("output",)),
    Law("convs, concat, bn", "Concat", f"{X} > y; a = Conv(x, V[4,4,1,1], A[4]); b = Conv<{PAD}>(x, W[2,4,3,3]); s = Concat<axis=1>(a, b); y = BN6:alt0(s)", 1),
    Law("bn, concat with a conv, conv", "Concat", f"{X} > y; f = Floor(x); a = BN4:alt0(f); b = Conv(x, W[4,4,1,1]); s = Concat<axis=-3>(b, a); y = Conv(s, V[4,8,1,1])", 1),
    Law("concat of the input and a conv, bn", "", f"{X} > y; b = Conv(x, W[4,4,1,1]); s = Concat<axis=1>(b, x); y = BN8(s)", 0, ("input",)),
    Law("concat, bn, conv", "Conv", f"{X} > y; b = Conv(x, W[4,4,1,1]); s = Concat<axis=1>(b, x); n = BN8(s); y = Conv(n, V[4,8,1,1])", 1),
    Law("concat over samples", "Concat", f"{X} > y; a = Conv(x, V[4,4,1,1]); b = Conv(x, W[4,4,1,1]); s = Concat<axis=0>(a, b); y = BN4:alt0(s)", 1),
    Law("concat of tokens with a learned one", "", "x[4,4,4] > y; a = Conv(x, V[4,4,1]); s = Concat<axis=2>(K[4,4,1], a); y = BN4(s)", 0, ("'K'",)),
    Law("bn of a constant", "", "x[4,4] > y; b = BN4(K); y = Add(x, b)", 0, ("'K'",), constants={"K": np.arange(16, dtype=np.float32).reshape(4, 4)}),
    Law("bn of two constants added", "", "x[4,4] > y; s = Add(K[4,4], L[4,4]); b = BN4(s); y = Add(x, b)", 0, ("'",)),
    Law("conv, split, bn each", "Split", f"{X} > y z; c = Conv(x, W[4,4,1,1]); a, b = Split<axis=1>(c, S{{1,3}}); y = BN1:neg(a); z = BN3:alt0(b)", 2),
    Law("conv, split with attribute, bn of one", "Split", f"{X} > y b; c = Conv(x, W[4,4,1,1]); a, b = Split<axis=1, split=[1,3]>(c); y = BN1:neg(a)", 1, opset=11, ir_version=6),
    Law("conv, equal split, bn of one", "Split", f"{X} > y a; c = Conv(x, W[4,4,1,1]); a, b = Split<axis=1, num_outputs=2>(c); y = BN2:neg(b)", 1),
    Law("bn, split, convs", "Split", f"{X} > y z; n = BN4:alt0(x); a, b = Split<axis=1>(n, S{{1,3}}); y = Conv(a, V[4,1,1,1]); z = Conv(b, W[4,3,1,1])", 1),
    Law("bn, split, one branch is an output", "", f"{X} > y b; n = BN4(x); a, b = Split<axis=1>(n, S{{1,3}}); y = Conv(a, V[4,1,1,1])", 0, ("output",)),
    Law("conv, slice of channels, bn", "Slice", f"{X} > y z; c = Conv(x, W[4,4,1,1]); a = Slice(c, A{{1}}, E{{3}}, X{{1}}); y = BN2:alt(a); b = Slice(c, F{{3}}, G{{4}}, X); z = Floor(b)", 1),
    Law("overlapping slices, bn of one", "", f"{X} > y z; c = Conv(x, W[4,4,1,1]); a = Slice(c, A{{1}}, E{{3}}, X{{1}}); y = BN2:alt(a); b = Slice(c, F{{2}}, G{{4}}, X); z = Floor(b)", 0, ("Floor",)),
    Law("every second channel", "Slice", f"{X} > y; b = BN4:alt0(x); a = Slice(b, A{{0}}, E{{4}}, X{{1}}, P{{2}}); y = Conv(a, W[4,2,1,1])", 1),
    Law("conv, gather of some channels, bn", "Gather", f"{X} > y z; c = Conv(x, W[4,4,1,1]); a = Gather<axis=1>(c, I{{3,1}}); y = BN2:alt(a); b = Gather<axis=1>(c, J{{0,2}}); z = Floor(b)", 1),
    Law("conv, gather of one channel twice, bn", "", f"{X} > y; c = Conv(x, W[4,4,1,1]); a = Gather<axis=1>(c, I{{1,1}}); y = BN2(a)", 0, ("Gather",)),
    Law("bn, gather of one channel twice, conv", "Gather", f"{X} > y; b = BN4:alt0(x); a = Gather<axis=1>(b, I{{1,1,2}}); y = Conv(a, W[4,3,1,1])", 1),
    Law("bn, gather of one channel, matmul", "Gather", "x[4,4,4] > y; b = BN4(x); a = Gather<axis=2>(b, I); y = MatMul(a, W[4,4])", 1, constants={"I": np.array(1)}),
    Law("bn, gather of a matrix of channels, matmul", "", f"{X} > y; b = BN4(x); a = Gather<axis=1>(b, I); y = MatMul(a, W[4,4])", 0, ("axis",), constants={"I": np.array([[0, 1], [2, 3]])}),
]

_BLOCK = "n{i} = BN4:{kind}({x}); r{i} = Relu(n{i}); p{i} = Conv<{pads}>(r{i}, W{i}[{size}]); q{i} = Conv<pads=[1,1,1,1]>(p{i}, V{i}[4,4,3,3], B{i}[4]); s{i} = Add({order}); "


def _stream(*kinds: str, last: bool = True, swapped: bool = False, kernel: int = 3) -> str:
    """A pre-activation residual stream of one block per kind, a BN and Relu behind it."""
    text, x = f"{X} > y; s0 = Conv(x, W0[4,4,1,1]); ", "s0"
    for i, kind in enumerate(kinds[:-1], start=1):
        order = f"q{i}, {x}" if swapped else f"{x}, q{i}"
        pads = PAD if kernel == 3 else "pads=[0,0,0,0]"
        text += _BLOCK.format(
            i=i, kind=kind, x=x, order=order, pads=pads, size=f"4,4,{kernel},{kernel}"
        )
        x = f"s{i}"
    text += f"n9 = BN4:{kinds[-1]}({x}); "
    return text + ("r9 = Relu(n9); y = Conv(r9, W9[4,4,1,1])" if last else "y = Floor(n9)")


STREAMS = [
    Law("pre-activation stream, positive", "Add", _stream("pos", "pos", "pos"), 3),
    Law("pre-activation stream, positive, stream added second", "Add", _stream("pos", "pos", "pos", swapped=True), 3),
    Law("pre-activation stream, signs agree", "Add", _stream("alt", "alt", "alt"), 3),
    Law("pre-activation stream, signs agree, ends in an output", "Add", _stream("alt", "alt", "alt", last=False), 3),
    Law("pre-activation stream, all negative", "Add", _stream("neg", "neg"), 2),
    Law("pre-activation stream, signs disagree", "Add", _stream("alt", "pos", "alt"), 2, ("channels 1, 3",)),
    Law("pre-activation stream, gamma 0 once", "Add", _stream("pos", "pos0", "pos", kernel=1), 3),
    Law("pre-activation stream, gamma 0 once, padded", "Add", _stream("pos", "pos0", "pos"), 2, ("Relu",), constants={"n2.beta": np.array([1, -1, 2, 0], np.float32)}),
    Law("pre-activation stream, gamma 0 everywhere", "Add", _stream("pos0", "pos0", "pos0"), 3),
    Law("post-activation block", "Conv", f"{X} > y; a = Conv<{PAD}>(x, W[4,4,3,3]); b = BN4(a); r = Relu(b); c = Conv<{PAD}>(r, V[4,4,3,3]); d = BN4:alt0(c); s = Add(d, x); y = Relu(s)", 2),
    Law("post-activation block with a projection", "Conv", f"{X} > y; a = Conv<{PAD}>(x, W[4,4,3,3]); b = BN4(a); c = Conv(x, V[4,4,1,1]); d = BN4:alt0(c); s = Add(b, d); y = Relu(s)", 2),
    Law("dense block: one producer, two batch norms", "Concat", f"{X} > y; a = Conv(x, W[4,4,1,1]); n = BN4:pos(a); r = Relu(n); b = Conv(r, V[4,4,1,1]); c = Concat<axis=1>(a, b); m = BN8:pos(c); q = Relu(m); y = Conv(q, U[4,8,1,1])", 1, ("shift",)),
    Law("repvgg block", "Conv", f"{X} > y; a = Conv<{PAD}>(x, W[4,4,3,3]); m = BN4(a); b = Conv(x, V[4,4,1,1]); n = BN4:tla(b); i = BN4:alt0(x); s = Sum(m, n, i); y = Relu(s)", 2, ("'x'",)),
    Law("squeeze and excitation", "", f"{X} > y; c = Conv(x, W[4,4,1,1]); g = GlobalAveragePool(c); e = Conv(g, V[4,4,1,1]); h = Floor(e); m = Mul(c, h); y = BN4(m)", 0, ("Mul",)),
    Law("bn, squeeze and excitation", "", f"{X} > y; c = Conv(x, W[4,4,1,1]); n = BN4(c); g = GlobalAveragePool(n); e = Conv(g, V[4,4,1,1]); h = Floor(e); y = Mul(n, h)", 1),
]

def _recurrent() -> list[Law]:
    """Every direction and layout, biases there and absent; float32 stays exact."""
    laws = []
    for op, gates, functions in (("RNN", 1, "Relu"), ("GRU", 3, "HardSigmoid, Relu"), ("LSTM", 4, "HardSigmoid, Relu, Relu")):
        for direction, count in (("forward", 1), ("reverse", 1), ("bidirectional", 2)):
            for layout in (0, 1) if count == 2 else (0,):
                for bias in (", ", ", B[{},{}]"):
                    given = bias != ", "
                    names = ", ".join(f'"{name}"' for name in functions.split(", ") * count)
                    extra = ", linear_before_reset=1" if op == "GRU" and given else ""
                    hard = "" if op == "RNN" else f", activation_alpha=[{', '.join(['0.25'] * count)}], activation_beta=[{', '.join(['0.5'] * count)}]"
                    flags = f'hidden_size=4, direction="{direction}", layout={layout}, activations=[{names}]{hard}{extra}'
                    reads = f"t, W[{count},{4 * gates},4], R[{count},{4 * gates},4]" + bias.format(count, 8 * gates) + f", , H:pow[{count},3,4]" * (layout == 0) + f", C:pow[{count},3,4]" * (layout == 0 and op == "LSTM")
                    laws.append(Law(
                        f"bn, {op}, {direction}, layout {layout}{', bias' if given else ''}", op,
                        f"x[3,4,4] > y h; b = BN4:alt0(x); t = Transpose<perm=[{'2,0,1' if layout == 0 else '0,2,1'}]>(b); y, h = {op}<{flags}>({reads})", 1,
                        runs=layout == 0))
    return laws


EINSUMS = [
    Law("einsum, add, bn", "", 'x[4,4,4] > y; e = Einsum<equation="bct,co->bot">(x, W[4,4]); a = Add(e, A[4,1]); y = BN4:alt0(a)', 0, ("gamma = 0",)),
    Law("einsum, add, bn without a dead channel", "Einsum", 'x[4,4,4] > y; e = Einsum<equation="bct,co->bot">(x, W[4,4]); a = Add(e, A[4,1]); y = BN4:alt(a)', 1),
    Law("einsum of a weight first, add, bn", "Einsum", 'x[4,4,4] > y; e = Einsum<equation="oc,bct->bot">(W[4,4], x); a = Add(e, A[4,1]); y = BN4:alt(a)', 1),
    Law("bn, einsum, add", "Einsum", 'x[4,4,4] > y; b = BN4:alt(x); e = Einsum<equation="bct, co -> bto">(b, W[4,4]); y = Add(e, A[4])', 1),
    Law("bn, gamma 0, einsum, add", "Einsum", 'x[4,4,4] > y; b = BN4:alt0(x); e = Einsum<equation="bct,co->bto">(b, W[4,4]); y = Add(e, A[4])', 1),
    Law("bn, einsum, bn, conv", "Einsum", 'x[4,4,4] > y; f = Floor(x); b = BN4:alt(f); e = Einsum<equation="bct,co->bot">(b, W[4,4]); n = BN4:tla(e); y = Conv(n, V[4,4,1])', 2),
    Law("einsum, bn, output", "", 'x[4,4,4] > y; e = Einsum<equation="bct,co->bot">(x, W[4,4]); y = BN4(e)', 0, ("do not agree",)),
    Law("einsum, bn of scale, output", "Einsum", 'x[4,4,4] > y; e = Einsum<equation="bct,co->bot">(x, W[4,4]); y = BN4:altscale(e)', 1),
    Law("bn, einsum of heads, add", "Einsum", 'x[4,4,4] > y; b = BN4:alt(x); e = Einsum<equation="bct,chd->bhtd">(b, W[4,2,3]); y = Add(e, A[2,1,3])', 1),
    Law("einsum of each channel by itself, bn of scale", "Einsum", 'x[4,4,4] > y; e = Einsum<equation="bct,cts->bcs">(x, W[4,4,4]); y = BN4:altscale(e)', 1),
    Law("bn of scale, einsum of each channel by itself", "Einsum", 'x[4,4,4] > y; b = BN4:altscale(x); y = Einsum<equation="bct,cts->bcs">(b, W[4,4,4])', 1),
    Law("bn, einsum that sums the steps, add", "Einsum", 'x[4,4,4] > y; b = BN4:alt(x); e = Einsum<equation="bct,co->bo">(b, W[4,4]); y = Add(e, A[4])', 1),
    Law("bn over an axis that the constant lacks", "", 'x[4,4,4] > y; b = BN4:altscale(x); y = Einsum<equation="bct,to->bco">(b, W[4,4])', 0, ("lacks an axis",)),
    Law("einsum of two values, bn", "", 'x[4,4,4] u[4,4,4] > y; f = Floor(x); g = Floor(u); e = Einsum<equation="bct,bts->bcs">(f, g); y = BN4:altscale(e)', 0, ("Einsum",)),
    Law("einsum with dots, bn", "", 'x[4,4,4] > y; e = Einsum<equation="...c,co->...o">(x, W[4,4]); t = Transpose<perm=[0,2,1]>(e); y = BN4:altscale(t)', 0, ("form",)),
    Law("einsum of a diagonal, bn", "", 'x[4,4,4] > y; e = Einsum<equation="bcc,co->bo">(x, W[4,4]); y = BN4:altscale(e)', 0, ("diagonal",)),
]

SEQUENCES = [
    *_recurrent(),
    Law("bn over the steps, LSTM", "", "x[4,4,4] > y; b = BN4(x); y = LSTM<hidden_size=2>(b, W[1,8,4], R[1,8,2])", 0, ("axis",)),
    Law("LSTM, bn", "", 'x[4,4,4] > z; y, h = LSTM<hidden_size=4, activations=["HardSigmoid", "Relu", "Relu"]>(x, W[1,16,4], R[1,16,4]); s = Squeeze(y, A{1}); t = Transpose<perm=[1,2,0]>(s); z = BN4:posscale(t)', 0, ("hidden state",)),
    Law("bn of scale at the first state, GRU", "", "x[4,4,4] u[1,4,2] > y; f = Floor(u); b = BN4:altscale(f); y = GRU<hidden_size=2>(x, W[1,6,4], R[1,6,2], B[1,12], , b)", 0, ("hidden state",)),
    Law("bn, LSTM of computed weights", "", "x[4,4,4] > y; b = BN4(x); t = Transpose<perm=[2,0,1]>(b); w = Floor(W[1,8,4]); y = LSTM<hidden_size=2>(t, w, R[1,8,2])", 0, ("computed",)),
    Law("embedding, bn", "Gather", "i:int[4,4] > y; e = Gather(E[5,4], i); t = Transpose<perm=[0,2,1]>(e); y = BN4:alt0(t)", 1),
    Law("embedding along the second axis, bn", "Gather", "i:int[4] > y; e = Gather<axis=1>(E[4,5], i); t = Transpose(e); y = BN4:alt0(t)", 1),
    Law("embedding of matrices, bn over them", "Gather", "i:int[4] > y; e = Gather(E[5,4,4], i); y = BN4:alt0(e)", 1),
    Law("embedding, bn over the indices", "", "i:int[4,4] > y; e = Gather(E[5,4], i); y = BN4(e)", 0, ("rows of its table",)),
    Law("tied embedding and output weights, bn", "Gather", "i:int[4,4] > y; e = Gather(E[4,4], i); t = Transpose<perm=[0,2,1]>(e); b = BN4:alt0(t); u = Transpose<perm=[0,2,1]>(b); y = MatMul(u, E)", 1),
    Law("bn, tokens chosen at run time, matmul", "Gather", "x[4,4,4] i:int[2,2] > y; b = BN4:alt0(x); t = Transpose<perm=[0,2,1]>(b); g = Gather<axis=1>(t, i); y = MatMul(g, W[4,4])", 1),
    Law("bn, channels chosen at run time", "", "x[4,4,4] i:int[4] > y; b = BN4(x); g = Gather<axis=1>(b, i); y = Conv(g, W[4,4,1])", 0, ("Gather",)),
    Law("conv, tokens chosen at run time, bn", "Gather", "x[4,4,4] i:int[2] > y; c = Conv(x, W[4,4,1]); g = Gather<axis=2>(c, i); y = BN4:alt0(g)", 1),
]

_SE = "g = GlobalAveragePool(c); e = Conv(g, V[4,4,1,1]); h = Floor(e); "
GATES = [
    Law("conv, gate of its mean, bn of scale", "Mul", f"{X} > z; c = Conv(x, W[4,4,1,1]); {_SE}m = Mul(c, h); y = BN4:altscale(m); z = Floor(y)", 1),
    Law("bn of scale, gate of its mean, padded conv", "Mul", f"{X} > y; f = Floor(x); c = BN4:alt0scale(f); {_SE}m = Mul(h, c); y = Conv<{PAD}>(m, U[4,4,3,3])", 1),
    Law("bn of scale, gate, bn, conv", "Mul", f"{X} u[4,4,4,4] > y; f = Floor(x); g = Floor(u); b = BN4:altscale(f); m = Mul(b, g); n = BN4(m); y = Conv(n, W[4,4,1,1])", 2),
    Law("bn, gate", "", f"{X} u[4,4,4,4] > y; f = Floor(x); g = Floor(u); b = BN4(f); m = Mul(b, g); y = Conv(m, W[4,4,1,1])", 0, ("passes no shift",)),
    Law("bn of scale, gate over positions", "Mul", f"{X} u[4,1,4,4] > y; f = Floor(x); g = Floor(u); b = BN4:altscale(f); m = Mul(g, b); y = Conv(m, W[4,4,1,1])", 1),
    Law("gate, broadcast to the values of a bn of scale", "Mul", "x[4,4,4] u[4,4,4] > y; f = Floor(x); g = Floor(u); p = GlobalAveragePool(f); b = BN4:altscale(p); m = Mul(b, g); y = Conv(m, W[4,4,1])", 1),
    Law("bn of scale in the gate", "", f"{X} u[4,4,1,1] > y; f = Floor(x); g = BN4:altscale(u); c = Conv(f, W[4,4,1,1]); y = Mul(c, g)", 0, ("'g'",)),
    Law("conv times conv, bn of scale", "Mul", f"{X} > z; c = Conv(x, W[4,4,1,1]); d = Conv(x, V[4,4,1,1]); m = Mul(c, d); y = BN4:altscale(m); z = Floor(y)", 1),
    Law("conv times itself, bn", "", f"{X} > z; c = Conv(x, W[4,4,1,1]); m = Mul(c, c); y = BN4:altscale(m); z = Floor(y)", 0, ("by itself",)),
    Law("conv times its own floor, bn", "", f"{X} > z; c = Conv(x, W[4,4,1,1]); d = Floor(c); m = Mul(c, d); y = BN4:altscale(m); z = Floor(y)", 0, ("Floor",)),
    Law("product of constants, bn", "", "x[4,4] > y; f = Floor(A[4,4]); m = Mul(f, f); b = BN4:altscale(m); y = Add(x, b)", 0, ("Mul",)),
    Law("conv divided by a value, bn of scale", "Div", f"{X} > z; c = Conv(x, W[4,4,1,1]); a = Abs(x); g = Exp(a); h = Ceil(g); d = Div(c, D:pow[1]); m = Mul(d, h); y = BN4:altscale(m); z = Floor(y)", 1),
    Law("bn of scale divided by a value, conv", "Div", f"{X} u[4,4,4,4] > y; f = Floor(x); a = Abs(u); h = Sign(a); o = Sub(h, O); k = Sub(o, O); b = BN4:altscale(f); m = Div(b, k); y = Conv(m, W[4,4,1,1])", 1, constants={"O": np.float32(2)}),
    Law("a value divided by a bn of scale", "", f"{X} u[4,4,4,4] > y; f = Floor(x); a = Abs(u); c = Ceil(a); b = BN4:altscale(c); g = Exp(b); h = BN4:posscale(g); m = Div(f, h); y = Floor(m)", 0, ("'h'",)),
    Law("weighted sum of tokens, bn of scale", "MatMul", "x[4,4,4] u[4,4,4] > z; g = Floor(u); v = MatMul(x, W[4,4]); m = MatMul(g, v); t = Transpose<perm=[0,2,1]>(m); y = BN4:alt0scale(t); z = Floor(y)", 1),
    Law("bn of scale, weighted sum of tokens, matmul", "MatMul", "x[4,4,4] u[4,4,4] > y; f = Floor(x); g = Floor(u); h = Transpose<perm=[0,2,1]>(g); b = BN4:alt0scale(f); m = MatMul(b, h); t = Transpose<perm=[0,2,1]>(m); y = MatMul(t, W[4,4])", 1),
    Law("bn of scale on the axis that a product sums over", "", "x[4,4,4] u[4,4,4] > y; f = Floor(x); g = Floor(u); b = BN4:altscale(f); y = MatMul(g, b)", 0, ("MatMul",)),
    Law("bn, weighted sum of tokens", "", "x[4,4,4] u[4,4,4] > y; f = Floor(x); g = Floor(u); b = BN4(f); m = MatMul(b, g); t = Transpose<perm=[0,2,1]>(m); y = MatMul(t, W[4,4])", 0, ("passes no shift",)),
    Law("weights of four heads, bn of scale", "MatMul", "x[4,4,4,4] u[4,4,4,4] > y; f = Floor(x); g = Floor(u); b = BN4:altscale(f); m = MatMul(g, b); y = Conv(m, W[4,4,1,1])", 1),
    Law("a vector times values", "", "x[4,4,4] u[4] > y; f = Floor(x); g = Floor(u); b = BN4:altscale(f); y = MatMul(g, b)", 0, ("vector",)),
]

GRAPHS = [
    Law("several consumers, all absorb", "Conv", f"{X} > y z; f = Floor(x); b = BN4:alt0(f); y = Conv(b, W[4,4,1,1]); z = Conv(b, V[4,4,3,3])", 1),
    Law("several consumers, one is padded", "", f"{X} > y z; f = Floor(x); b = BN4(f); y = Conv(b, W[4,4,1,1]); z = Conv<{PAD}>(b, V[4,4,3,3])", 0, ("pads",)),
    Law("producer with a second consumer", "", f"{X} > y z; c = Conv(x, W[4,4,1,1]); y = BN4(c); z = Floor(c)", 0, ("Floor",)),
    Law("producer with a second consumer that absorbs", "Conv", f"{X} > y z; c = Conv(x, W[4,4,1,1]); y = BN4(c); z = Conv(c, V[4,4,3,3])", 1),
    Law("producer of gamma 0 with a second consumer that reads it", "", f"{X} > y z; c = Conv(x, W[4,4,1,1]); y = BN4:alt0(c); z = Conv(c, V[4,4,3,3])", 0, ("gamma = 0",)),
    Law("two equal batch norms, both outputs", "Conv", f"{X} > y z; c = Conv(x, W[4,4,1,1]); y = BatchNormalization<epsilon=0.25>(c, G:pow[4], B[4], M[4], V); z = BatchNormalization<epsilon=0.25>(c, G, B, M, V)", 2, constants={"V": np.array([0.75, 0, 3.75, 0.75], np.float32)}),
    Law("conv output is an output", "", f"{X} > c y; c = Conv(x, W[4,4,1,1]); y = BN4(c)", 0, ("'c'",)),
    Law("conv output is an output, bn goes forward", "Conv", f"{X} > c y; c = Conv(x, W[4,4,1,1]); b = BN4:alt0(c); y = Conv(b, V[4,4,3,3])", 1),
    Law("bn output is an output and read", "Conv", f"{X} > b y; c = Conv(x, W[4,4,1,1]); b = BN4:alt0(c); y = Conv<{PAD}>(b, V[4,4,3,3])", 1),
    Law("one conv, two batch norms", "", f"{X} > y z; c = Conv(x, W[4,4,1,1]); y = BN4(c); z = BN4:tla(c)", 1, ("output",)),
    Law("bn alone", "", f"{X} > y; y = BN4(x)", 0, ("'x'",)),
    Law("bn of an input and an output", "", f"{X} > y; y = BN4:one<epsilon=0.0>(x)", 1, constants={"y.beta": np.zeros(4, np.float32), "y.running_mean": np.zeros(4, np.float32), "y.running_var": np.ones(4, np.float32)}),
    Law("shared weight, two batch norms", "Conv", f"{X} > y z; c = Conv(x, W[4,4,1,1], B[4]); y = BN4:alt0(c); d = Conv(y, W, B); z = BN4:tla(d)", 2, ir_version=10),
    Law("shared weight, one use without", "Conv", f"{X} > y z; c = Conv(x, W[4,4,1,1], B[4]); y = BN4:alt0(c); z = Conv(x, W, B)", 1),
    Law("shared weight, the same batch norm", "Conv", f"{X} > y z; c = Conv(x, W[4,4,1,1], B[4]); y = BatchNormalization<epsilon=0.25>(c, G:pow[4], S[4], M[4], V:pos[4]); d = Conv(y, W, B); z = BatchNormalization<epsilon=0.25>(d, G, S, M, V)", 2, constants={"V": np.array([0.75, 0, 3.75, 0.75], np.float32)}),
    Law("bias is beta", "Conv", f"{X} > y; c = Conv(x, W[4,4,1,1], B[4]); y = BatchNormalization<epsilon=0.25>(c, G:pow[4], B, M[4], V)", 1, constants={"V": np.array([0.75, 0, 3.75, 0.75], np.float32)}),
    Law("bias is beta of another that stays", "Conv", f"{X} > y z; c = Conv(x, W[4,4,1,1], B[4]); y = BatchNormalization<epsilon=0.25>(c, G:pow[4], B, M[4], V); z = BatchNormalization<epsilon=0.25>(x, G, B, M, V)", 1, ("'x'",), constants={"V": np.array([0.75, 0, 3.75, 0.75], np.float32)}),
    Law("beta is mean is gamma", "Conv", f"{X} > y; c = Conv(x, W[4,4,1,1]); y = BatchNormalization<epsilon=0.25>(c, G:pow[4], G, G, V)", 1, constants={"V": np.array([0.75, 0, 3.75, 0.75], np.float32)}),
    Law("kept bn whose beta is its mean", "BatchNormalization", f"{X} > z; f = Floor(x); a = BN4(f); y = BatchNormalization<epsilon=0.25>(a, G:pow[4], B[4], B, V); z = Floor(y)", 1, ("Floor",), constants={"V": np.array([0.75, 0, 3.75, 0.75], np.float32)}),
    Law("constants as nodes", "Conv", f"{X} > y; c = Conv(x, W[4,4,3,3], B[4]); y = BN4:alt0(c)", 1, nodes=True),
    Law("constants as nodes, no bias", "Conv", f"{X} > y; c = Conv(x, W[4,4,3,3]); y = BN4:alt0(c)", 1, nodes=True),
    Law("constants as nodes, forward", "Gemm", "x[4,4] > y; b = BN4:alt0(x); t = Transpose(W[4,4]); y = Gemm(b, t, C[])", 1, nodes=True),
    Law("weight behind transpose", "MatMul", "x[4,4] > y; t = Transpose(W[4,4]); c = MatMul(x, t); y = BN4:alt0(c)", 1),
    Law("weight behind transpose, reshape, identity", "Conv", f"{X} > y; i = Identity(W[4,4]); t = Transpose<perm=[1,0]>(i); u = Reshape(t, S{{4,4,1,1}}); c = Conv(x, u); y = BN4:alt0(c)", 1),
    Law("weight behind unsqueeze and squeeze", "Conv", "x[4,4,4] > y; i = Unsqueeze(W[4,4,1,1], A{2}); t = Squeeze(i, A{2}); j = Squeeze(t, D{3}); c = Conv(x, j); y = BN4:alt0(c)", 1),
    Law("one weight, once straight and once transposed", "MatMul", "x[4,4] > y z; t = Transpose(W[4,4]); c = MatMul(x, t); y = BN4:alt(c); d = MatMul(x, W); z = BN4:tla(d)", 2),
    Law("one view, two readers", "MatMul", "x[4,4] > y z; t = Transpose(W[4,4]); c = MatMul(x, t); y = BN4:alt(c); z = MatMul(x, t)", 1),
    Law("view is an output", "", "x[4,4] > y t; t = Transpose(W[4,4]); c = MatMul(x, t); y = BN4:alt(c)", 0, ("MatMul",)),
    Law("weight behind cast from integers", "Conv", f"{X} > y; w = Cast<to=1>(W); c = Conv(x, w); y = BN4:alt0(c)", 1, constants={"W": np.arange(-8, 8, dtype=np.int8).reshape(4, 4, 1, 1)}),
    Law("weight truncated by a cast", "Conv", f"{X} > y; i = Cast<to=6>(W); w = Cast<to=1>(i); c = Conv(x, w); y = BN4:alt0(c)", 1, constants={"W": np.arange(-8, 8, dtype=np.float32).reshape(4, 4, 1, 1) / 2}),
    Law("statistics behind identity", "Conv", f"{X} > y; c = Conv(x, W[4,4,1,1]); g = Identity(G:pow[4]); v = Identity(V); y = BatchNormalization<epsilon=0.25>(c, g, B[4], M[4], v)", 1, constants={"V": np.array([0.75, 0, 3.75, 0.75], np.float32)}),
    Law("computed statistics", "", f"{X} > y; c = Conv(x, W[4,4,1,1]); g = GlobalAveragePool(x); h = Abs(g); a = ReduceMean<keepdims=0>(h, A{{0,2,3}}); y = BatchNormalization<epsilon=0.25>(c, G:pow[4], B[4], a, V)", 0, ("computed",), constants={"V": np.array([0.75, 0, 3.75, 0.75], np.float32)}),
    Law("computed weight", "", f"{X} > y; w = Floor(W[4,4,1,1]); c = Conv(x, w); y = BN4(c)", 0, ("computed",)),
    Law("weight is an input", "", f"{X} w[4,4,1,1] > y; c = Conv(x, w); y = BN4(c)", 0, ("computed",)),
    Law("eps 0", "Conv", f"{X} > y; c = Conv(x, W[4,4,1,1]); y = BN4<epsilon=0.0>(c)", 1, constants={"y.running_var": np.array([1, 4, 0.25, 1], np.float32)}),
    Law("opset 7", "Conv", f"{X} > y; c = Conv(x, W[4,4,3,3], B[4]); y = BN4:alt0(c)", 1, opset=7, ir_version=3, listed=True),
    Law("opset 7, no bias", "Conv", f"{X} > y; c = Conv(x, W[4,4,3,3]); y = BN4:alt0(c)", 1, opset=7, ir_version=3, listed=True),
    Law("opset 9", "Conv", f"{X} > y; c = Conv(x, W[4,4,3,3], B[4]); y = BN4:alt0(c)", 1, opset=9, ir_version=4),
    Law("opset 13", "Conv", f"{X} > y; c = Conv(x, W[4,4,3,3], B[4]); y = BN4:alt0(c)", 1, opset=13, ir_version=7),
    Law("opset 14, training_mode 0", "Conv", f"{X} > y; c = Conv(x, W[4,4,3,3], B[4]); y = BN4:alt0<epsilon=0.25, training_mode=0>(c)", 1, opset=14, ir_version=7),
    Law("initializers a caller may override", "", f"{X} > y; c = Conv(x, W[4,4,3,3], B[4]); y = BN4(c)", 0, ("override",), listed=True),
    Law("free batch", "Conv", "x[N,4,4,4] > y; c = Conv(x, W[4,4,3,3]); y = BN4:alt0(c)", 1),
    Law("free height and width", "Conv", "x[N,4,H,W] > y; c = Conv(x, W0[4,4,3,3]); y = BN4:alt0(c)", 1),
    Law("bn 2-D", "MatMul", "x[4,4] > y; b = BN4:alt0(x); y = MatMul(b, W[4,4])", 1),
    Law("inside a branch", "Conv", f"{X} > y; s = ReduceSum<keepdims=0>(x); b = Greater(s, Z); y = If(b) <then_branch = t () => (float[4,4,4,4] o) {{ c = Conv(x, W[4,4,1,1]); o = BN4:alt0(c) }}, else_branch = e () => (float[4,4,4,4] p) {{ p = Identity(x) }}>", 1, constants={"Z": np.float32(-1e6)}),
]

MAPS = [  # constant multiplications and additions that go
    Law("mask of infinities", "", "x[4,4,4] k[4,4,4] > z; q = MatMul(x, W[4,4]); s = MatMul(q, k); a = Add(s, M); d = Div(a, D:pos[]); z = Softmax(d)", 0, absorbed=0, reference=False, constants={"M": np.triu(np.full((4, 4), -np.inf, np.float32), 1)}),
    Law("taken-apart bn behind a conv", "Conv", f"{X} > y; c = Conv(x, W[4,4,3,3], B[4]); s = Sub(c, M[4,1,1]); d = Mul(G:pow[4,1,1], s); y = Add(d, A[4,1,1])", 0, absorbed=3),
    Law("taken-apart bn before a conv", "Conv", f"{X} > y; s = Sub(x, M[1,4,1,1]); d = Div(s, D:pow[4,1,1]); m = Mul(d, G:pow[4,1,1]); a = Add(A[4,1,1], m); y = Conv(a, W[4,4,3,3])", 0, absorbed=4),
    Law("constant - value, conv", "Conv", f"{X} > y; s = Sub(A[4,1,1], x); y = Conv(s, W[4,4,3,3])", 0, absorbed=1),
    Law("scalars around a conv", "Conv", f"{X} > y; s = Sub(x, M[]); c = Conv(s, W[4,4,3,3]); y = Mul(D:pow[], c)", 0, absorbed=2),
    Law("mean and std of an input, padded conv", "Conv", f"{X} > y; s = Sub(x, M[4,1,1]); m = Mul(s, G:pow[4,1,1]); y = Conv<{PAD}>(m, W[4,4,3,3])", 0, absorbed=1),
    Law("scale of a layer inside a residual", "Conv", f"{X} > y; c = Conv<{PAD}>(x, W[4,4,3,3]); m = Mul(c, G:pow[4,1,1]); y = Add(x, m)", 0, absorbed=1),
    Law("mul between relus", "Conv", f"{X} > y; c = Conv(x, W[4,4,1,1]); r = Relu(c); m = Mul(r, G:pos[4,1,1]); s = Relu(m); y = Floor(s)", 0, absorbed=1),
    Law("bias of a matmul stays", "", "x[4,4] > y; c = MatMul(x, W[4,4]); y = Add(c, B[4])", 0, absorbed=0),
    Law("add before a matmul without bias stays", "", "x[4,4] > y; a = Add(x, A[4]); y = MatMul(a, W[4,4])", 0, absorbed=0),
    Law("mul along the columns stays", "", f"{X} > y; c = Conv(x, W[4,4,1,1]); y = Mul(c, M:pow[4])", 0, absorbed=0),
    Law("mul that stretches stays", "", "x[4,1,4,4] > y; c = Conv(x, W[1,1,1,1]); y = Mul(c, M:pow[4,1,1])", 0, absorbed=0),
    Law("add that stretches stays", "", "x[4,4,1,1] > y; c = Conv(x, W[4,4,1,1]); y = Add(c, A[1,1,4,1])", 0, absorbed=0),
    Law("mul by 0 stays", "", f"{X} > y; c = Conv(x, W[4,4,1,1]); d = Mul(c, M); y = Floor(d)", 0, absorbed=0, constants={"M": np.array([0, 2, -1, 1], np.float32).reshape(4, 1, 1)}),
    Law("mul of a value with two readers", "", f"{X} > y z; c = Conv(x, W[4,4,1,1]); y = Floor(c); z = Mul(c, M:pow[4,1,1])", 0, absorbed=0, reference=True),
    Law("mul of a branch of a sum", "Conv", f"{X} > y; c = Conv(x, W[4,4,1,1]); m = Mul(c, M); a = Add(m, c); r = Relu(a); b = BN4:pos(r); y = Conv(b, V[4,4,1,1])", 1, absorbed=0, constants={"M": np.array([-2, -1, -4, -2], np.float32).reshape(4, 1, 1)}),
]

REPAIRED = [
    Law("conv, relu, bn", "Relu", f"{X} > z; c = Conv(x, W[4,4,1,1], B[4]); r = Relu(c); y = BN4:pos(r); z = Floor(y)", 1, repairs=("clamp",)),
    Law("conv, relu, bn of both signs", "Relu", f"{X} > z; c = Conv(x, W[4,4,1,1], B[4]); r = Relu(c); y = BN4(r); z = Floor(y)", 1, repairs=("clamp",)),
    Law("conv, relu, bn of negative signs", "Relu", f"{X} > z; c = Conv(x, W[4,4,1,1], B[4]); r = Relu(c); y = BN4:neg(r); z = Floor(y)", 1, repairs=("clamp",)),
    Law("bn, relu, conv", "Relu", f"{X} > y; b = BN4:pos(x); r = Relu(b); y = Conv(r, W[4,4,3,3])", 1, repairs=("clamp",)),
    Law("bn of both signs, relu, conv", "Relu", f"{X} > y; b = BN4:alt(x); r = Relu(b); y = Conv(r, W[4,4,3,3])", 1, repairs=("clamp",)),
    Law("bn, gamma 0, relu, conv", "Relu", f"{X} > y; b = BN4:alt0(x); r = Relu(b); y = Conv(r, W[4,4,3,3])", 1, repairs=("clamp",)),
    Law("bn, clip, conv", "", f"{X} > y; b = BN4:alt(x); r = Clip(b, L, H); y = Conv(r, W[4,4,3,3])", 1, repairs=("clamp",), constants={"L": np.float32(-1), "H": np.float32(6)}),
    Law("bn, clip from below, conv", "", f"{X} > y; b = BN4:alt(x); r = Clip(b, L); y = Conv(r, W[4,4,3,3])", 1, repairs=("clamp",), constants={"L": np.float32(-1)}),
    Law("bn, clip with attributes, conv", "", f"{X} > y; b = BN4:alt(x); r = Clip<min=-1.0, max=6.0>(b); y = Conv(r, W[4,4,3,3])", 1, repairs=("clamp",), opset=8, ir_version=4),
    Law("bn, relu, conv without the repair", "", f"{X} > y; b = BN4:pos(x); r = Relu(b); y = Conv(r, W[4,4,3,3])", 0, ("Relu",), repairs=("border",)),
    Law("no max that broadcasts", "", f"{X} > y; b = BN4:pos(x); r = Relu(b); y = Conv(r, W[4,4,3,3])", 0, ("Relu",), repairs=("clamp",), opset=7, ir_version=4),
    Law("no clamp where none is needed", "Conv", f"{X} > y; b = BN4:pos(x); c = Conv(b, W[4,4,1,1]); r = Relu(c); d = BN4:altscale(r); y = Conv<{PAD}>(d, V[4,4,3,3])", 2, repairs=("clamp", "border")),
    Law("concat, bn, relu, conv", "Relu", f"{X} u[4,4,4,4] > y z; a = Concat<axis=1>(x, u); b = BN8:alt(a); r = Relu(b); y = Conv(r, W[4,8,1,1]); c = BN8:pos(a); s = Relu(c); z = Conv(s, V[4,8,1,1])", 2, repairs=("clamp",)),
    Law("bn, padded conv, repaired", "Conv", f"{X} > y; b = BN4(x); y = Conv<{PAD}>(b, W[4,4,3,3], B[4])", 1, repairs=("border",)),
    Law("bn, gamma 0, padded conv, repaired", "Conv", f"{X} > y; b = BN4:alt0(x); y = Conv<{PAD}>(b, W[4,4,3,3])", 1, repairs=("border",)),
    Law("bn, conv padded at one end, repaired", "Conv", f"{X} > y; b = BN4(x); y = Conv<pads=[0,2,1,0], strides=[1,2], dilations=[1,2]>(b, W[4,4,3,2])", 1, repairs=("border",)),
    Law("bn, SAME_UPPER conv, repaired", "Conv", f'{X} > y; b = BN4(x); y = Conv<auto_pad="SAME_UPPER">(b, W[4,4,2,3])', 1, repairs=("border",)),
    Law("bn, SAME_LOWER conv, repaired", "Conv", f'{X} > y; b = BN4(x); y = Conv<auto_pad="SAME_LOWER", strides=[2,2]>(b, W[4,4,3,2])', 1, repairs=("border",)),
    Law("bn, padded grouped conv, repaired", "Conv", f"{X} > y; b = BN4(x); y = Conv<{PAD}, group=2>(b, W[4,2,3,3])", 1, repairs=("border",)),
    Law("bn, padded depthwise conv, repaired", "Conv", f"{X} > y; b = BN4(x); y = Conv<{PAD}, group=4>(b, W[8,1,3,3], B[8])", 1, repairs=("border",)),
    Law("bn, padded conv 1-D, repaired", "Conv", "x[4,4,4] > y; b = BN4(x); y = Conv<pads=[1,1]>(b, W[4,4,3])", 1, repairs=("border",)),
    Law("bn, padded conv 3-D, repaired", "Conv", "x[2,2,2,2,2] > y; b = BN2(x); y = Conv<pads=[1,0,1,0,1,1]>(b, W[2,2,2,2,2])", 1, repairs=("border",)),
    Law("bn, padded conv, bn, repaired", "Conv", f"{X} > y; b = BN4:alt(x); c = Conv<{PAD}>(b, W[4,4,3,3]); y = BN4:alt0(c)", 2, repairs=("border",)),
    Law("bn, transposed conv, repaired", "ConvTranspose", f"{X} > y; b = BN4(x); y = ConvTranspose(b, W[4,4,3,3], B[4])", 1, repairs=("border",)),
    Law("bn, transposed conv, groups, repaired", "ConvTranspose", f"{X} > y; b = BN4(x); y = ConvTranspose<group=2, strides=[2,2], pads=[1,0,0,1], output_padding=[1,0]>(b, W[4,3,3,2])", 1, repairs=("border",)),
    Law("bn, transposed conv, dilated, repaired", "ConvTranspose", f"{X} > y; b = BN4(x); y = ConvTranspose<strides=[3,2], dilations=[2,3]>(b, W[4,4,2,3])", 1, repairs=("border",)),
    Law("bn, transposed conv 1x1", "ConvTranspose", f"{X} > y; b = BN4(x); y = ConvTranspose(b, W[4,4,1,1])", 1),
    Law("bn, transposed conv 1x1, stride", "", f"{X} > y; b = BN4(x); y = ConvTranspose<strides=[2,2]>(b, W[4,4,1,1])", 0, ("border",)),
    Law("bn, transposed conv 1x1, padded", "", f"{X} > y; b = BN4(x); y = ConvTranspose<pads=[1,0,0,0]>(b, W[4,4,1,1])", 0, ("border",)),
    Law("bn, transposed conv 1x1, cropped", "", f"{X} > y; b = BN4(x); y = ConvTranspose<output_padding=[1,0], strides=[2,1]>(b, W[4,4,1,1])", 0, ("border",)),
    Law("bn, transposed conv with an output shape", "", f"{X} > y; b = BN4(x); y = ConvTranspose<output_shape=[6,6]>(b, W[4,4,3,3])", 0, ("border",), repairs=("border",)),
    Law("bn, relu, padded conv, both repairs", "Relu", f"{X} > y; b = BN4:alt(x); r = Relu(b); y = Conv<{PAD}>(r, W[4,4,3,3])", 1, repairs=("border", "clamp")),
    Law("bn, padded conv to one place, repaired", "Conv", "x[4,4,2,2] > y; b = BN4(x); y = Conv<pads=[0,0,1,1]>(b, W[4,4,3,3])", 1, repairs=("border",)),
    Law("bn, padded conv of free size", "", "x[N,4,H,W] > y; b = BN4(x); y = Conv<pads=[1,1,1,1]>(b, W[4,4,3,3])", 0, ("pads with zeros",), repairs=("border",)),
    Law("bn, padded conv, free batch, repaired", "Conv", "x[N,4,4,4] > y; b = BN4(x); y = Conv<pads=[1,1,1,1]>(b, V[4,4,3,3])", 1, repairs=("border",)),
]

# The repairs that nobody needs to ask for, and the Pad.
ONE_NUMBER = [
    Law("conv, relu, bn of one shift, padded conv", "Relu", f"{X} > y; c = Conv(x, W[4,4,1,1], B[4]); r = Relu(c); d = BN4:possame(r); y = Conv<{PAD}>(d, V[4,4,3,3])", 1),
    Law("conv, relu, bn of one shift", "Relu", f"{X} > z; c = Conv(x, W[4,4,1,1], B[4]); r = Relu(c); y = BN4:possame(r); z = Floor(y)", 1),
    Law("bn of one shift, relu, conv", "Relu", f"{X} > y; b = BN4:possame(x); r = Relu(b); y = Conv(r, W[4,4,3,3])", 1),
    Law("bn of one shift, relu, padded conv", "", f"{X} > y; b = BN4:possame(x); r = Relu(b); y = Conv<{PAD}>(r, W[4,4,3,3])", 0, ("pads with zeros",)),
    Law("conv, relu, max pool, bn of one shift, padded conv", "MaxPool", f"{X} > y; c = Conv(x, W[4,4,1,1]); r = Relu(c); m = MaxPool<kernel_shape=[2,2], {PAD}>(r); d = BN4:possame(m); y = Conv<{PAD}>(d, V[4,4,3,3])", 1),
    Law("conv, relu, bn of one negative shift", "", f"{X} > z; c = Conv(x, W[4,4,1,1], B[4]); r = Relu(c); y = BN4:negsame(r); z = Floor(y)", 0, ("positive",)),
    Law("conv, relu, bn of one shift and several scales", "Relu", f"{X} > y; c = Conv(x, W[4,4,1,1]); r = Relu(c); s = BN4:posscale(r); d = BN4:shiftsame(s); y = Conv<{PAD}>(d, V[4,4,3,3])", 2),
    Law("conv, clip, bn of one shift, padded conv", "Conv", f"{X} > y; c = Conv(x, W[4,4,1,1], B[4]); r = Clip(c, L, H); d = BN4:possame(r); y = Conv<{PAD}>(d, V[4,4,3,3])", 1, constants={"L": np.float32(0), "H": np.float32(6)}),
    Law("conv, clip from above, bn of one shift", "Conv", f"{X} > z; c = Conv(x, W[4,4,1,1], B[4]); r = Clip(c, , H); y = BN4:possame(r); z = Floor(y)", 1, constants={"H": np.float32(2)}),
    Law("conv, clip from below, bn of one shift", "Conv", f"{X} > z; c = Conv(x, W[4,4,1,1], B[4]); r = Clip(c, L); y = BN4:possame(r); z = Floor(y)", 1, constants={"L": np.float32(-1)}),
    Law("conv, clip, bn of several shifts", "", f"{X} > z; c = Conv(x, W[4,4,1,1], B[4]); r = Clip(c, L, H); y = BN4:pos(r); z = Floor(y)", 0, ("Clip",), constants={"L": np.float32(0), "H": np.float32(6)}),
    Law("conv, clip, bn of one negative shift", "", f"{X} > z; c = Conv(x, W[4,4,1,1], B[4]); r = Clip(c, L, H); y = BN4:negsame(r); z = Floor(y)", 0, ("positive",), constants={"L": np.float32(0), "H": np.float32(6)}),
    Law("two clips with the same constants, bn of one shift", "Conv", f"{X} > y q; c = Conv(x, W[4,4,1,1], B[4]); r = Clip(c, L, H); d = BN4:possame(r); y = Conv<{PAD}>(d, V[4,4,3,3]); q = Clip(x, L, H)", 1, constants={"L": np.float32(0), "H": np.float32(6)}),
    Law("clip with an infinite bound, bn of one shift", "", f"{X} > z; c = Conv(x, W[4,4,1,1], B[4]); r = Clip(c, L, H); y = BN4:possame(r); z = Floor(y)", 0, ("Clip",), constants={"L": np.float32(0), "H": np.float32(np.inf)}),
    Law("conv, relu, bn of one shift, old opset", "", f"{X} > z; c = Conv(x, W[4,4,1,1], B[4]); r = Relu(c); y = BN4:possame(r); z = Floor(y)", 0, ("Relu",), opset=10, ir_version=5),
    Law("conv, relu, sub, div, padded conv", "Relu", f"{X} > y; c = Conv(x, W[4,4,1,1], B[4]); r = Relu(c); m = Sub(r, M); d = Div(m, S); y = Conv<{PAD}>(d, V[4,4,3,3])", 0, absorbed=2, constants={"M": np.float32(0.75), "S": np.float32(0.5)}),
    Law("conv, relu, sub, div, padded conv, residual", "Add", f"{X} > y; c = Conv(x, W[4,4,1,1], B[4]); r = Relu(c); m = Sub(r, M); d = Div(m, S); e = Conv<{PAD}>(d, V[4,4,3,3]); a = Add(e, d); s = Relu(a); n = Sub(s, M); y = Conv<{PAD}>(n, U[4,4,3,3])", 0, absorbed=3, constants={"M": np.float32(0.75), "S": np.float32(0.5)}),
    Law("conv, relu, sub of a number per channel, padded conv", "Conv", f"{X} > y; c = Conv(x, W[4,4,1,1], B[4]); r = Relu(c); m = Sub(r, M[4,1,1]); d = Div(m, S); y = Conv<{PAD}>(d, V[4,4,3,3])", 0, absorbed=1, constants={"S": np.float32(0.5)}),
    Law("conv, leaky relu, sub, padded conv", "", f"{X} > y; c = Conv(x, W[4,4,1,1], B[4]); r = LeakyRelu<alpha=0.5>(c); m = Sub(r, M); y = Conv<{PAD}>(m, V[4,4,3,3])", 0, absorbed=0, constants={"M": np.float32(0.75)}),
    Law("conv, leaky relu, sub, padded conv, with a pad", "Conv", f"{X} > y; c = Conv(x, W[4,4,1,1], B[4]); r = LeakyRelu<alpha=0.5>(c); m = Sub(r, M); y = Conv<{PAD}>(m, V[4,4,3,3])", 0, absorbed=1, constants={"M": np.float32(0.75)}, repairs=("pad",)),
    Law("one sub, two padded convs, with pads", "", f"{X} > y z; f = Floor(x); m = Sub(f, M); y = Conv<{PAD}>(m, V[4,4,3,3]); z = Conv<{PAD}>(m, W[4,4,3,3])", 0, absorbed=0, constants={"M": np.float32(0.75)}, repairs=("pad",)),
    Law("bn of one shift of the input, padded conv", "Conv", f"{X} > y; b = BN4:same(x); y = Conv<{PAD}>(b, W[4,4,3,3])", 1),
    Law("sub and div of the input, padded conv", "Conv", f"{X} > y; m = Sub(x, M); d = Div(m, S); y = Conv<{PAD}>(d, W[4,4,3,3], B[4])", 0, absorbed=2, constants={"M": np.float32(0.75), "S": np.float32(0.5)}),
    Law("bn of one shift of an input of one channel", "Conv", "x[4,1,4,4] > y; b = BN1:pos(x); y = Conv<pads=[1,1,1,1]>(b, W[4,1,3,3])", 1, constants={"b.beta": np.float32([3])}),
    Law("bn of one shift of the input, two padded convs", "", f"{X} > y z; b = BN4:same(x); y = Conv<{PAD}>(b, W[4,4,3,3]); z = Conv<{PAD}>(b, V[4,4,3,3])", 0, ("operators would come",)),
    Law("bn of one shift, padded conv", "", f"{X} > y; f = Floor(x); b = BN4:same(f); y = Conv<{PAD}>(b, W[4,4,3,3])", 0, ("pads with zeros",)),
    Law("bn of one shift, padded conv, with a pad", "Conv", f"{X} > y; f = Floor(x); b = BN4:same(f); y = Conv<{PAD}>(b, W[4,4,3,3])", 1, repairs=("pad",)),
    Law("bn of one negative shift, padded conv, with a pad", "Conv", f"{X} > y; f = Floor(x); b = BN4:negsame(f); y = Conv<{PAD}>(b, W[4,4,3,3], B[4])", 1, repairs=("pad",)),
    Law("bn, padded conv, no pad", "", f"{X} > y; f = Floor(x); b = BN4(f); y = Conv<{PAD}>(b, W[4,4,3,3])", 0, ("pads with zeros",), repairs=("pad",)),
    Law("bn of one shift, padded conv of free size, with a pad", "Conv", "x[N,4,H,W] > y; f = Floor(x); b = BN4:same(f); y = Conv<pads=[1,1,1,1]>(b, W[4,4,3,3])", 1, repairs=("pad",)),
    Law("bn of one shift, SAME_UPPER conv of free size, no pad", "", 'x[N,4,H,W] > y; f = Floor(x); b = BN4:same(f); y = Conv<auto_pad="SAME_UPPER">(b, W[4,4,3,3])', 0, ("pads with zeros",), repairs=("pad",)),
    Law("bn of one shift, conv padded at one end, with a pad", "Conv", f"{X} > y; f = Floor(x); b = BN4:same(f); y = Conv<pads=[0,2,1,0], strides=[1,2], dilations=[1,2]>(b, W[4,4,3,2])", 1, repairs=("pad",)),
    Law("bn of one shift, SAME_UPPER conv, with a pad", "Conv", f'{X} > y; f = Floor(x); b = BN4:same(f); y = Conv<auto_pad="SAME_UPPER">(b, W[4,4,2,3])', 1, repairs=("pad",)),
    Law("bn of one shift, SAME_LOWER conv, with a pad", "Conv", f'{X} > y; f = Floor(x); b = BN4:same(f); y = Conv<auto_pad="SAME_LOWER", strides=[2,2]>(b, W[4,4,3,2])', 1, repairs=("pad",)),
    Law("bn of one shift, padded grouped conv, with a pad", "Conv", f"{X} > y; f = Floor(x); b = BN4:same(f); y = Conv<{PAD}, group=2>(b, W[4,2,3,3])", 1, repairs=("pad",)),
    Law("bn of one shift, padded depthwise conv, with a pad", "Conv", f"{X} > y; f = Floor(x); b = BN4:same(f); y = Conv<{PAD}, group=4>(b, W[8,1,3,3], B[8])", 1, repairs=("pad",)),
    Law("bn of one shift, padded conv 1-D, with a pad", "Conv", "x[4,4,4] > y; f = Floor(x); b = BN4:same(f); y = Conv<pads=[1,2]>(b, W[4,4,3])", 1, repairs=("pad",)),
    Law("bn of one shift, padded conv 3-D, with a pad", "Conv", "x[2,2,2,2,2] > y; f = Floor(x); b = BN2:same(f); y = Conv<pads=[1,0,1,0,1,1]>(b, W[2,2,2,2,2])", 1, repairs=("pad",)),
    Law("bn of one shift and several, both repairs", "Conv", f"{X} > y z; f = Floor(x); b = BN4:same(f); y = Conv<{PAD}>(b, W[4,4,3,3]); d = BN4:alt(f); z = Conv<{PAD}>(d, V[4,4,3,3])", 2, repairs=("pad", "border")),
    Law("bn of one shift, padded average pool", "", f"{X} > y; f = Floor(x); b = BN4:same(f); p = AveragePool<kernel_shape=[2,2], {PAD}, count_include_pad=1>(b); y = Conv(p, W[4,4,1,1])", 0, ("AveragePool",)),
    Law("bn of one shift, padded average pool, with a pad", "AveragePool", f"{X} > y; f = Floor(x); b = BN4:same(f); p = AveragePool<kernel_shape=[2,2], strides=[2,1], {PAD}, count_include_pad=1>(b); y = Conv(p, W[4,4,1,1])", 1, repairs=("pad",)),
    Law("bn of one shift, rounded up average pool, no pad", "", f"{X} > y; f = Floor(x); b = BN4:same(f); p = AveragePool<kernel_shape=[2,2], strides=[2,2], {PAD}, count_include_pad=1, ceil_mode=1>(b); y = Conv(p, W[4,4,1,1])", 0, ("AveragePool",), repairs=("pad",)),
]

LAWS: list[Law] = [
    *MAPS, *REPAIRED, *ONE_NUMBER, *LINEAR, *GEMM, *DIAGONAL, *PASSING, *WINDOWS, *STRUCTURE, *SEVERAL, *STREAMS, *PARALLEL, *CHAIN_LAWS, *GATES, *EINSUMS, *SEQUENCES, *GRAPHS, *CONSTANT_LAWS,
]
