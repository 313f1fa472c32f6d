"""The verifier fails on every planted fault and names the layer, and passes right folds that any
fixed tolerance refuses; on one small network here, all faults at every layer of every profile where
slow tests run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conditions import PROFILES, conditioned
from handmade import BN, EPS, Fold, affine, along, draw, f32, node, normalization
from planted import FAULTS, FLOAT16, TRAINING, Bed, Planted, norms_of
from torch import Tensor, nn

import bnfold
from bnfold.errors import RuntimeUnavailableError
from bnfold.graph import to_proto
from bnfold.proof.algebra import plain
from bnfold.proof.exact.counterpart import View
from bnfold.proof.places import runtimes
from bnfold.proof.places.installation import runs
from bnfold.proof.result import VerifyReport
from bnfold.proof.verify import verify

SHAPE, WIDTH = (3, 12, 12), 16
ORDINARY = "ordinary"
SOME = ("eps dropped", "one gamma off by 1e-3", TRAINING)


class Net(nn.Module):
    """A stem, a residual block with a depthwise convolution, and a classifier."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(x + self.bn3(self.conv3(y)))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


def pictures(profile: str, rows: int = 8, seed: int = 7) -> np.ndarray:
    """Inputs as the profile's network is given them."""
    return PROFILES[profile].inputs(rows, SHAPE, seed)


@cache
def bed(profile: str, width: int = WIDTH) -> Bed:
    """The network of a profile, with the statistics that its activations have."""
    torch.manual_seed(1)
    net = conditioned(Net(width), SHAPE, PROFILES[profile])
    return Bed(to_proto(bnfold.export(net, torch.zeros(1, *SHAPE))))


def held(start: Bed, wrong: Planted, profile: str = ORDINARY, *, by_record: bool) -> VerifyReport:
    """What the verifier says of a fold: with its record, or of two files alone."""
    record = wrong.record if by_record else None
    return verify(
        start.original,
        wrong.folded,
        gauges=record.gauges if record else None,
        aliases=record.aliases if record else None,
        inputs={"x": pictures(profile)},
        threads=1,
    )


def right(start: Bed) -> Planted:
    return Planted("none", "", "", start.folded, start.right.record)


def around(wrong: Planted, original: onnx.ModelProto) -> set[str]:
    """The names by which a report may point at the layer: its batch norm's or its convolution's."""
    (node,) = (n.node for n in norms_of(original) if wrong.output in n.node.output)
    producer = next(n for n in original.graph.node if node.input[0] in n.output)
    return {node.name, producer.name}


# ------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_fails_gate_a_by_its_layer(fault: str) -> None:
    start = bed(ORDINARY)
    wrong = start.plant(fault, start.outputs[1], channel=3)
    report = held(start, wrong, by_record=True)
    assert not report.passed
    assert report.failures[0].gate == "A"
    subjects = {result.subject for result in report.failures if result.gate == "A"}
    if fault == FLOAT16:  # it is in every layer
        assert len(subjects) == 4
    else:
        assert subjects <= around(wrong, start.original)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_fails_without_a_record(fault: str) -> None:
    start = bed(ORDINARY)
    wrong = start.plant(fault, start.outputs[1], channel=3)
    report = held(start, wrong, by_record=False)
    assert [r.name for r in report.failures if r.gate == "B"][:1] == ["error ratio"]
    assert report.r > 10
    assert report.cause is not None
    if fault == TRAINING:  # it is no batch norm any more
        assert report.cause.fault == "statistics of the batch"
        assert report.cause.value == "relu_1"
    else:
        assert report.cause.norm == ("bn1" if fault == FLOAT16 else "bn2")


def test_limit_of_gate_b_is_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit that lets everything through every fault passes it: nothing else catches it."""
    start = bed(ORDINARY)
    monkeypatch.setattr(runtimes, "R_LIMIT", 1e9)
    for fault in SOME:
        wrong = start.plant(fault, start.outputs[1], channel=3)
        report = held(start, wrong, by_record=False)
        assert all(result.passed for result in report.gates if result.gate == "B")


def test_wrong_record_does_not_help_a_wrong_fold() -> None:
    """A folder that believes in a wrong variance writes it into its record as well."""
    start = bed(ORDINARY)
    spoiled = onnx.ModelProto()
    spoiled.CopyFrom(start.original)
    norm = norms_of(spoiled)[1]
    norm.write(4, norm.read(4) * np.float32(0.999))
    wrong = bnfold.fold(spoiled)
    lie = Planted("", "bn2", start.outputs[1], to_proto(wrong.graph), wrong.record)
    report = held(start, lie, by_record=True)
    assert report.failures[0].gate == "A"
    assert report.failures[0].subject in around(lie, start.original)


def test_cuda_silently_on_the_cpu_is_no_pass() -> None:
    """A GPU build without CUDA's libraries offers CUDA and runs on the CPU, without a word."""
    if runs("ort-cuda") is True:
        pytest.skip("CUDA runs here")
    start = bed(ORDINARY)
    with pytest.raises(RuntimeUnavailableError) as refusal:
        bnfold.verify(start.original, start.folded, runtimes=["ort-cuda"])
    assert refusal.value.exit_code == 4


