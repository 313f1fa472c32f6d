"""What a pipeline asks for beyond the gates, and every failure under its code in the report.

`--require-fold` looks at the plan and `--strict` at the warnings: a verb that writes asks before it
does (`unmet`), and `settle` sees to all others when they have ended.
"""

from __future__ import annotations

import argparse
from typing import Any

from bnfold.errors import (
    BnfoldError,
    DemandError,
    RuntimeUnavailableError,
    VerificationError,
)

Report = dict[str, Any]

# what a report that ends with this exit code says
_KINDS = {kind.exit_code: kind for kind in (VerificationError, RuntimeUnavailableError)}


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
    kind = _KINDS.get(done["exit_code"])
    if kind is not None and "error" not in done:
        done["error"] = kind(done["summary"]).to_dict()
    elif not done["exit_code"]:
        unmet(done, args)


def _too_few(done: Report, args: argparse.Namespace) -> BnfoldError | None:
    from bnfold.folding.selection import check_enough

    wanted, norms = getattr(args, "require_fold", None), done.get("batch_norms")
    if wanted is None or norms is None:
        return None
    try:
        check_enough(len(norms["folded"]), len(norms["kept"]), wanted)
    except DemandError as error:
        return error
    return None


def _warned(done: Report, args: argparse.Namespace) -> BnfoldError | None:
    warnings = done.get("warnings") or ()
    if not getattr(args, "strict", False) or not warnings:
        return None
    more = f" (and {len(warnings) - 1} more)" if len(warnings) > 1 else ""
    return DemandError(
        f"--strict takes a warning for a failure{more}: {warnings[0]}",
        code="E_WARNING",
    )
