"""A module made plain before it is exported: computed weights become weights that are held.

A weight norm, a spectral norm or a pruning mask computes the weight anew in every forward, from
tensors that no fold may touch; what it computes in eval mode is a constant, so that constant takes
its place. A frozen batch norm spells its arithmetic out, and bnfold's own variants (batch renorm,
ghost, mean-only, frozen) differ from a batch norm in training alone; each becomes torch's batch
norm of the same numbers. The module that the user gave stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm

from bnfold.errors import InputError, one_line
from bnfold.parts import class_name, copied, hooked, parts, put_in

# The hooks with which torch computes a weight before each forward, and how each is taken off.
_COMPUTED = {
    "torch.nn.utils.weight_norm.WeightNorm": lambda part, hook: remove_weight_norm(part, hook.name),
    "torch.nn.utils.spectral_norm.SpectralNorm": lambda part, hook: remove_spectral_norm(
        part, hook.name
    ),
}
_FROZEN = {"weight", "bias", "running_mean", "running_var"}
_NORM_ACTS = ("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct")


class NormAct(nn.BatchNorm2d):
    """A batch norm, and what its author put behind it: `drop`, then `act`."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise, drop, activate."""
        result: torch.Tensor = self.act(self.drop(super().forward(input)))
        return result


def plain(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The module if it is plain already, else a plain copy in eval mode; and what was changed.

    Raises InputError if a module that is not plain cannot be copied.
    """
    if not any(_computed(p) or is_variant(p) or _frozen(p) for _, p in parts(module)):
        return module, ()
    made = copy_of(module)
    return made, make_plain(made)


def computed_layers(module: nn.Module) -> tuple[str, ...]:
    """The parts whose weights are computed anew in every forward, by name."""
    return tuple(name for name, part in parts(module) if _computed(part))


def make_plain(module: nn.Module) -> tuple[str, ...]:
    """Make a module plain in place, in eval mode; a sentence for each kind of change."""
    module.eval()
    computed = list(computed_layers(module))
    for name, part in list(parts(module)):
        try:
            with torch.no_grad():
                _hold_weights(part)
        except Exception as error:
            raise InputError(
                f"The weight of '{name}' is computed by a hook or a parametrization that cannot be"
                f" taken off ({one_line(error)}); take it off before folding."
            ) from error
    variants = _replace(module, is_variant, _torchs_own)
    frozen = _replace(module, _frozen, _batch_norm)
    notes = []
    if computed:
        notes.append(
            f"the computed weights of {_listed(computed)} (weight norm, spectral norm, pruning or"
            " another parametrization) were replaced by their values"
        )
    if variants:
        notes.append(f"the variants of batch norm {_listed(variants)} were read as batch norms")
    if frozen:
        notes.append(f"the frozen batch norms {_listed(frozen)} were read as batch norms")
    return tuple(notes)


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def copy_of(module: nn.Module) -> nn.Module:
    """A copy in eval mode. Raises InputError for a module that cannot be copied."""
    made = copied(module, "fold it to ONNX instead")
    made.eval()
    return made


# --- computed weights ----------------------------------------------------------------------------


def _computed(part: nn.Module) -> bool:
    hooks = part._forward_pre_hooks.values()
    return parametrize.is_parametrized(part) or any(
        class_name(hook) in _COMPUTED or isinstance(hook, prune.BasePruningMethod) for hook in hooks
    )


def _hold_weights(part: nn.Module) -> None:
    """Put the value of every computed weight in its place."""
    if parametrize.is_parametrized(part):
        assert isinstance(part.parametrizations, nn.ModuleDict)
        # copies share the class that torch made for the one module, and taking off changes it
        own = {k: v for k, v in vars(type(part)).items() if k not in ("__dict__", "__weakref__")}
        part.__class__ = type(type(part).__name__, type(part).__bases__, own)
        for name, held in list(part.parametrizations.items()):
            learnt = any(p.requires_grad for p in held.parameters())
            parametrize.remove_parametrizations(part, name, leave_parametrized=True)
            if name in part._buffers:  # where it was made of several tensors
                value = part._buffers.pop(name)
                assert value is not None
                part.register_parameter(name, nn.Parameter(value, requires_grad=learnt))
    for hook in list(part._forward_pre_hooks.values()):
        if take_off := _COMPUTED.get(class_name(hook)):
            take_off(part, hook)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(part, hook._tensor_name)  # type: ignore[no-untyped-call]


# --- frozen batch norms, and bnfold's variants ----------------------------------------------------


def _replace(
    module: nn.Module, chosen: Callable[[nn.Module], bool], new: Callable[[nn.Module], nn.Module]
) -> list[str]:
    """Put something else in the place of the parts that are chosen, wherever they are; the names.

    The module itself stays what it is.
    """
    places = [(name, part) for name, part in parts(module) if part is not module and chosen(part)]
    put_in(module, {id(part): new(part) for part in {id(p): p for _, p in places}.values()})
    return [name for name, _ in places]


def is_variant(part: nn.Module) -> bool:
    """True for a batch norm of `bnfold.norm`: at inference it is torch's, with the same state."""
    ours = type(part).__module__.startswith("bnfold.norm.")
    return ours and isinstance(part, _BatchNorm) and not hooked(part)


_RANKS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _torchs_own(part: nn.Module) -> nn.Module:
    """Torch's batch norm with the tensors of a variant, in eval mode.

    Of a variant that takes any rank it is the synchronised one, which takes any rank too.
    """
    assert isinstance(part, _BatchNorm)
    kind = next((rank for rank in _RANKS if isinstance(part, rank)), nn.SyncBatchNorm)
    norm = kind(part.num_features, eps=part.eps, momentum=part.momentum, affine=part.affine)
    for name in ("weight", "bias"):
        held = getattr(part, name)
        frozen = held is not None and not isinstance(held, nn.Parameter)
        setattr(norm, name, nn.Parameter(held, requires_grad=False) if frozen else held)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(norm, name, getattr(part, name))
    return norm.eval()


def _frozen(part: nn.Module) -> bool:
    """True for a module that computes a batch norm of four buffers, and knows no other state.

    It is looked at in float64: the same numbers as a batch norm's, on inputs of two sizes.
    """
    buffers = {name: tensor for name, tensor in part._buffers.items() if tensor is not None}
    children = {name for name, child in part._modules.items() if child is not None}
    if (
        set(buffers) != _FROZEN
        or any(parameter is not None for parameter in part._parameters.values())
        or children not in (set(), {"drop", "act"})
        or hooked(part)
        or any(tensor.shape != buffers["weight"].shape for tensor in buffers.values())
        or buffers["weight"].dim() != 1
    ):
        return False
    return _same_function(part, _batch_norm(part))


def _batch_norm(part: nn.Module) -> nn.Module:
    """A batch norm of torch's with a module's numbers, and its `drop` and `act` behind it."""
    held: dict[str, torch.Tensor] = {name: getattr(part, name) for name in _FROZEN}
    size, eps = len(held["weight"]), float(getattr(part, "eps", 1e-5))
    children = {name: child for name, child in part._modules.items() if child is not None}
    norm = (NormAct if children else nn.BatchNorm2d)(size, eps=eps)
    norm.to(device=held["weight"].device, dtype=held["weight"].dtype)
    norm.num_batches_tracked = None
    for name, tensor in held.items():
        getattr(norm, name).data.copy_(tensor.detach())
    for name, child in children.items():
        norm.add_module(name, child)
    return norm.eval().requires_grad_(False)


# --- what a module computes ----------------------------------------------------------------------


def ends_in_act(part: nn.Module) -> bool:
    """True for a batch norm that is followed by `drop` and `act` of its own, and nothing else.

    That is NormAct, and the classes of timm by name; what they compute is looked at, since another
    version may compute something else.
    """
    if not (isinstance(part, NormAct) or class_name(part) in _NORM_ACTS) or hooked(part):
        return False
    children = {name for name, child in part._modules.items() if child is not None}
    known = all(isinstance(getattr(part, name), torch.Tensor) for name in _FROZEN)
    return known and children == {"drop", "act"} and _same_function(part, _batch_norm(part))


def _same_function(part: nn.Module, other: nn.Module) -> bool:
    """Whether two modules on images agree in float64, on seeded inputs of two sizes."""
    generator = torch.Generator().manual_seed(0)
    channels = len(cast(torch.Tensor, part.weight))
    try:
        one, two = (copy.deepcopy(m).double().cpu().eval() for m in (part, other))
        for shape, size in (((2, channels, 3, 2), 1.0), ((1, channels, 1, 5), 30.0)):
            x = size * torch.randn(shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                torch.testing.assert_close(one(x.clone()), two(x), rtol=1e-11, atol=1e-11)
    except Exception:  # whatever it is, it is not that function
        return False
    return True
