"""Undoing a fold on the torch side: what to note of a network, and how it is put back."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import nn

from bnfold.errors import InputError, one_line
from bnfold.folding.scope import Scope
from bnfold.folding.told import AnyArray
from bnfold.folding.undo import TorchSide, Undo, original_state
from bnfold.reading.plain import is_variant

_NORMS = {
    norm.__name__: norm
    for norm in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
}

_COUNTER = ".num_batches_tracked"


def torch_side_of(
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    scope: Scope,
    modules: tuple[nn.Module, nn.Module] | None,
    gone: Collection[str],
) -> TorchSide:
    """What the record notes of a torch network. `gone`: the batch norms that were folded.

    modules: the user's and the one that was exported, in which a norm of the user's own class may
    be torch's, with a counter that the user's has not.
    """
    built, counters = {}, set()
    if modules is not None:
        own, exported = modules
        built = {name: _how(exported.get_submodule(name), own.get_submodule(name)) for name in gone}
        ours = nn.Module.state_dict(own)
        counters = {name for name in before if name.endswith(_COUNTER) and name not in ours}
    return TorchSide(
        arrays_of({name: tensor for name, tensor in before.items() if name not in counters}),
        arrays_of(after),
        tuple(sorted(scope.layers)),
        tuple(sorted(scope.norms)),
        built,
    )


def _how(norm: nn.Module, own: nn.Module) -> dict[str, Any]:
    """How to build a batch norm like this one; `own`: what the user had there.

    One of bnfold's variants comes back as the batch norm that it is at inference, as a computed
    weight comes back as one that is held.
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)  # a scope has no others
    return {
        "class": type(norm if is_variant(own) else own).__name__,
        "num_features": norm.num_features,
        "eps": norm.eps,
        "momentum": norm.momentum,
        "affine": norm.affine,
        "weight": norm.weight is not None,
        "bias": norm.bias is not None,
    }


def unfold_module(module: nn.Module, undo: Undo) -> nn.Module:
    """A copy of a folded module with its batch norms back, in eval mode; the same class.

    Raises InputError for a module that is not the one that was folded.
    """
    folded = module.state_dict()
    state, _ = original_state(undo, arrays_of(folded))
    result = copy.deepcopy(module)
    for name, how in undo.built.items():
        _put_norm(result, name, how, state)
    for name, child in result.named_modules():
        bias = f"{name}.bias" if name else "bias"
        if child._parameters.get("bias") is not None and bias not in state:
            child.register_parameter("bias", None)
    others = {name: value for name, value in folded.items() if not _is_tensor(value)}
    try:
        result.load_state_dict({**others, **tensors_of(state)})
    except RuntimeError as error:
        text = one_line(error)
        raise InputError(f"{type(module).__name__} is not what was folded: {text}.") from error
    return result.eval()


def _put_norm(
    module: nn.Module, name: str, how: Mapping[str, Any], state: Mapping[str, AnyArray]
) -> None:
    """A batch norm in the place of the Identity that its fold left."""
    if how.get("class") not in _NORMS:
        raise InputError(
            f"'{name}' was a {how.get('class')}, which cannot be built anew; unfold the checkpoint"
            " with the factory of its network."
        )
    parent, _, leaf = name.rpartition(".")
    try:
        there = module.get_submodule(name)
    except AttributeError:
        there = None
    if type(there) is not nn.Identity:
        found = "nothing" if there is None else f"a {type(there).__name__}"
        raise InputError(f"Where '{name}' was folded the module has {found}, no Identity.")
    norm = _NORMS[how["class"]](
        how["num_features"], eps=how["eps"], momentum=how["momentum"], affine=how["affine"]
    )
    for key in ("weight", "bias"):
        if not how.get(key, how["affine"]):
            norm.register_parameter(key, None)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    dtype = tensors_of({name: state[f"{name}.running_mean"]})[name].dtype
    setattr(module.get_submodule(parent), leaf, norm.to(device=device, dtype=dtype))


# --- tensors and arrays ---------------------------------------------------------------------------


def arrays_of(state_dict: Mapping[str, Any]) -> dict[str, AnyArray]:
    """The tensors of a state_dict as numpy arrays, bit for bit, bfloat16 and float8 too."""
    return {
        name: TorchTensor(tensor.detach().cpu()).numpy()
        for name, tensor in state_dict.items()
        if _is_tensor(tensor)
    }


def tensors_of(arrays: Mapping[str, AnyArray]) -> dict[str, torch.Tensor]:
    """The inverse of `arrays_of`."""
    return {name: _tensor(array) for name, array in arrays.items()}


def _tensor(array: AnyArray) -> torch.Tensor:
    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(np.array(array))
    bits = np.array(array).view(f"i{array.dtype.itemsize}")
    return torch.from_numpy(bits).view(getattr(torch, array.dtype.name))


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)
