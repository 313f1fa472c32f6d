"""The examples of docs/pipelines, run as they stand: with good models, and with planted faults."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
import yaml
from nets import with_statistics
from sklearn.datasets import load_digits
from small_onnx import digits_onnx
from starlette.testclient import TestClient
from torch import nn

import bnfold
from bnfold import graph
from bnfold.cli import main
from bnfold.folding import plan
from bnfold.packs import signing
from bnfold.packs.pack import Pack
from bnfold.parser import build_parser
from bnfold.report.schema import read_runs
from tests.test_folded_adapt import moved

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "pipelines"
DIGIT = torch.zeros(1, 1, 8, 8)
# a batch norm with nothing around that could take it
STAYS = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.BatchNorm2d(4), nn.Sigmoid())


def example(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """net.onnx, its fold, and the keys."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "net.onnx").write_bytes(digits_onnx())
    assert main(["fold", str(folder / "net.onnx"), "--no-verify", "-q"]) == 0
    signing.generate(folder / "key.pem")
    signing.generate(folder / "other.pem")
    (folder / "foreign.onnx").write_bytes(digits_onnx(seed=7))
    return folder


# ----------------------------------------------------------------------------------- the service


@pytest.fixture(scope="module")
def packs(made):
    folder = made / "packs"
    folder.mkdir()
    original = graph.read_onnx(made / "net.onnx")
    for seed, name in ((1, "night"), (2, "rain")):
        pack = Pack.of(moved(original, seed), base=made / "net.onnx", data=f"data/{name}")
        pack.save(folder / f"{name}.pack", sign=made / "key.pem")
    pack.save(folder / "unsigned.pack")
    pack.save(folder / "stranger.pack", sign=made / "other.pem")
    foreign = Pack.of(moved(graph.read_onnx(made / "foreign.onnx")), base=made / "foreign.onnx")
    foreign.save(folder / "foreign.pack", sign=made / "key.pem")
    (folder / "damaged.pack").write_bytes((folder / "rain.pack").read_bytes()[:-5])
    return folder


@pytest.fixture
def service():
    return example("service")


@pytest.fixture
def client(service, made, packs):
    app = service.create(made / "net.folded.onnx", packs, made / "key.pub.pem")
    with TestClient(app) as client:
        yield client


def digits(rows=2, seed=0):
    return np.random.default_rng(seed).random((rows, 1, 8, 8)).astype(np.float32)


def predicted(client, images):
    answer = client.post("/predict", json={"inputs": {"x": images.tolist()}})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    (output,) = told["outputs"].values()
    return told["domain"], np.asarray(output, np.float32)


def test_the_service_answers_with_the_domain_that_it_names(client, made, packs):
    images = digits()
    assert client.get("/domains").json() == {
        "domains": ["damaged", "foreign", "night", "rain", "stranger", "unsigned"],
        "serving": None,
    }
    for domain in ("night", "rain", None, "night"):
        assert client.post("/swap", json={"domain": domain}).json() == {"serving": domain}
        assert client.get("/domains").json()["serving"] == domain
        own = bnfold.load(made / "net.folded.onnx", domain and packs / f"{domain}.pack")
        (expected,) = own.run({"x": images}).values()
        named, output = predicted(client, images)
        assert named == domain
        assert np.array_equal(output, expected)


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        ("unsigned", "is not signed"),
        ("stranger", "was not signed by the key"),
        ("foreign", "The pack was made for foreign.onnx"),
        ("damaged", "or is damaged"),
        ("dusk", "There is no domain 'dusk'"),
        ("../made/packs/night", "There is no domain"),
    ],
)
def test_the_service_refuses_a_pack_in_a_sentence_and_goes_on(client, domain, words):
    images = digits()
    assert client.post("/swap", json={"domain": "night"}).status_code == 200
    _, before = predicted(client, images)
    answer = client.post("/swap", json={"domain": domain})
    assert answer.status_code == 422
    assert words in answer.json()["error"]["message"]
    named, after = predicted(client, images)
    assert named == "night"
    assert np.array_equal(before, after)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": {"x": [[1.0, 2.0], [3.0]]}}, "is not an array"),
        ({"inputs": {"x": [["a"]]}}, "is not an array"),
        ({"inputs": {"x": [[1e300]]}}, "not finite"),
        ({"inputs": {"x": [[10**400]]}}, "is not an array"),
        ({"inputs": {"x": [[[[0.0] * 8] * 8]] * 65}}, "at most 64"),
        ({"inputs": {"x": [[[[0.0] * 7] * 8]]}}, "onnxruntime could not run the model"),
        ({"inputs": {"y": [[[[0.0] * 8] * 8]]}}, "onnxruntime could not run the model"),
    ],
)
def test_the_service_says_what_is_wrong_with_an_input(client, body, words):
    answer = client.post("/predict", json=body)
    assert answer.status_code == 422
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_outputs_that_are_no_numbers_are_a_sentence_too(client, monkeypatch, wrong):
    """JSON has no word for them: they would go out as nulls."""
    scores = np.zeros((2, 10), np.float32)
    scores[1, 3] = wrong
    monkeypatch.setattr(bnfold.Serving, "run", lambda *_: {"scores": scores})
    answer = client.post("/predict", json={"inputs": {"x": digits().tolist()}})
    assert answer.status_code == 422
    assert "'scores' would come out as NaN or infinity" in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [{}, {"inputs": {}}, {"inputs": 3}, {"inputs": {"x": 1}}, "no"])
