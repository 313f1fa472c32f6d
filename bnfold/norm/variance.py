"""Which variance reaches each activation of a network, by analysis and without data.

A layer whose weights have norm 1 for each output unit hands the variance of its input on, a sum
adds variances, a normalised activation gives 1 again. (Arpit et al. 2016 follow plain chains; sums
and concatenations are ours.) Values count as independent. torch.fx reads the network's forward, and
does nothing else here; what cannot be followed is refused in words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn

from bnfold.errors import InputError, one_line
from bnfold.norm.gaussian import ACTIVATIONS
from bnfold.norm.weight import TRANSPOSED, WEIGHTED

MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)

# Modules and functions that leave the variance of a channel as it is, or are taken to: dropout is
# away at inference, and the paper leaves pooling alone.
_SAME_CHANNELS = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Upsample),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),  # and ZeroPad
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d),
)
_OTHER_CHANNELS = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle)
_POOL_CALLS = {f"{kind}_pool{n}d" for kind in ("max", "avg") for n in "123"}
_SAME_CHANNELS_CALLS = {
    *(f"adaptive_{call}" for call in _POOL_CALLS),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "interpolate", "pad"),
    *("neg", "clone", "contiguous", "detach"),
}
_OTHER_CHANNELS_CALLS = {
    *("flatten", "unflatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze"),
    *("mean", "chunk", "split", "getitem", "pixel_shuffle", "pixel_unshuffle"),
}
_SUM_CALLS = {"add": 1, "add_": 1, "iadd": 1, "sub": -1, "sub_": -1, "isub": -1}
_FACTOR_CALLS = {"mul": 1, "mul_": 1, "imul": 1, "truediv": -1, "itruediv": -1, "div": -1}
_CONCAT_CALLS = {"cat", "concat", "concatenate"}
_ACTIVATION_CALLS = {
    *("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid"),
    *("mish", "prelu", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh"),
}


@dataclass(frozen=True)
class Signal:
    """A value of the network: its variance, and its number of channels where that is known."""

    variance: float
    channels: int | None = None


class Variances:
    """What an analysis found, by the names under which the forward calls the modules.

    activations: the variance before every activation that leads on to a layer with weights; pools:
    the same for pooling modules. first: the modules that read the network's one input, empty where
    something else reads it too.
    """

    def __init__(self, model: nn.Module, *, pooling: bool = False) -> None:
        """Follow inputs of variance 1 through a network of unit-norm weights.

        model: a network without batch norms. pooling: whether the variance behind a pooling module
        is 1, as behind an activation.
        Raises InputError for a forward that torch.fx cannot read, and for what is not followed.
        """
        self.activations: dict[str, float] = {}
        self.pools: dict[str, float] = {}
        self._model = model
        self._pooling = pooling
        graph = _trace(model)
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        readers = [reader for node in inputs for reader in node.users]
        alone = len(inputs) == 1 and all(node.op == "call_module" for node in readers)
        self.first = [str(node.target) for node in readers] if alone else []
        leads_on = _leading_to(graph, lambda node: isinstance(self._module(node), WEIGHTED))
        self._signals: dict[fx.Node, Signal | None] = {}
        for node in graph.nodes:
            if node in leads_on:
                self._signals[node] = self._follow(node)
        for node in graph.nodes:
            if node not in leads_on and str(node.target) in self.activations | self.pools:
                raise _shared(str(node.target), "inside the network and behind its last layer")

    def _module(self, node: fx.Node) -> nn.Module:
        if node.op != "call_module":
            return _NOTHING
        return self._model.get_submodule(str(node.target))

    def _follow(self, node: fx.Node) -> Signal | None:
        """The signal that a node gives; None for what is no value of the network (a size)."""
        if node.op == "placeholder":
            return Signal(1.0)
        read = [self._signals[n] for n in node.all_input_nodes]
        signals = [signal for signal in read if signal is not None]
        if node.op == "call_module":
            return self._follow_module(str(node.target), self._module(node), signals)
        if node.op == "get_attr" or not signals or _name(node) in ("size", "getattr"):
            return None
        return self._follow_call(node, signals)

    def _follow_module(self, name: str, module: nn.Module, signals: Sequence[Signal]) -> Signal:
        if len(signals) != 1:
            raise _unknown(f"'{name}' ({type(module).__name__}) reads {len(signals)} values")
        (signal,) = signals
        if isinstance(module, ACTIVATIONS):
            return self._normalised(self.activations, name, signal)
        if isinstance(module, nn.Linear):
            return Signal(signal.variance, module.out_features)
        if isinstance(module, TRANSPOSED):
            # each output sees one in prod(stride) of the kernel's taps
            return Signal(signal.variance / math.prod(module.stride), module.out_channels)
        if isinstance(module, WEIGHTED):
            return Signal(signal.variance, cast(int, module.out_channels))
        if isinstance(module, (*MAX_POOLS, *AVERAGE_POOLS)):
            return self._normalised(self.pools, name, signal) if self._pooling else signal
        if isinstance(module, _SAME_CHANNELS):
            return signal
        if isinstance(module, _OTHER_CHANNELS):
            return Signal(signal.variance)
        raise _unknown(f"'{name}' is a {type(module).__name__}")

    def _normalised(self, found: dict[str, float], name: str, signal: Signal) -> Signal:
        known = found.setdefault(name, signal.variance)
        if not math.isclose(known, signal.variance, rel_tol=1e-9):
            raise _shared(name, f"on inputs of variance {known:g} and {signal.variance:g}")
        return Signal(1.0, signal.channels)

    def _follow_call(self, node: fx.Node, signals: Sequence[Signal]) -> Signal:
        name = _name(node)
        if name.rstrip("_") in _ACTIVATION_CALLS:
            raise InputError(
                f"The forward calls {name} as a function{_place(node)}, where no normalisation can"
                f" be put; give it a module (as nn.ReLU) for each place."
            )
        if name in _POOL_CALLS and self._pooling:
            raise InputError(
                f"The forward calls {name} as a function{_place(node)}; with pooling=True it has to"
                " be a module (as nn.MaxPool2d)."
            )
        if name in _SAME_CHANNELS_CALLS | _POOL_CALLS and len(signals) == 1:
            return signals[0]
        if name in _OTHER_CHANNELS_CALLS and len(signals) == 1:
            return Signal(signals[0].variance)
        if name in _CONCAT_CALLS:
            return _concatenated(node, signals)
        variance = self._of_arithmetic(node, name)
        if variance is None:
            raise _unknown(f"it calls {name}{_place(node)}")
        return Signal(variance, signals[0].channels)

    def _of_arithmetic(self, node: fx.Node, name: str) -> float | None:
        """The variance of a sum of two values, or of a value times a number; None for others."""
        if len(node.args) != 2 or not set(node.kwargs) <= {"alpha"}:
            return None
        one, two = (self._term(argument) for argument in node.args)
        if name in _SUM_CALLS and isinstance(one, Signal) and isinstance(two, Signal):
            b = _SUM_CALLS[name] * cast(float, node.kwargs.get("alpha", 1))  # x + b y
            if node.args[0] is node.args[1]:
                return (1 + b) ** 2 * one.variance or None
            return one.variance + b**2 * two.variance
        if name in _FACTOR_CALLS:
            if isinstance(two, Signal) and _FACTOR_CALLS[name] > 0:
                one, two = two, one
            if isinstance(one, Signal) and isinstance(two, float):
                return one.variance * two ** (2 * _FACTOR_CALLS[name])
        return None

    def _term(self, argument: Any) -> Signal | float | None:
        if isinstance(argument, fx.Node):
            return self._signals[argument]
        return float(argument) if isinstance(argument, (int, float)) and argument else None


_NOTHING = nn.Module()
_TORCH = str(Path(torch.__file__).parent)


class _Tracer(fx.Tracer):
    """torch.fx's tracer, which goes into every class that it does not know from torch.nn."""

    record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, (*WEIGHTED, *ACTIVATIONS))  # subclasses of the user's, too
        return known or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(model)
    except Exception as error:  # the user's forward may raise anything
        raise InputError(
            f"torch.fx cannot read the forward of {type(model).__name__}, from which the variance"
            f" before each activation follows ({one_line(error)}); write the"
            " forward without control flow on tensors, or use another kind of normalisation."
        ) from error


