"""Normalization Propagation: its constants, its gradients, and what it claims of a new network."""

import copy
import math
import threading

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from bnfold.errors import InputError, UsageError
from bnfold.graph import export_module
from bnfold.measuring.statistics import Layer, Statistics
from bnfold.norm import convert, weight_norm
from bnfold.norm.gaussian import (
    ACTIVATIONS,
    Moments,
    activation_moments,
    average_moments,
    max_moments,
)
from bnfold.norm.propagation import GAIN, Propagated, propagate
from bnfold.norm.variance import Variances
from bnfold.training.train import train

RELU = Moments(1 / math.sqrt(2 * math.pi), math.sqrt((1 - 1 / math.pi) / 2))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def mlp(width, depth, act=nn.ReLU):
    layers = [nn.Linear(10 if i == 0 else width, width, bias=False) for i in range(depth)]
    hidden = [m for layer in layers for m in (layer, nn.BatchNorm1d(width), act())]
    return nn.Sequential(*hidden, nn.Linear(width, 3))


def propagated(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, Propagated)}


# --- the constants --------------------------------------------------------------------------------


def test_the_constants_of_relu_are_the_papers():
    found = activation_moments(nn.ReLU())
    assert (round(found.mean, 5), round(found.std, 5)) == (0.39894, 0.58382)
    # the layer's Jacobian J = diag(act') W / std: (J J^T)_ii = P(u > 0) / std^2, in mean
    assert round(math.sqrt(0.5) / found.std, 4) == 1.2112


@pytest.mark.parametrize(
    ("found", "mean", "std"),
    [
        (activation_moments(nn.Sigmoid()), 0.5, 0.2083),
        (activation_moments(nn.Tanh()), 0.0, 0.6279),
        # the mean of the greatest of four: 3 (1 + 2/pi asin(1/3)) / (2 sqrt(pi))
        (max_moments(4), 1.5 * (1 + 2 / math.pi * math.asin(1 / 3)) / math.sqrt(math.pi), 0.7012),
        (max_moments(9), 1.4850, 0.5978),
        (average_moments(4), 0.0, 0.5),
    ],
)
def test_other_constants_are_the_known_ones(found, mean, std):
    assert found.mean == pytest.approx(mean, abs=6e-5)
    assert found.std == pytest.approx(std, abs=6e-5)


@pytest.mark.parametrize("variance", [0.3, 1.0, 7.0])
def test_the_integration_gives_the_closed_forms(variance):
    # a threshold at 0 is a Relu, but has no closed form here
    integrated = activation_moments(nn.Threshold(0.0, 0.0), variance)
    closed = activation_moments(nn.ReLU(), variance)
    assert integrated.mean == pytest.approx(closed.mean, rel=1e-12)
    assert integrated.std == pytest.approx(closed.std, rel=1e-12)
    for slope in (0.1, -0.5, 1.0):
        leaky = activation_moments(nn.LeakyReLU(slope), variance)
        assert leaky.mean == pytest.approx((1 - slope) * RELU.mean * math.sqrt(variance))
        power = variance * (1 + slope**2) / 2
        assert leaky.mean**2 + leaky.std**2 == pytest.approx(power)


def sampled(function, variance, count=400_000):
    """Mean and deviation of a sample, and the standard errors of both."""
    x = math.sqrt(variance) * np.random.default_rng(0).standard_normal(count)
    y = function(x)
    kurtosis = ((y - y.mean()) ** 4).mean() / y.var() ** 2
    return y.mean(), y.std(), y.std() / count**0.5, y.std() * ((kurtosis - 1) / 4 / count) ** 0.5


def agrees(moments, sample):
    mean, std, of_mean, of_std = sample
    return abs(moments.mean - mean) < 5 * of_mean and abs(moments.std - std) < 5 * of_std