# --------------------------------------------------------- below what float32 itself loses


def test_one_wrong_channel_of_many_is_seen_in_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its effect on the outputs is smaller than float32's own error: gate B cannot see it."""
    start = bed("large means", 64)
    output = start.outputs[2]
    gammas = np.abs(norms_of(start.original)[2].read(1))
    channel = int(np.argsort(gammas)[len(gammas) // 2])
    wrong = start.plant("one gamma off by 1e-3", output, channel)
    report = held(start, wrong, "large means", by_record=False)
    assert all(result.passed for result in report.gates if result.gate == "B")
    assert not report.passed
    (failure,) = report.failures
    assert failure.subject in around(wrong, start.original)
    assert f"1 of 64 channels ({channel})" in failure.sentence
    monkeypatch.setattr(plain, "ROUNDINGS", 1e9)  # the limit is what fails: nothing else sees it
    assert held(start, wrong, "large means", by_record=False).passed


@pytest.mark.parametrize("fault", ["eps dropped", "variance * 0.999", FLOAT16])
def test_faults_beside_large_means_are_seen_in_the_weights(fault: str) -> None:
    start = bed("large means")
    wrong = start.plant(fault, start.outputs[1])
    found = plain.read_plain_fold(View.of(start.original), View.of(wrong.folded))
    assert found is not None
    norms = [deviation.norm for deviation in found.wrong]
    assert ("bn2" in norms) if fault == FLOAT16 else (norms == ["bn2"])


@pytest.mark.parametrize("profile", PROFILES)
def test_weights_of_right_folds_hold(profile: str) -> None:
    """Of bnfold's, rounded once, and of onnxruntime's, computed in float32."""
    start = bed(profile)
    for folded in (start.folded, by_onnxruntime(start.original)):
        found = plain.read_plain_fold(View.of(start.original), View.of(folded))
        assert found is not None
        assert found.passed
        assert found.roundings < plain.ROUNDINGS


def test_scale_that_moved_to_another_layer_is_no_fault() -> None:
    """A Relu passes a positive scale on: 1.001 times here and divided by it there is the same."""
    start = bed(ORDINARY)
    moved = onnx.ModelProto()
    moved.CopyFrom(start.folded)
    tensors = {tensor.name: tensor for tensor in moved.graph.initializer}
    first, second = (node for node in moved.graph.node[:4] if node.op_type == "Conv")
    values = {name: onnx.numpy_helper.to_array(tensors[name]).copy() for name in
              (*first.input[1:3], second.input[1])}  # fmt: skip
    values[first.input[1]][5] *= 1.001
    values[first.input[2]][5] *= 1.001
    values[second.input[1]][5] /= 1.001
    for name, value in values.items():
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(value, name))
    found = plain.read_plain_fold(View.of(start.original), View.of(moved))
    assert found is not None
    assert not found.wrong
    assert [deviation.norm for deviation in found.unsure] == ["bn1", "bn2"]


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_weight_that_should_be_0_is_judged(value: float) -> None:
    """In a pruned network most weights are 0, and have no factor."""
    start = bed(ORDINARY)
    pruned, written = onnx.ModelProto(), onnx.ModelProto()
    pruned.CopyFrom(start.original)
    edit(pruned, "Conv", 1, lambda weight: np.put(weight, [4, 11], 0.0))
    folded = to_proto(bnfold.fold(pruned).graph)
    found = plain.read_plain_fold(View.of(pruned), View.of(folded))
    assert found is not None
    assert found.passed
    written.CopyFrom(folded)
    edit(written, "Conv", 1, lambda weight: np.put(weight, [11], value))
    found = plain.read_plain_fold(View.of(pruned), View.of(written))
    assert found is not None
    (deviation,) = found.wrong
    assert (deviation.norm, deviation.wrong) == ("bn2", (1,))
    assert "should be 0" in deviation.sentence


def test_bias_is_judged_where_all_weights_hold() -> None:
    start = bed(ORDINARY)
    written = onnx.ModelProto()
    written.CopyFrom(start.folded)
    edit(written, "Conv", 1, lambda bias: np.put(bias, [5], bias[5] + 1e-5), slot=2)
    found = plain.read_plain_fold(View.of(start.original), View.of(written))
    assert found is not None
    (deviation,) = found.wrong
    assert (deviation.norm, deviation.what, deviation.wrong) == ("bn2", "bias", (5,))
    assert "the bias of 1 of 16 channels (5)" in deviation.sentence


def test_two_faults_of_opposite_sign_are_warned_of() -> None:
    """They may be one scale that moved, and may be two faults."""
    start = bed(ORDINARY)
    written = onnx.ModelProto()
    written.CopyFrom(start.folded)
    edit(written, "Conv", 1, lambda weight: np.multiply(weight[3], 1.00001, out=weight[3]))
    edit(written, "Conv", 2, lambda weight: np.multiply(weight[5], 0.99999, out=weight[5]))
    judged, _ = plain.judge(start.original, written)
    assert not judged
    warning = plain.doubt(start.original, written)
    assert "node_conv2d_1" in warning
    assert "node_conv2d_2" in warning
    assert not plain.doubt(start.original, start.folded)
    report = bnfold.verify(start.original, written, {"x": pictures(ORDINARY)})
    assert warning in report.warnings


def test_scale_that_another_operator_gives_back_is_no_fault() -> None:
    """Conv, Relu, Mul: a channel written at 1.05 times its scale, the Mul's divided by it."""
    weights = {"w": draw(1, 8, 3, 3, 3), "k": np.ones((8, 1, 1), np.float32), **normalization(8)}
    slope, shift = affine(weights)
    tail = [node("Relu", "n", "r"), node("Mul", "r k", "out")]
    right = {"w": f32(weights["w"] * along(slope, 4, 0)), "b": f32(shift), "k": weights["k"].copy()}
    moved = {name: value.copy() for name, value in right.items()}
    moved["w"][2] *= 1.05
    moved["b"][2] *= 1.05
    moved["k"][2] /= 1.05
    before = [node("Conv", "x w", "c"), node("BatchNormalization", f"c {BN}", "n", epsilon=EPS)]
    for folded, passed in ((right, True), (moved, False)):
        pair = Fold([*before, *tail], [node("Conv", "x w b", "n"), *tail], weights, folded,
                    ("N", 3, 8, 8)).models()  # fmt: skip
        found = plain.read_plain_fold(*(View.of(model) for model in pair))
        assert found is not None
        assert found.passed == passed
        assert not found.wrong
        assert bool(plain.doubt(*pair)) != passed


@pytest.mark.parametrize(
    ("op_type", "right", "wrong"),
    [
        ("Clip", {"min": 0.0, "max": 6.0}, {"min": 0.0, "max": 7.0}),
        ("LeakyRelu", {"alpha": 0.01}, {"alpha": 0.02}),
        ("MaxPool", {"kernel_shape": [2, 2]}, {"kernel_shape": [2, 2], "ceil_mode": 1}),
    ],
)
def test_another_operator_that_changed_is_warned_of(
    op_type: str, right: dict[str, Any], wrong: dict[str, Any]
) -> None:
    """What drawn inputs need not reach; said with words or without, a default is the same."""
    weights = {"w": draw(1, 8, 3, 3, 3), **normalization(8)}
    slope, shift = affine(weights)
    folded = {"w": f32(weights["w"] * along(slope, 4, 0)), "b": f32(shift)}
    before = [node("Conv", "x w", "c"), node("BatchNormalization", f"c {BN}", "n", epsilon=EPS)]
    usual = {"ceil_mode": 0} if op_type == "MaxPool" else {}
    for given, warned in ((right | usual, False), (wrong, True)):
        pair = Fold([*before, node(op_type, "n", "out", **right)],
                    [node("Conv", "x w b", "n"), node(op_type, "n", "out", **given)],
                    weights, folded, ("N", 3, 8, 8), opset=10).models()  # fmt: skip
        assert bool(plain.doubt(*pair)) == warned


def edit(
    model: onnx.ModelProto,
    op_type: str,
    which: int,
    change: Callable[[np.ndarray], None],
    slot: int = 1,
) -> None:
    """Change a constant of the which-th node of a type, in place."""
    node = [node for node in model.graph.node if node.op_type == op_type][which]
    tensor = next(t for t in model.graph.initializer if t.name == node.input[slot])
    value = onnx.numpy_helper.to_array(tensor).copy()
    change(value)
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))


