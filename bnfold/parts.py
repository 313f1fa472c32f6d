"""The parts of a torch module where torch keeps them: `modules()` may be overwritten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def parts(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and all below it by name, in every place where they stand."""
    yield name, module
    for leaf, child in module._modules.items():
        if child is not None:
            yield from parts(child, f"{name}.{leaf}" if name else leaf)
