"""The CIFAR-10 residual networks of 6n+2 layers, without parameters in the shortcuts.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2. Input
(N, 3, 32, 32), RGB scaled to [0, 1] and normalised; output (N, num_classes) logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bnfold.norm import Kind, convert


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut of type A: subsample, then zeros for new channels."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, channels, H / stride, W / stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu2(y + self._shortcut(x))
        return out

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            x = functional.pad(x, (0, 0, 0, 0, before, self.new_channels - before))
        return x


class ResNetCifar(nn.Module):
    """A 3x3 stem, three stages of `blocks` residual blocks, pooling, a classifier."""

    def __init__(self, blocks: int, num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        first, second, third = width, 2 * width, 4 * width
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.layer1 = _stage(first, first, blocks, stride=1)
        self.layer2 = _stage(first, second, blocks, stride=2)
        self.layer3 = _stage(second, third, blocks, stride=2)
        self.linear = nn.Linear(third, num_classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    rest = [BasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def _init_convolutions(module: nn.Module) -> None:
    """He et al. 2015: variance 2 / fan-in, for layers that feed a Relu."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)


def resnet20(
    *, num_classes: int = 10, in_channels: int = 3, width: int = 16, norm: Kind = "batch"
) -> nn.Module:
    """20 layers, 0.27 million parameters, 19 batch norms."""
    return convert(ResNetCifar(3, num_classes, in_channels, width), norm)


def resnet32(
    *, num_classes: int = 10, in_channels: int = 3, width: int = 16, norm: Kind = "batch"
) -> nn.Module:
    """32 layers, 0.46 million parameters, 31 batch norms."""
    return convert(ResNetCifar(5, num_classes, in_channels, width), norm)


def resnet44(
    *, num_classes: int = 10, in_channels: int = 3, width: int = 16, norm: Kind = "batch"
) -> nn.Module:
    """44 layers, 0.66 million parameters, 43 batch norms."""
    return convert(ResNetCifar(7, num_classes, in_channels, width), norm)


def resnet56(
    *, num_classes: int = 10, in_channels: int = 3, width: int = 16, norm: Kind = "batch"
) -> nn.Module:
    """56 layers, 0.85 million parameters, 55 batch norms."""
    return convert(ResNetCifar(9, num_classes, in_channels, width), norm)


def resnet110(
    *, num_classes: int = 10, in_channels: int = 3, width: int = 16, norm: Kind = "batch"
) -> nn.Module:
    """110 layers, 1.7 million parameters, 109 batch norms."""
    return convert(ResNetCifar(18, num_classes, in_channels, width), norm)