def test_channels_in_another_order_are_no_fault() -> None:
    """Hidden channels 3 and 7 trade places in the layer that makes them and in those that read."""
    start = bed(ORDINARY)
    moved = onnx.ModelProto()
    moved.CopyFrom(start.folded)
    tensors = {tensor.name: tensor for tensor in moved.graph.initializer}
    convs = [node for node in moved.graph.node if node.op_type == "Conv"]
    for name, axis in ((convs[1].input[1], 0), (convs[1].input[2], 0), (convs[2].input[1], 1)):
        value = onnx.numpy_helper.to_array(tensors[name]).copy()
        order = np.arange(value.shape[axis])
        order[[3, 7]] = [7, 3]
        value = np.take(value, order, axis)
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(value, name))
    found = plain.read_plain_fold(View.of(start.original), View.of(moved))
    assert found is not None
    assert not found.wrong
    assert [deviation.norm for deviation in found.unsure] == ["bn2", "bn3"]


def test_fold_of_another_kind_is_left_to_the_other_gates() -> None:
    start = bed(ORDINARY)
    left = start.plant(TRAINING, start.outputs[1]).folded
    assert plain.read_plain_fold(View.of(start.original), View.of(left)) is None
    _, note = plain.judge(start.original, left)
    assert note.startswith("Gate A was not run")


