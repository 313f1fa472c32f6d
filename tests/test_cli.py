"""The command line: results on stdout, a sentence for bad input, the right exit code, no debris."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from nets import CalledTwice, with_statistics
from torch import nn

import bnfold
from bnfold import graph
from bnfold.cli import main
from bnfold.errors import InputError
from bnfold.folding.program import fold_program
from models.digits import digits_cnn

ROOT = Path(__file__).resolve().parent.parent
SPEC = "models/digits.py:digits_cnn"
SHAPE = ["--input-shape", "1,1,8,8"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint and the same network as ONNX, unfolded."""
    folder = tmp_path_factory.mktemp("made")
    module = with_statistics(digits_cnn(), positive=True)
    torch.save(module.state_dict(), folder / "net.pt")
    graph.write_onnx(graph.export_module(module, (torch.zeros(1, 1, 8, 8),)), folder / "net.onnx")
    return folder


@pytest.fixture
def net(made, tmp_path):
    for name in ("net.pt", "net.onnx"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    return tmp_path


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_fold_writes_a_proved_model_and_its_record(net, capsys):
    code, out, _ = run(capsys, "fold", net / "net.onnx")
    assert code == 0
    assert "All 4 batch norms folded. Proved by gates A, B, C: R = " in out
    assert files(net) == ["net.folded.onnx", "net.folded.record.safetensors", "net.onnx", "net.pt"]
    assert all(
        n.op_type != "BatchNormalization" for n in onnx.load(net / "net.folded.onnx").graph.node
    )


def test_a_torch_source_gives_onnx_and_a_checkpoint_that_describes_itself(net, capsys):
    code, *_ = run(capsys, "fold", net / "net.pt", "--model", SPEC, *SHAPE)
    assert code == 0
    assert {"net.folded.onnx", "net.folded.pt"} <= set(files(net))
    code, out, _ = run(capsys, "fold", net / "net.folded.pt", "-o", net / "again.onnx")
    assert code == 0
    assert "There is no batch norm in the model" in out
    code, out, _ = run(
        capsys, "verify", net / "net.pt", net / "net.folded.pt", "--model", SPEC, *SHAPE
    )
    assert code == 0


def test_json_is_one_document_on_stdout(net, capsys):
    code, out, _ = run(capsys, "fold", net / "net.onnx", "--json")
    document = json.loads(out)
    assert code == document["exit_code"] == 0
    assert len(document["batch_norms"]["folded"]) == 4
    assert document["proof"]["r"] <= 4
    code, out, _ = run(capsys, "fold", net / "nothing.onnx", "--json")
    assert code == json.loads(out)["error"]["exit_code"] == 3


def test_dry_run_and_inspect_write_nothing(net, capsys):
    before = files(net)
    assert run(capsys, "fold", net / "net.onnx", "--dry-run")[0] == 0
    code, out, _ = run(capsys, "inspect", net / "net.onnx")
    assert code == 0
    assert "4 of 4 batch norms fold exactly" in out
    assert files(net) == before


def test_a_report_is_written_in_the_format_its_name_says(net, capsys):
    run(capsys, "fold", net / "net.onnx", "--report", net / "r.md", "--quiet")
    assert "## Batch norms" in (net / "r.md").read_text()


def test_verify_fails_on_a_wrong_model_and_names_the_place(net, capsys):
    run(capsys, "fold", net / "net.onnx")
    model = onnx.load(net / "net.folded.onnx")
    weight = next(t for t in model.graph.initializer if t.name.endswith("weight"))
    array = onnx.numpy_helper.to_array(weight).copy()
    array[0] *= 1.001
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, net / "net.folded.onnx")
    code, out, _ = run(capsys, "verify", net / "net.onnx", net / "net.folded.onnx")
    assert code == 1
    assert "NOT the same function" in out
    assert "FAIL" in out


def test_nothing_is_written_when_the_proof_fails(net, capsys, monkeypatch):
    from bnfold.folding import plan

    right = plan.FoldPlan.gauge

    def wrong(self, value):
        gauge = right(self, value)
        return type(gauge)(gauge.scale * 1.001, gauge.origin)

    monkeypatch.setattr(plan.FoldPlan, "gauge", wrong)
    before = files(net)
    code, out, _ = run(capsys, "fold", net / "net.onnx")
    assert code == 1
    assert "No file was written" in out
    assert files(net) == before