def test_what_is_no_request_is_refused(client, body):
    assert client.post("/predict", json=body).status_code == 422
    assert client.post("/swap", json={"domain": 3}).status_code == 422


def test_a_request_ends_with_the_domain_that_it_began_with(client, service, monkeypatch):
    """A swap comes between the request and the run."""
    images, read = digits(), service.array_of
    client.post("/swap", json={"domain": "night"})
    _, night = predicted(client, images)

    def interrupted(name, rows):
        client.post("/swap", json={"domain": "rain"})
        return read(name, rows)

    monkeypatch.setattr(service, "array_of", interrupted)
    named, output = predicted(client, images)
    assert (named, np.array_equal(output, night)) == ("night", True)
    named, output = predicted(client, images)
    assert (named, np.array_equal(output, night)) == ("rain", False)


def test_every_answer_is_of_one_domain_while_domains_are_swapped(client, made, packs):
    images, right = digits(), {}
    for domain in (None, "night", "rain"):
        own = bnfold.load(made / "net.folded.onnx", domain and packs / f"{domain}.pack")
        (right[domain],) = own.run({"x": images}).values()
    stop, seen, wrong = threading.Event(), set(), []

    def ask():
        while not stop.is_set():
            domain, output = predicted(client, images)
            seen.add(domain)
            if not np.array_equal(output, right[domain]):
                wrong.append(domain)

    workers = [threading.Thread(target=ask) for _ in range(3)]
    for worker in workers:
        worker.start()
    for domain in ("night", "rain", None, "foreign") * 3:
        client.post("/swap", json={"domain": domain})
    stop.set()
    for worker in workers:
        worker.join()
    assert not wrong
    assert len(seen) > 1


# -------------------------------------------------------------------------------- the release


@pytest.fixture(scope="module")
def samples(made):
    """The digits, and what two domains and too few images make of them."""
    images = (load_digits().images[:, None] / 16).astype(np.float32)
    domains = {"night": images**2, "rain": 0.7 * images + 0.15, "few": images[:5] ** 2}
    for name, array in {"inputs": images[:8], **domains}.items():
        np.save(made / f"{name}.npy", array)
    return made


TRAINED = ROOT / "models" / "vgg7_renorm.pt"


def released(folder, out, *domains, model=TRAINED, data="inputs.npy", more=()):
    """The exit code of the release script; a domain: its name, or NAME=FILE."""
    named = [d if "=" in d else f"{d}={folder / d}.npy" for d in domains]
    options = ["--data", folder / data, "--key", folder / "key.pem", "-o", out]
    arguments = [model, *options, "--bench-seconds", 0.1, *(f"--domain={d}" for d in named), *more]
    return example("release").main([str(argument) for argument in arguments])


