"""`bnfold bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bnfold import report
from bnfold.commands.shared import Report, new_report, open_model, progress_bar
from bnfold.errors import UsageError
from bnfold.runs import bench_sentence


def bench(args: argparse.Namespace) -> Report:
    """`bnfold bench ORIGINAL [FOLDED ...]`: what is quicker, where that is told from noise."""
    from bnfold.benchmark.bench import bench_sources
    from bnfold.benchmark.timing import Effort
    from bnfold.proof.places.runtimes import DEFAULT
    from bnfold.reading.computed import held

    if args.seed < 0:
        raise UsageError(f"--seed is {args.seed}; it must be 0 or more.")
    source = held(open_model(args, args.original))
    given = {name: held(open_model(args, path)) for name, path in _named(args.folded).items()}
    done = new_report("bench", args, source.notes)
    done["files"] += [
        {"role": "folded", "path": str(path), "sha256": report.sha256(path)} for path in args.folded
    ]
    with progress_bar(args, "timing") as bar:
        found = bench_sources(
            source,
            given,
            compare=args.compare,
            runtimes=args.runtimes or (DEFAULT,),
            batch_sizes=args.batch_sizes,
            threads=args.threads,
            effort=Effort(args.rounds, args.seconds, args.seed),
            unoptimized=args.unoptimized,
            check=not args.no_verify,
            shapes=_shapes(args, source),
            progress=bar,
        )
    done["bench"] = found.to_dict()
    done["notes"] = [*done["notes"], *found.notes]
    done["warnings"] = [f"{name}: {fault}" for name, fault in found.faults.items()]
    if args.no_verify:
        done["warnings"].append("Nothing was proved: what is timed may be other functions.")
    done["exit_code"] = 0 if found.passed else 1
    done["summary"] = bench_sentence(found)
    return done


def _named(paths: list[Path]) -> dict[str, Path]:
    """The folded files by their names, or by their paths where two have the same."""
    names = [path.name for path in paths]
    return {
        name if names.count(name) == 1 else str(p): p for name, p in zip(names, paths, strict=True)
    }


def _shapes(args: argparse.Namespace, source: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of --input-shape by input; a nameless one is the first input's."""
    from bnfold.graph import graph_inputs

    first = next(iter(graph_inputs(source.graph)), "")
    return {name or first: shape for name, shape in args.shapes or ()}
