"""The verbs of the command line, each a few lines over the API: arguments in, a report out."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bnfold import report
from bnfold.errors import BnfoldError, InputError, UsageError
from bnfold.outputs import (
    Writeback,
    add_file,
    as_it_came,
    beside,
    check_outputs,
    default_suffixes,
    record_path,
    unfolded_beside,
    write_all,
    writeback_of,
    writer_of,
)

Report = dict[str, Any]

_NOT_RUN = (
    "The network's torch module was not at hand: the torch file holds the proved graph's weights by"
    " name and was not run. `bnfold verify` with --model runs it."
)
_FORMATS = (".onnx", ".pt", ".pth", ".safetensors", ".pt2")


# --- fold, inspect, export, verify ---------------------------------------------------------------


def fold(args: argparse.Namespace) -> Report:
    """`bnfold fold MODEL`: plan, apply, prove, write; no file appears when a gate fails."""
    from bnfold.api import fold_source

    outputs, writeback = _outputs_of_fold(args)
    record = args.record or record_path(outputs[0])
    if not args.dry_run:
        check_outputs(outputs, args.model, args.overwrite, _FORMATS)
        check_outputs([record], args.model, args.overwrite, (".safetensors",))
    started = time.perf_counter()
    source, repair = _open_scaled(args), _repairs(args)
    result = fold_source(
        source,
        writeback=writeback,
        repair=repair,
        selection=_selection(args),
        clean_up=_clean_up(args),
    )
    if not args.outputs:
        outputs = as_it_came(outputs, result)
        if not args.dry_run:
            check_outputs(outputs, args.model, args.overwrite, _FORMATS)
    done = _new("fold", args, result.notes)
    if result.state_dict is not None and result.modules is None:
        done["warnings"] = [_NOT_RUN]
    _add_fold(done, result)
    found = len(result.folded) + len(result.kept)
    done["summary"] = _fold_summary(found, result)
    if args.dry_run:
        done["summary"] += " Nothing was written (--dry-run)."
        return _timed(done, started)
    if not args.no_verify:
        proof = result.verify(providers=args.providers or ("cpu",))
        _add_proof(done, proof)
        if not proof.passed:
            done["summary"] += " No file was written."
            return _timed(done, started)
    writers = {path: writer_of(path, args, result, source) for path in outputs}
    write_all(done, writers, (record, result.record), source=args.model)
    for path in outputs:
        if path.suffix.lower() == ".pt2":
            done["summary"] += f" Load the graph with torch.export.load('{path}').module()."
    return _timed(done, started)


def unfold(args: argparse.Namespace) -> Report:
    """`bnfold unfold FOLDED`: the original, bit for bit; no file appears when a gate fails."""
    from bnfold.api import count_operators
    from bnfold.folding.record import load_record
    from bnfold.unfolding import check_belongs, open_folded, unfold_source

    outputs = args.outputs or [unfolded_beside(args.folded)]
    check_outputs(outputs, args.folded, args.overwrite, _FORMATS)
    started = time.perf_counter()
    record = load_record(args.record or record_path(args.folded))
    check_belongs(args.folded, record)
    source, own_graph = open_folded(
        args.folded,
        factory=args.factory,
        shapes=args.shapes or (),
        opset=args.opset,
        trust_pickle=args.trust_pickle,
    )
    result = unfold_source(source, record, own_graph=own_graph, factory=args.factory)
    done = _new("unfold", args, result.notes)
    before, after = count_operators(source.graph), count_operators(result.graph)
    done["operators"] = {"before": before, "after": after}
    done["summary"] = (
        f"{len(result.norms)} batch norms are back, every weight the original's bit for bit."
    )
    if not args.no_verify:
        proof = result.verify(providers=args.providers or ("cpu",))
        _add_proof(done, proof, is_fold=own_graph)
        if not proof.passed:
            done["summary"] += " No file was written."
            return _timed(done, started)
    plain = {"layers": record.undo.layers, "norms": record.undo.norms}
    writers = {
        path: writer_of(path, args, result, source, kind="unfold", plain=plain) for path in outputs
    }
    hashes = write_all(done, writers, role="unfolded", source=args.folded)
    if record.files.get("original") in hashes.values():
        done["summary"] += " The file is the one that was folded, byte for byte."
    return _timed(done, started)


def _outputs_of_fold(args: argparse.Namespace) -> tuple[list[Path], Writeback]:
    """The files that a fold is to write, and what a torch network is to come back as for them."""
    from bnfold.reading.sniff import sniff

    kind, in_graph = sniff(args.model), _changes_operators(args)
    suffixes = default_suffixes(kind)[: 1 if in_graph is not None else None]
    outputs = args.outputs or beside(args.model, "folded", suffixes)
    writeback = writeback_of(outputs, named=bool(args.outputs))
    if writeback is not None and in_graph is not None:
        raise UsageError(f"{in_graph} changes operators, not only weights: write .onnx only.")
    return outputs, writeback


def inspect(args: argparse.Namespace) -> Report:
    """`bnfold inspect MODEL`: where each batch norm would go, or why it would stay."""
    from bnfold.api import fold_source

    source, in_graph = _open_scaled(args), _changes_operators(args)
    way: Writeback = "auto" if in_graph is None else None
    result = fold_source(
        source,
        writeback=way,
        repair=_repairs(args),
        selection=_selection(args),
        clean_up=_clean_up(args),
    )
    done = _new("inspect", args, result.notes)
    _add_fold(done, result)
    found = len(result.folded) + len(result.kept)
    done["summary"] = f"{len(result.folded)} of {_norms(found)} fold exactly."
    args.verbose = True
    return done


def export(args: argparse.Namespace) -> Report:
    """`bnfold export MODEL`: the torch network as ONNX, batch norms in place."""
    from bnfold.api import count_operators
    from bnfold.graph import to_proto, write_onnx
    from bnfold.proof.verify import verify as prove
    from bnfold.reading.sniff import Kind, sniff

    if sniff(args.model) is Kind.ONNX:
        raise UsageError(f"{args.model} is ONNX already; `bnfold fold` folds it.")
    outputs = args.outputs or [args.model.with_suffix(".onnx")]
    check_outputs(outputs, args.model, args.overwrite, (".onnx",))
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
        _add_proof(done, proof, is_fold=False)
        if not proof.passed:
            done["summary"] += " No file was written."
            return done
    for path in outputs:
        write_onnx(source.graph, path)
        add_file(done, "export", path)
    return done


def verify(args: argparse.Namespace) -> Report:
    """`bnfold verify ORIGINAL FOLDED`: the gates, for any two models."""
    import numpy as np

    from bnfold.folding.record import load_record
    from bnfold.graph import to_proto
    from bnfold.proof.verify import verify as prove

    original, folded = _open(args, args.original), _open(args, args.folded)
    path = args.record or record_path(args.folded)
    record = load_record(path) if args.record is not None or path.is_file() else None
    done = _new("verify", args, (*original.notes, *folded.notes))
    if record is not None and record.files.get("original") != report.sha256(args.original):
        done["notes"].append(f"{path} is the record of another original; gate A is left out")
        record = None
    elif record is not None and not record.is_of(report.sha256(args.folded)):
        done["notes"].append(
            f"{args.folded} is not what {path} was written for, or was changed since: gate A says"
            " whether it still is that fold"
        )
    inputs = None
    if args.data is not None:
        names = list(_inputs_of(original))
        parts = [b[0] if isinstance(b, list | tuple) else b for b in _open_data(args, args.data)]
        if len(names) != 1 or not parts or isinstance(parts[0], Mapping):
            raise UsageError("verify --data takes samples of a model's single input.")
        inputs = {names[0]: np.concatenate([np.asarray(part) for part in parts])}
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
        seed=args.seed,
        samples=args.samples,
    )
    done["summary"] = ""
    _add_proof(done, proof)
    return done


# --- adapt, train --------------------------------------------------------------------------------


def adapt(args: argparse.Namespace) -> Report:
    """`bnfold adapt MODEL --target-data DATA`: the target's statistics in a new checkpoint."""
    from bnfold.adapting.adapt import adapt as estimate
    from bnfold.reading.checkpoint import load_checkpoint
    from bnfold.reading.sniff import Kind, sniff
    from bnfold.reading.source import network_of

    kind = sniff(args.model)
    if kind not in (Kind.CHECKPOINT, Kind.SAFETENSORS):
        raise InputError(
            f"{args.model} is {kind.label}; bnfold adapts torch networks. Adapt the checkpoint that"
            " it was exported from, and fold the result."
        )
    outputs = args.outputs or beside(args.model, "adapted", [".pt"])
    check_outputs(outputs, args.model, args.overwrite, (".pt", ".pth"))
    checkpoint = load_checkpoint(args.model, trust_pickle=args.trust_pickle)
    module, notes = network_of(args.model, checkpoint, args.factory)
    data = _open_data(args, args.data)
    with _progress(args, "adapting") as progress:
        result = estimate(module.eval(), data, method=args.method, progress=progress)
    done = _new("adapt", args, notes)
    done["layers"] = _layer_table(result.layers)
    done["skipped"] = [vars(layer) for layer in result.skipped]
    done["warnings"] = [*result.warnings, *_unread(data)]
    if result.outputs is not None:
        done["diagnostics"] = _output_table(result.outputs)
    done["summary"] = (
        f"{len(result.layers)} batch norms adapted to {result.images} images ({result.method})."
    )
    spec = args.factory or (checkpoint.description or {}).get("model")
    facts = {"method": result.method, "images": result.images, "data": args.data}
    _write_checkpoint(done, outputs, result.module, data, spec, facts, args)
    if data.labels is not None:
        try:
            done["accuracy"] = _accuracy_table(module, result.module, data)
        except BnfoldError as why:
            done["warnings"].append(f"No accuracy with the labels: {why}")
    return done


