"""Batch renormalization: against the NumPy oracle, and torch's batch norm where it is one."""

import math

import norm_reference as ref
import numpy as np
import pytest
import torch
from torch import nn

from bnfold.errors import UsageError
from bnfold.norm import BatchRenorm, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, Clipping
from bnfold.norm import renorm as renorms

C = 3
EPS = 0.05
CLASSES = {
    (6, C): (BatchRenorm1d, nn.BatchNorm1d),
    (5, C, 4): (BatchRenorm1d, nn.BatchNorm1d),
    (4, C, 3, 5): (BatchRenorm2d, nn.BatchNorm2d),
    (2, C, 2, 3, 2): (BatchRenorm3d, nn.BatchNorm3d),
}
SHAPES = list(CLASSES)
BOUNDS = [(1.5, 0.3), (math.inf, math.inf), (1.0, 0.0)]


def layer_for(shape, bounds=(1.5, 0.3), *, momentum=0.1, dtype=torch.float64, cls=None):
    """A layer whose state is nothing special."""
    torch.manual_seed(3)
    cls = cls or CLASSES[shape][0]
    layer = cls(C, EPS, momentum, schedule=Clipping.fixed(*bounds)).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(C))
        layer.bias.copy_(torch.randn(C))
        layer.running_mean.copy_(torch.randn(C))
        layer.running_var.copy_(torch.rand(C) + 0.1)
    return layer


def batch(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.5, 2.0, 1.0], dtype=dtype).view(-1, *[1] * (len(shape) - 2))
    return spread * torch.randn(shape, generator=generator, dtype=dtype) + 0.7


def array(tensor):
    return tensor.detach().double().numpy().copy()


def correction(layer, x):
    """r and d of a batch, as the layer has them."""
    mean, var = renorms.moments(x)
    return layer._correction(mean, (var + layer.eps).sqrt(), layer.running_std)


def check(layer, shape, bounds, steps=3, rtol=1e-10):
    """Steps of training against the oracle: outputs, gradients, running statistics."""
    for step in range(steps):
        x, dy = batch(shape, step, layer.weight.dtype), batch(shape, 90 + step, layer.weight.dtype)
        x.requires_grad_()
        mu, s = array(layer.running_mean), np.sqrt(array(layer.running_var) + EPS)
        gamma, beta = array(layer.weight), array(layer.bias)
        r, d = ref.correction(array(x), mu, s, EPS, *bounds)
        expected, backward = ref.batch_renorm(array(x), gamma, beta, r, d, EPS)
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        close = {"rtol": rtol, "atol": rtol}
        np.testing.assert_allclose(array(y), expected, **close)
        gradients = (x.grad, layer.weight.grad, layer.bias.grad)
        for gradient, wanted in zip(gradients, backward(array(dy)), strict=True):
            np.testing.assert_allclose(array(gradient), wanted, **close)
        mu, s = ref.batch_renorm_running(array(x), mu, s, EPS, layer.momentum)
        np.testing.assert_allclose(array(layer.running_mean), mu, **close)
        np.testing.assert_allclose(array(layer.running_std), s, **close)
        assert layer.num_batches_tracked == step + 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_forward_backward_and_statistics_are_the_oracles(shape, bounds):
    check(layer_for(shape, bounds), shape, bounds)


def test_the_same_in_float32_and_channels_last():
    shape = (4, C, 3, 5)
    check(layer_for(shape, dtype=torch.float32), shape, (1.5, 0.3), rtol=2e-5)
    layer = layer_for(shape)
    x = batch(shape)
    expected = layer_for(shape)(x)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)


def test_any_rank():
    for shape in SHAPES:
        check(layer_for(shape, cls=BatchRenorm), shape, (1.5, 0.3))


def unbiased(x):
    mean, var = renorms_moments(x)
    return mean, var * x[:, 0].numel() / (x[:, 0].numel() - 1)


renorms_moments = renorms.moments


class EpsilonOutside(BatchRenorm):
    def _correction(self, mean, std, s):
        std.copy_((std.square() - self.eps).sqrt() + self.eps)
        return super()._correction(mean, std, s)


class WithGradient(BatchRenorm):
    def forward(self, input):
        others = [dim for dim in range(input.dim()) if dim != 1]
        live = (input.var(others, correction=0) + self.eps).sqrt(), input.mean(others)
        s = self.running_std
        correction = live[0] / s, (live[1] - self.running_mean.clone()) / s
        self._correction = lambda *_: correction
        return super().forward(input)


