"""ResNet-18 for 224x224 images.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, section 4.1, table 1
(shortcut B: a 1x1 projection where the shape changes). Parameters carry the names that torchvision
gives them, so its ImageNet checkpoints load. Input (N, in_channels, 224, 224); output
(N, num_classes) logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bnfold.norm import Kind, convert


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the identity or a projection."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Sequential | None = None
        if stride > 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, channels, H / stride, W / stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu2(y + shortcut)
        return out


class ResNet(nn.Module):
    """A 7x7 stem with pooling, four stages of residual blocks, pooling, a classifier."""

    def __init__(
        self, blocks: tuple[int, int, int, int], num_classes: int, in_channels: int, width: int
    ) -> None:
        super().__init__()
        w = width
        self.conv1 = nn.Conv2d(in_channels, w, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = _stage(w, w, blocks[0], stride=1)
        self.layer2 = _stage(w, 2 * w, blocks[1], stride=2)
        self.layer3 = _stage(2 * w, 4 * w, blocks[2], stride=2)
        self.layer4 = _stage(4 * w, 8 * w, blocks[3], stride=2)
        self.fc = nn.Linear(8 * w, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    rest = [BasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def resnet18(
    *, num_classes: int = 1000, in_channels: int = 3, width: int = 64, norm: Kind = "batch"
) -> nn.Module:
    """18 layers, 11.7 million parameters, 20 batch norms."""
    return convert(ResNet((2, 2, 2, 2), num_classes, in_channels, width), norm)