def _write_checkpoint(
    done: Report,
    outputs: list[Path],
    module: Any,
    data: Any,
    spec: str | None,
    facts: Mapping[str, Any],
    args: argparse.Namespace,
) -> None:
    """An adapted network as a checkpoint that describes itself, as far as it can be exported."""
    import torch

    from bnfold.folding.module import plain_modules, scope_of
    from bnfold.graph import DEFAULT_OPSET, export_module, graph_inputs
    from bnfold.saving import checkpoint_bytes, write_bytes

    batch = next(iter(data))
    first = batch[0] if isinstance(batch, list | tuple) else batch
    graph, shapes = None, {}
    if isinstance(first, Mapping):
        done["notes"].append("The checkpoint does not carry its graph: the batches are mappings.")
    else:
        example = torch.as_tensor(first)[:1]
        try:
            graph = export_module(module, (example,), opset=args.opset or DEFAULT_OPSET)
            shapes = {name: list(example.shape) for name in graph_inputs(graph)}
        except InputError as error:
            done["notes"].append(f"The checkpoint does not carry its graph: {error}")
    content = checkpoint_bytes(
        module.state_dict(),
        graph,
        kind="adapt",
        model=spec,
        shapes=shapes,
        metrics=facts,
        plain=plain_modules(scope_of(module, graph)) if graph is not None else None,
    )
    for path in outputs:
        write_bytes(path, content)
        add_file(done, "adapted", path)


