"""What each file of models/ learns of the digits, at a width that trains in seconds.

Those that do not classify get a task whose figure can be compared: the denoiser takes noise away
(PSNR), the U-Net marks ink under noise, the generator draws a digit from its 20 principal
components, judged by its nearest neighbour among the training digits, and the detector says the
class by its scores, averaged over all priors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn
from torch.nn import functional

import bnfold
from bnfold.data import open_data
from bnfold.graph import to_bytes, to_proto
from bnfold.norm import Clipping, Kind, convert, initialise
from bnfold.proof.places.runtime import open_session
from bnfold.training.train import train
from models import (
    dcgan,
    densenet,
    digits,
    dncnn,
    lenet,
    mlp,
    mobilenet_v2,
    preact_resnet,
    resnet,
    resnet_cifar,
    slim320,
    tcn,
    unet,
    vgg,
)

Outputs = tuple[NDArray[np.float32], ...]

BATCH = 64
EPOCHS = 8
CODE = 20  # principal components
NOISE = 0.3  # of the pixels' range


@dataclass(frozen=True)
class Part:
    """Inputs, what the network is to answer, and the classes (0 to 9) they were made from."""

    x: Tensor
    y: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Split:
    """Digits to learn from, and others to judge by."""

    train: Part
    test: Part


@dataclass(frozen=True)
class Judged:
    """A figure (percent or dB), and the single decisions behind it."""

    figure: float
    decisions: NDArray[np.int64]


class ByScores(nn.Module):
    """A detector as a classifier: the logarithm of its scores' mean over all priors."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.network = detector

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, classes)."""
        scores: Tensor = self.network(x)[0]
        return scores.mean(1).log()


class Itself(nn.Module):
    """A network that learns by its own output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """What the network says."""
        output: Tensor = self.network(x)
        return output


@dataclass(frozen=True)
class Task:
    """A factory with its arguments, its data, and how it learns and is judged.

    repair: the exact repairs without which the architecture's batch norms cannot all be folded.
    """

    factory: Callable[..., nn.Module]
    options: Mapping[str, Any]
    data: Callable[[], Split]
    judge: Callable[[Outputs, Split], Judged]
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    learner: Callable[[nn.Module], ByScores | Itself] = Itself
    unit: str = "%"
    repair: tuple[str, ...] = ()
    lr: float = 3e-3


# --- the digits as inputs -------------------------------------------------------------------------


@functools.cache
def _digits(part: str, size: int) -> tuple[Tensor, Tensor]:
    """(N, 1, size, size) in [0, 1] and the classes."""
    data = open_data(f"digits:{part}", shuffle=False)
    assert data.labels is not None
    x = torch.from_numpy(np.concatenate(list(data)))
    if size != 8:
        x = functional.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    return x, torch.from_numpy(data.labels)


def classified(size: int) -> Callable[[], Split]:
    """The digits at size x size pixels, to be told apart."""

    def part(name: str) -> Part:
        x, y = _digits(name, size)
        return Part(x, y, y)

    return lambda: Split(part("train"), part("test"))


def _noisy(name: str) -> tuple[Tensor, Tensor, Tensor]:
    clean, classes = _digits(name, 8)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(len(clean)))
    return clean, NOISE * noise, classes


def denoised() -> Split:
    """Digits with noise, and the noise, which a denoiser predicts."""

    def part(name: str) -> Part:
        clean, noise, classes = _noisy(name)
        return Part(clean + noise, noise, classes)

    return Split(part("train"), part("test"))


def marked() -> Split:
    """Digits with noise, and for each pixel whether there was ink."""

    def part(name: str) -> Part:
        clean, noise, classes = _noisy(name)
        return Part(clean + noise, (clean[:, 0] > 0.5).long(), classes)

    return Split(part("train"), part("test"))


