"""Models as they come: number types, branches and loops, functions, names, impossible statistics.

What the table of laws cannot say in a line. Dyadic numbers here too: results agree bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from bnfold import graph
from bnfold.errors import InputError
from bnfold.folding.affine import Gauge
from bnfold.folding.apply import apply
from bnfold.folding.plan import plan
from bnfold.proof.exact.reference import Float64Reference
from tests import folding
from tests.law_models import Law, build, inputs

Arrays = Mapping[str, np.ndarray]
SHAPE = "float[4,4,4,4]"
CONV = "y = BatchNormalization<epsilon=0.25>(c, g, b, m, v)"


def constants(dtype: type = np.float32, **others: np.ndarray) -> dict[str, np.ndarray]:
    """A 1x1 weight W, a bias B, and the batch norm g, b, m, v; `others` add or replace."""
    rng = np.random.default_rng(3)
    held = {
        "W": rng.integers(-2, 3, (4, 4, 1, 1)),
        "B": rng.integers(-2, 3, 4),
        "g": np.array([1, -2, 0, 0.5]),
        "b": np.array([1, -1, 2, 0]),
        "m": np.array([0, 2, -1, 3]),
        "v": np.array([0.75, 3.75, 0, 0.75]),
        **others,
    }
    return {name: np.asarray(array).astype(dtype) for name, array in held.items()}


def model(
    text: str, arrays: Arrays, *, opset: int = 20, ir_version: int = 10, functions: str = ""
) -> onnx.ModelProto:
    """ONNX text and its initializers."""
    head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "own" : 1]>'
    proto = onnx.parser.parse_model(f"{head}\n{text}\n{functions}")
    if opset < 15 or not functions:
        del proto.opset_import[1:]
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    onnx.checker.check_model(proto)
    return proto


def feeds(proto: onnx.ModelProto) -> folding.Values:
    return inputs(proto)


def fold_exactly(proto: onnx.ModelProto, removed: int) -> folding.Fold:
    """Fold, compare on onnxruntime bit by bit, and everything else that must hold."""
    made = folding.fold(proto)
    assert len(made.plan.removed) == removed, [kept.reason for kept in made.plan.kept]
    folding.check_counts(made)
    folding.check_interface(made)
    given = feeds(proto)
    before, after = folding.run(proto, given), folding.run(made.model, given)
    for name, expected in before.items():
        np.testing.assert_array_equal(after[name], expected, err_msg=name)
        assert after[name].dtype == expected.dtype
    folding.check_folding_again(made)
    return made


def weights(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


# --- number types --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16), ("double", np.float64)],
)
def test_every_float_type_keeps_its_type(kind: str, dtype: type) -> None:
    text = f"m ({kind}[4,4,4,4] x) => ({kind}[4,4,4,4] y) {{ c = Conv(x, W)\n {CONV} }}"
    proto = model(text, constants(dtype))
    made = folding.fold(proto)
    assert len(made.plan.removed) == 1
    assert {a.dtype for a in weights(made.model).values()} == {np.dtype(dtype)}
    given = {"x": np.random.default_rng(0).integers(-3, 4, (4, 4, 4, 4)).astype(dtype)}
    expected = Float64Reference(proto).run(given)["y"]
    np.testing.assert_array_equal(Float64Reference(made.model).run(given)["y"], expected)


def test_a_weight_is_rounded_once_to_its_own_type() -> None:
    rng = np.random.default_rng(0)
    arrays = constants(np.float16)
    arrays["W"] = rng.standard_normal((4, 4, 1, 1)).astype(np.float16)
    arrays["g"] = np.array([1.1, -0.3, 2.7, 0.9], np.float16)
    text = f"m (float16[4,4,4,4] x) => (float16[4,4,4,4] y) {{ c = Conv(x, W, B)\n {CONV} }}"
    made = folding.fold(model(text, arrays))
    gamma, var = arrays["g"].astype(float), arrays["v"].astype(float)
    exact = arrays["W"].astype(float) * (gamma / np.sqrt(var + 0.25)).reshape(4, 1, 1, 1)
    np.testing.assert_array_equal(weights(made.model)["W"], exact.astype(np.float16))


def test_statistics_in_float32_beside_weights_in_float16() -> None:
    halves = constants(np.float16)
    arrays = {n: halves[n] if n in "WB" else a for n, a in constants().items()}
    text = f"m (float16[4,4,4,4] x) => (float16[4,4,4,4] y) {{ c = Conv(x, W, B)\n {CONV} }}"
    made = folding.fold(model(text, arrays))
    assert len(made.plan.removed) == 1
    assert {a.dtype for a in weights(made.model).values()} == {np.dtype(np.float16)}


def test_a_float16_weight_that_is_cast_up_is_folded_in_float32() -> None:
    arrays = constants()
    arrays["W"] = arrays["W"].astype(np.float16)
    arrays["g"] = np.array([1.1, -0.3, 2.7, 0.9], np.float32)
    text = f"m ({SHAPE} x) => ({SHAPE} y) {{ w = Cast<to=1>(W)\n c = Conv(x, w, B)\n {CONV} }}"
    proto = model(text, arrays)
    made = folding.fold(proto)
    given = feeds(proto)
    exact = Float64Reference(proto).run(given)["y"]
    error = np.max(np.abs(Float64Reference(made.model).run(given)["y"] - exact))
    assert error < 1e-6 * np.max(np.abs(exact))


def test_a_plan_that_leaves_the_range_of_a_type_is_not_written() -> None:
    text = f"m (float16[4,4,4,4] x) => (float16[4,4,4,4] y) {{ c = Conv(x, W)\n {CONV} }}"
    prepared = graph.prepare(ir.from_proto(model(text, constants(np.float16))))
    made = plan(prepared)
    (value,) = made.gauges
    gauge = Gauge(np.full((1, 4, 1, 1), 1e6), np.zeros((1, 1, 1, 1)))
    with pytest.raises(InputError, match=r"'W'.*FLOAT16"):
        apply(replace(made, gauges={value: gauge}))


def test_eps_that_the_file_leaves_out_is_the_one_of_the_standard() -> None:
    arrays = constants(v=np.zeros(4), g=np.ones(4), m=np.zeros(4), b=np.zeros(4))
    text = (
        f"m ({SHAPE} x) => ({SHAPE} y) {{ c = Conv(x, W)\n y = BatchNormalization(c, g, b, m, v) }}"
    )
    made = folding.fold(model(text, arrays))
    expected = arrays["W"] / np.sqrt(np.float64(np.float32(1e-5)))
    np.testing.assert_array_equal(weights(made.model)["W"], expected.astype(np.float32))


# --- impossible statistics, other modes ----------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "numbers", "words"),
    [
        ("v", [1, -1, 0, 0], "running_var"),
        ("v", [1, np.nan, 0, 0], "running_var"),
        ("v", [1, np.inf, 0, 0], "running_var"),
        ("g", [1, np.nan, 0, 0], "gamma"),
        ("b", [1, -np.inf, 0, 0], "beta"),
        ("m", [1, np.nan, 0, 0], "running_mean"),
    ],
)
def test_impossible_statistics_are_an_error_that_names_the_channel(
    part: str, numbers: list[float], words: str
) -> None:
    text = f"m ({SHAPE} x) => ({SHAPE} y) {{ c = Conv(x, W)\n {CONV} }}"
    arrays = constants(**{part: np.array(numbers)})
    with pytest.raises(InputError, match=rf"{words}.*channel 1"):
        plan(graph.prepare(ir.from_proto(model(text, arrays))))


def test_a_variance_of_zero_with_eps_zero_is_an_error() -> None:
    text = f"m ({SHAPE} x) => ({SHAPE} y) {{ c = Conv(x, W)\n {CONV.replace('0.25', '0.0')} }}"
    with pytest.raises(InputError, match="running_var"):
        plan(graph.prepare(ir.from_proto(model(text, constants()))))


@pytest.mark.parametrize(
    ("batch_norm", "opset", "word"),
    [
        ("y = BatchNormalization<epsilon=0.25, training_mode=1>", 15, "training"),
        ("y, p, q = BatchNormalization<epsilon=0.25, training_mode=1>", 15, "training"),
        ("y, p, q, r, s = BatchNormalization<epsilon=0.25>", 9, "training"),
        ("y, p, q, r, s = BatchNormalization<epsilon=0.25>", 13, "training"),
        ("y, p, q = BatchNormalization<epsilon=0.25>", 15, None),
        ("y = BatchNormalization<epsilon=0.25, spatial=1>", 7, None),
        ("y = BatchNormalization<epsilon=0.25, spatial=0>", 7, "per-element"),
        ("y = BatchNormalization<epsilon=0.25, is_test=1>", 6, "opset"),
        ("y = BatchNormalization<epsilon=0.25>", 6, "opset"),
    ],
)
def test_only_inference_batch_norms_are_folded(
    batch_norm: str, opset: int, word: str | None
) -> None:
    text = f"m ({SHAPE} x) => ({SHAPE} y) {{ c = Conv(x, W)\n {batch_norm}(c, g, b, m, v) }}"
    arrays = constants()
    if "spatial=0" in batch_norm:
        arrays |= {name: np.ones((4, 4, 4), np.float32) for name in "gbmv"}
    proto = model(text, arrays, opset=opset, ir_version=8)
    made = folding.fold(proto)
    if word is None:
        assert len(made.plan.removed) == 1
        return
    assert not made.plan.removed
    assert word in made.plan.kept[0].reason
    untouched = graph.to_proto(ir.from_proto(proto))
    assert list(made.model.graph.node) == list(untouched.graph.node)
    assert list(made.model.graph.initializer) == list(untouched.graph.initializer)


def test_statistics_that_are_read_are_training() -> None:
    text = (
        f"m ({SHAPE} x) => ({SHAPE} y, float[4] p) {{ c = Conv(x, W)\n"
        " y, p, q = BatchNormalization<epsilon=0.25, training_mode=1>(c, g, b, m, v) }"
    )
    made = folding.fold(model(text, constants(), opset=15))
    assert "training" in made.plan.kept[0].reason


# --- branches, loops, functions ------------------------------------------------------------------


def test_a_batch_norm_in_both_branches_with_one_weight_outside() -> None:
    text = f"""m ({SHAPE} x, bool t) => ({SHAPE} z) {{
        z = If(t) <then_branch = a () => ({SHAPE} p) {{
            c = Conv(x, W, B)
            p = BatchNormalization<epsilon=0.25>(c, g, b, m, v) }},
          else_branch = e () => ({SHAPE} q) {{ q = Conv(x, W, B) }}> }}"""
    proto = model(text, constants())
    made = fold_exactly(proto, 1)
    for side in (True, False):
        given = feeds(proto) | {"t": np.array(side)}
        np.testing.assert_array_equal(
            folding.run(made.model, given)["z"], folding.run(proto, given)["z"]
        )


def test_branches_fold_each_on_its_own() -> None:
    text = f"""m ({SHAPE} x, bool t) => ({SHAPE} z) {{
        z = If(t) <then_branch = a () => ({SHAPE} p) {{
            c = Conv(x, W, B)
            p = BatchNormalization<epsilon=0.25>(c, g, b, m, v) }},
          else_branch = e () => ({SHAPE} q) {{
            d = Conv(x, W, B)
            q = BatchNormalization<epsilon=0.25>(d, g, m, b, v) }}> }}"""
    proto = model(text, constants())
    made = fold_exactly(proto, 2)
    for side in (True, False):
        given = feeds(proto) | {"t": np.array(side)}
        np.testing.assert_array_equal(
            folding.run(made.model, given)["z"], folding.run(proto, given)["z"]
        )


@pytest.mark.parametrize(("inner", "removed"), [("Conv(n, W)", 1), ("Floor(n)", 0)])
def test_a_branch_that_reads_a_batch_norm_outside_has_its_say(inner: str, removed: int) -> None:
    text = f"""m ({SHAPE} x, bool t) => ({SHAPE} z) {{
        f = Floor(x)
        n = BatchNormalization<epsilon=0.25>(f, g, b, m, v)
        z = If(t) <then_branch = a () => ({SHAPE} p) {{ p = {inner} }},
          else_branch = e () => ({SHAPE} q) {{ q = Conv(n, W) }}> }}"""
    proto = model(text, constants())
    made = fold_exactly(proto, removed)
    given = feeds(proto) | {"t": np.array(True)}
    np.testing.assert_array_equal(
        folding.run(made.model, given)["z"], folding.run(proto, given)["z"]
    )


def test_a_branch_that_hands_out_a_value_of_the_graph_outside() -> None:
    text = f"""m ({SHAPE} x, bool t) => ({SHAPE} z) {{
        c = Conv(x, W)
        z = If(t) <then_branch = a () => ({SHAPE} p) {{
            p = BatchNormalization<epsilon=0.25>(c, g, b, m, v) }},
          else_branch = e () => ({SHAPE} q) {{
            q = BatchNormalization<epsilon=0.25>(c, g, b, m, v) }}> }}"""
    proto = model(text, constants())
    made = folding.fold(proto)
    for side in (True, False):
        given = feeds(proto) | {"t": np.array(side)}
        np.testing.assert_array_equal(
            folding.run(made.model, given)["z"], folding.run(proto, given)["z"]
        )


def test_a_batch_norm_in_the_body_of_a_loop() -> None:
    text = f"""m ({SHAPE} x) => ({SHAPE} z) {{
        n = Constant<value = int64 {{2}}>()
        t = Constant<value = bool {{1}}>()
        z = Loop(n, t, x) <body = a (int64 i, bool k, {SHAPE} h) => (bool l, {SHAPE} y) {{
            l = Identity(k)
            c = Conv(h, W, B)
            {CONV} }}> }}"""
    fold_exactly(model(text, constants()), 1)


def test_a_value_carried_by_a_loop_keeps_its_numbers() -> None:
    text = f"""m ({SHAPE} x) => ({SHAPE} z) {{
        n = Constant<value = int64 {{2}}>()
        t = Constant<value = bool {{1}}>()
        z = Loop(n, t, x) <body = a (int64 i, bool k, {SHAPE} c) => (bool l, {SHAPE} y) {{
            l = Identity(k)
            {CONV} }}> }}"""
    fold_exactly(model(text, constants()), 0)


def test_constants_that_belong_to_a_branch() -> None:
    text = f"""m ({SHAPE} x, bool t) => ({SHAPE} z) {{
        z = If(t) <then_branch = a () => ({SHAPE} p) {{
            c = Conv(x, U)
            p = BatchNormalization<epsilon=0.25>(c, g, b, m, v) }},
          else_branch = e () => ({SHAPE} q) {{ q = Identity(x) }}> }}"""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    branch = proto.graph.node[0].attribute[0].g
    held = constants()
    branch.initializer.extend(
        numpy_helper.from_array(held["W" if name == "U" else name], name) for name in "Ugbmv"
    )
    onnx.checker.check_model(proto)
    made = folding.fold(proto)
    assert len(made.plan.removed) == 1
    given = feeds(proto) | {"t": np.array(True)}
    np.testing.assert_array_equal(
        folding.run(made.model, given)["z"], folding.run(proto, given)["z"]
    )


def test_an_operator_of_another_domain_is_not_the_one_of_the_table() -> None:
    # another opset: it cannot be inlined
    function = '<domain: "own", opset_import: ["" : 19]> Relu (x) => (y) { y = Floor(x) }'
    text = f"m ({SHAPE} x) => ({SHAPE} y) {{ d = Conv(x, W)\n c = own.Relu(d)\n {CONV} }}"
    proto = model(text, constants(), functions=function)
    made = folding.fold(proto)
    assert not made.plan.removed
    assert "Relu" in made.plan.kept[0].reason


def test_the_long_name_of_the_standard_domain_is_the_standard_domain() -> None:
    text = f"m ({SHAPE} x) => ({SHAPE} y) {{ d = Conv(x, W)\n c = Identity(d)\n {CONV} }}"
    proto = model(text, constants())
    for node in proto.graph.node:
        node.domain = "ai.onnx"
    made = folding.fold(proto)
    assert len(made.plan.removed) == 1
    np.testing.assert_array_equal(
        folding.run(made.model, feeds(proto))["y"], folding.run(proto, feeds(proto))["y"]
    )


def test_batch_norms_in_functions_go_too() -> None:
    function = (
        '<domain: "own", opset_import: ["" : 20]> Block (x, w, g, b, m, v) => (y)'
        " { c = Conv(x, w)\n y = BatchNormalization<epsilon=0.25>(c, g, b, m, v) }"
    )
    text = f"""m ({SHAPE} x) => ({SHAPE} y) {{
        u = own.Block(x, W, g, b, m, v)
        c = Conv(u, W)
        {CONV} }}"""
    proto = model(text, constants(), functions=function)
    made = folding.fold(proto)
    assert len(made.plan.removed) == 2
    np.testing.assert_array_equal(
        folding.run(made.model, feeds(proto))["y"], folding.run(proto, feeds(proto))["y"]
    )


# --- names, inputs, ownership --------------------------------------------------------------------


def test_new_names_do_not_collide() -> None:
    text = f"""m ({SHAPE} x) => ({SHAPE} y, {SHAPE} W_bias) {{
        W_folded = Conv(x, W)
        W_folded_1 = Floor(W_folded)
        W_bias = Conv(W_folded_1, W)
        c = Conv(x, W)
        {CONV} }}"""
    made = fold_exactly(model(text, constants()), 1)
    names = [t.name for t in made.model.graph.initializer]
    names += [name for node in made.model.graph.node for name in node.output]
    assert len(set(names)) == len(names)


def test_a_bias_that_is_added_is_reported_beside_its_weight() -> None:
    text = f"m ({SHAPE} x) => ({SHAPE} y) {{ c = Conv(x, stem_weight)\n {CONV} }}"
    arrays = constants()
    arrays["stem_weight"] = arrays.pop("W")
    made = fold_exactly(model(text, arrays), 1)
    assert made.folded.biases == {"stem_weight": ("stem_weight_bias",)}
    assert set(weights(made.model)) == {"stem_weight", "stem_weight_bias"} | {"B"}


def test_an_absent_bias_given_as_an_empty_name() -> None:
    text = f"m ({SHAPE} x) => ({SHAPE} y) {{ c = Conv(x, W, )\n {CONV} }}"
    proto = model(text, constants())
    proto.graph.node[0].input[:] = ["x", "W", ""]
    fold_exactly(proto, 1)


def test_constants_that_nothing_reads_any_more_are_gone() -> None:
    text = f"m ({SHAPE} x) => ({SHAPE} y) {{ c = Conv(x, W, B)\n {CONV} }}"
    made = fold_exactly(model(text, constants()), 1)
    assert set(weights(made.model)) == {"W", "B"}


def test_where_the_original_values_are() -> None:
    text = (
        "x[4,4,4,4] > y; a = Conv(x, W[4,4,1,1]); b = BN4(a); c = Relu(b);"
        "d = Conv(c, V[4,4,1,1]); e = BN4(d); y = BN4(e)"
    )
    made = folding.fold(build(Law("aliases", "", text, 3)))
    aliases = made.folded.aliases
    outputs = {name for node in made.model.graph.node for name in node.output}
    assert aliases["b"] == "a"
    assert {aliases.get(name, name) for name in ("d", "e", "y")} == {"y"}
    assert set(aliases.values()) <= outputs


@pytest.mark.parametrize("name", ["W", "B", "g", "b", "m", "v"])
def test_one_initializer_that_a_caller_may_override_stops_the_fold(name: str) -> None:
    text = f"m ({SHAPE} x) => ({SHAPE} y) {{ c = Conv(x, W, B)\n {CONV} }}"
    proto = model(text, constants())
    array = weights(proto)[name]
    proto.graph.input.append(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, list(array.shape))
    )
    made = folding.fold(proto)
    assert not made.plan.removed
    assert "override" in made.plan.kept[0].reason
    assert len(folding.fold(frozen(proto)).plan.removed) == 1


def frozen(proto: onnx.ModelProto) -> onnx.ModelProto:
    return graph.to_proto(graph.freeze_inputs(ir.from_proto(proto)))


def test_a_default_value_used_as_data_is_not_written() -> None:
    text = f"m ({SHAPE} x, {SHAPE} u) => ({SHAPE} y) {{ d = Conv(x, W)\n c = Add(d, u)\n {CONV} }}"
    proto = model(text, constants() | {"u": np.ones((4, 4, 4, 4), np.float32)})
    made = folding.fold(proto)
    assert not made.plan.removed
    given = {"x": feeds(proto)["x"], "u": np.full((4, 4, 4, 4), 3, np.float32)}
    np.testing.assert_array_equal(
        folding.run(made.model, given)["y"], folding.run(proto, given)["y"]
    )


def test_ir_version_3_lists_every_constant_as_an_input() -> None:
    text = "x[4,4,4,4] > y; c = Conv(x, W[4,4,1,1]); d = Mul(c, M:pow[]); y = BN4(d)"
    law = Law("ir 3", "", text, 1, opset=9, ir_version=3, listed=True)
    made = folding.fold(build(law))
    listed = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in made.model.graph.input
    }
    for tensor in made.model.graph.initializer:
        assert listed[tensor.name] == list(tensor.dims)


def test_two_equal_batch_norms_behind_one_conv_may_both_be_outputs() -> None:
    text = f"""m ({SHAPE} x) => ({SHAPE} y, {SHAPE} z) {{ c = Conv(x, W)
        {CONV}
        z = BatchNormalization<epsilon=0.25>(c, g, b, m, v) }}"""
    fold_exactly(model(text, constants(g=np.array([1, -2, 4, 0.5]))), 2)


def test_the_declared_shapes_of_outputs_stay_as_they_are() -> None:
    text = f"m (float[N,4,H,W0] x) => (float[B,C,I,J] y) {{ c = Conv(x, W)\n {CONV} }}"
    made = folding.fold(model(text, constants()))
    dims = made.model.graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_param for dim in dims] == ["B", "C", "I", "J"]


def test_an_output_declared_with_a_wrong_rank_gives_no_traceback() -> None:
    text = f"m ({SHAPE} x) => (float[4] y) {{ c = Conv(x, W)\n {CONV} }}"
    made = folding.fold(model(text, constants()))
    assert len(made.plan.removed) + len(made.plan.kept) == 1


def test_a_batch_norm_of_unknown_rank_is_kept_with_a_reason() -> None:
    nodes = f"d = Conv(x, W)\n c = Reshape(d, s)\n {CONV}"
    text = f"m ({SHAPE} x, int64[r] s) => ({SHAPE} y) {{ {nodes} }}"
    made = folding.fold(model(text, constants()))
    assert not made.plan.removed
    assert "rank" in made.plan.kept[0].reason


# --- accuracy ------------------------------------------------------------------------------------


def stream_with_a_nearly_dead_channel(gamma: float) -> onnx.ModelProto:
    """Four pre-activation blocks; in each batch norm one channel has this gamma, beta as usual."""
    rng, width = np.random.default_rng(0), 16
    arrays = {"W0": rng.standard_normal((width, 3, 3, 3)) / 5}
    lines, x = ["s0 = Conv(x, W0)"], "s0"
    for k in range(1, 5):
        arrays |= {
            f"g{k}": np.where(np.arange(width) == k, gamma, rng.uniform(0.5, 1.5, width)),
            f"b{k}": rng.uniform(-1, 1, width),
            f"m{k}": 0.3 * rng.standard_normal(width),
            f"v{k}": rng.uniform(0.5, 2, width),
            f"W{k}": rng.standard_normal((width, width, 3, 3)) / 12,
        }
        lines += [
            f"n{k} = BatchNormalization({x}, g{k}, b{k}, m{k}, v{k})",
            f"r{k} = Relu(n{k})",
            f"c{k} = Conv<pads=[1,1,1,1]>(r{k}, W{k})",
            f"s{k} = Add({x}, c{k})",
        ]
        x = f"s{k}"
    text = "m (float[2,3,16,16] x) => (float[2,16,14,14] s4) {" + "\n".join(lines) + "}"
    return model(text, {name: array.astype(np.float32) for name, array in arrays.items()})


@pytest.mark.parametrize("gamma", [1.0, 1e-2, 1e-4, 1e-8])
def test_a_nearly_dead_channel_costs_the_stream_no_accuracy(gamma: float) -> None:
    proto = stream_with_a_nearly_dead_channel(gamma)
    made = folding.fold(proto)
    given = {"x": np.random.default_rng(1).standard_normal((2, 3, 16, 16)).astype(np.float32)}
    exact = Float64Reference(proto).run(given)["s4"]
    own = np.max(np.abs(folding.run(proto, given)["s4"] - exact))
    error = np.max(np.abs(folding.run(made.model, given)["s4"] - exact))
    assert error <= 4 * max(own, 4 * 2.0**-24 * np.max(np.abs(exact)))


@pytest.mark.parametrize("view", ["Identity(c)", "Mul(c, two)", "Add(c, d)"])
def test_a_nearly_dead_channel_behind_a_view_costs_the_other_readers_nothing(view: str) -> None:
    rng = np.random.default_rng(2)
    arrays = {name: rng.standard_normal((4, 4, 1, 1)).astype(np.float32) for name in "WVU"}
    arrays |= {
        "g": np.array([1e-4, 1, 1e-5, 0.5], np.float32),
        "b": np.array([1, -1, 2, 0.5], np.float32),
        "m": np.array([0.1, -0.2, 0, 0.3], np.float32),
        "v": np.array([1, 2, 0.5, 3], np.float32),
        "two": np.float32(2),
    }
    text = f"""m ({SHAPE} x) => ({SHAPE} y, {SHAPE} z) {{
        c = Conv(x, W)
        d = Conv(x, U)
        e = {view}
        y = BatchNormalization(e, g, b, m, v)
        z = Conv(c, V) }}"""
    proto = model(text, {name: np.asarray(array) for name, array in arrays.items()})
    made = folding.fold(proto)
    given = {"x": rng.standard_normal((4, 4, 4, 4)).astype(np.float32)}
    exact = Float64Reference(proto).run(given)
    before, after = folding.run(proto, given), folding.run(made.model, given)
    for name in ("y", "z"):
        own = np.max(np.abs(before[name] - exact[name]))
        error = np.max(np.abs(after[name] - exact[name]))
        assert error <= 4 * max(own, 4 * 2.0**-24 * np.max(np.abs(exact[name])))


def test_freezing_the_inputs_of_an_ir_3_model_leaves_it_valid() -> None:
    law = Law("ir 3", "Conv", "x[4,4,4,4] > y; c = Conv(x, W[4,4,3,3]); y = BN4(c)", 1)
    law = replace(law, opset=9, ir_version=3, listed=True)
    frozen = graph.freeze_inputs(graph.prepare(ir.from_proto(build(law))))
    made = folding.fold(graph.to_proto(frozen))  # which checks the file
    assert len(made.plan.removed) == 1
