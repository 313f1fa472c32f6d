"""Batch norms of a torch module: watched as they are called, read, and given new statistics.

A layer is measured in a hook before it runs, and its running statistics are set before its own
forward reads them: whatever a subclass does behind the normalisation stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfold.errors import InputError
from bnfold.measuring.estimate import Estimate
from bnfold.measuring.meter import Found, batch_statistics
from bnfold.measuring.moments import ImageMoments
from bnfold.measuring.statistics import Layer, Rule, Statistics

Layers = Mapping[str, nn.Module]
Visit = Callable[[str, Tensor], None]
OnSettled = Callable[[str, ImageMoments], None]


@contextlib.contextmanager
def watching(layers: Layers, visit: Visit) -> Iterator[None]:
    """Calls `visit(name, input)` before each of the layers runs; removes its hooks at the end."""
    handles = [
        layer.register_forward_pre_hook(partial(_before, name, visit), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(
    name: str, visit: Visit, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    x = next(iter((*args, *kwargs.values())), None)
    # what is no input for it, the layer itself refuses
    if isinstance(x, Tensor) and x.dim() >= 2 and x.shape[1] == len(layer.running_mean):  # type: ignore[arg-type]
        visit(name, x)


def layer_of(layer: nn.Module, name: str) -> Layer:
    """What a batch norm of a module is, apart from torch."""
    return Layer(name, float(layer.eps), statistics_of(layer))  # type: ignore[arg-type]


def statistics_of(layer: nn.Module) -> Statistics:
    """The layer's running statistics."""
    mean, var = layer.running_mean, layer.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    return Statistics(*(x.detach().cpu().double().numpy().copy() for x in (mean, var)))


def write(layer: nn.Module, name: str, given: Statistics) -> None:
    """Set the layer's running statistics in place. Raises InputError where they do not fit."""
    for buffer, value in ((layer.running_mean, given.mean), (layer.running_var, given.var)):
        assert isinstance(buffer, Tensor)
        largest = np.abs(value).max()
        if largest > torch.finfo(buffer.dtype).max:
            raise InputError(
                f"A statistic of '{name}' reaches {largest:.3g}, which"
                f" {str(buffer.dtype).removeprefix('torch.')} cannot hold; convert the module to"
                " float32 before it is adapted."
            )
        buffer.copy_(torch.from_numpy(value))


class Writer:
    """Gives the layers what the rule makes of their moments, and keeps what they got.

    described: the layers as they came, with the statistics of the source.
    """

    def __init__(self, layers: Layers, rule: Rule, on_settled: OnSettled | None = None) -> None:
        self.described = {name: layer_of(layer, name) for name, layer in layers.items()}
        self._layers, self._rule, self._on_settled = layers, rule, on_settled

    def settle(self, name: str, moments: ImageMoments) -> None:
        """What was measured over the whole set. Raises InputError for less than two values."""
        self.put(name, moments)
        if self._on_settled is not None:
            self._on_settled(name, moments)

    def put(self, name: str, moments: ImageMoments) -> None:
        """The same, where it was told before."""
        write(self._layers[name], name, self._rule(self.described[name], moments))

    def normalise(self, name: str, batch: Found) -> None:
        """For one batch alone."""
        given = batch_statistics(self._rule, self.described[name], batch)
        write(self._layers[name], name, given)

    def estimate(self, moments: Mapping[str, ImageMoments], excess: float | None) -> Estimate:
        """What came of it."""
        given = {name: statistics_of(self._layers[name]) for name in moments}
        return Estimate(moments, given, excess)
