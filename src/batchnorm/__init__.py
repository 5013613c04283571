"""Batch normalization, whole.

`batchnorm.definition` says what it is, `batchnorm.kernels` makes it fast; `batchnorm.torch` holds the layers, and
`batchnorm.study` measures what they do. Nothing is imported before it is asked for.
"""

__version__ = "0.1.0"