@pytest.mark.parametrize("kind", ACTIVATIONS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("variance", [1.0, 3.0])
def test_the_constants_are_those_of_a_sample(kind, variance):
    act = kind(0.2, 0.1) if kind is nn.Threshold else kind()
    sample = sampled(lambda x: act(torch.from_numpy(x).float()).detach().double().numpy(), variance)
    found = activation_moments(act, variance)
    assert agrees(found, sample)
    assert not agrees(Moments(found.mean + 0.03, found.std), sample)
    assert not agrees(Moments(found.mean, 1.03 * found.std), sample)


def test_an_activation_in_place_and_in_half_precision_is_integrated_too():
    assert activation_moments(nn.ELU(inplace=True)) == activation_moments(nn.ELU())
    assert activation_moments(nn.PReLU().half()) == activation_moments(nn.LeakyReLU(0.25))


def test_activations_without_one_deviation_are_refused():
    two = nn.PReLU(2)
    two.weight.data[0] = 1.0
    with pytest.raises(InputError, match="slopes differ between channels"):
        activation_moments(two)
    with pytest.raises(InputError, match="gives one value to all of N"):
        activation_moments(nn.Hardtanh(20.0, 21.0))


# --- one layer against NumPy ----------------------------------------------------------------------


def reference(x, v, g, b, dz):
    """o = (relu(g (v x) / |v| + b) - m) / s and its gradients, as the paper writes them."""
    norm = np.sqrt((v**2).sum(1, keepdims=True))
    w = g[:, None] * v / norm
    u = x @ w.T + b
    out = (np.maximum(u, 0) - RELU.mean) / RELU.std
    du = dz * (u > 0) / RELU.std
    dw = du.T @ x
    dg = (dw * v).sum(1) / norm[:, 0]
    dv = (g[:, None] / norm) * (dw - v / norm * ((dw * v).sum(1, keepdims=True) / norm))
    return out, du @ w, dv, dg, du.sum(0)


def layer_of(kind, v, g, b):
    layer = propagate(nn.Sequential(kind, nn.ReLU(), nn.Linear(1, 1)).double())[:2]
    held = layer[0].parametrizations.weight
    with torch.no_grad():
        held.original1.copy_(torch.from_numpy(v).view_as(held.original1))
        held.original0.copy_(torch.from_numpy(g).view_as(held.original0))
        layer[0].bias.copy_(torch.from_numpy(b))
    return layer


def test_a_linear_layer_is_numpys_forward_and_backward():
    rng = np.random.default_rng(0)
    x, v, dz = rng.normal(size=(6, 5)), rng.normal(size=(4, 5)), rng.normal(size=(6, 4))
    g, b = rng.uniform(0.5, 2, 4), rng.normal(size=4)
    layer = layer_of(nn.Linear(5, 4), v, g, b)
    given = torch.from_numpy(x).requires_grad_()
    out = layer(given)
    out.backward(torch.from_numpy(dz))
    held = layer[0].parametrizations.weight
    found = (out, given.grad, held.original1.grad, held.original0.grad[:, 0], layer[0].bias.grad)
    for mine, theirs in zip(found, reference(x, v, g, b, dz), strict=True):
        np.testing.assert_allclose(mine.detach().numpy(), theirs, rtol=1e-12, atol=1e-13)


def test_a_convolution_is_normalised_by_the_whole_filter():
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(2, 3, 5, 5)), rng.normal(size=(4, 27))
    g, b = rng.uniform(0.5, 2, 4), rng.normal(size=4)
    layer = layer_of(nn.Conv2d(3, 4, 3), v, g, b)
    patches = functional.unfold(torch.from_numpy(x), 3).numpy().transpose(0, 2, 1).reshape(-1, 27)
    out = reference(patches, v, g, b, np.zeros((18, 4)))[0]
    mine = layer(torch.from_numpy(x)).detach().flatten(2).transpose(1, 2).reshape(-1, 4).numpy()
    np.testing.assert_allclose(mine, out, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(0.1), nn.Tanh(), nn.GELU()])
def test_gradients_are_those_of_finite_differences(act):
    layers = [nn.Conv2d(2, 3, 3, padding=1), act, nn.ConvTranspose2d(3, 4, 2, 2, groups=1)]
    model = propagate(nn.Sequential(*layers, nn.BatchNorm2d(4), copy.deepcopy(act), nn.Flatten()))
    model = model.double()
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *values))


