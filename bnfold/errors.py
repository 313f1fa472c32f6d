"""What can go wrong, and the exit code that the command line gives for it.

Every message is a sentence for the user: what was found, where, what to do.
"""


def one_line(error: BaseException) -> str:
    """Another library's error in our sentence: its message on one line, cut where it is long."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


class BnfoldError(Exception):
    """The root of bnfold's errors; `exit_code` is what the command line returns."""

    exit_code = 70


class UsageError(BnfoldError):
    """The call itself is wrong: an option, a shape, a name, an output that exists."""

    exit_code = 2


class Diverged(UsageError):  # noqa: N818  # what happened, not what is wrong with the call
    """Training came to numbers that are none: the learning rate or the inputs are too large."""


class InputError(BnfoldError):
    """A file or a model that cannot be read, or is not supported."""

    exit_code = 3


class UnsafeInputError(InputError):
    """A file that would run code, or read outside its folder, if it were loaded."""


class RuntimeUnavailableError(BnfoldError):
    """A runtime that was asked for (a provider, a package) cannot run here."""

    exit_code = 4


class VerificationError(BnfoldError):
    """A gate failed: the two models are not the same function."""

    exit_code = 1


class NothingComparedError(BnfoldError):
    """The verification compared no output at all, which is not a pass."""

    exit_code = 5
