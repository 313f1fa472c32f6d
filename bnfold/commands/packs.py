"""`bnfold pack`: make, show, apply, diff, keygen; arguments in, a report out."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bnfold import report
from bnfold.adapting.base import Adapted, Base, Reading, open_base
from bnfold.commands.adapted import check_adapted_outputs, write_adapted
from bnfold.commands.shared import new_report, runtimes_of, timed
from bnfold.errors import InputError, UsageError, VerificationError
from bnfold.graph import parse_onnx, to_bytes, to_proto
from bnfold.measuring.statistics import Statistics
from bnfold.outputs import (
    Report,
    add_file,
    beside,
    check_outputs,
)
from bnfold.packs import signing
from bnfold.packs.pack import LayerDiff, Pack, diff, load_pack
from bnfold.runs import add_proof, counted


def make(args: argparse.Namespace) -> Report:
    """`pack make ADAPTED --base BASE`: the statistics in which the two differ."""
    path = _only_output(args, args.adapted.with_suffix(".pack"))
    check_outputs([path], args.adapted, args.overwrite, (".pack",))
    adapted = open_base(args.adapted, reading=Reading(args.factory))
    base = open_base(args.base, args.record, Reading(args.factory))
    _check_same_weights(adapted, base)
    said = adapted.description.get("metrics") or {}
    made = Pack.of(
        _differing(adapted, base),
        base=base,
        method=args.method or str(said.get("method", "")),
        images=args.images if args.images is not None else said.get("images"),
        data=args.data or str(said.get("data", "")),
    )
    made.save(path, sign=args.sign)
    done = _report("make", args, adapted=args.adapted, base=args.base)
    add_file(done, "pack", path)
    done["layers"] = _layers(made)
    size, whole = path.stat().st_size, args.base.stat().st_size
    signed = "signed" if args.sign is not None else "not signed"
    done["summary"] = (
        f"The statistics of {counted(len(made.layers), 'batch norm')}: {size} bytes"
        f" ({100 * size / whole:.2g} % of the base), {signed}."
    )
    return done


def show(args: argparse.Namespace) -> Report:
    """`pack show PACK`: what it holds, and that it is whole."""
    pack = load_pack(args.pack, args.public_key)
    done = _report("show", args, pack=args.pack)
    signed = "no"
    if pack.signed_by is not None:
        checked = "checked" if args.public_key is not None else "not checked: give --public-key"
        signed = f"by {pack.signed_by} ({checked})"
    facts = {
        "data": pack.data or "-",
        "method": pack.method or "-",
        "images": "-" if pack.images is None else pack.images,
        **{f"option {name}": value for name, value in pack.options.items()},
        **{f"base: {name}": digest for name, digest in pack.base.items()},
        "signed": signed,
        "sha256": pack.sha256,
        "made with": pack.version,
    }
    done["diagnostics"] = {"head": ["", "found"], "rows": [[k, str(v)] for k, v in facts.items()]}
    done["layers"] = _layers(pack)
    channels = sum(layer.mean.size for layer in pack.layers.values())
    done["summary"] = (
        f"{counted(len(pack.layers), 'batch norm')}, {channels} channels; the pack is whole."
    )
    return done


def apply(args: argparse.Namespace) -> Report:
    """`pack apply BASE PACK`: the base with the pack's statistics; no file where a gate fails."""
    outputs = args.outputs or beside(args.base, "adapted", [args.base.suffix])
    started = time.perf_counter()
    pack = load_pack(args.pack, args.public_key)
    base = open_base(args.base, args.record, Reading(args.factory))
    check_adapted_outputs(args, outputs, base)
    adapted = pack.applied(base)
    done = _report("apply", args, base=args.base, pack=args.pack)
    done["summary"] = f"The pack's statistics are in {counted(len(pack.layers), 'batch norm')}."
    if adapted.fold is not None:
        done["notes"] += adapted.fold.notes
    if not args.no_verify:
        _prove(done, args, pack, base, adapted)
        if done["exit_code"]:
            done["summary"] += " No file was written."
            return timed(done, started)
    write_adapted(done, args, outputs, base, adapted, {"pack": str(args.pack)})
    return timed(done, started)


def compare(args: argparse.Namespace) -> Report:
    """`pack diff PACK OTHER`: per layer, how far the other's statistics are from the first's."""
    a, b = (load_pack(path, args.public_key) for path in (args.pack, args.other))
    rows = diff(a, b)
    done = _report("diff", args, pack=args.pack, other=args.other)
    head = ["layer", "channels", "KL", "W2", "largest move of a mean (sd)", "of a sd (relative)"]
    done["layers"] = {"head": head, "rows": [_row(row) for row in rows]}
    if rows:
        apart = [{"name": row.name, "kl_before": row.kl, "kl_after": None} for row in rows]
        name = f"{args.other.name} against {args.pack.name}"
        done["domains"] = [{"name": name, "layers": apart}]
    alone = [name for name in {**a.layers, **b.layers} if (name in a.layers) != (name in b.layers)]
    if alone:
        done["warnings"] = [f"{len(alone)} layers are in one pack alone, the first: {alone[0]}."]
    done["summary"] = "The packs have no layer in common."
    if rows:
        farthest = max(rows, key=lambda row: row.w2)
        mean = float(np.mean([row.w2 for row in rows]))
        done["summary"] = (
            f"{len(rows)} layers, mean W2 {mean:.3g}; '{farthest.name}' is farthest apart"
            f" ({farthest.w2:.3g})."
        )
    return done


