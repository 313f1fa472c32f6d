"""Accuracy before and after adapting real networks to real shifts, and the diagnostics.

    .venv/bin/python scripts/measure_adaptation.py [FOLDER OF REAL DATA]

Needs the real checkpoints (default ../shared/data). Statistics come from the target's own
unlabelled training images where there are any. "plain" is the usual AdaBN: statistics reset,
cumulative average over training-mode batches of 250, as torch.optim.swa_utils.update_bn does it.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import realdata  # noqa: E402

import bnfold  # noqa: E402
from bnfold.data import shifted  # noqa: E402

MEAN = np.float32(realdata.CIFAR_MEAN).reshape(1, 3, 1, 1)
STD = np.float32(realdata.CIFAR_STD).reshape(1, 3, 1, 1)


def cifar(x: np.ndarray, name: str, amount: float) -> np.ndarray:
    """Normalised CIFAR images, shifted in [0, 1] and normalised again."""
    return (shifted(x * STD + MEAN, name, amount) - MEAN) / STD


def plain(module: torch.nn.Module, x: np.ndarray) -> torch.nn.Module:
    """The usual AdaBN, by torch's own update_bn."""
    twin = copy.deepcopy(module)
    batches = torch.from_numpy(x).split(250)
    torch.optim.swa_utils.update_bn(list(batches), twin)
    return twin.eval()


def row(name: str, module: torch.nn.Module, x: np.ndarray, test: tuple) -> None:
    """One line of the table."""
    batches = [x[i : i + 250] for i in range(0, len(x), 250)]
    exact = bnfold.adapt(module, batches, method="exact")
    order = np.random.default_rng(0).permutation(len(x))
    mixed = x[order]
    fast = bnfold.adapt(
        module, [mixed[i : i + 250] for i in range(0, len(x), 250)], method="fast", diagnose=False
    )
    figures = [
        realdata.accuracy(network, *test)
        for network in (module, plain(module, x), fast.module, exact.module)
    ]
    kl = [(layer.kl_before, layer.kl_after) for layer in exact.layers]
    before, after = np.mean([k[0] for k in kl]), np.mean([k[1] for k in kl])
    seen = exact.outputs
    print(
        f"| {name} | "
        + " | ".join(f"{figure:.2f}" for figure in figures)
        + f" | {before:.3f} -> {after:.3g} | {seen.entropy_before:.2f} -> {seen.entropy_after:.2f}"
        f" | {100 * seen.agreement:.0f} % | {100 * seen.histogram_change:.0f} % |"
    )
    if figures[3] < figures[0]:
        for warning in exact.warnings:
            print(f"|  | {warning} |")
    sys.stdout.flush()


def cifar_rows(shared: Path, name: str) -> None:
    """A CIFAR network under noise and loss of contrast, and on clean images."""
    module = realdata.load_model(shared, name)
    x, _ = realdata.cifar_train_part(shared)
    test, y = realdata.cifar_test761(shared)
    for shift, amount in (
        ("gaussian_noise", 0.06),
        ("gaussian_noise", 0.10),
        ("contrast", 0.4),
        ("contrast", 0.15),
        ("contrast", 1.0),
    ):
        label = f"{name}, {shift} {amount}" if amount != 1 else f"{name}, clean"
        row(label, module, cifar(x, shift, amount), (cifar(test, shift, amount), y))


def main() -> None:
    """Print the table."""
    shared = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "data"
    print(
        "| network, shift | source | plain | fast | exact | KL | entropy | agree | histogram |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    cifar_rows(shared, "resnet20")
    for name in ("mnist_lenet5", "mnist_cnn", "mnist_mlp", "mnist_resnet"):
        module = realdata.load_model(shared, name)
        for layout in ("pad", "stretch"):
            x, _ = realdata.usps(shared, "train", layout)
            row(f"{name}, USPS {layout}", module, x, realdata.usps(shared, "test", layout))
        x, y = realdata.mnistm(shared)
        row(f"{name}, MNIST-M", module, x, (x, y))
    cifar_rows(shared, "resnet56")


if __name__ == "__main__":
    main()
