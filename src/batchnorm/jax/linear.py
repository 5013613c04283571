"""The convolutions and linear layers of Flax NNX as linear maps for folding and porting, and back."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from batchnorm.jax.modules import to_float64
from batchnorm.whole.linear import LinearMap
from batchnorm.whole.port import Linear

__all__ = ["LINEAR", "linear", "read_map", "write_map"]

Array = NDArray[np.float64]

LINEAR = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
"""Exactly these classes: a subclass may compute something else. The channels of their outputs are the last axis."""


def linear(layer: Any) -> Linear | None:
    """A layer for porting; None if it is not one of these, or has a mask on its kernel."""
    if type(layer) not in LINEAR or getattr(layer, "mask", None) is not None:
        return None
    transposed, has_bias, shape = isinstance(layer, nnx.ConvTranspose), layer.bias is not None, layer.kernel[...].shape
    return Linear(read_map(layer), transposed, has_bias, shape, lambda map: _write(layer, map))


def read_map(layer: Any) -> LinearMap:
    """The linear map of a layer."""
    matrix = _turned(layer, np.moveaxis(to_float64(layer.kernel), _ends(layer), (0, 1)))
    offset = np.zeros(len(matrix)) if layer.bias is None else to_float64(layer.bias)
    return LinearMap(matrix, offset, getattr(layer, "feature_group_count", 1), str(layer.kernel[...].dtype))


def write_map(layer: Any, map: LinearMap) -> None:
    """Give a layer the numbers of a map, rounded once; it has a bias from then on."""
    if layer.bias is None:
        layer.bias, layer.use_bias = nnx.Param(jnp.zeros(map.outputs, layer.kernel[...].dtype)), True
    _write(layer, map)


def _write(layer: Any, map: LinearMap) -> None:
    kernel = np.moveaxis(_turned(layer, map.matrix), (0, 1), _ends(layer))
    layer.kernel[...] = jnp.asarray(kernel, layer.kernel[...].dtype)
    if layer.bias is not None:
        layer.bias[...] = jnp.asarray(map.offset, layer.bias[...].dtype)


def _ends(layer: Any) -> tuple[int, int]:
    """The axes of the kernel that are the channels of the output and of the input."""
    return (-2, -1) if getattr(layer, "transpose_kernel", False) else (-1, -2)


def _turned(layer: Any, matrix: Array) -> Array:
    """The positions of a transposed convolution run backward in Flax, unless it has `transpose_kernel`."""
    if isinstance(layer, nnx.ConvTranspose) and not layer.transpose_kernel:
        return np.flip(matrix, tuple(range(2, matrix.ndim)))
    return matrix
