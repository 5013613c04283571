"""Batch normalization: its definition, fast kernels, layers, tools for whole models, and a study of its effects.

`batchnorm.definition` defines it, and `batchnorm.kernels` computes it. `batchnorm.torch`, `batchnorm.keras` and
`batchnorm.jax` contain the layers and the tools for whole models, `batchnorm.onnx` folds ONNX files, and
`batchnorm.study` measures what batch normalization does. Importing `batchnorm` imports none of them.
"""

__version__ = "0.1.0"
