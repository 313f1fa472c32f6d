"""The version of bnfold, as installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("bnfold")
except PackageNotFoundError:  # run from a source tree
    VERSION = "(not installed)"
