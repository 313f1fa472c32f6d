"""The traps: networks that folding tools are known to get wrong, without an error and in valid shapes.

Each was seen in a tool that is in use, or reported by those who use one. Here each is folded right
or kept with a reason, and it is written down which: a lost capability shows as well as a wrong
number. Shapes are square, gammas of both signs and 0. Where a law of `tests.laws` or another test
holds a trap already, `HELD` says which one.
"""

from __future__ import annotations

import importlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bnfold.proof.exact.reference import Float64Reference
from tests import folding
from tests.law_models import Law, build, inputs
from tests.laws import LAWS, PAD, X
from tests.test_rules import check_law

# a table is read by its columns
# ruff: noqa: E501
# fmt: off

HELD: dict[str, tuple[str, ...]] = {
    "MatMul, Reshape, batch norm over what were rows": ("matmul, reshape, bn over the rows", "matmul on tokens through reshape", "matmul on tokens, bn over the tokens"),
    "a square transposed convolution, scaled along its inputs": ("transposed conv", "transposed conv 1-D", "transposed conv 3-D", "transposed conv, depthwise"),
    "a grouped transposed convolution with several outputs in each group": ("transposed conv, groups", "transposed conv, groups wide"),
    "constant / conv taken for conv / constant": ("constant / conv",),
    "a shared constant negated in place": ("one constant subtracted from two",),
    "a convolution used twice": ("shared weight, two batch norms", "shared weight, one use without", "one conv, two batch norms", "shared weight, the same batch norm"),
    "a producer with a second consumer": ("producer with a second consumer", "producer with a second consumer that absorbs", "several consumers, one is padded"),
    "training mode, with one output or with three": ("tests.test_fold_models:test_only_inference_batch_norms_are_folded", "tests.test_fold_models:test_statistics_that_are_read_are_training"),
    "a factor along the columns of as many elements as channels": ("mul along the columns", "bn, mul along the columns, bn's own shift", "conv, add along the columns, bn"),
    "an initializer that a caller may override": ("initializers a caller may override", "tests.test_fold_models:test_one_initializer_that_a_caller_may_override_stops_the_fold", "tests.test_fold_models:test_a_default_value_used_as_data_is_not_written"),
    "auto_pad taken for no padding": ("bn, SAME_UPPER conv", "bn, SAME_LOWER conv", "bn, VALID conv"),
    "Gemm's beta and alpha": ("gemm, C of N, alpha=2.0, beta=0.5", "gemm, scalar C, transB=1, beta=2.0", "gemm, C of MxN, transA=1, transB=1, alpha=2.0", "gemm, beta 0"),
    "batch norm, a Reshape that mixes channels, Gemm": ("bn, reshape that mixes channels, gemm",),
    "eps of 0, and eps left out": ("eps 0", "tests.test_fold_models:test_eps_that_the_file_leaves_out_is_the_one_of_the_standard", "tests.test_fold_models:test_a_variance_of_zero_with_eps_zero_is_an_error"),
    "the bias is the beta": ("bias is beta", "bias is beta of another that stays", "beta is mean is gamma"),
    "the convolution's output is an output of the graph": ("conv output is an output", "conv output is an output, bn goes forward", "two equal batch norms, both outputs"),
    "five axes": ("conv 3-D", "bn, conv 3-D"),
    "a weight that the caller gives": ("weight is an input", "computed weight"),
    "Pad of a number by attribute": ("pads with 2, by attribute", "pads with 2", "pads by axes"),
    "a padded 1x1 convolution behind a batch norm": ("bn, padded 1x1 conv",),
    "float16 that overflows": ("tests.test_range:test_a_weight_that_would_overflow_keeps_its_batch_norm_and_says_so", "tests.test_range:test_a_power_of_two_moves_to_the_next_layer"),
    "convolution, Relu, batch norm": ("conv, Relu, bn with a shift", "conv, Relu, bn of mixed signs"),
    "squeeze and excitation": ("squeeze and excitation", "bn, squeeze and excitation"),
    "a sum of which one branch loses the scale": ("two convs, add, bn", "identity branch beside a conv"),
    "instance norm taken for batch norm": ("instance norm is left alone",),
    "weights in Constant nodes": ("constants as nodes", "constants as nodes, no bias"),
    "new names that are taken": ("tests.test_fold_models:test_new_names_do_not_collide",),
    "statistics that are computed": ("computed statistics",),
    "half precision: the type of a bias that is added": ("tests.test_fold_models:test_every_float_type_keeps_its_type", "tests.test_fold_models:test_statistics_in_float32_beside_weights_in_float16"),
    "gamma of 0 and negative gamma": ("conv, gamma 0", "conv, gamma all 0", "bn, conv, gamma 0"),
    "weights of an outer graph in a branch": ("inside a branch", "tests.test_fold_models:test_a_batch_norm_in_both_branches_with_one_weight_outside"),
    "an old opset's modes": ("tests.test_fold_models:test_only_inference_batch_norms_are_folded",),
}