def test_a_sample_is_normalised_alike_alone_and_in_a_batch():
    model = propagate(mlp(16, 3)).double()
    x = torch.randn(8, 10, dtype=torch.float64)
    together = model.train()(x)
    alone = torch.cat([model.train()(x[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.eval()(x), together)


# --- what is claimed of a new network -------------------------------------------------------------


def seconds(model, x):
    """The second moment behind each activation, over samples and units."""
    found = []
    with torch.no_grad():
        for part in model:
            x = part(x)
            if isinstance(part, Propagated):
                found.append(float((x.double() ** 2).mean()))
    return found


def next_second(q, gain):
    """Mean field: E[((relu(z) - m) / s)^2] for z of N(0, gain^2 q)."""
    t = gain * math.sqrt(q)
    return (t**2 - 2 * t / math.pi + 1 / math.pi) / (1 - 1 / math.pi)


@pytest.mark.parametrize("gain", [1.0, GAIN])
@pytest.mark.parametrize("start", [0.25, 1.0, 3.0])
def test_the_second_moment_goes_from_layer_to_layer_as_computed(gain, start):
    model = propagate(mlp(2000, 6), gain=gain)[3:]
    found = seconds(model, math.sqrt(start) * torch.randn(500, 2000))
    expected = []
    for _ in found:
        expected.append(next_second(expected[-1] if expected else start, gain))
    np.testing.assert_allclose(found, expected, rtol=0.05)


def test_gain_one_keeps_mean_and_variance_and_the_papers_gain_does_not():
    x = torch.randn(500, 1000)
    ends = {}
    for gain in (1.0, GAIN):
        y = propagate(mlp(1000, 9), gain=gain)[3:-1](x).detach()
        ends[gain] = (float(y.mean()), float((y**2).mean()))
    assert abs(ends[1.0][0]) < 0.05
    assert ends[1.0][1] == pytest.approx(1, abs=0.2)
    # the fixed point of next_second at 1 / 1.2112: (1/4) / (1 - 1/pi), mean (1/2 - 1) m / s
    assert ends[GAIN][1] == pytest.approx(0.25 / (1 - 1 / math.pi), abs=0.04)
    assert ends[GAIN][0] == pytest.approx(-0.5 * RELU.mean / RELU.std, abs=0.04)


@pytest.mark.parametrize(("gain", "expected"), [(1.0, 1.2112), (GAIN, 1.2112 / 1.21)])
def test_the_papers_gain_keeps_the_jacobians_singular_values_near_one(gain, expected):
    layer = propagate(mlp(400, 5), gain=gain)[3:6]
    x = torch.randn(20, 400)
    squares = [
        float((torch.func.jacrev(layer)(x[i]).detach() ** 2).sum()) / 400 for i in range(len(x))
    ]
    assert math.sqrt(np.mean(squares)) == pytest.approx(expected, abs=0.02)


# --- the variance that reaches each activation ----------------------------------------------------


class Residual(nn.Module):
    """Two blocks around an identity: the second sum holds what the first one gave."""

    def __init__(self, width):
        super().__init__()
        self.stem, self.a, self.b = (nn.Linear(width, width) for _ in range(3))
        self.norm = nn.BatchNorm1d(width)
        self.first, self.inner, self.sum = (nn.ReLU() for _ in range(3))
        self.pre = nn.ReLU()
        self.c, self.d = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x):
        x = self.first(self.norm(self.stem(x)))
        x = x + self.b(self.inner(self.a(x)))
        stream = self.sum(x) * 2 - x
        return self.d(self.pre(stream + self.c(stream)))


def test_a_sum_adds_variances():
    found = Variances(convert(Residual(4), "none")).activations
    # 1 at the first; 1 + 1 at the sum; 2^2 * 1 + 2 in the stream, and once more behind the layer c
    assert found == {"first": 1.0, "inner": 1.0, "sum": 2.0, "pre": 12.0}


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        (lambda x, y: x + y, 2.0),
        (lambda x, y: torch.sub(x, y, alpha=3), 10.0),
        (lambda x, _: x.add(x), 4.0),
        (lambda x, _: torch.add(x, x, alpha=2), 9.0),
        (lambda x, y: 3 * x - y / 2, 9.25),
        (lambda x, _: -x.mul(2).div(4), 0.25),
    ],
)
def test_arithmetic_is_followed(combine, expected):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()
            self.last = nn.Linear(4, 1)

        def forward(self, x):
            return self.last(self.act(combine(self.a(x), self.b(x))))

    assert Variances(Two()).activations == {"act": expected}


