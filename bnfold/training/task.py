"""What a network's output is held against: classes, values, or a loss of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from bnfold.errors import InputError, UsageError, one_line
from bnfold.training.words import check_choice, describe, type_name

Loss = Literal["cross_entropy", "mse"] | Callable[[Tensor, Tensor], Tensor]


class Task(Protocol):
    """How outputs are judged. name: by which a resumed run knows it again."""

    @property
    def name(self) -> str:
        """See above."""

    def targets(self, y: Tensor, name: str) -> Tensor:
        """y (N, ...) as the loss takes it.

        Raises UsageError for a shape or a type that it cannot take, InputError for such values.
        """

    def check(self, output: object, shape: tuple[int, ...], y: Tensor) -> Tensor:
        """The network's output for x of this shape, if it can be held against y."""

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The mean over the batch that is trained down."""

    def test_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The mean over the batch that is reported on test data."""

    def right(self, output: Tensor, y: Tensor) -> float | None:
        """How many samples are classified right; None where nothing is classified."""


def task_of(loss: Loss, label_smoothing: float = 0.0) -> Task:
    """The task behind the argument `loss` of `train`. Raises UsageError."""
    if not 0 <= label_smoothing < 1:
        raise UsageError(f"label_smoothing is {label_smoothing}; it must be 0 or more, below 1.")
    if loss == "cross_entropy":
        return Classification(label_smoothing)
    if label_smoothing:
        raise UsageError("label_smoothing is of cross entropy; give it with no other loss.")
    if callable(loss):
        return Own(loss)
    check_choice("loss", loss, ("cross_entropy", "mse"))
    return Regression()


@dataclass(frozen=True)
class Classification:
    """Cross entropy of logits (N, K) and classes (N,), or (N, K, ...) and (N, ...) for each pixel.

    label_smoothing: the share of a label that all classes get alike (Szegedy et al. 2016).
    """

    label_smoothing: float = 0.0
    name: str = "cross_entropy"

    def targets(self, y: Tensor, name: str) -> Tensor:
        """See Task."""
        if y.dim() < 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise UsageError(
                f"{name} has y of shape {tuple(y.shape)} and type {type_name(y)}; it must be one"
                " integer class per sample."
            )
        y = y.to(torch.int64)
        if y.numel() and int(y.min()) < 0:
            raise InputError(f"{name} has the label {int(y.min())}; classes count from 0.")
        return y

    def check(self, output: object, shape: tuple[int, ...], y: Tensor) -> Tensor:
        """See Task."""
        fits = isinstance(output, Tensor) and output.dim() == y.dim() + 1
        if not isinstance(output, Tensor) or not fits or _without_classes(output) != y.shape:
            wanted = ", ".join([str(len(y)), "classes", *map(str, y.shape[1:])])
            raise UsageError(
                f"For a batch of shape {shape} the network returned {describe(output)}; a"
                f" classifier returns logits of shape ({wanted}), y being of shape"
                f" {tuple(y.shape)}."
            )
        if int(y.max()) >= output.shape[1]:
            raise UsageError(
                f"The data has the label {int(y.max())}, but the network has {output.shape[1]}"
                f" outputs (classes 0 to {output.shape[1] - 1}). Build it with more, such as"
                f" num_classes={int(y.max()) + 1} (bnfold train: --set num_classes=...)."
            )
        return output

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """See Task."""
        return functional.cross_entropy(output, y, label_smoothing=self.label_smoothing)

    def test_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """See Task. The labels as they are."""
        return functional.cross_entropy(output, y)

    def right(self, output: Tensor, y: Tensor) -> float:
        """See Task. Of labelled pixels, the share in each sample."""
        return int((output.argmax(dim=1) == y).sum()) * len(y) / y.numel()


@dataclass(frozen=True)
class Regression:
    """The mean squared error of outputs and targets of one shape."""

    name: str = "mse"

    def targets(self, y: Tensor, name: str) -> Tensor:
        """See Task."""
        if y.dim() < 1 or not y.is_floating_point():
            raise UsageError(
                f"{name} has y of shape {tuple(y.shape)} and type {type_name(y)}; mse takes floats,"
                " with the samples along the first axis."
            )
        return y

    def check(self, output: object, shape: tuple[int, ...], y: Tensor) -> Tensor:
        """See Task."""
        if not isinstance(output, Tensor) or output.shape != y.shape:
            raise UsageError(
                f"For a batch of shape {shape} the network returned {describe(output)}, and y has"
                f" the shape {tuple(y.shape)}; mse compares arrays of one shape."
            )
        return output

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """See Task."""
        return functional.mse_loss(output, y.to(output.dtype))

    test_loss = loss

    def right(self, output: Tensor, y: Tensor) -> None:
        """See Task."""


@dataclass(frozen=True)
class Own:
    """A function of the user's from outputs and targets to a scalar, a mean over the batch."""

    function: Callable[[Tensor, Tensor], Tensor]

    @property
    def name(self) -> str:
        """Its own."""
        return str(getattr(self.function, "__qualname__", type(self.function).__name__))

    def targets(self, y: Tensor, name: str) -> Tensor:
        """See Task."""
        if y.dim() < 1:
            raise UsageError(f"{name} has one number for y; there must be one target per sample.")
        return y

    def check(self, output: object, shape: tuple[int, ...], y: Tensor) -> Tensor:
        """See Task."""
        del y
        if not isinstance(output, Tensor):
            raise UsageError(
                f"For a batch of shape {shape} the network returned {describe(output)}; a loss"
                " takes one array."
            )
        return output

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """See Task."""
        try:
            found = self.function(output, y)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise UsageError(
                f"The loss {self.name} failed on an output of shape {tuple(output.shape)} and"
                f" targets of shape {tuple(y.shape)}: {one_line(error)}."
            ) from error
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise UsageError(
                f"The loss {self.name} returned {describe(found)}; it must be one number."
            )
        return found.reshape(())

    test_loss = loss

    def right(self, output: Tensor, y: Tensor) -> float | None:
        """See Task. Known where y are classes and the output has a score for each."""
        if (
            y.is_floating_point()
            or output.dim() != y.dim() + 1
            or _without_classes(output) != (y.shape)
        ):
            return None
        return Classification().right(output, y)


def _without_classes(output: Tensor) -> torch.Size:
    return output.shape[:1] + output.shape[2:]
