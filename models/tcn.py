"""A temporal convolutional network: dilated convolutions in time that never see the future.

Bai, Kolter, Koltun: An Empirical Evaluation of Generic Convolutional and Recurrent Networks for
Sequence Modeling, 2018, section 3 and figure 1(b), with batch normalization where the paper has
weight normalization (`norm="weight"`). Input (N, in_channels, L), or an image (N, in_channels, H,
W), which is read row by row as in the paper's sequential MNIST; output (N, num_classes) logits,
said at the last step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnfold.norm import Kind, convert


class CausalConv(nn.Sequential):
    """Zeros before the first step, then a dilated convolution: step t reads steps up to t."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, dilation: int) -> None:
        conv = nn.Conv1d(in_channels, channels, kernel_size, dilation=dilation, bias=False)
        super().__init__(nn.ConstantPad1d(((kernel_size - 1) * dilation, 0), 0.0), conv)


class TemporalBlock(nn.Module):
    """Two causal convolutions of one dilation, each normalised, beside the identity or a 1x1."""

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int, dilation: int, dropout: float
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            CausalConv(in_channels, channels, kernel_size, dilation),
            *(nn.BatchNorm1d(channels), nn.ReLU(), nn.Dropout(dropout)),
            CausalConv(channels, channels, kernel_size, dilation),
            *(nn.BatchNorm1d(channels), nn.ReLU(), nn.Dropout(dropout)),
        )
        self.shortcut: nn.Conv1d | None = None
        if in_channels != channels:
            self.shortcut = nn.Conv1d(in_channels, channels, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, L) -> (N, channels, L)."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        y: Tensor = self.relu(self.layers(x) + shortcut)
        return y


class TCN(nn.Module):
    """`levels` blocks of dilation 1, 2, 4, ..., then a linear classifier of the last step."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        width: int,
        levels: int,
        kernel_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        blocks = [
            TemporalBlock(width if i else in_channels, width, kernel_size, 2**i, dropout)
            for i in range(levels)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv1d):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, L) or (N, in_channels, H, W) -> (N, num_classes)."""
        x = self.blocks(torch.flatten(x, 2))
        logits: Tensor = self.classifier(x[:, :, -1])
        return logits


def tcn(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    width: int = 25,
    levels: int = 8,
    kernel_size: int = 7,
    dropout: float = 0.05,
    norm: Kind = "batch",
) -> nn.Module:
    """The size that the authors use for sequential MNIST: 0.07 million parameters, 16 batch norms.

    The last step sees 1 + 2 (kernel_size - 1) (2^levels - 1) steps, here 3061.
    """
    return convert(TCN(in_channels, num_classes, width, levels, kernel_size, dropout), norm)