SQUARE = "x[6,6] > y"
TRAPS = [
    # silent wrong results that were reproduced
    Law("matmul of 6x5 and 5x6, reshape, bn over the rows", "", "x[6,5] > y; c = MatMul(x, W[5,6]); f = Reshape(c, S{1,6,6}); y = BN6(f)", 0, ("axis",)),
    Law("matmul of 6x5 and 5x6, reshape, bn over the columns", "MatMul", "x[6,5] > y; c = MatMul(x, W[5,6]); f = Reshape(c, S{6,6,1}); y = BN6:alt0(f)", 1),
    Law("matmul, transpose, bn over what were rows", "", f"{SQUARE}; c = MatMul(x, W[6,6]); t = Transpose(c); y = BN6(t)", 0, ("axis",)),
    Law("transposed conv, more outputs than inputs", "ConvTranspose", f"{X} > y; c = ConvTranspose(x, W[4,6,3,3], B[6]); y = BN6:alt0(c)", 1),
    Law("transposed conv, fewer outputs than inputs", "ConvTranspose", "x[4,6,4,4] > y; c = ConvTranspose(x, W[6,4,3,3]); y = BN4:alt0(c)", 1),
    Law("grouped transposed conv, scalar added, no bias", "ConvTranspose", f"{X} > y; c = ConvTranspose<group=2>(x, W[4,2,3,3]); a = Add(c, A[]); y = BN4:alt0(a)", 1),
    Law("grouped transposed conv, mul, bn", "ConvTranspose", f"{X} > y; c = ConvTranspose<group=2>(x, W[4,4,2,2]); m = Mul(c, M:pow[8,1,1]); y = BN8:alt0(m)", 1, absorbed=1),
    Law("constant - conv and conv - constant of one constant", "Sub", f"{X} > y z; c = Conv(x, W[4,4,1,1]); a = Sub(A[4,1,1], c); y = BN4:alt0(a); d = Conv(x, V[4,4,1,1]); b = Sub(d, A); z = BN4:alt0(b)", 2),
    Law("conv - a constant that is subtracted once more", "Sub", f"{X} > y z; c = Conv(x, W[4,4,1,1]); a = Sub(c, A[4,1,1]); y = BN4:alt0(a); z = Sub(x, A)", 1),
    Law("one conv called twice with the same batch norm, no bias", "Conv", f"{X} > z; c = Conv(x, W[4,4,1,1]); y = BatchNormalization<epsilon=0.25>(c, G:pow[4], S[4], M[4], V); d = Conv(y, W); z = BatchNormalization<epsilon=0.25>(d, G, S, M, V)", 2, constants={"V": np.array([0.75, 0, 3.75, 0.75], np.float32)}),
    Law("one conv, once with a batch norm and once with none, no bias", "Conv", f"{X} > y z; c = Conv(x, W[4,4,1,1]); y = BN4:alt0(c); z = Conv(x, W)", 1),
    Law("one weight, two biases, two batch norms", "Conv", f"{X} > y z; c = Conv(x, W[4,4,1,1], B[4]); y = BN4:alt0(c); d = Conv(y, W, D[4]); z = BN4:tla(d)", 2),
    Law("mul by a row of as many columns as channels", "Mul", f"{X} > y; c = Conv(x, W[4,4,1,1]); m = Mul(c, M:pow[1,1,1,4]); y = BN4:altscale(m)", 1),
    Law("mul by a column of as many rows as channels", "Mul", f"{X} > y; c = Conv(x, W[4,4,1,1]); m = Mul(c, M:pow[4,1]); y = BN4:altscale(m)", 1),
    Law("mul by one number for each sample", "Mul", f"{X} > y; c = Conv(x, W[4,4,1,1]); m = Mul(c, M:pow[4,1,1,1]); y = BN4:altscale(m)", 1),
    Law("mul by a row, bn with a shift", "", f"{X} > z; c = Conv(x, W[4,4,1,1]); m = Mul(c, M:pow[1,1,1,4]); y = BN4(m); z = Floor(y)", 0, ("axis",)),
    Law("div by a row of as many columns as channels", "Div", f"{X} > y; c = Conv(x, W[4,4,1,1]); m = Div(c, M:pow[1,1,1,4]); y = BN4:altscale(m)", 1),
    Law("add of a row of as many columns as channels", "Add", f"{X} > y; c = Conv(x, W[4,4,1,1]); a = Add(c, A[1,1,1,4]); y = BN4:alt0(a)", 1),
    Law("bn, flatten to channels times places, gemm of their number", "Gemm", f"{X} > y; b = BN4:alt0(x); f = Flatten(b); y = Gemm<transB=1>(f, W[4,64], C[4])", 1),
    Law("bn, samples and channels in one axis, gemm of the places", "", f"{X} > y; b = BN4:alt0(x); f = Reshape(b, S{{16,16}}); y = Gemm(f, W[16,4])", 0, ("axis",)),
    Law("bn, conv with auto_pad and pads of 0", "", f'{X} > y; b = BN4(x); y = Conv<auto_pad="SAME_UPPER", pads=[0,0,0,0]>(b, W[4,4,3,3])', 0, ("pads with zeros",), runs=False),
    Law("conv with auto_pad, bn", "Conv", f'{X} > y; c = Conv<auto_pad="SAME_LOWER">(x, W[4,4,2,2], B[4]); y = BN4:alt0(c)', 1),
    Law("gemm whose C is scaled, bn, gemm whose C is scaled", "Gemm", "x[4,4] > y; c = Gemm<alpha=0.5, beta=2.0>(x, W[4,4], C[4,4]); b = BN4:alt(c); y = Gemm<alpha=2.0, beta=0.5>(b, V[4,4], D[4,1])", 1),
    Law("conv, pad of a number by attribute, conv's bn", "", f"{X} > y; c = Conv(x, W[4,4,1,1]); p = Pad<pads=[0,0,1,1,0,0,1,1], value=1.5>(c); y = BN4:posscale(p)", 0, ("pads",), opset=10, ir_version=5),
    Law("bn, pad of a number by attribute, conv", "", f"{X} > y; b = BN4(x); p = Pad<pads=[0,0,1,1,0,0,1,1], value=1.5>(b); y = Conv(p, W[4,4,3,3])", 0, ("pads",), opset=10, ir_version=5),
    Law("conv, pad by axes, bn", "Pad", f"{X} > y; c = Conv(x, W[4,4,1,1]); p = Pad(c, P{{1,1}}, Z, E{{-1}}); y = BN4:alt0scale(p)", 1, constants={"Z": np.float32(0)}),
    Law("conv, pad of the channels by axes, bn", "", f"{X} > y; c = Conv(x, W[2,4,1,1], B[2]); p = Pad(c, P{{1,1}}, Z, E{{1}}); y = BN4:posscale(p)", 0, ("Pad",), constants={"Z": np.float32(0)}),
    Law("conv, negative pads, bn", "Pad", f"{X} > y; c = Conv(x, W[4,4,1,1]); p = Pad(c, P{{0,0,-1,-1,0,0,-1,-1}}); y = BN4:altscale(p)", 1),
    Law("bn, negative and positive pads, conv", "Pad", f"{X} > y; b = BN4:altscale(x); p = Pad(b, P{{0,0,-1,1,0,0,1,-1}}); y = Conv(p, W[4,4,1,1])", 1),
    Law("bn, negative pads of the channels, conv", "", f"{X} > y; b = BN4(x); p = Pad(b, P{{0,-1,0,0,0,1,0,0}}); y = Conv(p, W[4,4,1,1])", 0, ("Pad",)),
    Law("two batch norms of different eps, concat, conv", "Conv", f"{X} u[4,4,4,4] > y; a = BN4:alt0(x); b = BN4:tla<epsilon=0.0>(u); k = Concat<axis=1>(a, b); y = Conv(k, W[4,8,1,1])", 2, constants={"b.running_var": np.array([1, 4, 0.25, 1], np.float32)}),
    # read in the source of tools
    Law("the first of two batch norms is an output", "Conv", f"{X} > b y; c = Conv(x, W[4,4,1,1]); b = BN4:alt0(c); y = BN4:alt(b)", 1, ("output",)),
    Law("a batch norm, its value an output, and a factor behind it", "Conv", f"{X} > b y; c = Conv(x, W[4,4,1,1]); b = BN4:alt0(c); y = Mul(b, M:pow[4,1,1])", 1),
    Law("bn, a factor for each place, padded conv", "Mul", f"{X} > y; b = BN4:altscale(x); m = Mul(b, M:pow[1,4,4,4]); y = Conv<{PAD}>(m, W[4,4,3,3])", 1),
    Law("bn with a shift, a factor for each place, conv", "", f"{X} > y; b = BN4(x); m = Mul(b, M:pow[1,4,4,4]); y = Conv(m, W[4,4,3,3])", 0, ("axis",)),
    Law("bn, add, mul, padded 1x1 conv", "", f"{X} > y; b = BN4(x); a = Add(b, A[4,1,1]); m = Mul(a, M:pow[4,1,1]); y = Conv<{PAD}>(m, W[4,4,1,1])", 1),
    Law("bn with a bias behind the conv that it folds into", "Conv", f"{X} > y; b = BN4:alt0(x); c = Conv(b, W[4,4,1,1], B[4]); y = Add(c, A[4,1,1])", 1),
    # reported by users
    Law("conv 3-D, added bias of five axes, bn", "Conv", "x[2,2,2,2,2] > y; c = Conv(x, W[2,2,1,1,1]); a = Add(c, A[1,2,1,1,1]); y = BN2(a)", 1),
    Law("grouped conv, added bias, bn", "Conv", f"{X} > y; c = Conv<group=2>(x, W[4,2,3,3]); a = Add(c, A[1,4,1,1]); y = BN4:alt0(a)", 1),
    Law("conv and its input, add, bn", "", f"{X} > y; c = Conv(x, W[4,4,1,1]); a = Add(c, x); y = BN4(a)", 0, ("'x'",)),
    Law("conv and its input, which are one conv, bn", "", f"{X} > y; c = Conv<{PAD}>(x, W[4,4,3,3]); a = Add(c, x); y = BN4:alt0(a)", 1, merges=1),
    Law("conv and its gated input, add, bn", "", f"{X} > y; c = Conv<{PAD}>(x, W[4,4,3,3]); s = Abs(x); a = Add(c, s); y = BN4(a)", 0, ("Abs",), merges=0),
    Law("conv and a pooled conv, add, bn", "Add", f"{X} > y; c = Conv(x, W[4,4,1,1]); d = Conv(x, V[4,4,1,1]); p = GlobalAveragePool(d); a = Add(c, p); y = BN4:alt0(a)", 1),
    Law("conv, add of a conv that others read, bn", "Add", f"{X} > y z; c = Conv(x, W[4,4,1,1]); d = Conv(x, V[4,4,1,1]); a = Add(c, d); y = BN4:alt(a); z = Conv(d, U[4,4,3,3])", 1),
    Law("conv, add of a conv that others look at, bn", "", f"{X} > y z; c = Conv(x, W[4,4,1,1]); d = Conv(x, V[4,4,1,1]); a = Add(c, d); y = BN4:alt(a); z = Floor(d)", 0, ("Floor",)),
    Law("conv, bn, gate of its own mean, bn", "Conv", f"{X} > y; c = Conv(x, W[4,4,1,1], B[4]); b = BN4:alt0(c); g = GlobalAveragePool(b); s = Floor(g); y = Mul(b, s)", 1),
    Law("gemm of rank 2, unsqueezed, bn over one channel", "Gemm", "x[4,4] > y; c = Gemm(x, W[4,4]); u = Unsqueeze(c, A{1}); y = BN1(u)", 1),
    Law("free width, a factor along it of as many columns as channels", "Mul", "x[4,4,4,W] > y; c = Conv(x, K0[4,4,1,1]); m = Mul(c, M:pow[4]); y = BN4:altscale(m)", 1),
    Law("everything free", "Conv", "x[N,4,H,W] > y; b = BN4:alt0(x); y = Conv(b, K0[4,4,3,3])", 1),
    Law("depth 5-D of free size, bn, conv", "Conv", "x[N,2,D,H,W] > y; b = BN2(x); y = Conv(b, K0[2,2,2,2,2])", 1),
    Law("gamma all 0 between two convs, padded", "Conv", f"{X} > y; c = Conv(x, W[4,4,1,1]); b = BN4:all0(c); y = Conv<{PAD}>(b, V[4,4,3,3])", 1),
    Law("depthwise, bn, pointwise, bn", "Conv", f"{X} > y; c = Conv<group=4, {PAD}>(x, W[4,1,3,3]); b = BN4:alt0(c); d = Conv(b, V[4,4,1,1]); y = BN4:alt(d)", 2),
]
# fmt: on


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_trap(trap: Law) -> None:
    check_law(trap)