def drawn() -> Split:
    """Principal components of the digits, of variance 1, and the digits in [-1, 1]."""
    train_images, train_classes = _digits("train", 16)
    mean = train_images.mean(0, keepdim=True)
    _, singular, basis = torch.linalg.svd((train_images - mean).flatten(1), full_matrices=False)
    directions = basis[:CODE].T * (len(train_images) ** 0.5 / singular[:CODE])

    def part(images: Tensor, classes: Tensor) -> Part:
        return Part((images - mean).flatten(1) @ directions, 2 * images - 1, classes)

    return Split(part(train_images, train_classes), part(*_digits("test", 16)))


# --- the judges -----------------------------------------------------------------------------------


def _accuracy(decisions: NDArray[np.int64], truth: Tensor) -> Judged:
    return Judged(100.0 * float(np.mean(decisions == truth.numpy())), decisions)


def said(outputs: Outputs, split: Split) -> Judged:
    """The greatest logit, of a sample or of each pixel."""
    return _accuracy(outputs[0].argmax(1), split.test.y)


def pooled(outputs: Outputs, split: Split) -> Judged:
    """The class with the greatest mean score over all priors."""
    return _accuracy(outputs[0].mean(1).argmax(1), split.test.y)


def cleaned(outputs: Outputs, split: Split) -> Judged:
    """PSNR in dB of the image without the predicted noise; decided is the nearest clean digit."""
    image = split.test.x - torch.from_numpy(outputs[0])
    error = (image - (split.test.x - split.test.y)).double()
    nearest = _nearest(image, split.train.x - split.train.y)
    return Judged(-10 * math.log10(float((error**2).mean())), nearest)


def recognised(outputs: Outputs, split: Split) -> Judged:
    """The class of the nearest training digit to each drawing."""
    nearest = _nearest(torch.from_numpy(outputs[0]), split.train.y)
    return _accuracy(split.train.classes.numpy()[nearest], split.test.classes)


def _nearest(images: Tensor, known: Tensor) -> NDArray[np.int64]:
    distances = torch.cdist(images.flatten(1).double(), known.flatten(1).double())
    nearest: NDArray[np.int64] = distances.argmin(1).numpy()
    return nearest


# --- the table ------------------------------------------------------------------------------------

GREY = {"in_channels": 1}
TASKS: Mapping[str, Task] = {
    "mlp": Task(mlp.mlp, {"in_features": 64, "widths": (64, 32)}, classified(8), said),
    "lenet": Task(lenet.lenet5, GREY, classified(28), said),
    "digits": Task(digits.digits_cnn, GREY, classified(8), said),
    "vgg": Task(vgg.vgg7, GREY | {"width": 8}, classified(8), said),
    "resnet_cifar": Task(resnet_cifar.resnet20, GREY | {"width": 8}, classified(8), said),
    "preact_resnet": Task(preact_resnet.preact_resnet20, GREY | {"width": 8}, classified(8), said),
    "resnet": Task(resnet.resnet18, GREY | {"width": 8, "num_classes": 10}, classified(16), said),
    "densenet": Task(
        densenet.densenet_bc,
        GREY | {"depth": 16, "growth": 6},
        classified(8),
        said,
        repair=("clamp",),
    ),
    "mobilenet_v2": Task(
        mobilenet_v2.mobilenet_v2_small, GREY | {"width": 0.25}, classified(8), said
    ),
    "tcn": Task(tcn.tcn, {"width": 16, "levels": 5, "kernel_size": 3}, classified(8), said),
    "slim320": Task(
        slim320.slim320,
        GREY | {"num_classes": 10, "width": 4},
        classified(32),
        pooled,
        learner=ByScores,
    ),
    "dncnn": Task(
        dncnn.dncnn, {"depth": 7, "features": 16}, denoised, cleaned, loss="mse", unit="dB"
    ),
    "unet": Task(unet.unet, {"width": 8, "levels": 2}, marked, said),
    "dcgan": Task(
        dcgan.generator,
        {"code": CODE, "channels": 1, "width": 16, "size": 16},
        drawn,
        recognised,
        loss="mse",
    ),
}


