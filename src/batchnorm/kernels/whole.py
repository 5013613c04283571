"""A whole pass over a batch in one call from Python, by the addresses of its arrays.

`launch` takes arrays, and Python puts its kernels together. To make an array and to read its type costs Python about as
much time as a kernel needs for a thousand values. So for the most frequent cases, the batch's own statistics without
counts and constants, what Python would do between the kernels is compiled here, and addresses take the place of arrays.
The kernels are those of `launch`, and so are the bits of the results.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np

from batchnorm.definition import ActivationSpec, parse_activation
from batchnorm.kernels import launch, threads
from batchnorm.kernels.activations import FLAT
from batchnorm.kernels.calls import (
    address,
    call_backward_kernel,
    call_forward_kernel,
    call_grad_input_kernel,
    call_grad_sums_kernel,
    call_moments_kernel,
    call_normalize_kernel,
    kernel_address,
)
from batchnorm.kernels.compilation import inlined, kernel
from batchnorm.kernels.formats import arithmetic
from batchnorm.kernels.formulas import is_finite
from batchnorm.kernels.memory import array
from batchnorm.kernels.running import moved
from batchnorm.kernels.tiling import SERIAL, along_memory, tiling

__all__ = ["KEPT", "STAY", "Constants", "Descriptor", "Move", "accept", "backward", "forward", "is_near", "normalize"]


class Descriptor(NamedTuple):
    """What a pass is compiled and tiled for.

    Attributes:
        shape: `(N, C, L)`.
        dtype: The type of the data: float32, float64, or bfloat16 as uint16.
        activation: As in `definition.normalize`.
        residual: Whether there is a residual; `OUTPUT` if a backward pass gets `y` in its place.
        in_place: Whether a backward pass writes `dx` over `dy`.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    activation: ActivationSpec
    residual: int = 0
    in_place: bool = False


Move = tuple[int, int, Any, float, float, int]
"""How a forward pass moves running statistics: see `running.move`. A plain tuple, for a layer makes one in each call.

1. The address of the mean and that of the variance; 0 if there are none.
2. A number of their type.
3. The rate and the correction of `running.move`.
4. The address of an int64 that counts the batches that have moved them; 0 if there is none.
"""

STAY: Move = 0, 0, np.float32(0), 0.0, 1.0, 0
"""Where nothing moves."""

Constants = tuple[int, int, int, int, Any, float]
"""What a pass normalizes by where that is not computed from the batch.

1. The addresses of weight and bias; 0 for 1 and 0.
2. Those of mean and variance.
3. A number of their type.
4. `eps`, which is added to the variance.
"""

KEPT: Constants = 0, 0, 0, 0, np.float32(0), 0.0
"""Where an earlier pass has written its tables and statistics."""


# --- Tables and running statistics ------------------------------------------------------------------------------------


@inlined
def _fill(table: Any, place: int, otherwise: Any) -> None:
    """Fill a table with the values at an address, or with one number if there are none."""
    given = array(place, otherwise, table.shape)
    for c in range(table.size):
        table[c] = given[c] if place != 0 else otherwise


@inlined
def _move(
    mean: Any, var: Any, mean_: int, var_: int, running: Any, rate: float, correction: float, counter_: int
) -> Any:
    """Move what a `Move` tells of towards a batch, and return whether that was possible."""
    shape = mean.shape
    if mean_ != 0 and not moved(mean, var, rate, correction, array(mean_, running, shape), array(var_, running, shape)):
        return False
    if counter_ != 0:
        array(counter_, np.int64(0), (1,))[0] += 1
    return True


# --- The passes, compiled ---------------------------------------------------------------------------------------------
# `kernels` and `stages` are addresses; the second kernel is 0 if the first one runs both stages on each block.
# `sizes` are N, C and L, and the rows and the width of a tile.