@pytest.mark.parametrize("trap", [t for t in TRAPS if t.reference], ids=lambda trap: trap.name)
def test_values_against_float64(trap: Law) -> None:
    """Not only as the runtime computed them before: as the formulas say."""
    original = build(trap)
    absorb, merge = trap.absorbed is not None, trap.merges is not None
    made = folding.fold(original, absorb=absorb, merge=merge)
    exact = Float64Reference(original).run(inputs(original))
    folded = Float64Reference(made.model).run(inputs(original))
    for name, expected in exact.items():
        np.testing.assert_array_equal(folded[name], expected, err_msg=name)


@pytest.mark.parametrize("trap", HELD)
def test_a_trap_that_is_held_elsewhere_is_held_there(trap: str) -> None:
    laws = {law.name for law in LAWS}
    for place in HELD[trap]:
        module, _, test = place.partition(":")
        if test:
            assert callable(getattr(importlib.import_module(module), test))
        else:
            assert place in laws


def test_names_of_traps_are_new() -> None:
    names = [trap.name for trap in TRAPS]
    assert len(set(names)) == len(names)
    assert not set(names) & {law.name for law in LAWS}


# --- what the words of a law cannot say ------------------------------------------------------------


def plain(graph: str) -> onnx.ModelProto:
    return build(Law("trap", "", graph, 1))


