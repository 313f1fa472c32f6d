"""Ghost, mean-only and frozen batch norm: against the NumPy oracle and against torch's own."""

import copy
import pickle

import norm_reference as ref
import numpy as np
import pytest
import torch
from torch import nn

from bnfold import norm
from bnfold.errors import UsageError

C = 3
FAMILIES = ["BatchRenorm", "GhostBatchNorm", "MeanOnlyBatchNorm", "FrozenBatchNorm"]
EPS = 0.05
SHAPES = {(7, C): "1d", (6, C, 4): "1d", (5, C, 3, 2): "2d", (4, C, 2, 1, 2): "3d"}
RANKS = [(shape, rank) for shape, own in SHAPES.items() for rank in (own, "")]


def make(family, rank, *args, **kwargs):
    """A layer in float64 whose state is nothing special."""
    torch.manual_seed(3)
    module = nn if family == "BatchNorm" and rank else norm
    layer = getattr(module, family + rank)(C, *args, **kwargs).double()
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            if tensor is not None:
                tensor.copy_(torch.randn(C))
        if family != "MeanOnlyBatchNorm":
            layer.running_var.copy_(torch.rand(C) + 0.1)
    return layer


def batch(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 2))
    return spread * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.7


def array(tensor):
    return tensor.detach().numpy().copy()


def check(layer, x, expected, backward):
    """A layer's output and all its gradients against the oracle's."""
    x, dy = x.clone().requires_grad_(), batch(tuple(x.shape), 9)
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    np.testing.assert_allclose(array(y), expected, rtol=1e-10, atol=1e-10)
    gradients = [x.grad, *(p.grad for p in layer.parameters())]
    for given, wanted in zip(gradients, backward(array(dy)), strict=True):
        np.testing.assert_allclose(array(given), wanted, rtol=1e-10, atol=1e-10)


def affine(layer):
    return array(layer.weight), array(layer.bias)


def differentiable(layer, x):
    parameters = dict(layer.named_parameters())

    def run(x, *values):
        state = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, state, (x,))

    return torch.autograd.gradcheck(run, (x.requires_grad_(), *parameters.values()))


# --- batch norm ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "rank"), RANKS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_is_the_oracle(shape, rank, momentum):
    layer = make("BatchNorm", rank, EPS, momentum)
    for step in range(3):
        x = batch(shape, step)
        mean, var = array(layer.running_mean), array(layer.running_var)
        check(layer, x, *ref.batch_norm(array(x), *affine(layer), EPS))
        rate = momentum or 1 / (step + 1)
        mean, var = ref.batch_norm_running(array(x), mean, var, rate)
        np.testing.assert_allclose(array(layer.running_mean), mean, rtol=1e-12)
        np.testing.assert_allclose(array(layer.running_var), var, rtol=1e-12)
    x = batch(shape, 5)
    state = (array(layer.running_mean), array(layer.running_var))
    check(layer.eval(), x, *ref.inference(array(x), *state, *affine(layer), EPS))


def test_batch_norm_of_any_rank_is_torchs_in_every_bit():
    for shape, rank in SHAPES.items():
        ours, torchs = make("BatchNorm", "", EPS), make("BatchNorm", rank, EPS)
        for layer in (ours, torchs):
            layer.given = [layer(batch(shape)), layer.eval()(batch(shape, 1))]
        assert all(torch.equal(a, b) for a, b in zip(ours.given, torchs.given, strict=True))
        assert all(torch.equal(ours.state_dict()[k], v) for k, v in torchs.state_dict().items())
    with pytest.raises(ValueError, match="at least 2D"):
        norm.BatchNorm(C)(torch.zeros(C))


