"""Values inside a model as onnxruntime computes them in the model's own type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx

from bnfold.errors import BnfoldError
from bnfold.proof.exact.alignment import Alignment
from bnfold.proof.exact.reference import Float64Reference
from bnfold.proof.places.runtime import open_session

Array = np.ndarray[Any, np.dtype[Any]]


def measured(
    model: onnx.ModelProto,
    names: Iterable[str],
    inputs: Mapping[str, Array],
    threads: int | None = None,
) -> dict[str, Any]:
    """The named values on onnxruntime's CPU, without its graph optimization.

    Raises InputError where onnxruntime refuses the model or the inputs.
    """
    wanted = dict.fromkeys(names)
    if not wanted:
        return {}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    return open_session(watched, "cpu", optimize=False, threads=threads).run(inputs)


def own_errors(
    original: onnx.ModelProto,
    reference: Float64Reference,
    names: Iterable[str],
    inputs: Mapping[str, Array],
    alignment: Alignment,
) -> dict[str, float]:
    """What the original's own rounding does at these values, in the folded network's terms.

    An ill-conditioned layer (a mean far from zero, a tiny variance) is off by many roundings in
    any fold, and in the original just as much. 0 where onnxruntime does not run the original.
    """
    names = list(names)
    try:
        got = measured(original, names, inputs)
    except BnfoldError:
        return dict.fromkeys(names, 0.0)
    errors = {}
    for name, x in reference.stream(inputs, names):
        z = got[name]
        if isinstance(z, np.ndarray) and z.dtype.kind not in "biuOUS":
            z = alignment.written(name, z.astype(np.float64))
        errors[name] = alignment.error(name, x, z)
    return errors
