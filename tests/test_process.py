"""A GPU's sessions in a process of its own: the same numbers, a sentence for whatever goes wrong.

Where no GPU is, `pretend_cuda` claims to be one in the process and computes on the CPU.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from test_verify import network, proved

from bnfold.errors import InputError, LimitError, RuntimeUnavailableError, UsageError
from bnfold.proof.places import process
from bnfold.proof.places.installation import runs
from bnfold.proof.places.process import Worker, environment_of, receive, send
from bnfold.proof.places.runtime import open_session
from bnfold.proof.places.runtimes import Runtime
from bnfold.proof.verify import parity

CPU, CUDA = Runtime("ort-cpu"), Runtime("ort-cuda")
PRETEND = str(Path(__file__).parent / "pretend_cuda")


def inputs(rows: int = 3) -> dict[str, Any]:
    return {"x": np.random.default_rng(0).standard_normal((rows, 3, 12, 12)).astype(np.float32)}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it with a misbehaviour: from then on new processes have that CUDA."""

    def set_mode(mode: str = "") -> None:
        monkeypatch.setenv("PRETEND", mode)

    paths = [PRETEND, *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    set_mode()
    return set_mode


# ------------------------------------------------------------------------------- same numbers


@pytest.mark.parametrize("optimize", [False, True])
def test_worker_computes_bit_for_bit_what_this_process_computes(
    optimize: bool, tmp_path: Path
) -> None:
    model, _ = network().models()
    path = tmp_path / "model.onnx"
    onnx.save(
        network().models()[0],
        str(path),
        save_as_external_data=True,
        location="weights",
        size_threshold=0,
    )
    here = open_session(model, optimize=optimize, threads=1)
    with Worker(CPU) as worker:
        for source in (model, model.SerializeToString(), path):
            there = worker.open(source, optimize=optimize, threads=1)
            assert there.assignment == here.assignment
            assert (there.input_types, there.output_names) == (here.input_types, here.output_names)
            np.testing.assert_array_equal(there.run(inputs())["out"], here.run(inputs())["out"])


def test_proof_in_a_process_of_its_own_gives_the_same_figures() -> None:
    here, there = proved(network()), proved(network(), own_process=True)
    assert [result.value for result in there.gates] == [result.value for result in here.gates]
    assert all(ran.own_process for ran in there.runtimes)
    assert not any(ran.own_process for ran in here.runtimes)


def test_every_type_comes_through_the_pipe_as_it_is() -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "f": rng.standard_normal((2, 3)).astype(np.float32)[:, ::2],
        "h": np.float16([np.nan, np.inf]),
        "b": rng.standard_normal(4).astype(ml_dtypes.bfloat16),
        "i": np.array(7, np.int64),
        "none": np.zeros((0, 5), np.uint8),
        "yes": np.array([True, False]),
        "s": np.array([["a"], ["ü"]], dtype=object),
    }
    pipe = io.BytesIO()
    send(pipe, {"call": "x"}, {**arrays, "other": [1, 2]})
    pipe.seek(0)
    head, back = receive(pipe)
    assert head == {"call": "x"}
    assert back.pop("other") == "list"
    for name, value in arrays.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value)


@pytest.mark.parametrize(
    "bytes_read",
    [
        b"",
        b"EP Error: a library printed this into the protocol",
        process.LENGTHS.pack(2, 0) + b"{]",
        process.LENGTHS.pack(2, 0) + b"{}",
        process.LENGTHS.pack(1 << 60, 0),
    ],
)
def test_what_is_no_message_is_refused(bytes_read: bytes) -> None:
    with pytest.raises(process._BrokenError):
        receive(io.BytesIO(bytes_read))


# ------------------------------------------------------------------------------ what goes wrong


def test_refusals_are_the_errors_of_this_process() -> None:
    with Worker(CPU) as worker:
        with pytest.raises(InputError, match="cannot load the model"):
            worker.open(b"no model", optimize=False)
        session = worker.open(network().models()[0], optimize=False)
        with pytest.raises(InputError, match="could not run"):
            session.run({"x": np.zeros((1, 5, 12, 12), np.float32)})
        assert session.run(inputs())["out"].shape == (3, 5)  # it goes on


FAULTS = {
    "fallback": (RuntimeUnavailableError, "E_CUDA_FALLBACK", "fell back"),
    "conv on cpu": (RuntimeUnavailableError, "E_CUDA_FALLBACK", "2 Conv on CPU"),
    "leaves": (RuntimeUnavailableError, "E_CUDA_FALLBACK", "left CUDA"),
    "lost library": (RuntimeUnavailableError, "E_RUNTIME", r"cannot load libcublasLt\.so\.99"),
    "crash": (LimitError, "E_CRASH", "ended by SIGSEGV while running"),
    "hang": (LimitError, "E_TIMEOUT", "more than 1 s"),
}


@pytest.mark.parametrize("mode", FAULTS)
def test_a_gpu_that_does_not_compute_is_exit_code_4_and_no_pass(mode: str, pretend: Any) -> None:
    kind, code, said = FAULTS[mode]
    pretend(mode)
    with pytest.raises(kind, match=said) as refusal:
        proved(network(), runtimes=["ort-cuda"], time_limit=1 if mode == "hang" else None)
    assert (refusal.value.exit_code, refusal.value.code) == (4, code)


def test_process_that_cannot_start_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(RuntimeUnavailableError, match="cannot be started"):
        Worker(CPU)


def in_place(code: str) -> Any:
    """What starts another program in the place of the process."""
    return lambda _: [sys.executable, "-c", code]


def test_process_that_ends_at_once_tells_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "command_of", in_place("import nothing_of_that_name"))
    with (
        pytest.raises(LimitError, match=r"exit code 1.*nothing_of_that_name"),
        Worker(CPU) as worker,
    ):
        worker.open(network().models()[0], optimize=False)