BLOCK = f"{X} > y; c = Conv(x, W[4,4,1,1]); b = BN4:alt0(c); d = Conv(b, V[4,4,3,3]); y = BN4(d)"


def folds(proto: onnx.ModelProto, removed: int) -> folding.Fold:
    """Fold; that many go, the values are right, the face of the file is as it was."""
    made = folding.fold(proto)
    assert len(made.plan.removed) == removed, [kept.reason for kept in made.plan.kept]
    folding.check_counts(made)
    folding.check_interface(made)
    folding.check_values(made, inputs(proto))
    before, after = folding.run(proto, inputs(proto)), folding.run(made.model, inputs(proto))
    for name, expected in before.items():
        np.testing.assert_array_equal(after[name], expected, err_msg=name)
    return made


def test_nodes_without_names() -> None:
    proto = plain(BLOCK)
    for node in proto.graph.node:
        node.name = ""
    folds(proto, 2)


def test_nodes_of_one_name() -> None:
    proto = plain(BLOCK)
    for node in proto.graph.node:
        node.name = "layer"
    made = folding.fold(proto)  # onnxruntime refuses names that occur twice
    folding.check_values(made, inputs(proto))
    assert {removed.name for removed in made.plan.removed} == {"b", "y"}


def test_a_weight_whose_new_name_is_that_of_an_input() -> None:
    graph = f"{X} W_folded[4,4,4,4] V_bias[4,4,4,4] > y z o; c = Conv(x, W[4,4,1,1]); y = BN4(c);"
    graph += "d = Conv(x, W); z = Conv(d, V[4,4,1,1]); o = Add(W_folded, V_bias)"
    made = folds(plain(graph), 1)
    names = [t.name for t in made.model.graph.initializer]
    names += [v.name for v in made.model.graph.input]
    assert len(set(names)) == len(names)


