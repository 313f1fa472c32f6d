"""A torch module run as it infers, and what torch's libraries may round while it does.

torch asks cuBLAS and cuDNN for TF32 or not at every call, by settings of the process: they are set
for the run and put back as they were, whichever of torch's two ways to set them its user has.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bnfold.errors import RuntimeUnavailableError, one_line
from bnfold.proof.places.runtime import FALLBACK

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, np.dtype[Any]]


@contextlib.contextmanager
def rounding(precision: str = "fp32", *, repeatable: bool = True) -> Iterator[None]:
    """TF32 in products, convolutions and recurrences for "tf32", for any other class float32.

    repeatable: cuDNN takes one algorithm, and one that gives the same numbers again. torch has
    older and newer settings for the same, and refuses to read the older where they disagree: both
    are set, the older only where they can be read. A forward that enters `cudnn.flags` has what
    that sets, whatever was asked for here.
    """
    import torch

    cudnn: Any = torch.backends.cudnn
    wanted = "tf32" if precision == "tf32" else "ieee"
    matmul = torch.backends.cuda.matmul
    older = [place for place in (matmul, cudnn) if _readable(place, "allow_tf32")]
    places: list[tuple[Any, str, Any]] = [
        *((place, "allow_tf32", wanted == "tf32") for place in older),
        *((place, "fp32_precision", wanted) for place in (matmul, cudnn.conv, cudnn.rnn)),
    ]
    if repeatable:
        places += [(cudnn, "deterministic", True), (cudnn, "benchmark", False)]
    before = [(place, name, getattr(place, name)) for place, name, _ in places]
    try:
        for place, name, value in places:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _readable(place: Any, name: str) -> bool:
    try:
        getattr(place, name)
    except RuntimeError:
        return False
    return True


def run_torch(
    module: torch.nn.Module,
    inputs: Sequence[Array],
    precision: str = "fp32",
    device: str | None = None,
) -> list[Array]:
    """The module's outputs in evaluation mode as numpy arrays.

    inputs: the positional arguments of forward. precision: fp32 is float32 without TF32, tf32
    allows it, fp16 and bf16 are torch's autocast. device: where the inputs go and the outputs must
    come from (default: where the module's parameters are), else it is a RuntimeUnavailableError.
    Tuples, lists and dictionaries of outputs come
    back flat, in order. The module's training flags and torch's settings are put back.
    """
    import torch

    modes = [(part, part.training) for part in module.modules()]
    held = next((p.device for p in module.parameters()), torch.device("cpu"))
    there = held if device is None else torch.device(device)
    module.eval()
    try:
        with (
            torch.no_grad(),
            rounding(precision),
            autocast(there.type, precision),
        ):
            given = [_as_tensor(x).to(there) for x in inputs]
            result = list(_flat(module(*given)))
    finally:
        for part, training in modes:
            part.training = training
    strays = {tensor.device.type for tensor in result} - {there.type}
    if device is not None and strays:
        raise RuntimeUnavailableError(
            f"torch was asked for {there.type}, but the module computed its outputs on "
            f"{', '.join(sorted(strays))}; the result proves nothing about {there.type}.",
            code=FALLBACK,
        )
    return [_as_array(tensor.detach().cpu()) for tensor in result]


def autocast(device: str, precision: str) -> contextlib.AbstractContextManager[Any]:
    """torch's autocast to a class, fp16 or bf16; of another class, nothing."""
    import torch

    narrow = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    return torch.autocast(device, narrow) if narrow else contextlib.nullcontext()


def require_torch(device: str) -> None:
    """Raises RuntimeUnavailableError, with torch's own reason, where torch cannot run there."""
    if importlib.util.find_spec("torch") is None:
        raise RuntimeUnavailableError("torch was asked for and is not installed.")
    if device == "cpu":
        return
    import torch

    if torch.cuda.is_available():
        return
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:
        reason = one_line(error)
    else:
        reason = "it finds no device"
    raise RuntimeUnavailableError(
        f"CUDA was asked for, but torch {torch.__version__} cannot use it: {reason}. Install a "
        f"torch that is built for CUDA and NVIDIA's driver, or ask for torch on the CPU."
    )


def _as_tensor(array: Array) -> torch.Tensor:
    import torch

    if array.dtype.name == "bfloat16":  # torch has it, numpy only through another package
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))


def _as_array(tensor: torch.Tensor) -> Array:
    import torch

    array: Array = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def _flat(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, list | tuple):
        for item in result:
            yield from _flat(item)
    elif result is not None:
        yield result
