"""Small networks and realistic statistics for the tests."""

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional


def with_statistics(module: nn.Module, *, seed: int = 0, positive: bool = False) -> nn.Module:
    """The module in eval mode with statistics and affine parameters as training leaves them.

    Without `positive`, gammas of both signs.
    """
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        norm = isinstance(child, nn.modules.batchnorm._BatchNorm)
        if norm and child.running_mean is not None:
            n = child.num_features
            child.running_mean.copy_(torch.randn(n, generator=generator) * 0.5)
            child.running_var.copy_(torch.rand(n, generator=generator) * 1.5 + 0.5)
            if child.affine:
                gamma = torch.randn(n, generator=generator) * 0.5 + 0.6
                child.weight.data.copy_(gamma.abs() + 0.05 if positive else gamma)
                child.bias.data.copy_(torch.randn(n, generator=generator) * 0.5)
    return module.eval()


def norms(module: nn.Module) -> list[nn.Module]:
    """The batch norms of a module."""
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def agree(module: nn.Module, folded: nn.Module, *inputs: torch.Tensor) -> bool:
    """Whether the folded module is as near to the module in float64 as the module itself."""
    with torch.no_grad():
        exact = flat(copy.deepcopy(module).double()(*(x.double() for x in inputs)))
        own, got = flat(module(*inputs)), flat(folded(*inputs))
    assert got.shape == exact.shape
    dtype = inputs[0].dtype
    # in float64 the exporter's float32 epsilon of a batch norm shows before the rounding does
    unit = 2.0**-42 if dtype is torch.float64 else torch.finfo(dtype).eps / 2
    error, usual = (
        (values.double() - exact).abs().max() / exact.abs().max() for values in (got, own)
    )
    return bool(error <= 4 * max(usual, 4 * unit))


def flat(outputs: object) -> torch.Tensor:
    """All tensors of a network's outputs in one vector."""
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, list | tuple):
        return torch.cat([flat(item) for item in outputs])
    assert isinstance(outputs, torch.Tensor)
    return outputs.reshape(-1)


class Tokens(nn.Module):
    """A Linear on tokens, then BN1d over its features: MatMul -> Reshape -> BN -> Reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return self.bn(y.flatten(0, 1)).reshape_as(y)


class Reused(nn.Module):
    """One convolution before two batch norms: one parameter that would need two values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.bn2(self.conv(torch.sigmoid(self.bn1(self.conv(x))))))


class CalledTwice(nn.Module):
    """One batch norm called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.b(torch.relu(self.bn(self.a(x)))))


class SharedHead(nn.Module):
    """One convolution without bias, called for two branches with a batch norm each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.c1, self.c2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.c1(torch.relu(self.bn1(self.conv(x))))
        return one + self.c2(torch.relu(self.bn2(self.conv(2 * x))))


class Stateless(nn.Module):
    """A batch norm that holds nothing, beside one that folds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.bare = nn.BatchNorm2d(4, affine=False, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bare(self.bn(self.conv(x)))


class ReadThroughCast(nn.Module):
    """A weight stored in half precision and used in single."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 1, 1).half())
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(functional.conv2d(x, self.weight.float()))