def test_a_release_is_complete(samples, tmp_path, capfd):
    out = tmp_path / "release"
    assert released(samples, out, "night", "rain") == 0
    assert capfd.readouterr() == ("", "")  # the API prints nothing
    there = ["model.onnx", "model.record.safetensors", "night.pack", "rain.pack"]
    assert sorted(p.name for p in out.iterdir()) == [*there, "release.html", "release.json"]
    assert list(tmp_path.iterdir()) == [out]
    assert not any(
        n.op_type == "BatchNormalization" for n in onnx.load(out / "model.onnx").graph.node
    )
    for name in ("night", "rain"):
        pack = bnfold.load_pack(out / f"{name}.pack", samples / "key.pub.pem")
        assert (pack.data, pack.images) == (name, 1797)
        service = bnfold.load(out / "model.onnx", out / f"{name}.pack")
        assert np.isfinite(next(iter(service.run({"x": digits()}).values()))).all()
    runs = read_runs(out / "release.json")  # as the schema has it
    assert [run["command"] for run in runs] == ["fold", "parity", "adapt", "adapt", "bench"]
    assert all(run["exit_code"] == 0 for run in runs)
    assert runs[4]["bench"]["rows"]
    paths = {file["path"] for run in runs for file in run["files"]}
    assert paths == {*there, TRAINED.name}
    assert all(run["files"] for run in runs)
    page = (out / "release.html").read_text()
    assert all(name in page for name in ("night", "rain", "model.onnx"))
    for place in (str(tmp_path), str(ROOT)):  # nothing of where it was made
        assert place not in page
        assert place not in (out / "release.json").read_text()


@pytest.fixture
def wrong_fold(monkeypatch):
    right = plan.FoldPlan.gauge

    def wrong(self, value):
        gauge = right(self, value)
        return type(gauge)(gauge.scale * 1.001, gauge.origin)

    monkeypatch.setattr(plan.FoldPlan, "gauge", wrong)


@pytest.mark.usefixtures("wrong_fold")
def test_a_release_that_a_gate_refuses_leaves_nothing(samples, tmp_path, capsys):
    assert released(samples, tmp_path / "release", "night") == 1
    assert "no release (E_GATE): Gate A" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_comes_late_and_fails_leaves_nothing_either(samples, tmp_path, capsys, monkeypatch):
    out = tmp_path / "release"
    assert released(samples, out, "few", more=["--strict"]) == 1  # of too few images: a warning
    assert "no release (E_WARNING): There is a warning: few: " in capsys.readouterr().err
    bnfold.export(with_statistics(STAYS), DIGIT, samples / "stays.onnx")
    assert released(samples, out, model=samples / "stays.onnx") == 1
    assert "no release (E_NOT_FOLDED)" in capsys.readouterr().err
    right = bnfold.bench

    def of_another(model, _folded, **options):
        return right(model, {"folded": samples / "foreign.onnx"}, **options)

    monkeypatch.setattr(bnfold, "bench", of_another, raising=False)
    assert released(samples, out) == 1
    assert "no release (E_GATE)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    assert released(samples, out) == 2  # what is there is not touched
    assert list(tmp_path.iterdir()) == [out]


def test_a_warning_stands_on_the_page(samples, tmp_path):
    out = tmp_path / "release"
    assert released(samples, out, "few") == 0
    (run,) = (r for r in read_runs(out / "release.json") if r["command"] == "adapt")
    assert run["warnings"]
    assert all(warning.startswith("few: ") for warning in run["warnings"])
    assert "Warnings" in (out / "release.html").read_text()


