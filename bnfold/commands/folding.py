"""`bnfold fold`, `unfold` and `inspect`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bnfold import report
from bnfold.commands.demands import unmet
from bnfold.commands.shared import (
    Report,
    new_report,
    open_model,
    runtimes_of,
    shapes_of,
    timed,
)
from bnfold.errors import UsageError
from bnfold.outputs import (
    FORMATS,
    Writeback,
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
from bnfold.runs import add_fold, add_proof, besides, counted, fold_sentence

_NOT_RUN = (
    "The network's torch module was not at hand: the torch file holds the proved graph's weights by"
    " name and was not run. `bnfold verify` with --model runs it."
)


def fold(args: argparse.Namespace) -> Report:
    """`bnfold fold MODEL`: plan, apply, prove, write; no file appears when a gate fails."""
    from bnfold.api import fold_source

    outputs, writeback = _outputs_of_fold(args)
    record = args.record or record_path(outputs[0])
    if not args.dry_run:
        check_outputs(outputs, args.model, args.overwrite, FORMATS)
        check_outputs([record], args.model, args.overwrite, (".safetensors",))
    if args.bisect is not None and (args.no_verify or args.dry_run):
        raise UsageError(
            "--bisect takes apart a fold that failed its proof; it needs that proof:"
            " leave --no-verify and --dry-run out."
        )
    if args.bisect is not None:
        from bnfold.bisecting.bisect import check_folder

        check_folder(args.bisect)
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
            check_outputs(outputs, args.model, args.overwrite, FORMATS)
    done = new_report("fold", args, result.notes)
    if result.state_dict is not None and result.modules is None:
        done["warnings"] = [_NOT_RUN]
    add_fold(done, result)
    done["summary"] = fold_sentence(result)
    if args.dry_run or unmet(done, args):
        done["summary"] += f" Nothing was written{' (--dry-run)' * args.dry_run}."
        return timed(done, started)
    if not args.no_verify:
        proof = result.verify(
            runtimes=runtimes_of(args),
            profile=report.pictured(args),
            input_shapes=shapes_of(args, source),
        )
        add_proof(done, proof)
        if not proof.passed or unmet(done, args):
            done["summary"] += " No file was written."
            if args.bisect is not None and not proof.passed:
                _bisect(done, args, (source, writeback), result, proof)
            return timed(done, started)
    writers = {path: writer_of(path, args, result, source) for path in outputs}
    write_all(done, writers, (record, result.record), source=args.model)
    for path in outputs:
        if path.suffix.lower() == ".pt2":
            done["summary"] += f" Load the graph with torch.export.load('{path}').module()."
    return timed(done, started)


def _bisect(
    done: Report, args: argparse.Namespace, came: tuple[Any, Writeback], result: Any, proof: Any
) -> None:
    """`--bisect` of a fold that failed: the fewest batch norms, and the smallest models."""
    from bnfold.api import fold_source
    from bnfold.bisecting.bisect import add_bisection, bisect_fold, only
    from bnfold.folding.selection import Selection

    source, writeback = came

    def again(names: Sequence[str]) -> Any:
        return fold_source(
            source,
            writeback=writeback,
            repair=_repairs(args),
            selection=Selection((), only(names)),
            clean_up=_clean_up(args),
        )

    def prove(made: Any) -> Any:
        return made.verify(runtimes=runtimes_of(args))

    add_bisection(done, bisect_fold(result, again, proof, prove), args.bisect)


def unfold(args: argparse.Namespace) -> Report:
    """`bnfold unfold FOLDED`: the original, bit for bit; no file appears when a gate fails."""
    from bnfold.api import count_operators
    from bnfold.folding.record import load_record
    from bnfold.unfolding import check_belongs, open_folded, unfold_source

    outputs = args.outputs or [unfolded_beside(args.folded)]
    check_outputs(outputs, args.folded, args.overwrite, FORMATS)
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
    done = new_report("unfold", args, result.notes)
    before, after = count_operators(source.graph), count_operators(result.graph)
    done["operators"] = {"before": before, "after": after}
    done["summary"] = (
        f"{len(result.norms)} batch norms are back, every weight the original's bit for bit."
    )
    if not args.no_verify:
        proof = result.verify(runtimes=runtimes_of(args))
        add_proof(done, proof, is_fold=own_graph)
        if not proof.passed:
            done["summary"] += " No file was written."
            return timed(done, started)
    plain = {"layers": record.undo.layers, "norms": record.undo.norms}
    writers = {
        path: writer_of(path, args, result, source, kind="unfold", plain=plain) for path in outputs
    }
    hashes = write_all(done, writers, role="unfolded", source=args.folded)
    if record.files.get("original") in hashes.values():
        done["summary"] += " The file is the one that was folded, byte for byte."
    return timed(done, started)


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
    done = new_report("inspect", args, result.notes)
    add_fold(done, result)
    found = len(result.folded) + len(result.kept)
    text = f"{len(result.folded)} of {counted(found, 'batch norm')} fold exactly."
    done["summary"] = text if found or not besides(result) else f"No batch norm.{besides(result)}"
    args.verbose = True
    return done


def _outputs_of_fold(args: argparse.Namespace) -> tuple[list[Path], Writeback]:
    """The files that a fold is to write, and what a torch network is to come back as for them."""
    from bnfold.reading.sniff import sniff

    kind, in_graph = sniff(args.model), _changes_operators(args)
    suffixes = default_suffixes(kind)[: 1 if in_graph is not None else None]
    outputs = args.outputs or beside(args.model, "folded", suffixes)
    writeback = writeback_of(outputs, named=bool(args.outputs))
    holds = writeback == "graph" and in_graph == "--repair" and not args.clean_up
    if writeback is not None and in_graph is not None and not holds:
        raise UsageError(f"{in_graph} changes operators, not only weights: write .onnx only.")
    return outputs, writeback


def _repairs(args: argparse.Namespace) -> tuple[str, ...]:
    """The exact repairs that were asked for."""
    from bnfold.folding.rules.repairs import REPAIRS

    return tuple(REPAIRS if "all" in args.repairs else dict.fromkeys(args.repairs))


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
    source = open_model(args, args.model)
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
