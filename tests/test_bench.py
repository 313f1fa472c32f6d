"""What is slower is seen, what is the same is not, and what is another function is not timed."""

from __future__ import annotations

import json
import math
import random
import sys

import numpy as np
import onnx
import pytest
import torch
from jsonschema import Draft202012Validator
from nets import with_statistics
from onnx import numpy_helper
from torch import nn

import bnfold
from bnfold import graph
from bnfold.benchmark import others, paired, timing
from bnfold.benchmark.bench import CONTROL, FOLDED, ORIGINAL, UNOPTIMIZED, bench
from bnfold.benchmark.paired import interval_of_median, margin_of, spread_of, verdict_of
from bnfold.benchmark.timing import Effort, OnnxModel
from bnfold.cli import main
from bnfold.errors import (
    InputError,
    LimitError,
    RuntimeUnavailableError,
    UsageError,
    VerificationError,
)
from bnfold.proof.places.runtimes import Runtime
from bnfold.report.schema import schema_text
from models.digits import digits_cnn

CPU = Runtime("ort-cpu")
SHAPE = (1, 1, 8, 8)


def convolutions(count):
    """`count` times the same layer: twice as many take twice as long."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    return with_statistics(nn.Sequential(*[layer for _ in range(count)]), positive=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """once.onnx, twice.onnx (its layer twice), net.onnx and wrong.onnx, net with another weight."""
    folder = tmp_path_factory.mktemp("bench")
    for name, count in (("once", 4), ("twice", 8)):
        bnfold.export(convolutions(count), torch.zeros(1, 16, 24, 24), folder / f"{name}.onnx")
    module = with_statistics(digits_cnn(), positive=True)
    bnfold.export(module, torch.zeros(SHAPE), folder / "net.onnx")
    wrong = onnx.load(folder / "net.onnx")
    weight = max(wrong.graph.initializer, key=lambda tensor: math.prod(tensor.dims))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    onnx.save(wrong, folder / "wrong.onnx")
    return folder


# --- the statistics ------------------------------------------------------------------------------


def test_the_interval_holds_the_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for n in (paired.FEWEST, 40):  # of a skewed distribution with the median 1
        draws = np.exp(rng.standard_cauchy((4000, n)).clip(-20, 20))
        held = [low <= 1 <= high for low, high in map(interval_of_median, draws.tolist())]
        assert 0.985 <= np.mean(held) <= 1.0


def test_few_rounds_tell_nothing():
    for n in range(2, 8):
        assert interval_of_median([0.5] * n) == (0.0, math.inf)
        assert verdict_of(spread_of([0.5] * n), 0.02) == "no difference seen"
    assert verdict_of(spread_of([0.5] * paired.FEWEST), 0.02) == "quicker"
    assert verdict_of(spread_of([2.0] * paired.FEWEST), 0.02) == "slower"


def test_a_difference_is_told_beyond_the_margin_alone():
    rng = np.random.default_rng(1)

    def ratios(middle):
        return spread_of((middle * np.exp(0.05 * rng.standard_normal(400))).tolist())

    quiet, noisy = ratios(1.0), ratios(1.1)
    assert margin_of(quiet) == paired.MARGIN
    assert margin_of(noisy) > 0.1
    assert verdict_of(ratios(0.9), margin_of(quiet)) == "quicker"
    assert verdict_of(ratios(1.1), margin_of(quiet)) == "slower"
    assert verdict_of(ratios(1.0), margin_of(quiet)) == "no difference seen"
    assert verdict_of(ratios(0.92), margin_of(noisy)) == "no difference seen"


def test_what_one_session_shows_is_no_difference():
    """A session that lies badly in memory is off for a whole sitting, however many its rounds."""
    rng = np.random.default_rng(2)

    def sitting(middle):
        return (middle * np.exp(0.01 * rng.standard_normal(70))).tolist()

    quiet = margin_of(spread_of(sitting(1.0), sitting(1.0), sitting(1.0)))
    lucky = spread_of(sitting(0.9), sitting(0.9), sitting(1.0))
    assert lucky.interval[1] < 0.95  # the rounds together would say so
    assert verdict_of(lucky, quiet) == "no difference seen"
    assert verdict_of(spread_of(sitting(0.9), sitting(0.9), sitting(0.9)), quiet) == "quicker"
    shown = margin_of(spread_of(sitting(1.0), sitting(1.0), sitting(1.12)))
    assert shown > 0.1  # the control's worst sitting
    assert verdict_of(spread_of(*3 * [sitting(1.05)]), shown) == "no difference seen"


def test_a_disturbance_falls_on_all(monkeypatch):
    """A machine that slows down threefold half-way changes times, and no ratio."""
    now, calls = [0.0], []

    def work(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds * (1 if len(calls) < 150 else 3)

        return run

    monkeypatch.setitem(paired.CLOCKS, "processor", lambda: now[0])
    runs = {"a": work("a", 1.0), "b": work("b", 0.8)}
    done = paired.timed_rounds(
        runs, clock="processor", rounds=150, seconds=60, repeats=1, draw=random.Random(0)
    )
    ratios = spread_of([taken["b"] / taken["a"] for taken in done])
    assert ratios.interval == pytest.approx((0.8, 0.8))
    assert spread_of([taken["a"] for taken in done]).quartiles == (1.0, 3.0)
    first = [calls[i] for i in range(0, 300, 2)]
    assert 50 < first.count("a") < 100  # each is first about as often


def test_time_ends_the_rounds_but_not_before_the_first():
    options = {"clock": "wall", "repeats": 1, "draw": random.Random(0)}
    assert len(paired.timed_rounds({"a": int}, rounds=10**9, seconds=1e-9, **options)) == 1
    assert len(paired.timed_rounds({"a": int}, rounds=7, seconds=60, **options)) == 7


# --- real networks -------------------------------------------------------------------------------


def test_a_layer_too_many_is_seen_and_the_same_file_is_not(files):
    sources = {name: graph.read_onnx(files / f"{name}.onnx") for name in ("once", "twice")}
    report = bench(
        sources["once"],
        {"twice": sources["twice"], "copy": sources["once"]},
        check=False,
        rounds=60,
        seconds=6,
    )
    assert report.row("twice").verdict == "slower"
    assert 1.5 < report.row("twice").ratio < 2.5
    assert report.row("copy").verdict == "no difference seen"
    assert report.row(ORIGINAL).ratio == 1.0
    back = bench(sources["twice"], {"once": sources["once"]}, check=False, rounds=60, seconds=4)
    assert back.row("once").verdict == "quicker"


def test_the_fold_and_the_others_are_proved_and_timed(files):
    report = bench(
        files / "net.onnx",
        compare=["onnxsim", "onnxslim"],
        batch_sizes=[1, 4],
        rounds=12,
        seconds=2,
        unoptimized=True,
    )
    assert report.passed
    assert not report.faults
    names = [row.model for row in report.rows]
    assert names == 2 * [ORIGINAL, FOLDED, "onnxsim", "onnxslim", UNOPTIMIZED, CONTROL]
    for row in report.rows:
        assert row.clock == "processor"
        assert row.rounds == 12
        assert row.quartiles_ms[0] <= row.median_ms <= row.quartiles_ms[1]
        assert row.throughput == pytest.approx(1000 * row.batch / row.median_ms)
    found = json.loads(json.dumps(report.to_dict()))
    assert {row["batch"] for row in found["rows"]} == {1, 4}
    assert found["machine"]["cores"] >= 1
    # as deployed: onnxruntime folds behind a convolution itself; unoptimized it does not
    placed = found["placed"]["ort-cpu, batch 1"]
    norms = [placed[name]["CPUExecutionProvider"].get("BatchNormalization", 0)
             for name in (FOLDED, ORIGINAL, UNOPTIMIZED)]  # fmt: skip
    assert norms == [0, 1, 4]


def test_another_function_is_marked_and_not_timed(files):
    report = bench(files / "net.onnx", {"wrong": files / "wrong.onnx"}, rounds=3)
    row = report.row("wrong")
    assert row.verdict == "not the same function"
    assert row.median_ms is None
    assert not report.passed
    with pytest.raises(VerificationError, match="'wrong' is not timed"):
        report.raise_for_failure()


def test_another_tools_failures_are_marked(files, monkeypatch):
    code = {
        "onnxsim": f"import shutil; shutil.copy({str(files / 'wrong.onnx')!r}, %r)",
        "onnxslim": "print('all is well')",  # and writes no file, as it does where a check fails
    }
    monkeypatch.setattr(
        others,
        "OTHERS",
        {
            name: lambda _, target, text=text: ["-c", text % str(target) if "%" in text else text]
            for name, text in code.items()
        },
    )
    report = bench(files / "net.onnx", compare=["onnxsim", "onnxslim"], rounds=3)
    assert report.row("onnxsim").verdict == "not the same function"
    assert report.row("onnxslim").verdict == "not made"
    assert report.row("onnxslim").sentence == "onnxslim wrote no file: all is well"
    assert report.row(FOLDED).median_ms is not None
    assert report.passed  # theirs is not ours
    report.raise_for_failure()
    assert set(report.faults) == {"onnxsim", "onnxslim"}


def test_torch_times_modules():
    module = convolutions(2).train()
    example = torch.zeros(1, 16, 12, 12)
    threads = torch.get_num_threads()
    report = bench(
        module, None, example, compare=["onnxslim"], runtimes=["torch"], batch_sizes=[2], rounds=9,
        seconds=3,
    )  # fmt: skip
    assert [row.model for row in report.rows] == [ORIGINAL, FOLDED, CONTROL, "onnxslim"]
    assert report.row("onnxslim").verdict == "not timed"
    assert {row.runtime for row in report.rows} == {"torch"}
    assert module.training
    assert torch.get_num_threads() == threads
    assert not report.placed


@pytest.mark.parametrize(
    "place", [torch.backends, torch.backends.cudnn, torch.backends.cuda.matmul]
)
def test_torchs_settings_are_put_back_whichever_its_user_took(place):
    before = place.fp32_precision
    place.fp32_precision = "tf32"
    try:
        timing.time_torch(
            {"a": nn.Identity()}, [np.zeros(1, np.float32)], Runtime("torch"), 1, Effort(1)
        )
        assert place.fp32_precision == "tf32"
    finally:
        place.fp32_precision = before


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"runtimes": ["torch"]}, "--model"),
        ({"runtimes": ["ort-cup"]}, "did you mean ort-cpu"),
        ({"compare": ["onnxsimp"]}, "onnxsim"),
        ({"batch_sizes": [0]}, "batch size"),
        ({"threads": 0}, "threads"),
        ({"threads": 100_000}, "cores"),
        ({"rounds": 0}, "rounds"),
        ({"seconds": -1.0}, "time"),
        ({"folded": {"original": "net.onnx"}}, "'original' is the name of another model"),
        ({"folded": {"onnxsim": "net.onnx"}, "compare": ["onnxsim"]}, "'onnxsim' is the name"),
    ],
)
def test_what_cannot_be_timed_is_a_sentence(files, options, word):
    folded = {name: files / path for name, path in options.pop("folded", {}).items()}
    with pytest.raises(UsageError, match=word):
        bench(files / "net.onnx", folded, **options)


def test_a_fixed_batch_is_told(tmp_path):
    bnfold.export(
        convolutions(1), torch.zeros(3, 16, 8, 8), tmp_path / "m.onnx", dynamic_batch=False
    )
    with pytest.raises(UsageError, match="batches of 3"):
        bench(tmp_path / "m.onnx", batch_sizes=[8], check=False)
    assert bench(tmp_path / "m.onnx", rounds=1, check=False).row(ORIGINAL).batch == 3


def test_an_optimiser_that_is_not_there_is_exit_4(files, capsys, monkeypatch):
    monkeypatch.setattr(others.importlib.util, "find_spec", lambda _: None)
    assert main(["bench", str(files / "net.onnx"), "--compare", "onnxslim"]) == 4
    assert "pip install onnxslim" in capsys.readouterr().err


def test_a_runtime_that_cannot_run_is_told_before_any_work(files, monkeypatch):
    monkeypatch.setattr("bnfold.proof.places.installation.runs", lambda _: "no GPU")
    with pytest.raises(RuntimeUnavailableError, match="ort-cuda cannot run here: no GPU"):
        bench(files / "net.onnx", runtimes=["ort-cuda"])


def in_place(code):
    """What starts another program where the one that times would start."""
    return lambda _: [sys.executable, "-c", code]


def test_the_process_tells_how_it_ended(files, monkeypatch):
    one = {"a": OnnxModel(str(files / "net.onnx"))}
    feeds = {"input": np.zeros(SHAPE, np.float32)}
    with pytest.raises(InputError, match="no model file"):
        timing.time_onnx({"a": OnnxModel(str(files / "none.onnx"))}, feeds, CPU, 1, Effort(1))
    for code, word in (("import os; os.abort()", "SIGABRT"), ("exit(3)", "exit code 3")):
        monkeypatch.setattr(timing, "command_of", in_place(code))
        with pytest.raises(LimitError, match=word) as crash:
            timing.time_onnx(one, feeds, CPU, 1, Effort(1))
        assert crash.value.code == "E_CRASH"
    fallen = RuntimeUnavailableError("It fell back.", code="E_CUDA_FALLBACK", hint="a GPU")
    said = json.dumps({"error": fallen.to_dict()})
    monkeypatch.setattr(timing, "command_of", in_place(f"print({said!r})"))
    with pytest.raises(RuntimeUnavailableError, match="It fell back") as fallback:
        timing.time_onnx(one, feeds, CPU, 1, Effort(1))
    assert (fallback.value.code, fallback.value.hint) == ("E_CUDA_FALLBACK", "a GPU")
    monkeypatch.setattr(timing, "command_of", in_place("import time; time.sleep(60)"))
    monkeypatch.setattr(timing, "TO_START", 0.2)
    with pytest.raises(LimitError, match="did not end within") as late:
        timing.time_onnx(one, feeds, CPU, 1, Effort(1, 1e-3))
    assert late.value.code == "E_TIMEOUT"


# --- the command line ----------------------------------------------------------------------------


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_bench_says_what_was_timed(files, capsys):
    code, out, _ = run(
        capsys, "bench", files / "net.onnx", "--batch-size", "2", "--rounds", 9, "--json"
    )
    assert code == 0
    report = json.loads(out)
    Draft202012Validator(json.loads(schema_text())).validate(report)
    rows = report["bench"]["rows"]
    assert [row["model"] for row in rows] == ["original", "folded", "original again"]
    assert [row["batch"] for row in rows] == [2, 2, 2]
    assert report["summary"].startswith("folded on ort-cpu, batch 2: ")
    assert any(note.startswith("Proved to be the original's function") for note in report["notes"])
    assert any("folds a batch norm behind a convolution itself" in note for note in report["notes"])


def test_a_given_file_that_is_another_function_is_exit_1(files, capsys):
    code, out, _ = run(capsys, "bench", files / "net.onnx", files / "wrong.onnx", "--rounds", 1)
    assert code == 1
    assert "wrong.onnx on ort-cpu, batch 1: not the same function." in out


@pytest.mark.parametrize("arguments", [["--batch-size", "1,x"], ["--seed", "-1"]])
def test_wrong_options_are_sentences(files, capsys, arguments):
    code, _, err = run(capsys, "bench", files / "net.onnx", *arguments)
    assert code == 2
    assert "Traceback" not in err
