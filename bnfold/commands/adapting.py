"""`bnfold adapt`: the target's statistics in a new model of the same kind."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnfold import report
from bnfold.commands.adapted import check_adapted_outputs, write_adapted
from bnfold.commands.demands import unmet
from bnfold.commands.shared import (
    Report,
    new_report,
    open_samples,
    percent,
    progress_bar,
    provider_of,
    runtimes_of,
    unread,
)
from bnfold.errors import InputError, UsageError
from bnfold.outputs import add_file, beside, check_outputs
from bnfold.runs import adapted_sentence, add_proof, counted, domain_of
from bnfold.version import VERSION

if TYPE_CHECKING:
    from bnfold.adapting.adapt import AdaptResult
    from bnfold.adapting.targets import Target
    from bnfold.measuring.diagnosis import LayerShift, OutputShift
    from bnfold.measuring.ranks import Ranks


def adapt(args: argparse.Namespace) -> Report | None:
    """`bnfold adapt MODEL --target-data DATA`: measure, write, and fold what was folded.

    Under torchrun every process measures its share of the data; the first one writes and reports.
    """
    from bnfold.adapting.adapt import Asked, adapt_target
    from bnfold.data import shard
    from bnfold.measuring.ranks import group_from_environment
    from bnfold.measuring.statistics import Rule

    outputs = args.outputs or beside(args.model, "adapted", [_suffix(args.model)])
    if args.pack is not None:
        check_outputs([args.pack], args.model, args.overwrite, (".pack",))
    with group_from_environment(backend=args.backend) as ranks:
        target = _open_target(args)
        check_adapted_outputs(args, outputs, target.base)
        data = _samples(args, args.data, target)
        source = _samples(args, args.source_data, target) if args.source_data else None
        tests = _samples(args, args.test_data, target) if args.test_data else None
        share = shard(data, ranks.rank, ranks.size)
        with (
            _state(args, data, ranks) as (resumed, on_settled),
            progress_bar(args, "adapting") as progress,
        ):
            asked = Asked(
                method=args.method,
                rule=Rule(args.part, args.prior, args.source_weight, args.mixture),
                source_data=source and shard(source, ranks.rank, ranks.size),
                up_to=_depth(args.up_to),
                test_data=tests,
                stop=args.stop,
                precision=args.precision,
                max_bytes=_bytes(args.max_memory),
                progress=progress,
                ranks=ranks,
                resumed=resumed,
                on_settled=on_settled,
            )
            result = adapt_target(target, share, asked)
            notes = [f"{counted(len(resumed), 'layer')} settled before, by {args.state}"]
            notes = notes if resumed else []
            skipped = ranks.share(dict(getattr(share, "skipped", {})))
            if ranks.rank:
                return None
            return _report(args, outputs, target, result, data, skipped, notes)


# --- what is asked for ----------------------------------------------------------------------------


def _open_target(args: argparse.Namespace) -> Target:
    from bnfold.adapting.base import Reading
    from bnfold.adapting.targets import Options, target_of
    from bnfold.measuring.ranks import own_device

    reading = Reading(
        args.factory, args.shapes or (), args.opset, args.trust_pickle, args.freeze_inputs
    )
    options = Options(
        matched=args.source_data is not None,
        choice=args.layers,
        device=own_device(args.device),
        provider=provider_of(args),
    )
    return target_of(args.model, options, args.record, reading)


def _suffix(model: Path) -> str:
    """What an adapted model is written as, unless it is named."""
    from bnfold.reading.sniff import Kind, sniff

    return ".onnx" if sniff(model) is Kind.ONNX else ".pt"


def _samples(args: argparse.Namespace, spec: str, target: Target) -> Any:
    """Batches of the shape that the network's one input has, where that is known."""
    from bnfold.graph import graph_inputs

    model = target.base.graph
    inputs = list(graph_inputs(model).values()) if model is not None else []
    described = list((target.base.description.get("input") or {}).values())
    shape: Sequence[Any] | None = None
    if len(inputs) == 1 and inputs[0].shape is not None:
        shape = [size if isinstance(size, int) else None for size in inputs[0].shape]
    elif not inputs and len(described) == 1:
        shape = [None, *described[0][1:]]
    return open_samples(args, spec, shape)


def _bytes(mebibytes: int | None) -> int | None:
    if mebibytes is not None and mebibytes < 0:
        raise UsageError(f"--max-memory is {mebibytes}; it must not be negative.")
    return None if mebibytes is None else mebibytes << 20


def _depth(up_to: str | None) -> str | int | None:
    return int(up_to) if up_to is not None and up_to.isdecimal() else up_to


@contextlib.contextmanager
def _state(args: argparse.Namespace, data: Any, ranks: Ranks) -> Iterator[tuple[Any, Any]]:
    """What was settled before, and what takes down what is settled now; gone when all is done."""
    if args.state is None:
        yield {}, None
        return
    from bnfold.measuring.resume import State

    if args.method != "exact":
        raise UsageError("--state is of the exact method; the fast one is a single pass.")
    asked = ("data", "batch_size", "samples", "seed", "mean", "std", "resize", "input_scale")
    how = ("source_data", "layers", "up_to", "part", "prior", "source_weight", "mixture", "stop")
    identity = {name: getattr(args, name) for name in (*asked, *how, "preprocess", "factory")}
    identity |= {"model": report.sha256(args.model), "images": getattr(data, "images", None)}
    identity |= {"record": str(args.record), "input shape": args.shapes, "opset": args.opset}
    identity |= {"first batch": _sum_of(next(iter(data), None)), "version": VERSION}
    state = State.open(args.state, identity | {"processes": ranks.size}, ranks)
    yield dict(state.settled), state.add
    state.finish()


