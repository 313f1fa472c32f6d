"""MobileNetV2: depthwise convolutions, Relu6 and linear bottlenecks.

Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2, CVPR 2018, sections 3 and 4, table 2. Parameters
carry the names that torchvision gives them, so its ImageNet checkpoints load. Input
(N, in_channels, 224, 224), 32x32 for `mobilenet_v2_small`; output (N, num_classes) logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from bnfold.norm import Kind, convert

# table 2 of the paper: expansion, output channels, blocks, stride of the first block
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# for images of 32x32: neither the stem nor the second stage halves them
SMALL_STAGES = (STAGES[0], (6, 24, 2, 1), *STAGES[2:])
STEM, LAST = 32, 1280


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter depthwise by 3x3, project by 1x1 without an activation."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers.append(_conv_bn_relu6(in_channels, hidden, 1))
        layers.append(_conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden))
        layers += [nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        self.conv = nn.Sequential(*layers)
        self.has_identity = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, channels, H / stride, W / stride)."""
        y: Tensor = self.conv(x)
        return x + y if self.has_identity else y


class MobileNetV2(nn.Module):
    """A stem, 17 inverted residual blocks, a 1x1 convolution, pooling, dropout, a classifier."""

    def __init__(
        self,
        stages: Sequence[tuple[int, int, int, int]],
        stem_stride: int,
        num_classes: int,
        dropout: float,
        in_channels: int,
        width: float,
    ) -> None:
        super().__init__()
        last = _rounded(LAST * max(width, 1.0))
        before = _rounded(STEM * width)
        features: list[nn.Module] = [_conv_bn_relu6(in_channels, before, 3, stem_stride)]
        for expansion, full_channels, blocks, stride in stages:
            channels = _rounded(full_channels * width)
            for i in range(blocks):
                block_stride = stride if i == 0 else 1
                features.append(InvertedResidual(before, channels, block_stride, expansion))
                before = channels
        features.append(_conv_bn_relu6(before, last, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes)."""
        x = functional.adaptive_avg_pool2d(self.features(x), 1)
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def _rounded(channels: float) -> int:
    """To a multiple of 8, as the published checkpoints of other widths are.

    Never under 8, nor under nine tenths of what was asked for.
    """
    multiple = max(8, int(channels + 4) // 8 * 8)
    return multiple + 8 if multiple < 0.9 * channels else multiple


def _conv_bn_relu6(
    in_channels: int, channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU6())


def mobilenet_v2(
    *,
    num_classes: int = 1000,
    dropout: float = 0.2,
    in_channels: int = 3,
    width: float = 1.0,
    norm: Kind = "batch",
) -> nn.Module:
    """Width 1.0, 3.5 million parameters, 52 batch norms."""
    return convert(MobileNetV2(STAGES, 2, num_classes, dropout, in_channels, width), norm)


def mobilenet_v2_small(
    *,
    num_classes: int = 10,
    dropout: float = 0.2,
    in_channels: int = 3,
    width: float = 0.5,
    norm: Kind = "batch",
) -> nn.Module:
    """For 32x32 images at half the width: 0.70 million parameters, 52 batch norms."""
    network = MobileNetV2(SMALL_STAGES, 1, num_classes, dropout, in_channels, width)
    return convert(network, norm)
