"""The generator of DCGAN: a code grows into an image through transposed convolutions.

Radford, Metz, Chintala: Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks, ICLR 2016, section 3 and figure 1. Input (N, code) or (N, code, 1, 1); output
(N, channels, size, size) in [-1, 1].
"""

from __future__ import annotations

from torch import Tensor, nn

from bnfold.norm import Kind, convert


class Generator(nn.Module):
    """A 4x4 transposed convolution of the code, then doublings; BN-Relu behind all but the last."""

    def __init__(self, code: int, channels: int, width: int, doublings: int) -> None:
        super().__init__()
        self.code = code
        wide = width * 2 ** (doublings - 1)
        layers = [nn.ConvTranspose2d(code, wide, 4, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        for _ in range(doublings - 1):
            layers.append(nn.ConvTranspose2d(wide, wide // 2, 4, 2, padding=1, bias=False))
            wide //= 2
            layers += [nn.BatchNorm2d(wide), nn.ReLU()]
        last = nn.ConvTranspose2d(wide, channels, 4, 2, padding=1, bias=False)
        self.layers = nn.Sequential(*layers, last, nn.Tanh())
        for m in self.modules():
            if isinstance(m, nn.ConvTranspose2d):
                nn.init.normal_(m.weight, 0.0, 0.02)  # section 4
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1.0, 0.02)

    def forward(self, code: Tensor) -> Tensor:
        """(N, code) -> (N, channels, size, size)."""
        image: Tensor = self.layers(code.reshape(-1, self.code, 1, 1))
        return image


def generator(
    *,
    code: int = 100,
    channels: int = 3,
    width: int = 64,
    size: int = 64,
    norm: Kind = "batch",
) -> nn.Module:
    """64x64 images from 100 numbers, 3.58 million parameters, 4 batch norms.

    channels: of the images. width: of the map before the last layer, doubled at each one earlier.
    size: a power of two, 8 or more. Raises ValueError for another size.
    """
    if size < 8 or size & (size - 1):
        raise ValueError(f"size is {size}; it must be a power of two, 8 or more.")
    return convert(Generator(code, channels, width, size.bit_length() - 3), norm)
