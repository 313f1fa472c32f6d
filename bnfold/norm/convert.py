"""One normalization in place of another, in any module.

A kind keeps what it shares with the one before: batch norm, batch renorm, ghost and frozen batch
norm have one state, so a network changes between them with its weights and statistics. The kinds
that take the batch norms out give other functions; they are for networks that are yet to be trained.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from bnfold.errors import InputError, UsageError
from bnfold.norm import batch as batch_norms
from bnfold.norm import renorm as renorms
from bnfold.norm.weight import WEIGHTED, weight_norm
from bnfold.parts import parts

Kind = Literal[
    "batch",
    "renorm",
    "ghost",
    "mean-only",
    "weight",
    "weight-mean-only",
    "normprop",
    "frozen",
    "sync",
    "none",
]
KINDS: tuple[str, ...] = get_args(Kind)

# A family of classes, by the rank that its name holds the input to; "" for any.
_FAMILIES: dict[str, tuple[object, str]] = {
    "batch": (batch_norms, "BatchNorm"),
    "renorm": (renorms, "BatchRenorm"),
    "ghost": (batch_norms, "GhostBatchNorm"),
    "mean-only": (batch_norms, "MeanOnlyBatchNorm"),
    "frozen": (batch_norms, "FrozenBatchNorm"),
}
_OPTIONS = {
    "batch": {"eps", "momentum"},
    "renorm": {"eps", "momentum", "schedule"},
    "ghost": {"eps", "momentum", "ghost_size"},
    "mean-only": {"momentum"},
    "frozen": {"eps"},
    "sync": {"eps", "momentum", "process_group"},
    "weight": {"log_scale"},
    "weight-mean-only": {"log_scale", "momentum"},
    "none": set[str](),
}
_FROZEN_ELSEWHERE = (
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "detectron2.layers.batch_norm.FrozenBatchNorm2d",
)
_NORM_ACTS = ("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct")


def convert(model: nn.Module, kind: Kind, *, inplace: bool = False, **options: Any) -> nn.Module:
    """Replace every batch norm of a model by another kind of normalization.

    `batch`, `renorm`, `ghost`, `frozen` and `sync` have one state, which carries over; `mean-only`
    keeps the bias and the running mean. `weight` takes the batch norms out, weight-normalises every
    linear and convolution layer and gives it a bias; `weight-mean-only` puts mean-only batch norms
    in their places; `none` takes them out and adds biases; `normprop` is
    `bnfold.norm.propagation`. Modes, device, type, requires_grad, eps and momentum carry over, but
    to batch renorm its own momentum, 0.01. A module in two places stays one module.

    `options` are those of the kind's class (`schedule`, `ghost_size`, `momentum`, ...). Returns the
    model itself if `inplace`, else a copy.

    Raises UsageError for an unknown kind or option, InputError for a batch norm of a class of the
    user's own, a lazy one, or one without the statistics that the kind needs.
    """
    if kind not in KINDS:
        raise UsageError(f"There is no kind '{kind}'; the kinds are {', '.join(KINDS)}.")
    if kind == "normprop":
        from bnfold.norm.propagation import propagate

        return propagate(model if inplace else copy.deepcopy(model), **options)
    if unknown := set(options) - _OPTIONS[kind]:
        allowed = ", ".join(sorted(_OPTIONS[kind])) or "none"
        raise UsageError(f"'{kind}' has no option '{min(unknown)}'; its options are: {allowed}.")
    if not inplace:
        model = copy.deepcopy(model)
    log_scale = {"log_scale": options.pop("log_scale")} if "log_scale" in options else {}
    model = _replace(model, lambda old, name: _successor(old, name, kind, options))
    for _, part in parts(model):
        if isinstance(part, WEIGHTED):
            if kind in ("weight", "none") and part.bias is None:
                _add_bias(part)
            if kind in ("weight", "weight-mean-only"):
                weight_norm(part, **log_scale)
    return model


def _replace(model: nn.Module, successor: Callable[[nn.Module, str], nn.Module]) -> nn.Module:
    """Every batch norm replaced by its successor, in all of its places."""
    done: dict[int, nn.Module] = {}
    old = [(name, part) for name, part in parts(model) if _is_norm(part, name)]
    for name, part in old:
        if id(part) not in done:
            done[id(part)] = successor(part, name)
    for _, part in list(parts(model)):
        for leaf, child in part._modules.items():
            if id(child) in done:
                part._modules[leaf] = done[id(child)]
    return done.get(id(model), model)


def _qualified(part: nn.Module) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _is_norm(part: nn.Module, name: str) -> bool:
    """Whether a module is a batch norm that can be replaced; InputError if it is and cannot."""
    if isinstance(part, LazyModuleMixin) and part.has_uninitialized_params():  # type: ignore[misc]
        raise InputError(
            f"'{name}' is a {type(part).__name__} whose size is not known yet; run a batch through"
            " the model first."
        )
    if _qualified(part) in (*_FROZEN_ELSEWHERE, *_NORM_ACTS):
        return True
    if not isinstance(part, _BatchNorm):
        return False
    if type(part).__module__ not in (
        "torch.nn.modules.batchnorm",
        batch_norms.__name__,
        renorms.__name__,
    ):
        raise InputError(
            f"'{name}' is a {_qualified(part)}, a class of its own, and what it adds to a batch norm"
            " would be lost; replace it by one of torch's batch norms first."
        )
    return True


def _rank(old: nn.Module) -> str:
    for rank, base in (("1d", nn.BatchNorm1d), ("2d", nn.BatchNorm2d), ("3d", nn.BatchNorm3d)):
        if isinstance(old, base):
            return rank
    return "2d" if _qualified(old) in _FROZEN_ELSEWHERE else ""


def _successor(old: nn.Module, name: str, kind: str, options: dict[str, Any]) -> nn.Module:
    """What takes a batch norm's place."""
    new: nn.Module
    kind = "mean-only" if kind == "weight-mean-only" else kind
    new = nn.Identity() if kind in ("weight", "none") else _norm(old, name, kind, options)
    if _qualified(old) in _NORM_ACTS:
        act: Any = old
        new = nn.Sequential(OrderedDict(norm=new, drop=act.drop, act=act.act))
    return new.train(old.training)


