"""`bnfold adapt`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnfold.commands.shared import (
    Report,
    new_report,
    open_samples,
    percent,
    progress_bar,
    unread,
)
from bnfold.errors import BnfoldError, InputError
from bnfold.outputs import (
    add_file,
    beside,
    check_outputs,
)


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
    data = open_samples(args, args.data)
    with progress_bar(args, "adapting") as progress:
        result = estimate(module.eval(), data, method=args.method, progress=progress)
    done = new_report("adapt", args, notes)
    done["layers"] = _layer_table(result.layers)
    done["skipped"] = [vars(layer) for layer in result.skipped]
    done["warnings"] = [*result.warnings, *unread(data)]
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
    rows = [["accuracy %", percent(evaluate(before, samples)), percent(evaluate(after, samples))]]
    return {"head": ["with the labels", "before", "after"], "rows": rows}
