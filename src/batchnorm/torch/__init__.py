"""Batch normalization for PyTorch: `batch_norm`, the layers, and where their statistics come from."""

from batchnorm.torch.functional import batch_norm
from batchnorm.torch.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from batchnorm.torch.statistics import BatchStatistics, RunningStatistics, Statistics

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchStatistics",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "RunningStatistics",
    "Statistics",
    "batch_norm",
]
