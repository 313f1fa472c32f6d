"""The fold record: what a fold did, in a small file that travels beside the folded model.

It holds the gauges of the plan; for each batch norm that is gone gamma, beta, mean, var and eps;
and what it takes to undo the fold bit for bit. Enough to check the fold, to undo it, and to adapt
the folded network to another domain. The format is described in docs/record.md.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnfold.errors import InputError, one_line
from bnfold.folding.affine import Array, Gauge
from bnfold.folding.apply import Folded
from bnfold.folding.plan import FoldPlan
from bnfold.folding.rules.node import real, weights
from bnfold.folding.scope import Scope
from bnfold.folding.told import AnyArray, Told
from bnfold.folding.undo import TorchSide, Undo, undo_of
from bnfold.graph import replacing

Streams = Mapping[str, bytes]

SCHEMA = 2
_STATISTICS = ("gamma", "beta", "mean", "var")
# what a stream may unpack to; a file that wants more is a decompression bomb
_ROOM, _RATIO = 2**28, 64


@dataclass(frozen=True)
class FoldedNorm:
    """A batch norm that is gone: its name, what took it up, and what it was.

    input, output: the names of its values in the original graph. statistics: gamma, beta, mean and
    var, each (num_features,) float64.
    """

    name: str
    into: tuple[str, ...]
    input: str
    output: str
    eps: float
    statistics: Mapping[str, Array]


@dataclass(frozen=True)
class Choices:
    """What a fold was asked for; the same again, with other statistics, is the same fold.

    repairs, clean_up, keep, only: as `bnfold.fold` takes them. scope: what could change of a torch
    network; None: every constant of the graph.
    """

    repairs: tuple[str, ...] = ()
    clean_up: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    scope: Scope | None = None


@dataclass(frozen=True)
class FoldRecord:
    """A fold by names of the original graph's values; see `bnfold.folding.affine.Gauge`.

    choices: None in a record of before there were any.
    """

    norms: tuple[FoldedNorm, ...]
    gauges: Mapping[str, Gauge]
    aliases: Mapping[str, str]
    files: Mapping[str, str]  # "original", and the folded by name: the files' SHA-256
    undo: Undo
    choices: Choices | None = None

    def save(self, path: Path | str) -> None:
        """Write the record as safetensors, whole or not at all."""
        with replacing(path) as staged:
            self.write(staged)

    def write(self, path: Path) -> None:
        """Write the record in place."""
        from safetensors.numpy import save

        pool = _Pool()
        facts: dict[str, Any] = {
            "norms": [_norm_facts(norm, pool) for norm in self.norms],
            "gauges": {
                name: [pool.add(gauge.scale), pool.add(gauge.origin)]
                for name, gauge in self.gauges.items()
            },
            "aliases": dict(self.aliases),
            "undo": _undo_facts(self.undo, pool),
        }
        if self.choices is not None:
            facts["choices"] = _choices_facts(self.choices)
        streams = {"facts": json.dumps(facts).encode(), "graph": self.undo.graph, **pool.streams()}
        packed = {
            name: np.frombuffer(zlib.compress(stream, 9), np.uint8)
            for name, stream in streams.items()
        }
        about = {"schema": SCHEMA, "files": dict(self.files)}
        path.write_bytes(save(packed, metadata={"bnfold": json.dumps(about)}))

    def is_of(self, sha256: str) -> bool:
        """True if a file of this hash is one that was folded, as far as the record says."""
        folded = [digest for name, digest in self.files.items() if name != "original"]
        return not folded or sha256 in folded


def norms_of(plan: FoldPlan) -> tuple[FoldedNorm, ...]:
    """The batch norms that a plan removes."""
    return tuple(
        FoldedNorm(
            removed.name,
            removed.into,
            str(removed.node.inputs[0].name) if removed.node.inputs[0] is not None else "",
            str(removed.node.outputs[0].name),
            real(removed.node, "epsilon", 1e-5),
            {key: weights(removed.node, slot + 1) for slot, key in enumerate(_STATISTICS)},
        )
        for removed in plan.removed
    )


def gauges_of(plan: FoldPlan) -> dict[str, Gauge]:
    """The gauges of a plan by the names of the values."""
    return {str(value.name): gauge for value, gauge in plan.gauges.items()}


def record_of(
    plan: FoldPlan,
    folded: Folded,
    torch_side: TorchSide | None = None,
    choices: Choices | None = None,
) -> FoldRecord:
    """The record of a plan that has been applied; choices: what it was asked for."""
    undo = undo_of(plan, folded, torch_side)
    return FoldRecord(norms_of(plan), gauges_of(plan), dict(folded.aliases), {}, undo, choices)


def load_record(path: Path | str) -> FoldRecord:
    """Read a record back. Raises InputError for a file that is none, or of another schema."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})["bnfold"])
            if about["schema"] != SCHEMA:
                raise InputError(
                    f"{path} is a fold record of schema {about['schema']}; this bnfold reads"
                    f" schema {SCHEMA}. Read it with the bnfold that wrote it, or fold again."
                )
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        most = _ROOM + _RATIO * path.stat().st_size
        streams = {name: _unpacked(array, most) for name, array in packed.items()}
        return _record(json.loads(streams["facts"]), streams, about["files"])
    except FileNotFoundError:
        raise InputError(f"There is no fold record at {path}; --record names it.") from None
    except _BROKEN as error:
        text = one_line(error)
        raise InputError(f"{path} is not a fold record, or is damaged: {text}.") from error
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a fold record, or was cut short: {error}. `bnfold fold` writes one."
        ) from error


