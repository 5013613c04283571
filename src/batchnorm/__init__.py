"""Batch normalization, whole.

`batchnorm.definition` defines it, and `batchnorm.kernels` computes it fast. `batchnorm.torch` and `batchnorm.keras`
hold the layers and the tools for whole models, `batchnorm.onnx` folds ONNX files, and `batchnorm.study` measures what
batch normalization does. Importing `batchnorm` imports none of them.
"""

__version__ = "0.1.0"