@functools.cache
def _forward() -> Callable[..., bool]:
    @kernel(False)
    def whole_forward(
        kernels: Any, stages: Any, sizes: Any, like: Any, parameter: Any, x_: int, residual_: int, y_: int,
        weight_: int, bias_: int, tables_: int, statistics_: int, eps: float, mean_: int, var_: int, running: Any,
        rate: float, correction: float, counter_: int,
    ) -> Any:  # fmt: skip
        N, C, L, rows, width = sizes
        x, residual, y = array(x_, like, (N, C, L)), array(residual_, like, (N, C, L)), array(y_, like, (N, C, L))
        tables, statistics = array(tables_, parameter, (2, C)), array(statistics_, 0.0, (3, C))
        weight, bias, mean, var, rstd = tables[0], tables[1], statistics[0], statistics[1], statistics[2]
        _fill(weight, weight_, type(parameter)(1))
        _fill(bias, bias_, type(parameter)(0))
        given = x, residual, np.empty((0, 0), tables.dtype), weight, bias, parameter, rows, width
        if kernels[1] == 0:
            call_forward_kernel(kernels[0], (stages[0], stages[1], *given, eps, y, mean, var, rstd))
        else:
            call_moments_kernel(kernels[0], (stages[0], *given, mean, var))
            for c in range(C):
                rstd[c] = 1.0 / np.sqrt(var[c] + eps)
            call_normalize_kernel(kernels[1], (stages[1], *given, mean, rstd, y))
        return _move(mean, var, mean_, var_, running, rate, correction, counter_)

    return cast(Callable[..., bool], whole_forward)


@functools.cache
def _normalize() -> Callable[..., None]:
    @kernel(False)
    def whole_normalize(
        kernels: Any, stages: Any, sizes: Any, like: Any, parameter: Any, x_: int, residual_: int, y_: int,
        tables_: int, statistics_: int, weight_: int, bias_: int, mean_: int, var_: int, constant: Any, eps: float,
    ) -> None:  # fmt: skip
        N, C, L, rows, width = sizes
        x, residual, y = array(x_, like, (N, C, L)), array(residual_, like, (N, C, L)), array(y_, like, (N, C, L))
        tables, statistics = array(tables_, parameter, (2, C)), array(statistics_, 0.0, (3, C))
        if mean_ != 0:
            _fill(tables[0], weight_, type(parameter)(1))
            _fill(tables[1], bias_, type(parameter)(0))
            mean, var = array(mean_, constant, (C,)), array(var_, constant, (C,))
            for c in range(C):
                statistics[0, c], statistics[1, c] = mean[c], var[c]
                statistics[2, c] = 1.0 / np.sqrt(statistics[1, c] + eps)
        given = x, residual, np.empty((0, 0), tables.dtype), tables[0], tables[1], parameter, rows, width
        call_normalize_kernel(kernels[0], (stages[0], *given, statistics[0], statistics[2], y))

    return whole_normalize


@functools.cache
def _backward() -> Callable[..., bool]:
    @kernel(False)
    def whole_backward(
        flat: bool, again: bool, kernels: Any, stages: Any, sizes: Any, like: Any, parameter: Any, dy_: int, x_: int,
        residual_: int, dx_: int, d_residual_: int, tables_: int, statistics_: int, d_weight_: int, d_bias_: int,
        count: float, sums: Any,
    ) -> Any:  # fmt: skip
        N, C, L, rows, width = sizes
        dy, x, residual = array(dy_, like, (N, C, L)), array(x_, like, (N, C, L)), array(residual_, like, (N, C, L))
        dx, d_residual = array(dx_, like, (N, C, L)), array(d_residual_, like, (N, C, L))
        tables, statistics = array(tables_, parameter, (2, C)), array(statistics_, 0.0, (3, C))
        mean, rstd, sum_dz, sum_dz_xhat = statistics[0], statistics[2], sums[0], sums[1]
        counts = np.empty((0, 0), tables.dtype)
        given = x, residual, counts, tables[0], tables[1], parameter, rows, width, dy, mean, rstd
        if kernels[1] == 0:
            call_backward_kernel(
                kernels[0],
                (stages[0], stages[1], *given, flat, again, count, sum_dz, sum_dz_xhat, dx, d_residual),
            )
        else:
            call_grad_sums_kernel(kernels[0], (stages[0], *given, sum_dz, sum_dz_xhat))
        if flat and not again and not is_finite(sum_dz, 0, C):
            return False
        if kernels[1] != 0:
            call_grad_input_kernel(kernels[1], (stages[1], *given, sum_dz, sum_dz_xhat, count, dx, d_residual))
        d_weight, d_bias = array(d_weight_, parameter, (C,)), array(d_bias_, parameter, (C,))
        for c in range(C):
            d_weight[c] = sum_dz_xhat[c]
            d_bias[c] = sum_dz[c]
        return True

    return cast(Callable[..., bool], whole_backward)


