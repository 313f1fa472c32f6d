"""Files that a verb writes: named, checked before any work, staged together, never half-written."""

from __future__ import annotations

import contextlib
import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from bnfold import report
from bnfold.errors import UsageError
from bnfold.graph import graph_inputs, replacing
from bnfold.reading.checkpoint import DESCRIPTION_KEY
from bnfold.reading.sniff import Kind
from bnfold.saving import SCHEMA, program_bytes

Report = dict[str, Any]

FORMATS = (".onnx", ".pt", ".pth", ".safetensors", ".pt2")
Writer = Callable[[Path], None]
Writeback = Literal["auto", "class", "graph"] | None


def beside(path: Path, word: str, suffixes: list[str]) -> list[Path]:
    """Names beside a file: net.onnx -> net.folded.onnx."""
    return [path.with_name(f"{path.stem}.{word}{suffix}") for suffix in suffixes]


def unfolded_beside(path: Path) -> Path:
    """Where the unfolded model lies unless it is named: net.folded.onnx -> net.unfolded.onnx."""
    return path.with_name(f"{path.stem.removesuffix('.folded')}.unfolded{path.suffix}")


def default_suffixes(kind: Kind) -> list[str]:
    """The files that a fold writes where none is named."""
    torch_file = {Kind.ONNX: [], Kind.EXPORTED_PROGRAM: [".pt2"]}
    return [".onnx", *torch_file.get(kind, [".pt"])]


def writeback_of(outputs: Sequence[Path], *, named: bool) -> Writeback:
    """What a torch network is to come back as, for the files that are to hold it.

    A state_dict holds what fits the network's own class, a .pt2 a graph module, and .onnx neither.
    Where the files were not `named`, the network may come back as either.
    """
    suffixes = {path.suffix.lower() for path in outputs}
    if suffixes <= {".onnx"}:
        return None
    if not named:
        return "auto"
    return "class" if suffixes - {".onnx", ".pt2"} else "graph"


def as_it_came(outputs: list[Path], result: Any) -> list[Path]:
    """The default files for what a network came back as: its class, a graph module, or ONNX."""
    if result.state_dict is None:
        return [path for path in outputs if path.suffix == ".onnx"]
    if result.program is None:
        return outputs
    return [path.with_suffix(".pt2") if path.suffix == ".pt" else path for path in outputs]


def record_path(output: Path) -> Path:
    """Where the fold record of an output lies unless it is named."""
    return output.with_name(f"{output.stem}.record.safetensors")


def check_outputs(
    outputs: list[Path], source: Path | None, overwrite: bool, formats: tuple[str, ...]
) -> None:
    """Refuse outputs before any work is done. Raises UsageError."""
    seen: set[Path] = set()
    for path in outputs:
        if path.suffix.lower() not in formats:
            raise UsageError(f"{path}: the suffix must be one of {', '.join(formats)}.")
        if not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}.")
        both = source is not None and source.exists() and path.exists()
        if both and source is not None and path.samefile(source):
            raise UsageError(f"{path} is the input itself, which is never overwritten.")
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name a file.")
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists; pass --overwrite or another -o.")
        if path.resolve() in seen:
            raise UsageError(f"{path} is named twice as output.")
        seen.add(path.resolve())