class AveragesTheVariance(BatchRenorm):
    def forward(self, input):
        kept = self.running_var.clone()
        output = super().forward(input)
        self.running_var.copy_(kept.lerp(renorms.moments(input)[1], self.momentum).detach())
        return output


class MeasuresFirst(BatchRenorm):
    def _correction(self, mean, std, s):
        kept = self.running_mean.clone()
        self.running_mean.lerp_(mean, self.momentum)
        correction = super()._correction(mean, std, s)
        self.running_mean.copy_(kept)
        return correction


@pytest.mark.parametrize(
    "fault", ["unbiased", EpsilonOutside, WithGradient, AveragesTheVariance, MeasuresFirst]
)
def test_a_planted_fault_is_seen(fault, monkeypatch):
    shape = (4, C, 3, 5)
    if fault == "unbiased":
        monkeypatch.setattr(renorms, "moments", unbiased)
        layer = layer_for(shape, (9.0, 9.0))
    else:
        layer = layer_for(shape, (9.0, 9.0), cls=fault)
    with pytest.raises(AssertionError, match="Not equal"):
        check(layer, shape, (9.0, 9.0), steps=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_against_finite_differences_with_r_and_d_held(shape):
    layer = layer_for(shape)
    held = correction(layer, batch(shape))
    layer._correction = lambda *_: held
    x = batch(shape).requires_grad_()

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_clipping_training_is_inference(shape):
    layer = layer_for(shape, (math.inf, math.inf))
    x = batch(shape)
    inference = layer.eval()(x)
    plain = CLASSES[shape][1](C, EPS).double()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain.eval()(x), inference)
    training = layer.train()(x)
    torch.testing.assert_close(training, inference, rtol=1e-13, atol=1e-13)
    clipped = layer_for(shape, (1.5, 0.3))(x)
    assert (clipped - inference).abs().max() > 0.1  # it is the clipping that was not there


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_leaves_the_batchs_mean_and_scale(shape):
    layer = layer_for(shape, (math.inf, math.inf))
    layer.eps = 1e-30
    x = batch(shape).requires_grad_()
    layer(x).backward(batch(shape, 9))
    others = [dim for dim in range(x.dim()) if dim != 1]
    assert x.grad.sum(others).abs().max() < 1e-12
    assert (x.grad * x).sum(others).abs().max() < 1e-12


# --- where it is torch's batch norm --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_r_1_and_d_0_is_torchs_batch_norm_in_every_bit(shape, dtype, affine):
    ours, torchs = (cls(C, momentum=0.1, affine=affine) for cls in CLASSES[shape])
    ours.schedule = Clipping(start=5, r_end=9, d_end=9)
    if affine:
        torch.manual_seed(0)
        with torch.no_grad():
            ours.weight.copy_(torchs.weight.normal_())
            ours.bias.copy_(torchs.bias.normal_())
    for layer in (ours.to(dtype), torchs.to(dtype)):
        layer.optimiser = torch.optim.SGD(layer.parameters(), 0.1) if affine else None
    for step in range(8):
        x, dy = batch(shape, step, dtype), batch(shape, 90 + step, dtype)
        given = []
        for layer in (ours, torchs):
            layer.zero_grad()
            values = x.clone().requires_grad_()
            y = layer(values)
            y.backward(dy)
            given.append([y.detach(), values.grad, layer.running_mean.clone()])
            given[-1] += [parameter.grad.clone() for parameter in layer.parameters()]
            if layer.optimiser:
                layer.optimiser.step()
        same = [torch.equal(a, b) for a, b in zip(*given, strict=True)]
        if step <= 5:
            assert all(same)
        else:  # the bounds have opened
            assert not same[0]


