"""One normalization in place of another, in any module.

A kind keeps what it shares with the one before: batch norm, batch renorm, ghost and frozen batch
norm have one state, so a network changes between them with its weights and statistics. The kinds
that take the batch norms out give other functions: they are for networks yet to be trained.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from bnfold.errors import InputError, UsageError
from bnfold.norm import batch as batches
from bnfold.norm import renorm as renorms
from bnfold.norm.options import check_options
from bnfold.norm.weight import WEIGHTED, check_weight, weight_norm
from bnfold.parts import class_name, copied, hooked, parts, put_in

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


@dataclass(frozen=True)
class _Form:
    """What a kind is made of.

    norms: where its batch norms are and their name without the rank, None where there are none.
    options: those that it takes. measured: defined by running statistics. weight_normed: its layers
    have a weight norm.
    """

    norms: tuple[Any, str] | None
    options: frozenset[str]
    measured: bool = False
    weight_normed: bool = False


def _form(norms: tuple[Any, str] | None, options: str, **nature: bool) -> _Form:
    return _Form(norms, frozenset(options.split()), **nature)


_MEAN_ONLY = (batches, "MeanOnlyBatchNorm")
_FORMS: dict[str, _Form] = {
    "batch": _form((batches, "BatchNorm"), "eps momentum"),
    "renorm": _form((renorms, "BatchRenorm"), "eps momentum schedule", measured=True),
    "ghost": _form((batches, "GhostBatchNorm"), "eps momentum ghost_size"),
    "mean-only": _form(_MEAN_ONLY, "momentum", measured=True),
    "weight": _form(None, "log_scale", weight_normed=True),
    "weight-mean-only": _form(_MEAN_ONLY, "log_scale momentum", measured=True, weight_normed=True),
    "normprop": _form(None, "gain input pooling", weight_normed=True),
    "frozen": _form((batches, "FrozenBatchNorm"), "eps", measured=True),
    "sync": _form((nn, "SyncBatchNorm"), "eps momentum process_group"),
    "none": _form(None, ""),
}
# The modules whose batch norms are known here, and the classes of others, by name.
_KNOWN = ("torch.nn.modules.batchnorm", batches.__name__, renorms.__name__)
_FROZEN = (
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "detectron2.layers.batch_norm.FrozenBatchNorm2d",
)
_NORM_ACTS = tuple(
    f"timm.layers.norm_act.{name}"
    for name in ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")
)


def convert(model: nn.Module, kind: Kind, *, inplace: bool = False, **options: Any) -> nn.Module:
    """Replace every batch norm of a model by another kind of normalization.

    `batch`, `renorm`, `ghost`, `frozen` and `sync` have one state, which carries over; `mean-only`
    keeps the bias and the running mean. `weight` takes the batch norms out, weight-normalises every
    linear and convolution layer and gives it a bias; `weight-mean-only` puts mean-only batch norms
    in their places; `none` takes them out and gives every layer a bias; `normprop` is
    `bnfold.norm.propagation.propagate`. Modes, device, type, requires_grad, eps and momentum carry
    over (batch renorm's own momentum, 0.01, is for runs of many thousands of steps, and shorter
    ones would end before its averages arrive). A module in two places stays one module. timm's norm
    and activation in one become a Sequential of `norm`, `drop` and `act`. From `sync`, which does
    not tell the rank of its inputs, come norms that take any rank. Where batch norms are taken out,
    activation modules no longer work in place: what they would overwrite is now the batch norm's
    input, which other layers may read. A function that does so in the forward (`torch.relu_`,
    `relu(x, inplace=True)`) is not seen here: write it without.

    `options` are those of the kind's class (`schedule`, `ghost_size`, `momentum`, ...), and
    `log_scale` of weight norm. Returns the model itself if `inplace`, unless it is a batch norm;
    else a copy.

    Raises UsageError for an unknown kind or option, or a value that it does not take; InputError
    for a batch norm of the user's own class or with hooks, a lazy layer, a batch norm without the
    statistics that the kind needs, a weight that two layers share and that would be weight-normed,
    a model in which the kind finds no place, or one that cannot be copied.
    """
    if kind not in KINDS:
        raise UsageError(f"There is no kind '{kind}'; the kinds are {', '.join(KINDS)}.")
    form = _FORMS[kind]
    if unknown := set(options) - form.options:
        allowed = ", ".join(sorted(form.options)) or "none"
        raise UsageError(f"'{kind}' has no option '{min(unknown)}'; its options: {allowed}.")
    check_options(options)
    if kind == "normprop":
        from bnfold.norm.propagation import propagate  # which converts to 'none'

        return propagate(model, inplace=inplace, **options)
    if not inplace:
        model = copied(model, "convert it in place")
    log_scale = options.pop("log_scale", False)
    if form.weight_normed:
        check_weights(model, log_scale)
    model = _replace(model, kind, options)
    for _, layer in list(parts(model)):
        if form.norms is None:
            _do_without(layer)
        if form.weight_normed and isinstance(layer, WEIGHTED):
            weight_norm(layer, log_scale=log_scale)
    return model


def _replace(model: nn.Module, kind: str, options: dict[str, Any]) -> nn.Module:
    """Every batch norm replaced, in all of its places; what it becomes is made first."""
    new: dict[int, nn.Module] = {}
    for name, part in list(parts(model)):
        if id(part) not in new and _is_norm(part, name):
            new[id(part)] = _successor(part, name, kind, options)
    if not new and _FORMS[kind].norms is not None and kind != "batch":
        raise InputError(
            f"{type(model).__name__} has no batch norm, so there is no place for '{kind}'."
        )
    return put_in(model, new)


# --- which modules are batch norms ---------------------------------------------------------------


def _is_norm(part: nn.Module, name: str) -> bool:
    """Whether a module is a batch norm to be replaced; InputError if it is one that cannot be."""
    where = f"'{name}'" if name else "The model"
    if isinstance(part, LazyModuleMixin):
        raise InputError(
            f"{where} is a {type(part).__name__} whose size is not known yet; run a batch through"
            " the model first."
        )
    known = class_name(part) in (*_FROZEN, *_NORM_ACTS) or type(part).__module__ in _KNOWN
    norm = isinstance(part, _BatchNorm) or set(part._buffers) >= {"running_mean", "running_var"}
    if not norm or isinstance(part, nn.modules.instancenorm._InstanceNorm):
        return False
    if not known:
        raise InputError(
            f"{where} is a {class_name(part)}, not one of the batch norms known here, and what it"
            " does beside would be lost; put one of torch's in its place first."
        )
    if hooked(part):
        raise InputError(
            f"{where} has hooks or a forward of its own, which a batch norm in its place would"
            " lose; take them off first."
        )
    return True


def check_weights(model: nn.Module, log_scale: bool | float = False) -> None:
    """InputError for a weight that cannot have a weight norm, or that two layers share."""
    layers = {id(part): (name, part) for name, part in parts(model)}
    uses = Counter(
        id(tensor)
        for _, part in layers.values()
        for tensor in part._parameters.values()
        if tensor is not None
    )
    for name, part in layers.values():
        if not isinstance(part, WEIGHTED):
            continue
        check_weight(part, name, log_scale)
        if uses[id(part._parameters.get("weight"))] > 1:
            raise InputError(
                f"The weight of '{name}' is another layer's too, and weight norm would give each"
                " its own; use one module in both places, or weights of their own."
            )


# --- what takes their places ---------------------------------------------------------------------


def _successor(old: Any, name: str, kind: str, options: dict[str, Any]) -> nn.Module:
    """What takes a batch norm's place."""
    new: nn.Module
    norms = _FORMS[kind].norms
    new = nn.Identity() if norms is None else _norm(old, name, kind, norms, options)
    new.train(old.training)
    if class_name(old) in _NORM_ACTS:
        new = nn.Sequential(OrderedDict(norm=new, drop=old.drop, act=old.act))
        new.training = old.training
    return new


