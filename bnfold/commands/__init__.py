"""The verbs of the command line, each a few lines over the API: arguments in, a report out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from bnfold.commands.adapting import adapt
from bnfold.commands.doctor import doctor
from bnfold.commands.folding import fold, inspect, unfold
from bnfold.commands.packs import pack
from bnfold.commands.proving import export, verify
from bnfold.commands.training import train

VERBS: dict[str, Callable[[argparse.Namespace], dict[str, Any] | None]] = {
    "fold": fold,
    "unfold": unfold,
    "inspect": inspect,
    "export": export,
    "verify": verify,
    "adapt": adapt,
    "pack": pack,
    "train": train,
    "doctor": doctor,
}
