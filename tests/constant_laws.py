"""The forms in which models carry their constants, one line per case (see `tests.laws`)."""

# a table is read by its columns
# fmt: off

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto

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

_ASK = "s = ReduceSum<keepdims=0>(x); q = Greater(s, Z); "
_Z = {"Z": np.float32(-1e6)}
_T, _O = "float[4,4,4,4]", "else_branch = e () => (float[4,4,4,4] p) {{ p = Identity(x) }}"
_ELSE = _O.replace("{{", "{").replace("}}", "}")


def _if(then: str, before: str = "", after: str = "", *, outputs: str = "y") -> str:
    """A graph with a branch; the branch's value is o, the If's is y."""
    branch = f"y = If(q) <then_branch = t () => ({_T} o) {{ {then} }}, {_ELSE}>"
    return f"{X} > {outputs}; {_ASK}{before}{branch}{after}"


def _loop(body: str, before: str = "", after: str = "", *, outputs: str = "y") -> str:
    """A graph with a loop of two rounds; the body makes o of i."""
    graph = f"body = l (int64 k, bool g, {_T} i) => (bool h, {_T} o) {{ h = Identity(g); {body} }}"
    return f"{X} > {outputs}; {before}v = Loop(K, , x) <{graph}>; y = Reshape(v, R{{4,4,4,4}}){after}"


_K = {"K": np.array(2)}
BODIES = [
    Law("conv, bn in a branch", "Conv", _if("c = Conv(x, W[4,4,1,1], B[4]); o = BN4:alt0(c)"), 1, constants=_Z),
    Law("bn, conv in a branch, no bias", "Conv", _if("c = BN4:alt0(x); o = Conv(c, W[4,4,1,1])"), 1, constants=_Z),
    Law("bn whose output a branch reads, conv", "Conv", _if("o = Conv(b, W[4,4,1,1])", "b = BN4:alt0(x); "), 1, constants=_Z),
    Law("bn whose output a branch reads, padded conv", "", _if(f"o = Conv<{PAD}>(b, W[4,4,3,3])", "b = BN4(x); "), 0, ("pads",), constants=_Z),
    Law("bn whose output a branch and the graph read", "Conv", _if("o = Conv(b, W[4,4,1,1])", "b = BN4:alt0(x); z = Conv(b, V[4,4,3,3]); ", outputs="y z"), 1, constants=_Z),
    Law("conv, bn; a branch reads the conv", "", _if("o = Floor(c)", "c = Conv(x, W[4,4,1,1]); z = BN4(c); ", outputs="y z"), 0, ("Floor",), constants=_Z),
    Law("conv, bn; a conv in a branch reads the conv", "Conv", _if("o = Conv(c, V[4,4,1,1])", "c = Conv(x, W[4,4,1,1]); z = BN4(c); ", outputs="y z"), 1, constants=_Z),
    Law("conv outside, bn in a branch", "Conv", _if("o = BN4(c)", "c = Conv(x, W[4,4,1,1]); "), 1, constants=_Z),
    Law("conv outside with two readers, bn in a branch", "", _if("o = BN4(c)", "c = Conv(x, W[4,4,1,1]); z = Floor(c); ", outputs="y z"), 0, ("Floor",), constants=_Z),
    Law("one weight inside and outside", "Conv", _if("c = Conv(x, W[4,4,1,1], B[4]); o = BN4:alt0(c)", "z = Conv(x, W, B); ", outputs="y z"), 1, constants=_Z),
    Law("one weight, bn inside and outside", "Conv", _if("c = Conv(x, W[4,4,1,1], B[4]); o = BN4:alt0(c)", "d = Conv(x, W, B); z = BN4:tla(d); ", outputs="y z"), 2, constants=_Z),
    Law("bn behind a branch", "", _if("o = Conv(x, W[4,4,1,1])", after="; z = BN4(y)", outputs="z"), 0, ("If",), constants=_Z),
    Law("two batch norms in a branch, one feeds its output twice", "Conv", _if("c = Conv(x, W[4,4,1,1]); b = BN4(c); r = Relu(b); o = Add(r, b)"), 1, constants=_Z),
    Law("bn alone in a branch", "", _if("o = BN4(x)"), 0, ("'x'",), constants=_Z),
    Law("constants as nodes, conv, bn in a branch", "Conv", _if("c = Conv(x, W[4,4,1,1], B[4]); o = BN4:alt0(c)"), 1, constants=_Z, nodes=True),
    Law("conv, bn in a branch, IR 3", "Conv", _if("c = Conv(x, W[4,4,1,1]); o = BN4:alt0(c)"), 1, constants=_Z, opset=9, ir_version=3, listed=True),
    Law("conv, bn in a loop", "Conv", _loop(f"c = Conv<{PAD}>(i, W[4,4,3,3]); o = BN4:alt0(c)"), 1, constants=_K),
    Law("bn, conv in a loop", "Conv", _loop("c = BN4:alt0(i); o = Conv(c, W[4,4,1,1])"), 1, constants=_K),
    Law("bn of what a loop carries, kept", "", _loop(f"c = BN4(i); o = Conv<{PAD}>(c, W[4,4,3,3])"), 0, ("pads",), constants=_K),
    Law("bn outside, every round of a loop reads it", "Conv", _loop("c = Conv(b, W[4,4,1,1]); o = Add(i, c)", "b = BN4:alt0(x); "), 1, constants=_K),
    Law("conv outside, bn in a loop", "Conv", _loop("b = BN4(c); o = Add(i, b)", "c = Conv(x, W[4,4,1,1]); "), 1, constants=_K),
    Law("bn behind a loop", "", _loop("o = Conv(i, W[4,4,1,1])", after="; z = BN4(y)", outputs="z"), 0, ("'v'",), constants=_K),
    Law("conv, bn in a branch of a loop", "Conv", _loop(f"s = ReduceSum<keepdims=0>(i); q = Greater(s, Z); o = If(q) <then_branch = t () => ({_T} u) {{ c = Conv(i, W[4,4,1,1]); u = BN4:alt0(c) }}, else_branch = e () => ({_T} p) {{ p = Identity(i) }}>"), 1, constants=_K | _Z),
    Law("conv, bn in a scan", "Conv", "x[4,4,4] w[3,4,4,4] > y z; y, z = Scan<num_scan_inputs=1, body = l (float[4,4,4] i, float[4,4,4] j) => (float[4,4,4] o, float[4,4,4] v) { c = Conv(j, W[4,4,1]); b = BN4:alt0(c); o = Add(i, b); v = Identity(o) }>(x, w)", 1),
]