# what a file that only looks like a record makes of the code below
_BROKEN = (KeyError, TypeError, ValueError, IndexError, AttributeError, OSError, zlib.error)


def _unpacked(array: AnyArray, most: int) -> bytes:
    unpack = zlib.decompressobj()
    stream = unpack.decompress(array.tobytes(), most)
    if not unpack.eof:
        raise ValueError("a part of it is cut short, or too large")
    return stream


def _record(facts: Any, streams: Streams, files: Mapping[str, str]) -> FoldRecord:
    norms = tuple(
        FoldedNorm(
            norm["name"],
            tuple(norm["into"]),
            norm["input"],
            norm["output"],
            float(norm["eps"]),
            {key: _taken(streams, norm[key]).astype(np.float64) for key in _STATISTICS},
        )
        for norm in facts["norms"]
    )
    gauges = {
        str(name): Gauge(_taken(streams, scale), _taken(streams, origin))
        for name, (scale, origin) in facts["gauges"].items()
    }
    aliases = {str(a): str(b) for a, b in facts["aliases"].items()}
    hashes = {str(a): str(b) for a, b in files.items()}
    undo, choices = _undo(facts["undo"], streams), _choices(facts.get("choices"))
    return FoldRecord(norms, gauges, aliases, hashes, undo, choices)


# --- arrays: each one once, whatever refers to it -------------------------------------------------


class _Pool:
    """Arrays as references into streams, one for each type; equal arrays are held once."""

    def __init__(self) -> None:
        self._parts: dict[str, list[bytes]] = {}
        self._known: dict[tuple[str, bytes], int] = {}
        self._ends: Counter[str] = Counter()

    def add(self, array: AnyArray) -> list[Any]:
        """What refers to the array: its type, where it begins in the type's stream, its shape."""
        dtype, data = array.dtype.name, np.ascontiguousarray(array).tobytes()
        if (dtype, data) not in self._known:
            self._known[dtype, data] = self._ends[dtype]
            self._parts.setdefault(dtype, []).append(data)
            self._ends[dtype] += len(data) // array.dtype.itemsize
        return [dtype, self._known[dtype, data], list(array.shape)]

    def add_exactly(self, array: Array) -> list[Any]:
        """A float64 array in float32 where that is the same numbers."""
        with np.errstate(over="ignore"):
            narrow = array.astype(np.float32)
        return self.add(narrow if np.array_equal(narrow, array) else array)

    def streams(self) -> dict[str, bytes]:
        """The arrays of each type, one after the other, by the type's name."""
        return {dtype: b"".join(parts) for dtype, parts in self._parts.items()}


