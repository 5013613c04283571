"""The kernels, and the functions by which the rest of the package calls them.

Arrays are contiguous and have three axes, `(N, C, L)`: samples, channels, positions per sample. Channels-last data,
`(R, C)`, is passed as `(R, C, 1)`. A kernel runs one or two stages over all tiles of an array (`tiling`). There is one
set of stages, in two walking orders: `by_channel` for long runs of positions, `by_row` for short ones.

`forward` and `backward` run all stages on one block of channels before they go on to the next, so that a block is read
from memory once and from the caches after that, as far as it fits. Where `tiling` makes no such blocks, the stages run
one after the other.

Statistics are float64, whatever the type of the data. Sums run in the data's type over at most a few thousand values,
then in float64. Values are summed relative to a `center` near the mean, so that even a mean of a million standard
deviations costs no accuracy.

Tiles depend on shapes alone, and serial and parallel kernels call the same stages. So results have the same bits for
any number of threads.

Nothing is compiled at import.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from batchnorm.definition import ActivationSpec, parse_activation
from batchnorm.kernels import by_channel, by_row, threads
from batchnorm.kernels.activations import CODES, FLAT
from batchnorm.kernels.calls import address, call_grad_input, call_grad_sums, call_moments, call_normalize
from batchnorm.kernels.compilation import Kernel, inlined, kernel
from batchnorm.kernels.formats import arithmetic
from batchnorm.kernels.formulas import OUTPUT, is_finite, merge
from batchnorm.kernels.tiling import CACHE, SERIAL, Tiling, along_memory, tiling

__all__ = ["backward", "code_of", "forward", "grad_input", "grad_sums", "moments", "normalize", "walk_of"]

Array = NDArray[Any]

# --- Kernels ---------------------------------------------------------------------------------------------------------
# A kernel begins with the addresses of its stages, and goes on with x, residual, counts, weight, bias, parameter, rows
# and width, whether it needs them or not.

Factory = Callable[[bool], Kernel]


@inlined
def _tile(number: int, rows: int, width: int, N: int, C: int) -> Any:
    """A tile's place among the parts of the samples, and its bounds: samples `n0` to `n1`, channels `c0` to `c1`."""
    blocks = -(-C // width)
    part, block = number // blocks, number % blocks
    return part, part * rows, min((part + 1) * rows, N), block * width, min((block + 1) * width, C)


@functools.cache
def moments_kernel(parallel: bool) -> Kernel:
    """The moments of each tile, then merged over the tiles of a channel."""

    @kernel(parallel)
    def moments(
        stage: Any, x: Any, residual: Any, counts: Any, weight: Any, bias: Any, parameter: Any, rows: int, width: int,
        mean: Any, var: Any,
    ) -> None:  # fmt: skip
        N, C, _ = x.shape
        parts, blocks = -(-N // rows), -(-C // width)
        sizes, means, squares = np.empty((parts, blocks)), np.empty((parts, C)), np.empty((parts, C))
        for tile in prange(parts * blocks):
            part, n0, n1, c0, c1 = _tile(tile, rows, width, N, C)
            sizes[part, c0 // width] = call_moments(stage, (x, counts, n0, n1, c0, c1, means[part], squares[part]))
        mean[:], var[:] = 0.0, 0.0
        for block in range(blocks):
            _, _, _, c0, c1 = _tile(block, rows, width, N, C)
            count = 0.0
            for part in range(parts):
                size = sizes[part, block]
                if size > 0.0:
                    for c in range(c0, c1):
                        _, mean[c], var[c] = merge(count, mean[c], var[c], size, means[part, c], squares[part, c])
                    count += size
            if count > 0.0:
                for c in range(c0, c1):
                    var[c] /= count

    return moments


@functools.cache
def normalize_kernel(parallel: bool) -> Kernel:
    """`normalize` of each tile."""

    @kernel(parallel)
    def normalize(
        stage: Any, x: Any, residual: Any, counts: Any, weight: Any, bias: Any, parameter: Any, rows: int, width: int,
        mean: Any, rstd: Any, y: Any,
    ) -> None:  # fmt: skip
        N, C, _ = x.shape
        for tile in prange(-(-N // rows) * -(-C // width)):
            _, n0, n1, c0, c1 = _tile(tile, rows, width, N, C)
            call_normalize(stage, (x, residual, mean, rstd, weight, bias, parameter, n0, n1, c0, c1, y))

    return normalize


@functools.cache
def grad_sums_kernel(parallel: bool) -> Kernel:
    """The sums of each tile, then added up over the tiles of a channel."""

    @kernel(parallel)
    def grad_sums(
        stage: Any, x: Any, residual: Any, counts: Any, weight: Any, bias: Any, parameter: Any, rows: int, width: int,
        dy: Any, mean: Any, rstd: Any, sum_dz: Any, sum_dz_xhat: Any,
    ) -> None:  # fmt: skip
        N, C, _ = x.shape
        parts, blocks = -(-N // rows), -(-C // width)
        sums, sums_xhat = np.empty((parts, C)), np.empty((parts, C))
        for tile in prange(parts * blocks):
            part, n0, n1, c0, c1 = _tile(tile, rows, width, N, C)
            call_grad_sums(
                stage,
                (dy, x, residual, mean, rstd, weight, bias, parameter, n0, n1, c0, c1, sums[part], sums_xhat[part]),
            )
        sum_dz[:], sum_dz_xhat[:] = 0.0, 0.0
        for part in range(parts):
            for c in range(C):
                sum_dz[c] += sums[part, c]
                sum_dz_xhat[c] += sums_xhat[part, c]

    return grad_sums


@functools.cache
def grad_input_kernel(parallel: bool) -> Kernel:
    """`grad_input` of each tile."""

    @kernel(parallel)
    def grad_input(
        stage: Any, x: Any, residual: Any, counts: Any, weight: Any, bias: Any, parameter: Any, rows: int, width: int,
        dy: Any, mean: Any, rstd: Any, sum_dz: Any, sum_dz_xhat: Any, count: float, dx: Any, d_residual: Any,
    ) -> None:  # fmt: skip
        N, C, _ = x.shape
        for tile in prange(-(-N // rows) * -(-C // width)):
            _, n0, n1, c0, c1 = _tile(tile, rows, width, N, C)
            call_grad_input(
                stage,
                (dy, x, residual, counts, mean, rstd, weight, bias, sum_dz, sum_dz_xhat, count, parameter,
                 n0, n1, c0, c1, dx, d_residual),
            )  # fmt: skip

    return grad_input


@functools.cache
def forward_kernel(parallel: bool) -> Kernel:
    """`moments`, then `normalize`, of each block of channels."""

    @kernel(parallel)
    def forward(
        moments: Any, normalize: Any,
        x: Any, residual: Any, counts: Any, weight: Any, bias: Any, parameter: Any, rows: int, width: int,
        eps: float, y: Any, mean: Any, var: Any, rstd: Any,
    ) -> None:  # fmt: skip
        N, C, _ = x.shape
        for block in prange(-(-C // width)):
            _, n0, n1, c0, c1 = _tile(block, N, width, N, C)
            count = call_moments(moments, (x, counts, n0, n1, c0, c1, mean, var))
            for c in range(c0, c1):
                var[c] = var[c] / count if count > 0.0 else 0.0
                rstd[c] = 1.0 / np.sqrt(var[c] + eps)
            call_normalize(normalize, (x, residual, mean, rstd, weight, bias, parameter, n0, n1, c0, c1, y))

    return forward


@functools.cache
def backward_kernel(parallel: bool) -> Kernel:
    """`grad_sums`, then `grad_input`, of each block of channels.

    If `flat`, `grad_input` is left out for a block whose sums are not finite. A second launch, with `again` and the
    `EXACT` stages, computes only these blocks.
    """

    @kernel(parallel)
    def backward(
        sums: Any, grad_input: Any,
        x: Any, residual: Any, counts: Any, weight: Any, bias: Any, parameter: Any, rows: int, width: int,
        dy: Any, mean: Any, rstd: Any, flat: bool, again: bool, count: float, sum_dz: Any, sum_dz_xhat: Any, dx: Any,
        d_residual: Any,
    ) -> None:  # fmt: skip
        N, C, _ = x.shape
        for block in prange(-(-C // width)):
            _, n0, n1, c0, c1 = _tile(block, N, width, N, C)
            if not again or not is_finite(sum_dz, c0, c1):
                call_grad_sums(
                    sums,
                    (dy, x, residual, mean, rstd, weight, bias, parameter, n0, n1, c0, c1, sum_dz, sum_dz_xhat),
                )
                if again or not flat or is_finite(sum_dz, c0, c1):
                    call_grad_input(
                        grad_input,
                        (dy, x, residual, counts, mean, rstd, weight, bias, sum_dz, sum_dz_xhat, count, parameter,
                         n0, n1, c0, c1, dx, d_residual),
                    )  # fmt: skip

    return backward


# --- Launching a kernel ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def code_of(activation: ActivationSpec) -> int:
    """The number of an activation, a constant of a stage."""
    return CODES[parse_activation(activation)[0]]


@functools.lru_cache(maxsize=256)
def _parameter(activation: ActivationSpec, dtype: np.dtype[Any]) -> Any:
    """The parameter of an activation, an argument of a stage."""
    return dtype.type(parse_activation(activation)[1])


@functools.lru_cache(maxsize=256)
def _ones(channels: int, dtype: np.dtype[Any]) -> Array:
    return np.ones(channels, dtype)


@functools.lru_cache(maxsize=256)
def _zeros(channels: int, dtype: np.dtype[Any]) -> Array:
    return np.zeros(channels, dtype)


@functools.cache
def _no_counts(dtype: np.dtype[Any]) -> Array:
    return np.empty((0, 0), dtype)


def walk_of(cut: Tiling) -> ModuleType:
    """The stages in the walking order of a tiling."""
    return by_channel if cut.by_channel else by_row


def _launch(
    factory: Factory,
    stages: tuple[Any, ...],
    cut: Tiling,
    given: tuple[Array, Array | None, Array | None, Array | None, Array | None],
    activation: ActivationSpec,
    *own: Any,
) -> None:
    """Call a kernel.

    Args:
        factory: Makes the kernel.
        stages: The stages that it calls.
        cut: How the array is cut.
        given: x, residual, counts, weight, bias. A kernel is compiled for arrays: in place of None it is given ones,
            zeros, or an array that it does not read.
        activation: For its parameter.
        own: The kernel's own arguments.
    """
    x, residual, counts, weight, bias = given
    channels, dtype = x.shape[1], arithmetic(x.dtype)
    parallel = x.size >= SERIAL and not threads.forbidden()
    threads.run(
        factory(parallel),
        parallel,
        *[address(stage, x.dtype) for stage in stages],
        x,
        x if residual is None else residual,
        _no_counts(dtype) if counts is None else counts,
        _ones(channels, dtype) if weight is None else weight,
        _zeros(channels, dtype) if bias is None else bias,
        _parameter(activation, dtype),
        cut.rows,
        cut.width,
        *own,
    )


def _residual_code(residual: Array | None, of_output: bool) -> int:
    """`RESIDUAL` of a stage of the backward pass."""
    return OUTPUT if of_output else int(residual is not None)


def _all_finite(sum_dz: Array) -> bool:
    """Whether the sums may be used as they are.

    The gradient of a flat activation is `dy` times 0 or 1 at first, which is not 0 where `dy` is not finite. Then the
    sum is not finite either, and the stage is run again with the `EXACT` gradient.
    """
    return math.isfinite(sum_dz @ sum_dz)


# --- What the rest of the package calls ------------------------------------------------------------------------------


def moments(x: Array, counts: Array | None, mean: Array, var: Array, *, cache: int = CACHE) -> None:
    """Write the mean and the biased variance of each channel into `mean` and `var`.

    Args:
        x: `(N, C, L)`, contiguous: float32, float64, or bfloat16 as uint16.
        counts: `(N, L)`, contiguous, of the type of `x` (float32 for bfloat16): how many times each position counts; 1
            if None.
        mean, var: `(C,)`, float64. Written; 0 if nothing counts.
        cache: Bytes of the L2 cache that a tile may occupy.
    """
    cut = tiling(x.shape, x.itemsize, 1, cache)
    stage = walk_of(cut).moments(int(counts is not None))
    _launch(moments_kernel, (stage,), cut, (x, None, counts, None, None), None, mean, var)


def normalize(
    x: Array,
    residual: Array | None,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    bias: Array | None,
    activation: ActivationSpec,
    y: Array,
    *,
    cache: int = CACHE,
) -> None:
    """Write `act((x - mean) * rstd * weight + bias + residual)` into `y`.

    Args:
        x, residual, y: `(N, C, L)`, contiguous, of one type.
        mean, rstd: `(C,)`, float64.
        weight, bias: `(C,)`, of the type of `x` (float32 for bfloat16); 1 and 0 if None.
        activation: As in `definition.normalize`.
        cache: As in `moments`.
    """
    cut = along_memory(x.shape, x.itemsize, 1, cache)
    stage = walk_of(cut).normalize(code_of(activation), int(residual is not None))
    _launch(normalize_kernel, (stage,), cut, (x, residual, None, weight, bias), activation, mean, rstd, y)


def grad_sums(
    dy: Array,
    x: Array,
    residual: Array | None,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    bias: Array | None,
    activation: ActivationSpec,
    sum_dz: Array,
    sum_dz_xhat: Array,
    *,
    of_output: bool = False,
    cache: int = CACHE,
) -> bool:
    """Write `sum dz` and `sum dz*xhat` of each channel, where `dz = dy * act'(z)` and `z` is recomputed from `x`.

    Args:
        dy: Like `x`.
        x, residual, mean, rstd, weight, bias, activation: As in `normalize`.
        sum_dz, sum_dz_xhat: `(C,)`, float64. Written.
        of_output: Whether `residual` is `y` instead: enough for relu, whose gradient needs only the sign of `z`.
        cache: As in `moments`.

    Returns:
        Whether `grad_input` must be `exact`.
    """
    cut = tiling(x.shape, x.itemsize, 2, cache)
    code = code_of(activation)
    for exact in (0, 1):
        stage = walk_of(cut).grad_sums(code, _residual_code(residual, of_output), exact)
        _launch(
            grad_sums_kernel, (stage,), cut, (x, residual, None, weight, bias), activation,
            dy, mean, rstd, sum_dz, sum_dz_xhat,
        )  # fmt: skip
        if code not in FLAT or _all_finite(sum_dz):
            break
    return bool(exact)


def grad_input(
    dy: Array,
    x: Array,
    residual: Array | None,
    counts: Array | None,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    bias: Array | None,
    sum_dz: Array,
    sum_dz_xhat: Array,
    count: float,
    activation: ActivationSpec,
    dx: Array,
    d_residual: Array | None,
    *,
    of_output: bool = False,
    exact: bool = True,
    cache: int = CACHE,
) -> None:
    """Write the gradient with respect to `x` into `dx`, and `dz` into `d_residual`.

    Args:
        dy, x, residual, mean, rstd, weight, bias, activation: As in `grad_sums`.
        counts: As in `moments`.
        sum_dz, sum_dz_xhat: `(C,)`, float64: the sums over all values behind `mean` and `rstd`.
        count: The number of these values; `inf` if `mean` and `rstd` are constants.
        dx: Like `x`, or `dy` itself, which is then overwritten. Written.
        d_residual: Like `x`; None if and only if `residual` is None. Written.
        of_output: As in `grad_sums`.
        exact: Whether `dz` is 0 where the derivative is, even if `dy` is not finite; not needed if it is.
        cache: As in `moments`.
    """
    cut = along_memory(x.shape, x.itemsize, 2, cache)
    kind, counted = _residual_code(residual, of_output), int(counts is not None)
    stage = walk_of(cut).grad_input(code_of(activation), kind, counted, int(exact), int(dx is dy))
    _launch(
        grad_input_kernel, (stage,), cut, (x, residual, counts, weight, bias), activation,
        dy, mean, rstd, sum_dz, sum_dz_xhat, float(count), dx, dx if d_residual is None else d_residual,
    )  # fmt: skip


def forward(
    x: Array,
    residual: Array | None,
    counts: Array | None,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    activation: ActivationSpec,
    y: Array,
    mean: Array,
    var: Array,
    rstd: Array,
    *,
    cache: int = CACHE,
) -> None:
    """`moments`, then `normalize`, on one block of channels after another if `tiling` makes blocks.

    Args:
        x, residual, counts, weight, bias, activation, cache: As in `moments` and `normalize`.
        eps: Added to the variance.
        y: Like `x`. Written.
        mean, var, rstd: `(C,)`, float64. Written.
    """
    cut = tiling(x.shape, x.itemsize, 1, cache)
    if cut.fused(x.shape):
        walk = walk_of(cut)
        stages = walk.moments(int(counts is not None)), walk.normalize(code_of(activation), int(residual is not None))
        given = x, residual, counts, weight, bias
        _launch(forward_kernel, stages, cut, given, activation, float(eps), y, mean, var, rstd)
        return
    moments(x, counts, mean, var, cache=cache)
    np.divide(1.0, np.sqrt(var + eps), out=rstd)
    normalize(x, residual, mean, rstd, weight, bias, activation, y, cache=cache)


def backward(
    dy: Array,
    x: Array,
    residual: Array | None,
    counts: Array | None,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    bias: Array | None,
    count: float,
    activation: ActivationSpec,
    sum_dz: Array,
    sum_dz_xhat: Array,
    dx: Array,
    d_residual: Array | None,
    *,
    of_output: bool = False,
    cache: int = CACHE,
) -> None:
    """`grad_sums`, then `grad_input`, on one block of channels after another if `tiling` makes blocks.

    Args:
        dy, x, residual, counts, mean, rstd, weight, bias, count, activation, dx, d_residual, of_output, cache: As in
            `grad_input`.
        sum_dz, sum_dz_xhat: `(C,)`, float64. Written.
    """
    cut = tiling(x.shape, x.itemsize, 2, cache)
    if cut.fused(x.shape):
        walk, code, counted = walk_of(cut), code_of(activation), int(counts is not None)
        kind, in_place = _residual_code(residual, of_output), int(dx is dy)
        flat = code in FLAT
        for exact in (0, 1):
            stages = walk.grad_sums(code, kind, exact), walk.grad_input(code, kind, counted, exact, in_place)
            _launch(
                backward_kernel, stages, cut, (x, residual, counts, weight, bias), activation,
                dy, mean, rstd, flat, bool(exact), float(count), sum_dz, sum_dz_xhat,
                dx, dx if d_residual is None else d_residual,
            )  # fmt: skip
            if not flat or _all_finite(sum_dz):
                break
        return
    exact = grad_sums(
        dy, x, residual, mean, rstd, weight, bias, activation, sum_dz, sum_dz_xhat, of_output=of_output, cache=cache
    )
    grad_input(
        dy, x, residual, counts, mean, rstd, weight, bias, sum_dz, sum_dz_xhat, count, activation, dx, d_residual,
        of_output=of_output, exact=exact, cache=cache,
    )  # fmt: skip