def no_release(capsys):
    """The one line that the script said."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no release (E_")
    return line


@pytest.fixture
def no_work(monkeypatch):
    """What is refused is refused before anything is folded."""
    monkeypatch.setattr(bnfold, "fold", None, raising=False)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("domain", "words"),
    [
        ("night", "write NAME=FILE"),
        ("night=", "write NAME=FILE"),
        ("night=missing.npy", "does not exist"),
        *((f"{name}=night.npy", "cannot name a domain") for name in ("", ".", "..", "-o", "CON")),
        *((f"{name}=night.npy", "cannot name a domain") for name in ("../evil", "/evil", "a\\b")),
        *((f"{name}=night.npy", "cannot name a domain") for name in ("model", "Release", "n" * 65)),
        ("Rain=night.npy", "already"),
    ],
)
def test_a_domain_is_checked_before_work(samples, tmp_path, capsys, monkeypatch, domain, words):
    monkeypatch.chdir(samples)
    out = tmp_path / "sub" / "release"
    out.parent.mkdir()
    more = ["--domain", "rain=rain.npy"] if "Rain" in domain else []
    code = released(samples, out, more=[*more, f"--domain={domain}"])
    assert code == (3 if "missing" in domain else 2)
    assert words in no_release(capsys)
    assert [path.name for path in tmp_path.rglob("*")] == ["sub"]


HOLES = np.full((4, 1, 8, 8), np.nan, np.float32)
HOLES[:2] = 0


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "no data that bnfold reads"),
        (b"x,y\n1,2\n", "no data that bnfold reads"),
        (b"\x93NUMPY\x01\x00", "cannot be read as a NumPy file"),
        (np.array([{"a": 1}, None]), "pickled Python objects"),
        (np.array(["a", "b"]), "samples lie along the first axis"),
        (np.zeros((4, 64), np.int64), "holds int64"),
        (np.zeros((0, 1, 8, 8), np.float32), "there must be one"),
        (HOLES, "Sample 2 of bad.npy holds NaN"),
    ],
)
def test_bad_data_are_a_sentence_before_work(samples, tmp_path, capsys, content, words):
    bad = tmp_path / "bad.npy"
    if isinstance(content, bytes):
        bad.write_bytes(content)
    elif content is not None:
        np.save(bad, content, allow_pickle=True)
    out = tmp_path / "release"
    assert released(samples, out, data=bad) == 3
    assert words in no_release(capsys)
    assert released(samples, out, f"night={bad}") == 3
    assert words in no_release(capsys)
    assert not out.exists()


def test_pixels_are_scaled(samples):
    """Bytes of 0 to 255 are what the network sees as 0 to 1."""
    pixels = np.random.default_rng(0).integers(0, 256, (130, 1, 8, 8)).astype(np.uint8)
    np.save(samples / "pixels.npy", pixels)
    read = example("release").read(samples / "pixels.npy")
    assert read.dtype == np.float32
    assert np.allclose(read, pixels / 255, rtol=0, atol=1e-7)  # in their order


def test_what_else_is_wrong_with_a_release_is_a_sentence(samples, tmp_path, capsys):
    assert released(samples, tmp_path / "no" / "release") == 2
    assert "is no folder" in no_release(capsys)
    assert released(samples, tmp_path / "release", model=tmp_path / "missing.onnx") == 3
    assert "missing.onnx" in no_release(capsys)
    two = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>'
        "two (float[N,4] a, float[N,4] b) => (float[N,4] y) { y = Add(a, b) }"
    )
    onnx.save(two, tmp_path / "two.onnx")
    assert released(samples, tmp_path / "release", model=tmp_path / "two.onnx") == 3
    assert "The inputs are a, b" in no_release(capsys)
    assert not (tmp_path / "release").exists()


# ------------------------------------------------------------------------------------ the CI job


class Job:
    """The job of ci_job.yml in a folder, as GitHub runs it: each step a `bash -e` of its own."""

    def __init__(self, folder):
        (job,) = yaml.safe_load((EXAMPLES / "ci_job.yml").read_text())["jobs"].values()
        self.folder, self.steps = folder, job["steps"]
        commands = folder / "bin"
        commands.mkdir()
        (commands / "bnfold").write_text(f'#!/bin/sh\nexec {sys.executable} -m bnfold "$@"\n')
        (commands / "bnfold").chmod(0o755)
        self.summary = folder / "summary.md"
        self.environment = {
            **os.environ,
            **job["env"],
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "GITHUB_STEP_SUMMARY": str(self.summary),
        }

    def run(self, start="Runtimes", **environment):
        """Run the steps from this one on; (the step that failed or None, what it said)."""
        failed, said = None, ""
        names = [step.get("name") for step in self.steps]
        for step in self.steps[names.index(start) :]:
            if "run" not in step or (failed and step.get("if") != "always()"):
                continue
            ran = subprocess.run(
                ["bash", "-e", "-c", step["run"]],
                cwd=self.folder,
                env={**self.environment, **environment},
                capture_output=True,
                text=True,
                timeout=120,
            )
            if ran.returncode and not failed:
                failed, said = step["name"], ran.stdout + ran.stderr
        return failed, said

    def kept(self, name):
        """Whether the files of an artifact are there."""
        (step,) = (s for s in self.steps if s.get("with", {}).get("name") == name)
        return [(self.folder / path).is_file() for path in step["with"]["path"].split()]


@pytest.fixture
def job(made, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "net.onnx").write_bytes((made / "net.onnx").read_bytes())
    return Job(tmp_path)


@pytest.mark.slow
def test_the_job_as_it_stands(job):
    assert job.run() == (None, "")
    assert "--runtime ort-cpu" in (job.folder / "runtimes.txt").read_text().splitlines()
    assert all(job.kept("model") + job.kept("reports"))


def test_the_job_keeps_a_proved_model_and_fails_on_one_that_was_changed(job):
    (job.folder / "reports").mkdir()  # from here on as the first step, which takes long, leaves it
    (job.folder / "runtimes.txt").write_text("--runtime ort-cpu\n")
    assert job.run("Fold") == (None, "")
    assert all(job.kept("model") + job.kept("reports"))
    told = json.loads((job.folder / "report.json").read_text())["runs"]
    assert [run["command"] for run in told] == ["fold", "verify"]
    assert {gate["gate"] for run in told for gate in run["gates"]} == {"A", "B", "C"}
    suites = ElementTree.parse(job.folder / "junit.xml").getroot()
    assert int(suites.get("tests")) > 0
    assert int(suites.get("failures")) == 0
    assert job.summary.read_text().count("# bnfold") == 2

    model = onnx.load(job.folder / "folded.onnx")
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    array = onnx.numpy_helper.to_array(weight).copy()
    array[0] *= 1.001
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, job.folder / "folded.onnx")
    failed, said = job.run("Verify")
    assert failed == "Verify"
    assert "NOT the same function" in said
    assert all(job.kept("reports"))
    suites = ElementTree.parse(job.folder / "junit.xml").getroot()
    assert int(suites.get("failures")) > 0


FAULTY_FOLD = """
from bnfold.folding import plan
right = plan.FoldPlan.gauge
def wrong(self, value):
    gauge = right(self, value)
    return type(gauge)(gauge.scale * 1.001, gauge.origin)
