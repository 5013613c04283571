"""Convolutions and linear layers as linear maps in float64, with a batch normalization before or after them."""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchnorm.definition import fold_linear

__all__ = ["LARGEST", "LinearMap", "Normalization", "exchange_ends"]

Array = NDArray[np.float64]

LARGEST = {
    "float64": float(np.finfo(np.float64).max),
    "float32": float(np.finfo(np.float32).max),
    "float16": float(np.finfo(np.float16).max),
    "bfloat16": 2.0**128 - 2.0**120,
}
"""The largest number of each type of weights."""


class Normalization(NamedTuple):
    """The constants of a batch normalization in evaluation: arguments of `definition.fold_linear`.

    Attributes:
        mean, var: `(C,)`, the running statistics.
        weight, bias: `(C,)`, gamma and beta; 1 and 0 if None.
        eps: As in the layer.
    """

    mean: Array
    var: Array
    weight: Array | None
    bias: Array | None
    eps: float

    @property
    def channels(self) -> int:
        """The number of channels."""
        return len(self.mean)

    def scale_and_shift(self) -> tuple[Array, Array]:
        """`s = weight / sqrt(var + eps)` and `t = bias - mean*s`, `(C,)` each: the layer computes `s*x + t`."""
        scale, shift = fold_linear(np.ones((self.channels, 1)), None, *self)
        return scale.ravel(), shift


@dataclass(frozen=True)
class LinearMap:
    """The linear map of a convolution or a linear layer, at each position of its output: `matrix v + offset`.

    Attributes:
        matrix: `(outputs, inputs of a group, *positions in the kernel)`.
        offset: `(outputs,)`.
        groups: The number of groups of inputs and outputs; an output depends on the inputs of its group.
        dtype: The type of the layer's weights, such as `"float32"`, to which the numbers are finally rounded.
    """

    matrix: Array
    offset: Array
    groups: int = 1
    dtype: str = "float64"

    @property
    def outputs(self) -> int:
        """The number of outputs."""
        return len(self.matrix)

    @property
    def inputs(self) -> int:
        """The number of inputs, over all groups."""
        return int(self.matrix.shape[1]) * self.groups

    def then(self, normalization: Normalization) -> "LinearMap":
        """The normalization of the map's outputs: `(s*A) v + (b - mean)*s + bias` with `s = weight / sqrt(var + eps)`.

        Args:
            normalization: The normalization, with a channel for each output.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # `fits` detects it
            matrix, offset = fold_linear(self.matrix, self.offset, *normalization)
        return replace(self, matrix=matrix, offset=offset)

    def after(self, normalization: Normalization, channels: NDArray[Any] | None = None) -> "LinearMap":
        """The map of normalized inputs: `A (s*x + t) + b = (A*s) x + (b + A t)`.

        Args:
            normalization: The normalization of the inputs.
            channels: `(inputs,)`, the channel of each input; None if input `c` is channel `c`.
        """
        outputs, inputs, *positions = self.matrix.shape
        matrix = self.matrix.reshape(self.groups, outputs // self.groups, inputs, math.prod(positions))
        with np.errstate(over="ignore", invalid="ignore"):
            scale, shift = (
                (values if channels is None else values[channels]).reshape(self.groups, 1, inputs, 1)
                for values in normalization.scale_and_shift()
            )
            offset = self.offset + (matrix * shift).sum((2, 3)).ravel()
            return replace(self, matrix=(matrix * scale).reshape(self.matrix.shape), offset=offset)

    def fits(self) -> bool:
        """Whether all its numbers are finite in the type of the weights."""
        largest = LARGEST[self.dtype]
        return all(bool((np.abs(numbers) <= largest).all()) for numbers in (self.matrix, self.offset))


def exchange_ends(kernel: Array, groups: int) -> Array:
    """The matrix of a transposed convolution from its kernel, and the kernel from the matrix.

    Args:
        kernel: `(inputs, outputs of a group, *positions)` or `(outputs, inputs of a group, *positions)`.
        groups: The number of groups.

    Returns:
        The other of the two.
    """
    parts = kernel.reshape(groups, len(kernel) // groups, *kernel.shape[1:]).swapaxes(1, 2)
    return parts.reshape(groups * parts.shape[1], *parts.shape[2:])