def _numbers(seed: int, *shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(dtype)


_HALF = {"W": _numbers(1, 4, 4, 3, 3), "B": _numbers(2, 4)}
_SHORT = {"W": _numbers(1, 4, 4, 3, 3, dtype=ml_dtypes.bfloat16), "B": _numbers(2, 4, dtype=ml_dtypes.bfloat16)}
_STATISTICS = {"y.gamma": np.array([1, -2, 0.5, -1], np.float32), "y.beta": np.array([1, 2, -3, 1], np.float32), "y.running_mean": np.array([1, 0, -2, 1], np.float32), "y.running_var": np.array([0.75, 3.75, 0, 0.75], np.float32)}
TYPES = [
    Law("conv in float16, cast, bn in float32", "Cast", f"{X} > y; h = Cast<to=10>(x); c = Conv(h, W, B); u = Cast<to=1>(c); y = BN4:alt0(u)", 1, constants=_HALF),
    Law("conv in float16 without bias, cast, bn in float32", "Conv", f"{X} > y; h = Cast<to=10>(x); c = Conv(h, W); u = Cast<to=1>(c); y = BN4:alt0(u)", 1, constants=_HALF),
    Law("conv in bfloat16, cast, bn in float32", "Cast", f"{X} > y; h = Cast<to=16>(x); c = Conv(h, W, B); u = Cast<to=1>(c); y = BN4:alt0(u)", 1, constants=_SHORT, opset=22, runs=False),
    Law("bn in float32, cast to float16, conv", "", f"{X} > y; b = BN4(x); h = Cast<to=10>(b); c = Conv(h, W, B); y = Cast<to=1>(c)", 0, ("digits",), constants=_HALF),
    Law("bn of scale in float32, cast to float16, conv", "Cast", f"{X} > y; b = BN4:altscale(x); h = Cast<to=10>(b); c = Conv(h, W, B); y = Cast<to=1>(c)", 1, constants=_HALF),
    Law("bn in float32, cast to float64, conv", "Cast", f"{X} > y; b = BN4:alt0(x); h = Cast<to=11>(b); c = Conv(h, W); y = Cast<to=1>(c)", 1, constants={"W": _numbers(3, 4, 4, 1, 1, dtype=np.float64)}, runs=False),
    Law("weights in float16, cast to float32", "Conv", f"{X} > y; w = Cast<to=1>(W); b = Cast<to=1>(B); c = Conv(x, w, b); y = BN4:alt0(c)", 1, constants=_HALF),
    Law("weights in float32, cast to float16", "Conv", f"{X} > y; h = Cast<to=10>(x); w = Cast<to=10>(W[4,4,3,3]); c = Conv(h, w); u = Cast<to=1>(c); y = BN4:alt0(u)", 1),
    Law("data in float16, statistics in float32", "Conv", f"{X} > y; c = Conv(x, W, B); y = BN4(c)", 1, constants=_HALF | _STATISTICS, dtype=TensorProto.FLOAT16, opset=15, ir_version=8, runs=False),
    Law("data and statistics in bfloat16", "Conv", f"{X} > y; c = Conv(x, W[4,4,3,3], B[4]); y = BN4:alt0(c)", 1, dtype=TensorProto.BFLOAT16, opset=22, runs=False),
    Law("data in float64", "Conv", f"{X} > y; c = Conv(x, W[4,4,3,3], B[4]); y = BN4:alt0(c)", 1, dtype=TensorProto.DOUBLE, runs=False),
    Law("matmul in float64", "MatMul", "x[4,4] > y; c = MatMul(x, W[4,4]); d = Add(c, B[4]); y = BN4:alt0(d)", 1, dtype=TensorProto.DOUBLE),
]

def _integers(*shape: int, dtype: Any = np.int8, low: int = -3) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(low, low + 7, shape).astype(dtype)


_Q = {"Q": _integers(4, 4, 3, 3), "S": np.float32(0.5), "Z": np.int8(0)}
_QU = {"Q": _integers(4, 4, 3, 3, dtype=np.uint8, low=125), "S": np.float32(0.5), "Z": np.uint8(128)}
_QC = {"Q": _integers(4, 4, 3, 3), "S": np.array([0.5, 2, 1, 4], np.float32), "Z": np.array([1, 0, -1, 2], np.int8)}
_Q4 = {"Q": _integers(4, 4, 1, 1, dtype=ml_dtypes.int4), "S": np.float32(0.5), "Z": np.array(0, ml_dtypes.int4)}
_QB = {"Q": _integers(4, 4), "S": np.array([[1, 2, 0.5, 1], [2, 1, 1, 4]], np.float32), "Z": np.array([[1, 0, 0, 2], [0, -1, 0, 0]], np.int8)}
_BIAS = {"I": np.array([3, -2, 0, 5], np.int32), "J": np.float32(0.25)}
_LEAST = {"Q": np.where(np.arange(144).reshape(4, 4, 3, 3) == 40, -128, _integers(4, 4, 3, 3)).astype(np.int8), "S": np.float32(0.5)}
_W = "w = DequantizeLinear(Q, S, Z); "
QUANTIZED = [
    Law("integers, conv, bn", "Conv", f"{X} > y; {_W}c = Conv(x, w, B[4]); y = BN4(c)", 1, constants=_Q),
    Law("integers, conv, bn, gamma 0", "Conv", f"{X} > y; {_W}c = Conv(x, w); y = BN4:alt0(c)", 1, constants=_Q),
    Law("integers without a zero point, conv, bn", "Conv", f"{X} > y; w = DequantizeLinear(Q, S); c = Conv(x, w); y = BN4:alt0(c)", 1, constants=_Q),
    Law("integers, conv, bn of one scale", "Conv", f"{X} > y; {_W}c = Conv(x, w); y = BN4:neg<epsilon=0.0>(c)", 1, constants=_Q | {"y.gamma": np.full(4, -2, np.float32), "y.running_var": np.ones(4, np.float32)}),
    Law("unsigned integers, conv, bn", "Conv", f"{X} > y; {_W}c = Conv(x, w, B[4]); y = BN4(c)", 1, constants=_QU),
    Law("integers with a scale for each channel, conv, bn", "Conv", f"{X} > y; w = DequantizeLinear<axis=0>(Q, S, Z); c = Conv(x, w); y = BN4(c)", 1, constants=_QC),
    Law("integers with a scale for each input channel, conv, bn", "", f"{X} > y; {_W}c = Conv(x, w); y = BN4(c)", 0, ("axis",), constants=_QC),
    Law("integers, grouped conv, bn", "Conv", f"{X} > y; {_W}c = Conv<group=2>(x, w); y = BN4(c)", 1, constants=_Q | {"Q": _integers(4, 2, 3, 3)}),
    Law("integers, grouped transposed conv, bn", "", f"{X} > y; {_W}c = ConvTranspose<group=2>(x, w); y = BN4(c)", 0, ("quantised",), constants=_Q | {"Q": _integers(4, 2, 3, 3)}),
    Law("integers, transposed conv, bn", "ConvTranspose", f"{X} > y; {_W}c = ConvTranspose(x, w); y = BN4(c)", 1, constants=_Q),
    Law("integers, gemm, bn", "Gemm", "x[4,4] > y; w = DequantizeLinear(Q, S, Z); c = Gemm<transB=1>(x, w, B[4]); y = BN4(c)", 1, constants=_Q | {"Q": _integers(4, 4)}),
    Law("integers, transposed, matmul, bn", "MatMul", "x[4,4] > y; w = DequantizeLinear(Q, S, Z); t = Transpose(w); c = MatMul(x, t); y = BN4(c)", 1, constants=_Q | {"Q": _integers(4, 4)}),
    Law("integers in blocks, matmul, bn", "MatMul", "x[4,4] > y; w = DequantizeLinear<axis=0, block_size=2>(Q, S, Z); c = MatMul(x, w); y = BN4:alt0(c)", 1, constants=_QB, opset=21),
    Law("integers in blocks along the channels, bn", "", "x[4,4] > y; w = DequantizeLinear<axis=0, block_size=2>(Q, S, Z); c = Gemm<transB=1>(x, w); y = BN4(c)", 0, ("axis",), constants=_QB, opset=21),
    Law("integers of four bits, conv, bn", "Conv", f"{X} > y; {_W}c = Conv(x, w); y = BN4(c)", 1, constants=_Q4, opset=21),
    Law("the least integer, conv, bn of its sign", "Conv", f"{X} > y; w = DequantizeLinear(Q, S); c = Conv(x, w); y = BN4:pos(c)", 1, constants=_LEAST),
    Law("the least integer, conv, bn of the other sign", "", f"{X} > y; w = DequantizeLinear(Q, S); c = Conv(x, w); y = BN4(c)", 0, ("least",), constants=_LEAST),
    Law("the least integer, another channel changes its sign", "Conv", f"{X} > y; w = DequantizeLinear(Q, S); c = Conv(x, w); y = BN4:tla(c)", 1, constants=_LEAST),
    Law("integers and a bias of integers, conv, bn", "Conv", f"{X} > y; {_W}b = DequantizeLinear(I, J); c = Conv(x, w, b); y = BN4(c)", 1, constants=_Q | _BIAS),
    Law("bn, conv of integers", "Conv", f"{X} > y; b = BN4(x); {_W}y = Conv(b, w)", 1, constants=_Q),
    Law("bn, conv of integers with a scale for each channel", "", f"{X} > y; b = BN4(x); w = DequantizeLinear<axis=0>(Q, S, Z); y = Conv(b, w)", 0, ("quantised",), constants=_QC),
    Law("conv of integers, bn, conv of integers", "Conv", f"{X} > y; {_W}c = Conv(x, w); b = BN4:alt0(c); v = DequantizeLinear(Q, S, Z); y = Conv<{PAD}>(b, v)", 1, constants=_Q),
    Law("sum of convs of integers, bn", "Add", f"{X} > y; {_W}c = Conv(x, w); v = DequantizeLinear(P, S, Z); d = Conv(x, v); s = Add(c, d); y = BN4:alt0(s)", 1, constants=_Q | {"P": _integers(4, 4, 3, 3, low=-4)}),
    Law("bn of a shift, conv of integers", "Conv", f"{X} > y; b = BN4:shift(x); {_W}y = Conv(b, w)", 1, constants=_Q),
    Law("one tensor of integers for two convs", "Conv", f"{X} > y z; {_W}v = DequantizeLinear(Q, S, Z); c = Conv(x, w); y = BN4(c); z = Conv(x, v)", 1, constants=_Q),
    Law("one weight of integers for two convs", "", f"{X} > y z; {_W}c = Conv(x, w); y = BN4(c); z = Conv(x, w)", 0, ("several",), constants=_Q),
    Law("integers, opset 10", "", f"{X} > y; {_W}c = Conv(x, w); y = BN4(c)", 0, ("opset",), constants=_Q, opset=10, ir_version=5),
    Law("quantised activations, conv, bn", "Conv", f"{X} > y; q = QuantizeLinear(x, A); d = DequantizeLinear(q, A); {_W}c = Conv(d, w, B[4]); y = BN4(c)", 1, constants=_Q | {"A": np.float32(0.5)}),
    Law("conv, quantised activations, bn", "", f"{X} > y; {_W}c = Conv(x, w, B[4]); q = QuantizeLinear(c, A, E); d = DequantizeLinear(q, A, E); y = BN4(d)", 0, ("DequantizeLinear",), constants=_Q | {"A": np.float32(0.5), "E": np.int8(0)}),
    Law("embedding of integers, bn", "Gather", "i:int[4,4] > y; t = DequantizeLinear(Q, S, Z); e = Gather(t, i); u = Transpose<perm=[0,2,1]>(e); y = BN4:altscale(u)", 1, constants=_Q | {"Q": _integers(5, 4)}),
    Law("embedding of integers, bn of a shift", "", "i:int[4,4] > y; t = DequantizeLinear(Q, S, Z); e = Gather(t, i); u = Transpose<perm=[0,2,1]>(e); y = BN4(u)", 0, ("quantised",), constants=_Q | {"Q": _integers(5, 4)}),
]

CONSTANT_LAWS: list[Law] = [*EXPRESSIONS, *BODIES, *TYPES, *QUANTIZED]
