"""`--bisect`: a failing fold reduced to the batch norm that breaks it, and failing again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fault_nets import FAULTS, NETS, SPOILED, Net, changed

import bnfold
from bnfold import api
from bnfold.bisecting.bisect import FILES, only, write
from bnfold.cli import main
from bnfold.errors import UsageError


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    """The exit code of a verb and its JSON."""
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def failing(tmp_path: Path, kind: str, name: str = "eps 1e-3 for 1e-5") -> tuple[Path, Path]:
    """A network and a wrong fold of it, as files."""
    original, wrong = tmp_path / "net.onnx", tmp_path / "net.wrong.onnx"
    model = NETS[kind]()
    onnx.save(model, original)
    onnx.save(bnfold.fold(FAULTS[name][0](model, SPOILED[kind])).model, wrong)
    return original, wrong


@pytest.mark.parametrize("kind", NETS)
def test_verify_writes_a_pair_that_fails_for_the_same_reason(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    code, report = run(capsys, "verify", *failing(tmp_path, kind), "--bisect", folder)
    assert code == 1
    assert report["cause"]["norm"] == SPOILED[kind]
    assert f"It comes down to batch norm '{SPOILED[kind]}'" in report["summary"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert {Path(file["path"]).name for file in report["files"]} >= set(FILES)
    pair = folder / "original.onnx", folder / "folded.onnx"
    code, again = run(capsys, "verify", *pair, "--data", folder / "inputs.npz")
    assert code == 1
    assert again["cause"]["norm"] == report["cause"]["norm"]
    assert again["cause"]["sentence"] == report["cause"]["sentence"]


def test_what_passes_is_not_bisected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = NETS["dense"]()
    onnx.save(model, tmp_path / "net.onnx")
    onnx.save(bnfold.fold(model).model, tmp_path / "folded.onnx")
    folder = tmp_path / "out"
    code, report = run(
        capsys, "verify", tmp_path / "net.onnx", tmp_path / "folded.onnx", "--bisect", folder
    )
    assert code == 0
    assert not folder.exists()
    assert "comes down" not in report["summary"]


def test_folder_is_looked_at_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = failing(tmp_path, "dense")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "inputs.npz").write_bytes(b"mine")
    for folder, complaint in (
        (taken, "exists; name another folder"),
        (models[0], "is a file; name a folder"),
        (tmp_path / "no" / "folder", "there is no folder"),
    ):
        assert main(["verify", *map(str, models), "--bisect", str(folder)]) == 2
        assert complaint in capsys.readouterr().err
    assert (taken / "inputs.npz").read_bytes() == b"mine"


def test_all_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bnfold.bisecting.bisect as bisecting

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bisecting, "_write_arrays", fail)
    proto = NETS["dense"]()
    pair = bisecting.MinimalPair(proto, proto, {}, None, "", None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="No space left"):
        write(pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_of_values_are_kept_whatever_they_are(tmp_path: Path) -> None:
    import bnfold.bisecting.bisect as bisecting

    arrays = {"/layer1/conv/Conv_output_0": np.ones(2), "file": np.zeros(3), "a b": np.ones(1)}
    proto = NETS["dense"]()
    pair = bisecting.MinimalPair(proto, proto, arrays, None, "", None)  # type: ignore[arg-type]
    write(pair, tmp_path / "out")
    with np.load(tmp_path / "out" / "inputs.npz", allow_pickle=False) as stored:
        assert {name: stored[name].tolist() for name in stored.files} == {
            name: array.tolist() for name, array in arrays.items()
        }


# ---------------------------------------------------------------------------- folds of our own


def plant(monkeypatch: pytest.MonkeyPatch, *guilty: str) -> list[set[str]]:
    """Make bnfold spoil a weight when these batch norms all fold; the folds that were made."""
    right, made = api.apply, []

    def wrong(plan: Any) -> Any:
        folded = right(plan)
        made.append({removed.name for removed in plan.removed})
        if set(guilty) <= made[-1]:
            held = folded.model.graph.initializers["conv1.weight"]
            held.const_value = ir.Tensor(
                held.const_value.numpy() * np.float32(1.01), name=held.name
            )
        return folded

    monkeypatch.setattr(api, "apply", wrong)
    return made


@pytest.mark.parametrize("guilty", [("bn1",), ("bn0", "bn2")])
def test_fold_finds_the_batch_norms_that_break_it(
    guilty: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    onnx.save(NETS["residual"](), tmp_path / "net.onnx")
    made = plant(monkeypatch, *guilty)
    folder = tmp_path / "out"
    code, report = run(capsys, "fold", tmp_path / "net.onnx", "--bisect", folder)
    assert code == 1
    assert not (tmp_path / "net.folded.onnx").exists()
    named = ", ".join(f"'{name}'" for name in guilty)
    assert f"Of 3 batch norms folded, {named} alone" in report["summary"]
    assert set(guilty) in made
    pair = folder / "original.onnx", folder / "folded.onnx"
    assert run(capsys, "verify", *pair, "--data", folder / "inputs.npz")[0] == 1


def test_original_that_proves_nothing_is_not_bisected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is far from its own float64 evaluation: any fold fails, and no batch norm is to blame."""
    net = Net(6)
    x = net.gemm(net.norm("x", "bn1", 6), "fc", 6, 4)
    model = net.model(net.op("Sin", net.op("Mul", x, net.held("large", np.float32([1e7])))))
    onnx.save(model, tmp_path / "net.onnx")
    del monkeypatch
    code, report = run(capsys, "fold", tmp_path / "net.onnx", "--bisect", tmp_path / "out")
    assert code == 1
    assert "There is nothing to bisect: the original does not match" in report["summary"]
    assert not (tmp_path / "out").exists()


def test_patterns_match_names_as_they_are() -> None:
    model = changed(NETS["dense"]())
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("bn1.", "bn[1]*.")
    for node in model.graph.node:
        node.input[:] = [name.replace("bn1.", "bn[1]*.") for name in node.input]
    assert [n.name for n in bnfold.fold(model, only=only(["bn[1]*"])).folded] == ["bn[1]*"]


@pytest.mark.parametrize("option", ["--no-verify", "--dry-run"])
def test_a_fold_without_proof_has_nothing_to_take_apart(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(NETS["dense"](), tmp_path / "net.onnx")
    assert main(["fold", str(tmp_path / "net.onnx"), option, "--bisect"]) == 2
    assert "leave --no-verify and --dry-run out" in capsys.readouterr().err
    assert not (tmp_path / "net.folded.onnx").exists()