def keygen(args: argparse.Namespace) -> Report:
    """`pack keygen -o NAME`: NAME.pem, to be kept, and NAME.pub.pem, to be given away."""
    path = args.output if args.output.suffix == ".pem" else Path(f"{args.output}.pem")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}.")
    private, public = signing.generate(path)
    done = _report("keygen", args)
    done["files"] += [{"role": "private key", "path": str(private)}]
    add_file(done, "public key", public)
    done["summary"] = (
        f"Sign with --sign {private}, which nobody else should have; check with --public-key"
        f" {public}."
    )
    return done


ACTIONS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "make": make,
    "show": show,
    "apply": apply,
    "diff": compare,
    "keygen": keygen,
}


# --- making ---------------------------------------------------------------------------------------


def _check_same_weights(adapted: Base, base: Base) -> None:
    """Raises InputError where more than statistics differs: a pack would not hold that."""
    ours, theirs = base.weights(), adapted.weights()
    stand = {
        name
        for network in (base, adapted)
        for held in network.layers.values()
        for name in held.stands
    }
    common = [name for name in ours if name in theirs and name not in stand]
    other = [
        name
        for name in common
        if not name.endswith("num_batches_tracked")
        and (
            ours[name].shape != theirs[name].shape or ours[name].tobytes() != theirs[name].tobytes()
        )
    ]
    if other or not common:
        what = f"the weight '{other[0]}' differs" if other else "they have no weight in common"
        raise InputError(
            f"{adapted.label} is not {base.label} with other statistics: {what}"
            f" ({len(other)} in all). A pack holds statistics alone."
        )


def _differing(adapted: Base, base: Base) -> dict[str, Statistics]:
    there = base.layers
    found = {}
    for name, held in adapted.layers.items():
        if name not in there:
            raise InputError(f"{base.label} has no batch norm '{name}', which {adapted.label} has.")
        mean, var = held.mean.astype(np.float64), held.var.astype(np.float64)
        if not (np.array_equal(mean, there[name].mean) and np.array_equal(var, there[name].var)):
            found[name] = Statistics(mean, var)
    if not found:
        raise InputError(f"{adapted.label} has the statistics of {base.label}: nothing to pack.")
    return found


def _only_output(args: argparse.Namespace, default: Path) -> Path:
    outputs: list[Path] = args.outputs or [default]
    if len(outputs) > 1:
        raise UsageError("A pack goes into one file; name one -o.")
    return outputs[0]


# --- applying -------------------------------------------------------------------------------------


def _prove(
    done: Report, args: argparse.Namespace, pack: Pack, base: Base, adapted: Adapted
) -> None:
    """The gates; of what is not folded also that the statistics alone are new, bit by bit."""
    from bnfold.proof.verify import verify

    runtimes = runtimes_of(args)
    if adapted.fold is not None:
        add_proof(done, adapted.fold.verify(runtimes=runtimes))
        return
    _check_nothing_else(pack, base, adapted)
    if adapted.graph is None:
        done["warnings"] = ["The checkpoint carries no graph and was not run; --model names it."]
        return
    expected = _expected_graph(pack, base)
    add_proof(done, verify(expected, to_proto(adapted.graph), runtimes=runtimes), is_fold=False)


def _expected_graph(pack: Pack, base: Base) -> onnx.ModelProto:
    """The base with the pack's numbers, put into the file's own tensors and by nothing else."""
    assert base.graph is not None
    stands: dict[str, Any] = {}
    for name, layer in pack.layers.items():
        stands.update(zip(base.layers[name].stands, (layer.mean, layer.var), strict=True))
    proto = to_proto(base.graph)
    for tensor in proto.graph.initializer:
        if tensor.name in stands:
            tensor.CopyFrom(onnx.numpy_helper.from_array(stands[tensor.name], tensor.name))
    return proto


def _check_nothing_else(pack: Pack, base: Base, adapted: Adapted) -> None:
    """Raises VerificationError where a weight is neither the base's nor the pack's."""
    pairs = []
    if adapted.graph is not None:
        pairs.append((Base("", {}, base.graph), Base("", {}, parse_onnx(to_bytes(adapted.graph)))))
    if adapted.state_dict is not None:
        was = Base("", {}, state_dict=base.state_dict, module=base.module)
        pairs.append((was, Base("", {}, state_dict=adapted.state_dict)))
    for source, written in pairs:
        expected, after = source.weights(), written.weights()
        for name, layer in pack.layers.items():
            expected.update(zip(source.layers[name].stands, (layer.mean, layer.var), strict=True))
        names = expected.keys() | after.keys()
        wrong = [n for n in sorted(names) if _bits(expected.get(n)) != _bits(after.get(n))]
        if wrong:
            raise VerificationError(
                f"'{wrong[0]}' is neither the base's nor the pack's. No file was written."
            )


def _bits(array: Any) -> bytes | None:
    return None if array is None else bytes(array.tobytes())


# --- what they share ------------------------------------------------------------------------------


def _report(action: str, args: argparse.Namespace, **files: Path) -> Report:
    done = new_report(f"pack {action}", args, ())
    for role, path in files.items():
        done["files"].append({"role": role, "path": str(path), "sha256": report.sha256(path)})
    return done


def _layers(pack: Pack) -> dict[str, Any]:
    rows = [
        [name, layer.mean.size, layer.mean.dtype.name, "-" if layer.eps is None else layer.eps]
        for name, layer in pack.layers.items()
    ]
    return {"head": ["layer", "channels", "type", "eps"], "rows": rows}


def _row(row: LayerDiff) -> list[Any]:
    figures = (row.kl, row.w2, row.mean_move, row.sd_move)
    return [row.name, row.num_features, *(f"{figure:.3g}" for figure in figures)]


def pack(args: argparse.Namespace) -> Report:
    """`bnfold pack ACTION`: statistics of a domain in a file of their own."""
    return ACTIONS[args.action](args)
