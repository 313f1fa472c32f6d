"""Whatever holds the network, the same target gives it the same statistics, and it comes back."""

import copy

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from test_adapt import Net, seeded, target

import bnfold
from bnfold import graph
from bnfold.adapting.adapt import adapt
from bnfold.cli import main
from bnfold.errors import InputError, UsageError
from bnfold.outputs import record_path

EXAMPLE = torch.zeros(1, 2, 5, 5)


@pytest.fixture(scope="module")
def net():
    return seeded(Net()).eval()


@pytest.fixture(scope="module")
def exported(net):
    return bnfold.export(net, EXAMPLE)


@pytest.fixture(scope="module")
def folded(net):
    return bnfold.fold(net, EXAMPLE)


def batches(size=9, count=61):
    return [part.numpy() for part in target(count).split(size)]


def assert_same_statistics(one, other, tolerance=2e-6):
    """Means in standard deviations, variances relative."""
    assert one.statistics.keys() == other.statistics.keys()
    for name, a in one.statistics.items():
        b = other.statistics[name]
        np.testing.assert_allclose(a.mean / np.sqrt(a.var), b.mean / np.sqrt(a.var), atol=tolerance)
        np.testing.assert_allclose(a.var, b.var, rtol=tolerance)


def outputs_of(model, x):
    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            return model(torch.as_tensor(x)).numpy()
    data = graph.to_bytes(model) if isinstance(model, ir.Model) else model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: np.asarray(x)})[0]


# --- one result -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "fast"])
@pytest.mark.parametrize("options", [{}, {"prior": 20}, {"part": "mean"}, {"prior": "auto"}])
def test_torch_onnx_and_folded_agree(net, exported, folded, method, options):
    data = batches(32)
    own = adapt(net, data, method=method, diagnose=False, **options)
    others = [
        adapt(exported, data, method=method, diagnose=False, **options),
        adapt(folded.graph, data, record=folded.record, method=method, diagnose=False, **options),
        adapt(folded.model, data, record=folded.record, method=method, diagnose=False, **options),
    ]
    x = target(5, seed=7).numpy()
    for other in others:
        assert_same_statistics(own, other)
        np.testing.assert_allclose(
            outputs_of(other.model, x), outputs_of(own.model, x), rtol=1e-4, atol=1e-5
        )
    assert np.abs(outputs_of(own.model, x) - outputs_of(net, x)).max() > 0.01


def test_other_data_would_be_seen(net, exported):
    one = adapt(net, batches(), diagnose=False)
    other = adapt(exported, batches()[:-1], diagnose=False)
    with pytest.raises(AssertionError):
        assert_same_statistics(one, other)


def test_a_folded_model_adapted_is_the_adapted_one_folded_bit_for_bit(exported):
    data = batches()
    folded = bnfold.fold(exported)
    refolded = adapt(folded.graph, data, record=folded.record, diagnose=False)
    plain = bnfold.fold(adapt(exported, data, diagnose=False).model)
    a, b = (graph.to_proto(model) for model in (refolded.model, plain.graph))
    assert {t.name: t.raw_data for t in a.graph.initializer} == {
        t.name: t.raw_data for t in b.graph.initializer
    }
    assert refolded.fold.verify().passed


# --- what came in goes back -----------------------------------------------------------------------


def test_the_type_that_came_in_comes_back(net, exported, folded):
    data = batches()
    given = copy.deepcopy(net.state_dict())
    before = graph.to_bytes(exported)
    assert type(adapt(net, data, diagnose=False).model) is Net
    assert isinstance(adapt(exported, data, diagnose=False).model, ir.Model)
    proto = graph.to_proto(exported)
    assert isinstance(adapt(proto, data, diagnose=False).model, onnx.ModelProto)
    again = adapt(folded.model, data, record=folded.record, diagnose=False)
    assert type(again.model) is Net
    assert isinstance(again.model.bn1, torch.nn.Identity)
    assert graph.to_bytes(exported) == before
    assert all(torch.equal(x, given[name]) for name, x in net.state_dict().items())


def test_the_record_beside_a_file_is_found(exported, tmp_path):
    path = tmp_path / "net.folded.onnx"
    bnfold.export(seeded(Net()).eval(), EXAMPLE, tmp_path / "net.onnx")
    assert main(["fold", str(tmp_path / "net.onnx"), "-q"]) == 0
    own = adapt(exported, batches(), diagnose=False)
    assert_same_statistics(adapt(path, batches(), diagnose=False), own)
    record_path(path).unlink()
    with pytest.raises(InputError, match="holds no batch norm"):
        adapt(path, batches(), diagnose=False)


# --- without any batch norm -----------------------------------------------------------------------


def shifted(x):
    return 0.3 * x


def test_a_network_without_batch_norms_is_matched_to_its_source(net, folded):
    """On the source nothing changes; a shifted target gives the outputs of the source."""
    source = batches(61)
    same = adapt(folded.graph, source, source_data=source, diagnose=False)
    x = source[0]
    np.testing.assert_allclose(outputs_of(same.model, x), outputs_of(net, x), atol=2e-4)
    brought = adapt(folded.graph, [shifted(x) for x in source], source_data=source, diagnose=False)
    assert "approximation" in brought.warnings[0]
    assert not any(graph.is_batch_norm(node) for node in brought.model.graph)
    error = np.abs(outputs_of(brought.model, shifted(x)) - outputs_of(net, x)).mean()
    was = np.abs(outputs_of(folded.graph, shifted(x)) - outputs_of(net, x)).mean()
    assert error < 0.02 * was