def writer_of(
    path: Path,
    args: Namespace,
    result: Any,
    source: Any,
    *,
    kind: str = "fold",
    plain: Mapping[str, Sequence[str]] | None = None,
) -> Writer:
    """What writes a result to a path of this suffix; kind and plain: of `checkpoint_bytes`."""
    from bnfold.graph import save_onnx

    if path.suffix.lower() == ".onnx":
        return lambda staged: save_onnx(result.graph, staged)
    if path.suffix.lower() == ".pt2":
        if result.program is None:
            raise UsageError(
                f"{path}: a .pt2 holds a graph module, and a .pt or .safetensors asked for the"
                " network's own class; fold them one at a time."
            )
        return lambda staged: write_plain(staged, program_bytes(result.program))
    if result.state_dict is None:
        raise UsageError(
            f"{path}: an ONNX model {kind}s to .onnx; {path.suffix} needs a torch model."
        )
    names, bounds = _gone(result) if kind == "fold" else ([], {})
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import save

        tensors = {name: tensor.contiguous() for name, tensor in result.state_dict.items()}
        about = {"schema": SCHEMA, "kind": kind, "model": args.factory, "folded": names}
        about |= {"bounds": bounds} if bounds else {}
        metadata = {DESCRIPTION_KEY: json.dumps(about)}
        return lambda staged: write_plain(staged, save(tensors, metadata=metadata))
    from bnfold.saving import checkpoint_bytes

    data = checkpoint_bytes(
        result.state_dict,
        result.graph,
        kind=kind,
        model=args.factory or source.description.get("model"),
        shapes=_shapes_of(source),
        folded=names,
        bounds=bounds,
        plain=plain,
    )
    return lambda staged: write_plain(staged, data)


def _gone(result: Any) -> tuple[list[str], dict[str, Any]]:
    """The modules that a fold takes out, and the Relus that cut off at another number."""
    from bnfold.folding.module import bounds_of, gone_of

    norms = [norm.name for norm in result.folded]
    constants = sorted(gone_of(result.plan) - set(norms))
    return norms + constants, bounds_of(result.plan)


def _shapes_of(source: Any) -> dict[str, list[int]]:
    described = source.description.get("input")
    if described:
        return {str(name): list(shape) for name, shape in described.items()}
    names = graph_inputs(source.graph)
    return {name: list(x.shape) for name, x in zip(names, source.example, strict=False)}


def write_plain(path: Path, data: bytes) -> None:
    """Write a file that was staged."""
    path.write_bytes(data)


def write_all(
    done: Report,
    writers: Mapping[Path, Writer],
    record: tuple[Path, Any] | None = None,
    *,
    role: str = "folded",
    source: Path,
    original: str | None = None,
) -> dict[str, str]:
    """Stage every file, then let all of them appear; the hashes of the source and of each file.

    record: where it goes and what it is; it gets the hashes and is written last. original: the hash
    of what was folded, where that is not the source.
    """
    from dataclasses import replace

    hashes = {"original": original or report.sha256(source)}
    with contextlib.ExitStack() as stack:
        # what is entered first is renamed last
        staged_record = stack.enter_context(replacing(record[0])) if record else None
        for path, writer in writers.items():
            staged = stack.enter_context(replacing(path))
            writer(staged)
            hashes[path.name] = report.sha256(staged)
            done["files"].append({"role": role, "path": str(path), "sha256": hashes[path.name]})
        if record and staged_record:
            replace(record[1], files=hashes).write(staged_record)
            digest = report.sha256(staged_record)
            done["files"].append({"role": "record", "path": str(record[0]), "sha256": digest})
    return hashes


def save_fold(result: Any, path: Path, *, overwrite: bool = False) -> Path:
    """Write a fold's model and record, as `bnfold fold` does; the record's path."""
    from bnfold.graph import to_bytes

    source, record = result.source.path, record_path(path)
    read = source if source.is_file() else None  # the caller may have passed a model, not a file
    check_outputs([path], read, True, FORMATS)
    check_outputs([record], read, True, (".safetensors",))
    there = [str(file) for file in (path, record) if file.exists()]
    if there and not overwrite:
        raise UsageError(f"{there[0]} exists; save with overwrite=True, or elsewhere.")
    digest = report.sha256(read) if read else hashlib.sha256(to_bytes(result.original)).hexdigest()
    writers = {path: writer_of(path, Namespace(factory=None), result, result.source)}
    write_all({"files": []}, writers, (record, result.record), source=source, original=digest)
    return record


def add_file(done: Report, role: str, path: Path) -> None:
    """Note a file that was written, with its hash."""
    done["files"].append({"role": role, "path": str(path), "sha256": report.sha256(path)})
