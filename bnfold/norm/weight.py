"""Weight normalization: each output unit's weight as a length and a direction, w = g v / |v|.

Salimans & Kingma: Weight Normalization, 2016; with the data-dependent initialisation of section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnfold.errors import InputError, UsageError
from bnfold.norm.batch import MeanOnlyBatchNorm
from bnfold.parts import parts

WEIGHTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class WeightNorm(nn.Module):
    """The parametrization w = g v / |v|, one length g for each index of `dim`.

    With `groups` > 1, of a transposed convolution (Cin, Cout / groups, k...), the lengths are those
    of the output channels, `dim` 1 within each group of dimension 0. With `c`, the length is held
    as s, g = exp(c s). A row of zeros stays zeros: its direction is that of all ones, its length 0.
    """

    def __init__(self, dim: int = 0, *, groups: int = 1, c: float | None = None) -> None:
        super().__init__()
        self.dim, self.groups, self.c = dim, groups, c

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight, of the shape of `v`."""
        rows = self._rows(v)
        norm = self._norm(rows)
        direction = rows / torch.where(norm == 0, torch.ones_like(norm), norm)
        length = g if self.c is None else (self.c * g).exp()
        return (length * direction).view_as(v)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(g, v) of a weight, v being the weight itself."""
        rows = self._rows(weight)
        norm = self._norm(rows)
        g = norm
        if self.c is not None:
            g = norm.clamp(min=torch.finfo(norm.dtype).tiny).log() / self.c
        return g, torch.where(norm == 0, torch.ones_like(rows), rows).view_as(weight)

    def rescaled(self, g: Tensor, factor: Tensor) -> Tensor:
        """The `g` whose lengths are `factor` (one for each unit, positive) times as large."""
        shaped = factor.to(g.dtype).view_as(g)
        return g * shaped if self.c is None else g + shaped.log() / self.c

    def _rows(self, v: Tensor) -> Tensor:
        return v if self.groups == 1 else v.unflatten(0, (self.groups, -1))

    def _norm(self, rows: Tensor) -> Tensor:
        kept = {self.dim % rows.dim()} if self.groups == 1 else {0, 2}
        summed = [d for d in range(rows.dim()) if d not in kept]
        return torch.linalg.vector_norm(rows, dim=summed, keepdim=True)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"dim={self.dim}, groups={self.groups}, c={self.c}"


def weight_norm(
    layer: nn.Module, *, dim: int | None = None, log_scale: bool | float = False
) -> nn.Module:
    """Weight-normalise a linear or convolution layer in place; the weight keeps its value.

    `dim` None: one length for each output unit, also of transposed and of grouped convolutions;
    else one for each index of that dimension of the weight. `log_scale`: the length is held as
    its logarithm, g = exp(c s), c being 1 or the number given. A layer that has a weight norm
    already, this one or torch's, is left as it is. Returns the layer.

    Raises InputError for a layer of another kind, and for one whose weight is computed otherwise.
    """
    if not isinstance(layer, WEIGHTED):
        raise InputError(
            f"Weight norm is for linear and convolution layers, not for {type(layer).__name__}."
        )
    if weight_normed(layer):
        return layer
    if parametrize.is_parametrized(layer, "weight") or "weight" not in layer._parameters:
        raise InputError(
            f"The weight of this {type(layer).__name__} is computed by something else already;"
            " take that off before weight norm."
        )
    groups = 1
    if dim is None:
        transposed = isinstance(layer, _TRANSPOSED)
        dim = 1 if transposed else 0
        groups = cast(int, layer.groups) if transposed else 1
    c = None if log_scale is False else float(log_scale)
    parametrize.register_parametrization(
        layer, "weight", WeightNorm(dim, groups=groups, c=c), unsafe=False
    )
    return layer


def weight_normed(layer: nn.Module) -> bool:
    """Whether a layer's weight has a weight norm, bnfold's or torch's."""
    if not parametrize.is_parametrized(layer, "weight"):
        return False
    (first, *_) = cast(nn.ModuleDict, layer.parametrizations)["weight"]
    return isinstance(first, WeightNorm | nn.utils.parametrizations._WeightNorm)


