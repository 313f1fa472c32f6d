"""The verbs of the command line, each a few lines over the API: arguments in, a report out."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bnfold import report
from bnfold.errors import UsageError
from bnfold.graph import replacing

Report = dict[str, Any]
Writer = Callable[[Path], None]

_FORMATS = (".onnx", ".pt", ".pth", ".safetensors")


# --- fold, inspect, export, verify ---------------------------------------------------------------


def fold(args: argparse.Namespace) -> Report:
    """`bnfold fold MODEL`: plan, apply, prove, write; no file appears when a gate fails."""
    from bnfold.api import count_operators, fold_source
    from bnfold.sniff import Kind, sniff

    torch_side = sniff(args.model) is not Kind.ONNX
    outputs = args.outputs or _beside(args.model, "folded", [".onnx", ".pt"][: 1 + torch_side])
    record = args.record or _record_path(outputs[0])
    if not args.dry_run:
        _check_outputs([*outputs, record], args.model, args.overwrite, _FORMATS)
    started = time.perf_counter()
    source = _open(args, args.model)
    result = fold_source(source)
    done = _new("fold", args, result.notes)
    done["batch_norms"] = _norms(result.folded, result.kept)
    done["operators"] = {
        "before": count_operators(result.original),
        "after": count_operators(result.graph),
    }
    found = len(result.folded) + len(result.kept)
    done["summary"] = _fold_summary(found, len(result.folded), result.original.producer_name)
    if args.dry_run:
        done["summary"] += " Nothing was written (--dry-run)."
        return _timed(done, started)
    if not args.no_verify:
        proof = result.verify(providers=args.providers or ("cpu",))
        _add_proof(done, proof)
        if not proof.passed:
            done["summary"] += " No file was written."
            return _timed(done, started)
    writers = {path: _writer_of(path, args, result, source) for path in outputs}
    _write_all(done, writers, record, result.record, args.model)
    return _timed(done, started)


def inspect(args: argparse.Namespace) -> Report:
    """`bnfold inspect MODEL`: where each batch norm would go, or why it would stay."""
    from bnfold.api import count_operators, fold_source

    result = fold_source(_open(args, args.model))
    done = _new("inspect", args, result.notes)
    done["batch_norms"] = _norms(result.folded, result.kept)
    done["operators"] = {
        "before": count_operators(result.original),
        "after": count_operators(result.graph),
    }
    found = len(result.folded) + len(result.kept)
    done["summary"] = f"{len(result.folded)} of {found} batch norms fold exactly."
    args.verbose = True
    return done


def export(args: argparse.Namespace) -> Report:
    """`bnfold export MODEL`: the torch network as ONNX, batch norms in place."""
    from bnfold.api import count_operators
    from bnfold.graph import to_proto, write_onnx
    from bnfold.sniff import Kind, sniff
    from bnfold.verify import verify as prove

    if sniff(args.model) is Kind.ONNX:
        raise UsageError(f"{args.model} is ONNX already; `bnfold fold` folds it.")
    outputs = args.outputs or [args.model.with_suffix(".onnx")]
    _check_outputs(outputs, args.model, args.overwrite, (".onnx",))
    source = _open(args, args.model)
    done = _new("export", args, source.notes)
    operators = count_operators(source.graph)
    done["operators"] = {"before": operators, "after": operators}
    done["summary"] = f"Exported at opset {source.graph.opset_imports.get('')}."
    if not args.no_verify:
        proto = to_proto(source.graph)
        modules = (source.module, source.module) if source.module is not None else None
        proof = prove(
            proto, proto, providers=tuple(args.providers or ("cpu",)), torch_modules=modules
        )
        _add_proof(done, proof)
        if not proof.passed:
            done["summary"] += " No file was written."
            return done
    for path in outputs:
        write_onnx(source.graph, path)
        _add_file(done, "export", path)
    return done


def verify(args: argparse.Namespace) -> Report:
    """`bnfold verify ORIGINAL FOLDED`: the gates, for any two models."""
    from bnfold.graph import to_proto
    from bnfold.record import load_record
    from bnfold.verify import verify as prove

    original, folded = _open(args, args.original), _open(args, args.folded)
    path = args.record or _record_path(args.folded)
    record = load_record(path) if args.record is not None or path.is_file() else None
    done = _new("verify", args, (*original.notes, *folded.notes))
    if record is not None and record.files.get("original") != report.sha256(args.original):
        done["notes"].append(f"{path} is the record of another original; gate A is left out")
        record = None
    inputs = None
    if args.data is not None:
        name = next(iter(_inputs_of(original)))
        inputs = {name: _all_samples(args, _inputs_of(original)[name])}
    modules = None
    if original.module is not None and folded.module is not None:
        modules = (original.module, folded.module)
    proof = prove(
        to_proto(original.graph),
        to_proto(folded.graph),
        gauges=record.gauges if record else None,
        aliases=record.aliases if record else None,
        inputs=inputs,
        providers=tuple(args.providers or ("cpu",)),
        torch_modules=modules,
    )
    done["summary"] = ""
    _add_proof(done, proof)
    return done


# --- doctor --------------------------------------------------------------------------------------


def doctor(args: argparse.Namespace) -> Report:
    """`bnfold doctor`: versions, providers that really load, conflicts."""
    from bnfold.runtime import available

    facts = available()
    done = _new("doctor", args, ())
    rows = [[key, _fact(value)] for key, value in _flat(facts)]
    done["facts"] = facts
    done["diagnostics"] = {"head": ["", "found"], "rows": rows}
    conflicts = [str(text) for text in facts.get("conflicts", ())]
    done["warnings"] = conflicts
    done["summary"] = (
        "Something stands in the way: see the warnings." if conflicts else "Nothing in the way."
    )
    return done


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _fact(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "none"
    return {True: "yes", False: "no", None: "not installed"}.get(value, str(value))


# --- what they share -----------------------------------------------------------------------------


def _open(args: argparse.Namespace, path: Path) -> Any:
    from bnfold.sniff import Kind, sniff
    from bnfold.source import open_source

    own = sniff(path) in (Kind.ONNX, Kind.EXPORTED_PROGRAM)
    two = hasattr(args, "original")  # of two models, --model belongs to the checkpoints
    return open_source(
        path,
        model=None if own and two else args.factory,
        input_shapes=args.shapes,
        opset=args.opset,
        trust_pickle=args.trust_pickle,
        freeze_inputs=args.freeze_inputs,
    )


def _inputs_of(source: Any) -> dict[str, Any]:
    from bnfold.graph import graph_inputs

    return graph_inputs(source.graph)


def _new(command: str, args: argparse.Namespace, notes: Any) -> Report:
    """An empty report; the notes also go to stderr as they come."""
    if not args.quiet and not args.json:
        for note in notes:
            print(f"bnfold: {note}", file=sys.stderr)
    files = []
    for role in ("model", "original", "folded"):
        path = getattr(args, role, None)
        if isinstance(path, Path):
            files.append({"role": role, "path": str(path), "sha256": report.sha256(path)})
    return {
        "schema": report.SCHEMA,
        "command": command,
        "versions": report.versions(),
        "files": files,
        "notes": list(notes) if args.json else [],
        "summary": "",
        "exit_code": 0,
    }


def _timed(done: Report, started: float) -> Report:
    done["seconds"] = round(time.perf_counter() - started, 3)
    return done


def _norms(folded: Any, kept: Any) -> Report:
    return {
        "folded": [{"name": norm.name, "into": list(norm.into)} for norm in folded],
        "kept": [{"name": norm.name, "reason": norm.reason} for norm in kept],
    }


def _fold_summary(found: int, folded: int, producer: str | None) -> str:
    if found == 0:
        by_exporter = producer == "pytorch"
        hint = " (torch's exporter folds by itself unless optimize=False)" if by_exporter else ""
        return f"There is no batch norm in the model{hint}; nothing to fold."
    if folded == found:
        return f"All {found} batch norms folded."
    return f"{folded} of {found} batch norms folded; the reasons for the others are above."


def _add_proof(done: Report, proof: Any) -> None:
    found = proof.to_dict()
    done["gates"] = found.pop("gates")
    done["proof"] = found
    done["exit_code"] = 0 if proof.passed else 1
    if proof.passed:
        done["summary"] += f" Proved: R = {proof.r:.2f} (limit 4)."
    else:
        where = f" First difference: {proof.first_divergence}." if proof.first_divergence else ""
        done["summary"] += f" NOT the same function.{where}"
    done["summary"] = done["summary"].strip()


# --- files ---------------------------------------------------------------------------------------


def _beside(path: Path, word: str, suffixes: list[str]) -> list[Path]:
    return [path.with_name(f"{path.stem}.{word}{suffix}") for suffix in suffixes]


def _record_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.record.safetensors")


def _check_outputs(
    outputs: list[Path], source: Path | None, overwrite: bool, formats: tuple[str, ...]
) -> None:
    """Refuse outputs before any work is done. Raises UsageError."""
    seen: set[Path] = set()
    for path in outputs:
        if path.suffix.lower() not in formats:
            raise UsageError(f"{path}: the suffix must be one of {', '.join(formats)}.")
        if not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}.")
        if source is not None and path.exists() and path.samefile(source):
            raise UsageError(f"{path} is the input itself, which is never overwritten.")
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name a file.")
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists; pass --overwrite or another -o.")
        if path.resolve() in seen:
            raise UsageError(f"{path} is named twice as output.")
        seen.add(path.resolve())


def _writer_of(path: Path, args: argparse.Namespace, result: Any, source: Any) -> Writer:
    """What writes a folded model to a path of this suffix."""
    from bnfold.graph import save_onnx

    if path.suffix.lower() == ".onnx":
        return lambda staged: save_onnx(result.graph, staged)
    if result.state_dict is None:
        raise UsageError(
            f"{path}: an ONNX model folds to .onnx; {path.suffix} needs a torch model."
        )
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import save

        tensors = {name: tensor.contiguous() for name, tensor in result.state_dict.items()}
        return lambda staged: _write(staged, save(tensors))
    from bnfold.saving import checkpoint_bytes

    data = checkpoint_bytes(
        result.state_dict,
        result.graph,
        kind="fold",
        model=args.factory or source.description.get("model"),
        shapes=_shapes_of(source),
    )
    return lambda staged: _write(staged, data)


def _shapes_of(source: Any) -> dict[str, list[int]]:
    described = source.description.get("input")
    if described:
        return {str(name): list(shape) for name, shape in described.items()}
    names = _inputs_of(source)
    return {name: list(x.shape) for name, x in zip(names, source.example, strict=False)}


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a report, replacing an older one. Raises UsageError."""
    with replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")


def _write_all(
    done: Report, writers: Mapping[Path, Writer], record_path: Path, record: Any, source: Path
) -> None:
    """Stage every file, then let all of them appear; the record last, with the others' hashes."""
    from dataclasses import replace

    with contextlib.ExitStack() as stack:
        hashes = {"original": report.sha256(source)}
        for path, writer in writers.items():
            staged = stack.enter_context(replacing(path))
            writer(staged)
            hashes[path.name] = report.sha256(staged)
            done["files"].append({"role": "folded", "path": str(path), "sha256": hashes[path.name]})
        staged = stack.enter_context(replacing(record_path))
        replace(record, files=hashes).write(staged)
        done["files"].append(
            {"role": "record", "path": str(record_path), "sha256": report.sha256(staged)}
        )


def _add_file(done: Report, role: str, path: Path) -> None:
    done["files"].append({"role": role, "path": str(path), "sha256": report.sha256(path)})


VERBS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "fold": fold,
    "inspect": inspect,
    "export": export,
    "verify": verify,
    "doctor": doctor,
}