# --- ghost batch norm ----------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "rank"), RANKS)
def test_ghost_batches_are_normalised_by_themselves(shape, rank):
    layer = make("GhostBatchNorm", rank, EPS, ghost_size=2)
    x = batch(shape)
    parts = np.array_split(array(x), len(x) // 2)
    assert min(len(part) for part in parts) >= 2
    assert max(len(part) for part in parts) <= 3
    means = [ref.rows(part).mean(1) for part in parts]
    variances = [ref.rows(part).var(1, ddof=1) for part in parts]
    expected = [
        ref.ghost_running(values, array(first), 0.1)
        for values, first in ((means, layer.running_mean), (variances, layer.running_var))
    ]
    check(layer, x, *ref.ghost_batch_norm(parts, *affine(layer), EPS))
    np.testing.assert_allclose(array(layer.running_mean), expected[0], rtol=1e-12)
    np.testing.assert_allclose(array(layer.running_var), expected[1], rtol=1e-12)
    assert layer.num_batches_tracked == len(parts)
    assert differentiable(layer, x)


def test_a_ghost_of_the_whole_batch_is_torchs_batch_norm_in_every_bit():
    for shape, rank in SHAPES.items():
        ours, torchs = (
            make("GhostBatchNorm", rank, EPS, ghost_size=len(batch(shape))),
            make("BatchNorm", rank, EPS),
        )
        for step in range(3):
            given = []
            for layer in (ours, torchs):
                x = batch(shape, step).requires_grad_()
                layer.zero_grad()
                y = layer(x)
                y.backward(batch(shape, 9))
                given.append([y, x.grad, layer.weight.grad, layer.bias.grad])
            assert all(torch.equal(a, b) for a, b in zip(*given, strict=True))
        assert all(torch.equal(ours.state_dict()[k], v) for k, v in torchs.state_dict().items())
        other = make("GhostBatchNorm", rank, EPS, ghost_size=2)
        assert not torch.equal(other(batch(shape)), torchs(batch(shape)))


@pytest.mark.parametrize("size", range(2, 9))
def test_no_ghost_is_smaller_than_asked(size, monkeypatch):
    seen = []
    whole = nn.modules.batchnorm._BatchNorm.forward

    def watched(self, input):
        seen.append(len(input))
        return whole(self, input)

    monkeypatch.setattr(nn.modules.batchnorm._BatchNorm, "forward", watched)
    layer = norm.GhostBatchNorm1d(C, ghost_size=size)
    for n in range(2, 40):
        seen.clear()
        layer(torch.randn(n, C))
        assert sum(seen) == n
        assert max(seen) - min(seen) <= 1
        assert min(seen) >= min(size, n)
        assert max(seen) < 2 * size
    seen.clear()
    layer.eval()(torch.randn(39, C))
    assert seen == [39]


def test_a_ghost_of_nothing():
    with pytest.raises(UsageError, match="ghost_size is 0; it must be the samples of a ghost"):
        norm.GhostBatchNorm2d(C, ghost_size=0)


# --- arguments and batches that are none ---------------------------------------------------------


@pytest.mark.parametrize("family", ["BatchNorm", *FAMILIES])
def test_a_layer_refuses_arguments_that_are_none(family):
    for rank in ("", "1d", "2d", "3d"):
        if f"{family}{rank}" in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"):
            continue  # torch's own
        cls = getattr(norm, f"{family}{rank}")
        if family != "MeanOnlyBatchNorm":
            with pytest.raises(UsageError, match="eps is -1; it must be a finite number"):
                cls(C, eps=-1)
        if family != "FrozenBatchNorm":
            with pytest.raises(UsageError, match="momentum is 2; it must be the weight of a new"):
                cls(C, momentum=2)


@pytest.mark.parametrize("family", ["GhostBatchNorm", "MeanOnlyBatchNorm", "BatchRenorm"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(0, C), (0, C, 4), (2, C, 0)])
def test_an_empty_batch_leaves_the_statistics_as_torchs_does(family, momentum, shape):
    layer = getattr(norm, f"{family}1d")(C, momentum=momentum)
    torchs = nn.BatchNorm1d(C, momentum=momentum)
    layer(torch.randn(5, C) + 1)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    torchs(torch.randn(5, C))
    x = torch.randn(shape, requires_grad=True)
    assert layer(x).shape == torchs(x).shape == shape
    layer(x).sum().backward()
    torchs(x)
    assert torch.equal(layer.running_mean, mean)
    assert torch.equal(layer.running_var, var)
    assert layer.num_batches_tracked == torchs.num_batches_tracked
    assert all(not p.grad.any() for p in layer.parameters())


# --- mean-only batch norm ------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "rank"), RANKS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_mean_only_is_the_oracle(shape, rank, momentum):
    layer = make("MeanOnlyBatchNorm", rank, momentum=momentum)
    for step in range(3):
        x, mean = batch(shape, step), array(layer.running_mean)
        check(layer, x, *ref.mean_only(array(x), array(layer.bias)))
        rate = momentum or 1 / (step + 1)
        mean = (1 - rate) * mean + rate * ref.rows(array(x)).mean(1)
        np.testing.assert_allclose(array(layer.running_mean), mean, rtol=1e-12)
    assert differentiable(layer, batch(shape))
    x, state = batch(shape, 5), (array(layer.running_mean), np.ones(C))
    expected, backward = ref.inference(array(x), *state, np.ones(C), array(layer.bias), 0)
    check(layer.eval(), x, expected, lambda dy: (backward(dy)[0], backward(dy)[2]))
    assert torch.equal(layer.running_var, torch.ones(C, dtype=torch.float64))


@pytest.mark.parametrize("affine", [True, False])
def test_mean_only_is_a_batch_norm_at_inference(affine):
    layer = make("MeanOnlyBatchNorm", "2d")
    if not affine:
        layer.bias = None
    plain = nn.BatchNorm2d(C, eps=0.0).double()
    plain.weight = None
    plain.bias = layer.bias
    plain.load_state_dict(layer.state_dict())
    x = batch((5, C, 3, 2))
    assert torch.equal(plain.eval()(x), layer.eval()(x))
    assert list(layer.state_dict()) == [
        *(["bias"] if affine else []),
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]


def test_mean_only_starts_anew():
    layer = make("MeanOnlyBatchNorm", "2d")
    layer(batch((5, C, 3, 2)))
    layer.reset_parameters()
    assert not layer.bias.any()
    assert not layer.running_mean.any()
    assert layer.num_batches_tracked == 0


def test_mean_only_refuses_one_value_for_a_channel():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm.MeanOnlyBatchNorm1d(C)(torch.zeros(1, C))
    with pytest.raises(ValueError, match="4D input"):
        norm.MeanOnlyBatchNorm2d(C)(torch.zeros(2, C))


def test_under_autocast_the_mean_stays_wide():
    layer, conv = norm.MeanOnlyBatchNorm2d(C, momentum=1.0), nn.Conv2d(C, C, 1)
    x = 100 + batch((5, C, 3, 2)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inputs = conv(x)
        y = layer(inputs)
    assert y.dtype == inputs.dtype == torch.bfloat16
    expected = inputs.float().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean, expected, rtol=1e-6, atol=0)
    shifted = inputs.float() - expected.view(-1, 1, 1)
    torch.testing.assert_close(y, shifted.bfloat16(), rtol=0, atol=0)


class MeanWithoutGradient(norm.MeanOnlyBatchNorm):
    def forward(self, input):
        return input + super().forward(input.detach()) - input.detach()


class BiasedMean(norm.MeanOnlyBatchNorm):
    def forward(self, input):
        return super().forward(input) * 1.0001


@pytest.mark.parametrize("fault", [MeanWithoutGradient, BiasedMean])
def test_a_planted_fault_is_seen(fault):
    x, layer = batch((5, C, 3, 2)), fault(C).double()
    with pytest.raises(AssertionError, match="Not equal"):
        check(layer, x, *ref.mean_only(array(x), array(layer.bias)))


# --- frozen batch norm ---------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "rank"), RANKS)
@pytest.mark.parametrize("training", [True, False])
def test_frozen_is_inference_in_every_mode(shape, rank, training):
    layer = make("FrozenBatchNorm", rank, EPS).train(training)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = batch(shape)
    state = (array(layer.running_mean), array(layer.running_var))
    expected, backward = ref.inference(array(x), *state, *affine(layer), EPS)
    check(layer, x, expected, lambda dy: backward(dy)[:1])
    plain = make("BatchNorm", SHAPES[shape], EPS)
    plain.load_state_dict(before)  # without a batch count, as before torch had one
    assert torch.equal(plain.eval()(x), layer(x))
    assert not list(layer.parameters())
    assert set(before) == {"weight", "bias", "running_mean", "running_var"}
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())


