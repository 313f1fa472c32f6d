"""What a proof came to: the gates' results, where the networks ran, what is wrong and where."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bnfold.errors import NothingComparedError, VerificationError
from bnfold.jsonable import plain
from bnfold.proof.algebra.certificate import Certificate
from bnfold.proof.fault.cause import Cause
from bnfold.proof.fault.divergence import Divergence
from bnfold.proof.fault.finding import Finding
from bnfold.proof.fault.profile import Profile
from bnfold.proof.figures.verdicts import Decisions, GateResult
from bnfold.proof.places.runtimes import R_LIMIT


@dataclass(frozen=True)
class Ran:
    """One network's run in one place, and what shows that it ran there.

    name: the runtime as written; role: whose network; gate: B or C. providers: where onnxruntime
    placed the nodes (provider -> operator -> count; empty for torch). libraries: the files of CUDA,
    cuDNN and TensorRT that its process had in memory. noise: the relative difference of two runs of
    one session and of one in another. ratio: its worst error ratio. None where nothing was
    measured.
    """

    name: str
    role: str
    gate: str
    providers: Mapping[str, Mapping[str, int]]
    libraries: tuple[str, ...]
    own_process: bool
    noise: float | None
    ratio: float | None


@dataclass(frozen=True)
class VerifyReport:
    """The gates' results; `passed` is true when all ran that could be asked for, and all passed.

    question: the gate without which nothing is proved, B of two networks and C of one. samples:
    rows compared. sets: the kinds of inputs. runtimes: each run and its evidence. decisions: where
    the largest element of an output is another one. fault: where and why the two part; profile:
    the error at every former batch norm. warnings: what passes and proves little.
    """

    gates: tuple[GateResult, ...]
    seed: int
    samples: int
    sets: tuple[str, ...]
    runtimes: tuple[Ran, ...] = ()
    decisions: tuple[Decisions, ...] = ()
    question: str = "B"
    certificate: Certificate | None = None
    fault: Finding | None = None
    profile: Profile | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """True when the gate in question compared something and no gate failed."""
        compared = any(result.gate == self.question for result in self.gates)
        return compared and all(result.passed for result in self.gates)

    @property
    def first_divergence(self) -> Divergence | None:
        """The first value that is wrong, where one was found."""
        return self.fault.first if self.fault is not None else None

    @property
    def cause(self) -> Cause | None:
        """Why the fold is wrong, as far as that was found."""
        return self.fault.cause if self.fault is not None else None

    @property
    def failures(self) -> tuple[GateResult, ...]:
        """The results that did not pass, gate A first."""
        return tuple(result for result in self.gates if not result.passed)

    @property
    def r(self) -> float:
        """The worst ratio of the gate in question (NaN where it could not be computed)."""
        return max((result.value for result in self._ratios()), default=math.nan)

    @property
    def limit(self) -> float:
        """What that ratio may come to."""
        return max((result.limit for result in self._ratios()), default=R_LIMIT)

    def _ratios(self) -> list[GateResult]:
        name = "error ratio" if self.question == "B" else "backend ratio"
        return [result for result in self.gates if result.name == name]

    def raise_for_failure(self) -> None:
        """Raise VerificationError with the first failure, or NothingComparedError."""
        if self.failures:
            first = self.failures[0]
            more = f" ({len(self.failures)} checks failed.)" if len(self.failures) > 1 else ""
            where = f" {self.fault.sentence}" if self.fault and self.cause else ""
            raise VerificationError(f"Gate {first.gate}: {first.sentence}{more}{where}")
        if not self.passed:
            raise NothingComparedError("no output of the two networks was compared.")

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it; infinities and NaN as strings."""
        parting = self.first_divergence
        certificate = self.certificate
        fields: dict[str, Any] = plain(
            {
                "passed": self.passed,
                "r": self.r,
                "gates": [vars(result) for result in self.gates],
                "seed": self.seed,
                "samples": self.samples,
                "inputs": list(self.sets),
                "noise": {_key(ran): ran.noise for ran in self.runtimes if ran.gate == "C"},
                "backends": {_key(ran): ran.providers for ran in self.runtimes if ran.providers},
                "runtimes": [vars(ran) for ran in self.runtimes],
                "decisions": [vars(decision) for decision in self.decisions],
                "nodes": [vars(record) for record in certificate.records] if certificate else None,
                "first_divergence": vars(parting) if parting else None,
                "cause": self.cause.to_dict() if self.cause else None,
                "profile": self.profile.to_dict() if self.profile else None,
                "notes": list(self.notes),
                "warnings": list(self.warnings),
                "seconds": self.seconds,
            }
        )
        return fields


def _key(ran: Ran) -> str:
    return f"{ran.name}, gate {ran.gate}, {ran.role}"
