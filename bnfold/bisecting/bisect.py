"""A fold that fails, reduced to what breaks it, and written so that anybody can look at it.

Of two models: the batch norm at the first wrong value, cut out of both (minimal.py). Of a
fold of bnfold's own, first the fewest batch norms whose folding alone fails, then the same.
"""

from __future__ import annotations

import contextlib
import glob
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from bnfold import graph
from bnfold.bisecting.minimal import MinimalPair, fewest, minimal_pair
from bnfold.errors import UsageError
from bnfold.proof.result import VerifyReport
from bnfold.proof.verify import verify

if TYPE_CHECKING:
    from bnfold.api import FoldResult
    from bnfold.proof.algebra.certificate import Gauge
    from bnfold.proof.fault.finding import Finding

FILES = ("original.onnx", "folded.onnx", "inputs.npz")


@dataclass(frozen=True, eq=False)
class Bisection:
    """What a failing fold was reduced to.

    norms: of a fold of bnfold's own, the fewest batch norms whose folding fails. pair: the smallest
    models that fail, None where no piece does; sentence: what came out, or why nothing did.
    """

    pair: MinimalPair | None
    sentence: str
    norms: tuple[str, ...] = ()


def bisect(
    original: onnx.ModelProto,
    folded: onnx.ModelProto,
    finding: Finding | None,
    *,
    gauges: Mapping[str, Gauge] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Bisection:
    """Two models that failed `verify`, reduced to the smallest pieces that fail by themselves.

    finding: the report's `fault`. gauges, aliases: the fold's plan, if it is known. Raises
    InputError where a model cannot be run in float64.
    """
    if finding is None or finding.first is None:
        why = "where the two part is not known" if finding is None else "in float64 the two agree"
        return Bisection(None, f"There is nothing to bisect: {why}.")
    pair = minimal_pair(original, folded, finding, gauges=gauges, aliases=aliases)
    if pair is None:
        return Bisection(
            None, "No piece of the network fails by itself: the error gathers over many layers."
        )
    whose = f"batch norm '{pair.norm}'" if pair.norm else f"what computes '{pair.value}'"
    sizes = f"{len(pair.original.graph.node)} of {len(original.graph.node)} nodes"
    return Bisection(pair, f"It comes down to {whose}: {sizes} fail by themselves.")


def bisect_fold(
    result: FoldResult,
    again: Callable[[Sequence[str]], FoldResult],
    proof: VerifyReport,
    prove: Callable[[FoldResult], VerifyReport] | None = None,
) -> Bisection:
    """A fold that failed its proof, reduced to the fewest batch norms whose folding fails.

    again: folds the same network with these batch norms alone. proof: of `result`; prove: what
    gives it (default: `FoldResult.verify`). Raises BnfoldError as folding and verifying do.
    """
    prove = prove or (lambda made: made.verify())
    names = list(dict.fromkeys(norm.name for norm in result.folded))
    plain = graph.to_proto(result.original)
    if not names:
        return Bisection(None, "There is nothing to bisect: no batch norm was folded.")
    if not verify(plain, plain).passed:
        why = "the original does not match its own float64 evaluation"
        return Bisection(None, f"There is nothing to bisect: {why}, whatever is folded.")
    proofs: dict[frozenset[str], tuple[FoldResult, VerifyReport]] = {
        frozenset(names): (result, proof)
    }

    def fails(chosen: Sequence[str]) -> bool:
        made = again(chosen)
        proofs[frozenset(chosen)] = made, prove(made)
        return not proofs[frozenset(chosen)][1].passed

    left = fewest(names, fails)
    made, proof = proofs[frozenset(left)]
    record = made.record
    found = bisect(
        plain,
        graph.to_proto(made.graph),
        proof.fault,
        gauges=record.gauges,
        aliases=record.aliases,
    )
    told = f"Of {len(names)} batch norms folded, {_listed(left)} alone fails."
    return replace(found, norms=tuple(left), sentence=f"{told} {found.sentence}")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def only(names: Sequence[str]) -> tuple[str, ...]:
    """Patterns that match these batch norms' names, whatever is in them."""
    return tuple(glob.escape(name) for name in names)


# ------------------------------------------------------------------------------------ the files


def check_folder(folder: Path) -> None:
    """Refuse a folder before any work. Raises UsageError."""
    if not folder.parent.is_dir():
        raise UsageError(f"--bisect {folder}: there is no folder {folder.parent}.")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--bisect {folder} is a file; name a folder.")
    for name in FILES:
        if (folder / name).exists():
            raise UsageError(f"--bisect: {folder / name} exists; name another folder.")


def add_bisection(done: dict[str, Any], bisection: Bisection, folder: Path) -> None:
    """Write the models and their inputs, all or none, and tell of them in a report."""
    from bnfold.outputs import add_file

    done["summary"] += f" {bisection.sentence}"
    if bisection.pair is None:
        return
    write(bisection.pair, folder)
    for name in FILES:
        add_file(done, f"bisected {name.split('.')[0]}", folder / name)
    done["summary"] += (
        f" Look at it with `bnfold verify {folder / FILES[0]} {folder / FILES[1]}"
        f" --data {folder / FILES[2]}`."
    )


def write(pair: MinimalPair, folder: Path) -> None:
    """original.onnx, folded.onnx and inputs.npz in a folder, all of them or none.

    Raises UsageError where they cannot be written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"Cannot make the folder {folder}: {error.strerror or error}.") from error
    try:
        with contextlib.ExitStack() as stack:
            staged = [stack.enter_context(graph.replacing(folder / name)) for name in FILES]
            staged[0].write_bytes(pair.original.SerializeToString())
            staged[1].write_bytes(pair.folded.SerializeToString())
            _write_arrays(staged[2], pair.inputs)
    except UsageError:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """An .npz of arrays under any names, also those that are no names of arguments."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.ascontiguousarray(array), allow_pickle=False)
