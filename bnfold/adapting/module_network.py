"""A torch module whose statistics are estimated."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfold.adapting.networks import (
    NOT_CHOSEN,
    LayerChoice,
    Run,
    SkippedLayer,
    choose,
)
from bnfold.errors import InputError, RuntimeUnavailableError, one_line
from bnfold.measuring import modules
from bnfold.measuring.diagnosis import Observed
from bnfold.measuring.estimate import Estimate
from bnfold.measuring.feed import Feed, Forward
from bnfold.measuring.memory import available_bytes
from bnfold.measuring.moments import ImageMoments
from bnfold.measuring.statistics import Layer, Rule, Statistics
from bnfold.parts import copied


class ModuleNetwork:
    """An nn.Module. Modes, momenta, hooks and num_batches_tracked of the result are the module's.

    The module itself is never changed: one copy is run and hooked, another one is the result.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        choice: LayerChoice = None,
        forward: Forward | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        _check(module)
        self._forward = forward
        self._result = copied(module)
        self._work = _working_copy(self._result, device)
        self._source = _sharing_parameters(self._work)
        self._chosen, self.skipped = _split(self._work, choice)
        self.layers: Mapping[str, Layer] = {
            name: modules.layer_of(layer, name) for name, layer in self._chosen.items()
        }

    def keep_only(self, names: Sequence[str]) -> None:
        """Leave the other layers as they are."""
        self.skipped += [SkippedLayer(n, NOT_CHOSEN) for n in self.layers if n not in names]
        self._chosen = {name: self._chosen[name] for name in self._chosen if name in names}
        self.layers = {name: self.layers[name] for name in self._chosen}

    def order(self, feed: Feed) -> list[str]:
        """The layers in the order in which the first batch passes them."""
        met: dict[str, None] = {}
        with modules.watching(self._chosen, lambda name, _x: met.setdefault(name)):
            for batch in feed:
                feed.call(self._work, batch, 0)
                break
        return list(met)

    def room(self) -> int:
        """Bytes of memory that are free."""
        return available_bytes(_device_of(self._work))

    def feed(self, data: Iterable[Any], max_bytes: int, *, is_share: bool = False) -> Feed:
        """See Network."""
        return Feed(self._work, data, forward=self._forward, max_bytes=max_bytes, is_share=is_share)

    def measure(self, feed: Feed, run: Run) -> dict[str, ImageMoments]:
        """See Network."""
        with self._told():
            return modules.measure(self._source, list(self.layers), feed, run.progress)

    def matched(self, rule: Rule, reference: Mapping[str, ImageMoments]) -> Rule:
        """See Network."""
        return replace(rule, reference=reference)

    def exact(self, feed: Feed, run: Run) -> Estimate:
        """See Network."""
        with self._told():
            self._reset()
            return modules.exact(
                self._work,
                self._chosen,
                feed,
                run.progress,
                rule=run.rule,
                ranks=run.ranks,
                max_bytes=run.max_bytes,
                on_settled=run.on_settled,
                resumed=run.resumed,
            )

    def fast(self, feed: Feed, run: Run) -> Estimate:
        """See Network."""
        with self._told():
            self._reset()
            return modules.fast(
                self._work,
                self._chosen,
                feed,
                run.progress,
                rule=run.rule,
                ranks=run.ranks,
            )

    def _reset(self) -> None:
        """The source's statistics again, after an earlier run."""
        for name, layer in self.layers.items():
            modules.write(self._chosen[name], name, layer.source)

    def observe(self, feed: Feed, run: Run, statistics: Mapping[str, Statistics]) -> Observed:
        """See Network. The statistics are in the copy that was measured already."""
        with self._told():
            return modules.observe(self._source, self._work, list(statistics), feed, run.progress)

    def result(self, statistics: Mapping[str, Statistics]) -> nn.Module:
        """See Network."""
        for name, found in statistics.items():
            modules.write(self._result.get_submodule(name), name, found)
        return self._result

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Torch's want of memory as a sentence; nothing recorded for gradients."""
        try:
            with torch.inference_mode(False), torch.no_grad():
                yield
        except torch.OutOfMemoryError as error:
            raise RuntimeUnavailableError(
                f"The memory of {_device_of(self._work)} gave out; lower max_bytes or the batch"
                " size."
            ) from error


def _check(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError("TorchScript cannot be adapted; give the nn.Module it was made from.")
    if hasattr(module, "_orig_mod"):
        raise InputError("A compiled module cannot be adapted; give the module before compile.")
    if any(nn.parameter.is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        raise InputError("A lazy layer has no shape yet; run the module once before it is adapted.")


_BY_BATCH = (
    "It keeps no running statistics (track_running_stats=False) and normalises by each batch."
)


def _split(net: nn.Module, choice: LayerChoice) -> tuple[modules.Layers, list[SkippedLayer]]:
    """The batch norms to adapt, and those not, with the reason."""
    found = {name: layer for name, layer in net.named_modules() if is_batch_norm(layer)}
    if not found:
        raise InputError(
            f"{type(net).__name__} holds no batch norm, so there are no statistics to adapt. A"
            " folded network is adapted with its record; any other as ONNX (bnfold.export), with"
            " samples of its source domain besides."
        )
    able = [n for n, x in found.items() if x.running_mean is not None and x.running_var is not None]
    if not able:
        raise InputError(f"None of the {len(found)} batch norms can be adapted: {_BY_BATCH}")
    chosen = choose(able, choice)
    skipped = [
        SkippedLayer(name, NOT_CHOSEN if name in able else _BY_BATCH)
        for name in found
        if name not in chosen
    ]
    return {name: found[name] for name in chosen}, skipped


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


def _sharing_parameters(module: nn.Module) -> nn.Module:
    """A copy in eval mode with buffers and hooks of its own and the same parameters."""
    with torch.inference_mode(False), torch.no_grad():
        return copy.deepcopy(module, {id(p): p for p in module.parameters()}).eval()


def _working_copy(module: nn.Module, device: str | torch.device | None) -> nn.Module:
    """The network that is hooked and run, so that nothing has to be undone on any other."""
    if device is None:
        return _sharing_parameters(module)
    try:
        with torch.inference_mode(False), torch.no_grad():
            return copy.deepcopy(module).to(torch.empty(1, device=device).device).eval()
    except (RuntimeError, AssertionError) as error:
        raise RuntimeUnavailableError(
            f"The device '{device}' cannot be used here: {one_line(error)}."
        ) from error


def _device_of(net: nn.Module) -> torch.device:
    return next((p.device for p in net.parameters()), torch.device("cpu"))
