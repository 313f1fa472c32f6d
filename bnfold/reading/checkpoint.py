"""Checkpoints: from what a training script saved to a dictionary of named tensors.

The weights stand under `state_dict`, `model`, `net` or nothing; their names wear `module.` or
`_orig_mod.`; optimizers, epochs and schedules lie beside them. All that is undone here, and each
step is a note for the user. Prefixes that may be a submodule's real name (`model.`) stay until
weights.py can compare the names with a module's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold.errors import InputError, UsageError
from bnfold.reading.pickled import check_plain_module, load_pickled
from bnfold.reading.sniff import UNPACKED_BYTES, UNPACKED_RATIO, Kind, sniff

if TYPE_CHECKING:
    from torch import Tensor, nn

DESCRIPTION_KEY = "bnfold"

# Where training scripts put the weights: first the trained ones, then their moving average.
_WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network"),
    *("weights", "params", "state"),
)
_AVERAGES = (
    *("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "params_ema", "ema"),
    "shadow",
)
_DEEPEST = 8
_OPTIMIZERS = ("optim", "sched", "scaler", "amp", "rng", DESCRIPTION_KEY)

# What DataParallel and torch.compile put before every name.
_SHELLS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Checkpoint:
    """Named weights, and what was done to find them.

    state_dict: name -> dense CPU tensor, without gradients.
    notes: one sentence for each wrapper opened, prefix removed or entry left out.
    description: the entry `bnfold` of a checkpoint that bnfold wrote (in safetensors, the JSON
    under that key of the metadata), else None.
    module: the model itself, when the file holds one and not only its weights; its own names are
    those of `state_dict`.
    """

    state_dict: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    description: dict[str, Any] | None = None
    module: nn.Module | None = None


def load_checkpoint(path: str | Path, *, trust_pickle: bool = False) -> Checkpoint:
    """The weights in a torch checkpoint (zip or legacy) or a safetensors file.

    Tensors arrive on the CPU wherever they were saved. Nothing in the file is run, unless
    `trust_pickle` is True and the file cannot be read otherwise.
    Raises UnsafeInputError for a file that would run code; InputError for a damaged one, for one
    that holds no weights, and for tensors that are sparse, quantised or without data; UsageError
    for an ONNX model or a .pt2, which hold a graph of their own.
    """
    path = Path(path)
    kind = sniff(path)
    if kind is Kind.TORCHSCRIPT:
        raise InputError(
            f"{path} is a TorchScript archive, whose compiled code bnfold does not fold. Export "
            "the nn.Module it was made from (torch.export or ONNX); or, where you trust the file, "
            "save its weights with torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt') "
            "and pass them with --model pkg.mod:factory."
        )
    if kind is Kind.SAFETENSORS:
        return _load_safetensors(path)
    if kind is not Kind.CHECKPOINT:
        raise UsageError(
            f"{path} is {kind.label} and not a checkpoint; it needs no factory: leave --model out."
        )
    return _load_torch(path, trust_pickle)


def _load_torch(path: Path, trust_pickle: bool) -> Checkpoint:
    from torch import nn

    loaded, unpickled = load_pickled(path, trust_pickle=trust_pickle)
    notes: list[str] = []
    if unpickled:
        notes.append("the file was unpickled on trust, which ran whatever it says")
    keys, weights = _find_weights(loaded, path)
    if keys:
        notes.append(f"weights found under {' / '.join(repr(key) for key in keys)}")
    if keys and isinstance(loaded, Mapping) and keys[0] not in _AVERAGES:
        averages = [key for key in _AVERAGES if key in loaded]
        notes += [f"the averaged weights under {key!r} are not used" for key in averages]
    description = loaded.get(DESCRIPTION_KEY) if isinstance(loaded, Mapping) else None
    description = description if isinstance(description, dict) else None
    if isinstance(weights, nn.Module):
        if not trust_pickle:
            check_plain_module(weights, path)
        notes.append(f"the file holds a whole model, {type(weights).__name__}")
        state_dict = _tensors(weights.state_dict(), path, notes)
        return Checkpoint(state_dict, tuple(notes), description, weights)
    state_dict = _without_shells(_tensors(weights, path, notes), notes)
    return Checkpoint(state_dict, tuple(notes), description)


def _load_safetensors(path: Path) -> Checkpoint:
    import safetensors

    notes: list[str] = []
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        written = json.loads(metadata.get(DESCRIPTION_KEY, "null"))
    except Exception as error:  # SafetensorError, and what its reader lets through
        raise InputError(
            f"{path} begins like a safetensors file and cannot be read, so it was cut short or "
            f"damaged ({error}): copy it again."
        ) from error
    state_dict = _without_shells(_tensors(tensors, path, notes), notes)
    return Checkpoint(state_dict, tuple(notes), written if isinstance(written, dict) else None)


# --- opening the wrappers ------------------------------------------------------------------------


def _find_weights(loaded: Any, path: Path) -> tuple[tuple[str, ...], Any]:
    """The keys that lead to the weights, and there a mapping with tensors or a module."""
    found = _search(loaded, (), set())
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(repr("/".join(keys)) for keys, _ in found)
        raise InputError(
            f"{path} holds {len(found)} sets of weights ({names}); save the one to use with "
            "torch.save(checkpoint[NAME], 'weights.pt')."
        )
    what = f"a {type(loaded).__name__}"
    if isinstance(loaded, Mapping):
        names = ", ".join(repr(key) for key in list(loaded)[:6])
        what = f"a dictionary with {names}" if names else "an empty dictionary"
    raise InputError(f"{path} holds {what} and no weights; save model.state_dict().")


def _search(value: Any, keys: tuple[str, ...], met: set[int]) -> list[tuple[tuple[str, ...], Any]]:
    from torch import Tensor, nn

    if isinstance(value, nn.Module):
        return [(keys, value)]
    if not isinstance(value, Mapping) or id(value) in met or len(keys) > _DEEPEST:
        return []
    met.add(id(value))
    for key in (*_WRAPPERS, *_AVERAGES):
        if key in value and (found := _search(value[key], (*keys, key), met)):
            return found
    if any(isinstance(item, Tensor) for item in value.values()):
        return [(keys, value)]
    named = [key for key in value if isinstance(key, str) and not key.startswith(_OPTIMIZERS)]
    return [hit for key in named for hit in _search(value[key], (*keys, key), met)]


def _without_shells(state_dict: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    def worn_by_all(prefix: str) -> bool:
        return all(key.startswith(prefix) and key != prefix for key in state_dict)

    while worn := [prefix for prefix in _SHELLS if worn_by_all(prefix)]:
        state_dict = {key.removeprefix(worn[0]): value for key, value in state_dict.items()}
        notes.append(f"prefix {worn[0]!r} removed")
    first = next(iter(state_dict)).partition(".")[0] + "."
    if first in ("model.", "net.") and worn_by_all(first):
        notes.append(f"every name begins with {first!r}, removed where the model has none such")
    return state_dict


# --- the tensors ---------------------------------------------------------------------------------


def _tensors(weights: Mapping[Any, Any], path: Path, notes: list[str]) -> dict[str, Tensor]:
    """The named tensors of a state_dict; what is none is left out with a note."""
    from torch import Tensor

    kept = {
        key: value.detach()
        for key, value in weights.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    others = [repr(key) for key in weights if key not in kept]
    if others:
        more = ", ..." if len(others) > 3 else ""
        notes.append(f"{len(others)} entries that are no tensors left out: {', '.join(others[:3])}")
        notes[-1] += more
    if not kept:
        raise InputError(f"{path} holds no named tensors; save model.state_dict().")
    for key, tensor in kept.items():
        if fault := _fault(tensor):
            raise InputError(
                f"{path}: tensor {key!r} is {fault}, which bnfold does not fold; save dense "
                "floating-point weights."
            )
    _refuse_expansion(kept, path)
    return kept


def _fault(tensor: Tensor) -> str | None:
    import torch

    if tensor.is_meta:
        return "on the meta device and has no data"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return "sparse or nested"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    return None


def _refuse_expansion(tensors: dict[str, Tensor], path: Path) -> None:
    """A tensor of stride 0 is any size on paper; copying it would fill the memory."""
    unpacked = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    size = path.stat().st_size
    if unpacked > max(UNPACKED_BYTES, UNPACKED_RATIO * size):
        raise InputError(
            f"{path} has {size} bytes and its tensors would take {unpacked}: they repeat their "
            "elements (expanded tensors). Save them with tensor.contiguous()."
        )