# --- What the rest of the package calls -------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _forward_of(descriptor: Descriptor, parallel: bool) -> tuple[Any, ...]:
    """What `whole_forward` begins with."""
    cut = tiling(descriptor.shape, descriptor.dtype.itemsize, 1)
    walk, code = launch.walk_of(cut), launch.code_of(descriptor.activation)
    stages = walk.moments(0), walk.normalize(code, int(descriptor.residual > 0))
    is_fused = cut.fused(descriptor.shape)
    made = [launch.forward_kernel] if is_fused else [launch.moments_kernel, launch.normalize_kernel]
    return _beginning(descriptor, [each(parallel) for each in made], stages, (cut.rows, cut.width))


@functools.lru_cache(maxsize=1024)
def _normalize_of(descriptor: Descriptor, parallel: bool) -> tuple[Any, ...]:
    """What `whole_normalize` begins with."""
    cut = along_memory(descriptor.shape, descriptor.dtype.itemsize, 1)
    walk, code = launch.walk_of(cut), launch.code_of(descriptor.activation)
    stage = walk.normalize(code, int(descriptor.residual > 0))
    return _beginning(descriptor, [launch.normalize_kernel(parallel)], (stage,), (cut.rows, cut.width))


@functools.lru_cache(maxsize=1024)
def _backward_of(descriptor: Descriptor, parallel: bool, exact: int) -> tuple[Any, ...]:
    """What `whole_backward` begins with."""
    cut = tiling(descriptor.shape, descriptor.dtype.itemsize, 2)
    walk, code = launch.walk_of(cut), launch.code_of(descriptor.activation)
    stages = (
        walk.grad_sums(code, descriptor.residual, exact),
        walk.grad_input(code, descriptor.residual, 0, exact, int(descriptor.in_place)),
    )
    is_fused = cut.fused(descriptor.shape)
    made = [launch.backward_kernel] if is_fused else [launch.grad_sums_kernel, launch.grad_input_kernel]
    beginning = _beginning(descriptor, [each(parallel) for each in made], stages, (cut.rows, cut.width))
    return code in FLAT, bool(exact), *beginning


def _beginning(
    descriptor: Descriptor, kernels: list[Any], stages: tuple[Any, ...], tile: tuple[int, int]
) -> tuple[Any, ...]:
    dtype = descriptor.dtype
    places = tuple(kernel_address(each, dtype) for each in kernels)
    return (
        (*places, 0)[:2],
        tuple(address(stage, dtype) for stage in stages),
        (*descriptor.shape, *tile),
        dtype.type(0),
        arithmetic(dtype).type(parse_activation(descriptor.activation)[1]),
    )


def _is_parallel(descriptor: Descriptor) -> bool:
    N, C, L = descriptor.shape
    return N * C * L >= SERIAL and not threads.forbidden()


def forward(
    descriptor: Descriptor, x: int, residual: int, y: int, weight: int, bias: int, tables: int, statistics: int,
    eps: float, running: Move,
) -> bool:  # fmt: skip
    """`launch.forward` without counts, and `running.move`.

    Args:
        descriptor: What the addresses hold.
        x, residual, y: Addresses of contiguous data; any address if there is no residual. `y` is written.
        weight, bias: Addresses of `(C,)`, of the type of the arithmetic; 0 for 1 and 0.
        tables: The address of `(2, C)`, of that type. Written: copies of weight and bias for the backward pass.
        statistics: The address of `(3, C)`, float64. Written: mean, variance and `1/sqrt(var + eps)`.
        eps: Added to the variance.
        running: The running statistics.

    Returns:
        Whether the running statistics were moved, or there are none.
    """
    parallel = _is_parallel(descriptor)
    return bool(
        threads.run(
            _forward(), parallel, *_forward_of(descriptor, parallel), x, residual, y, weight, bias, tables, statistics,
            eps, *running,
        )
    )  # fmt: skip


