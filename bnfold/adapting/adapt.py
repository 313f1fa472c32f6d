"""Adapt a torch network to a target domain: new batch-norm statistics, measured without labels.

AdaBN (Li et al., "Revisiting batch normalization for practical domain adaptation", 2016; "Adaptive
batch normalization", Pattern Recognition 2018): the weights stay, each batch norm's mean and
variance become those of the target. How they are measured: modules.py. What the result
says about itself: diagnosis.py.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfold.adapting import diagnosis, modules
from bnfold.adapting.diagnosis import LayerShift, OutputShift
from bnfold.adapting.estimate import Estimate, Progress
from bnfold.adapting.feed import Feed, Forward
from bnfold.adapting.memory import available_bytes
from bnfold.adapting.modules import Layers
from bnfold.errors import InputError, RuntimeUnavailableError, UsageError

__all__ = ["AdaptResult", "LayerShift", "OutputShift", "SkippedLayer", "adapt"]

Method = Literal["exact", "fast"]
LayerChoice = Callable[[str, nn.Module], bool] | Sequence[str] | None


@dataclass(frozen=True)
class SkippedLayer:
    """A batch norm whose statistics stayed as they were, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class AdaptResult:
    """A network with the target's statistics, and what was seen on the way.

    module: a copy of the module that came in, equal but for running_mean and running_var.
    layers: the adapted batch norms, in the order of the forward.  skipped: the others.
    images, batches: in the target data.
    outputs: predictions before and after; None without diagnosis, or if they are no class scores.
    warnings: sentences about what may be wrong with the data or the estimate.
    passes: over the data to estimate, where memory did not hold all batches at once; else 1.
    """

    module: nn.Module
    method: Method
    layers: tuple[LayerShift, ...]
    skipped: tuple[SkippedLayer, ...]
    images: int
    batches: int
    outputs: OutputShift | None
    warnings: tuple[str, ...]
    passes: int


