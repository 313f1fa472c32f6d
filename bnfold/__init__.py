"""bnfold: fold, adapt, export and prove networks with batch normalization.

Each name is imported when it is first used, so that `import bnfold` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnfold.adapting.adapt import AdaptResult as AdaptResult
    from bnfold.adapting.adapt import adapt as adapt
    from bnfold.api import FoldResult as FoldResult
    from bnfold.api import export as export
    from bnfold.api import fold as fold
    from bnfold.api import inspect as inspect
    from bnfold.api import parity as parity
    from bnfold.api import verify as verify
    from bnfold.benchmark.bench import BenchReport as BenchReport
    from bnfold.benchmark.bench import bench as bench
    from bnfold.errors import BnfoldError as BnfoldError
    from bnfold.errors import DemandError as DemandError
    from bnfold.errors import InputError as InputError
    from bnfold.errors import LimitError as LimitError
    from bnfold.errors import NothingComparedError as NothingComparedError
    from bnfold.errors import RuntimeUnavailableError as RuntimeUnavailableError
    from bnfold.errors import UnsafeInputError as UnsafeInputError
    from bnfold.errors import UsageError as UsageError
    from bnfold.errors import VerificationError as VerificationError
    from bnfold.folding.module import load_folded as load_folded
    from bnfold.packs.deployment import Deployment as Deployment
    from bnfold.packs.deployment import Serving as Serving
    from bnfold.packs.deployment import load as load
    from bnfold.packs.pack import Pack as Pack
    from bnfold.packs.pack import load_pack as load_pack
    from bnfold.proof.result import VerifyReport as VerifyReport
    from bnfold.runs import report_of as report_of
    from bnfold.runs import write_report as write_report
    from bnfold.unfolding import UnfoldResult as UnfoldResult
    from bnfold.unfolding import unfold as unfold

_HOMES = {
    "AdaptResult": "bnfold.adapting.adapt",
    "BenchReport": "bnfold.benchmark.bench",
    "BnfoldError": "bnfold.errors",
    "DemandError": "bnfold.errors",
    "Deployment": "bnfold.packs.deployment",
    "FoldResult": "bnfold.api",
    "InputError": "bnfold.errors",
    "LimitError": "bnfold.errors",
    "NothingComparedError": "bnfold.errors",
    "Pack": "bnfold.packs.pack",
    "RuntimeUnavailableError": "bnfold.errors",
    "Serving": "bnfold.packs.deployment",
    "UnfoldResult": "bnfold.unfolding",
    "UnsafeInputError": "bnfold.errors",
    "UsageError": "bnfold.errors",
    "VerificationError": "bnfold.errors",
    "VerifyReport": "bnfold.proof.result",
    "adapt": "bnfold.adapting.adapt",
    "bench": "bnfold.benchmark.bench",
    "export": "bnfold.api",
    "fold": "bnfold.api",
    "inspect": "bnfold.api",
    "load": "bnfold.packs.deployment",
    "load_folded": "bnfold.folding.module",
    "load_pack": "bnfold.packs.pack",
    "parity": "bnfold.api",
    "report_of": "bnfold.runs",
    "unfold": "bnfold.unfolding",
    "verify": "bnfold.api",
    "write_report": "bnfold.runs",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bnfold' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
