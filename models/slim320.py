"""A one-stage face detector on depthwise separable convolutions, with four detection heads.

Backbone: Howard et al., MobileNets, 2017, section 3. Heads: Liu et al., SSD, ECCV 2016, sec. 2.1.
Sizes and names are those of the published "slim" Ultra-Light-Fast face detector. Input
(N, 3, 240, 320), (RGB - 127) / 128. Output: `scores` (N, 4420, 2), softmax over background and
face, and `boxes` (N, 4420, 4), offsets from the prior boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bnfold.norm import Kind, convert

# output channels (in units of the stem's) and stride of the backbone's blocks, and where the heads
# read it
BLOCKS = (
    *((2, 1), (2, 2), (2, 1), (4, 2), (4, 1), (4, 1), (4, 1)),
    *((8, 2), (8, 1), (8, 1), (16, 2), (16, 1)),
)
HEADS_BEFORE_BLOCK = (8, 11, 13)
HEAD_CHANNELS = (4, 8, 16, 16)
PRIORS = (3, 2, 2, 3)


class Slim320(nn.Module):
    """13 backbone blocks, one extra block, four pairs of classification and regression heads."""

    def __init__(self, num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        stem = nn.Conv2d(in_channels, width, 3, 2, padding=1, bias=False)
        layers = [nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU())]
        channels = width
        for multiple, stride in BLOCKS:
            layers.append(_separable_bn(channels, multiple * width, stride))
            channels = multiple * width
        self.base_net = nn.ModuleList(layers)
        squeeze = nn.Conv2d(channels, 4 * width, 1)
        extra = nn.Sequential(squeeze, nn.ReLU(), _separable(4 * width, 16 * width, 2), nn.ReLU())
        self.extras = nn.ModuleList([extra])
        self.classification_headers = _heads(num_classes, width)
        self.regression_headers = _heads(4, width)
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, in_channels, H, W) -> scores (N, priors, num_classes), boxes (N, priors, 4)."""
        features: list[Tensor] = []
        for i, block in enumerate(self.base_net):
            if i in HEADS_BEFORE_BLOCK:
                features.append(x)
            x = block(x)
        features += [x, self.extras[0](x)]
        scores = _read(self.classification_headers, features, self.num_classes)
        return functional.softmax(scores, dim=2), _read(self.regression_headers, features, 4)


def _read(heads: nn.ModuleList, features: list[Tensor], size: int) -> Tensor:
    """Each head on its feature map, as (N, priors of all maps, size)."""
    maps = [head(x).permute(0, 2, 3, 1) for head, x in zip(heads, features, strict=True)]
    return torch.cat([m.reshape(m.shape[0], -1, size) for m in maps], dim=1)


def _heads(size: int, width: int) -> nn.ModuleList:
    outputs = [priors * size for priors in PRIORS]
    heads: list[nn.Module] = [
        _separable(multiple * width, size, 1)
        for multiple, size in zip(HEAD_CHANNELS[:3], outputs[:3], strict=True)
    ]
    return nn.ModuleList([*heads, nn.Conv2d(HEAD_CHANNELS[3] * width, outputs[3], 3, padding=1)])


def _separable(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    depthwise = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels)
    return nn.Sequential(depthwise, nn.ReLU(), nn.Conv2d(in_channels, channels, 1))


def _separable_bn(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    groups = in_channels
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=groups, bias=False),
        *(nn.BatchNorm2d(in_channels), nn.ReLU()),
        nn.Conv2d(in_channels, channels, 1, bias=False),
        *(nn.BatchNorm2d(channels), nn.ReLU()),
    )


def slim320(
    *, num_classes: int = 2, in_channels: int = 3, width: int = 16, norm: Kind = "batch"
) -> nn.Module:
    """The detector for 320x240 images: 0.26 million parameters, 25 batch norms."""
    return convert(Slim320(num_classes, in_channels, width), norm)
