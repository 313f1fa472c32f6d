"""DenseNet-BC: each layer reads everything that the layers before it wrote.

Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks, CVPR 2017, section
3 (bottlenecks and compression 1/2) and 4.1. Each reader normalises the same channels anew, so one
map has as many batch norms as it has readers. Input (N, in_channels, H, W), 32x32 in the paper;
output (N, num_classes) logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bnfold.norm import Kind, convert

BLOCKS = 3
BOTTLENECK = 4  # channels between a layer's two convolutions, in units of the growth rate


class DenseLayer(nn.Module):
    """BN-Relu-Conv 1x1, BN-Relu-Conv 3x3; the new channels are put behind those that came in."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        hidden = BOTTLENECK * growth
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, in + growth, H, W)."""
        y = self.conv1(self.relu1(self.bn1(x)))
        y = self.conv2(self.relu2(self.bn2(y)))
        return torch.cat([x, y], dim=1)


class DenseNet(nn.Module):
    """A stem, three dense blocks with transitions between them, BN-Relu, pooling, a classifier."""

    def __init__(self, depth: int, growth: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        per_block = (depth - BLOCKS - 1) // (2 * BLOCKS)
        width = 2 * growth
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False)]
        for block in range(BLOCKS):
            if block:
                layers.append(_transition(width, width // 2))
                width //= 2
            for _ in range(per_block):
                layers.append(DenseLayer(width, growth))
                width += growth
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU())
        self.classifier = nn.Linear(width, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes)."""
        x = functional.adaptive_avg_pool2d(self.features(x), 1)
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def _transition(in_channels: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, 1, bias=False)
    return nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(), conv, nn.AvgPool2d(2))


def densenet_bc(
    *,
    depth: int = 40,
    growth: int = 12,
    num_classes: int = 10,
    in_channels: int = 3,
    norm: Kind = "batch",
) -> nn.Module:
    """40 layers of growth rate 12, 0.18 million parameters, 39 batch norms.

    depth: 6n + 4, with n layers in each block. Raises ValueError for another depth.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth is {depth}; a DenseNet-BC has 6n + 4 layers: 10, 16, 22, ...")
    return convert(DenseNet(depth, growth, in_channels, num_classes), norm)