def train(args: argparse.Namespace) -> Report:
    """`bnfold train SPEC --data DATA`: a network trained, in a checkpoint that describes itself."""
    import torch

    from bnfold.reading.factory import build_module
    from bnfold.training.train import save_checkpoint
    from bnfold.training.train import train as fit

    outputs = args.outputs or [Path(f"{args.factory.rpartition(':')[2]}.pt")]
    check_outputs(outputs, None, args.overwrite, (".pt", ".pth"))
    data = _labelled(args, args.data)
    tests = _labelled(args, args.test_data) if args.test_data else None
    torch.manual_seed(args.seed)
    module = build_module(args.factory)
    with _progress(args, "training") as progress:
        result = fit(
            module,
            data,
            test_data=tests,
            epochs=args.epochs,
            batch_size=args.batch_size,
            optimizer=args.optimizer,
            lr=args.lr,
            schedule=args.schedule,
            weight_decay=args.weight_decay,
            seed=args.seed,
            device=args.device,
            checkpoint=args.checkpoint,
            resume=args.resume,
            progress=progress,
        )
    done = _new("train", args, ())
    rows = [
        [e.epoch, f"{e.loss:.4f}", f"{100 * e.accuracy:.2f}", _percent(e.test_accuracy)]
        for e in result.history
    ]
    done["layers"] = {"head": ["epoch", "loss", "accuracy %", "test accuracy %"], "rows": rows}
    done["summary"] = f"Trained for {args.epochs} epochs."
    if result.test_accuracy is not None:
        done["summary"] += f" Test accuracy {_percent(result.test_accuracy)} %."
    example = torch.as_tensor(data[0][:1] if isinstance(data, tuple) else next(iter(data))[0][:1])
    figures = {"test_accuracy": result.test_accuracy, "epochs": args.epochs, "seed": args.seed}
    for path in outputs:
        save_checkpoint(
            path, result.module, model_spec=args.factory, example_input=example, metrics=figures
        )
        add_file(done, "checkpoint", path)
    return done


