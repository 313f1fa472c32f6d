"""A fold written back into a torch module: same class in, same class out.

The graph's initializers carry the parameters' names, so a fold is a set of new tensors by name: a
folded batch norm becomes an Identity, a layer that had no bias gets one registered.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from bnfold.errors import InputError
from bnfold.folding.apply import Folded, changes
from bnfold.folding.constants import constant
from bnfold.folding.plan import FoldPlan
from bnfold.folding.rules.node import name_of
from bnfold.folding.scope import Scope
from bnfold.graph import MODULE, is_batch_norm
from bnfold.parts import class_name, hooked, parts
from bnfold.reading.checkpoint import Checkpoint, load_checkpoint
from bnfold.reading.plain import copy_of, ends_in_act, make_plain, plain
from bnfold.reading.weights import load_into

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Constants of normalization propagation: (act(x) - mean) / std.
PROPAGATED = "bnfold.norm.propagation.Propagated"
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
    named = list(parts(module))
    places = Counter(id(child) for _, child in named)
    known = set(graph.graph.initializers)
    # one tensor by several names, of which the graph knows but one: whose layer it is, is not told
    tied = {n for names in _tied(_tensors_of(module)) if not known.issuperset(names) for n in names}
    norms = {
        name
        for name, child in named
        if calls[name] == 1
        and places[id(child)] == 1
        and f"{name}.running_mean" not in tied
        and behind(child) is not None
    }
    layers = {
        name
        for name, child in named
        if type(child) in _LAYERS
        and places[id(child)] == 1
        and f"{name}.weight" not in tied
        and not hooked(child)
    }
    plain = {
        f"{name}.{key}" if name else key
        for name, child in named
        if not hooked(child)
        for key in (*child._parameters, *child._buffers)
    }
    seen, hidden = _seen_by_hooks(module, graph)
    maps, forms = _constants_and_clips(named, places, graph)
    closed = "".join(
        f"a hook on '{name}' looks at a value unknown to the graph" for name in hidden[:1]
    )
    return Scope(
        frozenset(plain),
        frozenset(layers),
        frozenset(norms),
        watched=seen,
        closed=closed,
        maps=maps,
        forms=forms,
    )


def _constants_and_clips(
    named: Sequence[tuple[str, nn.Module]], places: Mapping[int, int], graph: ir.Model
) -> tuple[frozenset[str], dict[str, str]]:
    """The nodes of propagated constants, which can go; the ReLUs that may get other bounds."""
    nodes = [node for g in graph.graphs() for node in g if node.op_type in ("Relu", "Clip")]
    calls = Counter(node.meta.get(MODULE) for node in nodes)
    maps: set[str] = set()
    forms: dict[str, str] = {}
    for name, child in named:
        if places[id(child)] != 1 or hooked(child):
            continue
        if class_name(child) == PROPAGATED:
            for key in _NEUTRAL:
                value = graph.graph.initializers.get(f"{name}.{key}")
                users = [user for user, _ in value.uses()] if value is not None else []
                maps |= {str(user.name) for user in users if len(users) == 1}
        elif type(child) in _CLIPS and calls[name] == 1:
            forms |= {str(n.name): name for n in nodes if n.meta.get(MODULE) == name}
    return frozenset(maps), forms


# Activations between two bounds, of which a fold may make others.
_CLIPS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
# What a propagated constant is that does nothing.
_NEUTRAL = {"mean": 0.0, "std": 1.0}


def _seen_by_hooks(module: nn.Module, graph: ir.Model) -> tuple[dict[str, str], list[str]]:
    """Value name -> the hooked module that may look at it; and hooked modules that no node shows.

    A hook is the user's code: what it is given must not change, though the outputs would not.
    """
    nodes = [node for g in graph.graphs() for node in g]
    seen: dict[str, str] = {}
    hidden = []
    for name, child in parts(module):
        if not hooked(child):
            continue
        inside = {n for n in nodes if MODULE in n.meta and _below(n.meta[MODULE], name)}
        if not inside and name:
            hidden.append(name)
        for node in inside:
            for value in (*node.inputs, *node.outputs):
                at_border = value is not None and (
                    value.producer() not in inside
                    or value.is_graph_output()
                    or any(user not in inside for user, _ in value.uses())
                )
                if value is not None and (at_border or not child._modules):
                    seen[str(value.name)] = name or type(module).__name__
    return seen, hidden


def _below(path: str, name: str) -> bool:
    return not name or path == name or path.startswith(f"{name}.")


def _tied(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names that stand for one tensor: the same object, or the same memory read the same way."""
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), str(tensor.device))
        groups.setdefault(key if tensor.numel() else id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def behind(child: nn.Module) -> nn.Module | None:
    """What is left of a batch norm when its normalization goes; None where that is not known.

    Of propagated constants it is their activation.
    An Identity for torch's own classes and for subclasses that keep their forward, `drop` and `act`
    for those that end in them. A subclass with another forward may add to it whatever it likes.
    """
    if class_name(child) == PROPAGATED and not hooked(child):
        act = child.act
        assert isinstance(act, nn.Module)
        return act
    if ends_in_act(child):
        left = nn.Sequential()
        for leaf in ("drop", "act"):
            left.add_module(leaf, getattr(child, leaf))
        return left.train(child.training)
    kind = type(child)
    own = kind.__call__ is nn.Module.__call__ and kind.forward in [n.forward for n in _NORMS]
    plain = isinstance(child, _NORMS) and own and not hooked(child)
    return nn.Identity().train(child.training) if plain else None


def hooked_parts(module: nn.Module) -> list[str]:
    """The names of what runs more than its class's own forward."""
    return [name for name, child in parts(module) if hooked(child)]


def write_back(module: nn.Module, plan: FoldPlan, folded: Folded) -> nn.Module:
    """A copy of the module, in eval mode, with the plan's batch norms folded.

    Raises InputError if the module cannot be copied.
    """
    result = copy_of(module)
    new = _new_tensors(_tensors_of(module), plan, folded)
    _take_shape(result, new, gone_of(plan), bounds_of(plan))
    for name, part in parts(result):
        # each a tensor of its own: what was tied to it may need another value
        for key, parameter in part._parameters.items():
            if (
                parameter is not None
                and (tensor := new.get(f"{name}.{key}" if name else key)) is not None
            ):
                part._parameters[key] = nn.Parameter(tensor, parameter.requires_grad)
        for key, buffer in part._buffers.items():
            if (
                buffer is not None
                and (tensor := new.get(f"{name}.{key}" if name else key)) is not None
            ):
                part._buffers[key] = tensor
    return result


def _tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, whatever the module's own state_dict says."""
    return {
        f"{name}.{key}" if name else key: tensor
        for name, part in parts(module)
        for key, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None
    }


def folded_state(
    state_dict: Mapping[str, torch.Tensor], plan: FoldPlan, folded: Folded
) -> dict[str, torch.Tensor]:
    """The state_dict of the folded network: no folded batch norm, new weights, added biases.

    Raises InputError if a constant that was written has no place in it.
    """
    gone = gone_of(plan)
    kept = {
        name: copy.deepcopy(tensor)
        for name, tensor in state_dict.items()
        if name.rpartition(".")[0] not in gone
    }
    return kept | _new_tensors(state_dict, plan, folded)


def _new_tensors(
    tensors: Mapping[str, torch.Tensor], plan: FoldPlan, folded: Folded
) -> dict[str, torch.Tensor]:
    """The tensors that the fold changes or adds, by name. Raises InputError where one cannot be."""
    initializers = folded.model.graph.initializers
    new: dict[str, torch.Tensor] = {}
    gone = gone_of(plan)
    for path, key in _constants_gone(plan):
        if path in gone and path:
            continue  # the module goes, and its constants with it
        if (name := f"{path}.{key}") not in tensors:
            raise _unfit(name)
        new[name] = torch.full_like(tensors[name], _NEUTRAL[key])
    numbers = _numbers_of_clips(plan)  # a module's attributes, no tensors of it
    for name, written in folded.written.items():
        if name in numbers:
            continue
        if name not in tensors or written != (name,):
            raise _unfit(name)
        new[name] = tensor_of(initializers[name].const_value, tensors[name])
    for names in _tied(tensors):
        # the exporter knows a tensor by one of its names; the others follow
        for name in set(names) & set(new):
            for other in set(names) - set(plan.model.graph.initializers):
                new[other] = new[name]
    for weight, biases in folded.biases.items():
        name = f"{weight.removesuffix('.weight')}.bias"
        if len(biases) != 1 or weight not in tensors or name in tensors:
            raise _unfit(name)
        new[name] = tensor_of(initializers[biases[0]].const_value, tensors[weight])
    return new


def gone_of(plan: FoldPlan) -> set[str]:
    """The modules that a fold takes out: its batch norms, and constants of which none is left."""
    went = _constants_gone(plan)
    both = {path for path, key in went if all((path, other) in went for other in _NEUTRAL)}
    return {removed.name for removed in plan.removed} | both


def _constants_gone(plan: FoldPlan) -> set[tuple[str, str]]:
    """(module, "mean" or "std") of each propagated constant that a fold takes out."""
    found = set()
    for removed in plan.absorbed:
        held = constant(removed.node.inputs[1 - removed.slot])
        path, _, key = str(held.root.name if held is not None else "").rpartition(".")
        if key in _NEUTRAL:
            found.add((path, key))
    return found


def _numbers_of_clips(plan: FoldPlan) -> set[str]:
    """The names of the constants of Clips that get other bounds."""
    clips = [n for n, _, form in changes(plan) if form is not None and n.op_type == "Clip"]
    held = [constant(value) for node in clips for value in node.inputs[1:]]
    return {str(c.root.name) for c in held if c is not None}


Bounds = tuple[float | None, float | None]


def bounds_of(plan: FoldPlan) -> dict[str, Bounds]:
    """By module, the numbers between which a ReLU clips in the folded network, where others."""
    bounds: dict[str, Bounds] = {}
    for node, _, form in changes(plan):
        path = plan.scope.forms.get(str(node.name)) if plan.scope is not None else None
        if form is not None and path:
            # a Relu has one step, a Clip a constant in each slot that it has
            numbers = form.constants or {1: form.steps[0].constant}
            low, high = (numbers.get(slot) for slot in (1, 2))
            bounds[path] = (
                None if low is None else float(low),
                None if high is None else float(high),
            )
    return bounds


def _unfit(name: str) -> InputError:
    """What a plan within its scope never asks for; a wrong file is worse than none."""
    return InputError(f"The fold changes '{name}' in a way that the state_dict cannot hold.")


def tensor_of(held: ir.TensorProtocol | None, like: torch.Tensor) -> torch.Tensor:
    """A constant of the graph as a tensor, of the type and on the device of another."""
    assert held is not None
    array = held.numpy()
    if array.dtype.kind not in "fiub":  # bfloat16 is not a type of numpy's own
        array = array.astype("float32")
    return torch.from_numpy(array.copy()).to(dtype=like.dtype, device=like.device)


def take_shape_of(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Give a module, in place, the structure of a folded checkpoint, so that its weights fit.

    The batch norms that the checkpoint names as folded become Identity, and a layer whose bias it
    holds gets a bias. Raises InputError for a checkpoint that does not say what was folded.
    """
    described = checkpoint.description or {}
    if described.get("kind") != "fold":
        raise InputError("The checkpoint is not one that bnfold has folded.")
    make_plain(module)
    bounds = described.get("bounds") or {}
    _take_shape(module, checkpoint.state_dict, set(described.get("folded", ())), bounds)


def _take_shape(
    module: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    gone: Collection[str],
    bounds: Mapping[str, Sequence[float | None]],
) -> None:
    for name, (low, high) in bounds.items():
        parent, _, leaf = name.rpartition(".")
        relu = module.get_submodule(name)
        if type(relu) not in _CLIPS:
            raise InputError(
                f"'{name}' was a ReLU when it was folded; in this module it is a"
                f" {type(relu).__name__}."
            )
        clip = nn.Hardtanh(
            -math.inf if low is None else low,
            math.inf if high is None else high,
            inplace=bool(relu.inplace),
        )
        setattr(module.get_submodule(parent), leaf, clip.train(relu.training))
    for name, child in list(parts(module)):
        if name in gone:
            left = behind(child)
            if left is None:
                raise InputError(
                    f"'{name}' was folded as a plain batch norm; in this module it is a"
                    f" {type(child).__name__}."
                )
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, left)
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
    """The part of a scope that a checkpoint keeps for when the module is not at hand.

    What hooks look at is not kept, so with hooks nothing may be taken out. forms: "node module".
    """
    if scope.closed or scope.watched:
        return {"layers": sorted(scope.layers), "norms": []}
    return {
        "layers": sorted(scope.layers),
        "norms": sorted(scope.norms),
        "maps": sorted(scope.maps),
        "forms": sorted(f"{node} {path}" for node, path in scope.forms.items()),
    }


def plain_parts(module: nn.Module, graph: ir.Model) -> dict[str, list[str]]:
    """`plain_modules` of a module as it is when it is folded, its variants read as batch norms.

    graph: of the module, made plain or not: its names are the same.
    """
    return plain_modules(scope_of(plain(module)[0], graph))


def scope_of_names(
    state_dict: Mapping[str, torch.Tensor], plain: Mapping[str, Sequence[str]]
) -> Scope:
    """What may change where the module is not at hand, only what `plain_modules` kept of it."""
    layers, norms, maps = (frozenset(plain.get(key, ())) for key in ("layers", "norms", "maps"))
    forms = dict(entry.split(" ", 1) for entry in plain.get("forms", ()))
    return Scope(frozenset(state_dict), layers, norms, maps=maps, forms=forms)
