"""A checkpoint that describes itself: the tensors, and the graph that they belong to, as data.

`bnfold fold model.pt` then needs no other word and imports no code: the file carries the network's
ONNX graph without its weights, in a uint8 tensor beside the state_dict.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from bnfold.errors import InputError, UsageError, one_line
from bnfold.graph import detach_weights, replacing
from bnfold.reading.checkpoint import DESCRIPTION_KEY
from bnfold.version import VERSION

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

SCHEMA = 1


def checkpoint_bytes(
    state_dict: Mapping[str, torch.Tensor],
    graph: ir.Model | None,
    *,
    kind: str,
    model: str | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    metrics: Mapping[str, Any] | None = None,
    plain: Mapping[str, Sequence[str]] | None = None,
    folded: Sequence[str] = (),
    bounds: Mapping[str, Sequence[float | None]] | None = None,
) -> bytes:
    """The file as bytes: `state_dict`, and `bnfold` with the graph, which loads weights_only.

    graph: the network's graph, None if it has none; the initializers that the state_dict names are
    left out of it.
    kind: what wrote it ("train", "adapt", "fold"). model: the factory it came from, for people to
    read; it is never imported from here. metrics: numbers and strings, nested as JSON.
    plain: what a fold may change without the module at hand (`folding.module.plain_modules`).
    folded: the batch norms that are gone. bounds: by module, the numbers between which a ReLU
    of the folded network clips, where they are others (None: none).
    Raises UsageError for metrics that are not JSON, InputError where the file could not be loaded
    safely again.
    """
    import torch

    content = {
        "state_dict": {
            name: tensor.detach().cpu() if isinstance(tensor, torch.Tensor) else tensor
            for name, tensor in state_dict.items()
        },
        DESCRIPTION_KEY: {
            "schema": SCHEMA,
            "kind": kind,
            "model": model,
            "input": {name: list(shape) for name, shape in (shapes or {}).items()},
            "graph": None
            if graph is None
            else torch.frombuffer(bytearray(detach_weights(graph, state_dict)), dtype=torch.uint8),
            "metrics": as_json(metrics or {}),
            "plain": {key: list(names) for key, names in (plain or {}).items()},
            "folded": list(folded),
            "bounds": {name: list(pair) for name, pair in (bounds or {}).items()},
            "created_by": f"bnfold {VERSION}",
        },
    }
    file = io.BytesIO()
    try:
        torch.save(content, file)
        torch.load(io.BytesIO(file.getvalue()), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise types of their own
        raise InputError(
            f"The network's state cannot be written as plain tensors: {one_line(error)}."
        ) from error
    return file.getvalue()


def program_bytes(program: ExportedProgram) -> bytes:
    """A folded graph as a .pt2, which torch.export.load opens without the network's own code."""
    import torch

    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as staged:
        staged.write_bytes(data)


def as_json(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics as plain dicts, lists, numbers and strings, numpy's scalars included.

    Raises UsageError for anything else.
    """

    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):
            return value.tolist()
        raise TypeError(f"a value of type {type(value).__name__}")

    try:
        loaded = json.loads(json.dumps(dict(metrics), default=plain))
    except (TypeError, ValueError) as error:
        raise UsageError(f"The metrics of a checkpoint are JSON; found {error}.") from error
    assert isinstance(loaded, dict)
    return loaded
