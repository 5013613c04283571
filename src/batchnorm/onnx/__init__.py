"""ONNX models: `fold` takes their batch normalizations into the layers beside them."""

from batchnorm.onnx.fold import fold

__all__ = ["fold"]
