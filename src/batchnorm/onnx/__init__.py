"""Batch normalization in ONNX models: `fold` folds it into the layers beside it."""

from batchnorm.extras import require

require("onnx")

from batchnorm.onnx.fold import fold

__all__ = ["fold"]
