"""VGG for small images: stages of 3x3 convolutions, each stage ended by a pooling of two.

Simonyan & Zisserman: Very Deep Convolutional Networks, ICLR 2015, section 2 and table 1, with batch
normalization behind each convolution (Ioffe & Szegedy 2015) and global pooling in place of the two
hidden linear layers. Input (N, in_channels, H, W), 32x32 or whatever survives the poolings; output
(N, num_classes) logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from bnfold.norm import Kind, convert


class VGG(nn.Module):
    """Stages of Conv-BN-Relu, a pooling behind each, global pooling, a linear classifier."""

    def __init__(self, stages: Sequence[Sequence[int]], in_channels: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_channels
        for stage in stages:
            for channels in stage:
                layers.append(nn.Conv2d(width, channels, 3, padding=1, bias=False))
                layers += [nn.BatchNorm2d(channels), nn.ReLU()]
                width = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes)."""
        x = functional.adaptive_avg_pool2d(self.features(x), 1)
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def vgg7(
    *, num_classes: int = 10, in_channels: int = 3, width: int = 32, norm: Kind = "batch"
) -> nn.Module:
    """Three stages of two convolutions and a classifier: 0.29 million parameters, 6 batch norms."""
    stages = [(width, width), (2 * width, 2 * width), (4 * width, 4 * width)]
    return convert(VGG(stages, in_channels, num_classes), norm)


def vgg11(
    *, num_classes: int = 10, in_channels: int = 3, width: int = 64, norm: Kind = "batch"
) -> nn.Module:
    """Configuration A of the paper for images of 32x32: 9.2 million parameters, 8 batch norms."""
    w = width
    stages = [(w,), (2 * w,), (4 * w, 4 * w), (8 * w, 8 * w), (8 * w, 8 * w)]
    return convert(VGG(stages, in_channels, num_classes), norm)
