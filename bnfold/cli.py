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

from bnfold.errors import BnfoldError, LimitError, one_line
from bnfold.parser import build_parser


def _terminated(*_: object) -> None:
    """What schedulers and torchrun ask for: end, but leave no temporary file behind."""
    raise SystemExit(143)


def main(argv: Sequence[str] | None = None, *, limited: bool = False) -> int:
    """Run the command line; the exit code comes back. Bad input gives a sentence, no traceback.

    limited: this is the process that `--timeout` has started.
    """
    with contextlib.suppress(ValueError):  # of a thread, which may not
        signal.signal(signal.SIGTERM, _terminated)
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    try:
        args = build_parser().parse_args(arguments)
        if getattr(args, "timeout", None) is not None and not limited:
            from bnfold.limits import within

            return within(args.timeout, partial(main, arguments, limited=True))
        return _run(args)
    except BnfoldError as error:
        _tell_failure(error, as_json)
        return error.exit_code
    except KeyboardInterrupt:
        print("bnfold: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of stdout went away, which is its right; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        full = LimitError("There is not enough memory for it; nothing was proved.", code="E_MEMORY")
        _tell_failure(full, as_json)
        return full.exit_code
    except Exception as error:
        if "BNFOLD_TRACEBACK" in os.environ:
            raise
        ours = BnfoldError(
            f"this is a fault of bnfold's own, and nothing was proved: {type(error).__name__}:"
            f" {one_line(error)}. Set BNFOLD_TRACEBACK=1 to see where, and please report it.",
            hint="Set BNFOLD_TRACEBACK=1 to see where.",
        )
        _tell_failure(ours, as_json)
        return ours.exit_code


def _run(args: argparse.Namespace) -> int:
    if args.version:
        from bnfold.report import versions

        print("\n".join(f"{name} {version}" for name, version in versions().items()))
        return 0
    if args.verb is None:
        build_parser().print_help()
        return 2
    from bnfold import commands, report
    from bnfold.outputs import check_report, write_text

    if args.report is not None:
        check_report(args)
    result = commands.run(args)
    if result is None:  # of several processes one reports
        return 0
    print(report.to_json(result) if args.json else report.to_text(result, verbose=args.verbose))
    sys.stdout.flush()
    if args.report is not None:
        write_text(args.report, report.render(result, args.report))
    return int(result["exit_code"])


def _tell_failure(error: BnfoldError, as_json: bool) -> None:
    from bnfold.report import printable

    if os.environ.get("RANK", "0") != "0":
        # torchrun's processes fail with the same sentence; it ends all when one does, so the one
        # that tells goes first
        time.sleep(2)
        return
    print(f"bnfold: {printable(str(error))}", file=sys.stderr)
    if as_json:
        from bnfold.report import to_json

        print(to_json({"error": error.to_dict()}))


if __name__ == "__main__":
    sys.exit(main())
