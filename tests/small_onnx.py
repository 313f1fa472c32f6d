"""The small classifier as an ONNX file, exported once for all tests that only fold it."""

import functools
import tempfile
from pathlib import Path

import torch
from nets import with_statistics

import bnfold
from models.digits import digits_cnn


@functools.cache
def digits_onnx(seed: int = 0) -> bytes:
    """Unfolded, four batch norms that all fold; input x, (N, 1, 8, 8)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        network = with_statistics(digits_cnn(), seed=seed, positive=seed == 0)
        bnfold.export(network, torch.zeros(1, 1, 8, 8), path)
        return path.read_bytes()
