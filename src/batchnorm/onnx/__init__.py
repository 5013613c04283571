"""ONNX models: `fold` takes their batch normalizations into the layers beside them."""

from batchnorm.extras import require

require("onnx")

from batchnorm.onnx.fold import fold

__all__ = ["fold"]
