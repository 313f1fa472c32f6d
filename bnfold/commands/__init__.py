"""The verbs of the command line, each a few lines over the API: arguments in, a report out.

A verb's file is imported when the verb is run: folding an ONNX file needs no torch.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from bnfold.commands.demands import settle

HOMES = {
    "fold": "folding",
    "unfold": "folding",
    "inspect": "folding",
    "export": "proving",
    "verify": "proving",
    "parity": "proving",
    "adapt": "adapting",
    "pack": "packs",
    "train": "training",
    "bench": "benching",
    "doctor": "doctor",
    "report": "reporting",
}


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """The verb's report; None in a process of several that does not report."""
    home = import_module(f"bnfold.commands.{HOMES[args.verb]}")
    done: dict[str, Any] | None = getattr(home, args.verb)(args)
    if done is not None:
        settle(done, args)
    return done
