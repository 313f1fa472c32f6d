"""The places where a network runs, and the precision that a user declares for each.

One row of a table for each; written NAME or NAME:CLASS, such as `ort-cuda:tf32`. A class says what
the products are rounded to: it switches that on, and it is the ceiling on the error that passes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from bnfold.errors import UsageError

# rounding of the products of each class (half the distance of neighbours at 1); None: the model's
PRECISIONS: dict[str, float | None] = {
    "fp32": None,
    "tf32": 2.0**-11,
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
}
R_LIMIT = 4.0  # a right network in its own precision: `docs/results/thresholds.md`
DEFAULT = "ort-cpu"


@dataclass(frozen=True)
class Place:
    """A row of the table: the library, its device, the classes that exist there.

    provider: of onnxruntime ("cpu", "cuda", "tensorrt"); empty for torch.
    """

    library: str
    device: str
    provider: str
    classes: tuple[str, ...]


RUNTIMES: dict[str, Place] = {
    "torch": Place("torch", "cpu", "", ("fp32", "fp16", "bf16")),
    "torch-cuda": Place("torch", "cuda", "", tuple(PRECISIONS)),
    "ort-cpu": Place("onnxruntime", "cpu", "cpu", ("fp32", "fp16", "bf16")),
    "ort-cuda": Place("onnxruntime", "cuda", "cuda", tuple(PRECISIONS)),
    "ort-tensorrt": Place("onnxruntime", "cuda", "tensorrt", tuple(PRECISIONS)),
}
SHORT = {"cpu": "ort-cpu", "cuda": "ort-cuda", "tensorrt": "ort-tensorrt"}


@dataclass(frozen=True)
class Runtime:
    """A place and the precision declared for it; its text is what a user writes.

    Raises UsageError for a name or a class that does not exist, or not there.
    """

    name: str
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.name not in RUNTIMES:
            raise UsageError(
                f"There is no runtime '{self.name}'{_near(self.name, (*RUNTIMES, *SHORT))}; "
                f"there are {', '.join(RUNTIMES)}."
            )
        if self.precision not in PRECISIONS:
            raise UsageError(
                f"There is no precision class '{self.precision}'"
                f"{_near(self.precision, PRECISIONS)}; there are {', '.join(PRECISIONS)}."
            )
        if self.precision not in self.place.classes:
            raise UsageError(
                f"{self.name} has no {self.precision}: a processor computes no {self.precision} "
                f"products; it has {', '.join(self.place.classes)}."
            )

    def __str__(self) -> str:
        return self.name if self.precision == "fp32" else f"{self.name}:{self.precision}"

    @property
    def place(self) -> Place:
        """The table's row."""
        return RUNTIMES[self.name]

    @property
    def needs_own_process(self) -> bool:
        """Whether what onnxruntime does there is settled when its process starts."""
        return self.place.library == "onnxruntime" and self.place.device == "cuda"


def parse_runtime(text: str, precision: str = "fp32") -> Runtime:
    """`NAME[:CLASS]`; precision: the class where the text has none and the place has that class.

    Raises UsageError with the nearest name.
    """
    name, colon, own = text.partition(":")
    name = SHORT.get(name, name)
    if not colon and name in RUNTIMES and precision in PRECISIONS:
        classes = RUNTIMES[name].classes
        return Runtime(name, precision if precision in classes else "fp32")
    return Runtime(name, own if colon else precision)


def as_runtimes(given: Iterable[str | Runtime], precision: str = "fp32") -> tuple[Runtime, ...]:
    """Each one once, in order.

    Raises UsageError for none, a text in the place of a list, or a class that none of them has.
    """
    if isinstance(given, str):
        raise UsageError(f"runtimes is a list, such as ['{given}'].")
    parsed = [parse_runtime(r, precision) if isinstance(r, str) else r for r in given]
    if not parsed:
        raise UsageError(f"No runtime was given to compare on; there are {', '.join(RUNTIMES)}.")
    if precision != "fp32" and all(runtime.precision != precision for runtime in parsed):
        names = ", ".join(runtime.name for runtime in parsed)
        raise UsageError(
            f"{precision} was declared, and none of the runtimes takes it up ({names}): nothing "
            f"would be proved about {precision}."
        )
    return tuple(dict.fromkeys(parsed))


def ceiling(precision: str, unit: float) -> float:
    """The largest error ratio that a class lets pass, for a model of this rounding.

    What passes in the model's own precision, times the ratio of the roundings: 4 * 2^13 for fp16
    and 4 * 2^16 for bf16 where the model is float32, 4 where it is of the class itself. For tf32,
    which rounds the operands of products and nothing else, the ratio alone: 2^13.
    """
    rounding = PRECISIONS[precision]
    if rounding is None:
        return R_LIMIT
    ratio = rounding / unit
    return max(R_LIMIT, ratio if precision == "tf32" else R_LIMIT * ratio)


def _near(name: str, known: Iterable[str]) -> str:
    if "gpu" in name.lower() or "nvidia" in name.lower():
        return " (did you mean ort-cuda, or torch-cuda?)"
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