def test_without_source_samples_it_is_refused(folded):
    with pytest.raises(InputError, match="source domain"):
        adapt(folded.graph, batches())
    with pytest.raises(InputError, match="neither a batch norm nor a convolution"):
        adapt(bnfold.export(torch.nn.Linear(4, 2).eval(), torch.zeros(1, 4)), [], source_data=[])


# --- matched to the source ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_matched_to_its_source_a_network_stays_as_it_is(net, exported, kind):
    model = net if kind == "torch" else exported
    data = batches()
    same = adapt(model, data, source_data=data, diagnose=False)
    x = data[0]
    np.testing.assert_allclose(outputs_of(same.model, x), outputs_of(model, x), atol=2e-5)
    plain = adapt(model, data, diagnose=False)
    assert np.abs(outputs_of(plain.model, x) - outputs_of(model, x)).max() > 0.01


# --- some of the layers, some of the data ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize(("up_to", "names"), [(1, ["bn1"]), ("bn2", ["bn1", "bn2"])])
def test_layers_up_to_a_depth(net, exported, kind, up_to, names):
    model = net if kind == "torch" else exported
    result = adapt(model, batches(), up_to=up_to, diagnose=False)
    assert list(result.statistics) == names
    whole = adapt(model, batches(), diagnose=False)
    for name in names:
        np.testing.assert_array_equal(result.statistics[name].mean, whole.statistics[name].mean)


def test_a_depth_that_means_nothing_is_refused(net):
    with pytest.raises(UsageError, match="up_to is 'bn9', which is no batch norm"):
        adapt(net, batches(), up_to="bn9")
    with pytest.raises(UsageError, match="up_to is 0"):
        adapt(net, batches(), up_to=0)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("method", ["exact", "fast"])
def test_it_stops_when_nothing_moves_any_more(net, exported, kind, method):
    model = net if kind == "torch" else exported
    data = batches(32, 4096)
    result = adapt(model, iter(data), method=method, stop=0.15, diagnose=False)
    assert 64 < result.images < 2048
    whole = adapt(model, data, method=method, diagnose=False)
    for name, found in result.statistics.items():
        own = whole.statistics[name]
        assert (np.abs(found.mean - own.mean) < 0.3 * np.sqrt(own.var)).all()


def test_it_does_not_stop_while_the_data_drift(net):
    data = [x + 0.5 * number for number, x in enumerate(batches(16, 512))]
    assert adapt(net, data, stop=0.1, diagnose=False).images == 512


class OneBuffer:
    """A loader that fills the same array again and again, as fast ones do."""

    def __iter__(self):
        buffer = np.empty((9, 2, 5, 5), np.float32)
        for part in batches(9, 63):
            buffer[:] = part
            yield buffer


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("make", [OneBuffer, lambda: iter(OneBuffer())])
def test_a_loader_may_use_its_memory_again(net, exported, kind, make):
    model = net if kind == "torch" else exported
    own = adapt(model, batches(9, 63))
    again = adapt(model, make())
    for name, wanted in own.statistics.items():
        np.testing.assert_array_equal(again.statistics[name].mean, wanted.mean)
    assert [x.kl_after for x in again.layers] == [x.kl_after for x in own.layers]


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("method", ["exact", "fast"])
def test_an_empty_batch_among_others_does_no_harm(net, exported, kind, method):
    model = net if kind == "torch" else exported
    data = batches(32, 64)
    own = adapt(model, data, method=method, diagnose=False)
    with_empty = adapt(model, [data[0], data[0][:0], data[1]], method=method, diagnose=False)
    for name, wanted in own.statistics.items():
        np.testing.assert_array_equal(with_empty.statistics[name].var, wanted.var)


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_accuracy_before_and_after(net, exported, kind):
    model = net if kind == "torch" else exported
    x = target(61)
    after = adapt(net, [x], diagnose=False).model
    with torch.no_grad():
        labels = after(x).argmax(1)
        right_before = float((net(x).argmax(1) == labels).double().mean())
    tests = list(zip(x.split(10), labels.split(10), strict=True))
    result = adapt(model, batches(), test_data=tests)
    assert result.accuracy == (pytest.approx(right_before), 1.0)
    for tests, words in [
        ([x], "holds no labels"),
        ([], "holds no batch"),
        ([(x, labels + 7)], "the network has 3 classes"),
        ([(x, labels[:50])], r"labels of shape \(50,\) for 61 images"),
        ([(x, labels.double())], "of type float64"),
    ]:
        with pytest.raises(UsageError, match=words):
            adapt(model, batches(), test_data=tests)


def test_what_belongs_to_torch_alone_is_refused_for_onnx(exported):
    with pytest.raises(UsageError, match="forward is of a torch module"):
        adapt(exported, batches(), forward=lambda m, x: m(x))
    with pytest.raises(UsageError, match="device is of a torch module"):
        adapt(exported, batches(), device="cpu")