def test_outputs_are_protected(net, capsys):
    (net / "net.folded.onnx").write_bytes(b"mine")
    for arguments, word in (
        ((net / "net.onnx",), "exists; pass --overwrite"),
        ((net / "net.onnx", "-o", net / "net.onnx", "--overwrite"), "never overwritten"),
        ((net / "net.onnx", "-o", net / "no" / "x.onnx"), "there is no folder"),
        ((net / "net.onnx", "-o", net / "x.tflite"), "the suffix must be one of"),
        ((net / "net.onnx", "-o", net / "x.pt"), "needs a torch model"),
    ):
        code, _, err = run(capsys, "fold", *arguments)
        assert code == 2, err
        assert word in err
    assert (net / "net.folded.onnx").read_bytes() == b"mine"
    assert run(capsys, "fold", net / "net.onnx", "--overwrite")[0] == 0


def test_cuda_that_cannot_run_is_never_a_pass(net, capsys):
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    before = files(net)
    code, out, err = run(capsys, "fold", net / "net.onnx", "--provider", "cuda")
    assert code == 4
    assert "lib" in err or "CUDA" in err
    assert "Proved" not in out
    assert files(net) == before


class _Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def _bad_files(folder):
    good = (folder / "net.onnx").read_bytes()
    weights = (folder / "net.pt").read_bytes()
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    yield "empty.onnx", b"", "is empty"
    yield "garbage.onnx", b"\x93\x11 nothing of the kind" * 9, "none of the formats"
    yield "pointer.onnx", lfs, "Git LFS pointer"
    yield "page.onnx", b"<!DOCTYPE html><html><body>404</body></html>", "web page"
    yield "cut.onnx", good[: len(good) // 2], "cut.onnx"
    yield "cut.pt", weights[: len(weights) // 2], "cut.pt"
    evil = io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(1), "b": _Evil(folder / "touched")}}, evil)
    yield "evil.pt", evil.getvalue(), "system"


def test_bad_files_give_one_sentence_and_leave_nothing(net, capsys):
    for name, content, word in _bad_files(net):
        (net / name).write_bytes(content)
        before = files(net)
        code, out, err = run(capsys, "fold", net / name, "--model", SPEC, *SHAPE)
        if name.endswith(".onnx") and code == 2:  # ONNX needs no --model
            code, out, err = run(capsys, "fold", net / name)
        assert code == 3, (name, err)
        assert word.lower() in err.lower(), (name, err)
        assert "Traceback" not in err
        assert out == ""
        assert files(net) == before
    assert not (net / "touched").exists()


def _statistics(change):
    module = with_statistics(digits_cnn())
    change(next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d)))
    return module


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda bn: bn.running_var.fill_(-1.0), "running_var"),
        (lambda bn: bn.running_mean.__setitem__(2, float("nan")), "running_mean"),
    ],
)
def test_impossible_statistics_are_named(net, capsys, change, word):
    torch.save(_statistics(change).state_dict(), net / "bad.pt")
    code, _, err = run(capsys, "fold", net / "bad.pt", "--model", SPEC, *SHAPE)
    assert code == 3
    assert word in err


def test_impossible_statistics_in_onnx_are_named(net, capsys):
    model = onnx.load(net / "net.onnx")
    var = next(t for t in model.graph.initializer if t.name.endswith("running_var"))
    array = onnx.numpy_helper.to_array(var).copy()
    array[1] = np.nan
    var.CopyFrom(onnx.numpy_helper.from_array(array, var.name))
    onnx.save(model, net / "bad.onnx")
    code, _, err = run(capsys, "fold", net / "bad.onnx")
    assert code == 3
    assert "running_var" in err
    assert "channel 1" in err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["net.pt"], "--model"),
        (["net.pt", "--model", SPEC], "--input-shape"),
        (["net.pt", "--model", SPEC, "--input-shape", "1,3,8,8"], "torch cannot export"),
        (["net.pt", "--model", "models/digits.py:digits_cnm", *SHAPE], "digits_cnn"),
        (["net.pt", "--model", "models/lenet.py:lenet5", *SHAPE], "do not fit LeNet5"),
        (["net.onnx", "--input-shape", "1,x"], "not a shape"),
        (["absent.onnx"], "does not exist"),
    ],
)
def test_wrong_use_says_what_to_do(net, capsys, arguments, word):
    before = files(net)
    code, _, err = run(capsys, "fold", net / arguments[0], *arguments[1:])
    assert code in (2, 3)
    assert word in err
    assert "Traceback" not in err
    assert files(net) == before


