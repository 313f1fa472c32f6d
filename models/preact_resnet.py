"""Pre-activation residual networks: BN and Relu stand before each convolution, the stream is bare.

He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks, ECCV 2016, figure 1(b), table 2.
Nothing but additions stands on the residual stream between two changes of shape, and each of its
readers normalises it anew; where the shape changes, a 1x1 projection reads the block's first
pre-activation. Input (N, 3, H, W), 32x32 in the paper; output (N, num_classes) logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bnfold.norm import Kind, convert


class PreActBlock(nn.Module):
    """BN-Relu-Conv twice, added to the stream that came in."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride > 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, channels, H / stride, W / stride)."""
        activated = self.relu1(self.bn1(x))
        stream = x if self.shortcut is None else self.shortcut(activated)
        y: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return stream + y


class PreActResNet(nn.Module):
    """A 3x3 stem, stages of pre-activation blocks, a last BN-Relu, pooling, a classifier."""

    def __init__(
        self,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        width = widths[0]
        for i, (count, channels) in enumerate(zip(blocks, widths, strict=True)):
            first = PreActBlock(width, channels, stride=1 if i == 0 else 2)
            rest = [PreActBlock(channels, channels, 1) for _ in range(count - 1)]
            stages.append(nn.Sequential(first, *rest))
            width = channels
        self.layers = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(width, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes)."""
        x = self.relu(self.bn(self.layers(self.conv1(x))))
        logits: Tensor = self.linear(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))
        return logits


def preact_resnet20(
    *, num_classes: int = 10, in_channels: int = 3, width: int = 16, norm: Kind = "batch"
) -> nn.Module:
    """20 layers of widths 16, 32, 64, 0.27 million parameters, 19 batch norms."""
    widths = (width, 2 * width, 4 * width)
    return convert(PreActResNet((3, 3, 3), widths, num_classes, in_channels), norm)


def preact_resnet18(
    *, num_classes: int = 10, in_channels: int = 3, width: int = 64, norm: Kind = "batch"
) -> nn.Module:
    """18 layers of widths 64 to 512, 11.2 million parameters, 17 batch norms."""
    widths = (width, 2 * width, 4 * width, 8 * width)
    return convert(PreActResNet((2, 2, 2, 2), widths, num_classes, in_channels), norm)
