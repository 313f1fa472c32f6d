"""`bnfold adapt`: the target's statistics in a new model of the same kind."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold import report
from bnfold.commands.shared import (
    FORMATS,
    Report,
    add_proof,
    new_report,
    open_samples,
    percent,
    progress_bar,
    unread,
)
from bnfold.errors import BnfoldError, InputError, UsageError
from bnfold.outputs import add_file, beside, check_outputs, record_path, write_all, writer_of

if TYPE_CHECKING:
    from bnfold.adapting.adapt import AdaptResult
    from bnfold.adapting.targets import Target


def adapt(args: argparse.Namespace) -> Report:
    """`bnfold adapt MODEL --target-data DATA`: measure, write, fold again what was folded.

    Under torchrun every process measures its share of the data, and the first one writes.
    """
    from bnfold.adapting.adapt import adapt_target
    from bnfold.adapting.ranks import group_from_environment
    from bnfold.adapting.statistics import Rule
    from bnfold.data import shard

    outputs = args.outputs or beside(args.model, "adapted", [_suffix(args.model)])
    check_outputs(outputs, args.model, args.overwrite, FORMATS)
    if args.pack is not None:
        check_outputs([args.pack], args.model, args.overwrite, (".pack",))
    with group_from_environment(args.device) as ranks:
        target = _open_target(args)
        whole = _samples(args, args.data, target)
        data = shard(whole, ranks.rank, ranks.size)
        source = _samples(args, args.source_data, target) if args.source_data else None
        with _state(args, ranks) as state, progress_bar(args, "adapting") as progress:
            result = adapt_target(
                target,
                data,
                method=args.method,
                rule=Rule(args.part, args.prior, args.source_weight, args.mixture),
                source_data=source and shard(source, ranks.rank, ranks.size),
                up_to=_depth(args.up_to),
                stop=args.stop,
                precision=args.precision,
                max_bytes=None if args.max_memory is None else args.max_memory << 20,
                progress=progress,
                ranks=ranks,
                **state,
            )
        if ranks.rank:
            return {"exit_code": 0, "silent": True}
        return _told_and_written(args, outputs, target, result, whole)
