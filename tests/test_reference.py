"""The float64 reference agrees with torch in float64 and with onnxruntime in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from onnx import TensorProto, helper, numpy_helper

from bnfold.errors import InputError
from bnfold.proof.exact import reference
from bnfold.proof.exact.reference import Float64Reference, NodeReference, NoReferenceError
from bnfold.proof.places.runtime import open_session

Array = np.ndarray[Any, Any]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def model(
    nodes: list[onnx.NodeProto],
    x: tuple[int, ...],
    weights: dict[str, Array] | None = None,
    *,
    outputs: tuple[str, ...] = ("y",),
    opset: int = 17,
    **kinds: int,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(o, kinds.get(o, TensorProto.FLOAT), None) for o in outputs],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def run(op: str, x: Array, weights: dict[str, Array], opset: int = 17, **attributes: Any) -> Array:
    names = ["x", *weights]
    proto = model([helper.make_node(op, names, ["y"], **attributes)], x.shape, weights, opset=opset)
    return Float64Reference(proto).run({"x": x})["y"]


def on_onnxruntime(proto: onnx.ModelProto, x: Array) -> dict[str, Array]:
    return open_session(proto, optimize=False, threads=1).run({"x": x})


# ------------------------------------------------------------- against torch, in float64, by draws


def spatial(rng: np.random.Generator, rank: int) -> dict[str, Any]:
    def each(low: int, high: int) -> list[int]:
        return [int(size) for size in rng.integers(low, high, rank)]

    kernel = each(1, 4)
    return {
        "sizes": each(6, 10),
        "kernel": kernel,
        "strides": each(1, 4),
        "dilations": each(1, 3),
        "pads": [int(rng.integers(0, extent)) for extent in kernel],
    }


@pytest.mark.parametrize("seed", range(24))
def test_convolution_is_torchs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rank = 1 + seed % 3
    s = spatial(rng, rank)
    group = int(rng.choice([1, 2, 4]))
    inputs = 1 if seed % 4 == 0 else int(rng.integers(1, 4))  # every fourth is depthwise
    x = rng.standard_normal((2, inputs * group, *s["sizes"]))
    w = rng.standard_normal((3 * group, inputs, *s["kernel"]))
    b = rng.standard_normal(3 * group)
    ours = run("Conv", x, {"w": w, "b": b}, group=group, strides=s["strides"],
               dilations=s["dilations"], pads=s["pads"] * 2)  # fmt: skip
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    theirs = convolve(torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(b), s["strides"],
                      s["pads"], s["dilations"], group)  # fmt: skip
    np.testing.assert_allclose(ours, theirs.numpy(), **EXACT)


@pytest.mark.parametrize("seed", range(24))
def test_transposed_convolution_is_torchs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rank = 1 + seed % 3
    s = spatial(rng, rank)
    group = int(rng.choice([1, 2, 4]))
    extra = [
        int(rng.integers(0, max(stride, dilation)))
        for stride, dilation in zip(s["strides"], s["dilations"], strict=True)
    ]
    x = rng.standard_normal((2, 2 * group, *s["sizes"]))
    w = rng.standard_normal((2 * group, 3, *s["kernel"]))
    b = rng.standard_normal(3 * group)
    ours = run("ConvTranspose", x, {"w": w, "b": b}, group=group, strides=s["strides"],
               dilations=s["dilations"], pads=s["pads"] * 2, output_padding=extra)  # fmt: skip
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    theirs = convolve(torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(b), s["strides"],
                      s["pads"], extra, group, s["dilations"])  # fmt: skip
    np.testing.assert_allclose(ours, theirs.numpy(), **EXACT)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_pools_are_torchs(seed: int, ceil_mode: bool) -> None:
    rng = np.random.default_rng(seed)
    rank = 1 + seed % 3
    s = spatial(rng, rank)
    pads = [extent // 2 for extent in s["kernel"]]
    counted = bool(seed % 2)
    x = rng.standard_normal((2, 3, *s["sizes"]))
    common = {"kernel_shape": s["kernel"], "strides": s["strides"], "pads": pads * 2,
              "ceil_mode": int(ceil_mode)}  # fmt: skip
    average = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    theirs = average(torch.from_numpy(x), s["kernel"], s["strides"], pads, ceil_mode, counted)
    ours = run("AveragePool", x, {}, count_include_pad=int(counted), **common)
    np.testing.assert_allclose(ours, theirs.numpy(), **EXACT)
    largest = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    theirs = largest(torch.from_numpy(x), s["kernel"], s["strides"], pads, s["dilations"],
                     ceil_mode)  # fmt: skip
    ours = run("MaxPool", x, {}, dilations=s["dilations"], **common)
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_a_small_workspace_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 4, 9, 9)), rng.standard_normal((6, 2, 3, 3))
    whole = run("Conv", x, {"w": w}, group=2)
    monkeypatch.setattr(reference, "WORKSPACE_BYTES", 1)
    np.testing.assert_allclose(run("Conv", x, {"w": w}, group=2), whole, **EXACT)


# ----------------------------------------------------- against onnxruntime, what torch cannot say


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "AveragePool", "MaxPool"])
def test_auto_pad_is_onnxruntimes(op: str, auto_pad: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 8, 9)).astype(np.float32)
    weights, attributes = {}, {"strides": [2, 3], "auto_pad": auto_pad, "kernel_shape": [3, 4]}
    if op.startswith("Conv"):
        weights = {"w": rng.standard_normal((4, 2, 3, 4)).astype(np.float32)}
        attributes["group"] = 2
    proto = model([helper.make_node(op, ["x", *weights], ["y"], **attributes)], x.shape, weights)
    ours = Float64Reference(proto).run({"x": x})["y"]
    np.testing.assert_allclose(on_onnxruntime(proto, x)["y"], ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("size", [16, 17, 18])
def test_output_shape_is_onnxruntimes(size: int, auto_pad: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 2, 9)).astype(np.float32)
    weights = {"w": rng.standard_normal((2, 3, 3)).astype(np.float32)}
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2], output_shape=[size],
                            auto_pad=auto_pad)  # fmt: skip
    proto = model([node], x.shape, weights)
    ours = Float64Reference(proto).run({"x": x})["y"]
    np.testing.assert_allclose(on_onnxruntime(proto, x)["y"], ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage_order", [0, 1])
def test_indices_of_the_maximum_are_onnxruntimes(storage_order: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 7, 6)).astype(np.float32)
    node = helper.make_node("MaxPool", ["x"], ["y", "i"], kernel_shape=[3, 2], strides=[2, 2],
                            pads=[1, 0, 1, 1], storage_order=storage_order)  # fmt: skip
    proto = model([node], x.shape, outputs=("y", "i"), i=TensorProto.INT64)
    theirs, ours = on_onnxruntime(proto, x), Float64Reference(proto).run({"x": x})
    np.testing.assert_array_equal(theirs["i"], ours["i"])


# -------------------------------------------------------------------------------- normalization


BN = {
    "gamma": np.array([2.0, -1.0], np.float32),
    "beta": np.array([0.5, 0.0], np.float32),
    "mean": np.array([1.0, 3.0], np.float32),
    "var": np.array([4.0, 0.25], np.float32),
}


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15])
def test_normalization_takes_the_stored_statistics(opset: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
    node = helper.make_node("BatchNormalization", ["x", *BN], ["y"], epsilon=1e-3)
    ours = Float64Reference(model([node], x.shape, BN, opset=opset)).run({"x": x})["y"]
    theirs = F.batch_norm(
        torch.from_numpy(x).double(),
        *(torch.from_numpy(BN[name]).double() for name in ("mean", "var", "gamma", "beta")),
        eps=float(np.float32(1e-3)),
    )
    np.testing.assert_allclose(ours, theirs.numpy(), **EXACT)


def test_normalization_in_training_mode_takes_the_batchs() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 4))
    node = helper.make_node("BatchNormalization", ["x", *BN], ["y", "m", "v"], training_mode=1,
                            momentum=0.75)  # fmt: skip
    proto = model([node], x.shape, BN, opset=15, outputs=("y", "m", "v"))
    results = Float64Reference(proto).run({"x": x})
    mean = x.mean(axis=(0, 2))
    np.testing.assert_allclose(results["m"], 0.75 * BN["mean"] + 0.25 * mean, rtol=1e-6)
    np.testing.assert_allclose(results["y"].mean(axis=(0, 2)), BN["beta"], atol=1e-7)


# ------------------------------------------------------------------------------------- precision


def test_nothing_is_rounded_to_a_narrower_float() -> None:
    third = np.array([1 / 3], np.float64)
    proto = model(
        [
            helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
            helper.make_node("Constant", [], ["c"], value_float=0.1),
            helper.make_node("Cast", ["c"], ["d"], to=TensorProto.FLOAT16),
            helper.make_node("Add", ["h", "d"], ["y"]),
        ],
        (1,),
    )
    result = Float64Reference(proto).run({"x": third})["y"]
    assert result.dtype == np.float64
    assert result[0] == third[0] + float(np.float32(0.1))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, "bfloat16"])
def test_stored_parameters_keep_their_exact_value(dtype: Any) -> None:
    kind = {np.float16: TensorProto.FLOAT16, np.float32: TensorProto.FLOAT}.get(
        dtype, TensorProto.BFLOAT16
    )
    proto = model([helper.make_node("Mul", ["x", "w"], ["y"])], (1,))
    proto.graph.initializer.append(helper.make_tensor("w", kind, [1], [0.1]))
    stored = numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float64)
    result = Float64Reference(proto).run({"x": np.ones(1)})["y"]
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result, stored)


def test_branches_and_functions_are_evaluated_in_float64() -> None:
    weight = np.array([0.1], np.float32)
    value = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(weight)),
         helper.make_node("Mul", ["x", "w"], ["t"]), helper.make_node("Add", ["t", "k"], ["b"])],
        "branch", [], [value],
    )  # fmt: skip
    function = helper.make_function(
        "local", "Third", ["a"], ["r"],
        [helper.make_node("Constant", [], ["three"], value_float=3.0),
         helper.make_node("Div", ["a", "three"], ["r"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    proto = model(
        [
            helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("", 9, [], [True])),
            helper.make_node("If", ["yes"], ["i"], then_branch=branch, else_branch=branch),
            helper.make_node("Third", ["i"], ["y"], domain="local"),
        ],
        (1,),
        {"w": weight},
    )
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("local", 1))
    result = Float64Reference(proto).run({"x": np.ones(1)})["y"]
    np.testing.assert_array_equal(result, [2 * float(weight[0]) / 3])


def test_int32_is_dequantized_exactly() -> None:
    node = helper.make_node("DequantizeLinear", ["x", "s"], ["y"])
    proto = model([node], (1,), {"s": np.array(0.5, np.float32)})
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32
    odd = np.array([2**24 + 1], np.int32)
    np.testing.assert_array_equal(Float64Reference(proto).run({"x": odd})["y"], [(2**24 + 1) / 2])


# ----------------------------------------------------------------------------- asking and failing


@pytest.mark.parametrize(
    ("mode", "pads", "axes"),
    [
        ("constant", [0, 0, -1, 2, 0, 1, -2, -1], None),
        ("edge", [0, 0, -1, 2, 0, 0, 1, -1], None),
        ("reflect", [0, 0, 1, 2, 0, 0, 2, 1], None),
        ("constant", [-1, 2, 1, -2], [-1, 1]),
    ],
)
def test_pads_that_crop_are_onnxruntimes(
    mode: str, pads: list[int], axes: list[int] | None
) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    weights = {"p": np.array(pads), "v": np.float32(1.5)}
    weights |= {"a": np.array(axes)} if axes is not None else {}
    node = helper.make_node("Pad", ["x", *weights], ["y"], mode=mode)
    proto = model([node], x.shape, {k: np.asarray(w) for k, w in weights.items()}, opset=18)
    expected = on_onnxruntime(proto, x)["y"]
    np.testing.assert_array_equal(Float64Reference(proto).run({"x": x})["y"], expected)


def test_a_mean_whose_first_value_broadcasts() -> None:
    x = np.arange(2, dtype=np.float32).reshape(2, 1)
    y = run("Mean", x, {"z": np.array([[1, 3], [5, 7]], np.float32)})
    np.testing.assert_array_equal(y, [[0.5, 1.5], [3, 4]])


def test_places_of_a_grid_are_not_rounded() -> None:
    x = np.zeros((1, 1, 1, 2), np.float32)
    x[..., 1] = 1
    place = np.float32(1 / 3)
    grid = np.array([place, 0], np.float32).reshape(1, 1, 1, 2)
    y = run("GridSample", x, {"g": grid}, opset=20, align_corners=1)
    assert y.item() == (np.float64(place) + 1) / 2


def test_pads_of_a_number_by_attribute() -> None:
    x = np.ones((1, 2, 2), np.float32)
    y = run("Pad", x, {}, opset=10, pads=[0, 0, -1, 0, 1, 2], value=1.5)
    np.testing.assert_array_equal(y, [[[1, 1.5, 1.5], [1, 1.5, 1.5], [1.5, 1.5, 1.5]]])


def chain() -> onnx.ModelProto:
    return model(
        [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Neg", ["r"], ["y"])], (2,)
    )


def test_any_value_can_be_asked_for() -> None:
    values = Float64Reference(chain()).run({"x": np.array([-1.0, 2.0])}, ["r", "x"])
    np.testing.assert_array_equal(values["r"], [0, 2])
    np.testing.assert_array_equal(values["x"], [-1, 2])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="no value named 'q'"):
        Float64Reference(chain()).run({"x": np.zeros(2)}, ["q"])
    with pytest.raises(InputError, match="input 'x'"):
        Float64Reference(chain()).run({})


def test_missing_operator_is_named() -> None:
    proto = model([helper.make_node("Fantasy", ["x"], ["y"], domain="far.away")], (2,))
    proto.opset_import.append(helper.make_opsetid("far.away", 1))
    with pytest.raises(NoReferenceError, match="Fantasy"):
        Float64Reference(proto)


def test_failing_operator_is_named() -> None:
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], (2, 2),
                  {"w": np.zeros((3, 3), np.float32)})  # fmt: skip
    with pytest.raises(NoReferenceError, match="MatMul 'product'"):
        Float64Reference(proto).run({"x": np.zeros((2, 2))})


def test_one_node_runs_alone() -> None:
    node = helper.make_node("Clip", ["x", "", "high"], ["y"])
    (result,) = NodeReference(node, {"": 17})(np.array([1.0, 9.0]), None, np.array(2.0, np.float32))
    np.testing.assert_array_equal(result, [1, 2])


# ---------------------------------------------------------------------------------- real models

REAL = {
    "cgan_32_1.onnx": (1, 5),
    "gtsrb_bnn_48_tf2onnx.onnx": (1, 48, 48, 3),
    "linzaer_slim-320_without_postprocessing.onnx": (1, 3, 240, 320),
    "pfld.onnx": (1, 3, 112, 112),
    "ppocr_v2_cls_opset10.onnx": (1, 3, 48, 192),
}


@pytest.mark.parametrize("name", REAL)
def test_real_model_agrees_with_onnxruntime(name: str, shared_data: Path) -> None:
    path = shared_data / "onnx" / name
    x = np.random.default_rng(0).standard_normal(REAL[name]).astype(np.float32)
    evaluated = Float64Reference(path)
    ours = evaluated.run({evaluated.input_names[0]: x})
    theirs = open_session(path, optimize=False, threads=1).run({evaluated.input_names[0]: x})
    for output, exact in ours.items():
        error = np.linalg.norm(theirs[output] - exact) / np.linalg.norm(exact)
        assert error < 2**-24 * 32  # measured: at most 7.8 roundings
    assert not evaluated.widened_ops


# ------------------------------------------------------------------------------ recurrent networks

RECURRENT = {"RNN": 1, "GRU": 3, "LSTM": 4}
ACTIVATIONS = {
    "RNN": [("Tanh",), ("Relu",), ("LeakyRelu",), ("Affine",)],
    "GRU": [("Sigmoid", "Tanh"), ("HardSigmoid", "ScaledTanh"), ("Sigmoid", "Softsign")],
    "LSTM": [("Sigmoid", "Tanh", "Tanh"), ("HardSigmoid", "Softplus", "Tanh")],
}


def recurrent(op: str, seed: int) -> tuple[onnx.NodeProto, dict[str, Array], Array, dict[str, Any]]:
    """A node with every optional input and attribute now and then, its constants, and an x."""
    rng = np.random.default_rng(seed)
    direction = ["forward", "reverse", "bidirectional"][seed % 3]
    count, gates, hidden, batch, steps = 1 + (seed % 3 == 2), RECURRENT[op], 3, 2, 5
    x = rng.standard_normal((steps, batch, 4)).astype(np.float32)
    names = list(ACTIVATIONS[op][seed % len(ACTIVATIONS[op])]) * count
    given: dict[str, Any] = {"hidden_size": hidden, "direction": direction, "activations": names}
    sizes = {"alpha": ("LeakyRelu", "HardSigmoid", "Affine", "ScaledTanh"),
             "beta": ("HardSigmoid", "Affine", "ScaledTanh")}  # fmt: skip
    for what, takers in sizes.items():
        count_of = sum(name in takers for name in names)
        if count_of:
            given[f"activation_{what}"] = [float(f) for f in rng.uniform(0.2, 0.8, count_of)]
    if op == "GRU":
        given["linear_before_reset"] = seed // 2 % 2
    weights = {
        "w": rng.standard_normal((count, gates * hidden, 4)),
        "r": rng.standard_normal((count, gates * hidden, hidden)),
        "b": rng.standard_normal((count, 2 * gates * hidden)),
        "l": np.array([steps, 3], np.int32),
        "h": rng.standard_normal((count, batch, hidden)),
    }
    if op == "LSTM":
        weights["c"] = rng.standard_normal((count, batch, hidden))
        weights["p"] = rng.standard_normal((count, 3 * hidden))
        given["input_forget"] = int(seed % 4 == 3)
    if seed % 5 == 4:
        given["clip"] = 0.5
    left_out = {"b"} if seed % 2 else set()
    left_out |= {"l"} if seed % 3 == 1 else set()
    reads = ["" if name in left_out else name for name in weights]
    weights = {
        name: value if value.dtype == np.int32 else value.astype(np.float32)
        for name, value in weights.items()
        if name not in left_out
    }
    outputs = ["y", "yh", "yc"] if op == "LSTM" else ["y", "yh"]
    return helper.make_node(op, ["x", *reads], outputs, **given), weights, x, given


@pytest.mark.parametrize("op", RECURRENT)
@pytest.mark.parametrize("seed", range(12))
def test_recurrent_networks_are_onnxruntimes(op: str, seed: int) -> None:
    node, weights, x, _ = recurrent(op, seed)
    proto = model([node], x.shape, weights, outputs=tuple(node.output))
    expected = on_onnxruntime(proto, x)
    for name, value in Float64Reference(proto).run({"x": x}).items():
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("op", RECURRENT)
def test_layout_1_is_layout_0_with_the_batch_in_front(op: str) -> None:
    node, weights, x, given = recurrent(op, 2)
    plain = Float64Reference(model([node], x.shape, weights, outputs=tuple(node.output)))
    turned = helper.make_node(op, list(node.input), list(node.output), layout=1, **given)
    states = {n: np.swapaxes(weights[n], 0, 1).copy() for n in ("h", "c") if n in weights}
    front = np.swapaxes(x, 0, 1).copy()
    other = Float64Reference(
        model([turned], front.shape, {**weights, **states}, outputs=tuple(node.output))
    )
    first, second = plain.run({"x": x}), other.run({"x": front})
    np.testing.assert_allclose(first["y"].transpose(2, 0, 1, 3), second["y"], **EXACT)
    np.testing.assert_allclose(np.swapaxes(first["yh"], 0, 1), second["yh"], **EXACT)


# --------------------------------------------------------------------------------- old upsampling


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.5, 3.0]])
@pytest.mark.parametrize(("op", "opset"), [("Upsample", 7), ("Upsample", 9), ("Resize", 10)])
def test_old_upsampling_is_onnxruntimes(
    op: str, opset: int, scales: list[float], mode: str
) -> None:
    x = np.random.default_rng(2).standard_normal((1, 2, 4, 6)).astype(np.float32)
    held = {} if opset == 7 else {"s": np.array(scales, np.float32)}
    given = {"scales": scales} if opset == 7 else {}
    node = helper.make_node(op, ["x", *held], ["y"], mode=mode, **given)
    proto = model([node], x.shape, held, opset=opset)
    found = Float64Reference(proto).run({"x": x})["y"]
    np.testing.assert_allclose(found, on_onnxruntime(proto, x)["y"], rtol=1e-5, atol=1e-6)
