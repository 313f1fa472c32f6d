"""The command line: arguments in, one report on stdout, progress and notes on stderr.

Nothing heavy is imported until a verb runs, so that `bnfold --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bnfold.errors import BnfoldError, LimitError, one_line
from bnfold.parser import build_parser

if TYPE_CHECKING:
    from bnfold.report import Reports


def _terminated(*_: object) -> None:
    """What schedulers and torchrun ask for: end, but leave no temporary file behind."""
    raise SystemExit(143)


def main(argv: Sequence[str] | None = None, *, limited: bool = False) -> int:
    """Run the command line; the exit code comes back. Bad input gives a sentence, no traceback.

    limited: this is the process that `--timeout` has started.
    """
    with contextlib.suppress(ValueError):  # of a thread, which may not
        signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):  # of a terminal that cannot show a layer's name
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    arguments = list(sys.argv[1:] if argv is None else argv)
    run = _Run("--json" in arguments)
    try:
        args = build_parser().parse_args(arguments)
        run.begin(args)
        if getattr(args, "timeout", None) is not None and not limited:
            from bnfold.limits import within

            return within(args.timeout, partial(main, arguments, limited=True))
        return run.end(args)
    except BnfoldError as error:
        return run.fail(error)
    except KeyboardInterrupt:
        print("bnfold: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _no_reader()
        return 0
    except MemoryError:
        full = "There is not enough memory for it; nothing was proved."
        return run.fail(LimitError(full, code="E_MEMORY"))
    except Exception as error:
        if "BNFOLD_TRACEBACK" in os.environ:
            raise
        ours = BnfoldError(
            f"this is a fault of bnfold's own, and nothing was proved: {type(error).__name__}:"
            f" {one_line(error)}. Set BNFOLD_TRACEBACK=1 to see where, and please report it.",
            hint="Set BNFOLD_TRACEBACK=1 to see where.",
        )
        return run.fail(ours)


class _Run:
    """One run of a verb, from its arguments to what is told of it."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.verb: str | None = None
        self.reports: Reports | None = None

    def begin(self, args: argparse.Namespace) -> None:
        """Refuse reports that could not be written before any work is done."""
        self.verb = args.verb
        if getattr(args, "report", None) or getattr(args, "github", False):
            from bnfold.report import Reports

            self.reports = Reports.asked(args)

    def end(self, args: argparse.Namespace) -> int:
        """Do it, and tell what came of it; the exit code."""
        if args.version or args.verb is None or getattr(args, "schema", False):
            return _tell_itself(args)
        from bnfold import commands, report

        result = commands.run(args)
        if result is None:  # of several processes one reports
            return 0
        text = (
            report.to_json(result)
            if args.json
            else report.to_text(_untold(result, args), verbose=args.verbose)
        )
        if self.reports is not None:
            self.reports.write(result)
        try:
            print(text, flush=True)
        except BrokenPipeError:
            _no_reader()
        return int(result["exit_code"])

    def fail(self, error: BnfoldError) -> int:
        """Tell an error, in the reports that were asked for too; the exit code."""
        from bnfold.report import SCHEMA, printable, to_json

        if os.environ.get("RANK", "0") != "0":
            # torchrun's processes fail with the same sentence; it ends all when one does, so the
            # one that tells goes first
            time.sleep(2)
            return error.exit_code
        print(f"bnfold: {printable(str(error))}", file=sys.stderr)
        document = {"schema": SCHEMA, "command": self.verb, "error": error.to_dict()}
        if self.verb is None:
            del document["command"]
        if self.as_json:
            print(to_json(document))
        if self.reports is not None:
            with contextlib.suppress(BnfoldError):  # one error is told, the first
                self.reports.write(document)
        return error.exit_code


def _untold(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The report without the notes that stderr has had."""
    told = getattr(args, "told", ())
    return {**result, "notes": [note for note in result["notes"] if note not in told]}


def _tell_itself(args: argparse.Namespace) -> int:
    """The versions, the schema or the help."""
    if args.version:
        from bnfold.report import versions

        print("\n".join(f"{name} {version}" for name, version in versions().items()))
        return 0
    if args.verb is None:
        build_parser().print_help()
        return 2
    from bnfold.report.schema import schema_text

    print(schema_text(), end="")
    return 0


def _no_reader() -> None:
    """The reader of stdout went away, which is its right; keep Python from complaining at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