def test_a_model_in_training_mode_is_folded_as_it_infers(net, capsys):
    whole = with_statistics(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))).train()
    torch.save(whole, net / "whole.pt")
    code, out, err = run(capsys, "fold", net / "whole.pt", *SHAPE)
    assert code == 0
    assert "training mode" in err
    assert "The batch norm folded. Proved by gates A, B, C" in out


def test_a_folded_torch_file_loads_into_a_fresh_network(net, capsys):
    outputs = ["-o", net / "f.pt", "-o", net / "f.safetensors"]
    assert run(capsys, "fold", net / "net.pt", "--model", SPEC, *SHAPE, *outputs)[0] == 0
    module = digits_cnn().eval()
    module.load_state_dict(torch.load(net / "net.pt"))
    x = torch.rand(4, 1, 8, 8)
    for path in (net / "f.pt", net / "f.safetensors"):
        folded = bnfold.load_folded(digits_cnn(), path)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
        assert torch.allclose(folded(x), module(x), rtol=1e-4, atol=1e-4)
        code, out, _ = run(capsys, "verify", net / "net.pt", path, "--model", SPEC, *SHAPE)
        assert code == 0
        assert "R = " in out
    with pytest.raises(InputError):
        bnfold.load_folded(digits_cnn(), net / "net.pt")


def test_help_needs_neither_torch_nor_onnx():
    script = (
        "import sys\n"
        "from bnfold.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'onnx', 'numpy', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[]\n")


