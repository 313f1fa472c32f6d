"""A folded model in float16 passes where that was declared, and a fault in it does not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from handmade import Array, Fold
from onnx import TensorProto, numpy_helper
from test_verify import modules, network

from bnfold.errors import RuntimeUnavailableError
from bnfold.proof.exact.reference import Float64Reference
from bnfold.proof.places.in_torch import run_torch
from bnfold.proof.places.precision import effective, rounded, stored_class
from bnfold.proof.places.runtime import open_session
from bnfold.proof.places.runtimes import Runtime
from bnfold.proof.result import VerifyReport
from bnfold.proof.verify import verify


def with_weights(model: onnx.ModelProto, change: Callable[[Array], Array]) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        value = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(change(value), tensor.name))
    return changed


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every tensor float16, inputs and outputs included, as a converter leaves it."""
    changed = with_weights(model, lambda value: value.astype(np.float16))
    for value in (*changed.graph.input, *changed.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return changed


def through(kind: type) -> Callable[[Array], Array]:
    return lambda value: value.astype(kind).astype(np.float32)


def with_plan(fold: Fold, change: Callable[[onnx.ModelProto], onnx.ModelProto],
              runtime: str) -> VerifyReport:  # fmt: skip
    original, folded = fold.models()
    return verify(original, change(folded), gauges=fold.gauges, aliases=fold.aliases,
                  runtimes=[runtime], threads=1)  # fmt: skip


def compared(fold: Fold, change: Callable[[onnx.ModelProto], onnx.ModelProto],
             *runtimes: str) -> VerifyReport:  # fmt: skip
    original, folded = fold.models()
    return verify(original, change(folded), runtimes=runtimes, threads=1)


STORED = {
    "float16 tensors": ("fp16", half),
    "float16 numbers": ("fp16", lambda m: with_weights(m, through(np.float16))),
    "bfloat16 numbers": ("bf16", lambda m: with_weights(m, through(ml_dtypes.bfloat16))),
}


@pytest.mark.parametrize("case", STORED)
def test_narrow_weights_pass_where_they_are_declared(case: str) -> None:
    name, change = STORED[case]
    undeclared = compared(network(), change, "ort-cpu")
    assert not undeclared.passed
    sentences = [result.sentence for result in undeclared.failures if result.gate == "B"]
    assert f"declare the class {name}" in sentences[0], sentences
    declared = compared(network(), change, f"ort-cpu:{name}")
    assert declared.passed, [result.sentence for result in declared.failures]
    shares = [result.value for result in declared.gates if result.name == "class ratio"]
    assert len(shares) == 2, "gate B and the runtime"
    assert all(0.3 < share < 2 for share in shares)


@pytest.mark.parametrize("case", STORED)
def test_weights_are_granted_the_rounding_that_was_declared(case: str) -> None:
    name, change = STORED[case]
    report = with_plan(network(), change, f"ort-cpu:{name}")
    assert report.passed, [result.sentence for result in report.failures]
    assert "A" in {result.gate for result in report.gates}
    assert "A" in {result.gate for result in with_plan(network(), change, "ort-cpu").failures}
    off = np.float32([1.02 if name == "fp16" else 1.1] + [1] * 7)
    wrong = network(believed={"gamma": network().weights["gamma"] * off})
    assert "A" in {result.gate for result in with_plan(wrong, change, f"ort-cpu:{name}").failures}


@pytest.mark.parametrize("case", STORED)
def test_a_fault_below_the_ceiling_fails_against_the_original_in_the_class(case: str) -> None:
    name, change = STORED[case]
    variance = network().weights["var"] * np.float32(0.99 if name == "fp16" else 0.96)
    report = compared(network(believed={"var": variance}), change, f"ort-cpu:{name}")
    assert not report.passed
    failed = {result.name for result in report.failures if result.gate != "A"}
    assert failed == {"class ratio", "class channel"}


def test_a_class_that_nothing_is_stored_in_loosens_no_limit() -> None:
    report = compared(network(), lambda model: model, "ort-cpu:fp16")
    assert report.passed
    assert {result.limit for result in report.gates if result.name == "error ratio"} == {4.0}
    assert "the limits of fp32 hold" in " ".join(report.notes)
    spoiled = compared(network(1e-3), lambda model: model, "ort-cpu:fp16")
    assert not spoiled.passed


def test_an_original_of_such_numbers_is_no_cause() -> None:
    narrow = with_weights(network().models()[0], through(np.float16))
    assert stored_class(network().models()[0], narrow) == "fp16"
    assert stored_class(narrow, narrow) == ""
    assert stored_class(network().models()[0], network().models()[1]) == ""


def test_effect_of_a_class() -> None:
    assert effective(Runtime("ort-cuda", "fp16"), "") == Runtime("ort-cuda")
    assert effective(Runtime("ort-cuda", "fp16"), "fp16") == Runtime("ort-cuda", "fp16")
    for text in ("ort-tensorrt", "torch", "torch-cuda"):
        assert effective(Runtime(text, "fp16"), "") == Runtime(text, "fp16")
    assert effective(Runtime("ort-cuda", "tf32"), "") == Runtime("ort-cuda", "tf32")


def test_rounding_of_products_is_that_of_the_type() -> None:
    original, _ = network().models()
    x = {"x": np.random.default_rng(0).standard_normal((8, 3, 12, 12)).astype(np.float32)}
    exact = Float64Reference(original).run(x)["out"]
    errors = {}
    for name in ("fp16", "bf16"):
        got = open_session(rounded(original, name), optimize=False).run(x)["out"]
        errors[name] = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 2.0**-13 < errors["fp16"] < 2.0**-9
    assert 2.0**-10 < errors["bf16"] < 2.0**-6
    assert "/fp16" not in str(original), "the caller's model was changed"


# ----------------------------------------------------------------------------------------- torch


def test_torch_rounds_where_it_is_declared_and_leaves_its_settings() -> None:
    before, after = network().models()
    pair = modules(network())
    report = verify(before, after, runtimes=["torch:bf16"], torch_modules=pair, threads=1)
    assert report.passed, [result.sentence for result in report.failures]
    assert report.runtimes[-1].ratio > 2**8, "bf16 was declared and nothing was rounded"
    assert "class ratio" in {result.name for result in report.gates}
    assert not torch.is_autocast_enabled("cpu")
    wrong = (pair[0], modules(network(1e-1))[1])
    failed = verify(before, after, runtimes=["torch:bf16"], torch_modules=wrong, threads=1)
    assert [result.gate for result in failed.failures] == ["C"] * len(failed.failures) != []


class Settings(torch.nn.Module):
    """What torch is set to while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = settings()
        return x


def settings() -> list[Any]:
    cudnn: Any = torch.backends.cudnn
    places = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    return [cudnn.deterministic, cudnn.benchmark, *(place.fp32_precision for place in places)]


def test_tf32_is_set_for_the_run_alone() -> None:
    module, before = Settings(), settings()
    for precision, wanted in (("fp32", "ieee"), ("tf32", "tf32")):
        run_torch(module, [np.zeros((1, 1), np.float32)], precision)
        assert module.seen == [True, False, wanted, wanted, wanted]
        assert settings() == before


def test_a_forward_may_set_cudnn_itself() -> None:
    class Own(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.backends.cudnn.flags(enabled=False):
                return x + 1

    for precision in ("fp32", "tf32", "bf16"):
        (value,) = run_torch(Own(), [np.zeros((1, 1), np.float32)], precision)
        assert value[0, 0] == 1


OWN_SETTINGS = {
    "the old way": "torch.set_float32_matmul_precision('medium')",
    "the new way": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "the new way, convolutions": "torch.backends.cudnn.fp32_precision = 'tf32'",
    "the new way, all": "torch.backends.fp32_precision = 'tf32'",
}


@pytest.mark.slow
@pytest.mark.parametrize("way", OWN_SETTINGS)
def test_a_users_own_settings_stay_and_can_be_read(way: str) -> None:
    """torch refuses to read the older settings where the newer are set, and the other way round."""
    read = "torch.get_float32_matmul_precision()" if "old" in way else "places()"
    program = (
        "import numpy as np, torch\n"
        "from bnfold.proof.places.in_torch import run_torch\n"
        "b = torch.backends\n"
        "def places():\n"
        "    found = (b, b.cudnn, b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn)\n"
        "    return [place.fp32_precision for place in found]\n"
        f"{OWN_SETTINGS[way]}\n"
        f"before = {read}\n"
        "run_torch(torch.nn.Linear(1, 1), [np.zeros((1, 1), np.float32)])\n"
        f"assert {read} == before, {read}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_module_that_computes_elsewhere_is_no_run_there() -> None:
    class Elsewhere(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x))

    x = [np.zeros((2, 1), np.float32)]
    assert len(run_torch(Elsewhere(), x, device="cpu")[0]) == 2
    with pytest.raises(RuntimeUnavailableError, match=r"asked for meta.*outputs on cpu") as refusal:
        run_torch(Elsewhere(), x, device="meta")
    assert refusal.value.code == "E_CUDA_FALLBACK"


def test_torch_in_its_own_precision_is_float32() -> None:
    (value,) = run_torch(torch.nn.Linear(4, 2), [np.ones((1, 4), np.float32)])
    assert value.dtype == np.float32
    (narrow,) = run_torch(torch.nn.Linear(4, 2), [np.ones((1, 4), np.float32)], "fp16")
    assert narrow.dtype == np.float16
