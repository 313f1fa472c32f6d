"""`bnfold doctor`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from bnfold.commands.shared import Report, new_report


def doctor(args: argparse.Namespace) -> Report:
    """`bnfold doctor`: versions, providers that really load, conflicts."""
    from bnfold.proof.runtime import available

    facts = available()
    done = new_report("doctor", args, ())
    rows = [[key, _fact(value)] for key, value in _flat(facts)]
    done["facts"] = facts
    done["diagnostics"] = {"head": ["", "found"], "rows": rows}
    conflicts = [str(facts["conflict"])] if facts["conflict"] else []
    done["warnings"] = conflicts
    done["summary"] = (
        "Something stands in the way: see the warnings." if conflicts else "Nothing in the way."
    )
    return done


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _fact(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "none"
    return {True: "yes", False: "no", None: "-"}.get(value, str(value))
