"""Which batch norms the user wants folded: patterns against their names, and how many at least."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import onnx_ir as ir

from bnfold.errors import DemandError, UsageError
from bnfold.folding.rules.node import name_of


@dataclass(frozen=True)
class Selection:
    """Shell-style patterns, each against a batch norm's name as reported and its node's name.

    keep: these batch norms stay, their parameters as they are. only: every other one stays so.
    """

    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def held(self, norms: Iterable[ir.Node]) -> dict[ir.Node, str]:
        """The batch norms that stay because the user says so, each with the reason.

        Raises UsageError for a pattern that no batch norm has.
        """
        norms = list(norms)
        for pattern in (*self.keep, *self.only):
            if not any(_matches(pattern, node) for node in norms):
                raise UsageError(_nothing(pattern, norms))
        why = {node: self._why(node) for node in norms}
        return {node: reason for node, reason in why.items() if reason}

    def _why(self, node: ir.Node) -> str:
        keep = [pattern for pattern in self.keep if _matches(pattern, node)]
        if keep:
            return f"you asked to keep it as it is (keep {keep[0]})"
        if self.only and not any(_matches(pattern, node) for pattern in self.only):
            return f"you asked to fold others only (only {', '.join(self.only)})"
        return ""


def _matches(pattern: str, node: ir.Node) -> bool:
    # a name may itself hold brackets, which a pattern would read as a choice of characters
    return any(
        name == pattern or fnmatchcase(name, pattern) for name in (name_of(node), node.name or "")
    )


def _nothing(pattern: str, norms: list[ir.Node]) -> str:
    names = list(dict.fromkeys(name_of(node) for node in norms))
    if not names:
        return f"No batch norm is called '{pattern}': the model has none."
    near = difflib.get_close_matches(pattern, names, 3, 0.3) or names[:3]
    return (
        f"No batch norm is called '{pattern}'. Near names: {', '.join(near)}"
        f" ({len(names)} in all; `bnfold inspect` lists them)."
    )


def check_enough(folded: int, kept: int, wanted: int | Literal["all"]) -> None:
    """Raise DemandError where fewer batch norms folded than are wanted."""
    if folded >= (folded + kept if wanted == "all" else wanted):
        return
    named = "All batch norms" if wanted == "all" else f"At least {wanted}"
    raise DemandError(
        f"{named} must fold, and {folded} of {folded + kept} did.",
        code="E_NOT_FOLDED",
        hint="`bnfold inspect MODEL` says of each one that stays why it does.",
    )