def _labelled(args: argparse.Namespace, spec: str) -> Any:
    """Samples and labels as two arrays, or the batches (x, y) that a factory gives."""
    import numpy as np

    data = _open_data(args, spec)
    if data.labels is None:
        first = next(iter(data))
        if isinstance(first, list | tuple) and len(first) == 2:
            return data
        raise UsageError(f"{spec} holds no labels; training needs them (array y in .npz).")
    return np.concatenate(list(data)), data.labels


def _open_data(args: argparse.Namespace, spec: str) -> Any:
    from bnfold.data import open_data

    if args.seed < 0:
        raise UsageError(f"--seed is {args.seed}; it must be 0 or more.")
    shapes = getattr(args, "shapes", None)
    shape = shapes[0][1] if shapes else None
    return open_data(
        spec,
        batch_size=args.batch_size,
        samples=args.samples,
        seed=args.seed,
        preprocess=args.preprocess,
        mean=args.mean,
        std=args.std,
        resize=args.resize,
        input_scale=args.input_scale,
        input_shape=shape and (None, *shape[1:]),
    )


def _unread(data: Any) -> list[str]:
    if not data.skipped:
        return []
    path, reason = next(iter(data.skipped.items()))
    return [f"{len(data.skipped)} images could not be read; the first: {path}: {reason}"]


def _layer_table(layers: Any) -> Report:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    head = ["layer", "channels", "KL before", "KL after", "W2 before", "W2 after", "scale s.e. %"]
    rows = [
        [
            layer.name,
            layer.num_features,
            number(layer.kl_before),
            number(layer.kl_after),
            number(layer.w2_before),
            number(layer.w2_after),
            number(100 * layer.scale_error),
        ]
        for layer in layers
    ]
    return {"head": head, "rows": rows}


def _output_table(outputs: Any) -> Report:
    rows = [
        ["mean entropy (nats)", f"{outputs.entropy_before:.3f}", f"{outputs.entropy_after:.3f}"],
        ["predictions agree", "", f"{100 * outputs.agreement:.1f} %"],
        ["histogram change", "", f"{100 * outputs.histogram_change:.1f} %"],
    ]
    return {"head": ["without labels", "before", "after"], "rows": rows}


def _accuracy_table(before: Any, after: Any, data: Any) -> Report:
    import numpy as np

    from bnfold.training.train import evaluate

    samples = (np.concatenate(list(data)), data.labels)
    rows = [["accuracy %", _percent(evaluate(before, samples)), _percent(evaluate(after, samples))]]
    return {"head": ["with the labels", "before", "after"], "rows": rows}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