class Joined(nn.Module):
    """A concatenation of 6 channels of variance 1 and 2 of variance 9, and a transposed layer."""

    def __init__(self, join=torch.cat):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 2, 1)
        self.act, self.up, self.after = nn.ReLU(), nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.ReLU()
        self.last, self.head, self.join = nn.Conv2d(4, 1, 1), nn.Tanh(), join

    def forward(self, x):
        x = self.act(self.join([self.a(x), self.b(x) * 3], dim=1))
        return self.head(self.last(self.after(self.up(x))))


def test_a_concatenation_averages_channels_and_a_transposed_convolution_spreads():
    model = propagate(Joined())
    assert Variances(convert(Joined(), "none")).activations == {"act": 3.0, "after": 0.25}
    assert set(propagated(model)) == {"act", "after"}
    assert isinstance(model.head, nn.Tanh), "what stands behind the last layer stays"


def before(model, x):
    """The second moment of what reaches each propagated activation."""
    found = {}
    for name, part in propagated(model).items():
        part.register_forward_pre_hook(
            lambda _, args, name=name: found.__setitem__(name, float((args[0] ** 2).mean()))
        )
    with torch.no_grad():
        model(x)
    return found


def test_the_variance_followed_is_the_one_that_arrives():
    model = propagate(Residual(1500), gain=1.0)
    found = before(model, torch.randn(300, 1500))
    assert found["sum"] == pytest.approx(2, rel=0.05)
    # relu(x) and x are not independent: the factor 2 and the minus make 2 act(x) - x
    assert found["first"] == pytest.approx(1, rel=0.05)
    layers = [nn.ConvTranspose2d(64, 200, 4, 2, 1), nn.ReLU(), nn.Conv2d(200, 3, 1)]
    up = propagate(nn.Sequential(*layers), gain=1.0)
    inner = before(up[:2], torch.randn(4, 64, 40, 40))
    assert inner["1"] == pytest.approx(0.25, rel=0.1)


def test_stages_of_shapes_are_passed():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.pool = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2)
            self.b = nn.Linear(16, 2)

        def forward(self, x):
            x = functional.dropout(self.pool(self.act(self.a(x))), 0.5, self.training)
            x = torch.flatten(x, 1).view(x.shape[0], -1).reshape(x.size(0), 16)
            return functional.log_softmax(self.b(x), dim=1)

    assert propagate(Views())(torch.randn(2, 1, 6, 6)).shape == (2, 2)
    pooled = propagate(Views(), pooling=True)
    assert set(propagated(pooled)) == {"act", "pool"}
    assert float(pooled.pool.mean) == pytest.approx(max_moments(4).mean)


@pytest.mark.parametrize("kind", [nn.MaxPool2d, nn.AvgPool2d])
def test_pooling_is_normalised_where_asked_for(kind):
    model = propagate(nn.Sequential(kind([2, 3]), nn.Conv2d(1, 1, 1)), pooling=True)
    y = model[0](torch.randn(50, 1, 60, 60))
    assert float(y.mean()) == pytest.approx(0, abs=0.02)
    assert float(y.std()) == pytest.approx(1, abs=0.02)


# --- refusals -------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Two layers and an activation, with one odd thing between them."""

    def __init__(self, odd, norm=None):
        super().__init__()
        self.a, self.act, self.b, self.norm = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), norm
        self.scale, self.odd, self.pool = nn.Parameter(torch.ones(4)), odd, nn.MaxPool1d(2)

    def forward(self, x):
        return self.b(self.odd(self, self.a(x)))


ODD = {
    "calls relu as a function in the line 'return functional.relu": lambda _, x: called(x),
    "cannot read the forward of Odd": lambda _, x: x if x.sum() > 0 else -x,
    "'act' is used in several places, on inputs of variance 1 and 2": lambda m, x: m.act(
        x + m.act(x)
    ),
    "it calls mul": lambda m, x: x * m.a(x),
    "it calls mul in": lambda m, x: x * m.scale,
    "it calls add": lambda _, x: x + 1,
    "it calls div in": lambda _, x: torch.div(x, 0.1, rounding_mode="floor"),
    "it calls sub in": lambda _, x: x - x,
    "it calls matmul": lambda _, x: torch.matmul(x, x),
    "'norm' is a LayerNorm": lambda m, x: m.norm(x),
    "not all of whose channels could be counted": lambda _, x: torch.cat([x[:, :2], 2 * x[:, :2]]),
}


