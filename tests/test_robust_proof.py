"""The proof's verbs on what they did not expect: never a wrong verdict, then never a traceback.

First pairs of models that look alike to a careless check, then broken and hostile files, then what
the machine around does: signals, closed pipes, other locales.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import limited_work
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import bnfold
from bnfold import limits
from bnfold.cli import main
from bnfold.errors import InputError, LimitError, NothingComparedError, UsageError

ROOT = Path(__file__).resolve().parent.parent
FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(0)
W, OTHER = (RNG.standard_normal((6, 4, 3, 3)).astype(np.float32) for _ in range(2))
BIAS = RNG.standard_normal(6).astype(np.float32)
X = ("x", FLOAT, ["N", 4, 8, 8])


def network(text, *outputs, inputs=(X,), **weights):
    """A model of lines such as `y = Conv(x, W) pads=[1,1,1,1]`; outputs: (name, type) or name."""
    nodes = []
    for line in text.split(";"):
        left, right = line.split("=", 1)
        operator, rest = right.split("(", 1)
        names, options = rest.split(")", 1)
        attributes = dict(option.split("=") for option in options.split())
        nodes.append(
            helper.make_node(
                operator.strip(),
                [name.strip() for name in names.split(",")],
                [name.strip() for name in left.split(",")],
                **{key: json.loads(value) for key, value in attributes.items()},
            )
        )
    typed = [(o, FLOAT) if isinstance(o, str) else o for o in outputs or ("y",)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in typed],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


def saved(path, text, *outputs, **options):
    """A model in a file, which has to say how many axes its outputs have."""
    model = network(text, *outputs, **options)
    for value in model.graph.output:
        shape = ["a", "b", "c", "d"]
        value.CopyFrom(
            helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, shape)
        )
    onnx.save(model, path)
    return path


CONV = "y = Conv(x, W) pads=[1,1,1,1]"
PLAIN = network(CONV, W=W)
AB = [("a", FLOAT, ["N", 4]), ("b", FLOAT, ["N", 4])]
TWO = network(f"{CONV}; z = Relu(y)", "y", "z", W=W)


def heads(scores, size=1e4):
    """Boxes in pixels and scores in 0..1 as one output, as detectors have it."""
    return network(
        "p = Conv(x, W) pads=[1,1,1,1]; q = Mul(p, s); c = Conv(x, V) pads=[1,1,1,1];"
        " d = Sigmoid(c); y = Concat(q, d) axis=1",
        W=W,
        V=scores,
        s=np.float32(size),
    )


def hidden(first, second):
    return network("c = Conv(x, W) pads=[1,1,1,1]; r = Relu(c); y = Conv(r, V)", W=first, V=second)


V = RNG.standard_normal((2, 6, 1, 1)).astype(np.float32)
ORDER = np.array([1, 0, 2, 3, 4, 5])
BATCH = "c = Conv(x, W); m = ReduceMean(c) axes=[0] keepdims=1; k = Mul(m, s); y = Sub(c, k)"

# name: (original, other, words of the first failure)
DIFFERENT = {
    "a small head of a large output": (heads(OTHER), heads(OTHER * np.float32(1.01)), "of axis 1"),
    "inputs exchanged, names kept": (
        network("y = Sub(a, b)", inputs=AB),
        network("y = Sub(b, a)", inputs=AB[::-1]),
        "times the original's",
    ),
    "inputs renamed": (
        network("y = Sub(a, b)", inputs=AB),
        network("y = Sub(p, q)", inputs=[("p", FLOAT, ["N", 4]), ("q", FLOAT, ["N", 4])]),
        "the folded model has the inputs p, q; the original has a, b",
    ),
    "an input that is not read": (
        network("y = Sub(a, b)", inputs=AB),
        network("y = Identity(a)", inputs=AB),
        "times the original's",
    ),
    "outputs in another order": (
        TWO,
        network(f"{CONV}; z = Relu(y)", "z", "y", W=W),
        "in another order",
    ),
    "outputs under each other's names": (
        TWO,
        network("z = Conv(x, W) pads=[1,1,1,1]; y = Relu(z)", "y", "z", W=W),
        "times the original's",
    ),
    "outputs renamed": (PLAIN, network(CONV.replace("y", "out"), "out", W=W), "the outputs out"),
    "an output more": (PLAIN, TWO, "the outputs y, z"),
    "an output less": (TWO, PLAIN, "the outputs y; the original has y, z"),
    "doubles": (
        PLAIN,
        network(f"{CONV.replace('y', 't')}; y = Cast(t) to=11", ("y", TensorProto.DOUBLE), W=W),
        "its type is float64",
    ),
    "other integers": (
        network(f"{CONV.replace('y', 't')}; y = ArgMax(t) axis=1", ("y", TensorProto.INT64), W=W),
        network(
            f"{CONV.replace('y', 't')}; u = ArgMax(t) axis=1; y = Cast(u) to=6",
            ("y", TensorProto.INT32),
            W=W,
        ),
        "its type is int32",
    ),
    "a batch size that is fixed": (
        PLAIN,
        network(CONV, inputs=[("x", FLOAT, [1, 4, 8, 8])], W=W),
        "invalid dimensions",
    ),
    "an image size that is fixed": (
        network(CONV, inputs=[("x", FLOAT, ["N", 4, "h", "w"])], W=W),
        network(CONV, inputs=[("x", FLOAT, ["N", 4, 224, 224])], W=W),
        "invalid dimensions",
    ),
    "a batch that is read as one": (
        network(BATCH, W=W, s=np.float32(0)),
        network(BATCH, W=W, s=np.float32(1)),
        "times the original's",
    ),
    "hidden channels exchanged on one side": (
        hidden(W, V),
        hidden(W[ORDER], V),
        "times the original's",
    ),
    "a saturated output": (
        network("t = Conv(x, W); u = Mul(t, s); y = Sigmoid(u)", W=W, s=np.float32(1e4)),
        network(
            "t = Conv(x, W); u = Mul(t, s); y = Sigmoid(u)",
            W=W * np.float32(1.01),
            s=np.float32(1e4),
        ),
        "times the original's",
    ),
    "NaN weights": (PLAIN, network(CONV, W=np.full_like(W, np.nan)), "NaN or infinite"),
    "NaN in the original": (network(CONV, W=np.full_like(W, np.nan)), PLAIN, "NaN or infinite"),
    "weights of float16": (
        PLAIN,
        network(CONV, W=W.astype(np.float16).astype(np.float32)),
        "times the",
    ),
}


@functools.cache
def verified(name):
    original, other, _ = DIFFERENT[name]
    return bnfold.verify(original, other)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_never_passes(name):
    report, words = verified(name), DIFFERENT[name][2]
    assert not report.passed
    assert any(words in failure.sentence for failure in report.failures)
    with pytest.raises(bnfold.VerificationError):
        report.raise_for_failure()


SAME = {
    "inputs listed in another order": (
        network("y = Sub(a, b)", inputs=AB),
        network("y = Sub(a, b)", inputs=AB[::-1]),
    ),
    "hidden channels in another order": (hidden(W, V), hidden(W[ORDER], V[:, ORDER])),
    "a fixed batch made free": (network(CONV, inputs=[("x", FLOAT, [1, 4, 8, 8])], W=W), PLAIN),
    "a small head of a large output": (heads(OTHER), heads(OTHER)),
    "NaN in one channel": tuple(
        network(CONV, W=np.concatenate([np.full_like(W[:1], np.nan), W[1:]])) for _ in "ab"
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_the_same_passes(name):
    report = bnfold.verify(*SAME[name])
    assert report.passed, report.failures
    assert report.warnings == () or "NaN" in name  # that both have it may be told


@pytest.mark.parametrize(
    "text", ["t = Mul(x, z); y = Conv(t, W, b)", "t = Conv(x, W, c); r = Relu(t); y = Mul(r, r)"]
)
def test_a_pass_that_saw_nothing_is_warned_of(text, tmp_path, capsys):
    held = {"z": np.float32(0), "b": BIAS, "c": np.full(6, -1e4, np.float32)}
    used = {name: array for name, array in held.items() if f" {name})" in text}
    for name, weights in (("a", W), ("b", OTHER)):
        saved(tmp_path / f"{name}.onnx", text, W=weights, **used)
    report = bnfold.verify(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert "was the same for every row" in report.warnings[0]
    code = main(["verify", str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx"), "--strict", "-q"])
    assert (code, "--strict takes a warning" in capsys.readouterr().out) == (1, True)


def test_an_input_that_is_no_longer_taken_is_told():
    weight = ("W", FLOAT, [6, 4, 3, 3])
    report = bnfold.verify(network(CONV, inputs=[X, weight], W=W), PLAIN)
    assert report.passed
    assert "no longer takes 'W' as an input" in report.notes[0]


@pytest.mark.parametrize("name", DIFFERENT)
def test_networks_that_differ_are_not_said_to_agree(name):
    assert not any("agree" in note for note in verified(name).notes)


def test_where_nothing_can_be_compared_nothing_passes():
    nothing = network(CONV, W=W)
    del nothing.graph.output[:]
    with pytest.raises(NothingComparedError, match="no outputs"):
        bnfold.verify(nothing, PLAIN)
    assert not bnfold.verify(PLAIN, nothing).passed
    broken = network(CONV, W=np.full_like(W, np.nan))
    with pytest.raises(NothingComparedError, match="NaN or infinite"):
        bnfold.verify(broken, broken)
    with pytest.raises(NothingComparedError, match="no rows"):
        bnfold.verify(PLAIN, PLAIN, {"x": np.zeros((0, 4, 8, 8), np.float32)})


BYTES = network(
    "f = Cast(x) to=1; y = Conv(f, W)", inputs=[("x", TensorProto.UINT8, ["N", 4, 8, 8])], W=W
)


@pytest.mark.parametrize(
    ("model", "array", "words"),
    [
        (PLAIN, np.zeros((2, 3, 8, 8), np.float32), "has shape"),
        (PLAIN, np.zeros((2, 4), np.float32), "axes"),
        (PLAIN, np.zeros((2, 4, 8, 8), complex), "complex128"),
        (PLAIN, np.full((2, 4, 8, 8), "a"), "<U1"),
        (PLAIN, np.full((2, 4, 8, 8), 1e300), "numbers that are none of that type"),
        (BYTES, np.full((2, 4, 8, 8), 0.5, np.float32), "numbers that are none of that type"),
        (BYTES, np.full((2, 4, 8, 8), 300), "numbers that are none of that type"),
    ],
)
def test_data_of_another_kind_are_refused(model, array, words):
    with pytest.raises(InputError, match=words):
        bnfold.verify(model, model, {"x": array})


def test_the_call_itself_is_checked():
    with pytest.raises(UsageError, match="seed"):
        bnfold.verify(PLAIN, PLAIN, seed=-1)
    with pytest.raises(UsageError, match="ort-cpu"):
        bnfold.verify(PLAIN, PLAIN, runtimes=["ort-cpux"])
    with pytest.raises(InputError, match="inputs are x"):
        bnfold.verify(PLAIN, PLAIN, {"z": np.zeros((2, 4, 8, 8), np.float32)})
    for data in (b"", b"abc"):
        with pytest.raises(bnfold.BnfoldError):
            bnfold.verify(data, PLAIN)


# ------------------------------------------------------------------------ broken and hostile files


@pytest.fixture
def net(tmp_path):
    """Two equal models with names of their own."""
    model = network(CONV, W=W)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", FLOAT, ["N", 6, 8, 8]))
    for name in ("a.onnx", "b.onnx"):
        onnx.save(model, tmp_path / name)
    return tmp_path


def told(capsys, *arguments):
    """The exit code and the error of a run that is refused: one document, and a sentence."""
    code = main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert error["exit_code"] == code
    assert "Traceback" not in err
    return code, error["message"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
BROKEN = {
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda _: b"",
    "noise": lambda data: np.random.default_rng(1).bytes(len(data)),
    "a pointer of Git LFS": lambda _: POINTER,
    "a web page": lambda _: b"<!DOCTYPE html><html>404</html>",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_a_sentence_in_every_verb(net, name, capsys):
    (net / "broken.onnx").write_bytes(BROKEN[name]((net / "a.onnx").read_bytes()))
    runs = [
        ("verify", net / "broken.onnx", net / "a.onnx"),
        ("verify", net / "a.onnx", net / "broken.onnx"),
        ("parity", net / "broken.onnx"),
        ("bench", net / "a.onnx", net / "broken.onnx"),
    ]
    for arguments in runs:
        code, message = told(capsys, *arguments)
        assert code == 3, arguments
        assert "broken.onnx" in message


def test_a_model_that_asks_for_all_memory_is_a_sentence(net, capsys):
    shape = np.array([1 << 20, 1 << 20], np.int64)
    text = "b = ConstantOfShape(s); r = ReduceSum(b) keepdims=0; q = Add(x, r); y = Conv(q, W)"
    path = saved(net / "huge.onnx", text, s=shape, W=W)
    code, message = told(capsys, "verify", path, path)
    assert code in (3, 4)
    assert "memory" in message
    code, message = told(capsys, "parity", path)
    assert code in (3, 4)


def endless(path):
    """A Loop of 2^60 rounds."""
    scalar = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["c"], ["d"]),
            helper.make_node("Add", ["v", "one"], ["w"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            scalar,
            helper.make_tensor_value_info("v", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", FLOAT, None),
        ],
    )
    model = network(CONV, one=np.float32(1), m=np.int64(1 << 60), t=np.bool_(True), W=W)
    model.graph.node[0].input[0] = "u"
    model.graph.node.insert(0, helper.make_node("Loop", ["m", "t", "x"], ["u"], body=body))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", FLOAT, ["N", 6, "c", "d"]))
    onnx.save(model, path)
    return path


def bnfold_in(*arguments, environment=None, **options):
    """A run in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "bnfold", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        timeout=100,
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["verify", "fold", "parity", "bench"])
def test_a_model_that_computes_for_ever_is_ended_in_every_verb(net, verb):
    path = endless(net / "endless.onnx")
    models = [path, path] if verb == "verify" else [path]
    ran = bnfold_in(verb, *models, "--timeout", 6, "--json")
    assert ran.returncode == 4
    assert json.loads(ran.stdout)["error"]["code"] == "E_TIMEOUT"
    assert sorted(p.name for p in net.iterdir()) == ["a.onnx", "b.onnx", "endless.onnx"]