def test_no_process_is_left_after_an_exception(
    pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    popen = process.subprocess.Popen

    def start(*args: Any, **options: Any) -> Any:
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(process.subprocess, "Popen", start)
    pretend("leaves")
    with pytest.raises(RuntimeUnavailableError):
        proved(network(), runtimes=["ort-cpu", "ort-cuda"])
    assert len(started) == 1
    assert started[0].poll() is not None


def test_a_process_that_does_not_go_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "command_of", in_place("import time; time.sleep(60)"))
    monkeypatch.setattr(process, "GRACE", 0.2)
    begun = time.monotonic()
    with Worker(CPU) as worker:
        pass
    assert worker._process.returncode == -9
    assert time.monotonic() - begun < 20


# ------------------------------------------------------------------------------ what CUDA is told


def test_environment_settles_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert "NVIDIA_TF32_OVERRIDE" not in environment_of("tf32")
    assert {environment_of(name)["NVIDIA_TF32_OVERRIDE"] for name in ("fp32", "fp16", "bf16")} == {
        "0"
    }
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "1"


def test_undeclared_tf32_fails_and_is_recognised(pretend: Any) -> None:
    """Although it was told not to: a library that rounds all the same (onnxruntime 26029)."""
    pretend("tf32 anyway")
    report = proved(network(), runtimes=["ort-cuda"])
    assert {result.gate for result in report.failures} == {"C"}
    assert 2**8 < report.failures[0].value < 2**13
    assert "looks like TF32" in report.failures[0].sentence
    assert "ort-cuda:tf32" in report.failures[0].sentence


@pytest.mark.usefixtures("pretend")
def test_declared_tf32_is_switched_on_and_passes() -> None:
    plain = proved(network(), runtimes=["ort-cuda"])
    assert plain.passed
    assert plain.runtimes[1].ratio < 4
    assert plain.runtimes[1].providers["CUDAExecutionProvider"]["Conv"] == 2
    for name in ("ort-cuda:tf32", "ort-tensorrt:tf32"):
        report = proved(network(), runtimes=[name])
        assert report.passed, report.failures
        assert report.runtimes[-1].ratio > 2**8, "TF32 was declared and nothing was rounded"
        assert [ran.role for ran in report.runtimes] == ["folded", "original", "folded"]
        (share,) = [result for result in report.gates if result.name == "class ratio"]
        assert 0.3 < share.value < 2


def test_a_fault_below_the_ceiling_of_a_class_fails_against_the_original_in_it(
    pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bnfold.proof.figures.verdicts.ceiling", lambda *_: 2.0**16)
    pretend("another fold")
    report = proved(network(), runtimes=["ort-cuda:tf32"])
    assert {result.name for result in report.failures} == {"class ratio", "class channel"}


def test_parity_holds_one_network_against_itself_elsewhere(pretend: Any) -> None:
    model, _ = network().models()
    report = parity(model, runtimes=["ort-cpu", "ort-cuda", "ort-cuda:tf32"])
    assert report.passed
    assert [ran.name for ran in report.runtimes] == ["ort-cpu", "ort-cuda", "ort-cuda:tf32"]
    assert [ran.own_process for ran in report.runtimes] == [False, True, True]
    pretend("tf32 anyway")
    assert not parity(model, runtimes=["ort-cpu", "ort-cuda"]).passed


@pytest.mark.usefixtures("pretend")
def test_nothing_that_a_library_prints_reaches_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    assert proved(network(), runtimes=["ort-cuda"]).passed
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["ort-cuda", "ort-tensorrt"])
def test_real_gpu_that_is_not_there_names_a_library(name: str) -> None:
    if runs(name) is True:
        pytest.skip(f"{name} runs here")
    with pytest.raises(RuntimeUnavailableError, match=r"was asked for.*(lib\w+\.so|built without)"):
        proved(network(), runtimes=[name])


# ------------------------------------------------------------------------------------ no survivors


def endless() -> onnx.ModelProto:
    """A loop that computes for hours."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[N, 4] x) => (float[N, 4] y) <int64 n = {4611686018427387904}> {
      yes = Constant <value = bool {1}> ()
      y = Loop (n, yes, x) <body = b (int64 i, bool c, float[N, 4] s) => (bool o, float[N, 4] r)
        { o = Identity(c)  r = Sin(s) }>
    }"""
    return onnx.parser.parse_model(text)


def alive(pid: int) -> bool:
    """Whether a process runs, and is no corpse."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


CHILD = """
import sys, numpy as np
from test_process import CPU, Worker, endless
with Worker(CPU) as worker:
    session = worker.open(endless(), optimize=False)
    print(worker._process.pid, flush=True)
    session.run({"x": np.zeros((1, 4), np.float32)})
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_ends_with_the_one_that_started_it(how: signal.Signals) -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    parent = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.send_signal(how)
    begun = time.monotonic()
    try:
        parent.wait(30)
    finally:
        parent.kill()
    while alive(pid) and time.monotonic() - begun < 5:
        time.sleep(0.05)
    survived = alive(pid)
    if survived:
        os.kill(pid, signal.SIGKILL)
    assert not survived
    assert time.monotonic() - begun < 8, "nobody waits for what nobody reads"


def test_a_limit_that_passes_after_the_answer_changes_nothing() -> None:
    with Worker(CPU, 100) as worker:
        session = worker.open(network().models()[0], optimize=False)
        answered = threading.Event()
        answered.set()
        worker._too_late(answered)
        assert session.run(inputs())["out"].shape == (3, 5)
    with pytest.raises(UsageError, match="must be above 0"):
        Worker(CPU, 0)
