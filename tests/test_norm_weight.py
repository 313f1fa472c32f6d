"""Weight normalization and its data-dependent initialisation, against the NumPy oracle."""

import copy

import norm_reference as ref
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrizations import weight_norm as torchs_weight_norm

from bnfold.errors import InputError, UsageError
from bnfold.norm import MeanOnlyBatchNorm, WeightNorm, convert, initialise, weight_norm

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (6, 5)),
    "linear on sequences": (lambda: nn.Linear(5, 4), (6, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (5, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (5, 4, 6, 5)),
    "grouped conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), (5, 4, 6, 5)),
    "depthwise conv2d": (lambda: nn.Conv2d(4, 4, 3, groups=4), (5, 4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (3, 2, 4, 3, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (5, 4, 7)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (5, 4, 3, 4)),
    "grouped transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (5, 4, 3, 4)),
    "depthwise transposed2d": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), (5, 4, 3, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 4, 2, groups=2), (3, 2, 3, 2, 3)),
}


def made(name):
    torch.manual_seed(1)
    return LAYERS[name][0]().double()


def places_of(layer):
    transposed = "Transpose" in type(layer).__name__
    return ref.units(
        layer.weight.detach().numpy(), transposed=transposed, groups=getattr(layer, "groups", 1)
    )


def lengths(layer):
    weight = layer.weight.detach().numpy()
    return np.array([np.sqrt((weight[place] ** 2).sum()) for place in places_of(layer)])


def check(layer, wrap, log_scale=False):
    """A layer's weight and the gradients of its g and v against the oracle's."""
    before = layer.weight.detach().clone()
    wrap(layer)
    torch.testing.assert_close(layer.weight, before, rtol=1e-12, atol=1e-12)
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    with torch.no_grad():
        g.add_(0.3 * torch.randn_like(g))
        v.mul_(2)
    places, dw = places_of(layer), torch.randn_like(before)
    assert g.numel() == len(places)
    layer.weight.backward(dw)
    arguments = (g.detach().numpy().ravel(), v.detach().numpy(), places)
    if log_scale is False:
        expected, backward = ref.weight_norm(*arguments)
    else:
        expected, backward = ref.weight_norm_log(*arguments, float(log_scale))
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-12)
    dg, dv = backward(dw.numpy())
    np.testing.assert_allclose(g.grad.numpy().ravel(), dg, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(v.grad.numpy(), dv, rtol=1e-9, atol=1e-12)
    assert abs((v.grad * v).sum()) < 1e-12


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("log_scale", [False, True, 0.5])
def test_the_weight_and_its_gradients_are_the_oracles(name, log_scale):
    check(made(name), lambda layer: weight_norm(layer, log_scale=log_scale), log_scale)


def of_wrong_units(layer):
    parametrize.register_parametrization(layer, "weight", WeightNorm(1))


def without_the_norms_gradient(layer):
    weight_norm(layer)
    norm = layer.parametrizations.weight[0]
    norm._norm = lambda rows: WeightNorm._norm(norm, rows.detach())


@pytest.mark.parametrize("fault", [of_wrong_units, without_the_norms_gradient])
def test_a_planted_fault_is_seen(fault):
    with pytest.raises(AssertionError):
        check(made("grouped transposed2d"), fault)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_against_finite_differences(name):
    layer = weight_norm(made(name))
    state = {k: v for k, v in layer.named_parameters() if k != "bias"}

    def run(*values):
        return torch.func.functional_call(
            layer, dict(zip(state, values, strict=True)), torch.ones(LAYERS[name][1]).double()
        )

    assert torch.autograd.gradcheck(run, tuple(state.values()))


@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped conv2d"])
def test_state_is_torchs_own(name):
    ours, torchs = weight_norm(made(name)), torchs_weight_norm(made(name))
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    with torch.no_grad():
        torchs.parametrizations.weight.original0.mul_(3)
    ours.load_state_dict(torchs.state_dict())
    torch.testing.assert_close(ours.weight, torchs.weight)


def test_another_dimension():
    layer = weight_norm(made("transposed2d"), dim=0)
    assert layer.parametrizations.weight.original0.shape == (4, 1, 1, 1)
    torch.testing.assert_close(layer.weight, made("transposed2d").weight)


def test_a_row_of_zeros_gives_zeros_and_can_grow():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0] = 0
    weight_norm(layer)
    assert not layer.weight[0].any()
    layer(torch.ones(1, 3)).sum().backward()
    gradients = [p.grad for p in layer.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert layer.weight[0].abs().min() > 0
    with torch.no_grad():  # a direction that is none, as torch's own weight norm may store it
        layer.parametrizations.weight.original1[0] = 0
    assert not layer.weight[0].any()
    layer.zero_grad()
    layer(torch.ones(1, 3)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_copy_is_its_own_and_a_state_can_be_loaded(tmp_path):
    layer = weight_norm(nn.Conv2d(2, 3, 3))
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(other.weight, 2 * layer.weight)
    torch.save(other.state_dict(), tmp_path / "state.pt")
    layer.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other.weight, layer.weight)


def test_what_is_weight_normed_stays():
    for once in (torchs_weight_norm, weight_norm):
        layer = once(nn.Linear(3, 2))
        names = list(layer.state_dict())
        weight_norm(layer)
        assert list(layer.state_dict()) == names
        assert len(layer.parametrizations.weight) == 1


def test_frozen_weights_stay_frozen():
    layer = nn.Linear(3, 2).requires_grad_(False)
    assert not any(p.requires_grad for p in weight_norm(layer).parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_a_length_of_zero_has_no_logarithm(name):
    layer = made(name)
    with torch.no_grad():
        layer.weight[places_of(layer)[-1]] = 0
    net = nn.Sequential(nn.BatchNorm1d(2), layer)
    with pytest.raises(InputError, match=rf"{type(layer).__name__} '1' has units of zeros"):
        convert(net, "weight", inplace=True, log_scale=True)
    assert type(net[0]) is nn.BatchNorm1d
    weight_norm(layer)


@pytest.mark.parametrize("c", [-1.0, float("inf"), float("nan"), "1", None])
def test_a_scale_that_is_none(c):
    with pytest.raises(UsageError, match=r"log_scale is .*; it must be the scale c of lengths"):
        weight_norm(nn.Linear(3, 2), log_scale=c)


@pytest.mark.parametrize("c", [0, 0.0])
def test_a_scale_of_zero_is_no_scale(c):
    layer = nn.Linear(3, 2)
    weight = layer.weight.detach().clone()
    assert weight_norm(layer, log_scale=c).parametrizations.weight[0].c is None
    torch.testing.assert_close(layer.weight, weight)


def test_what_cannot_be_weight_normed():
    with pytest.raises(InputError, match="not for BatchNorm1d"):
        weight_norm(nn.BatchNorm1d(3))
    with pytest.raises(InputError, match="weight of ParametrizedLinear is computed"):
        weight_norm(spectral_norm(nn.Linear(3, 2)))
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Linear(3, 2))
    with pytest.raises(InputError, match="weight of Linear is computed"):
        weight_norm(old)


# --- initialisation ------------------------------------------------------------------------------


def by_unit(layer, output):
    """A layer's output as (units, values)."""
    axis = -1 if isinstance(layer, nn.Linear) else 1
    return output.movedim(axis, 0).flatten(1)


def standard(layer, output, tolerance=1e-5):
    units = by_unit(layer, output)
    zero = torch.zeros(len(units), dtype=units.dtype)
    torch.testing.assert_close(units.mean(1), zero, rtol=0, atol=tolerance)
    torch.testing.assert_close(units.std(1, correction=0), zero + 1, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "wrap",
    [
        weight_norm,
        lambda x: weight_norm(x, log_scale=0.5),
        torchs_weight_norm,
        lambda x: weight_norm(x, dim=1),
    ],
    ids=["ours", "log", "torch's", "dim 1"],
)
def test_a_layer_gets_mean_0_and_deviation_1(name, wrap):
    layer, x = wrap(made(name)), 3 * torch.randn(LAYERS[name][1]).double() + 1
    v = layer.parametrizations.weight.original1.clone()
    directions = layer.weight.detach().clone()
    assert initialise(layer, x) == [""]
    standard(layer, layer(x), 1e-10)
    if wrap is weight_norm:
        assert torch.equal(layer.parametrizations.weight.original1, v)
    for place in places_of(layer):
        cosine = torch.cosine_similarity(
            directions[place].flatten(), layer.weight[place].flatten(), 0
        )
        assert cosine > 1 - 1e-12


class Residual(nn.Module):
    """A trunk with sums, one layer that runs twice, dropout, and one layer that never runs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.never = nn.Linear(1, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.drop(torch.relu(self.twice(x)))
        x = x + self.twice(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_through_a_residual_network(training):
    torch.manual_seed(0)
    net = convert(Residual(), "weight").train(training)
    net.drop.train(not training)  # whatever the modes are, they stay
    before = net.never.bias.clone()
    seen, x = {}, torch.randn(64, 2, 6, 6)
    assert initialise(net, x) == ["stem", "twice", "head"]
    assert [part.training for part in (net, net.stem, net.drop)] == [
        training,
        training,
        not training,
    ]
    assert torch.equal(net.never.bias, before)
    for name in ("stem", "twice", "head"):
        net.get_submodule(name).register_forward_hook(
            lambda layer, _, output: seen.setdefault(layer, output) is None or None
        )
    with torch.no_grad():
        net.eval()(x)
    for layer, output in seen.items():
        standard(layer, output)


@pytest.mark.parametrize("kind", ["weight-mean-only", "mean-only"])
@pytest.mark.parametrize("training", [True, False])
def test_mean_only_batch_norms_are_centred(kind, training):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.BatchNorm1d(5),
    )
    net, x = convert(net, kind).train(training), 3 * torch.randn(40, 2, 6, 6) + 1
    names = initialise(net, x)
    assert names == ["0", "1", "4", "5"]
    after = {}
    for part in net:
        if isinstance(part, MeanOnlyBatchNorm):
            part.register_forward_hook(lambda norm, _, output: after.update({norm: output}))
    evaluated = net.eval()(x)
    for norm, output in after.items():
        standard(norm, output)
    torch.testing.assert_close(net.train()(x), evaluated, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in LAYERS if "sequences" not in n])
def test_plain_layers_of_a_mean_only_network_get_its_scale(name):
    layer, x = made(name), 3 * torch.randn(LAYERS[name][1]).double() + 1
    parameter = layer.weight
    net = nn.Sequential(layer, MeanOnlyBatchNorm(len(layer.bias)).double()).eval()
    assert initialise(net, x) == ["0", "1"]
    standard(layer, net(x), 1e-10)
    assert layer.weight is parameter


def test_a_dead_channel_keeps_its_scale():
    layer = weight_norm(nn.Linear(2, 2))
    with torch.no_grad():
        layer.parametrizations.weight.original1[0] = torch.tensor([1.0, 0.0])
    x = torch.stack([torch.full((50,), 5.0), torch.randn(50)], 1)
    before = layer.weight[0].clone()
    initialise(layer, x)
    assert torch.equal(layer.weight[0], before)
    y = layer(x)
    assert y.isfinite().all()
    assert y[:, 0].abs().max() < 1e-5
    standard(layer, y[:, 1:])


def test_a_model_is_called_as_its_user_calls_it():
    net = convert(nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2)}), "weight")
    x = torch.randn(30, 3)
    names = initialise(net, {"x": x}, lambda net, batch: net["b"](net["a"](batch["x"])))
    assert names == ["a", "b"]
    standard(net["b"], net["b"](net["a"](x)))


def test_nothing_to_initialise():
    with pytest.raises(UsageError, match="No weight-normed layer ran"):
        initialise(nn.Linear(2, 2), torch.randn(5, 2))


def test_hooks_and_modes_are_put_back_after_a_failure():
    net = weight_norm(nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="shapes"):
        initialise(net, torch.randn(5, 4))
    assert net.training
    assert not net._forward_hooks