def test_under_autocast_statistics_stay_wide():
    shape = (4, C, 3, 5)
    x = (100 + batch(shape)).float()
    layer, torchs = BatchRenorm2d(C, momentum=0.5), nn.BatchNorm2d(C, momentum=0.5)
    conv = nn.Conv2d(C, C, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(conv(x))
        assert torch.equal(y, torchs(conv(x)))
        assert y.dtype == torch.bfloat16
        inputs = array(conv(x))
    assert layer.running_mean.dtype == layer.running_std.dtype == torch.float32
    mu, s = ref.batch_renorm_running(inputs, 0.0, np.sqrt(1 + layer.eps), layer.eps, 0.5)
    np.testing.assert_allclose(array(layer.running_mean), mu, rtol=1e-6)
    np.testing.assert_allclose(array(layer.running_std), s, rtol=1e-6)


def test_its_state_is_a_batch_norms_both_ways():
    layer, torchs = layer_for((4, C, 3, 5)), nn.BatchNorm2d(C, EPS).double()
    layer(batch((4, C, 3, 5)))
    torchs.load_state_dict(layer.state_dict())
    x = batch((4, C, 3, 5), 5)
    assert torch.equal(torchs.eval()(x), layer.eval()(x))
    back = BatchRenorm2d(C, EPS).double()
    back.load_state_dict(torchs.state_dict())
    assert back.num_batches_tracked == 1
    assert torch.equal(back.eval()(x), layer(x))


def test_the_cumulative_average():
    layer = layer_for((6, C), momentum=None)
    batches = [batch((6, C), seed) for seed in range(4)]
    for x in batches:
        layer(x)
    mean = sum(x.mean(0) for x in batches) / 4
    std = sum((x.var(0, correction=0) + EPS).sqrt() for x in batches) / 4
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_std, std)


def test_a_constant_channel_keeps_a_variance_that_is_none():
    layer = BatchRenorm2d(C, 1e-3, 1.0)
    for _ in range(3):
        layer(torch.full((4, C, 3, 5), 7.0))
        assert (layer.running_var >= 0).all()
        assert (layer.running_var < 1e-9).all()
    assert layer.eval()(torch.full((4, C, 3, 5), 7.0)).abs().max() < 1e-5


def test_two_forwards_before_a_backward():
    layer = layer_for((6, C))
    (layer(batch((6, C))) + layer(batch((6, C), 1))).sum().backward()


def test_one_value_for_a_channel_is_refused_as_torch_does():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchRenorm1d(C)(torch.zeros(1, C))
    with pytest.raises(ValueError, match="expected 4D input"):
        BatchRenorm2d(C)(torch.zeros(2, C))


# --- the schedule --------------------------------------------------------------------------------


def test_the_papers_schedule():
    paper = Clipping()
    assert paper.at(0) == paper.at(4_999) == paper.at(5_000) == (1, 0)
    assert paper.at(15_000) == (pytest.approx(1 + 2 * 10 / 35), pytest.approx(2.5))
    assert paper.at(25_000) == (pytest.approx(1 + 2 * 20 / 35), 5)
    assert paper.at(40_000) == paper.at(10**9) == (3, 5)
    assert Clipping.over(1_500) == Clipping(3, 5, 50, 400, 250)
    assert Clipping.fixed(2, 1).at(0) == (2, 1)
    free = Clipping(math.inf, math.inf, 10, 20, 30)
    assert free.at(19) == (1, 0)
    assert free.at(20) == (math.inf, 0)
    assert free.at(30) == (math.inf, math.inf)


def test_the_step_is_the_count_of_batches():
    layer = layer_for((6, C))
    layer.schedule = Clipping(3.0, 5.0, 1, 3, 2)
    far = 100 + 50 * batch((6, C))
    seen = []
    for _ in range(4):
        r, d = correction(layer, far)
        seen.append((float(r.max()), float(d.max())))
        layer.num_batches_tracked += 1
    assert seen == [(1, 0), (1, 0), (2, 5), (3, 5)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"r_max": 0.5}, "r_max is 0.5; it must be a number, 1 or more"),
        ({"r_max": "3"}, "r_max is '3'; it must be a number"),
        ({"r_max": math.nan}, "r_max is nan"),
        ({"d_max": -1}, "d_max is -1; it must be a number, 0 or more"),
        ({"d_max": None}, "d_max is None"),
        ({"start": 30_000}, "start at step 30000"),
        ({"start": -1}, "start is -1; it must be a whole number, 0 or more"),
        ({"r_end": 1e5}, "r_end is 100000.0; it must be a whole number"),
    ],
)
def test_bounds_that_make_no_sense(arguments, words):
    with pytest.raises(UsageError, match=words):
        Clipping(**arguments)
