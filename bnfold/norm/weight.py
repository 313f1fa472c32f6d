"""Weight normalization: each output unit's weight as a length and a direction, w = g v / |v|.

Salimans & Kingma: Weight Normalization, 2016; with the data-dependent initialisation of section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnfold.errors import InputError, UsageError
from bnfold.norm.batch import MeanOnlyBatchNorm
from bnfold.norm.options import check_options
from bnfold.parts import parts

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


class WeightNorm(nn.Module):
    """The parametrization w = g v / |v|, one length g for each index of `dim`.

    With `groups` > 1, of a transposed convolution (Cin, Cout / groups, k...), the lengths are those
    of the output channels, `dim` 1 within each group of dimension 0. With `c`, the length is held
    as s, g = exp(c s), and cannot be 0. Otherwise a row of zeros stays zeros: its direction is that
    of all ones, its length 0.
    """

    def __init__(self, dim: int = 0, groups: int = 1, *, c: float | None = None) -> None:
        super().__init__()
        self.dim, self.groups, self.c = dim, groups, c

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight, of the shape of `v`."""
        rows = self._rows(v)
        norm = self._norm(rows)
        length = g if self.c is None else (self.c * g).exp()
        weight: Tensor = length * (rows / torch.where(norm == 0, 1, norm))
        return weight.reshape(v.shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(g, v) of a weight, v being the weight itself."""
        rows = self._rows(weight)
        norm = self._norm(rows)
        v = torch.where(norm == 0, 1, rows).reshape(weight.shape)
        if self.c is None:
            return norm, v
        return norm.clamp(min=torch.finfo(norm.dtype).tiny).log() / self.c, v

    def rescaled(self, g: Tensor, factor: Tensor) -> Tensor:
        """The `g` whose lengths are `factor` (positive, one for each) times as large."""
        factor = factor.view_as(g)
        return g * factor if self.c is None else g + factor.log() / self.c

    def _rows(self, v: Tensor) -> Tensor:
        return v if self.groups == 1 else v.view(self.groups, -1, *v.shape[1:])

    def _norm(self, rows: Tensor) -> Tensor:
        kept = {self.dim % rows.dim()} if self.groups == 1 else {0, 2}
        others = [dim for dim in range(rows.dim()) if dim not in kept]
        norm: Tensor = torch.linalg.vector_norm(rows, dim=others, keepdim=True)
        return norm

    def extra_repr(self) -> str:
        """The arguments."""
        return f"dim={self.dim}, groups={self.groups}, c={self.c}"


def weight_norm(
    layer: nn.Module, *, dim: int | None = None, log_scale: bool | float = False
) -> nn.Module:
    """Weight-normalise a linear or convolution layer in place; the weight keeps its value.

    `dim` None: one length for each output unit, also of transposed and of grouped convolutions;
    else one for each index of that dimension of the weight. `log_scale`: the length is held as
    its logarithm, g = exp(c s), c being 1 (True) or the number given; 0 is False. A layer that has
    a weight norm already, this one or torch's, is left as it is. Returns the layer.

    Raises InputError for a layer of another kind, for one whose weight is computed otherwise, and
    for a row of zeros where lengths are held as logarithms; UsageError for a c that is none.
    """
    check_weight(layer, log_scale=log_scale)
    if weight_normed(layer):
        return layer
    groups = 1
    if dim is None:
        dim, groups = _units(layer)
    c = float(log_scale) if log_scale else None
    parametrize.register_parametrization(layer, "weight", WeightNorm(dim, groups, c=c))
    return layer


def _units(layer: Any) -> tuple[int, int]:
    """The dimension of a layer's weight that holds the output units, and in how many groups."""
    return (1, layer.groups) if isinstance(layer, TRANSPOSED) else (0, 1)


def check_weight(layer: nn.Module, name: str = "", log_scale: bool | float = False) -> None:
    """InputError for a layer that can have no weight norm, UsageError for no such scale."""
    check_options({"log_scale": log_scale})
    what = f"{type(layer).__name__} '{name}'" if name else type(layer).__name__
    if not isinstance(layer, WEIGHTED):
        raise InputError(f"Weight norm is for linear and convolution layers, not for {what}.")
    if not weight_normed(layer) and not isinstance(layer._parameters.get("weight"), nn.Parameter):
        raise InputError(
            f"The weight of {what} is computed from other tensors already; take off what computes"
            " it before weight norm."
        )
    if weight_normed(layer) or not log_scale:
        return
    lengths = WeightNorm(*_units(layer)).right_inverse(layer.weight)[0]
    if not lengths.is_meta and (lengths == 0).any():
        raise InputError(
            f"The weight of {what} has units of zeros, whose length has no logarithm; give them"
            " other values, or lengths without log_scale."
        )


def weight_normed(layer: nn.Module) -> bool:
    """Whether a layer's weight has a weight norm, bnfold's or torch's."""
    norm = _parametrization(layer)[0] if parametrize.is_parametrized(layer, "weight") else None
    return isinstance(norm, WeightNorm | torch.nn.utils.parametrizations._WeightNorm)


def _parametrization(layer: Any) -> Any:
    """What computes a layer's weight, and the tensors that it computes it from."""
    return layer.parametrizations["weight"]


# --- data-dependent initialisation ---------------------------------------------------------------


@torch.no_grad()
def initialise(
    model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None = None
) -> list[str]:
    """Set each weight-normed layer so that its outputs have mean 0 and deviation 1 on a batch.

    One forward pass, in place: a layer's lengths and bias are set as the batch reaches it, so the
    layers behind it see what it then gives. A layer without bias gets its scale alone; a mean-only
    batch norm gets the batch's mean as its running mean, and in a network with such norms, which
    have no scale, the layers without weight norm are set too. `forward(model, batch)` is how the
    model is called, `model(batch)` by default. A layer that runs twice is set by its first call; a
    channel that is constant on the batch keeps its scale. Modes stay as they were; the pass itself
    is in eval mode. Returns the names of the layers that were set.

    Raises UsageError where no such layer runs.
    """
    done: dict[int, str] = {}
    modes = {part: part.training for part in model.modules()}
    hooks = []
    mean_only = any(isinstance(part, MeanOnlyBatchNorm) for part in modes)
    settable = (MeanOnlyBatchNorm, *WEIGHTED) if mean_only else ()
    for name, part in parts(model):
        if weight_normed(part) or isinstance(part, settable):
            hooks.append(part.register_forward_hook(_setting(name, done)))
    try:
        model.eval()
        model(batch) if forward is None else forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes.items():
            part.training = mode
    if not done:
        raise UsageError(
            "No weight-normed layer ran, so there is nothing to initialise; convert the model to"
            " 'weight' or 'weight-mean-only' first, and give a batch that reaches its layers."
        )
    return list(done.values())


def _setting(name: str, done: dict[int, str]) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    """A forward hook that sets a layer at its first call, and puts down its name."""

    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if id(layer) in done:
            return None
        done[id(layer)] = name
        if isinstance(layer, MeanOnlyBatchNorm):
            return _centre(layer, args[0], output)
        return _standardise(layer, output)

    return hook


def _standardise(layer: Any, output: Tensor) -> Tensor:
    """Scale and shift a layer to outputs of mean 0 and deviation 1; these outputs."""
    axis = output.dim() - 1 - len(getattr(layer, "kernel_size", ()))
    rows = output.double().movedim(axis, 0).flatten(1)
    mean, std = rows.mean(1), rows.std(1, correction=0)
    factor = torch.where(std > 1e-6 * mean.abs(), 1 / std, 1.0)
    _rescale(layer, factor)
    if layer.bias is None:
        mean = torch.zeros_like(mean)
    else:
        layer.bias.copy_((layer.bias - mean) * factor)
    shape = [-1 if dim == axis else 1 for dim in range(output.dim())]
    return ((output - mean.view(shape)) * factor.view(shape)).to(output.dtype)


def _rescale(layer: Any, factor: Tensor) -> None:
    """Multiply a layer's output units by positive factors."""
    dim, groups = _units(layer)
    if weight_normed(layer):
        held = _parametrization(layer)
        norm = held[0]
        if isinstance(norm, WeightNorm) and (norm.dim, norm.groups) == (dim, groups):
            held.original0.copy_(norm.rescaled(held.original0, factor))
            return
    weight = layer.weight  # it has no lengths of output units: the whole weight anew
    rows = weight.view(groups, -1, *weight.shape[1:]).movedim(dim + 1, 1)
    scaled = rows * factor.view(groups, -1, *[1] * (weight.dim() - 1))
    scaled = scaled.movedim(1, dim + 1).reshape(weight.shape).to(weight.dtype)
    if isinstance(weight, nn.Parameter):
        weight.copy_(scaled)
    else:
        layer.weight = scaled


def _centre(norm: MeanOnlyBatchNorm, input: Tensor, output: Tensor) -> Tensor:
    """Give a mean-only batch norm the mean of its input; what it then gives."""
    assert norm.running_mean is not None
    mean = input.double().transpose(0, 1).flatten(1).mean(1)
    shift = norm.running_mean - mean
    norm.running_mean.copy_(mean)
    return output + shift.to(output.dtype).view(-1, *[1] * (input.dim() - 2))