def test_metadata_documentation_and_types_stay() -> None:
    proto = plain(BLOCK)
    proto.doc_string = "a network"
    proto.graph.doc_string = "a graph"
    proto.model_version = 7
    proto.domain = "org.example"
    proto.metadata_props.add(key="classes", value="cat, dog")
    made = folds(proto, 2)
    assert made.model.doc_string == "a network"
    assert made.model.graph.doc_string == "a graph"
    assert made.model.model_version == 7
    assert made.model.domain == "org.example"


def test_an_output_that_is_an_input() -> None:
    proto = plain(BLOCK)
    proto.graph.output.append(proto.graph.input[0])
    folds(proto, 2)


def test_an_output_that_is_a_weight() -> None:
    proto = plain(BLOCK)
    proto.graph.output.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [4, 4, 1, 1]))
    made = folds(proto, 2)
    before = numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == "W"))
    np.testing.assert_array_equal(folding.run(made.model, inputs(proto))["W"], before)


def test_other_outputs_mean_training_before_opset_14_read_or_not() -> None:
    proto = plain(f"{X} > y; c = Conv(x, W[4,4,1,1]); y = BN4:alt0(c)")
    proto.opset_import[0].version, proto.ir_version = 9, 7
    proto.graph.node[1].output.extend(["p", "q", "r", "s"])
    made = folds(proto, 0)
    assert "training" in made.plan.kept[0].reason


