"""What a Gaussian becomes: mean and standard deviation behind an activation, or behind pooling.

Normalization Propagation subtracts and divides by these constants instead of measuring a batch.
ReLU and leaky ReLU have closed forms; other functions are integrated in float64. The panels of the
integration meet at multiples of a power of two, where the activations in use have their kinks.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bnfold.errors import InputError

# Elementwise functions, each with the numbers that its instance holds.
ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,  # and ReLU6
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.SELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
_REACH = 12.0  # standard deviations: what lies beyond weighs less than 1e-31
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of one real variable."""

    mean: float
    std: float


def activation_moments(activation: nn.Module, variance: float = 1.0) -> Moments:
    """The moments of act(x) for x of N(0, variance).

    activation: one of `ACTIVATIONS`. A PReLU counts with the slope that it holds now.
    For ReLU 1 / sqrt(2 pi) and sqrt((1 - 1/pi) / 2) times sqrt(variance): Arpit et al. 2016,
    section 3. Raises InputError for a PReLU of several slopes and for an activation that gives one
    value everywhere.
    """
    slope = _negative_slope(activation)
    if slope is not None:
        return _leaky(slope, math.sqrt(variance))
    x, weight = _rule(math.sqrt(variance))
    y = _values(activation, x)
    mean = float(weight @ y)
    std = math.sqrt(float(weight @ (y - mean) ** 2))
    if not std > 0:
        raise InputError(
            f"{activation} gives one value to all of N(0, {variance:g}): it cannot be normalised."
        )
    return Moments(mean, std)


def max_moments(count: int, variance: float = 1.0) -> Moments:
    """The moments of the greatest of `count` independent draws of N(0, variance).

    Its density is count * phi(x) * Phi(x)^(count - 1): for a 2x2 window of N(0, 1) the mean is
    1.0294 and the standard deviation .7012, for 3x3 1.4850 and .5978.
    """
    x, weight = _rule(1.0)
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    weight = count * weight * below ** (count - 1)
    mean = float(weight @ x)
    std = math.sqrt(float(weight @ (x - mean) ** 2))
    return Moments(math.sqrt(variance) * mean, math.sqrt(variance) * std)


def average_moments(count: int, variance: float = 1.0) -> Moments:
    """The moments of the average of `count` independent draws of N(0, variance)."""
    return Moments(0.0, math.sqrt(variance / count))


def _negative_slope(activation: nn.Module) -> float | None:
    """The slope below zero of the ReLU family, else None."""
    if isinstance(activation, nn.ReLU):
        return 0.0
    if isinstance(activation, nn.LeakyReLU):
        return float(activation.negative_slope)
    if isinstance(activation, nn.PReLU):
        slopes = activation.weight.detach().double()
        if not bool((slopes == slopes[0]).all()):
            raise InputError(
                "A PReLU whose slopes differ between channels has no one mean and deviation;"
                " start it with one slope for all."
            )
        return float(slopes[0])
    return None


def _leaky(slope: float, sigma: float) -> Moments:
    # E[act] = (1 - slope) sigma / sqrt(2 pi), E[act^2] = (1 + slope^2) sigma^2 / 2
    mean = (1 - slope) / math.sqrt(2 * math.pi)
    return Moments(sigma * mean, sigma * math.sqrt((1 + slope**2) / 2 - mean**2))


def _rule(sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Points, and the weights with which a sum over them is an expectation over N(0, sigma^2)."""
    width = 2.0 ** math.floor(math.log2(min(sigma / 4, 0.5)))
    panels = math.ceil(_REACH * sigma / width)
    centres = width * (np.arange(-panels, panels) + 0.5)
    x = (centres[:, None] + width / 2 * _NODES).ravel()
    density = np.exp(-0.5 * (x / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    return x, np.tile(width / 2 * _WEIGHTS, 2 * panels) * density


def _values(activation: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        function = copy.deepcopy(activation).to("cpu", torch.float64).eval()
        values: np.ndarray = function(torch.from_numpy(x.copy())).numpy()
    return values
