"""Batch normalization for PyTorch: the function, the layers, their sources of statistics, and tools for models."""

from batchnorm.extras import require

require("torch")

from batchnorm.torch.adapters import register
from batchnorm.torch.allocator import reuse_memory
from batchnorm.torch.calibrate import Calibration, calibrate
from batchnorm.torch.convert import convert, revert
from batchnorm.torch.decay import parameter_groups
from batchnorm.torch.diagnose import Finding, Report, diagnose
from batchnorm.torch.explain import explain
from batchnorm.torch.fold import fold
from batchnorm.torch.freeze import freeze, unfreeze
from batchnorm.torch.functional import batch_norm
from batchnorm.torch.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    SyncBatchNorm,
)
from batchnorm.torch.memory import save_memory
from batchnorm.torch.routes import route
from batchnorm.torch.sources import (
    BatchStatistics,
    GhostStatistics,
    Renorm,
    RunningStatistics,
    Statistics,
    SyncStatistics,
)
from batchnorm.torch.standardize import Standardize
from batchnorm.torch.watch import Record, watch

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchStatistics",
    "Calibration",
    "Finding",
    "GhostStatistics",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Record",
    "Renorm",
    "Report",
    "RunningStatistics",
    "Standardize",
    "Statistics",
    "SyncBatchNorm",
    "SyncStatistics",
    "batch_norm",
    "calibrate",
    "convert",
    "diagnose",
    "explain",
    "fold",
    "freeze",
    "parameter_groups",
    "register",
    "reuse_memory",
    "revert",
    "route",
    "save_memory",
    "unfreeze",
    "watch",
]
