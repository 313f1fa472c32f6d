"""Weights meet their module: names and shapes matched strictly, statistics checked.

A prefix is dropped or added only when every name then agrees with the
module's, and what is missing, unexpected or of another shape is listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import TYPE_CHECKING

from bnfold.errors import InputError
from bnfold.parts import parts
from bnfold.reading.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

_COUNTER = "num_batches_tracked"
# Names under which a wrapper holds the module it wraps.
_HOLDERS = frozenset({"module", "_orig_mod", "model", "net"})
_SHOWN = 4


def load_into(module: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Load the checkpoint's weights into `module`, in place, and say what it took.

    Every tensor of the module must be in the checkpoint, with its shape, and nothing else may be.
    Tolerated: a prefix that all names share (`module.`, `model.`, ...) on either side, and absent
    `num_batches_tracked` counters, which inference does not read.
    Raises InputError with the names that are missing or unexpected, or the shapes that differ;
    the module may then hold some of the weights.
    """
    found, wanted = checkpoint.state_dict, module.state_dict()
    notes: list[str] = []
    renamed: dict[str, Tensor] = {}
    for note, names in _renamings(list(found), list(wanted)):
        if _agree(names.values(), wanted):
            renamed = {new: found[old] for old, new in names.items()}
            _check_shapes(module, renamed, wanted)
            notes = [*([note] if note else []), *_conversions(renamed, wanted)]
            break
    try:  # where no names agree, the module's own load hooks may still know these
        result = module.load_state_dict(renamed or dict(found), strict=False)
    except Exception as error:  # a hook, which is the user's code, or a shape
        missing = [key for key in wanted if key not in found and not _is_counter(key)]
        unexpected = [key for key in found if key not in wanted]
        if not renamed:
            raise InputError(_mismatch(module, missing, unexpected, found)) from error
        reason = " ".join(str(error).split())
        raise InputError(f"{type(module).__name__} refuses the weights: {reason}") from error
    missing = [key for key in result.missing_keys if not _is_counter(key)]
    if missing or result.unexpected_keys:
        raise InputError(_mismatch(module, missing, result.unexpected_keys, found))
    if counters := len([key for key in wanted.keys() - renamed.keys() if renamed]):
        notes.append(f"{counters} {_COUNTER} counters are not in the file (inference needs none)")
    return tuple(notes)


def _agree(names: Iterable[str], wanted: Iterable[str]) -> bool:
    names, wanted = set(names), set(wanted)
    return names <= wanted and all(_is_counter(key) for key in wanted - names)


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] == _COUNTER


def _renamings(found: list[str], wanted: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(note, old name -> new name), the smallest change first."""
    yield "", {key: key for key in found}
    starts, others = _common_starts(found), _common_starts(wanted)
    for start in starts:
        yield f"prefix {start!r} removed", {key: key.removeprefix(start) for key in found}
    for other in others:
        yield f"prefix {other!r} added", {key: other + key for key in found}
    for start in starts:
        if not _HOLDERS.issuperset(start.strip(".").split(".")):
            break  # another module's name, not a wrapper's
        for other in others:
            note = f"prefix {start!r} replaced by {other!r}"
            yield note, {key: other + key.removeprefix(start) for key in found}
    inner = {
        key: ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))
        for key in found
    }
    if len(set(inner.values())) == len(inner):
        yield "'module' and '_orig_mod' removed inside the names", inner


def _common_starts(keys: list[str]) -> list[str]:
    """The dotted prefixes that all keys share, shortest first."""
    levels = zip(*(key.split(".")[:-1] for key in keys), strict=False)
    shared = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    return [".".join(shared[: depth + 1]) + "." for depth in range(len(shared))]


def _check_shapes(module: nn.Module, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    from torch.nn.parameter import is_lazy

    wrong = [
        f"{key} is {tuple(found[key].shape)} in the file and {tuple(tensor.shape)} in the module"
        for key, tensor in wanted.items()
        if key in found and not is_lazy(tensor) and found[key].shape != tensor.shape
    ]
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(wanted)} tensors have another shape than "
            f"{type(module).__name__} expects: {_listed(wrong)}. The factory builds another "
            "variant (width, number of classes or input channels) than the one that was saved."
        )


def _conversions(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    pairs: dict[tuple[str, str], int] = {}
    for key, tensor in found.items():
        if key in wanted and wanted[key].dtype != tensor.dtype and not _is_counter(key):
            pair = str(tensor.dtype), str(wanted[key].dtype)
            pairs[pair] = pairs.get(pair, 0) + 1
    return [f"{count} tensors read from {old} into {new}" for (old, new), count in pairs.items()]


def _mismatch(
    module: nn.Module, missing: list[str], unexpected: list[str], found: dict[str, Tensor]
) -> str:
    parts = [f"the weights do not fit {type(module).__name__}"]
    if missing:
        parts.append(f"{len(missing)} names it needs are not in the file ({_listed(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} in the file are not in it ({_listed(unexpected)})")
    hint = "The factory builds another model, or another depth of it, than the one that was saved."
    if len(unexpected) == len(found):
        hint = "No name agrees: the file belongs to another model than the factory builds."
    return f"{'; '.join(parts)}. {hint}"


def _listed(items: list[str]) -> str:
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


# --- statistics ----------------------------------------------------------------------------------


def check_batchnorm_statistics(module: nn.Module) -> None:
    """Raise InputError where a batch norm's numbers can normalise nothing.

    That is a running_var that is negative, or not positive once eps is added, and NaN or Inf in
    running_mean, running_var, weight or bias; the message names layer and channel. Every layer
    with running_mean and running_var is looked at, of whatever class.
    """
    import torch

    for name, layer in parts(module):
        mean, variance = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
        if not isinstance(mean, torch.Tensor) or not isinstance(variance, torch.Tensor):
            continue
        where = f"{type(layer).__name__} {name!r}" if name else type(layer).__name__
        for label in ("running_mean", "running_var", "weight", "bias"):
            values = getattr(layer, label, None)
            if isinstance(values, torch.Tensor):
                _refuse_channel(where, label, values, ~torch.isfinite(values), "is not finite")
        eps = getattr(layer, "eps", 0.0)
        _refuse_channel(where, "running_var", variance, variance < 0, "is negative")
        still = variance.double() + eps <= 0
        _refuse_channel(where, "running_var", variance, still, f"is not positive with eps {eps}")


def _refuse_channel(where: str, label: str, values: Tensor, bad: Tensor, fault: str) -> None:
    channels = bad.reshape(-1).nonzero().reshape(-1).tolist()
    if channels:
        value = values.detach().reshape(-1)[channels[0]].item()
        more = f" (and {len(channels) - 1} more channels)" if len(channels) > 1 else ""
        raise InputError(
            f"{where}: {label} of channel {channels[0]} is {value:g}, which {fault}{more}. The "
            "checkpoint is damaged or its training diverged; it cannot be folded."
        )
