"""A fold written back into a torch module: same class in, same class out.

The graph's initializers carry the parameters' names, so a fold is a set of new tensors by name: a
folded batch norm becomes an Identity, a layer that had no bias gets one registered.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from bnfold.errors import InputError
from bnfold.folding.apply import Folded
from bnfold.folding.plan import FoldPlan, Scope
from bnfold.folding.rules import is_batch_norm
from bnfold.folding.rules.node import name_of
from bnfold.reading.checkpoint import Checkpoint, load_checkpoint
from bnfold.reading.weights import load_into

# Their forward is the batch norm and nothing else; a subclass may add to it.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Their forward reads `self.bias` and works with or without it.
_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def scope_of(module: nn.Module, graph: ir.Model) -> Scope:
    """What of a module a fold may change, given its exported graph."""
    calls = Counter(name_of(node) for g in graph.graphs() for node in g if is_batch_norm(node))
    named = list(module.named_modules(remove_duplicate=False))
    places = Counter(id(child) for _, child in named)
    norms = {
        name
        for name, child in named
        if type(child) in _NORMS
        and calls[name] == 1
        and places[id(child)] == 1
        and not _has_hooks(child)
    }
    layers = {
        name
        for name, child in named
        if type(child) in _LAYERS and places[id(child)] == 1 and not _has_hooks(child)
    }
    plain = {
        f"{name}.{key}" if name else key
        for name, child in named
        if not _has_hooks(child)
        for key in (*child._parameters, *child._buffers)
    }
    return Scope(frozenset(plain), frozenset(layers), frozenset(norms))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def write_back(module: nn.Module, plan: FoldPlan, folded: Folded) -> nn.Module:
    """A copy of the module, in eval mode, with the plan's batch norms folded.

    Raises InputError if the module cannot be copied.
    """
    try:
        result = copy.deepcopy(module).eval()
    except Exception as error:
        raise InputError(
            f"{type(module).__name__} cannot be copied ({error}); fold it to ONNX instead."
        ) from error
    state = folded_state(module.state_dict(), plan, folded)
    _take_shape(result, state, {removed.name for removed in plan.removed})
    result.load_state_dict(state)
    return result


def folded_state(
    state_dict: Mapping[str, torch.Tensor], plan: FoldPlan, folded: Folded
) -> dict[str, torch.Tensor]:
    """The state_dict of the folded network: no folded batch norm, new weights, added biases.

    Raises InputError if a constant that was written has no place in it.
    """
    gone = {removed.name for removed in plan.removed}
    state = {
        name: copy.deepcopy(tensor)
        for name, tensor in state_dict.items()
        if name.rpartition(".")[0] not in gone
    }
    initializers = folded.model.graph.initializers
    for name, written in folded.written.items():
        if name not in state or written != (name,):
            raise _unfit(name)
        state[name] = _tensor(initializers[name], state[name])
    for weight, biases in folded.biases.items():
        name = f"{weight.removesuffix('.weight')}.bias"
        if len(biases) != 1 or weight not in state or name in state:
            raise _unfit(name)
        state[name] = _tensor(initializers[biases[0]], state[weight])
    return state


def _unfit(name: str) -> InputError:
    """What a plan within its scope never asks for; a wrong file is worse than none."""
    return InputError(f"The fold changes '{name}' in a way that the state_dict cannot hold.")


def _tensor(value: ir.Value, like: torch.Tensor) -> torch.Tensor:
    assert value.const_value is not None
    array = value.const_value.numpy()
    if array.dtype.kind not in "fiub":  # bfloat16 is not a type of numpy's own
        array = array.astype("float32")
    return torch.from_numpy(array.copy()).to(like.dtype)


def take_shape_of(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Give a module, in place, the structure of a folded checkpoint, so that its weights fit.

    The batch norms that the checkpoint names as folded become Identity, and a layer whose bias it
    holds gets a bias. Raises InputError for a checkpoint that does not say what was folded.
    """
    described = checkpoint.description or {}
    if described.get("kind") != "fold":
        raise InputError("The checkpoint is not one that bnfold has folded.")
    _take_shape(module, checkpoint.state_dict, set(described.get("folded", ())))


def _take_shape(
    module: nn.Module, state_dict: Mapping[str, torch.Tensor], gone: Collection[str]
) -> None:
    for name, child in list(module.named_modules()):
        if name in gone:
            if type(child) not in _NORMS:
                raise InputError(
                    f"'{name}' was folded as a plain batch norm; in this module it is a"
                    f" {type(child).__name__}."
                )
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, nn.Identity().train(child.training))
        elif type(child) in _LAYERS and child.bias is None and f"{name}.bias" in state_dict:
            bias = state_dict[f"{name}.bias"]
            child.register_parameter("bias", nn.Parameter(bias.detach().clone()))


def load_folded(module: nn.Module, path: Path | str) -> nn.Module:
    """Load a folded checkpoint into a freshly built module of the original class, in place.

    The module's folded batch norms become Identity, and layers get the biases that the file holds.
    Raises InputError where file and module do not belong together.
    """
    checkpoint = load_checkpoint(path)
    take_shape_of(module, checkpoint)
    load_into(module, checkpoint)
    return module.eval()


def plain_modules(scope: Scope) -> dict[str, list[str]]:
    """The part of a scope that a checkpoint keeps for when the module is not at hand."""
    return {"layers": sorted(scope.layers), "norms": sorted(scope.norms)}


def scope_of_names(
    state_dict: Mapping[str, torch.Tensor], plain: Mapping[str, Sequence[str]]
) -> Scope:
    """What may change where the module is not at hand, only what `plain_modules` kept of it."""
    layers, norms = plain.get("layers", ()), plain.get("norms", ())
    return Scope(frozenset(state_dict), frozenset(layers), frozenset(norms))
