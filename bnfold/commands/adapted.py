"""A network with other statistics as files: what `adapt` and `pack apply` write."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnfold.adapting.base import Adapted, Base
from bnfold.commands.shared import Report
from bnfold.errors import UsageError
from bnfold.graph import save_onnx, to_bytes
from bnfold.outputs import Writer, check_outputs, record_path, write_all, write_plain, writer_of


def check_adapted_outputs(args: argparse.Namespace, outputs: list[Path], base: Base) -> None:
    """Refuse outputs that cannot hold the network, or are there already. Raises UsageError."""
    model = _given(args)
    check_outputs(outputs, model, args.overwrite, base.formats)
    if base.back is not None:
        check_outputs([record_path(outputs[0])], model, args.overwrite, (".safetensors",))


def write_adapted(
    done: Report,
    args: argparse.Namespace,
    outputs: list[Path],
    base: Base,
    adapted: Adapted,
    metrics: Mapping[str, Any],
) -> None:
    """The files, all of them or none; of a folded network its record too.

    metrics: what a checkpoint is to say of how it came about.
    """
    writers = {path: _writer(path, args, base, adapted, metrics) for path in outputs}
    source = _given(args)
    if base.back is None or adapted.fold is None:
        write_all(done, writers, role="adapted", source=source)
        return
    # the new fold is one of the adapted network, which lies nowhere as a file
    original = hashlib.sha256(to_bytes(adapted.fold.original)).hexdigest()
    record = (record_path(outputs[0]), adapted.fold.record)
    write_all(done, writers, record, role="adapted", source=source, original=original)


def _given(args: argparse.Namespace) -> Path:
    """The network's file: BASE of `pack apply`, MODEL of `adapt`."""
    given: Path = args.base if hasattr(args, "base") else args.model
    return given


def _writer(
    path: Path, args: argparse.Namespace, base: Base, adapted: Adapted, metrics: Mapping[str, Any]
) -> Writer:
    suffix = path.suffix.lower()
    if adapted.fold is not None:
        return writer_of(path, args, adapted.fold, adapted.fold.source)
    model = adapted.graph
    if suffix == ".onnx" and model is not None:
        return lambda staged: save_onnx(model, staged)
    if suffix == ".onnx":
        raise UsageError(f"{path}: {base.label} carries no graph; write .pt or .safetensors.")
    state = adapted.state_dict
    assert state is not None  # `formats` says what can be written
    if suffix == ".safetensors":
        from safetensors.torch import save

        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        return lambda staged: write_plain(staged, save(tensors))
    from bnfold.saving import checkpoint_bytes

    said = base.description
    data = checkpoint_bytes(
        state,
        model,
        kind="adapt",
        model=args.factory or said.get("model"),
        shapes=said.get("input"),
        metrics=metrics,
        plain=said.get("plain"),
    )
    return lambda staged: write_plain(staged, data)
