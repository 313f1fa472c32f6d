"""What a run comes to, in a word that a glance takes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """kind: "good", "bad", "open" or "plain", by which it is coloured; word: what it says."""

    kind: str
    word: str

    @property
    def rank(self) -> int:
        """The lower, the more it matters beside others."""
        return ("bad", "open", "good", "plain").index(self.kind)


def verdict_of(run: Mapping[str, Any]) -> Verdict:
    """Of a report, or of the error that ended a run.

    The same function: proved by every gate that was run. Open: a model that is no measure, a demand
    that is not met, a run that never came to its end.
    """
    if run.get("summary") is None:
        return Verdict("open", "Ended in an error")
    gates = run.get("gates")
    failed = [gate for gate in gates or () if not gate["passed"]]
    if failed:
        no_measure = any(gate["name"] == "original" for gate in failed)
        if no_measure and not any(gate["gate"] == "A" for gate in failed):
            return Verdict("open", "NOT PROVED")
        return Verdict("bad", "NOT the same function")
    if run["exit_code"]:
        return Verdict("open", "Not as demanded")
    return Verdict("good", "PROVED") if gates else Verdict("plain", "Done")
