"""The parts of a torch module where torch keeps them, since `modules()` may be overwritten."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bnfold.errors import InputError, one_line

if TYPE_CHECKING:
    from torch import nn


def parts(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and all below it by name, in every place where they stand."""
    yield name, module
    for leaf, child in module._modules.items():
        if child is not None:
            yield from parts(child, f"{name}.{leaf}" if name else leaf)


def class_name(part: object) -> str:
    """The class of an object by its full name, for classes that cannot be imported here."""
    return f"{type(part).__module__}.{type(part).__qualname__}"


def hooked(part: nn.Module) -> bool:
    """True where more than the class's own forward runs: hooks, or a forward of its own."""
    return bool(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))


def put_in(module: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """Put other modules in the places of parts, by the ids of these; in all places of each.

    In place. Returns the module, or what takes its own place.
    """
    for _, part in list(parts(module)):
        for leaf, child in part._modules.items():
            if id(child) in new:
                part._modules[leaf] = new[id(child)]
    return new.get(id(module), module)


def copied(module: nn.Module, advice: str = "take off what cannot be copied first") -> nn.Module:
    """A deep copy; tensors that an earlier forward left behind in the module are cut off.

    Raises InputError, with the advice, for a module that cannot be copied.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    try:
        with torch.inference_mode(False), torch.no_grad():
            left_behind: dict[int, Any] = {
                id(value): value.detach().clone()
                for _, part in parts(module)
                for value in tree_leaves(list(vars(part).values()))
                if isinstance(value, torch.Tensor) and not value.is_leaf
            }
            return copy.deepcopy(module, left_behind)
    except Exception as error:  # __deepcopy__ is the user's code too
        raise InputError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {one_line(error)});"
            f" {advice}."
        ) from error