def trained(
    task: Task, kind: Kind, *, epochs: int = EPOCHS, samples: int | None = None, seed: int = 0
) -> nn.Module:
    """The task's network with norms of a kind, trained on its (first) digits, in eval mode.

    Weight-normalised and mean-only kinds start from one batch (data-dependent initialisation),
    batch renorm's clipping opens over the run. `frozen` is trained with batch norms, frozen,
    trained on.
    """
    part = task.data().train
    x, y = part.x[:samples], part.y[:samples]

    def fitted(network: nn.Module, epochs: int, lr: float) -> nn.Module:
        done = train(
            task.learner(network),
            (x, y),
            loss=task.loss,
            epochs=epochs,
            batch_size=BATCH,
            optimizer="adamw",
            lr=lr,
            seed=seed,
        )
        result: nn.Module = done.module.network
        return result

    torch.manual_seed(seed)
    network = task.factory(**task.options)
    if kind == "frozen":
        network = convert(fitted(network, epochs, task.lr), "frozen")
        return fitted(network, max(epochs // 4, 1), task.lr / 10)
    if kind == "renorm":
        steps = epochs * -(-len(x) // BATCH)
        network = convert(network, kind, schedule=Clipping.over(steps), momentum=0.1)
    elif kind == "ghost":
        network = convert(network, kind, ghost_size=BATCH // 4)
    else:
        network = convert(network, kind)
    if kind in ("weight", "weight-mean-only", "mean-only"):
        initialise(network, x[:256])
    return fitted(network, epochs, task.lr)


# --- folded and held against the original ---------------------------------------------------------

NORMALISATION = ("BatchNormalization", "InstanceNormalization", "LayerNormalization")
ARITHMETIC = ("Add", "Sub", "Mul", "Div")


def norm_operators(model: object) -> int:
    """Normalisations of an ONNX graph; arithmetic of floats with a constant counts as such."""
    graph = to_proto(model).graph
    constants = {
        tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT
    }
    constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    return sum(
        node.op_type in NORMALISATION
        or (node.op_type in ARITHMETIC and not constants.isdisjoint(node.input))
        for node in graph.node
    )


@dataclass(frozen=True)
class Outcome:
    """One network before and after its fold.

    before, left: norm operators of its graph. figures: of the original on torch, of the folded one
    on torch and on onnxruntime. changed: decisions of those two that differ from the original's.
    r: the error ratio of the proof.
    """

    before: int
    left: int
    figures: tuple[float, float, float]
    changed: int
    r: float
    passed: bool
    notes: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """No operator left, no decision changed, all gates passed."""
        return self.left == 0 and self.changed == 0 and self.passed and self.r <= 4


def folded(task: Task, network: nn.Module) -> Outcome:
    """Fold a trained network, prove it, and let both answer the test digits."""
    split = task.data()
    x = split.test.x
    way: Literal["auto", "graph"] = "graph" if task.repair else "auto"
    result = bnfold.fold(network, x[:2], repair=task.repair, writeback=way)
    proof = result.verify()
    original = task.judge(_on_torch(network, x), split)
    others = (
        task.judge(_on_torch(result.model, x), split),
        task.judge(_on_onnxruntime(result.graph, x), split),
    )
    changed = sum(int(np.sum(other.decisions != original.decisions)) for other in others)
    return Outcome(
        before=norm_operators(result.original),
        left=norm_operators(result.graph),
        figures=(original.figure, others[0].figure, others[1].figure),
        changed=changed,
        r=proof.r,
        passed=proof.passed,
        notes=(*(f"{kept.name}: {kept.reason}" for kept in result.kept), *proof.notes),
    )


def _on_torch(network: nn.Module, x: Tensor) -> Outputs:
    with torch.no_grad():
        given = network(x)
    return tuple(y.numpy() for y in (given if isinstance(given, tuple | list) else (given,)))


def _on_onnxruntime(model: object, x: Tensor) -> Outputs:
    """By the CPU provider, all optimisations on."""
    session = open_session(to_bytes(model), "cpu", optimize=True)
    (name,) = session.input_names
    return tuple(session.run({name: x.numpy()}).values())
