"""Small convolutional networks for handwritten digits: seconds to train, milliseconds to run.

Batch normalization as in Ioffe & Szegedy 2015, the residual blocks with a 1x1 projection as in He
et al. 2016 (shortcut B). `cnn` and `resnet` take (N, in_channels, 28, 28) in [0, 1],
`digits_cnn` the 8x8 digits (N, in_channels, 8, 8) in [0, 1]; all give (N, num_classes) logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bnfold.norm import Kind, convert


class CNN(nn.Module):
    """Two convolutions with batch normalization and pooling, one linear classifier."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(16 * 7 * 7, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, 28, 28) -> (N, num_classes)."""
        x = self.pool1(self.relu1(self.bn1(self.conv1(x))))
        x = self.pool2(self.relu2(self.bn2(self.conv2(x))))
        logits: Tensor = self.fc1(torch.flatten(x, 1))
        return logits


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside the identity, or beside a 1x1 convolution where shapes change."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride > 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, channels, H / stride, W / stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


class DigitResNet(nn.Module):
    """A stem and two residual blocks, global average pooling, a linear classifier."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(ResidualBlock(8, 8, 1))
        self.layer2 = nn.Sequential(ResidualBlock(8, 16, 2))
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, 28, 28) -> (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        logits: Tensor = self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))
        return logits


class DigitsCNN(nn.Module):
    """Three convolutions with BatchNorm2d and a hidden linear layer with BatchNorm1d."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.relu3 = nn.ReLU()
        self.pool3 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(32 * 2 * 2, 64, bias=False)
        self.bn4 = nn.BatchNorm1d(64)
        self.relu4 = nn.ReLU()
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, 8, 8) -> (N, num_classes)."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.pool2(self.relu2(self.bn2(self.conv2(x))))
        x = self.pool3(self.relu3(self.bn3(self.conv3(x))))
        x = self.relu4(self.bn4(self.fc1(torch.flatten(x, 1))))
        logits: Tensor = self.fc2(x)
        return logits


def cnn(*, num_classes: int = 10, in_channels: int = 1, norm: Kind = "batch") -> nn.Module:
    """Two convolutions for 28x28 digits, 2 batch norms."""
    return convert(CNN(num_classes, in_channels), norm)


def resnet(*, num_classes: int = 10, in_channels: int = 1, norm: Kind = "batch") -> nn.Module:
    """Two residual blocks for 28x28 digits, 6 batch norms."""
    return convert(DigitResNet(num_classes, in_channels), norm)


def digits_cnn(*, num_classes: int = 10, in_channels: int = 1, norm: Kind = "batch") -> nn.Module:
    """Three convolutions for 8x8 digits, 4 batch norms."""
    return convert(DigitsCNN(num_classes, in_channels), norm)
