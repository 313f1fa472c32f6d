"""Torch modules as users write them, where a fold by name has no place to go, or could go wrong."""

import torch
from torch import nn
from torch.nn import functional


class Functional(nn.Module):
    """A batch norm and a convolution that are functions, beside a plain pair."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.gamma, self.beta = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4))
        self.mean, self.var = nn.Buffer(torch.randn(4)), nn.Buffer(torch.rand(4) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.conv2d(torch.relu(self.bn(self.conv(x))), self.kernel)
        return torch.tanh(functional.batch_norm(y, self.mean, self.var, self.gamma, self.beta))


class Pair(nn.Module):
    """A convolution and whatever normalises it."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4) if norm is None else norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.bn(self.conv(x)))


class Doubling(nn.BatchNorm2d):
    """A batch norm whose forward does something more."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Renamed(nn.BatchNorm2d):
    """A batch norm by another name, with torch's own forward."""


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm's class of this name computes: normalise, drop, activate."""

    def __init__(self, features: int, act: nn.Module | None = None) -> None:
        super().__init__(features)
        self.drop = nn.Identity()
        self.act = nn.LeakyReLU(0.5, inplace=True) if act is None else act

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(input)))


class Frozen(nn.Module):
    """A batch norm of four buffers that spells its arithmetic out, as detection networks have it.

    wrong: what a module of the same buffers may do instead.
    """

    def __init__(self, features: int, *, eps: float = 1e-3, wrong: bool = False) -> None:
        super().__init__()
        self.eps, self.wrong = eps, wrong
        self.register_buffer("weight", torch.rand(features) + 0.5)
        self.register_buffer("bias", torch.randn(features))
        self.register_buffer("running_mean", torch.randn(features))
        self.register_buffer("running_var", torch.rand(features) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        y = x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
        return y.abs() if self.wrong else y


class Tied(nn.Module):
    """Two convolutions that share a weight, in front of two batch norms.

    how: "object", one parameter under two names; "memory", two parameters on one storage.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(4, 4, 1, bias=False) for _ in range(2))
        self.b.weight = self.a.weight if how == "object" else nn.Parameter(self.a.weight.data)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.bn2(self.b(torch.tanh(self.bn1(self.a(x))))))


class Idle(nn.Module):
    """Two convolutions that share a weight, of which one is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = (nn.Conv2d(3, 4, 1, bias=False) for _ in range(2))
        self.idle.weight = self.used.weight
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.used(x))


class Tapped(nn.Module):
    """Two pairs with a Relu, an Identity and a Dropout to hang hooks on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.relu, self.tap, self.drop = nn.ReLU(), nn.Identity(), nn.Dropout()
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.bn2(self.drop(self.tap(self.relu(self.bn1(self.conv1(x)))))))


class Overwritten(nn.Module):
    """A network whose own names stand in torch's place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Pair()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def modules(self):
        return iter(())

    def state_dict(self, *_args, **_kwargs):
        return {"renamed": torch.zeros(1)}

    def train(self, mode=True):
        super().train(mode)


class Nested(nn.Module):
    """A dictionary and a list in, a dictionary of tensors and tuples out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Pair()

    def forward(self, images, extra):
        y = self.body(images["image"]) + extra[0]
        return {"y": y, "more": (y + 1, [y.mean((2, 3))])}


class DataDependent(nn.Module):
    """A forward that chooses by the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Pair()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        if y.sum() > 0:
            y = 2 * y
        return y


class Remembers(nn.Module):
    """A module that keeps what an earlier forward computed, which deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.kept = Pair(), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        if not torch.compiler.is_exporting():
            self.kept = [y]
        return y
