"""A multilayer perceptron with BatchNorm1d and dropout: the network without a convolution.

Ioffe & Szegedy: Batch Normalization, ICML 2015, section 4.1 (fully connected, MNIST), with Relu and
dropout. Input (N, 1, 28, 28) in [0, 1]; output (N, num_classes) logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnfold.norm import Kind, convert


class MLP(nn.Module):
    """Linear, BatchNorm1d, Relu, Dropout for each hidden width, then a linear classifier."""

    def __init__(
        self, in_features: int, widths: tuple[int, ...], num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(in_features, width, bias=False), nn.BatchNorm1d(width)]
            layers += [nn.ReLU(), nn.Dropout(dropout)]
            in_features = width
        self.network = nn.Sequential(*layers, nn.Linear(in_features, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) with in_features values per sample -> (N, num_classes)."""
        logits: Tensor = self.network(torch.flatten(x, 1))
        return logits


def mlp(
    *,
    in_features: int = 28 * 28,
    widths: tuple[int, ...] = (512, 256),
    num_classes: int = 10,
    dropout: float = 0.2,
    norm: Kind = "batch",
) -> nn.Module:
    """784-512-256-10 for 28x28 digits, 2 batch norms."""
    return convert(MLP(in_features, widths, num_classes, dropout), norm)