def normalize(
    descriptor: Descriptor, x: int, residual: int, y: int, tables: int, statistics: int, constants: Constants = KEPT
) -> None:
    """Write `y` by constants, or make `y` again: the same stage gives the same bits.

    Args:
        descriptor: What the addresses hold.
        x, residual, y: As in `forward`.
        tables, statistics: As in `forward`. Written from the constants; read if they are `KEPT`.
        constants: The constants.
    """
    parallel = _is_parallel(descriptor)
    beginning = _normalize_of(descriptor, parallel)
    threads.run(_normalize(), parallel, *beginning, x, residual, y, tables, statistics, *constants)


def backward(
    descriptor: Descriptor, dy: int, x: int, residual: int, dx: int, d_residual: int, tables: int, statistics: int,
    d_weight: int, d_bias: int, count: float,
) -> None:  # fmt: skip
    """`launch.backward` without counts.

    Args:
        descriptor: What the addresses hold.
        dy, x, residual: Addresses of contiguous data. Any address if there is no residual; that of `y` if it is
            `OUTPUT`.
        dx, d_residual: Likewise. Written; `dx` is `dy` if the descriptor is `in_place`.
        tables, statistics: From `forward`.
        d_weight, d_bias: Addresses of `(C,)`, of the type of the arithmetic. Written.
        count: The number of values behind the statistics; infinity if they are constants.
    """
    parallel = _is_parallel(descriptor)
    sums = np.empty((2, descriptor.shape[1]))
    for exact in (0, 1):
        done = threads.run(
            _backward(), parallel, *_backward_of(descriptor, parallel, exact), dy, x, residual, dx, d_residual, tables,
            statistics, d_weight, d_bias, float(count), sums,
        )  # fmt: skip
        if done:
            return


@inlined
def _near(mean: Any, var: Any, shrinkage: float, eps: float, limit: float) -> Any:
    for c in range(mean.size):
        distance, spread = float(mean[c]), float(var[c]) * shrinkage + eps
        if not distance * distance <= limit * limit * spread < np.inf:
            return False
    return True


@functools.cache
def _is_near() -> Callable[..., bool]:
    @kernel(False)
    def is_near(mean_: int, var_: int, C: int, like: Any, eps: float, limit: float) -> Any:
        return _near(array(mean_, like, (C,)), array(var_, like, (C,)), 1.0, eps, limit)

    return cast(Callable[..., bool], is_near)


@functools.cache
def _accept() -> Callable[..., bool]:
    @kernel(False)
    def accept(
        mean_: int, var_: int, C: int, shrinkage: float, eps: float, limit: float, running_mean_: int,
        running_var_: int, like: Any, rate: float, correction: float, counter_: int,
    ) -> Any:  # fmt: skip
        mean, var = array(mean_, like, (C,)), array(var_, like, (C,))
        if not _near(mean, var, shrinkage, eps, limit):
            return False
        return _move(mean, var, running_mean_, running_var_, like, rate, correction, counter_)

    return cast(Callable[..., bool], accept)


def is_near(mean: int, var: int, channels: int, like: Any, eps: float, limit: float) -> bool:
    """Whether `|mean| <= limit * sqrt(var + eps)` in every channel, and no variance is infinite.

    Args:
        mean, var: Addresses of `(C,)`.
        channels: `C`.
        like: A number of their type.
        eps: Added to the variance.
        limit: The limit.
    """
    return _is_near()(mean, var, channels, like, eps, limit)


def accept(mean: int, var: int, channels: int, shrinkage: float, eps: float, limit: float, running: Move) -> bool:
    """Move running statistics towards a batch if it `is_near`.

    Args:
        mean, var: Addresses of `(C,)`, of the type of the running statistics: the mean and the unbiased variance of the
            batch.
        channels, eps, limit: As in `is_near`.
        shrinkage: The factor from the unbiased variance to the biased one, which must be near.
        running: The running statistics.

    Returns:
        Whether it is near.
    """
    return _accept()(mean, var, channels, shrinkage, eps, limit, *running)
