"""Normalization Propagation: the network is normalised by constants, not by its batches.

Arpit, Zhou, Kota & Govindaraju, ICML 2016 (arXiv 1603.01431). The weights of each output unit have
norm 1 times a learned gain, so normalised inputs give normalised pre-activations; what an
activation makes of N(0, 1) is known beforehand, so its mean is subtracted and its deviation divided
out:

    o_i = (act(gain_i * (W_i . x) / ||W_i|| + b_i) - mean) / std

No batch statistics, hence any batch size, and the same function in training and at inference.
Two wishes for the first gain exclude each other (`docs/decisions/0016`): 1 keeps every layer's
second moment at 1, 1/1.21 = sqrt(1 - 1/pi) keeps the singular values of its Jacobian near 1.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnfold.errors import InputError, UsageError
from bnfold.norm import batch as batch_norms
from bnfold.norm.convert import check_weights, convert
from bnfold.norm.gaussian import Moments, activation_moments, average_moments, max_moments
from bnfold.norm.options import check_options
from bnfold.norm.variance import AVERAGE_POOLS, Variances
from bnfold.norm.weight import TRANSPOSED, WEIGHTED, WeightNorm, weight_norm
from bnfold.parts import copied, parts, put_in

GAIN = 1 / 1.21
# A division by std itself; with an eps of 0 and a std of 1 it would be a mean-only batch norm.
_EPS = 1e-30
Input = Literal["batch"] | tuple[float | Sequence[float], float | Sequence[float]] | nn.Module


class Propagated(nn.Module):
    """An activation, or pooling, whose output is normalised: (act(x) - mean) / std.

    mean, std: what `act` makes of the Gaussian that is expected before it, two buffers without
    dimensions. x: any shape that `act` takes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, act: nn.Module, moments: Moments, **factory: Any) -> None:
        super().__init__()
        self.act = act
        self.register_buffer("mean", torch.tensor(moments.mean, **factory))
        self.register_buffer("std", torch.tensor(moments.std, **factory))
        self.train(act.training)

    def forward(self, x: Tensor) -> Tensor:
        """Activate, subtract, divide; the shape is that of `act`'s output."""
        y: Tensor = (self.act(x) - self.mean) / self.std
        return y

    def extra_repr(self) -> str:
        """The constants, in figures."""
        return f"mean={float(self.mean):.5g}, std={float(self.std):.5g}"


