"""`bnfold export`, `verify` and `parity`."""

from __future__ import annotations

import argparse

from bnfold import report
from bnfold.commands.shared import (
    Report,
    new_report,
    open_model,
    runtimes_of,
    shapes_of,
)
from bnfold.errors import UsageError
from bnfold.outputs import (
    add_file,
    check_outputs,
    record_path,
)
from bnfold.runs import add_proof


def export(args: argparse.Namespace) -> Report:
    """`bnfold export MODEL`: the torch network as ONNX, batch norms in place."""
    from bnfold.api import count_operators
    from bnfold.graph import to_proto, write_onnx
    from bnfold.proof.verify import verify as prove
    from bnfold.reading.computed import held
    from bnfold.reading.sniff import Kind, sniff

    if sniff(args.model) is Kind.ONNX:
        raise UsageError(f"{args.model} is ONNX already; `bnfold fold` folds it.")
    outputs = args.outputs or [args.model.with_suffix(".onnx")]
    check_outputs(outputs, args.model, args.overwrite, (".onnx",))
    source = held(open_model(args, args.model))
    done = new_report("export", args, source.notes)
    operators = count_operators(source.graph)
    done["operators"] = {"before": operators, "after": operators}
    done["summary"] = f"Exported at opset {source.graph.opset_imports.get('')}."
    if not args.no_verify:
        proto = to_proto(source.graph)
        modules = (source.module, source.module) if source.module is not None else None
        proof = prove(proto, proto, runtimes=runtimes_of(args), torch_modules=modules)
        add_proof(done, proof, is_fold=False)
        if not proof.passed:
            done["summary"] += " No file was written."
            return done
    for path in outputs:
        write_onnx(source.graph, path)
        add_file(done, "export", path)
    return done


def verify(args: argparse.Namespace) -> Report:
    """`bnfold verify ORIGINAL FOLDED`: the gates, for any two models."""
    from bnfold.api import count_operators
    from bnfold.bisecting.bisect import add_bisection, bisect, check_folder
    from bnfold.commands.given import given_inputs
    from bnfold.folding.record import load_record
    from bnfold.graph import to_proto
    from bnfold.proof.verify import verify as prove
    from bnfold.reading.computed import held
    from bnfold.weight_ranges import weight_ranges

    if args.bisect is not None:
        check_folder(args.bisect)
    # as a fold reads them: its record is of weights that are held
    original, folded = (held(open_model(args, path)) for path in (args.original, args.folded))
    path = args.record or record_path(args.folded)
    record = load_record(path) if args.record is not None or path.is_file() else None
    done = new_report("verify", args, (*original.notes, *folded.notes))
    if record is not None and record.files.get("original") != report.sha256(args.original):
        done["notes"].append(f"{path} is the record of another original; gate A is left out")
        record = None
    elif record is not None and not record.is_of(report.sha256(args.folded)):
        done["notes"].append(
            f"{args.folded} is not what {path} was written for, or was changed since: gate A says"
            " whether it still is that fold"
        )
    modules = None
    if original.module is not None and folded.module is not None:
        modules = (original.module, folded.module)
    before, after = to_proto(original.graph), to_proto(folded.graph)
    gauges, aliases = (record.gauges, record.aliases) if record else (None, None)
    proof = prove(
        before,
        after,
        gauges=gauges,
        aliases=aliases,
        inputs=given_inputs(args, original),
        input_shapes=shapes_of(args, original),
        runtimes=runtimes_of(args),
        torch_modules=modules,
        seed=args.seed,
        samples=args.samples,
        profile=args.profile or report.pictured(args),
    )
    done["operators"] = {
        "before": count_operators(original.graph),
        "after": count_operators(folded.graph),
    }
    done["weights"] = weight_ranges(original.graph, folded.graph)
    add_proof(done, proof)
    if args.bisect is not None and not proof.passed:
        found = bisect(before, after, proof.fault, gauges=gauges, aliases=aliases)
        add_bisection(done, found, args.bisect)
    return done


def parity(args: argparse.Namespace) -> Report:
    """`bnfold parity MODEL`: gate C, for one model on many runtimes."""
    from bnfold.commands.given import given_inputs
    from bnfold.graph import to_proto
    from bnfold.proof.verify import parity as prove
    from bnfold.reading.computed import held

    source = held(open_model(args, args.model))
    done = new_report("parity", args, source.notes)
    proof = prove(
        to_proto(source.graph),
        runtimes=runtimes_of(args),
        inputs=given_inputs(args, source),
        input_shapes=shapes_of(args, source),
        torch_module=source.module,
        seed=args.seed,
        samples=args.samples,
        profile=args.profile or report.pictured(args),
    )
    add_proof(done, proof, is_fold=False)
    return done