plan.FoldPlan.gauge = wrong
"""


def test_the_job_fails_where_it_cannot_read_what_loads(job):
    """Else it would prove the fold on fewer runtimes than there are, and be green."""
    (job.folder / "bin" / "bnfold").write_text('#!/bin/sh\necho "{}"\n')
    assert job.run()[0] == "Runtimes"


@pytest.mark.slow
def test_the_job_fails_at_the_step_that_finds_the_fault(job):
    (job.folder / "faulty").mkdir()
    (job.folder / "faulty" / "sitecustomize.py").write_text(FAULTY_FOLD)
    path = f"{job.folder / 'faulty'}{os.pathsep}{ROOT}"
    failed, said = job.run(PYTHONPATH=path)
    assert failed == "Fold"
    assert "No file was written" in said
    assert not any(job.kept("model"))
    assert all(job.kept("reports"))  # they say why
    assert "FAIL" in job.summary.read_text()
    assert job.run("Runtimes", REQUIRED="ort-cuda:tf33")[0] == "Runtimes"


@pytest.mark.slow
def test_the_job_fails_on_a_batch_norm_that_stays(job):
    bnfold.export(with_statistics(STAYS), DIGIT, job.folder / "models" / "net.onnx")
    failed, said = job.run()
    assert failed == "Fold"
    assert "All batch norms must fold, and 0 of 1 did." in said
    assert not any(job.kept("model"))


# ------------------------------------------------------------------------- what they stand upon


def test_results_are_frozen_and_say_whether_they_passed():
    public = [getattr(bnfold, name) for name in bnfold.__all__]
    results = [item for item in public if dataclasses.is_dataclass(item)]
    assert {r.__name__ for r in results} >= {"FoldResult", "VerifyReport", "BenchReport", "Pack"}
    for result in results:
        assert result.__dataclass_params__.frozen, result
    for report in (bnfold.VerifyReport, bnfold.BenchReport):
        assert callable(report.raise_for_failure)
        assert callable(report.to_dict)


def test_the_page_is_true(made, tmp_path, monkeypatch):
    page = (EXAMPLES / "README.md").read_text()
    shutil.copy(made / "net.onnx", tmp_path)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    for name in ("release.onnx", "release.record.safetensors", "release.html"):
        assert (tmp_path / name).is_file()
    (line,) = re.findall(r"^bnfold (.*?) > ", page, flags=re.MULTILINE)
    build_parser().parse_args(line.split())
    named = set(re.findall(r"\]\((\w+\.\w+)\)", page))
    assert named == {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}


def test_the_package_says_that_it_is_typed():
    assert (Path(bnfold.__file__).parent / "py.typed").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["release", "service"])
def test_the_examples_are_typed_as_their_users_would_be(name):
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(EXAMPLES / f"{name}.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
