"""Batch normalization for Keras 3, on TensorFlow, JAX and PyTorch: the layer, and tools for whole models."""

from batchnorm.extras import require

require("keras")

from batchnorm.keras.calibrate import Calibration, calibrate
from batchnorm.keras.convert import convert, revert
from batchnorm.keras.diagnose import Finding, Report, diagnose
from batchnorm.keras.fold import fold
from batchnorm.keras.freeze import freeze, unfreeze
from batchnorm.keras.layers import BatchNormalization
from batchnorm.keras.port import Ported, from_torch, to_torch
from batchnorm.keras.watch import Record, Watch

__all__ = [
    "BatchNormalization",
    "Calibration",
    "Finding",
    "Ported",
    "Record",
    "Report",
    "Watch",
    "calibrate",
    "convert",
    "diagnose",
    "fold",
    "freeze",
    "from_torch",
    "revert",
    "to_torch",
    "unfreeze",
]
