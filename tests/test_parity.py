"""`bnfold parity`: one network on many runtimes; where and on what to compare, by its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nets import with_statistics
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from bnfold import graph
from bnfold.api import parity
from bnfold.cli import main
from bnfold.errors import UsageError
from bnfold.proof.places.installation import runs
from models.digits import digits_cnn

SPEC = "models/digits.py:digits_cnn"
SHAPE = ["--input-shape", "1,1,8,8"]


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, the same network as ONNX, and folded."""
    folder = tmp_path_factory.mktemp("net")
    module = with_statistics(digits_cnn(), positive=True)
    torch.save(module.state_dict(), folder / "net.pt")
    graph.write_onnx(graph.export_module(module, (torch.zeros(1, 1, 8, 8),)), folder / "net.onnx")
    assert main(["fold", str(folder / "net.onnx"), "-q"]) == 0
    return folder


def two_inputs(path: Path, factor: float = 1.0) -> Path:
    """out = factor * (a w + b), of float32 a and int64 b."""
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    constants = [("w", weight), ("f", np.float32([factor]))]
    made = helper.make_graph(
        [
            helper.make_node("MatMul", ["a", "w"], ["m"]),
            helper.make_node("Cast", ["b"], ["bf"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["m", "bf"], ["s"]),
            helper.make_node("Mul", ["s", "f"], ["out"]),
        ],
        "two",
        [
            helper.make_tensor_value_info("a", TensorProto.FLOAT, ["N", 4]),
            helper.make_tensor_value_info("b", TensorProto.INT64, ["N", 3]),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(value, name) for name, value in constants],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(made, opset_imports=opset, ir_version=8), str(path))
    return path


# --------------------------------------------------------------------------------------- parity


def test_torch_and_onnxruntime_compute_the_same(net: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "parity", net / "net.pt", "--model", SPEC, *SHAPE,
                       "--runtime", "torch", "--runtime", "ort-cpu", "--json")  # fmt: skip
    done = json.loads(out)
    assert (code, done["exit_code"]) == (0, 0)
    assert done["summary"].startswith("Proved by gate C: R = ")
    assert [ran["name"] for ran in done["runtimes"]] == ["torch", "ort-cpu"]
    assert {gate["gate"] for gate in done["gates"]} == {"C"}
    assert done["files"][0]["role"] == "model"


def test_a_module_that_is_not_its_graph_fails_on_torch_alone() -> None:
    class Forgetful(nn.Module):
        """Another network each time it is traced or run: a fault that only running it shows."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * (1.0 if torch.compiler.is_compiling() else 1.01)

    report = parity(Forgetful(), example_inputs=torch.zeros(2, 4), runtimes=["torch", "ort-cpu"])
    assert {result.subject.split(", ")[1] for result in report.failures} == {"torch"}
    assert report.r > 100


def test_torch_needs_a_module(net: Path, capsys: Any) -> None:
    code, _, err = run(capsys, "parity", net / "net.onnx", "--runtime", "torch")
    assert code == 2
    assert "an ONNX file holds no module" in err


def test_torch_without_cuda_is_exit_code_4(net: Path, capsys: Any) -> None:
    if runs("torch-cuda") is True:
        pytest.skip("torch runs CUDA here")
    code, _, err = run(capsys, "parity", net / "net.pt", "--model", SPEC, *SHAPE,
                       "--runtime", "torch-cuda")  # fmt: skip
    assert code == 4
    assert "Install a torch that is built for CUDA" in err


def test_parity_of_a_model_without_outputs_is_exit_code_5(tmp_path: Path, capsys: Any) -> None:
    model = onnx.load(str(two_inputs(tmp_path / "two.onnx")))
    code, _, _ = run(capsys, "parity", tmp_path / "two.onnx", "--samples", "3")
    assert code == 0
    np.savez(tmp_path / "none.npz", a=np.zeros((0, 4), np.float32), b=np.zeros((0, 3), np.int64))
    code, _, err = run(capsys, "parity", tmp_path / "two.onnx", "--data", tmp_path / "none.npz")
    assert (code, "no rows" in err) == (5, True)
    assert model.graph.output


def test_parity_in_python_takes_modules_models_and_paths(net: Path) -> None:
    module = with_statistics(digits_cnn(), positive=True)
    report = parity(module, example_inputs=torch.zeros(1, 1, 8, 8), runtimes=["torch"])
    assert report.passed
    assert report.question == "C"
    assert parity(net / "net.onnx").passed
    assert parity(onnx.load(str(net / "net.onnx"))).passed
    with pytest.raises(UsageError, match="There is no runtime"):
        parity(net / "net.onnx", runtimes=["onnxruntime"])


# ------------------------------------------------------------------------------- where and what


def test_provider_is_another_spelling_of_runtime(net: Path, capsys: Any) -> None:
    pair = (net / "net.onnx", net / "net.folded.onnx")
    told = []
    for option in ("--runtime=ort-cpu", "--provider=cpu"):
        code, out, _ = run(capsys, "verify", *pair, option, "--json")
        assert code == 0
        told.append([gate["sentence"] for gate in json.loads(out)["gates"]])
    assert told[0] == told[1]
    for option in ("--runtime=ort-cuda", "--provider=cuda"):
        if runs("ort-cuda") is not True:
            assert run(capsys, "verify", *pair, option)[0] == 4


@pytest.mark.parametrize("verb", ["fold", "verify", "parity", "export", "unfold"])
def test_a_runtime_that_does_not_exist_is_told_before_any_work(
    verb: str, net: Path, capsys: Any
) -> None:
    models = [net / "net.onnx"] + [net / "net.folded.onnx"] * (verb == "verify")
    code, _, err = run(capsys, verb, *models, "--runtime", "ort-gpu")
    assert code == 2
    assert "There is no runtime 'ort-gpu'" in err


def test_declared_precision_is_of_every_runtime_that_has_it(net: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "verify", net / "net.pt", net / "net.pt", "--model", SPEC, *SHAPE,
                       "--runtime", "torch", "--precision", "bf16", "--json")  # fmt: skip
    assert code == 0
    done = json.loads(out)
    assert [ran["name"] for ran in done["runtimes"]] == [
        "ort-cpu, unoptimized", "torch:bf16", "torch:bf16",
    ]  # fmt: skip
    assert "class ratio" in {gate["name"] for gate in done["gates"]}


def test_a_report_tells_noise_samples_and_seed(net: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "verify", net / "net.onnx", net / "net.folded.onnx", "--seed", "3")
    assert code == 0
    assert "noise 0)" in out
    assert "samples, seed 3)" in out


# ------------------------------------------------------------------------------------ given data


def test_an_archive_holds_an_array_for_each_input(tmp_path: Path, capsys: Any) -> None:
    model, wrong = (two_inputs(tmp_path / f"{f}.onnx", f) for f in (1.0, 1.001))
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((90, 4)).astype(np.float32), rng.integers(0, 9, (90, 3))
    np.savez(tmp_path / "data.npz", a=a, b=b)
    code, out, _ = run(capsys, "verify", model, model, "--data", tmp_path / "data.npz", "--json")
    assert code == 0
    proof = json.loads(out)["proof"]
    assert proof["inputs"] == ["given", "one row"]
    assert proof["samples"] == 94
    assert run(capsys, "verify", model, wrong, "--data", tmp_path / "data.npz")[0] == 1
    np.savez(tmp_path / "other.npz", a=a, c=b)
    code, _, err = run(capsys, "verify", model, model, "--data", tmp_path / "other.npz")
    assert (code, "inputs are a, b" in err) == (3, True)
    code, _, err = run(capsys, "parity", model, "--data", tmp_path / "data.npz", "--mean", "0.5")
    assert (code, "--mean prepares images" in err) == (2, True)


def test_a_factory_gives_mappings_or_lists(tmp_path: Path, capsys: Any) -> None:
    model = two_inputs(tmp_path / "two.onnx")
    (tmp_path / "data.py").write_text(
        "import numpy as np\n"
        "rng = np.random.default_rng(0)\n"
        "def one():\n"
        "    return rng.standard_normal((40, 4)).astype(np.float32), rng.integers(0, 9, (40, 3))\n"
        "def named(): return [dict(zip('ab', one())) for _ in range(2)]\n"
        "def listed(): return [[*one(), 'label'] for _ in range(2)]\n"
        "def short(): return [{'a': one()[0]}]\n"
    )
    for name in ("named", "listed"):
        spec = f"{tmp_path / 'data.py'}:{name}"
        code, out, _ = run(capsys, "parity", model, "--data", spec, "--json")
        assert code == 0
        assert json.loads(out)["proof"]["samples"] == 84
    code, _, err = run(capsys, "parity", model, "--data", f"{tmp_path / 'data.py'}:short")
    assert (code, "'b' is not among them" in err) == (3, True)


def test_images_are_prepared_and_compared(net: Path, tmp_path: Path, capsys: Any) -> None:
    np.savez(tmp_path / "images.npz", x=np.arange(70 * 64, dtype=np.uint8).reshape(70, 8, 8))
    pair = (net / "net.onnx", net / "net.folded.onnx")
    code, out, _ = run(
        capsys, "verify", *pair, "--data", tmp_path / "images.npz", "--samples", "66", "--json"
    )
    assert code == 0
    assert json.loads(out)["proof"]["samples"] == 70


def test_an_input_shape_is_the_proofs_too(tmp_path: Path, capsys: Any) -> None:
    """A network of dynamic axes that does not take the size that is drawn by default."""
    weight = np.random.default_rng(0).standard_normal((5, 3 * 16 * 16)).astype(np.float32)
    made = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["f"]),
            helper.make_node("Gemm", ["f", "w"], ["y"], transB=1),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "m.onnx"
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(made, opset_imports=opset, ir_version=8), str(path))
    shape = ["--input-shape", "1,3,16,16"]
    for verb, *models in (("verify", path, path), ("parity", path), ("fold", path)):
        assert run(capsys, verb, *models)[0] == 3
        code, _, err = run(capsys, verb, *models, *shape)
        assert code == 0, err
    assert parity(path, input_shapes={"x": (1, 3, 16, 16)}, samples=2).samples < 20