# --- data-dependent initialisation ---------------------------------------------------------------


@torch.no_grad()
def initialise(
    model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None = None
) -> list[str]:
    """Set each weight-normed layer so that its outputs have mean 0 and deviation 1 on a batch.

    One forward pass, in place: a layer's lengths and bias are set as the batch reaches it, so the
    layers behind it see what it then gives. A layer without bias gets its scale alone; a mean-only
    batch norm gets the batch's mean as its running mean. `forward(model, batch)` is how the model
    is called, `model(batch)` by default. A layer that runs twice is set by its first call; a
    channel that is constant on the batch keeps its scale. Modes stay as they were; the pass itself
    is in eval mode. Returns the names of the layers that were set.

    Raises UsageError where there is no weight-normed layer, or the batch reaches none.
    """
    set_: dict[int, str] = {}
    modes = {part: part.training for part in model.modules()}
    hooks = []

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def act(layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if id(layer) in set_:
                return None
            set_[id(layer)] = name
            if isinstance(layer, MeanOnlyBatchNorm):
                return _centre(layer, args[0], output)
            return _standardise(layer, output)

        return act

    for name, part in parts(model):
        if weight_normed(part) or isinstance(part, MeanOnlyBatchNorm):
            hooks.append(part.register_forward_hook(hook(name)))
    try:
        model.eval()
        (forward or (lambda m, b: m(b)))(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
        for part, mode in modes.items():
            part.training = mode
    if not set_:
        raise UsageError(
            "No weight-normed layer ran, so there is nothing to initialise; convert the model to"
            " 'weight' or 'weight-mean-only' first, and give a batch that it can take."
        )
    return list(set_.values())


def _standardise(layer: nn.Module, output: Tensor) -> Tensor:
    """Scale and shift a layer to outputs of mean 0 and deviation 1; these outputs."""
    axis = output.dim() - 1 - len(getattr(layer, "kernel_size", ()))
    shape = [-1 if d == axis else 1 for d in range(output.dim())]
    var, mean = torch.var_mean(
        output.double(), [d for d in range(output.dim()) if d != axis], correction=0
    )
    std = var.sqrt()
    factor = torch.where(std > 1e-6 * mean.abs(), 1 / std, torch.ones_like(std))
    _rescale(layer, factor)
    bias = cast(Tensor | None, layer.bias)
    origin = mean
    if bias is None:
        origin = torch.zeros_like(mean)
    else:
        bias.copy_((bias.double() - mean) * factor)
    return ((output - origin.view(shape)) * factor.view(shape)).to(output.dtype)


def _rescale(layer: nn.Module, factor: Tensor) -> None:
    """Multiply a layer's output units by positive factors."""
    held = cast(nn.ModuleDict, layer.parametrizations)["weight"]
    norm = held[0]
    weight = cast(Tensor, layer.weight)
    by_units = isinstance(layer, _TRANSPOSED) == (norm.dim == 1)
    if isinstance(norm, WeightNorm) and by_units:
        held.original0.copy_(norm.rescaled(held.original0, factor))
    elif isinstance(layer, _TRANSPOSED):
        groups = cast(int, layer.groups)
        rows = weight.unflatten(0, (groups, -1))
        scale = factor.to(weight.dtype).view(groups, 1, -1, *[1] * (weight.dim() - 2))
        layer.weight = (rows * scale).view_as(weight)
    else:
        layer.weight = weight * factor.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))


def _centre(norm: MeanOnlyBatchNorm, input: Tensor, output: Tensor) -> Tensor:
    """Give a mean-only batch norm the mean of its input; what it then gives."""
    assert norm.running_mean is not None
    mean = input.double().transpose(0, 1).flatten(1).mean(1)
    shape = [-1 if d == 1 else 1 for d in range(input.dim())]
    shifted = output + (norm.running_mean - mean).to(output.dtype).view(shape)
    norm.running_mean.copy_(mean)
    return shifted