@contextlib.contextmanager
def _progress(args: argparse.Namespace, what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on a terminal's stderr, nothing elsewhere."""
    from tqdm import tqdm

    hidden = args.quiet or args.json or not sys.stderr.isatty()
    with tqdm(desc=what, disable=hidden, leave=False) as bar:

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


# --- doctor --------------------------------------------------------------------------------------


def doctor(args: argparse.Namespace) -> Report:
    """`bnfold doctor`: versions, providers that really load, conflicts."""
    from bnfold.proof.runtime import available

    facts = available()
    done = _new("doctor", args, ())
    rows = [[key, _fact(value)] for key, value in _flat(facts)]
    done["facts"] = facts
    done["diagnostics"] = {"head": ["", "found"], "rows": rows}
    conflicts = [str(facts["conflict"])] if facts["conflict"] else []
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
    return {True: "yes", False: "no", None: "-"}.get(value, str(value))


# --- what they share -----------------------------------------------------------------------------


def _open(args: argparse.Namespace, path: Path) -> Any:
    from bnfold.reading.sniff import Kind, sniff
    from bnfold.reading.source import open_source

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


def _repairs(args: argparse.Namespace) -> tuple[str, ...]:
    """The exact repairs that were asked for."""
    return ("clamp", "border") if "all" in args.repairs else tuple(dict.fromkeys(args.repairs))


def _clean_up(args: argparse.Namespace) -> tuple[str, ...]:
    """What else is to be simplified."""
    everything = ("pad", "conv-chain", "dead-channels")
    return everything if "all" in args.clean_up else tuple(dict.fromkeys(args.clean_up))


def _changes_operators(args: argparse.Namespace) -> str | None:
    """The option that asks for more than new weights, if one does."""
    if args.repairs or args.clean_up:
        return "--repair" if args.repairs else "--clean-up"
    return "--input-mean" if args.input_mean is not None or args.input_std is not None else None


def _open_scaled(args: argparse.Namespace) -> Any:
    """The model of a verb that folds, its input's mean and std in front where they are given."""
    source = _open(args, args.model)
    if args.input_mean is None and args.input_std is None:
        if args.input_name is not None:
            raise UsageError("--input-name says which input --input-mean is about; give that too.")
        return source
    from bnfold.input_scaling import scale_input

    mean, std = args.input_mean or (0.0,), args.input_std or (1.0,)
    scaled = scale_input(source.graph, mean, std, args.input_name)
    note = "the network takes its input as it is; (x - mean) / std is part of it now"
    return replace(source, graph=scaled, notes=(*source.notes, note))


def _selection(args: argparse.Namespace) -> Any:
    from bnfold.folding.selection import Selection

    return Selection(tuple(args.keep), tuple(args.only))


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


def _add_fold(done: Report, result: Any) -> None:
    from bnfold.api import count_operators

    done["batch_norms"] = {
        "folded": [{"name": norm.name, "into": list(norm.into)} for norm in result.folded],
        "kept": [{"name": norm.name, "reason": norm.reason} for norm in result.kept],
        "absorbed": list(result.absorbed),
    }
    done["merged"] = [
        {"sum": merged.name, "into": merged.into, "layers": list(merged.layers)}
        for merged in result.merged
    ]
    done["operators"] = {
        "before": count_operators(result.original),
        "after": count_operators(result.graph),
    }


def _norms(count: int) -> str:
    return f"{count} batch norm{'s' * (count != 1)}"


def _fold_summary(found: int, result: Any) -> str:
    folded, producer = len(result.folded), result.original.producer_name
    others = len(result.absorbed)
    more = f" {others} Mul, Add, Sub or Div by constants went too." if others else ""
    if result.merged:
        count = len(result.merged)
        more += f" {count} convolution{'s' * (count > 1)} took in what stood around."
    if found == 0:
        hint = " (torch's exporter folds by itself unless optimize=False)"
        return f"There is no batch norm in the model{hint * (producer == 'pytorch')}.{more}"
    if folded == found:
        return (
            f"All {_norms(found)} folded.{more}" if found > 1 else f"The batch norm folded.{more}"
        )
    text = f"{folded} of {_norms(found)} folded; the reasons for the others are above.{more}"
    if any("--freeze-inputs" in kept.reason for kept in result.kept):
        text += " Pass --freeze-inputs if nobody overrides the weights as inputs."
    return text


def _undecided(gates: list[Report]) -> bool:
    """True where the algebra holds and the original is no measure for the numbers."""
    failed = [gate for gate in gates if not gate["passed"]]
    return any(gate["name"] == "original" for gate in failed) and not any(
        gate["gate"] == "A" for gate in failed
    )


def _add_proof(done: Report, proof: Any, *, is_fold: bool = True) -> None:
    found = proof.to_dict()
    done["gates"] = found.pop("gates")
    done["proof"] = found
    done["exit_code"] = 0 if proof.passed else 1
    gates = ", ".join(sorted({gate["gate"] for gate in done["gates"]}))
    if is_fold and "A" not in gates:
        done.setdefault("warnings", []).append(
            "Gate A, the algebra, was not checked: it needs the record that `bnfold fold` wrote."
        )
    if proof.passed:
        done["summary"] += f" Proved by gates {gates}: R = {proof.r:.2f} (limit 4)."
    elif _undecided(done["gates"]):
        done["summary"] += " NOT proved: the original's own float32 error leaves no room to judge."
    else:
        where = f" {proof.notes[-1]}" if proof.first_divergence else ""
        done["summary"] += f" NOT the same function.{where}"
    done["summary"] = done["summary"].strip()


VERBS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "fold": fold,
    "unfold": unfold,
    "inspect": inspect,
    "export": export,
    "verify": verify,
    "adapt": adapt,
    "train": train,
    "doctor": doctor,
}