def test_frozen_loads_a_batch_norm():
    plain = make("BatchNorm", "2d", EPS)
    plain(batch((5, C, 3, 2)))
    net = nn.Sequential(norm.FrozenBatchNorm2d(C, EPS)).double()
    net.load_state_dict(nn.Sequential(plain).state_dict())
    x = batch((5, C, 3, 2), 1)
    assert torch.equal(net(x), plain.eval()(x))
    thawed = nn.Sequential(nn.BatchNorm2d(C, EPS)).double()
    thawed.load_state_dict(net.state_dict())
    assert torch.equal(thawed.eval()(x), net(x))
    again = nn.Sequential(norm.FrozenBatchNorm2d(C, EPS)).double()
    again.load_state_dict(net.state_dict())
    again[0].reset_parameters()
    assert torch.equal(again[0].running_var, torch.ones(C))


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_can_be_pickled_and_copied(family):
    layer = make(family, "2d")
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert repr(other) == repr(layer)
        x = batch((5, C, 3, 2))
        assert torch.equal(other(x), copy.deepcopy(layer)(x))


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("shape", "rank"), SHAPES.items())
def test_a_layer_on_cuda_is_the_layer_on_a_cpu(family, shape, rank):
    layer = make(family, rank)
    given = []
    for device in ("cpu", "cuda"):
        own, x = copy.deepcopy(layer).to(device), batch(shape).to(device).requires_grad_()
        y = own(x)
        y.backward(batch(shape, 9).to(device))
        gradients = [p.grad for p in own.parameters()]
        given.append([t.detach().cpu() for t in (y, x.grad, *gradients, *own.buffers())])
    torch.testing.assert_close(*given, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_compiles_whole(family):
    layer, x = make(family, "2d"), batch((5, C, 3, 2))
    expected = copy.deepcopy(layer)(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_leaves_the_batch_size_open(family):
    layer, x = make(family, "2d").eval(), batch((5, C, 3, 2))
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    other = batch((9, C, 3, 2), 1)
    assert torch.equal(exported.module()(other), layer(other))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_layer_is_can_be_read(family):
    assert f"{family}2d({C}, " in repr(getattr(norm, family + "2d")(C))


@pytest.mark.parametrize("family", ["BatchRenorm", "GhostBatchNorm", "FrozenBatchNorm"])
def test_arguments_come_in_torchs_order(family):
    assert getattr(norm, family + "2d")(C, 1e-3).eps == 1e-3
    with pytest.raises(TypeError, match="positional argument"):
        norm.MeanOnlyBatchNorm2d(C, 1e-3)