def test_a_variance_that_float16_does_not_hold() -> None:
    """Statistics in float32 beside weights in float16: the variance is never cast."""
    rng = np.random.default_rng(0)
    made = plain(f"{X} > y; c = Conv(x, W[4,4,1,1]); y = BN4(c)")
    proto = onnx.ModelProto.FromString(made.SerializeToString())
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.name == "W":
            array = (100 * rng.standard_normal(array.shape)).astype(np.float16)
        if tensor.name == "y.running_var":
            array = np.full(4, 2.0**18 - 0.25, np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    folded = folding.fold(proto)
    assert len(folded.plan.removed) == 1
    given = {"x": rng.standard_normal((4, 4, 4, 4)).astype(np.float16)}
    exact = Float64Reference(proto).run(given)["y"]
    error = np.max(np.abs(Float64Reference(folded.model).run(given)["y"] - exact))
    assert 0 < np.max(np.abs(exact)) < 100
    assert error < 2.0**-9 * np.max(np.abs(exact))


def test_a_fold_that_forgets_the_shift_of_a_trap_is_caught() -> None:
    """The comparison is one that sees: the same check on a folded model with one weight wrong."""
    proto = plain(BLOCK)
    made = folding.fold(proto)
    biases = [t for t in made.model.graph.initializer if t.dims == [4]]
    biases[-1].CopyFrom(numpy_helper.from_array(np.zeros(4, np.float32), biases[-1].name))
    before, after = folding.run(proto, inputs(proto)), folding.run(made.model, inputs(proto))
    assert np.any(before["y"] != after["y"])
    with pytest.raises(AssertionError):
        folding.check_values(made, inputs(proto))
