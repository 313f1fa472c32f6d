"""What kind of fault a wrong fold has: told from the numbers, or said to be unknown."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxsim
import onnxslim
import pytest
import realdata
import torch
from fault_nets import (
    FAULTS,
    NETS,
    SPOILED,
    TAKES,
    Net,
    changed,
    depthwise,
    in_training,
    inputs,
    narrowed,
    residual,
    swapped,
)
from nets import with_statistics
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import bnfold
from bnfold.api import FoldResult
from bnfold.graph import to_proto
from bnfold.proof.exact.counterpart import View
from bnfold.proof.fault.cause import Cause, find_cause
from bnfold.proof.fault.divergence import Divergence, divergences, suspects

UNIT = 2.0**-24
Plan = dict[str, object]
BARE: Plan = {"gauges": None, "aliases": None}


@cache
def right(kind: str) -> tuple[onnx.ModelProto, FoldResult]:
    """A network and its fold; neither is changed by anybody."""
    model = NETS[kind]()
    return model, bnfold.fold(model)


def plan_of(fold: FoldResult) -> Plan:
    return {"gauges": fold.record.gauges, "aliases": fold.record.aliases}


def found(original: onnx.ModelProto, folded: onnx.ModelProto, plan: Plan = BARE, rows: int = 8
          ) -> tuple[list[Divergence], Cause | None]:  # fmt: skip
    feeds = inputs(original, rows)
    parted = divergences(original, folded, feeds, unit=UNIT, **plan)
    return parted, find_cause(original, folded, feeds, parted, unit=UNIT, **plan)


def told(original: onnx.ModelProto, folded: onnx.ModelProto, plan: Plan = BARE) -> Cause:
    cause = found(original, folded, plan)[1]
    assert cause is not None
    return cause


# ------------------------------------------------------------------ the faults that are known


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("kind", NETS)
def test_fault_of_a_fold_is_named_with_its_plan_and_without(kind: str, name: str) -> None:
    spoil, fault, words = FAULTS[name]
    original, fold = right(kind)
    wrong = bnfold.fold(spoil(original, SPOILED[kind])).model
    for plan in (plan_of(fold), BARE):
        cause = told(original, wrong, plan)
        assert cause.norm == SPOILED[kind]
        assert cause.fault == fault
        assert words in cause.sentence
        assert cause.others == ()
        assert cause.left is not None
        assert cause.left < 2 * UNIT < cause.error / 8  # as near as weights are rounded


OF_THE_ISSUE = [name for name in FAULTS if name not in ("gammas swapped", "no mean", "no beta")]


@pytest.mark.parametrize("name", OF_THE_ISSUE)
@pytest.mark.parametrize("kind", ["residual", "depthwise"])
def test_fault_of_another_tools_fold_is_named(kind: str, name: str) -> None:
    spoil, fault, words = FAULTS[name]
    original = right(kind)[0]
    spoiled = spoil(original, SPOILED[kind])
    for wrong in (onnxsim.simplify(spoiled)[0], onnxslim.slim(spoiled)):
        assert not any(node.op_type == "BatchNormalization" for node in wrong.graph.node)
        cause = told(original, wrong)
        assert (cause.norm, cause.fault) == (SPOILED[kind], fault)
        assert words in cause.sentence


def test_factor_and_channel_are_what_was_planted() -> None:
    original, fold = right("residual")
    spoil = FAULTS["one gamma off by 1e-3"][0]
    cause = told(original, bnfold.fold(spoil(original, "bn1")).model, plan_of(fold))
    assert cause.figures["channel"] == 2
    assert cause.figures["factor"] == pytest.approx(1.001, rel=1e-6)
    cause = told(original, bnfold.fold(FAULTS["variance x 0.999"][0](original, "bn1")).model)
    assert cause.figures["factor"] == pytest.approx(0.999, rel=1e-6)


@pytest.mark.parametrize("kind", ["residual", "depthwise", "dense"])
def test_channels_swapped_in_the_written_weights(kind: str) -> None:
    original, fold = right(kind)
    names = [f"{TAKES[kind]}.{part}" for part in ("weight", "bias")]
    cause = told(original, changed(fold.model, **dict.fromkeys(names, swapped)), plan_of(fold))
    assert (cause.norm, cause.fault) == (SPOILED[kind], "channels swapped")
    assert cause.figures == {"channel": 1, "with": 3}


@pytest.mark.parametrize("narrow", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", NETS)
def test_weights_rounded_to_a_narrower_type(kind: str, narrow: type) -> None:
    original, fold = right(kind)
    wrong = narrowed(fold.model, narrow, TAKES[kind])
    for plan in (plan_of(fold), BARE):
        cause = told(original, wrong, plan)
        assert cause.norm == SPOILED[kind]
        assert cause.fault == f"{np.dtype(narrow).name} weights"


@pytest.mark.parametrize("kind", NETS)
def test_batch_norm_left_in_training_mode(kind: str) -> None:
    original, _ = right(kind)
    kept = bnfold.fold(original, keep=[SPOILED[kind]])
    for plan in (plan_of(kept), BARE):
        cause = told(original, in_training(kept.model, SPOILED[kind]), plan)
        assert (cause.norm, cause.fault) == (SPOILED[kind], "training mode")


def test_statistics_of_the_batch_without_a_batch_norm() -> None:
    """What an exporter makes of a batch norm without running statistics: ReduceMean and so on."""
    original, _ = right("dense")
    kept = bnfold.fold(original, keep=["bn1"]).model
    node = next(n for n in kept.graph.node if n.op_type == "BatchNormalization")
    result, source = node.output[0], node.input[0]
    nodes = [
        onnx.helper.make_node("ReduceMean", [source], ["m"], axes=[0], keepdims=1),
        onnx.helper.make_node("Sub", [source, "m"], ["centred"]),
        onnx.helper.make_node("Mul", ["centred", "bn1.weight"], ["scaled"]),
        onnx.helper.make_node("Add", ["scaled", "bn1.bias"], [result]),
    ]
    rest = [n for n in kept.graph.node if n is not node]
    at = next(i for i, n in enumerate(rest) if result in n.input)
    del kept.graph.node[:]
    kept.graph.node.extend([*rest[:at], *nodes, *rest[at:]])
    cause = told(original, kept)
    assert cause.fault == "statistics of the batch"
    assert found(original, kept, rows=1)[1].fault == "unknown"  # type: ignore[union-attr]


# --------------------------------------------------------------------------- exported from torch


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc, self.bn3 = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(x + self.bn2(self.conv(x)))
        return torch.relu(self.bn3(self.fc(x.mean((2, 3)))))


@cache
def block() -> tuple[nn.Module, onnx.ModelProto]:
    torch.manual_seed(0)
    module = with_statistics(Block())
    for norm in (module.bn1, module.bn2, module.bn3):
        norm.running_var *= 0.02
    return module, exported(module)


def exported(module: nn.Module, shape: tuple[int, ...] = (3, 8, 8)) -> onnx.ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return to_proto(bnfold.export(module, torch.zeros(2, *shape)))


def fused(module: nn.Module) -> onnx.ModelProto:
    """What torch's own fusion gives, exported: no name of a batch norm's value is left."""
    module = copy.deepcopy(module)
    module.stem = fuse_conv_bn_eval(module.stem, module.bn1)
    module.conv = fuse_conv_bn_eval(module.conv, module.bn2)
    module.fc = fuse_linear_bn_eval(module.fc, module.bn3)
    module.bn1 = module.bn2 = module.bn3 = nn.Identity()
    return exported(module)


def spoiled(norm: str, **values: object) -> nn.Module:
    module = copy.deepcopy(block()[0])
    for name, value in values.items():
        if isinstance(value, float):
            setattr(module.get_submodule(norm), name, value)
        else:
            held = getattr(module.get_submodule(norm), name)
            held.data.copy_(value(held.data.clone()))  # type: ignore[operator]
    return module


TORCH = {
    ("bn2", "eps"): {"eps": 1e-3},
    ("bn3", "variance"): {"running_var": lambda v: v * 0.999},
    ("bn1", "mean's sign"): {"running_mean": lambda m: -m},
    ("bn3", "eps dropped"): {"eps": 0.0},
    ("bn2", "gamma"): {"weight": lambda g: g * torch.tensor([1, 1, 1.001, 1, 1, 1])},
    ("bn2", "gammas swapped"): {"weight": lambda g: g[[1, 0, 2, 3, 4, 5]]},
}
CASES = [pytest.param(*key, marks=[pytest.mark.slow] * (at > 0)) for at, key in enumerate(TORCH)]


@pytest.mark.parametrize(("norm", "fault"), CASES)
def test_fault_of_torchs_fusion_is_named(norm: str, fault: str) -> None:
    cause = told(block()[1], fused(spoiled(norm, **TORCH[norm, fault])))
    assert (cause.norm, cause.fault) == (norm, fault)


# ------------------------------------------------------------------------- what is not claimed


def test_right_folds_have_no_cause() -> None:
    for kind in NETS:
        original, fold = right(kind)
        assert found(original, fold.model, plan_of(fold)) == ([], None)
        assert found(original, fold.model) == ([], None)


def test_noise_on_the_weights_is_not_explained() -> None:
    original, fold = right("residual")
    rng = np.random.default_rng(0)
    noisy = changed(
        fold.model,
        **{"conv1.weight": lambda w: w * (1 + 1e-4 * rng.standard_normal(w.shape))},
    )
    cause = told(original, noisy, plan_of(fold))
    assert (cause.norm, cause.fault, cause.left) == ("bn1", "unknown", None)
    assert cause.sentence.startswith("Nothing known explains what batch norm 'bn1' became: by")


def test_fault_of_an_operator_alone_blames_no_batch_norm() -> None:
    original, fold = right("residual")
    cause = told(original, changed(fold.model, **{"fc.weight": lambda w: w * np.float32(1.001)}))
    assert (cause.norm, cause.fault) == (None, "unknown")
    assert "Gemm 'node_gemm_12' computes is wrong by itself" in cause.sentence


def test_faults_that_look_the_same_are_all_told() -> None:
    """With one variance for all channels another eps and another variance are one fault."""
    original = changed(residual(), **{"bn1.running_var": lambda v: 0 * v + np.float32(0.02)})
    cause = told(original, bnfold.fold(FAULTS["eps 1e-3 for 1e-5"][0](original, "bn1")).model)
    assert cause.fault == "eps"
    assert "The numbers do not tell it from this" in cause.sentence
    assert any("its variance times" in other for other in cause.besides)


def test_fault_is_not_explained_by_what_is_merely_near() -> None:
    """A fault of a few roundings: what leaves half of it is no explanation."""
    original, fold = right("residual")
    rng = np.random.default_rng(0)
    small = changed(
        fold.model,
        **{"conv1.weight": lambda w: w * (1 + 1e-5 * rng.standard_normal(w.shape))},
    )
    parted, cause = found(original, small, plan_of(fold))
    assert parted
    assert 16 * UNIT < parted[0].error < 1000 * UNIT
    assert cause is not None
    assert cause.fault == "unknown"


# ------------------------------------------------------------- several faults, bad conditioning


def test_several_faults_are_all_named() -> None:
    original, fold = right("residual")
    wrong = FAULTS["mean's sign"][0](FAULTS["eps dropped"][0](original, "bn2"), "bn0")
    for plan in (plan_of(fold), BARE):
        cause = told(original, bnfold.fold(wrong).model, plan)
        assert (cause.norm, cause.fault) == ("bn0", "mean's sign")
        assert cause.others == ("bn2",)
        assert "Further faults lie at 'bn2'." in cause.sentence


def test_rounding_of_an_ill_conditioned_layer_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs far from zero: rounding a weight moves the first batch norm's result by a lot."""
    far = np.float32(3000)
    stem = weight_of(depthwise(), "stem.weight").sum(axis=(1, 2, 3))
    original = changed(depthwise(), **{"bn0.running_mean": lambda m: m + far * stem})
    feeds = {"x": inputs(original)["x"] + far}
    fold = bnfold.fold(original)
    wrong = bnfold.fold(FAULTS["eps 1e-3 for 1e-5"][0](original, "bn2")).model
    for plan in (plan_of(fold), BARE):
        assert named(original, wrong, feeds, plan) == ["bn2"]
    monkeypatch.setattr("bnfold.proof.fault.divergence.R_LIMIT", 0)
    assert named(original, wrong, feeds, BARE)[0] == "bn0"  # and so it matters