def _sum_of(batch: Any) -> str:
    """The SHA-256 over the arrays in a batch, by which other data of the same name are told."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, tuple | list):
            for item in value:
                add(item)
        elif hasattr(value, "shape"):
            found.update(np.ascontiguousarray(value).tobytes())

    add(batch)
    return found.hexdigest()


# --- what comes of it -----------------------------------------------------------------------------


def _report(
    args: argparse.Namespace,
    outputs: list[Path],
    target: Target,
    result: AdaptResult,
    data: Any,
    skipped: Sequence[Mapping[str, str]],
    notes: Sequence[str],
) -> Report:
    """The files, once they are proved, and what is said about them."""
    done = new_report("adapt", args, (*target.base.notes, *notes))
    done["layers"] = _layer_table(result.layers)
    if any(layer.kl_before is not None for layer in result.layers):
        done["domains"] = [domain_of(Path(args.data).name or args.data, result.layers)]
    done["skipped"] = [vars(layer) for layer in result.skipped]
    unreadable = {name: why for part in skipped for name, why in part.items()}
    done["warnings"] = [*result.warnings, *unread(unreadable)]
    if result.outputs is not None:
        done["diagnostics"] = _output_table(result.outputs)
    if result.accuracy is not None:
        done["accuracy"] = _accuracy_table(result.accuracy)
    done["summary"] = adapted_sentence(result)
    if result.fold is not None:
        done["summary"] += " The model is folded again."
        if not args.no_verify:
            where = runtimes_of(args)
            add_proof(done, result.fold.verify(runtimes=where, profile=report.pictured(args)))
    if done["exit_code"] or unmet(done, args):
        done["summary"] += " No file was written."
        return done
    _write(done, args, outputs, target, result, data)
    return done


def _write(
    done: Report,
    args: argparse.Namespace,
    outputs: list[Path],
    target: Target,
    result: AdaptResult,
    data: Any,
) -> None:
    """The network, with its graph where it can be exported, and the pack that was asked for."""
    base, adapted = target.base, result.adapted
    if adapted.graph is None and adapted.fold is None:
        graph, shapes, plain = _exported(done, adapted.model, data, args)
        base = replace(base, description={**base.description, "input": shapes, "plain": plain})
        adapted = replace(adapted, graph=graph)
    facts = {"method": result.method, "images": result.images, "data": args.data}
    pack = None
    if args.pack is not None:
        from bnfold.packs.pack import Pack

        pack = Pack.of(result, base=target.base, data=args.data)
    write_adapted(done, args, outputs, base, adapted, facts)
    if pack is not None:
        pack.save(args.pack)
        add_file(done, "pack", args.pack)


def _exported(
    done: Report, module: Any, data: Any, args: argparse.Namespace
) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
    """The adapted module's graph, its inputs' shapes, and the modules of plain torch classes."""
    import torch

    from bnfold.folding.module import plain_modules, scope_of
    from bnfold.graph import DEFAULT_OPSET, export_module, graph_inputs

    batch = next(iter(data))
    first = batch[0] if isinstance(batch, list | tuple) else batch
    if isinstance(first, Mapping):
        done["notes"].append("The checkpoint does not carry its graph: the batches are mappings.")
        return None, {}, {}
    example = torch.as_tensor(first)[:1]
    floats = next((p.dtype for p in module.parameters() if p.is_floating_point()), example.dtype)
    example = example.to(floats) if example.is_floating_point() else example
    try:
        graph = export_module(module, (example,), opset=args.opset or DEFAULT_OPSET)
    except InputError as error:
        done["notes"].append(f"The checkpoint does not carry its graph: {error}")
        return None, {}, {}
    shapes = {name: list(example.shape) for name in graph_inputs(graph)}
    return graph, shapes, plain_modules(scope_of(module, graph))


# --- tables ---------------------------------------------------------------------------------------


def _layer_table(layers: Sequence[LayerShift]) -> Report:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    head = ["layer", "channels", "KL before", "KL after", "W2 before", "W2 after", "scale s.e. %"]
    head.append("images needed")
    rows = [
        [
            layer.name,
            layer.num_features,
            number(layer.kl_before),
            number(layer.kl_after),
            number(layer.w2_before),
            number(layer.w2_after),
            number(100 * layer.scale_error),
            layer.images_needed if layer.images_needed is not None else "-",
        ]
        for layer in layers
    ]
    return {"head": head, "rows": rows}


def _output_table(outputs: OutputShift) -> Report:
    rows = [
        ["mean entropy (nats)", f"{outputs.entropy_before:.3f}", f"{outputs.entropy_after:.3f}"],
        ["predictions agree", "", f"{100 * outputs.agreement:.1f} %"],
        ["histogram change", "", f"{100 * outputs.histogram_change:.1f} %"],
    ]
    return {"head": ["without labels", "before", "after"], "rows": rows}


def _accuracy_table(accuracy: tuple[float, float]) -> Report:
    rows = [["accuracy %", *map(percent, accuracy)]]
    return {"head": ["with the labels", "before", "after"], "rows": rows}
