"""A running service: packs swapped while it serves, the outputs those of the file of each."""

from __future__ import annotations

import threading

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from nets import with_statistics

import bnfold
from bnfold import graph
from bnfold.adapting.base import open_base
from bnfold.cli import main
from bnfold.errors import InputError, RuntimeUnavailableError, UsageError
from bnfold.packs import deployment, signing
from bnfold.packs.deployment import halves, load
from bnfold.packs.pack import Pack
from bnfold.packs.shortcut import shortcut_of
from bnfold.proof.places import runtime
from models.digits import digits_cnn
from models.preact_resnet import PreActResNet
from models.resnet_cifar import ResNetCifar
from tests.law_models import Law, build
from tests.test_folded_adapt import moved

SHAPES = {"digits": (1, 1, 8, 8), "resnet": (1, 3, 8, 8), "preact": (1, 3, 8, 8)}
NETWORKS = {
    "digits": digits_cnn,
    "resnet": lambda: ResNetCifar(1, 10, 3, 16),
    "preact": lambda: PreActResNet((2,), (8,), 10, 3),
}


@pytest.fixture(scope="module", params=NETWORKS)
def net(request, tmp_path_factory):
    """name.onnx, name.folded.onnx with its record, and two packs."""
    folder = tmp_path_factory.mktemp("nets")
    torch.manual_seed(0)
    module = with_statistics(NETWORKS[request.param](), positive=request.param == "preact")
    bnfold.export(module, torch.zeros(SHAPES[request.param]), folder / "net.onnx")
    assert main(["fold", str(folder / "net.onnx"), "--no-verify", "-q"]) == 0
    for seed, name in ((1, "sun"), (2, "rain")):
        statistics = moved(graph.read_onnx(folder / "net.onnx"), seed)
        Pack.of(statistics, base=folder / "net.onnx", data=name).save(folder / f"{name}.pack")
    return folder


def feeds(path, batch=5, seed=0):
    held = onnx.load(path).graph.input[0]
    sizes = [d.dim_value or batch for d in held.type.tensor_type.shape.dim]
    sizes[0] = batch
    return {held.name: np.random.default_rng(seed).standard_normal(sizes).astype(np.float32)}


