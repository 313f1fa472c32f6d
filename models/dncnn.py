"""DnCNN, a denoiser: it predicts the noise, which the caller subtracts from the image.

Zhang, Zuo, Chen, Meng, Zhang: Beyond a Gaussian Denoiser, IEEE TIP 2017, section III. Input
(N, 1, H, W), grey values in [0, 1] with noise, any H and W; output the noise, same shape.
"""

from __future__ import annotations

from torch import Tensor, nn

from bnfold.norm import Kind, convert


class DnCNN(nn.Module):
    """Conv-Relu, then Conv-BN-Relu `depth - 2` times, then one Conv; no biases, 3x3 throughout."""

    def __init__(self, depth: int, features: int, image_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(image_channels, features), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [_conv(features, features), nn.BatchNorm2d(features), nn.ReLU()]
        self.dncnn = nn.Sequential(*layers, _conv(features, image_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, image_channels, H, W) -> the noise in it, same shape."""
        noise: Tensor = self.dncnn(x)
        return noise


def _conv(in_channels: int, channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)


def dncnn(
    *, depth: int = 17, features: int = 64, image_channels: int = 1, norm: Kind = "batch"
) -> nn.Module:
    """DnCNN-S for one noise level: 17 layers, 15 batch norms."""
    return convert(DnCNN(depth, features, image_channels), norm)
