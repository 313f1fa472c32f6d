"""`bnfold doctor`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from bnfold.commands.shared import Report, new_report


def doctor(args: argparse.Namespace) -> Report:
    """`bnfold doctor`: versions, runtimes that really run, conflicts; 4 where one does not."""
    from bnfold.proof.places.installation import installation
    from bnfold.proof.places.runtimes import parse_runtime

    asked = [parse_runtime(text).name for text in args.runtimes or ()]
    facts = installation()
    done = new_report("doctor", args, ())
    rows = [[key, _fact(value)] for key, value in _flat(facts) if key != "conflicts"]
    done["facts"] = facts
    done["diagnostics"] = {"head": ["", "found"], "rows": rows}
    done["warnings"] = list(facts["conflicts"])
    loads = facts["loads"]
    missing = [
        f"{name} cannot run here: {loads[name]}" for name in asked if loads[name] is not True
    ]
    done["exit_code"] = 4 if missing else 0
    done["summary"] = " ".join([*missing, *_what_runs(loads)])
    if facts["conflicts"]:
        done["summary"] += " Something stands in the way: see the warnings."
    return done


def _what_runs(loads: Mapping[str, Any]) -> list[str]:
    here = [name for name, reason in loads.items() if reason is True]
    gone = [name for name in loads if name not in here]
    return [
        f"{label}: {', '.join(names)}."
        for label, names in (("Runs here", here), ("Not here", gone))
        if names
    ]


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _fact(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_fact(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(str(item) for item in value.values())
    return {True: "yes", False: "no", None: "-"}.get(value, str(value))
