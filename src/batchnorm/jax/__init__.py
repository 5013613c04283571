"""Batch normalization for JAX: a pure function on our CPU kernels, a layer for Flax NNX, and tools for whole models."""

from batchnorm.extras import require

require("jax")

from batchnorm.jax.calibrate import Calibration, calibrate
from batchnorm.jax.decay import exclude_from_weight_decay
from batchnorm.jax.diagnose import Finding, Report, diagnose
from batchnorm.jax.fold import fold
from batchnorm.jax.freeze import freeze, unfreeze
from batchnorm.jax.functional import batch_norm
from batchnorm.jax.layers import BatchNorm
from batchnorm.jax.port import Ported, from_keras, from_torch, to_keras, to_torch
from batchnorm.jax.standardize import Standardize
from batchnorm.jax.statistics import (
    BatchStatistics,
    GhostStatistics,
    Renorm,
    Running,
    RunningStatistics,
    Statistics,
)
from batchnorm.xla.routes import route

__all__ = [
    "BatchNorm",
    "BatchStatistics",
    "Calibration",
    "Finding",
    "GhostStatistics",
    "Ported",
    "Renorm",
    "Report",
    "Running",
    "RunningStatistics",
    "Standardize",
    "Statistics",
    "batch_norm",
    "calibrate",
    "diagnose",
    "exclude_from_weight_decay",
    "fold",
    "freeze",
    "from_keras",
    "from_torch",
    "route",
    "to_keras",
    "to_torch",
    "unfreeze",
]
