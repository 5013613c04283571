"""Batch normalization for JAX: a pure function, our CPU kernels under XLA, a Flax NNX layer, and tools for models."""

from batchnorm.jax.functional import batch_norm
from batchnorm.jax.layers import BatchNorm
from batchnorm.jax.standardize import Standardize
from batchnorm.jax.statistics import (
    BatchStatistics,
    GhostStatistics,
    Renorm,
    Running,
    RunningStatistics,
    Statistics,
)

__all__ = [
    "BatchNorm",
    "BatchStatistics",
    "GhostStatistics",
    "Renorm",
    "Running",
    "RunningStatistics",
    "Standardize",
    "Statistics",
    "batch_norm",
]