def adapt(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    method: Method = "exact",
    forward: Forward | None = None,
    layers: LayerChoice = None,
    progress: Callable[[int, int | None], None] | None = None,
    device: str | torch.device | None = None,
    max_bytes: int | None = None,
    diagnose: bool = True,
    precision: float = 0.1,
) -> AdaptResult:
    """A copy of `module` whose batch norms hold the statistics of the target data.

    `module` itself is never changed, whatever happens. Modes, momenta and hooks of the copy are
    those of `module`; num_batches_tracked too. The new running_var has the divisor count - 1.

    batches: an iterable of arrays (N, ...), of tuples whose first element is one (labels are
    ignored), or of mappings from argument names to arrays; tensors or numpy. For anything else
    give `forward(module, batch)`, which gets each batch with its arrays as tensors on the device.
    method: `exact` measures each layer over the whole set with all layers before it adapted (the
    paper's Algorithm 1); its result does not depend on how the set is cut into batches. `fast` is a
    single pass in which each batch norm normalises by its batch; give it shuffled batches of 32
    images or more.
    layers: which batch norms to adapt: a predicate (name, module), or patterns such as
    "layer1.*"; a pattern with a "!" in front excludes. The others keep their statistics.
    progress: called with (done, total); total is None until it is known.
    device: where to compute; None: where the module is. The result lies where `module` lies.
    max_bytes: memory that `exact` may take to hold all batches at once (default: half of what is
    free); beyond it, it makes a pass per batch norm.
    diagnose: run both networks over the target once more and compare (two forwards' compute).
    precision: in `LayerShift.images_needed` and its warning, +-precision of a standard deviation.

    Raises InputError for a module without batch norm, a forward that fails, data without images,
    NaN or infinity (naming the layer), statistics that the buffers' type cannot hold; UsageError
    for arguments that mean nothing; RuntimeUnavailableError for a device that is not there.
    """
    _check(module, method, precision, max_bytes)
    with torch.inference_mode(False), torch.no_grad():
        result = _copy(module)
        work = _working_copy(result, device)
        chosen, skipped = _choose(work, layers)
        source = _sharing_parameters(work)
        described = {name: modules.layer_of(layer, name) for name, layer in chosen.items()}
        room = available_bytes(_device_of(work)) // 2 if max_bytes is None else max_bytes
        feed = Feed(work, batches, forward=forward, max_bytes=room // 4)
        try:
            found, seen = _run(source, work, chosen, feed, method, room, progress, diagnose)
        finally:
            feed.close()
        for name in found.moments:
            _transfer(work.get_submodule(name), result.get_submodule(name))
        shifts = diagnosis.layer_shifts(described, found, seen, precision)
    assert feed.images is not None
    assert feed.batches is not None
    unvisited = [SkippedLayer(n, _UNVISITED) for n in chosen if n not in found.moments]
    outputs = seen.outputs if seen else None
    return AdaptResult(
        module=result,
        method=method,
        layers=shifts,
        skipped=(*skipped, *unvisited),
        images=feed.images,
        batches=feed.batches,
        outputs=outputs,
        warnings=tuple(
            diagnosis.warnings(
                found,
                shifts,
                outputs,
                feed.images,
                feed.batches,
                method,
                precision,
                len(unvisited),
            )
        ),
        passes=max(found.passes, 1),
    )


def _run(
    source: nn.Module,
    work: nn.Module,
    chosen: Layers,
    feed: Feed,
    method: Method,
    room: int,
    tell: Callable[[int, int | None], None] | None,
    diagnose: bool,
) -> tuple[Estimate, diagnosis.Observed | None]:
    """Estimate into `work`, then look at both networks."""
    progress = Progress(tell, feed, len(chosen) + 1 if method == "exact" else 1, diagnose)
    try:
        if method == "fast":
            found = modules.fast(work, chosen, feed, progress)
        else:
            found = modules.exact(work, chosen, feed, progress, max_bytes=room)
        if not found.moments:
            raise InputError(
                f"The forward passed none of the {len(chosen)} batch norms to adapt; if it uses"
                " their statistics in another way, give forward= a function that calls them."
            )
        seen = None
        if diagnose:
            seen = modules.observe(source, work, list(found.moments), feed, progress)
    except torch.OutOfMemoryError as error:
        raise RuntimeUnavailableError(
            f"The memory of {_device_of(work)} gave out; lower max_bytes or the batch size."
        ) from error
    progress.finish()
    return found, seen


# --- the arguments ------------------------------------------------------------------------------


def _check(module: nn.Module, method: str, precision: float, max_bytes: int | None) -> None:
    if not isinstance(module, nn.Module):
        raise UsageError(f"adapt takes a torch.nn.Module; found {type(module).__name__}.")
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError("TorchScript cannot be adapted; give the nn.Module it was made from.")
    if hasattr(module, "_orig_mod"):
        raise InputError("A compiled module cannot be adapted; give the module before compile.")
    if any(nn.parameter.is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        raise InputError("A lazy layer has no shape yet; run the module once before it is adapted.")
    if method not in ("exact", "fast"):
        raise UsageError(f"method is {method!r}; it must be 'exact' or 'fast'.")
    if not 0 < precision < 1:
        raise UsageError(f"precision is {precision}; it must lie between 0 and 1.")
    if max_bytes is not None and max_bytes < 0:
        raise UsageError(f"max_bytes is {max_bytes}; it must not be negative.")


_UNVISITED = "The forward did not pass it."
_BY_BATCH = (
    "It keeps no running statistics (track_running_stats=False) and normalises by each batch."
)


def _choose(net: nn.Module, choice: LayerChoice) -> tuple[Layers, list[SkippedLayer]]:
    """The batch norms to adapt, and those not, with the reason."""
    found = {name: layer for name, layer in net.named_modules() if is_batch_norm(layer)}
    if not found:
        raise InputError(
            f"{type(net).__name__} holds no batch norm, so there are no statistics to adapt."
        )
    wanted = _predicate(choice, list(found))
    chosen, skipped = {}, []
    for name, layer in found.items():
        if layer.running_mean is None or layer.running_var is None:
            skipped.append(SkippedLayer(name, _BY_BATCH))
        elif wanted(name, layer):
            chosen[name] = layer
        else:
            skipped.append(SkippedLayer(name, "It was not chosen."))
    if not chosen:
        raise InputError(
            f"None of the {len(found)} batch norms can be adapted: "
            + "; ".join(sorted({skip.reason for skip in skipped}))
        )
    return chosen, skipped


def is_batch_norm(layer: nn.Module) -> bool:
    """Torch's batch norms, what derives from them, and frozen ones (statistics in buffers)."""
    if isinstance(layer, _BatchNorm):
        return True
    buffers = ("running_mean", "running_var")
    return (
        "BatchNorm" in type(layer).__name__
        and all(isinstance(getattr(layer, name, None), Tensor) for name in buffers)
        and hasattr(layer, "eps")
    )


def _predicate(choice: LayerChoice, names: list[str]) -> Callable[[str, nn.Module], bool]:
    if choice is None:
        return lambda _name, _layer: True
    if callable(choice):
        return choice
    patterns = [choice] if isinstance(choice, str) else list(choice)
    without = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    within = [pattern for pattern in patterns if not pattern.startswith("!")]
    for pattern in (*within, *without):
        if not fnmatch.filter(names, pattern):
            raise UsageError(
                f"The pattern {pattern!r} matches no batch norm; there are"
                f" {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
            )

    def matches(name: str, _layer: nn.Module) -> bool:
        inside = not within or any(fnmatch.fnmatchcase(name, pattern) for pattern in within)
        return inside and not any(fnmatch.fnmatchcase(name, pattern) for pattern in without)

    return matches


# --- copies ---------------------------------------------------------------------------------------


def _copy(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:  # __deepcopy__ is the user's code too
        raise InputError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}:"
            f" {' '.join(str(error).split())[:200]}). A weight_norm of the old kind is one cause;"
            " remove it first, or use torch.nn.utils.parametrizations."
        ) from error


def _sharing_parameters(module: nn.Module) -> nn.Module:
    """A copy in eval mode with buffers and hooks of its own and the same parameters."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()}).eval()


def _working_copy(module: nn.Module, device: str | torch.device | None) -> nn.Module:
    """The network that is hooked and run, so that nothing has to be undone on any other."""
    if device is None:
        return _sharing_parameters(module)
    try:
        return copy.deepcopy(module).to(torch.empty(1, device=device).device).eval()
    except (RuntimeError, AssertionError) as error:
        raise RuntimeUnavailableError(
            f"The device '{device}' cannot be used here: {' '.join(str(error).split())[:200]}"
        ) from error


def _transfer(layer: nn.Module, result: nn.Module) -> None:
    """The statistics of one batch norm into another, in place."""
    for name in ("running_mean", "running_var"):
        getattr(result, name).copy_(getattr(layer, name))


def _device_of(net: nn.Module) -> torch.device:
    return next((p.device for p in net.parameters()), torch.device("cpu"))
