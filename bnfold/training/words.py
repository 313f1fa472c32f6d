"""What goes wrong in training, in words: choices, values that are not finite, a full memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from bnfold.errors import Diverged, UsageError


def describe(value: object) -> str:
    """A value in the words of an error message."""
    if isinstance(value, Tensor | np.ndarray):
        return f"an array of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a value of type {type(value).__name__}"


def type_name(x: Tensor) -> str:
    """`float32` of torch.float32."""
    return str(x.dtype).removeprefix("torch.")


def diverged(x: Tensor, loss: float, epoch: int, step: int, lr: float) -> str:
    """A loss that is no number, and where it came up."""
    return (
        f"The loss became {loss} in step {step} of epoch {epoch} at a learning rate of {lr:.3g}, on"
        f" inputs between {float(x.min()):.3g} and {float(x.max()):.3g}: training diverged. Lower"
        " lr, or scale the inputs."
    )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UsageError for a value that is not among the choices."""
    if value not in choices:
        raise UsageError(f"{name} is '{value}'; it must be one of {', '.join(choices)}.")


def check_finite(module: nn.Module, epoch: int) -> None:
    """The loss is taken before a step; what the last step did shows only here."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise Diverged(
                f"After epoch {epoch} '{name}' holds NaN or infinity: training diverged. Lower lr,"
                " or scale the inputs."
            )


@contextlib.contextmanager
def explaining_memory(x: Tensor) -> Iterator[None]:
    """A full memory told with the batch that did not fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"The memory of {x.device} does not hold a batch of shape {tuple(x.shape)}; lower"
            " batch_size."
        ) from error
