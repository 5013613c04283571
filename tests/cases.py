"""The shapes, layouts, types, flags and tolerances that tests share: the only table of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm import definition
from batchnorm.definition import ActivationSpec

ACTIVATIONS: list[ActivationSpec] = [
    None,
    "relu",
    "relu6",
    ("leaky_relu", 0.2),
    "silu",
    "hardswish",
    ("elu", 1.5),
    "sigmoid",
    "tanh",
    "gelu",
]

DTYPES = [np.float32, np.float64]

KERNEL_SHAPES = [
    (1, 1, 3),
    (2, 3, 1),
    (32, 64, 1),  # a hidden layer
    (5, 1, 49),
    (7, 20, 49),  # 7 x 7 images, more than one block of channels
    (3, 5, 159),  # by row, and just long enough for by channel
    (3, 5, 160),
    (2, 3, 5000),  # a run longer than BLOCK
    (300, 2, 33),
    (4100, 3, 1),  # more rows than a block of rows
    (3, 2500, 1),  # more channels than a table is wide
]
"""`(N, C, L)`, on either side of every limit in the kernels."""


@dataclass(frozen=True)
class Problem:
    """One batch with everything that can come with it."""

    x: NDArray[Any]
    dy: NDArray[Any]
    weight: NDArray[Any]
    bias: NDArray[Any]
    residual: NDArray[Any] | None
    mask: NDArray[Any] | None

    @property
    def count(self) -> float:
        n, _, positions = self.x.shape
        return float(n * positions) if self.mask is None else float(self.mask.sum(dtype=np.float64))


def problem(
    shape: tuple[int, int, int], dtype: Any, *, residual: bool = False, mask: bool = False, offset: float = 0.0
) -> Problem:
    """A seeded batch about `offset`. `dy` is 0 near a kink, where rounding decides on which side `z` falls."""
    rng = np.random.default_rng([*shape, residual, mask])
    n, channels, positions = shape
    weights = None
    if mask:
        weights = np.where(rng.random((n, positions)) < 0.3, 0.0, rng.choice([0.5, 1.0, 2.0], (n, positions)))
        weights.flat[[0, 1, -1]] = 0.0, 2.0, 1.0
        weights = weights.astype(dtype)
    x = (rng.normal(size=shape) + offset).astype(dtype)
    weight = rng.uniform(0.5, 2.0, channels).astype(dtype)
    bias = rng.normal(size=channels).astype(dtype)
    added = rng.normal(size=shape).astype(dtype) if residual else None
    z, _ = definition.forward(x, weight, bias, added, mask=weights)
    distance = np.min([np.abs(z - kink) for kink in (-3, 0, 3, 6)], axis=0)
    dy = np.where(distance < 1e-3, 0.0, rng.normal(size=shape)).astype(dtype)
    return Problem(x, dy, weight, bias, added, weights)


def tolerance(dtype: Any, terms: int = 1) -> float:
    """What rounding may do to a value of size 1 that is a sum of `terms`: eps * (8 + sqrt(terms)).

    Eight roundings stand between `x` and `y`, or between `dy` and `dx`; a sum's own roundings are independent and add
    up as their square root.
    """
    return float(np.finfo(dtype).eps) * (8 + terms**0.5)


def relative_error(value: NDArray[Any], exact: NDArray[Any]) -> float:
    """`max |value - exact| / max(|exact|, 1)` over all: activations and statistics are of size 1."""
    if exact.size == 0:
        return 0.0
    return float(np.max(np.abs(value - exact)) / max(1.0, float(np.max(np.abs(exact)))))
