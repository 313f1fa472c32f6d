"""Networks well and ill conditioned, with the statistics that their activations really have.

A profile changes a module's weights in place, whatever the architecture; `conditioned` then
measures the statistics on the inputs that such a network is given. All of these compute sensible
numbers, and all of them can be folded exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
SMALLEST_VARIANCE = 1e-12
Layers = list[tuple[nn.Module, nn.modules.batchnorm._BatchNorm]]
Spoil = Callable[[nn.Module, Layers], None]


@dataclass(frozen=True)
class Profile:
    """How a network is changed, and whether its inputs are pixels from 0 to 255."""

    change: Spoil
    pixels: bool = False

    def inputs(self, rows: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
        """What the network is given: float32 (rows, *shape), normal or pixels."""
        rng = np.random.default_rng(seed)
        if self.pixels:
            return rng.integers(0, 256, (rows, *shape)).astype(np.float32)
        return rng.standard_normal((rows, *shape)).astype(np.float32)


def _ordinary(_: nn.Module, __: Layers) -> None:
    """As it is initialised."""


def _spread_gammas(_: nn.Module, layers: Layers) -> None:
    for _, norm in layers:
        count = norm.num_features
        norm.weight.data = 10 ** (torch.rand(count) * 4 - 2) * torch.sign(torch.randn(count))


def _dead_channels(_: nn.Module, layers: Layers) -> None:
    for layer, _ in layers:
        layer.weight.data[::4] *= 1e-6


def _large_means(_: nn.Module, layers: Layers) -> None:
    for layer, _ in layers:
        count = layer.weight.shape[0]
        layer.bias = nn.Parameter(1000.0 * torch.ones(count))


def _large_weights(network: nn.Module, layers: Layers) -> None:
    layers[0][0].weight.data *= 1e4
    _scale_output(network, 1e4)


def _tiny_outputs(network: nn.Module, _: Layers) -> None:
    _scale_output(network, 1e-6)


def _scale_output(network: nn.Module, factor: float) -> None:
    last = [module for module in network.modules() if isinstance(module, CONVOLUTIONS)][-1]
    last.weight.data *= factor
    if last.bias is not None:
        last.bias.data *= factor


PROFILES: Mapping[str, Profile] = {
    "ordinary": Profile(_ordinary),
    "gammas over four decades": Profile(_spread_gammas),
    "variances of 1e-12": Profile(_dead_channels),
    "large means": Profile(_large_means),
    "large weights": Profile(_large_weights),
    "tiny outputs": Profile(_tiny_outputs),
    "pixels of 0 to 255": Profile(_ordinary, pixels=True),
}


def conditioned(
    network: nn.Module, shape: tuple[int, ...], profile: Profile, *, rows: int = 16, seed: int = 1
) -> nn.Module:
    """The network, changed in place, in eval mode. shape: of one input.

    Gammas and betas are drawn; means and variances are those of `rows` inputs of the profile.
    """
    torch.manual_seed(seed)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.weight.data = torch.randn(norm.num_features) * 0.3 + 1
        norm.bias.data = torch.randn(norm.num_features) * 0.3
        norm.momentum = None  # the plain average
    x = torch.from_numpy(profile.inputs(rows, shape, seed))
    profile.change(network, _layers_before(network, x[:2]))
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        network(x)
    for norm in norms:
        assert norm.running_var is not None
        norm.running_var.clamp_(min=SMALLEST_VARIANCE)
    return network.eval()


def _layers_before(network: nn.Module, x: Tensor) -> Layers:
    """Each batch norm that reads a layer with weights directly, with that layer."""
    made: dict[int, tuple[Tensor, nn.Module]] = {}
    found: Layers = []

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        made[id(output)] = (output, module)  # held, so that no other tensor gets its id

    def look(norm: nn.modules.batchnorm._BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in made:
            found.append((made[id(inputs[0])][1], norm))

    hooks = []
    for module in network.modules():
        if isinstance(module, CONVOLUTIONS):
            hooks.append(module.register_forward_hook(note))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            hooks.append(module.register_forward_pre_hook(look))
    with torch.no_grad():
        network.eval()(x)
    for hook in hooks:
        hook.remove()
    return found
