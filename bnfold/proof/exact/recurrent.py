"""RNN, GRU and LSTM in float64; onnx.reference runs neither several directions nor all attributes.

The equations are those of the ONNX operators' text: gates in the order z r h (GRU) and i o f c
(LSTM), biases as [Wb, Rb], peepholes as [Pi, Po, Pf]. Where the text leaves it open (`clip` does
not reach an LSTM's cell) they are onnxruntime's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

Array = np.ndarray[Any, np.dtype[Any]]
Function = Callable[[Array], Array]
State = tuple[Array, ...]
Step = Callable[[Array, State], State]


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


# name -> (alpha, beta) -> function, and what alpha and beta are if nothing is said
_ACTIVATIONS: dict[str, tuple[Callable[[float, float], Function], tuple[float, float]]] = {
    "relu": (lambda _a, _b: lambda x: np.maximum(x, 0), (0, 0)),
    "tanh": (lambda _a, _b: np.tanh, (0, 0)),
    "sigmoid": (lambda _a, _b: _sigmoid, (0, 0)),
    "affine": (lambda a, b: lambda x: a * x + b, (1, 0)),
    "leakyrelu": (lambda a, _b: lambda x: np.where(x < 0, a * x, x), (0.01, 0)),
    "thresholdedrelu": (lambda a, _b: lambda x: np.where(x >= a, x, 0), (1, 0)),
    "scaledtanh": (lambda a, b: lambda x: a * np.tanh(b * x), (1, 1)),
    "hardsigmoid": (lambda a, b: lambda x: np.clip(a * x + b, 0, 1), (0.2, 0.5)),
    "elu": (lambda a, _b: lambda x: np.where(x < 0, a * np.expm1(np.minimum(x, 0)), x), (1, 0)),
    "softsign": (lambda _a, _b: lambda x: x / (1 + np.abs(x)), (0, 0)),
    "softplus": (lambda _a, _b: lambda x: np.logaddexp(0, x), (0, 0)),
}


def _functions(names: Sequence[str], alphas: Sequence[float] | None,
               betas: Sequence[float] | None) -> list[Function]:  # fmt: skip
    """The activations of all directions; alpha and beta are handed out in order of need."""
    given_a, given_b = list(alphas or ()), list(betas or ())
    found = []
    for name in names:
        make, (alpha, beta) = _ACTIVATIONS[name.lower()]
        takes_a = alpha or name.lower() == "leakyrelu"
        alpha = given_a.pop(0) if takes_a and given_a else alpha
        beta = given_b.pop(0) if (beta or name.lower() == "affine") and given_b else beta
        found.append(make(alpha, beta))
    return found


def _unroll(x: Array, lengths: Array, reverse: bool, step: Step, state: State
            ) -> tuple[Array, State]:  # fmt: skip
    """All hidden states (time, batch, hidden) and the last state of each sequence."""
    rows = np.arange(x.shape[1])
    y = np.zeros((*x.shape[:2], state[0].shape[-1]))
    for t in range(x.shape[0]):
        live = t < lengths
        at = np.where(live, lengths - 1 - t if reverse else t, 0)
        new = step(x[at, rows], state)
        state = tuple(np.where(live[:, None], a, b) for a, b in zip(new, state, strict=True))
        y[at[live], rows[live]] = state[0][live]
    return y, state


class _Recurrent(OpRun):  # type: ignore[misc]
    """What the three have in common: directions, layouts, lengths, clipping."""

    op_domain = ""
    defaults: tuple[str, ...] = ()

    def _cell(self, w: Array, r: Array, b: Array, p: Array, f: list[Function],
              attributes: dict[str, Any]) -> Step:  # fmt: skip
        raise NotImplementedError

    def _sequence(self, x: Array, w: Array, r: Array, b: Array | None, lengths: Array | None,
                  states: list[Array | None], p: Array | None, attributes: dict[str, Any]
                  ) -> tuple[Array, ...]:  # fmt: skip
        batch_first = bool(attributes.get("layout"))
        x = np.swapaxes(x, 0, 1) if batch_first else x
        directions, hidden, batch = w.shape[0], r.shape[2], x.shape[1]
        lengths = np.full(batch, x.shape[0]) if lengths is None else lengths
        b = np.zeros((directions, 2 * w.shape[1])) if b is None else b
        p = np.zeros((directions, 3 * hidden)) if p is None else p
        names = attributes.get("activations") or self.defaults * directions
        functions = _functions(
            names, attributes.get("activation_alpha"), attributes.get("activation_beta")
        )
        each = len(functions) // directions
        firsts = []
        for state in states:
            zero = np.zeros((directions, batch, hidden))
            given = zero if state is None else state
            firsts.append(np.swapaxes(given, 0, 1) if batch_first and state is not None else given)
        ys, lasts = [], []
        for d in range(directions):
            chosen = functions[d * each :][:each]
            chosen[:2] = [_clipped(f, attributes.get("clip")) for f in chosen[:2]]
            step = self._cell(w[d], r[d], b[d], p[d], chosen, attributes)
            reverse = attributes.get("direction") == "reverse" or d == 1
            y, last = _unroll(x, lengths, reverse, step, tuple(first[d] for first in firsts))
            ys.append(y)
            lasts.append(last)
        y = np.stack(ys, axis=1)  # (time, directions, batch, hidden)
        ends = [np.stack([last[i] for last in lasts]) for i in range(len(states))]
        if batch_first:
            return (y.transpose(2, 0, 1, 3), *(np.swapaxes(end, 0, 1) for end in ends))
        return (y, *ends)


def _clipped(function: Function, clip: float | None) -> Function:
    return function if clip is None else lambda x: function(np.clip(x, -clip, clip))


class RNN(_Recurrent):
    """Ht = f(Xt Wi + Ht-1 Ri + Wbi + Rbi)."""

    defaults = ("Tanh",)

    def _run(self, X: Array, W: Array, R: Array, B: Array | None = None,
             sequence_lens: Array | None = None, initial_h: Array | None = None,
             **attributes: Any) -> tuple[Array, ...]:  # fmt: skip
        return self._sequence(X, W, R, B, sequence_lens, [initial_h], None, attributes)

    def _cell(self, w: Array, r: Array, b: Array, p: Array, f: list[Function],  # noqa: ARG002
              attributes: dict[str, Any]) -> Step:  # fmt: skip  # noqa: ARG002
        def step(x: Array, state: State) -> State:
            return (f[0](x @ w.T + state[0] @ r.T + b.reshape(2, -1).sum(axis=0)),)

        return step


class GRU(_Recurrent):
    """Ht = (1 - zt) ht + zt Ht-1, the reset before or after the product with Rh."""

    defaults = ("Sigmoid", "Tanh")

    def _run(self, X: Array, W: Array, R: Array, B: Array | None = None,
             sequence_lens: Array | None = None, initial_h: Array | None = None,
             **attributes: Any) -> tuple[Array, ...]:  # fmt: skip
        return self._sequence(X, W, R, B, sequence_lens, [initial_h], None, attributes)

    def _cell(self, w: Array, r: Array, b: Array, p: Array, f: list[Function],  # noqa: ARG002
              attributes: dict[str, Any]) -> Step:  # fmt: skip
        wb, rb = b.reshape(2, 3, -1)
        rz, rr, rh = r.reshape(3, -1, r.shape[1])
        late = bool(attributes.get("linear_before_reset"))

        def step(x: Array, state: State) -> State:
            (h,) = state
            xz, xr, xh = np.split(x @ w.T, 3, axis=1)
            z = f[0](xz + h @ rz.T + wb[0] + rb[0])
            reset = f[0](xr + h @ rr.T + wb[1] + rb[1])
            inner = reset * (h @ rh.T + rb[2]) if late else (reset * h) @ rh.T + rb[2]
            return ((1 - z) * f[1](xh + inner + wb[2]) + z * h,)

        return step


class LSTM(_Recurrent):
    """Ct = ft Ct-1 + it ct, Ht = ot h(Ct), with peepholes."""

    defaults = ("Sigmoid", "Tanh", "Tanh")

    def _run(self, X: Array, W: Array, R: Array, B: Array | None = None,
             sequence_lens: Array | None = None, initial_h: Array | None = None,
             initial_c: Array | None = None, P: Array | None = None,
             **attributes: Any) -> tuple[Array, ...]:  # fmt: skip
        states = [initial_h, initial_c]
        return self._sequence(X, W, R, B, sequence_lens, states, P, attributes)

    def _cell(self, w: Array, r: Array, b: Array, p: Array, f: list[Function],
              attributes: dict[str, Any]) -> Step:  # fmt: skip
        pi, po, pf = p.reshape(3, -1)
        coupled = bool(attributes.get("input_forget"))

        def step(x: Array, state: State) -> State:
            h, c = state
            sums = x @ w.T + h @ r.T + b.reshape(2, -1).sum(axis=0)
            i, o, forget, cell = np.split(sums, 4, axis=1)
            i = f[0](i + pi * c)
            forget = 1 - i if coupled else f[0](forget + pf * c)
            c = forget * c + i * f[1](cell)
            return f[0](o + po * c) * f[2](c), c

        return step