def _taken(streams: Streams, reference: Any) -> AnyArray:
    name, begin, shape = reference
    dtype, sizes = np.dtype(name), [int(size) for size in shape]
    count, offset = math.prod(sizes), int(begin) * dtype.itemsize
    return np.frombuffer(streams[name], dtype, count, offset).reshape(sizes)


# --- the parts of the file ------------------------------------------------------------------------


def _norm_facts(norm: FoldedNorm, pool: _Pool) -> dict[str, Any]:
    facts = {
        "name": norm.name,
        "into": list(norm.into),
        "input": norm.input,
        "output": norm.output,
        "eps": norm.eps,
    }
    return facts | {key: pool.add_exactly(array) for key, array in norm.statistics.items()}


def _choices_facts(choices: Choices) -> dict[str, Any]:
    scope = choices.scope
    return {
        "repairs": list(choices.repairs),
        "clean_up": list(choices.clean_up),
        "keep": list(choices.keep),
        "only": list(choices.only),
        "scope": scope
        and {
            "parameters": sorted(scope.parameters),
            "layers": sorted(scope.layers),
            "norms": sorted(scope.norms),
            "one_value": scope.one_value,
            "watched": dict(scope.watched),
            "closed": scope.closed,
            "maps": sorted(scope.maps),
            "forms": dict(scope.forms),
        },
    }


def _choices(facts: Any) -> Choices | None:
    if facts is None:
        return None

    def listed(held: Any, key: str) -> tuple[str, ...]:
        return tuple(str(name) for name in held[key])

    scope, held = None, facts["scope"]
    if held is not None:
        scope = Scope(
            frozenset(listed(held, "parameters")),
            frozenset(listed(held, "layers")),
            frozenset(listed(held, "norms")),
            bool(held["one_value"]),
            {str(value): str(hooked) for value, hooked in held["watched"].items()},
            str(held["closed"]),
            frozenset(str(name) for name in held.get("maps", ())),
            {str(node): str(path) for node, path in held.get("forms", {}).items()},
        )
    return Choices(
        listed(facts, "repairs"),
        listed(facts, "clean_up"),
        listed(facts, "keep"),
        listed(facts, "only"),
        scope,
    )


def _undo_facts(undo: Undo, pool: _Pool) -> dict[str, Any]:
    return {
        "told": {
            name: {
                "source": told.source,
                "shape": list(told.shape),
                "view": list(told.view),
                "factors": [pool.add(factor) for factor in told.factors],
                "upper": pool.add(told.upper),
                "places": pool.add(told.places),
                "fixes": pool.add(told.fixes),
            }
            for name, told in undo.told.items()
        },
        "kept": {name: pool.add(array) for name, array in undo.kept.items()},
        "digests": dict(undo.digests),
        "state": list(undo.names),
        "layers": list(undo.layers),
        "norms": list(undo.norms),
        "built": {name: dict(how) for name, how in undo.built.items()},
    }


def _undo(facts: Any, streams: Streams) -> Undo:
    told = {
        str(name): Told(
            str(entry["source"]),
            tuple(int(size) for size in entry["shape"]),
            tuple(int(size) for size in entry["view"]),
            tuple(_taken(streams, factor) for factor in entry["factors"]),
            *(_taken(streams, entry[key]) for key in ("upper", "places", "fixes")),
        )
        for name, entry in facts["told"].items()
    }
    return Undo(
        streams["graph"],
        told,
        {str(name): _taken(streams, entry) for name, entry in facts["kept"].items()},
        {str(name): str(digest) for name, digest in facts["digests"].items()},
        tuple(str(name) for name in facts["state"]),
        tuple(str(name) for name in facts["layers"]),
        tuple(str(name) for name in facts["norms"]),
        {str(name): dict(how) for name, how in facts["built"].items()},
    )
