"""What the options of the normalizations take, and the sentence for what they do not.

Checked where they are given: what a wrong value does shows much later, and somewhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import torch

from bnfold.errors import UsageError


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_group(value: Any) -> bool:
    known = torch.distributed.is_available()
    return value is None or (known and isinstance(value, torch.distributed.ProcessGroup))


_COUNT = ("a whole number, 0 or more", lambda value: _is_count(value) and value >= 0)
_TAKEN: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "eps": (
        "a finite number, 0 or more",
        lambda value: _is_number(value) and 0 <= value < math.inf,
    ),
    "momentum": (
        "the weight of a new batch, a number from 0 to 1, or None (null) for the average of all",
        lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
    ),
    "ghost_size": (
        "the samples of a ghost batch, a whole number, 1 or more",
        lambda value: _is_count(value) and value >= 1,
    ),
    "log_scale": (
        "the scale c of lengths exp(c s), a number above 0; True for 1, False or 0 for lengths"
        " that are no exponentials",
        lambda value: isinstance(value, bool) or (_is_number(value) and 0 <= value < math.inf),
    ),
    "process_group": ("a group of torch.distributed, or None (null) for all processes", _is_group),
    "pooling": ("True or False", lambda value: isinstance(value, bool)),
    "gain": (
        "a positive number, and finite",
        lambda value: _is_number(value) and 0 < value < math.inf,
    ),
    "r_max": ("a number, 1 or more", lambda value: _is_number(value) and value >= 1),
    "d_max": ("a number, 0 or more", lambda value: _is_number(value) and value >= 0),
    "start": _COUNT,
    "r_end": _COUNT,
    "d_end": _COUNT,
}


def check_options(options: Mapping[str, Any]) -> None:
    """Raises UsageError for a value that its option does not take; unknown names pass."""
    for name, value in options.items():
        words, takes = _TAKEN.get(name, ("", lambda _: True))
        if not takes(value):
            raise UsageError(f"{name} is {value!r}; it must be {words}.")
