"""What hidden layers read and hand on: means, sizes, and the singular values of their Jacobians."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Layer:
    """What a layer reads, mean and root mean square over samples, units and channels; `jacobian`:
    the quadratic mean of the singular values of what it computes."""

    mean: float
    rms: float
    jacobian: float

    @property
    def shift(self) -> float:
        """The mean in units of the root mean square, so that scale does not enter."""
        return self.mean / self.rms


def settled(module: nn.Module, x: Tensor) -> nn.Module:
    """A copy in eval mode whose running statistics are those of x: the function of training."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        if isinstance(part, _BatchNorm):
            part.reset_running_stats()
            part.momentum = None
    with torch.no_grad():
        copied.train()(x)
    return copied.eval().requires_grad_(False)


def hidden(module: nn.Module) -> nn.Sequential:
    """The `layers` of a network, also where an input norm stands before it."""
    layers = getattr(module, "network", module).layers
    assert isinstance(layers, nn.Sequential)
    return layers


def looked_at(module: nn.Module, x: Tensor, *, jacobians: bool = True) -> list[Layer]:
    """Each hidden layer but the first, on the samples x."""
    still, found = settled(module, x), []
    network = hidden(still)
    read: dict[int, Tensor] = {}
    for number, layer in enumerate(network):
        layer.register_forward_pre_hook(lambda _, args, n=number: read.update({n: args[0]}))
    with torch.no_grad():
        still(x)
    generator = torch.Generator().manual_seed(0)
    for number, given in list(read.items())[1:]:
        size = _jacobian(network[number], given[:64], generator) if jacobians else float("nan")
        found.append(Layer(float(given.mean()), float(given.square().mean().sqrt()), size))
    return found


def _jacobian(layer: nn.Module, x: Tensor, generator: torch.Generator) -> float:
    """sqrt(E|J|_F^2 / outputs), J of one sample: E|J^T u|^2 = |J|_F^2 for random signs u."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    signs = torch.randint(0, 2, y.shape, generator=generator) * 2.0 - 1
    (gradient,) = torch.autograd.grad((y * signs).sum(), x)
    return float((gradient.square().sum() / y.numel()).sqrt())


def spectrum(module: nn.Module, x: Tensor, number: int = -2) -> list[float]:
    """The singular values of one layer's Jacobian at the first image of x."""
    network = hidden(settled(module, x))
    with torch.no_grad():
        given = network[:number](x[:1])[0]

    def layer(flat: Tensor) -> Tensor:
        y: Tensor = network[number](flat.view_as(given)[None])
        return y.flatten()

    return sorted(torch.linalg.svdvals(torch.func.jacrev(layer)(given.flatten())).tolist())
