"""The fold record: what a fold did, in a small file that travels beside the folded model.

It holds the gauges of the plan and, for each batch norm that is gone, gamma, beta, mean, var and
eps: enough to check the fold, to undo it, and to adapt the folded network to another domain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnfold.errors import InputError
from bnfold.folding.affine import Array, Gauge
from bnfold.folding.apply import Folded
from bnfold.folding.plan import FoldPlan
from bnfold.folding.rules.node import real, weights
from bnfold.graph import replacing

SCHEMA = 1
_STATISTICS = ("gamma", "beta", "mean", "var")


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
class FoldRecord:
    """A fold by names of the original graph's values; see `bnfold.folding.affine.Gauge`."""

    norms: tuple[FoldedNorm, ...]
    gauges: Mapping[str, Gauge]
    aliases: Mapping[str, str]
    files: Mapping[str, str]  # "original", "folded": the SHA-256 of the files, where there are any

    def save(self, path: Path | str) -> None:
        """Write the record as safetensors, whole or not at all."""
        with replacing(path) as staged:
            self.write(staged)

    def write(self, path: Path) -> None:
        """Write the record in place."""
        from safetensors.numpy import save

        tensors: dict[str, np.ndarray] = {}
        for index, norm in enumerate(self.norms):
            for key, array in norm.statistics.items():
                tensors[f"norm.{index}.{key}"] = np.ascontiguousarray(array)
        for index, gauge in enumerate(self.gauges.values()):
            tensors[f"gauge.{index}.scale"] = np.array(gauge.scale, order="C")
            tensors[f"gauge.{index}.origin"] = np.array(gauge.origin, order="C")
        names = {
            "schema": SCHEMA,
            "norms": [
                {
                    "name": norm.name,
                    "into": list(norm.into),
                    "input": norm.input,
                    "output": norm.output,
                    "eps": norm.eps,
                }
                for norm in self.norms
            ],
            "gauges": list(self.gauges),
            "aliases": dict(self.aliases),
            "files": dict(self.files),
        }
        path.write_bytes(save(tensors, metadata={"bnfold": json.dumps(names)}))


def record_of(plan: FoldPlan, folded: Folded, files: Mapping[str, str] | None = None) -> FoldRecord:
    """The record of a plan that has been applied."""
    norms = tuple(
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
    gauges = {str(value.name): gauge for value, gauge in plan.gauges.items()}
    return FoldRecord(norms, gauges, dict(folded.aliases), dict(files or {}))


def load_record(path: Path | str) -> FoldRecord:
    """Read a record back. Raises InputError for a file that is none."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {})["bnfold"])
            if facts["schema"] != SCHEMA:
                raise InputError(
                    f"{path} is a fold record of schema {facts['schema']}; this bnfold reads"
                    f" schema {SCHEMA}."
                )
            norms = tuple(
                FoldedNorm(
                    norm["name"],
                    tuple(norm["into"]),
                    norm["input"],
                    norm["output"],
                    float(norm["eps"]),
                    {key: file.get_tensor(f"norm.{index}.{key}") for key in _STATISTICS},
                )
                for index, norm in enumerate(facts["norms"])
            )
            gauges = {
                name: Gauge(
                    file.get_tensor(f"gauge.{index}.scale"),
                    file.get_tensor(f"gauge.{index}.origin"),
                )
                for index, name in enumerate(facts["gauges"])
            }
            return FoldRecord(norms, gauges, facts["aliases"], facts["files"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{path} is not a fold record: {error}.") from error