# -------------------------------------------------------------------------------- right folds


def by_onnxruntime(original: onnx.ModelProto) -> onnx.ModelProto:
    """The batch norms folded by onnxruntime, whose arithmetic is float32."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/folded.onnx"
        onnxruntime.InferenceSession(
            original.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return onnx.load(f"{folder}/folded.onnx")


def outputs(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """As the file is written: onnxruntime would fold the original itself."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    value: np.ndarray = session.run(None, {"x": x})[0]
    return value


@pytest.mark.parametrize("profile", PROFILES)
def test_right_fold_of_an_ill_conditioned_network_passes(profile: str) -> None:
    start = bed(profile)
    for by_record in (True, False):
        report = held(start, right(start), profile, by_record=by_record)
        assert report.passed, [result.sentence for result in report.failures]
        assert report.r < 2
    float32 = Planted("none", "", "", by_onnxruntime(start.original), start.right.record)
    report = held(start, float32, profile, by_record=False)
    assert report.passed, [result.sentence for result in report.failures]


def test_fixed_tolerances_are_wrong_both_ways() -> None:
    """They refuse right folds where numbers are large or cancel, and pass faults where small."""
    for profile, tolerance in (
        ("large means", {"rtol": 1e-4, "atol": 1e-5}),
        ("large weights", {"rtol": 1.3e-6, "atol": 1e-5}),
    ):
        x, start = pictures(profile), bed(profile)
        assert not np.allclose(outputs(start.folded, x), outputs(start.original, x), **tolerance)
    x, start = pictures("tiny outputs"), bed("tiny outputs")
    for fault in SOME:
        wrong = start.plant(fault, start.outputs[1], channel=3)
        assert np.allclose(outputs(wrong.folded, x), outputs(start.original, x), 1e-4, 1e-5)
        assert held(start, wrong, "tiny outputs", by_record=False).r > 10


# --------------------------------------------------------------------------- the whole matrix


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_fails_at_every_layer_of_every_profile(profile: str, fault: str) -> None:
    """With a record always. Of two files alone, wherever weights differ by more than float32
    arithmetic may leave them apart."""
    start = bed(profile)
    for output in start.outputs:
        wrong = start.plant(fault, output, channel=3)
        apart = roundings_apart(start.folded, wrong.folded)
        if apart <= 2 and fault in ("eps dropped", "eps 1e-3 for 1e-5"):
            continue  # less than a rounding of the weights: the file is as right as another
        assert not held(start, wrong, profile, by_record=True).passed
        if apart > 2 * plain.ROUNDINGS or fault in ("mean's sign", TRAINING):
            assert not held(start, wrong, profile, by_record=False).passed


def roundings_apart(a: onnx.ModelProto, b: onnx.ModelProto) -> float:
    """The greatest relative difference of two graphs' weights, in roundings of float32."""
    weights = [
        {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
        for model in (a, b)
    ]
    shared = [name for name in weights[0] if name in weights[1] and weights[0][name].ndim > 1]
    with np.errstate(all="ignore"):
        apart = [np.abs(weights[1][n] / weights[0][n] - 1) for n in shared]
    return max(float(np.nan_to_num(x, nan=0.0, posinf=1.0).max()) for x in apart) * 2.0**24