def called(x):
    return functional.relu(x)


@pytest.mark.parametrize(("sentence", "odd"), ODD.items(), ids=ODD)
def test_what_cannot_be_followed_is_refused_in_words(sentence, odd):
    model = Odd(odd, nn.LayerNorm(4))
    before = {name: id(part) for name, part in model.named_modules()}
    with pytest.raises(InputError, match=sentence):
        propagate(model, inplace=True)
    assert before == {name: id(part) for name, part in model.named_modules()}


def test_an_activation_shared_with_the_end_is_refused():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), shared)
    with pytest.raises(InputError, match="and behind its last layer"):
        propagate(model)


def test_pooling_by_a_function_is_refused_where_pooling_is_asked_for():
    model = Odd(lambda _, x: functional.max_pool1d(x, 1))
    propagate(model)
    with pytest.raises(InputError, match="has to be a module"):
        propagate(model, pooling=True)


def test_weights_that_something_else_computes_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    nn.utils.parametrizations.spectral_norm(model[2])
    with pytest.raises(InputError, match="The weight of '2' is computed by _SpectralNorm"):
        propagate(model)


def test_a_weight_that_two_layers_share_is_refused():
    model = mlp(10, 2)
    model[3].weight = model[0].weight
    with pytest.raises(InputError, match="is another layer's too"):
        propagate(model)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_weight_norm_by_other_than_the_output_units_is_refused(dim):
    model = nn.Sequential(nn.ConvTranspose1d(3, 4, 2), nn.ReLU(), nn.Conv1d(4, 2, 1))
    weight_norm(model[0], dim=dim)
    if dim == 1:
        propagate(model)
    else:
        with pytest.raises(InputError, match="The weight of '0' is computed by WeightNorm"):
            propagate(model)


def test_a_module_that_cannot_be_copied_is_refused_in_words():
    model = mlp(4, 1)
    model.lock = threading.Lock()
    for inplace in (False, True):
        with pytest.raises(InputError, match="Sequential cannot be copied"):
            propagate(model, inplace=inplace)


@pytest.mark.parametrize("gain", [0, -1.0, math.inf, math.nan, "1"])
def test_a_gain_out_of_range_is_refused(gain):
    with pytest.raises(UsageError, match="it must be a positive number"):
        propagate(mlp(4, 1), gain=gain)


def test_pooling_is_a_choice_of_two():
    with pytest.raises(UsageError, match="pooling is 'no'; it must be True or False"):
        propagate(mlp(4, 1), pooling="no")


# --- conversion -----------------------------------------------------------------------------------


def test_the_class_stays_and_the_batch_norms_go():
    model = Residual(8).double().eval()
    result = convert(model, "normprop")
    assert type(result) is Residual
    assert not result.training
    assert not result.first.training
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in result.modules())
    assert isinstance(model.norm, nn.BatchNorm1d), "the model given stays as it was"
    assert result.first.mean.dtype == torch.float64
    assert float(result.first.mean) == RELU.mean
    assert float(result.sum.std) == RELU.std * math.sqrt(2)
    weight = result.a.weight
    torch.testing.assert_close(weight.norm(dim=1), torch.full((8,), GAIN, dtype=torch.float64))
    torch.testing.assert_close(weight, model.a.weight / model.a.weight.norm(dim=1)[:, None] * GAIN)
    assert not result.a.bias.any()


def test_converting_twice_is_converting_once():
    once = convert(Residual(8), "normprop")
    again = convert(once, "normprop")
    assert again is not once
    assert again.state_dict().keys() == once.state_dict().keys()
    for key, tensor in once.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor)


def test_a_change_in_place_is_one_to_the_module_itself():
    model = Residual(8)
    norm, copied = model.norm, propagate(model)
    assert model.norm is norm
    assert propagate(model, inplace=True) is model
    assert model.state_dict().keys() == copied.state_dict().keys()