def _norm(old: Any, name: str, kind: str, options: dict[str, Any]) -> nn.Module:
    """A batch norm of another kind with the numbers of the old one."""
    if kind == "sync":
        cls: Any = nn.SyncBatchNorm
    else:
        module, stem = _FAMILIES[kind]
        cls = getattr(module, f"{stem}{_rank(old)}")
    if type(old) is cls and not options:
        return old
    mean: Tensor | None = old.running_mean
    if mean is None and kind in ("renorm", "mean-only", "frozen"):
        raise InputError(
            f"'{name}' keeps no running statistics (track_running_stats=False), and '{kind}' needs"
            " them."
        )
    settings = dict(options)
    if kind != "mean-only":
        settings.setdefault("eps", old.eps if getattr(old, "eps", 0.0) else 1e-5)
    if kind != "frozen":
        momentum = getattr(old, "momentum", 0.1)
        if kind == "renorm" and momentum is not None and not isinstance(old, renorms.BatchRenorm):
            momentum = 0.01
        settings.setdefault("momentum", momentum)
    if kind in ("batch", "ghost", "sync"):
        settings["track_running_stats"] = mean is not None
    held = next((t for t in (mean, old.weight, old.bias) if t is not None), None)
    if held is not None:
        settings |= {"device": held.device, "dtype": held.dtype}
    new = cls(old.num_features if hasattr(old, "num_features") else len(held), **settings)
    _carry(old, new)
    return new


def _carry(old: Any, new: Any) -> None:
    """The state that both share, the tensors themselves where both hold them alike."""
    mean_only = isinstance(old, batch_norms.MeanOnlyBatchNorm)
    for leaf in ("weight", "bias"):
        value = getattr(old, leaf)
        if isinstance(new, batch_norms.MeanOnlyBatchNorm) and leaf == "weight":
            continue
        if isinstance(new, batch_norms.FrozenBatchNorm):
            if value is not None:
                getattr(new, leaf).copy_(value.detach())
        elif value is None and not (mean_only and leaf == "weight"):
            setattr(new, leaf, None)
        elif value is not None:
            setattr(new, leaf, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
    new.affine = new.weight is not None or new.bias is not None
    keep = {"running_mean", "num_batches_tracked"}
    if not isinstance(new, batch_norms.MeanOnlyBatchNorm):
        keep.add("running_var")
    for leaf in keep:
        value, place = getattr(old, leaf, None), getattr(new, leaf)
        if value is not None and place is not None:
            setattr(new, leaf, value)


def _add_bias(layer: nn.Module) -> None:
    weight: Any = layer.weight
    size = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    layer.bias = nn.Parameter(torch.zeros(size, device=weight.device, dtype=weight.dtype))  # type: ignore[arg-type]
