"""U-Net: a path down that sees wide, a path up that sees sharp, and each level handed across.

Ronneberger, Fischer, Brox: U-Net, MICCAI 2015, figure 1 and section 2, with batch normalization
behind the 3x3 convolutions, which are padded so that nothing need be cropped. Input
(N, in_channels, H, W), H and W divisible by 2^levels; output (N, num_classes, H, W) logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnfold.norm import Kind, convert


class UNet(nn.Module):
    """`levels` poolings down, a bottom, `levels` transposed convolutions up, a 1x1 classifier."""

    def __init__(self, in_channels: int, num_classes: int, width: int, levels: int) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(levels + 1)]
        self.down = nn.ModuleList()
        for channels in widths[:-1]:
            self.down.append(_double(in_channels, channels))
            in_channels = channels
        self.pool = nn.ModuleList(nn.MaxPool2d(2) for _ in range(levels))
        self.bottom = _double(in_channels, widths[-1])
        self.up = nn.ModuleList()
        self.join = nn.ModuleList()
        for channels in reversed(widths[:-1]):
            self.up.append(nn.ConvTranspose2d(2 * channels, channels, 2, 2))
            self.join.append(_double(2 * channels, channels))
        self.classifier = nn.Conv2d(width, num_classes, 1)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes, H, W)."""
        across: list[Tensor] = []
        for down, pool in zip(self.down, self.pool, strict=True):
            x = down(x)
            across.append(x)
            x = pool(x)
        x = self.bottom(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([across.pop(), up(x)], dim=1))
        logits: Tensor = self.classifier(x)
        return logits


def _double(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        *(nn.BatchNorm2d(channels), nn.ReLU()),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        *(nn.BatchNorm2d(channels), nn.ReLU()),
    )


def unet(
    *,
    num_classes: int = 2,
    in_channels: int = 1,
    width: int = 16,
    levels: int = 3,
    norm: Kind = "batch",
) -> nn.Module:
    """Three levels of widths 16 to 128, 0.48 million parameters, 14 batch norms."""
    return convert(UNet(in_channels, num_classes, width, levels), norm)