def propagate(
    model: nn.Module,
    *,
    gain: float = GAIN,
    input: Input | None = None,
    pooling: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """The network by Normalization Propagation: its batch norms go, the rest is reparametrised.

    Every linear and convolutional layer gets weight norm by output unit, with all gains at `gain`
    and all biases at 0; every activation that leads on to such a layer becomes `Propagated`, by the
    constants of N(0, v). v is 1 in a plain chain; behind a sum it is the sum of the variances, in a
    concatenation their average (`variance.py`), the gain not counted. What stands behind the last
    layer is left as it is.

    gain: the paper's 1/1.21, or 1 (see the module's head). input: what normalises the network's
    input, which is expected to be normalised where this is None: "batch" (batch statistics and
    running averages: a batch norm without affine), (mean, std) of the data, one number or one a
    channel, or a module of your own; the result is then a Sequential of `input_norm` and `network`.
    pooling: normalise behind pooling modules too, as if they read N(0, v); the paper does not.
    inplace: change the module itself instead of a copy.

    Raises InputError for a network that cannot be followed, UsageError for an option out of range.
    """
    check_options({"gain": gain, "pooling": pooling})
    bare = _without_norms(copied(model))
    found = Variances(bare, pooling=pooling)
    in_front = None if input is None else _input_norm(bare, found.first, input)
    moments = {
        n: activation_moments(bare.get_submodule(n), v) for n, v in found.activations.items()
    }
    moments |= {n: _pool_moments(bare.get_submodule(n), v) for n, v in found.pools.items()}
    _check_weight_norms(bare)
    check_weights(bare)
    # all that can be refused has been
    target = _without_norms(model) if inplace else bare
    for _, part in parts(target):
        if isinstance(part, WEIGHTED):
            _reparametrise(part, gain)
    _normalise(target, moments)
    if in_front is None:
        return target
    return nn.Sequential(OrderedDict(input_norm=in_front, network=target)).train(model.training)


def _without_norms(model: nn.Module) -> nn.Module:
    """The model, in place, without batch norms and constants; its layers with biases."""
    acts = {id(part): part.act for _, part in parts(model) if isinstance(part, Propagated)}
    return convert(put_in(model, acts), "none", inplace=True)


def _check_weight_norms(model: nn.Module) -> None:
    """Weights that are normed already must be so by the output unit."""
    for name, part in parts(model):
        if not isinstance(part, WEIGHTED) or not parametrize.is_parametrized(part, "weight"):
            continue
        held = cast(Any, part).parametrizations.weight
        unit = 1 if isinstance(part, TRANSPOSED) else 0
        if len(held) > 1 or not isinstance(held[0], WeightNorm) or held[0].dim != unit:
            raise InputError(
                f"The weight of '{name}' is computed by {held[0]}; take that off"
                " (torch.nn.utils.parametrize.remove_parametrizations) before this."
            )


@torch.no_grad()
def _reparametrise(layer: Any, gain: float) -> None:
    """Weight norm by output unit, the direction of the weight that is there, no bias yet."""
    weight_norm(layer)
    held = layer.parametrizations.weight
    c = held[0].c
    held.original0.fill_(gain if c is None else math.log(gain) / c)
    layer.bias.zero_()


def _normalise(model: nn.Module, moments: dict[str, Moments]) -> None:
    """Put `Propagated` around modules, in place; a module in two places stays one."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    new: dict[int, nn.Module] = {}
    for name, known in moments.items():
        act = model.get_submodule(name)
        new[id(act)] = Propagated(act, known, device=like.device, dtype=like.dtype)
    put_in(model, new)


def _pool_moments(pool: nn.Module, variance: float) -> Moments:
    rank = int(type(pool).__name__[-2])
    size = cast(Any, pool).kernel_size
    count = size**rank if isinstance(size, int) else math.prod(size)
    average = isinstance(pool, AVERAGE_POOLS)
    return (average_moments if average else max_moments)(count, variance)


# --- the input ------------------------------------------------------------------------------------


def _input_norm(model: nn.Module, first: Sequence[str], how: Input) -> nn.Module:
    """A batch norm without affine for what the first layer reads; frozen where mean, std are given.

    Raises InputError where the first layer does not tell how many channels the input has.
    """
    if isinstance(how, nn.Module):
        return how
    layer = model.get_submodule(first[0]) if first else model
    if isinstance(layer, nn.Linear):
        rank, channels = 1, layer.in_features
    elif isinstance(layer, WEIGHTED):
        rank, channels = len(cast(Any, layer).kernel_size), cast(int, layer.in_channels)
    else:
        raise InputError(
            "The network's input is not read by a linear or convolution layer directly, so the"
            " number of its channels is not known; give the module yourself, as in"
            " input=nn.BatchNorm2d(1, affine=False)."
        )
    weight = layer.weight
    factory = {"device": weight.device, "dtype": weight.dtype}
    if how == "batch":
        norm: nn.Module = getattr(nn, f"BatchNorm{rank}d")(channels, affine=False, **factory)
        return norm
    frozen = getattr(batch_norms, f"FrozenBatchNorm{rank}d")(channels, eps=_EPS, **factory)
    mean, std = _numbers(how, channels)
    frozen.running_mean.copy_(mean)
    frozen.running_var.copy_(std**2)
    return cast(nn.Module, frozen)


def _numbers(how: Any, channels: int) -> tuple[Tensor, Tensor]:
    """(mean, std) as float64 tensors. Raises UsageError for what is no such pair."""
    try:
        mean, std = (torch.as_tensor(numbers, dtype=torch.float64) for numbers in how)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"input is {how!r}; it must be 'batch', a pair (mean, std) or a module."
        ) from error
    fits = all(x.dim() == 0 or x.shape == (channels,) for x in (mean, std))
    if not (
        fits and bool(torch.isfinite(mean).all() and torch.isfinite(std).all() & (std > 0).all())
    ):
        raise UsageError(
            f"input is ({mean.tolist()}, {std.tolist()}): mean and std must each be one finite"
            f" number or one for each of the {channels} channels, std above 0."
        )
    return mean, std
