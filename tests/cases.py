"""The shapes, layouts, types, flags and tolerances that tests share: the only table of them."""

import math
from collections.abc import Callable
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

ROUTES = ("triton", "native", "numba", "operator", "functorch", "composed")
"""In the order of the table; all of them, whatever the size of a tensor, with `route(*ROUTES)`."""

KERNEL_ROUTES = tuple(name for name in ROUTES if name != "native")
"""All but PyTorch's own operation, which small tensors would take."""

KERNEL_SHAPES = [
    (1, 1, 3),
    (2, 3, 1),
    (32, 64, 1),  # a hidden layer
    (5, 1, 47),
    (7, 20, 47),  # more than one block of channels
    (3, 5, 47),  # by row, and just long enough for by channel
    (3, 5, 48),
    (9, 5, 48),  # by channel: four samples, four samples, and one
    (3, 70, 49),  # 7 x 7 images, a block of several channels
    (5, 2, 1100),  # four samples whose runs are longer than RUN, for the sums of the backward pass
    (2, 3, 5000),  # a run longer than BLOCK
    (300, 2, 33),
    (4, 64, 16),  # by row: a stage on its own takes whole samples
    (33, 65, 16),  # it does not, because vectors would leave something over
    (4100, 3, 1),  # more rows than a block of rows
    (3, 2500, 1),  # more channels than a table is wide
]
"""`(N, C, L)`, on either side of every limit in the kernels."""


GPU_SHAPES = [
    (3, 2, 64),  # by channel
    (2, 3, 20),  # by channel: a sample of one channel is wider than a row of a small tile
    (3, 2, 67),  # by channel: no two adjacent values may be loaded at once
    (9, 5, 7),  # by row: the last block of channels is narrower
    (5, 4, 2),  # by row: a whole sample is narrower than a tile
    (9, 20, 1),  # channels last, or a matrix
    (9, 3, 1),
    (1, 1, 3),
]
"""`(N, C, L)` for every walk of the GPU kernels, with `SMALL` tiles: several parts and blocks of each."""

GPU_SHAPES_OF_DEFAULT_TILES = [(2, 2, 5000), (17, 10, 49), (130, 70, 1)]
"""The same for the tiles that the kernels choose."""


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


def channels_last(t: Any) -> Any:
    """The same tensor, with the channels adjacent in memory."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def reordered(*axes: int) -> Callable[[Any], Any]:
    """The same tensor, with its axes in this order in memory."""
    return lambda t: t.permute(axes).contiguous().permute([axes.index(i) for i in range(len(axes))])


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory: `lay` takes a contiguous one of `shape`; it keeps the values unless it expands."""

    name: str
    shape: tuple[int, ...]
    lay: Callable[[Any], Any]

    def __str__(self) -> str:
        return self.name


MATRIX, SERIES, IMAGES, VOLUMES = (6, 5), (6, 5, 7), (4, 3, 5, 6), (3, 2, 3, 2, 4)

CONTIGUOUS = [
    Layout("matrix", MATRIX, lambda t: t),
    Layout("series", SERIES, lambda t: t),
    Layout("images", IMAGES, lambda t: t),
    Layout("volumes", VOLUMES, lambda t: t),
]

CHANNELS_LAST = [
    Layout("images-channels-last", IMAGES, channels_last),
    Layout("volumes-channels-last", VOLUMES, channels_last),
]

LAYOUTS = [
    *CONTIGUOUS,
    *CHANNELS_LAST,
    Layout("matrix-transposed", MATRIX, reordered(1, 0)),
    Layout("matrix-sliced", MATRIX, lambda t: t.repeat_interleave(2, 1)[:, ::2]),
    Layout("matrix-expanded", MATRIX, lambda t: t[:, :1].expand(t.shape)),
    Layout("series-transposed", SERIES, channels_last),
    Layout("series-sliced", SERIES, lambda t: t.repeat_interleave(2, -1)[..., ::2]),
    Layout("images-transposed", IMAGES, reordered(0, 1, 3, 2)),
    Layout("images-permuted", IMAGES, reordered(2, 1, 3, 0)),
    Layout("images-sliced", IMAGES, lambda t: t.repeat_interleave(2, -1)[..., ::2]),
    Layout("images-of-every-other-channel", IMAGES, lambda t: t.repeat_interleave(2, 1)[:, ::2]),
    Layout("images-expanded", IMAGES, lambda t: t[..., :1].expand(t.shape)),
    Layout("images-one-for-all", IMAGES, lambda t: t[:1].expand(t.shape)),
    Layout("images-channels-last-sliced-channels", IMAGES, lambda t: channels_last(t.repeat(1, 2, 1, 1))[:, :3]),
    Layout("images-channels-last-sliced-columns", IMAGES, lambda t: channels_last(t.repeat(1, 1, 1, 2))[..., :6]),
    Layout("images-channels-last-sliced-samples", IMAGES, lambda t: channels_last(t.repeat(2, 1, 1, 1))[::2]),
    Layout("volumes-permuted", VOLUMES, reordered(4, 0, 1, 3, 2)),
    Layout("volumes-channels-last-sliced-channels", VOLUMES, lambda t: channels_last(t.repeat(1, 2, 1, 1, 1))[:, :2]),
    Layout("pixels", (7, 3, 1, 1), lambda t: t),
    Layout("pixels-channels-last", (7, 3, 1, 1), channels_last),
    Layout("one-channel", (4, 1, 5, 6), channels_last),
    Layout("one-image", (1, 3, 5, 6), channels_last),
]
"""Every way in which tensors of each rank come to a layer."""