def by_onnxruntime(model, inputs):
    """What onnxruntime with its default optimization computes of a model's own file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = model if isinstance(model, bytes) else graph.to_bytes(model)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def same(outputs, expected):
    return all(np.array_equal(a, b) for a, b in zip(outputs.values(), expected, strict=True))


@pytest.mark.parametrize("base", ["net.onnx", "net.folded.onnx"])
def test_the_outputs_are_those_of_the_adapted_file_bit_for_bit(net, base):
    inputs, path = feeds(net / base), net / base
    before = {file.name: file.read_bytes() for file in net.iterdir()}
    service = load(path, threads=1)
    assert service.pack is None
    own = by_onnxruntime(path.read_bytes(), inputs)
    assert same(service.run(inputs), own)
    for name in ("sun", "rain", "sun"):
        service.swap(net / f"{name}.pack")
        assert service.pack.data == name
        expected = by_onnxruntime(service.pack.apply(path), inputs)
        assert same(service.run(inputs), expected)
        assert not same(service.run(inputs), own)
    service.swap(None)
    assert same(service.run(inputs), own)
    assert service.session.providers == ("CPUExecutionProvider",)
    assert {file.name: file.read_bytes() for file in net.iterdir()} == before


def test_without_the_shortcut_the_outputs_are_the_same(net, monkeypatch):
    inputs, path = feeds(net / "net.onnx"), net / "net.folded.onnx"
    quick = load(path, net / "rain.pack", threads=1)
    monkeypatch.setattr(deployment, "shortcut_of", lambda _back, _weights: None)
    planned = load(path, net / "rain.pack", threads=1)
    assert same(quick.run(inputs), planned.run(inputs).values())


def test_the_shortcut_gives_the_bits_of_the_fold(net):
    """For the folds that have it: batch norms into the layer ahead. The others have none."""
    base = open_base(net / "net.folded.onnx")
    _, weights = halves(base.back.folded)
    made = shortcut_of(base.back, weights)
    ahead = len(base.back.record.gauges) == len(base.back.record.norms)
    assert (made is not None) == ahead
    if made is not None:
        statistics = Pack.of(moved(base.graph), base=base).statistics  # as float32 holds them
        new = made.weights(statistics)
        _, expected = halves(base.adapted(statistics).fold.graph)
        assert len(new) == 2 * len(statistics)
        for name, array in expected.items():
            assert np.array_equal(new.get(name, weights[name]), array), name


def test_a_shortcut_is_not_taken_where_the_file_is_not_what_it_computes(net):
    base = open_base(net / "net.folded.onnx")
    _, weights = halves(base.back.folded)
    if shortcut_of(base.back, weights) is None:
        pytest.skip("no shortcut to refuse")
    name = next(n for n, array in weights.items() if array.ndim == 4)
    changed = weights[name].copy()
    changed.reshape(-1)[7] = np.nextafter(changed.reshape(-1)[7], np.float32(9))
    assert shortcut_of(base.back, {**weights, name: changed}) is None


def test_onnxruntimes_own_overriding_would_give_the_base(net):
    """Why the weights enter otherwise: behind its fusions `add_initializer` changes nothing."""
    inputs, path = feeds(net / "net.onnx"), net / "net.onnx"
    statistics = moved(graph.read_onnx(path), 1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, held = 1, []
    for name, new in statistics.items():
        for what, array in (("mean", new.mean), ("var", new.var)):
            held.append(onnxruntime.OrtValue.ortvalue_from_numpy(array.astype(np.float32)))
            options.add_initializer(f"{name}.running_{what}", held[-1])
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wrong = session.run(None, inputs)
    right = load(path, net / "sun.pack", threads=1).run(inputs)
    assert not same(right, wrong)


def test_the_last_packs_stay_ready(net, monkeypatch):
    service = load(net / "net.onnx", keep=2, threads=1)
    opened = []
    real = deployment.open_with_weights
    monkeypatch.setattr(
        deployment, "open_with_weights", lambda *a, **k: opened.append(1) or real(*a, **k)
    )
    for pack, count in (("sun", 1), ("rain", 2), ("sun", 2), ("rain", 2), (None, 3), ("rain", 3)):
        service.swap(None if pack is None else net / f"{pack}.pack")
        assert len(opened) == count
    service.swap(net / "sun.pack")
    assert len(opened) == 4  # it was the one not used longest


def test_threads_run_while_packs_are_swapped(net):
    """Every output is one of the three there are: never of half a pack."""
    inputs, path = feeds(net / "net.onnx", batch=2), net / "net.onnx"
    service = load(path, keep=1, threads=1)
    right = {}
    for name in (None, "sun", "rain"):
        service.swap(name and net / f"{name}.pack")
        right[name] = next(iter(service.run(inputs).values())).tobytes()
    assert len(set(right.values())) == 3
    stop, seen, errors = threading.Event(), set(), []

    def serve():
        try:
            while not stop.is_set():
                seen.add(next(iter(service.run(inputs).values())).tobytes())
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=serve) for _ in range(3)]
    for worker in workers:
        worker.start()
    for name in (None, "sun", "rain") * 4:
        service.swap(name and net / f"{name}.pack")
    stop.set()
    for worker in workers:
        worker.join()
    assert not errors
    assert seen <= set(right.values())
    assert len(seen) > 1


def test_what_prints_while_a_pack_is_swapped_is_printed(net, capfd):
    service = load(net / "net.onnx", threads=1)
    capfd.readouterr()
    service.swap(net / "sun.pack")
    print("a line of the service")
    out, err = capfd.readouterr()
    assert (out, err) == ("a line of the service\n", "")


def test_what_cannot_be_served_is_refused_and_the_pack_in_use_stays(net, tmp_path):
    inputs = feeds(net / "net.onnx")
    service = load(net / "net.onnx", net / "sun.pack", threads=1)
    before = service.run(inputs)
    other = with_statistics(digits_cnn(), seed=5)
    bnfold.export(other, torch.zeros(1, 1, 8, 8), tmp_path / "other.onnx")
    statistics = moved(graph.read_onnx(tmp_path / "other.onnx"))
    Pack.of(statistics, base=tmp_path / "other.onnx").save(tmp_path / "other.pack")
    for pack in (tmp_path / "other.pack", tmp_path / "none.pack", net / "net.onnx"):
        with pytest.raises(InputError):
            service.swap(pack)
        assert service.pack.data == "sun"
        assert same(service.run(inputs), before.values())
    torch.save(other.state_dict(), tmp_path / "net.pt")
    with pytest.raises(InputError, match="is no ONNX model"):
        load(tmp_path / "net.pt")
    with pytest.raises(UsageError, match="keep is 0"):
        load(net / "net.onnx", keep=0)
    with pytest.raises(RuntimeUnavailableError, match="is not a provider"):
        load(net / "net.onnx", provider="tpu")


def test_with_a_key_only_signed_files_are_served(net, tmp_path):
    signing.generate(tmp_path / "key.pem")
    good = Pack.of(moved(graph.read_onnx(net / "net.onnx")), base=net / "net.onnx")
    good.save(tmp_path / "good.pack", sign=tmp_path / "key.pem")
    public = tmp_path / "key.pub.pem"
    service = load(net / "net.onnx", tmp_path / "good.pack", public_key=public, threads=1)
    with pytest.raises(InputError, match="is not signed"):
        service.swap(net / "sun.pack")
    with pytest.raises(UsageError, match="given as files"):
        service.swap(good)


TEXTS = {
    "constant nodes": ("x[4,4,4,4] > y; c = Conv(x, W[4,4,3,3]); y = BN4:alt(c)", True),
    "a bias to come": ("x[4,4,4,4] > y; c = Conv(x, W[4,4,3,3]); y = BN4:alt(c)", False),
    "into the one behind": (
        "x[4,4,4,4] > y; r = Relu(x); b = BN4:alt(r); y = Conv(b, V[8,4,3,3])",
        False,
    ),
    "gamma 0": (
        "x[4,4,4,4] > y; c = Conv(x, W[4,4,3,3]); b = BN4:alt0(c); r = Relu(b);"
        " y = Conv(r, V[8,4,1,1])",
        False,
    ),
    "a product": ("x[4,8] > y; c = MatMul(x, W[8,4]); y = BN4:alt(c)", False),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
def test_small_graphs(name, folded):
    text, nodes = TEXTS[name]
    proto = build(Law("serve", "", text, 1, nodes=nodes))
    first = bnfold.fold(proto)
    model, record = (first.model, first.record) if folded else (proto, None)
    pack = Pack.of(moved(first.original), base=proto)
    service = load(model, pack, record=record, threads=1)
    held = proto.graph.input[0]
    sizes = [d.dim_value for d in held.type.tensor_type.shape.dim]
    inputs = {held.name: np.random.default_rng(0).standard_normal(sizes).astype(np.float32)}
    expected = by_onnxruntime(pack.apply(model, record).SerializeToString(), inputs)
    assert same(service.run(inputs), expected)
    assert not same(load(model, record=record, threads=1).run(inputs), expected)


def test_a_session_holds_the_memory_that_it_reads(net):
    inputs = feeds(net / "net.onnx")
    data, weights = halves(graph.read_onnx(net / "net.onnx"))
    session = runtime.open_with_weights(data, weights, threads=1)
    expected = session.run(inputs)
    del data, weights
    junk = [np.full(10_000, np.nan, np.float32) for _ in range(200)]
    assert same(session.run(inputs), expected.values())
    del junk


@pytest.mark.gpu
def test_packs_are_swapped_on_cuda(net):
    inputs, path = feeds(net / "net.onnx"), net / "net.folded.onnx"
    there, here = (load(path, provider=provider) for provider in ("cuda", "cpu"))
    for name in ("sun", "rain"):
        for service in (there, here):
            service.swap(net / f"{name}.pack")
        assert there.session.providers[0] == "CUDAExecutionProvider"
        for a, b in zip(there.run(inputs).values(), here.run(inputs).values(), strict=True):
            assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()