def named(original: onnx.ModelProto, folded: onnx.ModelProto, feeds: dict[str, np.ndarray],
          plan: Plan) -> list[str | None]:  # fmt: skip
    parted = divergences(original, folded, feeds, unit=UNIT, **plan)
    cause = find_cause(original, folded, feeds, parted, unit=UNIT, **plan)
    assert cause is not None
    return [cause.norm, *cause.others]


def weight_of(model: onnx.ModelProto, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return onnx.numpy_helper.to_array(tensor)


@pytest.mark.parametrize("between", ["Transpose", "MaxPool"])
def test_batch_norm_that_is_folded_past_an_operator_is_named(between: str) -> None:
    net = Net(3, 10, 10)
    x = net.conv("x", "stem", 3, 6)
    attributes = {"Transpose": {"perm": [0, 1, 3, 2]}, "MaxPool": {"kernel_shape": [2, 2]}}
    x = net.op(between, x, **attributes[between])
    model = net.model(net.op("Relu", net.norm(x, "bn0", 6)))
    fold = bnfold.fold(model)
    assert [norm.into for norm in fold.folded] == [("stem",)]
    wrong = bnfold.fold(FAULTS["eps 1e-3 for 1e-5"][0](model, "bn0")).model
    for plan in (plan_of(fold), BARE) if between == "Transpose" else (plan_of(fold),):
        cause = told(model, wrong, plan)
        assert (cause.norm, cause.fault) == ("bn0", "eps")


def test_error_is_followed_back_to_where_it_is_just_below_what_is_suspected() -> None:
    original, _ = right("residual")
    view = View.of(original)
    names = ["conv_3", "batchnormalization_4", "relu_5", "conv_6"]
    grown = dict(zip(names, [0.5 * UNIT, 9 * UNIT, 12 * UNIT, 17 * UNIT], strict=True))
    assert suspects(view, ["conv_6"], grown, UNIT) == ["batchnormalization_4"]
    rounding = {**grown, "batchnormalization_4": 2 * UNIT, "relu_5": 2 * UNIT}
    assert suspects(view, ["conv_6"], rounding, UNIT) == ["conv_6"]


def test_small_head_beside_a_large_one_is_found() -> None:
    """The error is far below 16 roundings of the whole output."""
    original, fold = two_heads()
    wrong = changed(fold.model, **{"small.weight": lambda w: w * np.float32(1.1)})
    parted, _ = found(original, wrong, plan_of(fold))
    assert [part.node for part in parted] == ["node_conv_3"]


def two_heads() -> tuple[onnx.ModelProto, FoldResult]:
    net = Net(3, 10, 10)
    x = net.op("Relu", net.norm(net.conv("x", "stem", 3, 6), "bn0", 6))
    small = net.conv(x, "small", 6, 2, 1)
    net.weights["small.weight"] *= np.float32(1e-3)
    large = net.conv(x, "large", 6, 2, 1)
    net.weights["large.weight"] *= np.float32(1e5)
    model = net.model(net.op("Concat", large, small, axis=1))
    return model, bnfold.fold(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eps dropped", "one gamma off by 1e-3"])
def test_fault_of_a_real_network_is_named(name: str, shared_data: Path) -> None:
    original = exported(realdata.load_model(shared_data, "resnet20"), (3, 32, 32))
    spoil, fault, _ = FAULTS[name]
    wrong = bnfold.fold(spoil(original, "layer2.1.bn1")).model
    for plan in (plan_of(bnfold.fold(original)), BARE):
        cause = told(original, wrong, plan)
        assert (cause.norm, cause.fault, cause.others) == ("layer2.1.bn1", fault, ())