@pytest.mark.slow
def test_a_runtimes_own_process_ends_with_the_time_limit(net):
    path = str(endless(net / "endless.onnx"))
    with pytest.raises(LimitError, match="within 10 seconds"):
        limits.within(10, functools.partial(limited_work.computing, net, path))
    assert limited_work.ends(int((net / "child").read_text()))


def test_data_files_that_are_none(net, capsys):
    np.savez(net / "two.npz", a=np.zeros(3), b=np.zeros(3))
    np.save(net / "shape.npy", np.zeros((3, 5, 5), np.float32))
    np.save(net / "empty.npy", np.zeros((0, 4, 8, 8), np.float32))
    np.save(net / "object.npy", np.array([{}], object), allow_pickle=True)
    (net / "noise.npy").write_bytes(b"\x93NUMPY" + bytes(40))
    (net / "noise.npz").write_bytes(b"PK\x03\x04" + bytes(40))
    for name, codes in (
        ("two.npz", {2, 3}),
        ("shape.npy", {2, 3}),
        ("empty.npy", {2, 3, 5}),
        ("object.npy", {3}),
        ("noise.npy", {3}),
        ("noise.npz", {3}),
        ("none.npy", {2, 3}),
    ):
        code, message = told(capsys, "verify", net / "a.onnx", net / "b.onnx", "--data", net / name)
        assert code in codes, name
        assert name in message or "input" in message or "sample" in message, message