def test_folding_onnx_needs_no_torch(net):
    script = (
        "import sys\n"
        "from bnfold.cli import main\n"
        f"code = main(['fold', {str(net / 'net.onnx')!r}])\n"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("0 False\n")


def test_a_report_never_replaces_a_model(net, capsys):
    content = (net / "net.onnx").read_bytes()
    for report in (net / "net.onnx", net / "none" / "r.md", net / "r.exe"):
        code, _, err = run(capsys, "fold", net / "net.onnx", "--report", report)
        assert code == 2
        assert "--report" in err
    assert (net / "net.onnx").read_bytes() == content
    assert files(net) == ["net.onnx", "net.pt"]


def test_adapting_writes_a_checkpoint_that_folds_with_no_other_word(net, capsys):
    data = np.random.default_rng(0).random((96, 1, 8, 8), dtype=np.float32)
    np.savez(net / "target.npz", x=data, y=np.full(96, 3))
    options = ["--model", SPEC, "--target-data", net / "target.npz"]
    code, out, err = run(capsys, "adapt", net / "net.pt", *options)
    assert code == 0, err
    assert "4 batch norms adapted to 96 images (exact)" in out
    assert "accuracy %" in out
    code, out, _ = run(capsys, "fold", net / "net.adapted.pt")
    assert code == 0
    assert "All 4 batch norms folded. Proved" in out


def test_a_negative_seed_and_a_bad_target_are_sentences(net, capsys):
    np.save(net / "wrong.npy", np.zeros((4, 3, 9, 9), np.float32))
    for extra, word in ((["--seed", "-1"], "--seed"), ([], "")):
        options = ["--model", SPEC, "--target-data", net / "wrong.npy", *extra]
        code, _, err = run(capsys, "adapt", net / "net.pt", *options)
        assert code in (2, 3)
        assert word in err
        assert "Traceback" not in err


def test_every_verb_has_help(capsys):
    for verb in ("fold", "adapt", "export", "verify", "inspect", "train", "doctor"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert verb in capsys.readouterr().out


# --- torch networks whose class cannot hold the fold ---------------------------------------------

TWICE = "tests/nets.py:CalledTwice"


@pytest.fixture
def twice(tmp_path):
    """The weights of a network with one batch norm that is called twice."""
    torch.save(with_statistics(CalledTwice()).state_dict(), tmp_path / "net.pt")
    return tmp_path


def fold_twice(capsys, folder, *options):
    shape = ["--input-shape", "1,3,6,6"]
    return run(capsys, "fold", folder / "net.pt", "--model", TWICE, *shape, *options)


def test_what_the_class_cannot_hold_is_written_as_a_graph(twice, capsys):
    code, out, err = fold_twice(capsys, twice)
    assert code == 0
    assert "All 2 batch norms folded." in out
    assert f"Load the graph with torch.export.load('{twice / 'net.folded.pt2'}').module()." in out
    assert "graph module" in err
    assert {"net.folded.onnx", "net.folded.pt2"} <= set(files(twice))
    assert "net.folded.pt" not in files(twice)
    x = torch.randn(3, 3, 6, 6)
    module = with_statistics(CalledTwice())
    module.load_state_dict(torch.load(twice / "net.pt", weights_only=True))
    graph_module = torch.export.load(twice / "net.folded.pt2").module()
    assert torch.allclose(graph_module(x), module(x), rtol=1e-5, atol=1e-5)
    code, out, _ = run(capsys, "fold", twice / "net.folded.pt2")
    assert code == 0
    assert "There is no batch norm in the model" in out
    assert {"net.folded.folded.onnx", "net.folded.folded.pt2"} <= set(files(twice))


def test_the_suffix_of_the_output_picks_class_or_graph(twice, capsys):
    code, out, err = fold_twice(capsys, twice, "-o", twice / "class.pt")
    assert code == 0
    assert "0 of 2 batch norms folded" in out
    assert "-o NAME.pt2" in err
    code, out, _ = fold_twice(capsys, twice, "-o", twice / "graph.pt2", "--json")
    assert code == 0
    assert len(json.loads(out)["batch_norms"]["folded"]) == 2
    code, _, err = fold_twice(capsys, twice, "-o", twice / "a.pt", "-o", twice / "a.pt2")
    assert code == 2
    assert "one at a time" in err
    assert not {"a.pt", "a.pt2"} & set(files(twice))


def test_a_fault_in_a_graph_is_caught_before_a_file_appears(twice, capsys, monkeypatch):
    def spoilt(program, plan):
        made = fold_program(program, plan)
        made.state_dict["a.weight"].data[0] *= 1.01
        return made

    monkeypatch.setattr("bnfold.writeback.fold_program", spoilt)
    before = files(twice)
    code, out, _ = fold_twice(capsys, twice)
    assert code == 1
    assert "No file was written." in out
    assert files(twice) == before


# --- what changes operators ----------------------------------------------------------------------


def test_repairs_and_a_scaled_input_write_onnx_alone(net):
    checkpoint = ["fold", str(net / "net.pt"), "--model", SPEC, *SHAPE]
    assert main([*checkpoint, "--repair", "all", "--input-mean", "0.5", "--input-std", "2"]) == 0
    assert (net / "net.folded.onnx").is_file()
    assert not (net / "net.folded.pt").exists()


def test_a_scaled_input_is_normalised_by_the_network_itself(net):
    folded = str(net / "s.onnx")
    options = ["--input-mean", "0.5", "--input-std", "2"]
    assert main(["fold", str(net / "net.onnx"), "-o", folded, *options]) == 0
    x = np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32)
    sessions = [onnxruntime.InferenceSession(p) for p in (str(net / "net.onnx"), folded)]
    (plain,) = sessions[0].run(None, {sessions[0].get_inputs()[0].name: (x - 0.5) / 2})
    (scaled,) = sessions[1].run(None, {sessions[1].get_inputs()[0].name: x})
    np.testing.assert_allclose(scaled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["-o", "x.pt", "--repair", "clamp"], "--repair changes operators"),
        (["-o", "x.pt", "--input-mean", "0.5"], "--input-mean changes operators"),
        (["--input-mean", "0.5,0.5"], "1 channels"),
        (["--input-std", "0"], "above 0"),
        (["--input-name", "x"], "--input-name"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_a_sentence(net, capsys, monkeypatch, options, word):
    monkeypatch.chdir(net)
    spec = str(ROOT / SPEC)
    assert main(["fold", "net.pt", "--model", spec, *SHAPE, *options]) == 2
    assert word in capsys.readouterr().err
    assert sorted(p.name for p in net.iterdir()) == ["net.onnx", "net.pt"]


def test_a_fault_of_our_own_is_told_as_one_and_exits_with_70(monkeypatch, capsys):
    monkeypatch.setattr("bnfold.proof.places.installation.installation", lambda: 1 / 0)
    monkeypatch.delenv("BNFOLD_TRACEBACK", raising=False)
    assert main(["doctor", "--json"]) == 70
    out = capsys.readouterr()
    assert "fault of bnfold's own" in out.err
    assert "ZeroDivisionError" in out.err
    assert json.loads(out.out)["error"]["exit_code"] == 70
    monkeypatch.setenv("BNFOLD_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])
