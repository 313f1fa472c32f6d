"""The forms in which models carry their constants, one line per case (see `tests.laws`)."""

# a table is read by its columns
# fmt: off

from __future__ import annotations

import numpy as np

from tests.law_models import Law

X = "x[4,4,4,4]"
PAD = "pads=[1,1,1,1]"
_VAR = {"V": np.array([0.75, 0, 3.75, 0.75], np.float32), "E": np.float32(0.25)}
_ROOT = "v = Add(V, E); r = Sqrt(v); s = Div(G:pow[4], r); "

EXPRESSIONS = [
    Law("bn taken apart to its statistics, behind a conv", "Conv", f"{X} > y; {_ROOT}u = Unsqueeze(s, A{{1,2}}); c = Conv(x, W[4,4,3,3], B[4]); d = Sub(c, M[4,1,1]); m = Mul(d, u); y = Add(m, T[4,1,1])", 0, absorbed=3, constants=_VAR),
    Law("bn taken apart to its statistics, before a conv", "Conv", f"{X} > y; {_ROOT}m = Mul(M[4], s); b = Sub(T[4], m); u = Reshape(s, R{{4,1,1}}); w = Reshape(b, R); d = Mul(u, x); e = Add(w, d); y = Conv(e, W[4,4,3,3])", 0, absorbed=2, constants=_VAR),
    Law("bn taken apart with a reciprocal, padded conv behind", "Conv", f"{X} > y; v = Add(E, V); r = Sqrt(v); p = Reciprocal(r); s = Mul(p, G:pow[4]); n = Neg(M[4]); m = Mul(n, s); u = Unsqueeze(s, A{{1,2}}); w = Unsqueeze(m, A); c = Conv(x, W[4,4,1,1]); d = Mul(c, u); e = Add(d, w); y = Conv<{PAD}>(e, U[4,4,3,3])", 0, absorbed=2, constants=_VAR),
    Law("bn taken apart with a power", "Conv", f"{X} > y; v = Add(V, E); s = Pow(v, P); u = Unsqueeze(s, A{{1,2}}); c = Conv(x, W[4,4,1,1]); y = Mul(c, u)", 0, absorbed=1, constants=_VAR | {"P": np.float32(-0.5)}),
    Law("bn whose parameters are computed", "Conv", f"{X} > y; g = Mul(G:pow[4], H:pow[4]); b = Sub(B[4], T[4]); v = Max(V, Z); c = Conv(x, W[4,4,3,3]); y = BatchNormalization<epsilon=0.25>(c, g, b, M[4], v)", 1, constants=_VAR | {"Z": np.float32(0)}),
    Law("bn that stays, its parameters computed", "BatchNormalization", f"{X} > z; f = Floor(x); a = BN4(f); g = Mul(G:pow[4], H:pow[4]); y = BatchNormalization<epsilon=0.25>(a, g, B[4], M[4], V); z = Floor(y)", 1, ("Floor",), constants=_VAR),
    Law("weight that is a product, bn", "Conv", f"{X} > y; w = Mul(W[4,4,3,3], G:pow[4,1,1,1]); c = Conv(x, w, B[4]); y = BN4:alt0(c)", 1),
    Law("weight that is a product, read twice", "Conv", f"{X} > y z; w = Mul(W[4,4,1,1], G:pow[4,1,1,1]); c = Conv(x, w); y = BN4:alt0(c); z = Conv(y, w)", 1),
    Law("weight read straight and as a product", "Conv", f"{X} > y z; w = Mul(W[4,4,1,1], G:pow[4,1,1,1]); c = Conv(x, w); y = BN4:alt0(c); d = Conv(x, W); z = BN4:tla(d)", 2),
    Law("weight that is an output too", "", f"{X} > y w; w = Mul(W[4,4,1,1], G:pow[4,1,1,1]); c = Conv(x, w); y = BN4(c)", 0, ("computed",)),
    Law("weight of zero mean", "Conv", f"{X} > y; m = ReduceMean(W[4,4,1,1], A{{1,2,3}}); w = Sub(W, m); c = Conv(x, w); y = BN4:alt0(c)", 1),
    Law("weight of parts, transposed", "MatMul", "x[4,4] > y; w = Concat<axis=0>(W[2,4], V[2,4]); t = Transpose(w); c = MatMul(x, t); y = BN4:alt0(c)", 1),
    Law("weight cut from a larger one", "Gemm", "x[4,4] > y; w = Slice(W[6,4], A{1}, E{5}, D{0}); c = Gemm<transB=1>(x, w, B[4]); y = BN4:alt0(c)", 1),
    Law("weight whose rows are chosen", "Gemm", "x[4,4] > y; w = Gather(W[6,4], I{5,0,3,1}); c = Gemm<transB=1>(x, w); y = BN4:alt0(c)", 1),
    Law("bias of zeros that is computed", "Conv", f"{X} > y; b = ConstantOfShape(S{{4}}); e = Expand(O[1], S); f = Add(b, e); c = Conv(x, W[4,4,3,3], f); y = BN4:alt0(c)", 1),
    Law("bias of zeros from a scalar", "Conv", f"{X} > y; b = ConstantOfShape(S{{4}}); c = Conv(x, W[4,4,3,3], b); y = BN4:alt0(c)", 1),
    Law("weights of an LSTM in parts", "LSTM", 'x[4,4,4] > y; i = Unsqueeze(W[8,4], A{0}); j = Unsqueeze(U[8,4], A); w = Concat<axis=1>(i, j); b = BN4:alt0(x); t = Transpose<perm=[2,0,1]>(b); y = LSTM<hidden_size=4, activations=["HardSigmoid", "Relu", "Relu"], activation_alpha=[0.25]>(t, w, R[1,16,4])', 1),
    Law("weight that reads listed constants, IR 3", "Conv", f"{X} > y; w = Mul(W[4,4,1,1], G:pow[4,1,1,1]); c = Conv(x, w); y = BN4:alt0(c)", 1, listed=True, opset=8, ir_version=3),
    Law("weight that reads a value", "", f"{X} > y; s = ReduceMax(x); w = Mul(W[4,4,1,1], s); c = Conv(x, w); y = BN4(c)", 0, ("computed",)),
    Law("constants as nodes, a product", "Conv", f"{X} > y; w = Mul(W[4,4,3,3], G:pow[4,1,1,1]); c = Conv(x, w); y = BN4:alt0(c)", 1, nodes=True),
    Law("a table that is a product, bn", "Gather", "i:int[4,4] > y; d = Mul(E[5,4], S:pow[]); e = Gather(d, i); t = Transpose<perm=[0,2,1]>(e); y = BN4:alt0(t)", 1),
]

CONSTANT_LAWS: list[Law] = [*EXPRESSIONS]
