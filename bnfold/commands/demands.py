"""What a pipeline asks for beyond the gates, and every failure under its code in the report.

`--require-fold` looks at the plan and `--strict` at the warnings: a verb that writes asks before it
does (`unmet`), and `settle` sees to all others when they have ended.
"""

from __future__ import annotations

import argparse
from typing import Any

from bnfold.errors import BnfoldError, DemandError, VerificationError

Report = dict[str, Any]


def unmet(done: Report, args: argparse.Namespace) -> bool:
    """Whether a demand is not met, which then stands in the report."""
    error = _too_few(done, args) or _warned(done, args)
    if error is not None and "error" not in done:
        done["error"] = error.to_dict()
        done["exit_code"] = error.exit_code
        done["summary"] = f"{done['summary']} {error}".strip()
    return error is not None


def settle(done: Report, args: argparse.Namespace) -> None:
    """Hold a report that has ended against the demands; a failed gate gets its code."""
    if done["exit_code"] == VerificationError.exit_code and "error" not in done:
        done["error"] = VerificationError(done["summary"]).to_dict()
    elif not done["exit_code"]:
        unmet(done, args)


def _too_few(done: Report, args: argparse.Namespace) -> BnfoldError | None:
    wanted, norms = getattr(args, "require_fold", None), done.get("batch_norms")
    if wanted is None or norms is None:
        return None
    folded, kept = len(norms["folded"]), len(norms["kept"])
    if folded >= (folded + kept if wanted == "all" else wanted):
        return None
    named = "all batch norms" if wanted == "all" else f"at least {wanted}"
    return DemandError(
        f"--require-fold asks for {named} to fold, and {folded} of {folded + kept} did.",
        code="E_NOT_FOLDED",
        hint="`bnfold inspect MODEL` says of each one that stays why it does.",
    )


def _warned(done: Report, args: argparse.Namespace) -> BnfoldError | None:
    warnings = done.get("warnings") or ()
    if not getattr(args, "strict", False) or not warnings:
        return None
    more = f" (and {len(warnings) - 1} more)" if len(warnings) > 1 else ""
    return DemandError(
        f"--strict takes a warning for a failure{more}: {warnings[0]}",
        code="E_WARNING",
    )
