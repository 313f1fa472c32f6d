"""A failing fold reduced to the batch norm that breaks it, written, and failing again."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from fault_nets import FAULTS, NETS, SPOILED, changed

import bnfold
from bnfold.bisecting import bisect_fold
from bnfold.cli import main


def test_x(tmp_path):
    m = NETS["preactivation"]()
    onnx.save(m, tmp_path / "net.onnx")
    p = bnfold.fold(FAULTS["eps 1e-3 for 1e-5"][0](m, "bn2")).model
    onnx.save(p, tmp_path / "wrong.onnx")
    assert (
        main(
            [
                "verify",
                str(tmp_path / "net.onnx"),
                str(tmp_path / "wrong.onnx"),
                "--bisect",
                str(tmp_path / "b"),
            ]
        )
        == 1
    )
    assert (
        main(
            [
                "verify",
                str(tmp_path / "b/original.onnx"),
                str(tmp_path / "b/folded.onnx"),
                "--data",
                str(tmp_path / "b/inputs.npz"),
            ]
        )
        == 1
    )


def test_y(tmp_path, monkeypatch, capsys):
    import bnfold.api as api
    from bnfold.folding import apply as applied

    m = NETS["residual"]()
    onnx.save(m, tmp_path / "net.onnx")
    right = api.apply
    import onnx_ir as ir

    def wrong(plan):
        made = right(plan)
        if any(r.name == "bn1" for r in plan.removed):
            v = made.model.graph.initializers["conv1.weight"]
            v.const_value = ir.Tensor(v.const_value.numpy() * np.float32(1.01), name=v.name)
        return made

    monkeypatch.setattr(api, "apply", wrong)
    print(main(["fold", str(tmp_path / "net.onnx"), "--bisect", str(tmp_path / "b")]))
    print(capsys.readouterr())
    assert (
        main(
            [
                "verify",
                str(tmp_path / "b/original.onnx"),
                str(tmp_path / "b/folded.onnx"),
                "--data",
                str(tmp_path / "b/inputs.npz"),
            ]
        )
        == 1
    )
