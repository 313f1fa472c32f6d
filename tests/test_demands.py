"""What a pipeline asks for beyond the gates, and the codes under which it learns what failed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import limited_work
import pytest
from small_onnx import digits_onnx

from bnfold import errors, limits
from bnfold.cli import main
from bnfold.commands import folding
from bnfold.errors import LimitError

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "pipelines" / "README.md"


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.onnx").write_bytes(digits_onnx())
    return tmp_path / "net.onnx"


def run(capsys, *arguments):
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def files(path):
    return sorted(file.name for file in path.parent.iterdir())


@pytest.mark.parametrize("verb", [("fold",), ("fold", "--dry-run"), ("inspect",)])
def test_require_fold_counts_what_folds(net, capsys, verb):
    for wanted in ("all", 4, 1):
        code, done = run(capsys, *verb, net, "--require-fold", wanted)
        assert (code, "error" in done) == (0, False)
        for path in net.parent.glob("net.folded*"):
            path.unlink()
    code, done = run(capsys, *verb, net, "--require-fold", 5)
    assert code == done["exit_code"] == done["error"]["exit_code"] == 1
    assert done["error"]["code"] == "E_NOT_FOLDED"
    assert "At least 5 must fold, and 4 of 4 did." in done["summary"]
    assert len(done["batch_norms"]["folded"]) == 4  # the whole report is there
    assert files(net) == ["net.onnx"]


def test_require_fold_all_wants_none_to_stay(net, capsys):
    code, done = run(capsys, "fold", net, "--keep", "*1*", "--require-fold", "all")
    assert code == 1
    kept = len(done["batch_norms"]["kept"])
    assert 0 < kept < 4
    assert f"{4 - kept} of 4 did" in done["error"]["message"]
    assert files(net) == ["net.onnx"]
    assert run(capsys, "fold", net, "--keep", "*1*", "--require-fold", 4 - kept)[0] == 0


@pytest.mark.parametrize("wanted", ["0", "some", "-1", "1.5"])
def test_what_is_no_number_of_batch_norms_is_wrong_usage(net, capsys, wanted):
    code, done = run(capsys, "fold", net, f"--require-fold={wanted}")
    assert (code, done["error"]["code"]) == (2, "E_USAGE")
    assert "is no number of batch norms, nor all" in done["error"]["message"]


def test_strict_takes_a_warning_for_a_failure_and_writes_nothing(net, capsys, monkeypatch):
    warn = "Gate A, the algebra, was not checked"
    real = folding.add_proof

    def warned(done, proof, **options):
        real(done, proof, **options)
        done["warnings"] = [warn, "another"]

    monkeypatch.setattr(folding, "add_proof", warned)
    code, done = run(capsys, "fold", net, "--strict")
    assert (code, done["error"]["code"]) == (1, "E_WARNING")
    assert (
        done["error"]["message"] == f"--strict takes a warning for a failure (and 1 more): {warn}"
    )
    assert files(net) == ["net.onnx"]
    assert run(capsys, "fold", net)[0] == 0  # without it, a warning is a warning


def test_a_failed_gate_has_its_code_in_the_report(net, capsys):
    assert main(["fold", str(net), "-q"]) == 0
    capsys.readouterr()
    net.with_name("other.onnx").write_bytes(digits_onnx(seed=7))
    code, done = run(
        capsys, "verify", net.with_name("other.onnx"), net.with_name("net.folded.onnx")
    )
    assert (code, done["exit_code"]) == (1, 1)
    assert done["error"]["code"] == "E_GATE"
    assert done["error"]["message"] == done["summary"]
    assert "bnfold verify" in done["error"]["hint"]


def test_a_failure_is_one_document_with_its_code(net, capsys):
    for arguments, name, code in (
        (("fold", net, "--nonsense"), "E_USAGE", 2),
        (("fold", net.with_name("no.onnx")), "E_INPUT", 3),
    ):
        got, done = run(capsys, *arguments)
        assert set(done["error"]) == {"type", "code", "message", "hint", "exit_code"}
        assert (got, done["error"]["exit_code"], done["error"]["code"]) == (code, code, name)


def test_the_page_lists_every_code_that_there_is():
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    rows = re.findall(r"^\| `(E_\w+)` \| (\d+) \|", PAGE.read_text(), re.MULTILINE)
    page = {code: int(exit_code) for code, exit_code in rows}
    assert len(page) == len(rows)
    assert {c.code: c.exit_code for c in classes}.items() <= page.items()
    written = [path.read_text() for path in (ROOT / "bnfold").rglob("*.py")]
    assert {code for text in written for code in re.findall(r'"(E_[A-Z_]+)"', text)} == set(page)


# ------------------------------------------------------------------------------- the time limit


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "GRACE", 0.1)
    with pytest.raises(LimitError, match="within 5 seconds") as caught:
        limits.within(5, partial(limited_work.endless, tmp_path))
    assert (caught.value.code, caught.value.exit_code) == ("E_TIMEOUT", 4)
    assert limited_work.ends(int((tmp_path / "child").read_text()))
    assert not Path((tmp_path / "temporary").read_text()).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_nothing_goes_on_where_the_waiting_process_is_killed(tmp_path):
    code = "import sys, pathlib, limited_work; limited_work.waiting(pathlib.Path(sys.argv[1]))"
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    waiting = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}
    )
    told = tmp_path / "parent"
    until = time.monotonic() + 30
    while not (told.exists() and told.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    waiting.kill()
    waiting.wait()
    process = int(told.read_text())
    assert limited_work.ends(process)
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)  # not bnfold's own


@pytest.mark.parametrize(
    ("which", "code", "words"),
    [(signal.SIGKILL, "E_MEMORY", "memory runs out"), (signal.SIGSEGV, "E_CRASH", "SIGSEGV")],
)
def test_what_was_ended_from_outside_is_a_sentence(which, code, words):
    with pytest.raises(LimitError, match=words) as caught:
        limits.within(30, partial(limited_work.ended_by, which))
    assert caught.value.code == code


def test_what_ends_in_time_keeps_its_exit_code():
    assert limits.within(30, partial(limited_work.code_of, 3)) == 3


def test_a_verb_under_a_time_limit(net):
    def bnfold_in(*arguments):
        command = [sys.executable, "-m", "bnfold", *map(str, arguments), "--json"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    ran = bnfold_in("fold", net, "--timeout", 50)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout)["command"] == "fold"
    page = net.with_name("r.json")
    late = bnfold_in("fold", net, "--overwrite", "--timeout", 0.01, "--report", page)
    assert late.returncode == 4
    assert json.loads(late.stdout)["error"]["code"] == "E_TIMEOUT"
    assert json.loads(page.read_text()) == json.loads(late.stdout)
    assert bnfold_in("fold", net, "--timeout", 0).returncode == 2
    assert not [name for name in files(net) if name.startswith(".")]
