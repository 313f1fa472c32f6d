"""The examples of docs/pipelines, run as they stand: with good models, and with planted faults."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import with_statistics
from starlette.testclient import TestClient

import bnfold
from bnfold import graph
from bnfold.cli import main
from bnfold.packs import signing
from bnfold.packs.pack import Pack
from models.digits import digits_cnn
from tests.test_folded_adapt import moved

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "pipelines"
DIGIT = torch.zeros(1, 1, 8, 8)


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
    network = with_statistics(digits_cnn(), positive=True)
    bnfold.export(network, DIGIT, folder / "net.onnx")
    assert main(["fold", str(folder / "net.onnx"), "--no-verify", "-q"]) == 0
    signing.generate(folder / "key.pem")
    signing.generate(folder / "other.pem")
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
    bnfold.export(with_statistics(digits_cnn(), seed=7), DIGIT, made / "foreign.onnx")
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
        ({"inputs": {"x": [[[[0.0] * 8] * 8]] * 65}}, "at most 64"),
        ({"inputs": {"x": [[[[0.0] * 7] * 8]]}}, "onnxruntime could not run the model"),
        ({"inputs": {"y": [[[[0.0] * 8] * 8]]}}, "onnxruntime could not run the model"),
    ],
)
def test_the_service_says_what_is_wrong_with_an_input(client, body, words):
    answer = client.post("/predict", json=body)
    assert answer.status_code == 422
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [{}, {"inputs": {}}, {"inputs": 3}, {"inputs": {"x": 1}}, "no"])
def test_what_is_no_request_is_refused(client, body):
    assert client.post("/predict", json=body).status_code == 422
    assert client.post("/swap", json={"domain": 3}).status_code == 422


def test_a_request_ends_with_the_domain_that_it_began_with(client, service, made, monkeypatch):
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
