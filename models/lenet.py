"""LeNet-5 with batch normalization behind each hidden layer.

LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition, 1998,
section II.B, with max pooling and Relu; batch normalization as in Ioffe & Szegedy 2015. Input
(N, in_channels, 28, 28) in [0, 1]; output (N, num_classes) logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnfold.norm import Kind, convert


class LeNet5(nn.Module):
    """Two 5x5 convolutions and three linear layers; a batch norm behind all but the last."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(16 * 4 * 4, 120, bias=False)
        self.bn3 = nn.BatchNorm1d(120)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(120, 84, bias=False)
        self.bn4 = nn.BatchNorm1d(84)
        self.relu4 = nn.ReLU()
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, 28, 28) -> (N, num_classes)."""
        x = self.pool1(self.relu1(self.bn1(self.conv1(x))))
        x = self.pool2(self.relu2(self.bn2(self.conv2(x))))
        x = self.relu3(self.bn3(self.fc1(torch.flatten(x, 1))))
        x = self.relu4(self.bn4(self.fc2(x)))
        logits: Tensor = self.fc3(x)
        return logits


def lenet5(*, num_classes: int = 10, in_channels: int = 1, norm: Kind = "batch") -> nn.Module:
    """LeNet-5 for 28x28 digits, 4 batch norms."""
    return convert(LeNet5(num_classes, in_channels), norm)