def _norm(
    old: Any, name: str, kind: str, norms: tuple[Any, str], options: dict[str, Any]
) -> nn.Module:
    """A batch norm of another kind with the numbers of the old one; the old one, if it is that."""
    form, (module, stem) = _FORMS[kind], norms
    cls = getattr(module, stem if kind == "sync" else stem + _rank(old))
    if type(old) is cls and not options:
        return old  # type: ignore[no-any-return]
    tensors = [t for t in (old.weight, old.bias, old.running_mean) if t is not None]
    if old.running_mean is None and form.measured:
        raise InputError(
            f"'{name}' keeps no running statistics (track_running_stats=False), and '{kind}' is"
            " defined by them."
        )
    settings = {option: getattr(old, option) for option in form.options if hasattr(old, option)}
    if isinstance(old, batches.MeanOnlyBatchNorm):
        settings.pop("eps", None)  # it divides by nothing
    if not form.measured:
        settings["track_running_stats"] = old.running_mean is not None
    if tensors:
        settings |= {"device": tensors[0].device, "dtype": tensors[0].dtype}
    size = old.num_features if hasattr(old, "num_features") else len(old.running_mean)
    new = cls(size, **settings | options)
    _carry(old, new)
    return new  # type: ignore[no-any-return]


def _rank(old: nn.Module) -> str:
    for rank, base in (("1d", nn.BatchNorm1d), ("2d", nn.BatchNorm2d), ("3d", nn.BatchNorm3d)):
        if isinstance(old, base):
            return rank
    return "" if isinstance(old, _BatchNorm) else "2d"


def _carry(old: Any, new: Any) -> None:
    """Give a new batch norm what both hold: the parameters and buffers themselves."""
    mean_only, frozen = batches.MeanOnlyBatchNorm, batches.FrozenBatchNorm
    for leaf in ("weight", "bias"):
        value = getattr(old, leaf)
        if leaf == "weight" and (isinstance(old, mean_only) or isinstance(new, mean_only)):
            continue  # it has none: the other's own, or nothing
        if isinstance(new, frozen):
            value = getattr(new, leaf) if value is None else value.detach()
        elif value is not None and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value)
        setattr(new, leaf, value)
    new.affine = new.weight is not None or new.bias is not None
    for leaf in ("running_mean", "running_var", "num_batches_tracked"):
        held: Tensor | None = getattr(old, leaf, None)
        alike = leaf != "running_var" or not isinstance(new, mean_only)
        if held is not None and getattr(new, leaf) is not None and alike:
            setattr(new, leaf, held)


def _do_without(layer: Any) -> None:
    """Make a layer fit for a network whose batch norms were taken out."""
    if isinstance(layer, WEIGHTED) and layer.bias is None:
        size = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        layer.bias = nn.Parameter(layer.weight.new_zeros(size))
    elif getattr(layer, "inplace", False) is True:
        layer.inplace = False  # what it overwrites is no longer a value of its own
