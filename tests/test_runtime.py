"""A session runs where it says; a request that cannot be met is an error that names what lacks."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bnfold.errors import InputError, RuntimeUnavailableError
from bnfold.proof.places import runtime
from bnfold.proof.places.in_torch import run_torch
from bnfold.proof.places.installation import runs
from bnfold.proof.places.runtime import open_session

BN = ("gamma", "beta", "mean", "var")


def conv_bn() -> onnx.ModelProto:
    weights = {"w": np.full((2, 2, 1, 1), 0.5, np.float32)}
    weights |= {name: np.array([1.0, 2.0], np.float32) for name in BN}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"]),
            helper.make_node("BatchNormalization", ["c", *BN], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, 3, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


X = {"x": np.ones((1, 2, 3, 3), np.float32)}


def cuda_runs() -> bool:
    return runs("ort-cuda") is True


# ------------------------------------------------------------------------------------------- CPU


def test_unoptimized_session_keeps_the_normalization_that_onnxruntime_would_fold() -> None:
    plain = open_session(conv_bn(), optimize=False)
    assert plain.assignment == {"CPUExecutionProvider": {"BatchNormalization": 1, "Conv": 1}}
    optimized = open_session(conv_bn(), optimize=True)
    assert "BatchNormalization" not in optimized.assignment["CPUExecutionProvider"]
    np.testing.assert_allclose(plain.run(X)["y"], optimized.run(X)["y"], rtol=1e-6)


def test_model_comes_as_proto_bytes_or_path(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(conv_bn(), str(path))
    results = [
        open_session(given, optimize=False, threads=1).run(X)["y"]
        for given in (conv_bn(), conv_bn().SerializeToString(), path, str(path))
    ]
    assert all(np.array_equal(result, results[0]) for result in results)


def test_proto_beyond_the_limit_goes_through_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = conv_bn()
    monkeypatch.setattr(runtime, "PROTOBUF_LIMIT", 1)
    large = open_session(proto, optimize=False).run(X)["y"]
    assert proto.graph.initializer[0].raw_data  # the caller's proto was left alone
    np.testing.assert_array_equal(large, open_session(conv_bn(), optimize=False).run(X)["y"])


def test_refused_models_and_inputs_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot load the model"):
        open_session(b"no model", optimize=False)
    with pytest.raises(InputError, match="no model file"):
        open_session(tmp_path / "missing.onnx", optimize=False)
    session = open_session(conv_bn(), optimize=False)
    with pytest.raises(InputError, match="'x'"):
        session.run({})
    with pytest.raises(InputError, match="could not run"):
        session.run({"x": np.ones((1, 5, 3, 3), np.float32)})


def test_unknown_provider_is_refused() -> None:
    with pytest.raises(RuntimeUnavailableError, match="cpu or cuda"):
        open_session(conv_bn(), "tpu", optimize=False)


# ------------------------------------------------------------------------------------------ CUDA


def test_cuda_without_its_libraries_is_an_error_that_names_one() -> None:
    if cuda_runs():
        pytest.skip("CUDA runs here; the refusal is seen on machines without it")
    with pytest.raises(RuntimeUnavailableError, match=r"CUDA was asked for") as refusal:
        open_session(conv_bn(), "cuda", optimize=True)
    assert refusal.value.exit_code == 4
    missing = runtime.missing_libraries()
    if missing:  # onnxruntime-gpu on Linux
        assert any(name in str(refusal.value) for name in missing)


def test_nothing_is_printed_while_a_provider_fails() -> None:
    program = (
        "from tests.test_runtime import conv_bn\n"
        "from bnfold.proof.places.runtime import open_session\n"
        "try:\n    open_session(conv_bn(), 'cuda', optimize=True)\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.stdout in ("", "RuntimeUnavailableError\n")
    assert "EP Error" not in done.stderr
    assert "onnxruntime" not in done.stderr


class FallenBack:
    """A session that was asked for CUDA and registered the CPU, as onnxruntime returns it."""

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def test_silent_fallback_is_never_a_session() -> None:
    with pytest.raises(RuntimeUnavailableError, match="fell back"):
        runtime._proved(FallenBack(), "cuda", True, "")


CUDA = "CUDAExecutionProvider"


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ({}, "does not tell"),
        ({CUDA: {"Relu": 3}, "CPUExecutionProvider": {"Conv": 1}}, "1 Conv on CPU"),
        ({CUDA: {"Relu": 3}, "CPUExecutionProvider": {"FusedConv": 2}}, "2 FusedConv on CPU"),
        ({CUDA: {"Relu": 3}, "CPUExecutionProvider": {"ConvTranspose": 1}}, "ConvTranspose"),
        ({CUDA: {"Relu": 3}, "CPUExecutionProvider": {"LSTM": 1}}, "LSTM"),
        ({CUDA: {"Conv": 3}, "CPUExecutionProvider": {"InstanceNormalization": 1}}, "Instance"),
        ({CUDA: {"Conv": 3}, "CPUExecutionProvider": {"Softmax": 1, "Shape": 2}}, "1 Softmax"),
        ({CUDA: {"Conv": 3}, "CPUExecutionProvider": {"Einsum": 1}}, "Einsum"),
        ({"CPUExecutionProvider": {"Shape": 1}}, "no node"),
    ],
)
def test_compute_on_another_provider_is_refused(assignment: Any, complaint: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match=complaint):
        runtime._require_placement(assignment, CUDA)


def test_shape_arithmetic_may_stay_on_the_cpu() -> None:
    placed = {CUDA: {"Conv": 3}, "CPUExecutionProvider": {"Shape": 1, "Gather": 1}}
    runtime._require_placement(placed, CUDA)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (
            "with error: libcublasLt.so.13: cannot open shared object file: No such file",
            "libcublas",
        ),
        ("error: libcudnn.so.9: cannot open shared object file", "libcudnn.so.9"),
        ("CUDA failure 35: CUDA driver version is insufficient", "insufficient"),
        ("", "no reason"),
    ],
)
def test_failure_names_what_the_loader_said(said: str, named: str) -> None:
    sentence = runtime._gpu_failure(said)
    assert sentence.startswith("CUDA was asked for")
    assert named in sentence


def test_a_build_without_cuda_is_told_apart() -> None:
    class CpuBuild:
        __version__ = "1.31.1"

        def get_available_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    with pytest.raises(RuntimeUnavailableError, match="install onnxruntime-gpu instead"):
        runtime._require_offered(CpuBuild(), "cuda")


@pytest.mark.gpu
def test_cuda_computes_what_the_cpu_computes() -> None:
    if not cuda_runs():
        pytest.skip("needs a CUDA device")
    session = open_session(conv_bn(), "cuda", optimize=True)
    assert session.providers[0] == CUDA
    expected = open_session(conv_bn(), optimize=False).run(X)["y"]
    np.testing.assert_allclose(session.run(X)["y"], expected, rtol=1e-6)


# ------------------------------------------------------------------------------- ELF, torch--------


@pytest.mark.skipif(sys.platform != "linux", reason="ELF files are Linux's")
def test_needed_libraries_are_read_from_the_file() -> None:
    folder = Path(onnx.__file__).parent
    extension = next(folder.glob("onnx_cpp2py_export*.so"))
    needed = runtime.needed_libraries(extension)
    assert any(name.startswith("libc.so") for name in needed)


def test_other_files_need_nothing(tmp_path: Path) -> None:
    short, other = tmp_path / "short", tmp_path / "other"
    short.write_bytes(b"\x7fELF")
    other.write_bytes(struct.pack("<64s", b"text"))
    assert runtime.needed_libraries(short) == []
    assert runtime.needed_libraries(other) == []


def test_torch_runs_in_evaluation_mode_and_leaves_the_module_as_it_was() -> None:
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.5))
    module[1].eval()
    x = np.array([[1.0, -2.0]], np.float32)
    (result,) = run_torch(module, [x])
    np.testing.assert_allclose(result, x, rtol=1e-4)
    assert (module.training, module[0].training, module[1].training) == (True, True, False)
    assert not module[0].num_batches_tracked


def test_torch_outputs_come_back_flat() -> None:
    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"a": x, "b": (x + 1, [x + 2])}

    results = run_torch(Two(), [np.zeros(1, np.float32)])
    assert [float(value[0]) for value in results] == [0, 1, 2]