def test_one_module_in_two_places_stays_one():
    act = nn.ReLU()
    model = propagate(nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act, nn.Linear(2, 2)))
    assert isinstance(model[1], Propagated)
    assert model[1] is model[3]


def test_an_activation_in_place_leaves_the_stream_alone():
    class PreActivation(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.norm, self.act = nn.BatchNorm1d(4), nn.ReLU(inplace)
            self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(x + self.layer(self.act(self.norm(x))))

    one, two = PreActivation(inplace=False), PreActivation(inplace=True)
    two.load_state_dict(one.state_dict())
    x = torch.randn(8, 4)
    assert torch.equal(propagate(one)(x.clone()), propagate(two)(x.clone()))


# --- the input ------------------------------------------------------------------------------------


def images():
    return 3 + 2 * torch.randn(16, 2, 5, 5)


def test_an_input_normalised_by_its_batches_is_a_batch_norm_without_affine():
    model = propagate(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten()), input="batch")
    norm = model.input_norm
    assert type(norm) is nn.BatchNorm2d
    assert not list(norm.parameters())
    x = images()
    y = norm.train()(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    assert norm.running_mean[0] != 0
    assert model(x).shape == (16, 27)


def test_an_input_normalised_by_given_numbers_is_a_constant():
    mean, std = torch.tensor([3.0, 2.5]), torch.tensor([2.0, 0.5])
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 1))
    norm = propagate(layers.train(), input=(mean.tolist(), std.tolist())).input_norm
    x = images()
    wanted = (x - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(norm.train()(x), wanted)
    torch.testing.assert_close(norm.running_mean, mean)
    unit = propagate(layers, input=(0.0, 1.0)).input_norm
    read = Statistics(unit.running_mean.double().numpy(), unit.running_var.double().numpy())
    assert not Layer("", unit.eps, read).mean_only, "its variance is a statistic, too"
    scalar = propagate(mlp(4, 1), input=(0.5, 2)).input_norm
    torch.testing.assert_close(scalar(torch.full((1, 10), 4.5)), torch.full((1, 10), 2.0))


def test_the_users_own_input_norm_is_taken():
    own = nn.BatchNorm2d(1, affine=False)
    model = propagate(nn.Sequential(nn.Flatten(), nn.Linear(9, 2)), input=own)
    assert model.input_norm is own


@pytest.mark.parametrize(
    "how", [(0, 0), ((1, 2, 3), 1), (0, math.nan), "x", 3, (1,), ("a", "b")], ids=str
)
def test_numbers_that_normalise_nothing_are_refused(how):
    with pytest.raises(UsageError, match=r"^input is "):
        propagate(mlp(4, 1), input=how)


def test_an_input_of_unknown_channels_is_refused():
    with pytest.raises(InputError, match="the number of its channels is not known"):
        propagate(nn.Sequential(nn.Flatten(), nn.Linear(9, 2)), input="batch")


# --- at inference ---------------------------------------------------------------------------------


def test_it_is_exported_as_arithmetic():
    layers = [nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)]
    model = propagate(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2))).eval()
    graph = export_module(model, (torch.randn(1, 1, 4, 4),))
    kinds = [node.op_type for node in graph.graph]
    assert "BatchNormalization" not in kinds
    at = kinds.index("Relu")
    assert kinds[at : at + 4] == ["Relu", "Sub", "Div", "MaxPool"]
    assert {"2.mean", "2.std"} <= set(graph.graph.initializers)


def test_digits_are_learned_in_batches_of_one():
    data = load_digits()
    x, y = (data.images / 16).astype(np.float32)[:, None], data.target.astype(np.int64)
    layers = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(144, 32), nn.BatchNorm1d(32), nn.ReLU())
    model = convert(model.append(nn.Linear(32, 10)), "normprop", input=(x.mean(), x.std()))
    pairs = (x[:1000], y[:1000]), (x[1000:], y[1000:])
    result = train(
        model, pairs[0], test_data=pairs[1], epochs=2, batch_size=1, optimizer="adamw", lr=1e-3
    )
    assert result.test_accuracy > 0.9
