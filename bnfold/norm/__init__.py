"""Batch normalization and its variants, as torch modules that fold to plain weights."""

from bnfold.norm.batch import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    FrozenBatchNorm,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    GhostBatchNorm,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    MeanOnlyBatchNorm,
    MeanOnlyBatchNorm1d,
    MeanOnlyBatchNorm2d,
    MeanOnlyBatchNorm3d,
)
from bnfold.norm.convert import KINDS, Kind, convert
from bnfold.norm.propagation import Propagated, propagate
from bnfold.norm.renorm import BatchRenorm, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, Clipping
from bnfold.norm.weight import WeightNorm, initialise, weight_norm

__all__ = [
    "KINDS",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "Clipping",
    "FrozenBatchNorm",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GhostBatchNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "Kind",
    "MeanOnlyBatchNorm",
    "MeanOnlyBatchNorm1d",
    "MeanOnlyBatchNorm2d",
    "MeanOnlyBatchNorm3d",
    "Propagated",
    "WeightNorm",
    "convert",
    "initialise",
    "propagate",
    "weight_norm",
]