COLUMNS = [
    Layout("rows-swapped-with-channels", (4, 3, 1, 6), reordered(0, 3, 2, 1)),
    Layout("columns-swapped-with-channels", (4, 3, 6, 1), reordered(0, 2, 3, 1)),
]
"""Channels last, but the stride of the axis of length one does not say so. Of PyTorch only the memory format is to be
matched here: with a contiguous `dy`, its gradient (2.13, CPU) is wrong."""

MASKS = {
    "samples": ((4,), "bool"),
    "rows": ((4, 5), "bool"),
    "pixels": ((4, 5, 6), "bool"),
    "columns": ((4, 1, 6), "bool"),
    "counts": ((4, 5), "int64"),
    "weights": ((4, 5, 6), "float32"),
}
"""Shapes and types of masks for `IMAGES`."""

EMPTY = [(0, 5), (4, 0), (0, 3, 5, 6), (4, 3, 0), (4, 3, 0, 6)]

GRADCHECK_SHAPES = {"matrix": (5, 2), "series": (3, 2, 3), "images": (3, 2, 2, 2), "volumes": (2, 2, 1, 2, 3)}
"""Small: every value is one row of a Jacobian, found by finite differences."""

KINKS = (-3.0, 0.0, 3.0, 6.0)


def far_from_kinks(z: NDArray[Any]) -> bool:
    """Whether finite differences of `z` (steps of 1e-6, times slopes of a few) stay on one side of every kink."""
    return bool(np.min([np.abs(z - kink) for kink in KINKS]) > 1e-3)


@dataclass(frozen=True)
class Batch:
    """A batch of any rank, with everything that can come with it."""

    x: NDArray[Any]
    dy: NDArray[Any]
    weight: NDArray[Any]
    bias: NDArray[Any]
    residual: NDArray[Any]
    mask: NDArray[Any]
    running_mean: NDArray[Any]
    running_var: NDArray[Any]


def batch(shape: tuple[int, ...], dtype: Any, *, seed: int = 0, offset: float = 0.0) -> Batch:
    """A seeded batch about `offset`; the mask holds weights, some of them 0."""
    rng = np.random.default_rng([*shape, seed])
    channels, positions = shape[1], (shape[0], *shape[2:])
    mask = rng.choice([0.0, 0.5, 1.0, 2.0], positions)
    mask.flat[:3] = 0.0, 2.0, 1.0
    drawn = Batch(
        rng.normal(size=shape) + offset, rng.normal(size=shape),
        rng.uniform(0.5, 2.0, channels), rng.normal(size=channels), rng.normal(size=shape), mask,
        rng.normal(size=channels) + offset, rng.uniform(0.5, 2.0, channels),
    )  # fmt: skip
    return Batch(**{name: values.astype(dtype) for name, values in vars(drawn).items()})


def half_precision_tolerance(eps: float, exact: NDArray[Any]) -> NDArray[Any]:
    """What float32 arithmetic and one rounding to a type of this `eps` may do: half a unit in the last place.

    Below 2^-14 float16 has no more digits, and the unit is 2^-24.
    """
    return np.maximum(eps / 2 * np.abs(exact), 2.0**-25) + tolerance(np.float32) * np.maximum(np.abs(exact), 1.0)


def rms(values: NDArray[Any]) -> float:
    return math.sqrt(float(np.mean(np.square(values, dtype=np.float64))))
