"""Right folds pass, planted faults fail and are located, and what was not compared never passes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from handmade import (
    BN,
    EPS,
    EPS32,
    Array,
    Fold,
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

from bnfold.errors import (
    InputError,
    NothingComparedError,
    RuntimeUnavailableError,
    UsageError,
    VerificationError,
)
from bnfold.proof.exact.reference import Float64Reference, NoReferenceError
from bnfold.proof.fault.divergence import divergences
from bnfold.proof.figures import verdicts
from bnfold.proof.figures.draws import drawn_inputs, given_inputs, input_specs
from bnfold.proof.places.installation import runs
from bnfold.proof.places.precision import unit_of
from bnfold.proof.places.runtimes import R_LIMIT, Runtime
from bnfold.proof.result import VerifyReport
from bnfold.proof.verify import verify


def network(eps: float = EPS32, believed: Weights | None = None) -> Fold:
    """Conv -> BN -> Relu -> Conv -> Relu -> mean -> Gemm, folded with what is `believed`."""
    bn = normalization(8)
    bn["var"] *= 0.01
    first, second, dense = draw(1, 8, 3, 3, 3), draw(2, 8, 8, 3, 3) * 0.2, draw(3, 8, 5)
    slope, shift = affine({**bn, **(believed or {})}, eps)
    planned, moved = affine(bn)
    tail = [
        node("Relu", "n", "r"),
        node("Conv", "r v", "d", pads=[1, 1, 1, 1]),
        node("Relu", "d", "e"),
        node("GlobalAveragePool", "e", "p"),
        node("Flatten", "p", "f"),
        node("Gemm", "f g", "out"),
    ]
    return Fold(
        nodes=[
            node("Conv", "x w", "c", pads=[1, 1, 1, 1]),
            node("BatchNormalization", f"c {BN}", "n", epsilon=EPS),
            *tail,
        ],
        folded_nodes=[node("Conv", "x w b", "n", pads=[1, 1, 1, 1]), *tail],
        weights={"w": first, "v": second, "g": dense, **bn},
        folded_weights={
            "w": f32(first * along(slope, 4, 0)),
            "b": f32(shift),
            "v": second,
            "g": dense,
        },
        x=("N", 3, 12, 12),
        gauges={"c": gauge(planned, -moved / planned, 4)},
        aliases={"c": "n"},
    )


def checked(fold: Fold, **options: object) -> VerifyReport:
    return verify(*fold.models(), threads=1, **options)  # type: ignore[arg-type]


def proved(fold: Fold, **options: object) -> VerifyReport:
    return checked(fold, gauges=fold.gauges, aliases=fold.aliases, **options)


# ------------------------------------------------------------------------------------ what passes


def test_right_fold_passes_every_gate() -> None:
    report = proved(network())
    assert report.passed
    assert [result.gate for result in report.gates] == ["A", "B", "B", "B", "C", "C", "C"]
    assert 0.1 < report.r < 2
    assert report.certificate is not None
    assert report.certificate.passed
    assert report.sets == ("normal", "one row", "zeros", "constant", "ten times")
    assert [ran.noise for ran in report.runtimes] == [None, 0.0]
    assert report.runtimes[0].providers["CPUExecutionProvider"]["Conv"] == 2
    report.raise_for_failure()


def test_model_against_itself_has_the_ratio_one() -> None:
    original, _ = network().models()
    report = verify(original, original, threads=1)
    assert report.r == pytest.approx(1)
    assert "plan of this fold is not known" in report.notes[0]


def test_seed_decides_the_inputs() -> None:
    original, _ = network().models()
    first, again, other = (
        drawn_inputs(original, None, seed=seed)[0].batches[0]["x"] for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert proved(network(), seed=1).seed == 1


# ------------------------------------------------------------------------------------- what fails

FAULTS: dict[str, Callable[[], Fold]] = {
    "eps dropped": lambda: network(0.0),
    "eps 1e-3 for 1e-5": lambda: network(1e-3),
    "variance * 0.999": lambda: network(
        believed={"var": network().weights["var"] * np.float32(0.999)}
    ),
    "mean with the wrong sign": lambda: network(believed={"mean": -normalization(8)["mean"]}),
    "one gamma off by 1e-3": lambda: network(
        believed={"gamma": normalization(8)["gamma"] * np.float32([1.001] + [1] * 7)}
    ),
    "two channels swapped": lambda: network(
        believed={"beta": normalization(8)["beta"][[1, 0, 2, 3, 4, 5, 6, 7]]}
    ),
    "float16 weights": lambda: network().with_weights(
        w=network().folded_weights["w"].astype(np.float16).astype(np.float32)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_fails_without_the_plan_too(fault: str) -> None:
    fold = FAULTS[fault]()
    report = checked(fold)
    assert not report.passed
    assert report.r > 10
    with pytest.raises(VerificationError, match=r"Gate [AB]: "):
        report.raise_for_failure()
    assert "B" in {result.gate for result in report.failures}
    assert report.first_divergence is not None
    assert report.first_divergence.value == "n"  # the first name that both graphs have
    with_plan = proved(fold)
    assert with_plan.first_divergence is not None
    assert with_plan.first_divergence.value in ("c", "n")  # the convolution, its batch norm
    assert with_plan.failures[0].gate == "A"
    assert "Conv_c" in with_plan.failures[0].sentence


def test_fault_in_a_later_layer_is_located_there() -> None:
    fold = network()
    spoiled = fold.with_weights(v=fold.folded_weights["v"] * np.float32(1.0001))
    report = checked(spoiled)
    assert report.first_divergence is not None
    assert report.first_divergence.node == "Conv_d"
    assert "Conv_d" in report.notes[-1]


def test_value_that_a_fold_carries_otherwise_is_no_divergence() -> None:
    """Without the plan, 'c' of the folded graph is scaled; what follows is right again."""
    fold = network()
    halved = replace(
        fold,
        nodes=[node("Conv", "x w", "c"), node("Conv", "c v", "out")],
        folded_nodes=[node("Conv", "x w", "c"), node("Conv", "c v", "out")],
        weights={"w": fold.weights["w"], "v": fold.weights["v"]},
        folded_weights={"w": fold.weights["w"] / 2, "v": fold.weights["v"] * 2},
    )
    x = {"x": draw(0, 1, 3, 12, 12)}
    assert checked(halved).passed
    found = divergences(*halved.models(), x, gauges=None, aliases=None, unit=2.0**-24)
    assert found == []
    with_plan = divergences(*halved.models(), x, gauges={}, aliases={}, unit=2.0**-24)
    assert with_plan == []  # gauges are trusted only as far as outputs are wrong


def test_ratio_between_passing_and_far_off_fails() -> None:
    assert R_LIMIT == 4
    fold = network()
    rng = np.random.default_rng(0)
    jitter = 1 + 2.0**-20 * rng.standard_normal(fold.folded_weights["g"].shape)
    report = checked(fold.with_weights(g=f32(fold.folded_weights["g"] * jitter)))
    assert 4 < report.r < 100
    assert not report.passed


# ----------------------------------------------------------------- NaN, zeros, integers, booleans


def small(nodes: list[onnx.NodeProto], folded: list[onnx.NodeProto] | None = None,
          weights: Weights | None = None, folded_weights: Weights | None = None,
          x: tuple[int | str, ...] = ("N", 4)) -> Fold:  # fmt: skip
    weights = weights or {}
    return Fold(nodes, folded or nodes, weights, folded_weights or weights, x)


def test_nan_is_right_where_the_reference_has_it() -> None:
    assert checked(small([node("Sqrt", "x", "out")])).passed


def test_nan_elsewhere_fails() -> None:
    fold = small(
        [node("Abs", "x", "a"), node("Sqrt", "a", "out")],
        [node("Identity", "x", "a"), node("Sqrt", "a", "out")],
    )
    report = checked(fold)
    assert not report.passed
    assert any("NaN or infinite" in result.sentence for result in report.failures)


def test_nan_of_the_original_alone_proves_nothing() -> None:
    """A float32 overflow that the float64 reference does not have."""
    big = {"k": np.full(1, 1e30, np.float32), "back": np.full(1, 1e-30, np.float32)}
    nodes = [node("Mul", "x k", "a"), node("Mul", "a k", "b"), node("Mul", "b back", "out")]
    report = checked(small(nodes, weights=big))
    assert not report.passed
    assert any("nothing can be said" in result.sentence for result in report.failures)


def test_zero_output_on_zero_input_is_held_against_its_usual_size() -> None:
    weights = {"w": draw(0, 4, 4), "b": np.zeros(4, np.float32)}
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b", "out")]
    assert checked(small(nodes, weights=weights)).passed
    tiny = small(nodes, None, weights, {**weights, "b": np.full(4, 1e-5, np.float32)})
    report = checked(tiny)
    assert not report.passed
    assert math.isfinite(report.r)


def test_output_that_is_always_zero_must_stay_zero() -> None:
    weights = {"z": np.zeros(1, np.float32)}
    nodes = [node("Mul", "x z", "m"), node("Add", "m z", "out")]
    assert checked(small(nodes, weights=weights)).passed
    changed = {"z": np.full(1, 1e-30, np.float32)}
    assert not checked(small(nodes, None, weights, changed)).passed


def classified(folded: Weights | None = None) -> Fold:
    weights = {"w": draw(0, 4, 4)}
    nodes = [node("MatMul", "x w", "m"), node("ArgMax", "m", "k", axis=1), node("Cast", "k", "out",
             to=TensorProto.INT64)]  # fmt: skip
    return small(nodes, None, weights, folded)


def integer_output(fold: Fold) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    models = fold.models()
    for model in models:
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    return models


def test_a_flipped_class_fails() -> None:
    same = verify(*integer_output(classified()), threads=1)
    assert same.passed
    assert same.r == 0
    other = verify(*integer_output(classified({"w": draw(0, 4, 4)[::-1].copy()})), threads=1)
    assert not other.passed


def test_another_shape_fails() -> None:
    fold = small([node("Relu", "x", "out")], [node("ReduceMax", "x", "out", axes=[1])])
    report = checked(fold)
    assert not report.passed
    assert any("its shape" in result.sentence for result in report.failures)


# ---------------------------------------------------------------------- what was not compared


def test_nothing_compared_is_an_error() -> None:
    original, folded = network().models()
    with pytest.raises(NothingComparedError) as refusal:
        verify(original, folded, samples=0)
    assert refusal.value.exit_code == 5
    with pytest.raises(NothingComparedError):
        verify(original, folded, inputs={"x": np.zeros((0, 3, 12, 12), np.float32)})
    del original.graph.output[:]
    with pytest.raises(NothingComparedError, match="no outputs"):
        verify(original, folded)


def test_empty_outputs_are_nothing() -> None:
    cut = {"none": np.zeros(1, np.int64), "axis": np.ones(1, np.int64)}
    fold = small([node("Slice", "x none none axis", "out")], weights=cut)
    with pytest.raises(NothingComparedError, match="empty"):
        checked(fold)


def test_other_outputs_do_not_pass() -> None:
    original, folded = network().models()
    folded.graph.output[0].name = "f"
    report = verify(original, folded, threads=1)
    assert not report.passed
    assert "has the outputs f; the original has out" in report.failures[0].sentence


def test_model_without_a_reference_is_not_passed() -> None:
    fold = network()
    models = fold.models()
    for model in models:
        model.graph.node.append(helper.make_node("Gelu", ["out"], ["last"], domain="com.microsoft"))
        model.graph.output[0].name = "last"
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    report = verify(*models, threads=1)
    assert not report.passed
    assert math.isnan(report.r)
    assert "not proved" in report.failures[0].sentence
    with pytest.raises(VerificationError, match="Gelu"):
        report.raise_for_failure()


def test_original_that_its_reference_does_not_match_proves_nothing() -> None:
    """onnxruntime lets SAME ignore the dilation of a pool; then an equal model says nothing."""
    pool = node("MaxPool", "x", "out", kernel_shape=[2], dilations=[2], strides=[2],
                auto_pad="SAME_UPPER", ceil_mode=1)  # fmt: skip
    report = checked(small([pool], x=("N", 2, 7)))
    assert not report.passed
    assert any("nothing can be said" in result.sentence for result in report.failures)


# ---------------------------------------------------------------------------- providers, backends


def test_cuda_that_is_not_there_is_an_error_and_no_pass() -> None:
    if runs("ort-cuda") is True:
        pytest.skip("CUDA runs here")
    with pytest.raises(RuntimeUnavailableError, match="CUDA was asked for"):
        proved(network(), runtimes=("ort-cpu", "ort-cuda"))


def test_no_provider_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        proved(network(), runtimes=())


class Net(torch.nn.Module):
    """The network of `network()` in torch."""

    def __init__(self, weights: Weights, folded: bool) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=folded)
        self.bn = torch.nn.Identity() if folded else torch.nn.BatchNorm2d(8, eps=EPS)
        self.second = torch.nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.dense = torch.nn.Linear(8, 5, bias=False)
        state = {"conv.weight": weights["w"], "second.weight": weights["v"],
                 "dense.weight": weights["g"].T}  # fmt: skip
        if folded:
            state["conv.bias"] = weights["b"]
        else:
            names = ("weight", "bias", "running_mean", "running_var")
            state |= {f"bn.{n}": weights[b] for n, b in zip(names, BN.split(), strict=True)}
        self.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.dense(torch.relu(self.second(x)).mean((2, 3)))


def modules(fold: Fold) -> tuple[Net, Net]:
    return Net(fold.weights, False), Net(fold.folded_weights, True)


def test_torch_modules_are_backends() -> None:
    report = proved(network(), torch_modules=modules(network()))
    assert report.passed, [result.sentence for result in report.failures]
    backends = [result.subject for result in report.gates if result.name == "backend ratio"]
    assert backends == [
        "out, ort-cpu",
        "out, torch, original module",
        "out, torch, folded module",
    ]


def test_wrong_torch_module_fails_gate_c_alone() -> None:
    wrong = modules(FAULTS["eps dropped"]())[1]
    report = proved(network(), torch_modules=(modules(network())[0], wrong))
    assert {result.gate for result in report.failures} == {"C"}
    assert "torch, folded module" in report.failures[0].sentence


def test_module_that_cannot_run_is_a_failure() -> None:
    report = proved(network(), torch_modules=(modules(network())[0], torch.nn.Linear(1, 1)))
    assert not report.passed
    assert "cannot run" in report.failures[0].sentence


def test_ratio_of_tf32_is_recognised() -> None:
    assert "TF32" in verdicts._diagnosis(Runtime("ort-cuda"), 1500.0)
    assert not verdicts._diagnosis(Runtime("ort-cuda"), 2.0)
    assert not verdicts._diagnosis(Runtime("ort-cuda", "tf32"), 1500.0)
    assert not verdicts._diagnosis(Runtime("ort-cpu"), 1500.0)


# -------------------------------------------------------------------------------------- inputs


def test_given_rows_are_all_compared() -> None:
    x = draw(5, 70, 3, 12, 12)
    report = proved(network(), inputs={"x": x})
    assert report.passed
    assert report.sets == ("given", "one row")
    assert report.samples == 74


def test_few_given_numbers_are_joined_by_draws() -> None:
    report = proved(network(), inputs={"x": draw(5, 1, 3, 12, 12)})
    assert report.passed
    assert report.sets == ("given", "normal")


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ({"y": np.zeros((1, 3, 12, 12))}, "inputs are x"),
        ({"x": np.zeros((1, 3, 12))}, "axes"),
        ({"x": np.zeros((1, 4, 12, 12))}, "has shape"),
    ],
)
def test_unfit_inputs_are_refused(inputs: dict[str, Array], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        proved(network(), inputs=inputs)


def test_fixed_batch_is_fed_whole() -> None:
    fold = replace(network(), x=(2, 3, 12, 12))
    assert proved(fold).passed
    assert proved(fold, inputs={"x": draw(5, 5, 3, 12, 12)}).samples == 5 + 16 * 2
    with pytest.raises(InputError, match="batches of"):
        proved(fold, inputs={"x": draw(5, 1, 3, 12, 12)})


def test_dynamic_sizes_come_from_the_caller() -> None:
    fold = replace(network(), x=("N", 3, "H", "W"))
    original, _ = fold.models()
    sets = drawn_inputs(original, None, seed=0, input_shapes={"x": (1, 3, 20, 24)})
    assert sets[0].batches[0]["x"].shape == (16, 3, 20, 24)
    assert proved(fold, input_shapes={"x": (1, 3, 20, 24)}).passed
    with pytest.raises(InputError, match="axis 1"):
        drawn_inputs(original, None, seed=0, input_shapes={"x": (1, 4, 20, 24)})


def test_shapes_that_do_not_suit_the_network_are_named() -> None:
    nodes = [node("Reshape", "x shape", "out")]
    fold = small(nodes, weights={"shape": np.array([-1, 7], np.int64)}, x=("N", "C"))
    with pytest.raises(InputError, match=r"shapes x \(16, 9\)"):
        checked(fold, input_shapes={"x": (1, 9)})


def test_input_without_a_shape_needs_one() -> None:
    fold = small([node("Relu", "x", "out")])
    models = fold.models()
    for model in models:
        model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(InputError, match="no shape"):
        verify(*models, threads=1)
    assert verify(*models, inputs={"x": draw(0, 70, 3)}, threads=1).passed


def test_draws_have_the_size_that_the_first_normalization_expects() -> None:
    fold = network()
    weights = {**fold.weights, "var": fold.weights["var"] * np.float32(100**2)}
    original = fold.model(fold.nodes, weights)
    reference = Float64Reference(original)
    normal = drawn_inputs(original, reference, seed=0)[0].batches[0]["x"]
    before = reference.run({"x": normal}, ["c"])["c"]
    ratio = before.std(axis=(0, 2, 3)) / np.sqrt(weights["var"])
    assert 0.5 < np.median(ratio) < 2


def test_exact_zeros_and_constants_come_with_neighbours() -> None:
    """On one number for all positions an error is a single draw, and a ratio to it is luck."""
    for dims, batches, rows in (("N", 1, 4), (2, 4, 2)):
        model = replace(network(), x=(dims, 3, 12, 12)).models()[0]
        sets = {group.name: group for group in drawn_inputs(model, None, seed=0)}
        for name, level, spread in (("zeros", 0.0, 1e-3), ("constant", 1.0, 1.0)):
            given = [batch["x"] for batch in sets[name].batches]
            assert [len(x) for x in given] == [rows] * batches
            assert (given[0][0] == level).all()
            others = np.concatenate(given)[1:]
            assert all((x == x[:, :1, :1]).all() for x in others)
            assert 0.1 * spread < others.std() < 3 * spread
    large = drawn_inputs(replace(network(), x=("N", 3, 96, 96)).models()[0], None, seed=0)
    assert {group.name: group.samples for group in large}["zeros"] == 2


def test_indices_stay_inside_their_table() -> None:
    fold = small([node("Gather", "table x", "out")], weights={"table": draw(0, 7, 3)})
    original, folded = fold.models()
    for model in (original, folded):
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    drawn = drawn_inputs(original, None, seed=0)
    assert max(int(batch["x"].max()) for group in drawn for batch in group.batches) == 6
    assert verify(original, folded, threads=1).passed


def test_given_dtype_is_the_models() -> None:
    original, _ = network().models()
    (spec,) = input_specs(original)
    assert spec.dims == (None, 3, 12, 12)
    sets = given_inputs(original, {"x": np.zeros((1, 3, 12, 12), np.float64)})
    assert sets[0].batches[0]["x"].dtype == np.float32


def test_progress_counts_batches() -> None:
    seen: list[tuple[int, int | None]] = []
    proved(network(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k, 5) for k in range(1, 6)]


# ------------------------------------------------------------------------------- report, files


def test_report_is_json() -> None:
    report = proved(FAULTS["mean with the wrong sign"]())
    loaded = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert loaded["passed"] is False
    assert loaded["first_divergence"]["value"] == "c"
    assert loaded["nodes"][1]["op_type"] == "Conv"
    other = network().models()
    other[1].graph.output[0].name = "f"
    assert json.loads(json.dumps(verify(*other).to_dict(), allow_nan=False))["r"] == "nan"


def test_models_come_as_paths_and_bytes(tmp_path: Path) -> None:
    original, folded = network().models()
    onnx.save(original, str(tmp_path / "o.onnx"), save_as_external_data=True, location="o.data",
              size_threshold=0)  # fmt: skip
    assert verify(tmp_path / "o.onnx", folded.SerializeToString(), threads=1).passed
    with pytest.raises(InputError, match="original model cannot be read"):
        verify(b"nonsense", folded)


REAL = {
    "cgan_32_1.onnx": None,
    "pfld.onnx": None,
    "ppocr_v2_cls_opset10.onnx": (1, 3, 48, 192),
}


@pytest.mark.parametrize("name", REAL)
def test_real_model_folded_by_onnxruntime_passes(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    path, folded = shared_data / "onnx" / name, tmp_path / "folded.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    left = [n.op_type for n in onnx.load(str(folded)).graph.node].count("BatchNormalization")
    before = [n.op_type for n in onnx.load(str(path)).graph.node].count("BatchNormalization")
    assert left < before
    shape = REAL[name]
    shapes = {"x": shape} if shape else None
    report = verify(path, folded, samples=4, input_shapes=shapes)
    assert report.passed, [result.sentence for result in report.failures]


def test_real_model_with_a_spoiled_weight_fails(shared_data: Path) -> None:
    original = onnx.load(str(shared_data / "onnx" / "cgan_32_1.onnx"))
    spoiled = onnx.ModelProto()
    spoiled.CopyFrom(original)
    tensor = max(spoiled.graph.initializer, key=lambda t: int(np.prod(t.dims)))
    value = numpy_helper.to_array(tensor) * np.float32(1.00001)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    report = verify(original, spoiled)
    assert not report.passed
    assert report.first_divergence is not None
    consumer = next(n for n in original.graph.node if tensor.name in n.input)
    assert report.first_divergence.value in consumer.output


# ------------------------------------------------------------------- what a whole output can hide


def two_heads(folded_head: float = 1.0) -> Fold:
    """Boxes in pixels and scores below one, as one output; the folded scores off by a factor."""
    boxes, scores = draw(1, 8, 3, 3, 3) * 1e4, draw(2, 4, 3, 3, 3) * 0.05
    nodes = [
        node("Conv", "x q", "boxes", pads=[1, 1, 1, 1]),
        node("Conv", "x c", "scores", pads=[1, 1, 1, 1]),
        node("Concat", "boxes scores", "out", axis=1),
    ]
    weights = {"q": boxes, "c": scores}
    return small(nodes, None, weights, {"q": boxes, "c": scores * np.float32(folded_head)},
                 ("N", 3, 12, 12))  # fmt: skip


def test_a_wrong_small_head_beside_a_large_one_fails_by_its_channel() -> None:
    assert checked(two_heads()).passed
    report = checked(two_heads(1.1))
    assert report.r < 4, "the 2-norm does not see it, or this test shows nothing"
    assert [result.name for result in report.failures] == ["channel"] * 2  # gates B and C
    assert report.failures[0].value > 1000
    assert "of axis 1" in report.failures[0].sentence


def test_channels_of_few_numbers_are_not_said_to_pass() -> None:
    wide = small([node("MatMul", "x w", "out")], weights={"w": draw(0, 4, 40)})
    report = checked(wide, inputs={"x": draw(1, 2, 4)})
    assert report.passed
    assert "channel" not in {result.name for result in report.gates}
    assert any("too few numbers of each" in note for note in report.notes)


def test_channels_of_a_large_image_are_judged_over_all_inputs() -> None:
    """Four rows of each kind are too few; one class of a thousand is off."""
    head = draw(2, 8, 1000)
    wrong = head.copy()
    wrong[:, 7] *= np.float32(1.0002)
    nodes = [
        node("Conv", "x w", "c", strides=[8, 8]),
        node("GlobalAveragePool", "c", "p"),
        node("Flatten", "p", "f"),
        node("MatMul", "f h", "out"),
    ]
    weights = {"w": draw(1, 8, 3, 3, 3), "h": head}
    shape = ("N", 3, 160, 160)
    right = checked(small(nodes, None, weights, None, shape))
    assert right.passed
    assert "channel" in {result.name for result in right.gates}
    report = checked(small(nodes, None, weights, {**weights, "h": wrong}, shape))
    failure = next(result for result in report.failures if result.name == "channel")
    assert "at index 7 of axis 1" in failure.sentence


def test_one_narrow_constant_beside_blinds_nothing() -> None:
    """A float16 table says nothing about how exact a network of float32 weights is."""
    weights = {"w": draw(0, 4, 6), "one": np.ones(6, np.float16)}
    nodes = [
        node("MatMul", "x w", "m"),
        node("Cast", "one", "o", to=TensorProto.FLOAT),
        node("Add", "m o", "out"),
    ]
    off = {**weights, "w": weights["w"] * np.float32(1.0001)}
    report = checked(small(nodes, None, weights, off))
    assert {result.gate for result in report.failures} >= {"B", "C"}
    assert report.r > 100
    half = {"w": weights["w"].astype(np.float16)}
    narrow = [node("Cast", "w", "v", to=TensorProto.FLOAT), node("MatMul", "x v", "out")]
    assert unit_of(small(narrow, weights=half).models()[0]) == 2.0**-11
    assert unit_of(small(nodes, weights=weights).models()[0]) == 2.0**-24


def test_rounding_at_run_time_is_told_from_a_fault_in_float64() -> None:
    """The same function, computed less exactly: float32 alone shows it."""
    weights, x = {"w": draw(0, 4, 6), "c": np.full(1, 200, np.float32)}, {"x": draw(1, 70, 4)}
    plain = [node("MatMul", "x w", "out")]
    longer = [
        node("MatMul", "x w", "m"),
        node("Add", "m c", "a"),
        node("Sub", "a c", "out"),
    ]
    report = checked(small(plain, longer, {"w": weights["w"]}, weights), inputs=x)
    assert 4 < report.r < 32
    assert report.passed, [result.sentence for result in report.failures]
    assert "rounding at run time, not the fold" in report.warnings[0]
    off = {"w": weights["w"] * np.float32(1 + 3e-6)}
    wrong = checked(small(plain, None, {"w": weights["w"]}, off), inputs=x)
    assert 4 < wrong.r < 32
    assert "B" in {result.gate for result in wrong.failures}


def with_output_cast(kind: int) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    original, folded = network().models()
    folded.graph.node[-1].output[0] = "plain"
    folded.graph.node.append(helper.make_node("Cast", ["plain"], ["out"], to=kind))
    folded.graph.output[0].type.tensor_type.elem_type = kind
    return original, folded


def test_another_type_of_an_output_fails() -> None:
    report = verify(*with_output_cast(TensorProto.DOUBLE), threads=1)
    assert not report.passed
    assert "its type is float64, and should be float32" in report.failures[0].sentence
    assert verify(*with_output_cast(TensorProto.FLOAT), threads=1).passed


def test_outputs_in_another_order_are_told_so() -> None:
    nodes = [node("Relu", "x", "out"), node("Abs", "x", "other")]
    models = small(nodes).models()
    for model, names in zip(models, (("out", "other"), ("other", "out")), strict=True):
        kind = model.graph.output[0].type
        del model.graph.output[:]
        model.graph.output.extend(helper.make_value_info(name, kind) for name in names)
    report = verify(*models, threads=1)
    assert not report.passed
    assert "outputs in another order (other, out)" in report.failures[0].sentence
    assert not any("exact arithmetic" in note for note in report.notes)


def test_other_inputs_are_told_so() -> None:
    original, folded = network().models()
    folded.graph.input[0].name = folded.graph.node[0].input[0] = "image"
    report = verify(original, folded, threads=1)
    assert not report.passed
    assert "has the inputs image; the original has x" in report.failures[0].sentence


def test_an_output_that_nothing_changes_is_a_warning() -> None:
    zero = {"z": np.zeros(1, np.float32), "b": np.ones(1, np.float32)}
    fold = small([node("Mul", "x z", "m"), node("Add", "m b", "out")], weights=zero)
    report = checked(fold)
    assert report.passed
    assert "'out' was the same for every row" in report.warnings[0]
    assert not checked(network()).warnings


def test_an_input_that_is_gone_is_a_note() -> None:
    original, folded = network().models()
    original.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 3, 3, 3]))
    report = verify(original, folded, threads=1)
    assert "The folded model no longer takes 'w' as an input." in report.notes


def test_outputs_that_are_all_nan_are_nothing() -> None:
    nodes = [node("Abs", "x", "a"), node("Neg", "a", "n"), node("Sub", "n one", "m"),
             node("Sqrt", "m", "out")]  # fmt: skip
    with pytest.raises(NothingComparedError, match="NaN or infinite"):
        checked(small(nodes, weights={"one": np.ones(1, np.float32)}))


# ------------------------------------------------------------------------------ sizes, decisions


def test_every_dynamic_axis_has_a_second_size() -> None:
    fold = replace(network(), x=("N", 3, "H", "W"))
    report = proved(fold, input_shapes={"x": (1, 3, 24, 20)})
    assert report.passed
    assert report.sets[-3:] == ("H = 16", "W = 12", "odd sizes")
    sequence = small([node("Relu", "x", "out")], x=("N", 4, "T"))
    assert checked(sequence).sets[-2:] == ("T = 32", "odd sizes")
    square = replace(network(), x=("N", 3, "S", "S"))
    *_, even, odd = drawn_inputs(square.models()[0], None, seed=0)
    assert (even.name, even.batches[0]["x"].shape) == ("S = 160", (1, 3, 160, 160))
    assert (odd.name, odd.batches[0]["x"].shape) == ("odd sizes", (1, 3, 161, 161))


def test_windows_that_do_not_fit_are_seen_on_odd_sizes() -> None:
    down, up = (
        [node("MaxPool", "x", "out", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=mode)]
        for mode in (0, 1)
    )
    report = checked(small(down, up, x=("N", 2, "H", "W")), input_shapes={"x": (1, 2, 16, 16)})
    assert not report.passed
    assert "'odd sizes' inputs" in report.failures[0].sentence


def test_given_numbers_are_finite() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match="not all finite"):
            checked(network(), inputs={"x": np.full((1, 3, 12, 12), bad, np.float32)})


def test_a_folded_model_of_one_size_alone_fails() -> None:
    nodes = [node("Reshape", "x shape", "out")]
    any_size = {"shape": np.array([0, -1], np.int64)}
    fold = small(nodes, None, any_size, {"shape": np.array([0, 4 * 64], np.int64)}, ("N", 4, "T"))
    report = checked(fold)
    assert not report.passed
    assert all("'T = 32' inputs" in result.sentence for result in report.failures)
    assert checked(small(nodes, weights=any_size, x=("N", 4, "T"))).passed


def test_a_size_that_the_original_does_not_take_is_a_note() -> None:
    nodes = [node("Reshape", "x shape", "out")]
    fixed = {"shape": np.array([0, 4 * 64], np.int64)}
    report = checked(small(nodes, weights=fixed, x=("N", 4, "T")))
    assert report.passed
    assert "Not compared: T = 32, which the original does not take." in report.notes
    assert "T = 32" not in report.sets


def test_flipped_decisions_are_told_and_not_judged() -> None:
    rows = {"w": draw(0, 4, 6)}
    nodes = [node("MatMul", "x w", "out")]
    right = checked(small(nodes, weights=rows))
    assert [(d.flips, d.outside) for d in right.decisions] == [(0, 0), (0, 0)]
    assert right.decisions[0].rows == right.samples
    wrong = checked(small(nodes, None, rows, {"w": rows["w"][:, ::-1].copy()}))
    first = wrong.decisions[0]
    assert first.flips > first.rows / 2
    assert first.outside == first.flips


def test_a_flip_that_rounding_explains_is_not_outside() -> None:
    """Two classes of one float32 weight that differ in float64 by less than its rounding."""
    twin = draw(0, 64, 1)
    near = np.nextafter(twin, np.float32(9), dtype=np.float32)
    rows = {"w": np.concatenate([twin, near], axis=1)}
    swapped = {"w": np.concatenate([near, twin], axis=1)}
    report = checked(small([node("MatMul", "x w", "out")], None, rows, swapped, ("N", 64)))
    decision = report.decisions[0]
    assert decision.flips > 0
    assert decision.outside < decision.flips


@pytest.mark.parametrize("share", [2e-7, 1e-5])
def test_noise_is_granted_up_to_what_an_error_may_be(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bnfold.proof.places.backends as backends

    opened = backends.open_session
    count = iter(range(100))

    class Noisy:
        """A session opened after all others, for the noise: off by a share of the result."""

        def __init__(self, session: object) -> None:
            self._session = session

        def __getattr__(self, name: str) -> object:
            return getattr(self._session, name)

        def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
            values = self._session.run(feeds)  # type: ignore[attr-defined]
            return {name: value * np.float32(1 + share) for name, value in values.items()}

    def open_noisy(*given: object, **options: object) -> object:
        session = opened(*given, **options)  # type: ignore[arg-type]
        return Noisy(session) if next(count) >= 3 else session

    monkeypatch.setattr(backends, "open_session", open_noisy)
    report = proved(network())
    assert report.runtimes[1].noise == pytest.approx(share, rel=0.5)
    assert [result.name for result in report.failures] == ["noise"] * (share > 1e-6)
    assert any("; noise " in result.sentence for result in report.gates)


def test_random_numbers_are_no_run() -> None:
    """What differs from run to run by its own size would forgive itself any error."""
    rng = np.random.default_rng(0)

    class Random(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(rng.standard_normal((len(x), 5)).astype(np.float32))

    report = proved(network(), torch_modules=(modules(network())[0], Random()))
    assert "noise" in {result.name for result in report.failures}
    assert any("cannot be repeated" in result.sentence for result in report.failures)


# ------------------------------------------------------------------------------------ given data


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros((2, 4), np.complex64), "complex64"),
        (np.array([["a"] * 4]), "<U1"),
        (np.full((2, 4), 1e300), "1e\\+300"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(value: Array, said: str) -> None:
    with pytest.raises(InputError, match=said):
        checked(small([node("Relu", "x", "out")]), inputs={"x": value})


def test_halves_are_no_integers() -> None:
    models = small([node("Gather", "table x", "out")], weights={"table": draw(0, 7, 3)}).models()
    for model in models:
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    with pytest.raises(InputError, match=r"such as 0\.5"):
        verify(*models, inputs={"x": np.full((70, 4), 0.5)})
    assert verify(*models, inputs={"x": np.full((70, 4), 3.0)}, threads=1).passed


def test_a_seed_below_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="seed is -1"):
        proved(network(), seed=-1)


def test_the_last_rows_of_a_fixed_batch_are_compared() -> None:
    fold = replace(network(), x=(2, 3, 12, 12))
    sets = given_inputs(fold.models()[0], {"x": draw(5, 5, 3, 12, 12)})
    assert np.array_equal(sets[0].batches[-1]["x"], draw(5, 5, 3, 12, 12)[-2:])


def test_an_input_without_axes_is_one_row() -> None:
    models = small([node("Relu", "x", "out")], x=()).models()
    assert verify(*models, inputs={"x": np.float32(3)}, threads=1).passed


def test_a_size_that_only_the_reference_refuses_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Float64Reference.run

    def narrow(self: Float64Reference, inputs: dict[str, Array], outputs: object = None) -> object:
        if inputs["x"].shape[-1] == 32:
            raise NoReferenceError("Relu cannot be evaluated")
        return run(self, inputs, outputs)  # type: ignore[arg-type]

    monkeypatch.setattr(Float64Reference, "run", narrow)
    report = checked(small([node("Relu", "x", "out")], x=("N", 4, "T")))
    assert "Not compared: T = 32, which its float64 evaluation does not take." in report.notes


# --------------------------------------------------------------------- outputs that are not there


def with_second_output(extra: list[onnx.NodeProto], folded: list[onnx.NodeProto] | None = None,
                       weights: Weights | None = None) -> tuple[onnx.ModelProto, ...]:  # fmt: skip
    """The identity, and another output beside."""
    first = [node("Relu", "x", "out")]
    models = small([*first, *extra], [*first, *(folded or extra)], weights).models()
    for model in models:
        kind = model.graph.output[0].type
        model.graph.output.append(helper.make_value_info("second", kind))
        model.graph.output[1].type.tensor_type.ClearField("shape")
    return models


def test_an_output_that_is_empty_on_every_input_is_not_proved() -> None:
    nothing = {"none": np.zeros(1, np.int64), "axis": np.ones(1, np.int64)}
    empty = [node("Slice", "x none none axis", "second")]
    report = verify(*with_second_output(empty, weights=nothing), threads=1)
    assert [(result.name, result.subject) for result in report.failures] == [
        ("not compared", "second")
    ]
    assert "is empty on every input" in report.failures[0].sentence


def test_an_output_that_is_nan_on_every_input_is_not_proved() -> None:
    nan = {"nan": np.full(1, np.nan, np.float32)}
    report = verify(*with_second_output([node("Add", "x nan", "second")], weights=nan), threads=1)
    assert "is NaN or infinite on every input" in report.failures[0].sentence


def test_numbers_that_are_nan_in_both_are_a_warning() -> None:
    report = checked(small([node("Sqrt", "x", "out")]))
    assert report.passed
    assert "are NaN or infinite" in report.warnings[0]


def test_texts_are_compared_as_texts() -> None:
    labels = {"k": np.array(["cat", "dog", "owl", "fox"])}
    nodes = [node("ArgMax", "x", "i", axis=1, keepdims=0), node("Gather", "k i", "second")]

    def models(other: list[str]) -> tuple[onnx.ModelProto, ...]:
        made = with_second_output(nodes, weights={"k": draw(0, 4)})
        for model, names in zip(made, (labels["k"], other), strict=True):
            text = helper.make_tensor("k", TensorProto.STRING, [4], [str(n) for n in names])
            held = [tensor for tensor in model.graph.initializer if tensor.name != "k"]
            del model.graph.initializer[:]
            model.graph.initializer.extend([*held, text])
            model.graph.output[1].type.tensor_type.elem_type = TensorProto.STRING
        return made

    assert verify(*models(["cat", "dog", "owl", "fox"]), threads=1).passed
    assert not verify(*models(["cat", "dog", "fox", "owl"]), threads=1).passed


def test_an_original_that_fails_in_the_class_is_a_failure() -> None:
    class Picky(torch.nn.Module):
        """Takes no single row."""

        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) == 1:
                raise ValueError("one row")
            return self.module(x)

    one, two = modules(network())
    report = proved(network(), runtimes=["torch:bf16"], torch_modules=(Picky(one), two))
    assert not report.passed
    assert "class ratio" in {result.name for result in report.failures}