def _leading_to(graph: fx.Graph, is_goal: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The nodes on whose value a goal depends, and the goals."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if is_goal(node) or any(user in found for user in node.users):
            found.add(node)
    return found


def _concatenated(node: fx.Node, signals: Sequence[Signal]) -> Signal:
    """The average variance, each channel counted: one number, so that padding can carry it."""
    counts = [signal.channels for signal in signals]
    known = [count for count in counts if count is not None]
    total = sum(known) if len(known) == len(counts) else None
    variance = signals[0].variance
    if all(math.isclose(signal.variance, variance, rel_tol=1e-9) for signal in signals):
        return Signal(variance, total)
    if total is None:
        raise _unknown(
            "it concatenates values of different variances, not all of whose channels could be"
            f" counted,{_place(node)}"
        )
    weighted = sum(s.variance * n for s, n in zip(signals, known, strict=True))
    return Signal(weighted / total, total)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _place(node: fx.Node) -> str:
    """The line of the user's source that made a node, as torch.fx saw it."""
    frames = re.findall(r'File "(.*)", line \d+, in .*\n +(.*)', node.stack_trace or "")
    lines = [line for file, line in frames if not file.startswith(_TORCH)]
    return f" in the line '{lines[-1]}'" if lines else ""


def _unknown(what: str) -> InputError:
    return InputError(
        f"The variance of a value cannot be followed through the network: {what}. Normalization"
        " Propagation knows linear and convolutional layers, elementwise activations, pooling, sums"
        " and concatenations; use another kind of normalisation here."
    )


def _shared(name: str, where: str) -> InputError:
    return InputError(
        f"The module '{name}' is used in several places, {where}, which need different"
        " constants; give each place a module of its own."
    )