def test_reports_that_are_none(net, capsys):
    folder = net / "folder"
    folder.mkdir()
    deep = "[" * 100_000 + "]" * 100_000
    for name, text in (("deep", deep), ("list", "[1]"), ("empty", ""), ("future", '{"schema": 9}')):
        (net / f"{name}.json").write_text(text)
        code, message = told(capsys, "report", net / f"{name}.json", "-o", net / "page.html")
        assert code == 3, name
        assert f"{name}.json" in message
    with (net / "huge.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    assert told(capsys, "report", net / "huge.json", "-o", net / "page.html")[0] == 3
    (net / "bytes.json").write_bytes(b"\xff\xfe{}")
    assert told(capsys, "report", net / "bytes.json", "-o", net / "page.html")[0] == 3
    assert not (net / "page.html").exists()


@pytest.mark.parametrize("target", ["folder.html", "none/r.html", "a.onnx", "b.onnx", "r.pdf"])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(net, target, capsys):
    (net / "folder.html").mkdir()
    before = (net / "a.onnx").read_bytes()
    code, message = told(capsys, "verify", net / "a.onnx", net / "b.onnx", "--report", net / target)
    assert code == 2
    assert target.split("/")[0] in message
    assert (net / "a.onnx").read_bytes() == before


# --------------------------------------------------------------------- what the machine around does


def test_an_interrupt_ends_a_verification_at_once(net):
    path = endless(net / "endless.onnx")
    running = subprocess.Popen(
        [sys.executable, "-m", "bnfold", "verify", str(path), str(path), "--timeout", "60"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    time.sleep(4)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=20)
    assert (running.returncode, out) == (130, b"")
    assert err == b"bnfold: interrupted.\n"


@pytest.mark.slow
def test_a_reader_that_goes_away_changes_nothing(net):
    command = f"{sys.executable} -m bnfold verify a.onnx b.onnx --report r.json"
    ran = subprocess.run(
        ["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}"],
        cwd=net,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.stdout.strip(), ran.stderr) == ("0", "")
    assert json.loads((net / "r.json").read_text())["exit_code"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONWARNINGS": "error"},
        {"PYTHONOPTIMIZE": "1"},
        {"HOME": "/nonexistent", "TMPDIR": "/tmp"},
    ],
    ids=["ascii", "warnings", "optimized", "homeless"],
)
def test_other_surroundings(net, environment):
    """With a name that no ASCII terminal can show."""
    model = saved(net / "c.onnx", CONV.replace("y", "größe"), "größe", W=W)
    ran = bnfold_in(
        "verify", model, model, "-v", "--report", net / "r.html", environment=environment
    )
    assert ran.returncode == 0, ran.stderr.decode()
    assert b"Proved by gates" in ran.stdout
    ran = bnfold_in("parity", model, "--json", environment=environment)
    assert ran.returncode == 0, ran.stderr.decode()
    assert json.loads(ran.stdout)["exit_code"] == 0
