"""What can go wrong: a sentence for the user, and for a pipeline an exit code and a stable code.

Every message is a sentence: what was found, where, what to do. `code` is what a script may compare
(docs/pipelines lists them all); `hint` is the next step, where there is one that always helps.
"""

from __future__ import annotations

from typing import Any


def one_line(error: BaseException) -> str:
    """Another library's error in our sentence: its message on one line, cut where it is long."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def capital(sentence: str) -> str:
    """A part of a sentence as the beginning of one."""
    return sentence[0].upper() + sentence[1:]


class BnfoldError(Exception):
    """The root of bnfold's errors; `exit_code` is what the command line returns.

    code: the error's stable name, finer than its type. hint: what to do next, or None.
    """

    exit_code = 70
    code = "E_INTERNAL"
    hint: str | None = None

    def __init__(self, message: str = "", *, code: str | None = None, hint: str | None = None):
        super().__init__(message)
        if code is not None:
            self.code = code
        if hint is not None:
            self.hint = hint

    def to_dict(self) -> dict[str, Any]:
        """The error as the JSON report holds it."""
        return {
            "type": type(self).__name__,
            "code": self.code,
            "message": str(self),
            "hint": self.hint,
            "exit_code": self.exit_code,
        }


class UsageError(BnfoldError):
    """The call itself is wrong: an option, a shape, a name, an output that exists."""

    exit_code = 2
    code = "E_USAGE"


class Diverged(UsageError):  # noqa: N818  # what happened, not what is wrong with the call
    """Training came to numbers that are none: the learning rate or the inputs are too large."""

    code = "E_DIVERGED"


class InputError(BnfoldError):
    """A file or a model that cannot be read, or is not supported."""

    exit_code = 3
    code = "E_INPUT"


class UnsafeInputError(InputError):
    """A file that would run code, or read outside its folder, if it were loaded."""

    code = "E_UNSAFE"


class RuntimeUnavailableError(BnfoldError):
    """A runtime that was asked for (a provider, a package) cannot run here."""

    exit_code = 4
    code = "E_RUNTIME"
    hint = "`bnfold doctor` shows which runtimes load on this machine, and what the others lack."


class LimitError(BnfoldError):
    """The work did not end within the time, or the memory, that it was given."""

    exit_code = 4
    code = "E_LIMIT"


class VerificationError(BnfoldError):
    """A gate failed: the two models are not the same function."""

    exit_code = 1
    code = "E_GATE"
    hint = "`bnfold verify ORIGINAL FOLDED --report page.html` shows which layer parts first."


class DemandError(BnfoldError):
    """What the caller asked for beyond the gates is not met: `--strict`, `--require-fold`."""

    exit_code = 1
    code = "E_DEMAND"


class NothingComparedError(BnfoldError):
    """The verification compared no output at all, which is not a pass."""

    exit_code = 5
    code = "E_NOTHING_COMPARED"
