"""The five stages of batch normalization on the CPU, compiled by Numba.

Arrays are contiguous and have three axes, `(N, C, L)`: samples, channels, positions per sample. Channels-last data,
`(R, C)`, is the same with `L = 1`: `(R, C, 1)`. So there is one set of stages, and two orders to walk through a tile of
samples x channels:

- *by channel*, for long runs of positions: the innermost loop goes along `L`, with the channel's numbers in registers;
- *by row*, for short ones (7 x 7 images, and `L = 1`): the innermost loop goes along the `channels * L` adjacent values
  of one sample, with the channels' numbers in tables that stay in the L1 cache. `L = 1` is no special case of it.

`forward` and `backward` do all stages of one block of channels before the next, while it is in the L2 cache, so that
memory is read once. Where blocks would not fit, they run stage after stage over tiles of samples.

Statistics are float64 whatever the data are. Sums run in the data's type over a few thousand values, then in float64.
Every value is taken relative to a `center` near the mean, so that a mean of a million standard deviations costs no
accuracy. How the work is cut depends on shapes alone, and so does which kernel is called: results have the same bits
for any number of threads. (Not in a forked child of a process that used threads, which must do without them; nor in the
process that compiles a parallel kernel, where Numba runs other code than it stores. Sums may be rounded differently.)

Nothing is compiled at import.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numba import prange
from numpy.typing import NDArray

from batchnorm.definition import ActivationSpec, parse_activation
from batchnorm.kernels import threads
from batchnorm.kernels.activations import CODES, activate, activate_grad
from batchnorm.kernels.compilation import Kernel, inlined, kernel, stage
from batchnorm.kernels.formats import arithmetic, load, store

__all__ = ["backward", "forward", "grad_input", "grad_sums", "moments", "normalize", "update_running"]

Array = NDArray[Any]

RUN = 1024
"""Positions of a sample that are summed in the data's own type before float64 takes over."""

ROWS = 64
"""The same when walking by row, where every value of a row has its own sum."""

FIRST_ROWS = 8
"""Rows whose mean is the first center when walking by row: near enough to the mean, a fraction of a second reading."""

BLOCK = 4096
"""Values of a channel that are measured from one center."""

BY_CHANNEL_FROM = 64
"""The shortest run of positions that is walked by channel."""

ROW_WIDTH = 512
"""Adjacent values of a sample that a block of channels has, at most, when walked by row: 2 KB, which prefetching
likes."""

TABLES, TABLE_LENGTH, TABLE_STRIDE = 6, 512, 512 + 16
"""Tables of a stage, their length, and their distance: not a multiple of 4 KB, or reading one would wait for writing
another."""

CACHE = 1 << 20
"""Bytes that a block may take to stay in the L2 cache between two stages: half of what today's server cores have."""

SERIAL = 1 << 15
"""Values below which one thread is faster than waking the others (a few microseconds)."""


# --- How a tensor is cut into tiles ----------------------------------------------------------------------------------


class Tiling(NamedTuple):
    """A tile has `rows` samples and `width` channels, and is walked `by_channel` or by row."""

    by_channel: bool
    rows: int
    width: int

    def fused(self, x: Array) -> bool:
        """Whether tiles have all samples, so that a channel's statistics are complete within one."""
        return bool(self.rows >= x.shape[0])


@functools.lru_cache(maxsize=1024)
def tiling(shape: tuple[int, int, int], itemsize: int, arrays: int) -> Tiling:
    """Cut `(N, C, L)` for stages that read `arrays` tensors twice.

    Blocks of channels if they fit the cache, else tiles of samples. The limits are the fastest found, for forward +
    backward with ReLU in float32 on two cores of a Sapphire Rapids server.
    """
    n, c, length = shape
    if length >= BY_CHANNEL_FROM:
        # One channel at a time. Few long channels (big images, three colours) would leave threads idle: tiles of
        # samples.
        rows = n if c >= 16 or n * length * itemsize * arrays <= CACHE else _even_share(n, c * length * itemsize)
        return Tiling(True, rows, max(1, min(c, RUN // length)))  # short neighbours share pages and prefetches
    width = max(1, min(c, ROW_WIDTH // length))
    # Narrow columns of a channels-last matrix cost more than a second read of it, unless it is small.
    fits = n * width * length * itemsize * arrays <= CACHE and (length > 1 or n <= ROW_WIDTH)
    if fits:
        return Tiling(False, n, max(1, width // 2) if width == c else width)
    width = max(1, min(c, TABLE_LENGTH // length))
    return Tiling(False, _even_share(n, width * length * itemsize), width)


def _even_share(n: int, sample: int) -> int:
    """Samples per tile, of about `CACHE` bytes; the number of tiles is a power of two, for as many threads to share."""
    tiles = 2
    while tiles < n and n * sample > tiles * CACHE:
        tiles *= 2
    return -(-n // tiles)


# --- A channel's numbers ---------------------------------------------------------------------------------------------


@inlined
def _affine(T: Any, mean: float, rstd: float, weight: Any, bias: Any) -> Any:
    """`center, scale, shift`, of type `T`, with `z = (x - center)*scale + shift`.

    `center` is the mean rounded to `T`; what the rounding took is in `shift`. Near the mean `x - center` is exact.
    """
    center = T(mean)
    scale = rstd * weight
    return center, T(scale), T(bias - (mean - center) * scale)


@inlined
def _through_moments(
    T: Any, mean: float, rstd: float, weight: Any, sum_dz: float, sum_dz_xhat: float, count: float
) -> Any:
    """`slope, level`, of type `T`, with `dx = scale*dz - ((x - center)*slope + level)`; 0 if `count = inf`."""
    if math.isinf(count):
        return T(0), T(0)
    center = T(mean)
    scale = rstd * weight
    slope = scale * rstd * sum_dz_xhat / count
    return T(slope), T(scale * sum_dz / count - (mean - center) * slope)


@inlined
def _merge(count: float, mean: float, squares: float, count_b: float, mean_b: float, squares_b: float) -> Any:
    """`definition.merge_moments` for one channel, on sums of squares (`count * var`) in place of variances."""
    total = count + count_b
    delta = mean_b - mean
    share = count_b / total
    return total, mean + delta * share, squares + squares_b + delta * delta * count * share


@inlined
def _uncenter(count: float, center: Any, sum_d: Any, sum_d2: Any) -> Any:
    """Mean and squares about it, from the sums of `d = x - center` and of `d^2`.

    Subtracting is safe where `center` is the mean of `1/k` as many values: then `sum d^2` is at most `1 + k` times the
    squares that the merge will give. Groups have a center from as many values before them, `k = 1`, or, where a mask
    has left less before them, from an eighth, `k = 8`; others make their own from a part of their values, `k = 8`, or
    from all.
    """
    return center + sum_d / count, sum_d2 - (sum_d / count) * sum_d


@inlined
def _first_kept(mask: Any, n0: int, n1: int, l0: int, l1: int) -> Any:
    """The first position that the mask keeps, `(-1, -1)` if there is none: a value to measure the others from."""
    for n in range(n0, n1):
        for i in range(l0, l1):
            if mask[n, i] > 0:
                return n, i
    return -1, -1


# --- The stages, walking by channel ----------------------------------------------------------------------------------


@stage
def _moments_by_channel(
    MASKED: int, x: Any, mask: Any, n0: int, n1: int, c0: int, c1: int, mean: Any, squares: Any
) -> float:
    T = mask.dtype.type
    L = x.shape[2]
    rows = max(1, BLOCK // L)
    count = 0.0
    for c in range(c0, c1):
        count, mean_c, squares_c = 0.0, 0.0, 0.0
        for g0 in range(n0, n1, rows):
            g1 = min(g0 + rows, n1)
            for l0 in range(0, L, BLOCK):
                l1 = min(l0 + BLOCK, L)
                size = float((g1 - g0) * (l1 - l0))
                kept_n, kept_i = g0, l0
                if MASKED:
                    size = 0.0
                    for n in range(g0, g1):
                        kept = mask[n, l0:l1]
                        for i in range(kept.size):
                            size += kept[i]
                    if size == 0.0:
                        continue
                    kept_n, kept_i = _first_kept(mask, g0, g1, l0, l1)
                center = load(x[kept_n, c, kept_i]) if count == 0.0 else T(mean_c)
                if 8 * count < size:
                    sum_d = 0.0
                    for n in range(g0, g1):
                        for r0 in range(l0, l1, RUN):
                            row, total = x[n, c, r0 : min(r0 + RUN, l1)], T(0)
                            if MASKED:
                                kept = mask[n, r0 : min(r0 + RUN, l1)]
                                for i in range(row.size):
                                    total += kept[i] * (load(row[i]) - center) if kept[i] > 0 else T(0)
                            else:
                                for i in range(row.size):
                                    total += load(row[i]) - center
                            sum_d += total
                    center = T(center + sum_d / size)
                sum_d, sum_d2 = 0.0, 0.0
                for n in range(g0, g1):
                    for r0 in range(l0, l1, RUN):
                        row, total, total_d2 = x[n, c, r0 : min(r0 + RUN, l1)], T(0), T(0)
                        if MASKED:
                            kept = mask[n, r0 : min(r0 + RUN, l1)]
                            for i in range(row.size):
                                d = load(row[i]) - center if kept[i] > 0 else T(0)
                                total += kept[i] * d
                                total_d2 += kept[i] * d * d
                        else:
                            for i in range(row.size):
                                d = load(row[i]) - center
                                total += d
                                total_d2 += d * d
                        sum_d += total
                        sum_d2 += total_d2
                mean_b, squares_b = _uncenter(size, center, sum_d, sum_d2)
                count, mean_c, squares_c = _merge(count, mean_c, squares_c, size, mean_b, squares_b)
        mean[c] = mean_c
        squares[c] = squares_c
    return count


@stage
def _normalize_by_channel(
    ACT: int, RESIDUAL: int, x: Any, residual: Any, mean: Any, rstd: Any, weight: Any, bias: Any, parameter: Any,
    n0: int, n1: int, c0: int, c1: int, y: Any,
) -> None:  # fmt: skip
    T = weight.dtype.type
    for c in range(c0, c1):
        center, scale, shift = _affine(T, mean[c], rstd[c], weight[c], bias[c])
        for n in range(n0, n1):
            row, residual_row, y_row = x[n, c], residual[n, c], y[n, c]
            for i in range(row.size):
                z = (load(row[i]) - center) * scale + shift
                if RESIDUAL:
                    z += load(residual_row[i])
                store(y_row, i, activate(ACT, parameter, z))


@stage
def _grad_sums_by_channel(
    ACT: int, RESIDUAL: int, dy: Any, x: Any, residual: Any,
    mean: Any, rstd: Any, weight: Any, bias: Any, parameter: Any,
    n0: int, n1: int, c0: int, c1: int, sum_dz: Any, sum_dz_xhat: Any,
) -> None:  # fmt: skip
    T = weight.dtype.type
    L = x.shape[2]
    for c in range(c0, c1):
        center, scale, shift = _affine(T, mean[c], rstd[c], weight[c], bias[c])
        sum_z, sum_d = 0.0, 0.0
        for n in range(n0, n1):
            for r0 in range(0, L, RUN):
                r1 = min(r0 + RUN, L)
                dy_row, row, residual_row = dy[n, c, r0:r1], x[n, c, r0:r1], residual[n, c, r0:r1]
                total, total_d = T(0), T(0)
                for i in range(row.size):
                    d = load(row[i]) - center
                    z = d * scale + shift
                    if RESIDUAL:
                        z += load(residual_row[i])
                    dz = activate_grad(ACT, parameter, z, load(dy_row[i]))
                    total += dz
                    total_d += dz * d
                sum_z += total
                sum_d += total_d
        sum_dz[c] = sum_z
        sum_dz_xhat[c] = rstd[c] * (sum_d - (mean[c] - center) * sum_z)


@stage
def _grad_input_by_channel(
    ACT: int, RESIDUAL: int, MASKED: int, dy: Any, x: Any, residual: Any, mask: Any,
    mean: Any, rstd: Any, weight: Any, bias: Any,
    sum_dz: Any, sum_dz_xhat: Any, count: float, parameter: Any,
    n0: int, n1: int, c0: int, c1: int, dx: Any, d_residual: Any,
) -> None:  # fmt: skip
    T = weight.dtype.type
    for c in range(c0, c1):
        center, scale, shift = _affine(T, mean[c], rstd[c], weight[c], bias[c])
        slope, level = _through_moments(T, mean[c], rstd[c], weight[c], sum_dz[c], sum_dz_xhat[c], count)
        for n in range(n0, n1):
            dy_row, row, residual_row = dy[n, c], x[n, c], residual[n, c]
            dx_row, d_residual_row = dx[n, c], d_residual[n, c]
            kept = mask[n] if MASKED else row
            for i in range(row.size):
                d = load(row[i]) - center
                z = d * scale + shift
                if RESIDUAL:
                    z += load(residual_row[i])
                dz = activate_grad(ACT, parameter, z, load(dy_row[i]))
                if MASKED:
                    store(dx_row, i, scale * dz - (kept[i] * (d * slope + level) if kept[i] > 0 else T(0)))
                else:
                    store(dx_row, i, scale * dz - (d * slope + level))
                if RESIDUAL:
                    store(d_residual_row, i, dz)


# --- The stages, walking by row --------------------------------------------------------------------------------------
# A row is the `width * L` adjacent values that the tile has of one sample. A table holds, for each value of a row, its
# channel's number.


@inlined
def _scratch(dtype: Any) -> Any:
    """Room for all tables of a stage. One array: LLVM gives up on a loop in which too many arrays might overlap."""
    return np.empty(TABLES * TABLE_STRIDE, dtype)


@inlined
def _table(scratch: Any, number: int, width: int) -> Any:
    return scratch[number * TABLE_STRIDE : number * TABLE_STRIDE + width]


@inlined
def _rows(x: Any) -> Any:
    return x.reshape((x.shape[0], x.shape[1] * x.shape[2]))


@inlined
def _spread(value: Any, c: int, L: int, table: Any) -> None:
    """Write one channel's number at all its positions of a row; `c` counts from the tile's first channel."""
    for j in range(c * L, (c + 1) * L):
        table[j] = value


@inlined
def _flush(total: Any, sums: Any) -> None:
    """Move what a table has gathered to one of float64, and clear it."""
    for j in range(total.size):
        sums[j] += total[j]
        total[j] = 0


@inlined
def _collect(c: int, L: int, sums: Any) -> float:
    """Sum what the positions of one channel have gathered, and clear it."""
    total = 0.0
    for j in range(c * L, (c + 1) * L):
        total += sums[j]
        sums[j] = 0.0
    return total


@inlined
def _spread_mask(mask: Any, n: int, table: Any) -> None:
    L = mask.shape[1]
    for j in range(0, table.size, L):
        for i in range(L):
            table[j + i] = mask[n, i]


@inlined
def _spread_affine(mean: Any, rstd: Any, weight: Any, bias: Any, c0: int, c1: int, L: int, scratch: Any) -> None:
    """Tables 0, 1, 2: center, scale, shift."""
    width = (c1 - c0) * L
    center, scale, shift = _table(scratch, 0, width), _table(scratch, 1, width), _table(scratch, 2, width)
    for c in range(c1 - c0):
        center_c, scale_c, shift_c = _affine(
            scratch.dtype.type, mean[c0 + c], rstd[c0 + c], weight[c0 + c], bias[c0 + c]
        )
        _spread(center_c, c, L, center)
        _spread(scale_c, c, L, scale)
        _spread(shift_c, c, L, shift)


@stage
def _moments_by_row(
    MASKED: int, x: Any, mask: Any, n0: int, n1: int, c0: int, c1: int, mean: Any, squares: Any
) -> float:
    T = mask.dtype.type
    L = x.shape[2]
    channels, j0, j1, width = c1 - c0, c0 * L, c1 * L, (c1 - c0) * L
    x_rows, scratch, sums = _rows(x), _scratch(mask.dtype), _scratch(np.float64)
    center, kept = _table(scratch, 0, width), _table(scratch, 1, width)
    total, total_d2 = _table(scratch, 2, width), _table(scratch, 3, width)
    sum_d, sum_d2 = _table(sums, 0, width), _table(sums, 1, width)
    total[:], total_d2[:], sum_d[:], sum_d2[:] = T(0), T(0), 0.0, 0.0
    count = 0.0
    for c in range(c0, c1):
        mean[c] = 0.0
        squares[c] = 0.0
    g0 = n0
    while g0 < n1:
        g1 = min(g0 + max(ROWS, g0 - n0), n1)  # a group is as large as all before it: see `_uncenter`
        size = float((g1 - g0) * L)
        kept_n, kept_i = g0, 0
        if MASKED:
            size = 0.0
            for n in range(g0, g1):
                for i in range(L):
                    size += mask[n, i]
            kept_n, kept_i = _first_kept(mask, g0, g1, 0, L)
        if size > 0.0:
            for c in range(channels):
                _spread(load(x[kept_n, c0 + c, kept_i]) if count == 0.0 else T(mean[c0 + c]), c, L, center)
            if 8 * count < size:
                near = g1 if MASKED else min(g0 + FIRST_ROWS, g1)
                for n in range(g0, near):
                    row = x_rows[n, j0:j1]
                    if MASKED:
                        _spread_mask(mask, n, kept)
                        for j in range(width):
                            total[j] += kept[j] * (load(row[j]) - center[j]) if kept[j] > 0 else T(0)
                    else:
                        for j in range(width):
                            total[j] += load(row[j]) - center[j]
                _flush(total, sum_d)
                values = size if MASKED else float((near - g0) * L)
                for c in range(channels):
                    _spread(T(center[c * L] + _collect(c, L, sum_d) / values), c, L, center)
            for b0 in range(g0, g1, ROWS):
                b1 = min(b0 + ROWS, g1)
                fours = b0 if MASKED else b0 + (b1 - b0) // 4 * 4
                for n in range(b0, fours, 4):  # four rows for each time that the totals are read and written
                    row_0, row_1 = x_rows[n, j0:j1], x_rows[n + 1, j0:j1]
                    row_2, row_3 = x_rows[n + 2, j0:j1], x_rows[n + 3, j0:j1]
                    for j in range(width):
                        d_0, d_1 = load(row_0[j]) - center[j], load(row_1[j]) - center[j]
                        d_2, d_3 = load(row_2[j]) - center[j], load(row_3[j]) - center[j]
                        total[j] += (d_0 + d_1) + (d_2 + d_3)
                        total_d2[j] += (d_0 * d_0 + d_1 * d_1) + (d_2 * d_2 + d_3 * d_3)
                for n in range(fours, b1):
                    row = x_rows[n, j0:j1]
                    if MASKED and L == 1:
                        weight = mask[n, 0]
                        if weight > 0:
                            for j in range(width):
                                d = load(row[j]) - center[j]
                                total[j] += weight * d
                                total_d2[j] += weight * d * d
                    elif MASKED:
                        _spread_mask(mask, n, kept)
                        for j in range(width):
                            d = load(row[j]) - center[j] if kept[j] > 0 else T(0)
                            total[j] += kept[j] * d
                            total_d2[j] += kept[j] * d * d
                    else:
                        for j in range(width):
                            d = load(row[j]) - center[j]
                            total[j] += d
                            total_d2[j] += d * d
                _flush(total, sum_d)
                _flush(total_d2, sum_d2)
            for c in range(channels):
                mean_b, squares_b = _uncenter(size, center[c * L], _collect(c, L, sum_d), _collect(c, L, sum_d2))
                _, mean[c0 + c], squares[c0 + c] = _merge(count, mean[c0 + c], squares[c0 + c], size, mean_b, squares_b)
            count += size
        g0 = g1
    return count


@stage
def _normalize_by_row(
    ACT: int, RESIDUAL: int, x: Any, residual: Any, mean: Any, rstd: Any, weight: Any, bias: Any, parameter: Any,
    n0: int, n1: int, c0: int, c1: int, y: Any,
) -> None:  # fmt: skip
    L = x.shape[2]
    j0, j1, width = c0 * L, c1 * L, (c1 - c0) * L
    x_rows, residual_rows, y_rows = _rows(x), _rows(residual), _rows(y)
    scratch = _scratch(weight.dtype)
    center, scale, shift = _table(scratch, 0, width), _table(scratch, 1, width), _table(scratch, 2, width)
    _spread_affine(mean, rstd, weight, bias, c0, c1, L, scratch)
    for n in range(n0, n1):
        row, residual_row, y_row = x_rows[n, j0:j1], residual_rows[n, j0:j1], y_rows[n, j0:j1]
        for j in range(width):
            z = (load(row[j]) - center[j]) * scale[j] + shift[j]
            if RESIDUAL:
                z += load(residual_row[j])
            store(y_row, j, activate(ACT, parameter, z))


@stage
def _grad_sums_by_row(
    ACT: int, RESIDUAL: int, dy: Any, x: Any, residual: Any,
    mean: Any, rstd: Any, weight: Any, bias: Any, parameter: Any,
    n0: int, n1: int, c0: int, c1: int, sum_dz: Any, sum_dz_xhat: Any,
) -> None:  # fmt: skip
    T = weight.dtype.type
    L = x.shape[2]
    channels, j0, j1, width = c1 - c0, c0 * L, c1 * L, (c1 - c0) * L
    dy_rows, x_rows, residual_rows = _rows(dy), _rows(x), _rows(residual)
    scratch, sums = _scratch(weight.dtype), _scratch(np.float64)
    center, scale, shift = _table(scratch, 0, width), _table(scratch, 1, width), _table(scratch, 2, width)
    total, total_d = _table(scratch, 3, width), _table(scratch, 4, width)
    sum_z, sum_d = _table(sums, 0, width), _table(sums, 1, width)
    total[:], total_d[:], sum_z[:], sum_d[:] = T(0), T(0), 0.0, 0.0
    _spread_affine(mean, rstd, weight, bias, c0, c1, L, scratch)
    for b0 in range(n0, n1, ROWS):
        b1 = min(b0 + ROWS, n1)
        pairs = b0 + (b1 - b0) // 2 * 2
        for n in range(b0, pairs, 2):  # two rows for each time that the totals are read and written
            dy_0, row_0, residual_0 = dy_rows[n, j0:j1], x_rows[n, j0:j1], residual_rows[n, j0:j1]
            dy_1, row_1, residual_1 = dy_rows[n + 1, j0:j1], x_rows[n + 1, j0:j1], residual_rows[n + 1, j0:j1]
            for j in range(width):
                d_0, d_1 = load(row_0[j]) - center[j], load(row_1[j]) - center[j]
                z_0, z_1 = d_0 * scale[j] + shift[j], d_1 * scale[j] + shift[j]
                if RESIDUAL:
                    z_0 += load(residual_0[j])
                    z_1 += load(residual_1[j])
                dz_0 = activate_grad(ACT, parameter, z_0, load(dy_0[j]))
                dz_1 = activate_grad(ACT, parameter, z_1, load(dy_1[j]))
                total[j] += dz_0 + dz_1
                total_d[j] += dz_0 * d_0 + dz_1 * d_1
        for n in range(pairs, b1):
            dy_row, row, residual_row = dy_rows[n, j0:j1], x_rows[n, j0:j1], residual_rows[n, j0:j1]
            for j in range(width):
                d = load(row[j]) - center[j]
                z = d * scale[j] + shift[j]
                if RESIDUAL:
                    z += load(residual_row[j])
                dz = activate_grad(ACT, parameter, z, load(dy_row[j]))
                total[j] += dz
                total_d[j] += dz * d
        _flush(total, sum_z)
        _flush(total_d, sum_d)
    for c in range(channels):
        sum_dz[c0 + c] = _collect(c, L, sum_z)
        sum_dz_d = _collect(c, L, sum_d)
        sum_dz_xhat[c0 + c] = rstd[c0 + c] * (sum_dz_d - (mean[c0 + c] - center[c * L]) * sum_dz[c0 + c])


@stage
def _grad_input_by_row(
    ACT: int, RESIDUAL: int, MASKED: int, dy: Any, x: Any, residual: Any, mask: Any,
    mean: Any, rstd: Any, weight: Any, bias: Any,
    sum_dz: Any, sum_dz_xhat: Any, count: float, parameter: Any,
    n0: int, n1: int, c0: int, c1: int, dx: Any, d_residual: Any,
) -> None:  # fmt: skip
    T = weight.dtype.type
    L = x.shape[2]
    j0, j1, width = c0 * L, c1 * L, (c1 - c0) * L
    dy_rows, x_rows, residual_rows = _rows(dy), _rows(x), _rows(residual)
    dx_rows, d_residual_rows = _rows(dx), _rows(d_residual)
    scratch = _scratch(weight.dtype)
    center, scale, shift = _table(scratch, 0, width), _table(scratch, 1, width), _table(scratch, 2, width)
    slope, level, kept = _table(scratch, 3, width), _table(scratch, 4, width), _table(scratch, 5, width)
    _spread_affine(mean, rstd, weight, bias, c0, c1, L, scratch)
    for c in range(c0, c1):
        slope_c, level_c = _through_moments(T, mean[c], rstd[c], weight[c], sum_dz[c], sum_dz_xhat[c], count)
        _spread(slope_c, c - c0, L, slope)
        _spread(level_c, c - c0, L, level)
    for n in range(n0, n1):
        dy_row, row, residual_row = dy_rows[n, j0:j1], x_rows[n, j0:j1], residual_rows[n, j0:j1]
        dx_row, d_residual_row = dx_rows[n, j0:j1], d_residual_rows[n, j0:j1]
        if MASKED and L == 1:
            share = mask[n, 0]
            for j in range(width):
                d = load(row[j]) - center[j]
                z = d * scale[j] + shift[j]
                if RESIDUAL:
                    z += load(residual_row[j])
                dz = activate_grad(ACT, parameter, z, load(dy_row[j]))
                store(dx_row, j, scale[j] * dz - (share * (d * slope[j] + level[j]) if share > 0 else T(0)))
                if RESIDUAL:
                    store(d_residual_row, j, dz)
            continue
        if MASKED:
            _spread_mask(mask, n, kept)
        for j in range(width):
            d = load(row[j]) - center[j]
            z = d * scale[j] + shift[j]
            if RESIDUAL:
                z += load(residual_row[j])
            dz = activate_grad(ACT, parameter, z, load(dy_row[j]))
            if MASKED:
                store(dx_row, j, scale[j] * dz - (kept[j] * (d * slope[j] + level[j]) if kept[j] > 0 else T(0)))
            else:
                store(dx_row, j, scale[j] * dz - (d * slope[j] + level[j]))
            if RESIDUAL:
                store(d_residual_row, j, dz)


# --- Kernels: the stages over all tiles ------------------------------------------------------------------------------
# Each factory's arguments are constants of the kernel it makes.


@functools.cache
def _moments_kernel(BY_CHANNEL: int, MASKED: int, parallel: bool) -> Kernel:
    @kernel(parallel)
    def moments(x: Any, mask: Any, rows: int, width: int, mean: Any, var: Any) -> None:
        N, C, _ = x.shape
        parts, blocks = -(-N // rows), -(-C // width)
        counts = np.empty((parts, blocks))
        means, squares = np.empty((parts, C)), np.empty((parts, C))
        for tile in prange(parts * blocks):
            part, block = tile // blocks, tile % blocks
            n0, n1, c0, c1 = part * rows, min((part + 1) * rows, N), block * width, min((block + 1) * width, C)
            if BY_CHANNEL:
                counts[part, block] = _moments_by_channel(MASKED, x, mask, n0, n1, c0, c1, means[part], squares[part])
            else:
                counts[part, block] = _moments_by_row(MASKED, x, mask, n0, n1, c0, c1, means[part], squares[part])
        for c in range(C):
            count, mean_c, squares_c = 0.0, 0.0, 0.0
            for part in range(parts):
                size = counts[part, c // width]
                if size > 0.0:
                    count, mean_c, squares_c = _merge(count, mean_c, squares_c, size, means[part, c], squares[part, c])
            mean[c] = mean_c
            var[c] = squares_c / count if count > 0.0 else 0.0

    return moments


@functools.cache
def _normalize_kernel(BY_CHANNEL: int, ACT: int, RESIDUAL: int, parallel: bool) -> Kernel:
    @kernel(parallel)
    def normalize(
        x: Any,
        residual: Any,
        mean: Any,
        rstd: Any,
        weight: Any,
        bias: Any,
        parameter: Any,
        rows: int,
        width: int,
        y: Any,
    ) -> None:
        N, C, _ = x.shape
        parts, blocks = -(-N // rows), -(-C // width)
        for tile in prange(parts * blocks):
            part, block = tile // blocks, tile % blocks
            n0, n1, c0, c1 = part * rows, min((part + 1) * rows, N), block * width, min((block + 1) * width, C)
            if BY_CHANNEL:
                _normalize_by_channel(
                    ACT, RESIDUAL, x, residual, mean, rstd, weight, bias, parameter, n0, n1, c0, c1, y
                )
            else:
                _normalize_by_row(ACT, RESIDUAL, x, residual, mean, rstd, weight, bias, parameter, n0, n1, c0, c1, y)

    return normalize


@functools.cache
def _grad_sums_kernel(BY_CHANNEL: int, ACT: int, RESIDUAL: int, parallel: bool) -> Kernel:
    @kernel(parallel)
    def grad_sums(
        dy: Any, x: Any, residual: Any, mean: Any, rstd: Any, weight: Any, bias: Any, parameter: Any,
        rows: int, width: int, sum_dz: Any, sum_dz_xhat: Any,
    ) -> None:  # fmt: skip
        N, C, _ = x.shape
        parts, blocks = -(-N // rows), -(-C // width)
        sums, sums_xhat = np.empty((parts, C)), np.empty((parts, C))
        for tile in prange(parts * blocks):
            part, block = tile // blocks, tile % blocks
            n0, n1, c0, c1 = part * rows, min((part + 1) * rows, N), block * width, min((block + 1) * width, C)
            if BY_CHANNEL:
                _grad_sums_by_channel(
                    ACT, RESIDUAL, dy, x, residual, mean, rstd, weight, bias, parameter, n0, n1, c0, c1,
                    sums[part], sums_xhat[part],
                )  # fmt: skip
            else:
                _grad_sums_by_row(
                    ACT, RESIDUAL, dy, x, residual, mean, rstd, weight, bias, parameter, n0, n1, c0, c1,
                    sums[part], sums_xhat[part],
                )  # fmt: skip
        for c in range(C):
            sum_dz[c] = 0.0
            sum_dz_xhat[c] = 0.0
            for part in range(parts):
                sum_dz[c] += sums[part, c]
                sum_dz_xhat[c] += sums_xhat[part, c]

    return grad_sums


@functools.cache
def _grad_input_kernel(BY_CHANNEL: int, ACT: int, RESIDUAL: int, MASKED: int, parallel: bool) -> Kernel:
    @kernel(parallel)
    def grad_input(
        dy: Any, x: Any, residual: Any, mask: Any, mean: Any, rstd: Any, weight: Any, bias: Any, sum_dz: Any,
        sum_dz_xhat: Any, count: float, parameter: Any, rows: int, width: int, dx: Any, d_residual: Any,
    ) -> None:  # fmt: skip
        N, C, _ = x.shape
        parts, blocks = -(-N // rows), -(-C // width)
        for tile in prange(parts * blocks):
            part, block = tile // blocks, tile % blocks
            n0, n1, c0, c1 = part * rows, min((part + 1) * rows, N), block * width, min((block + 1) * width, C)
            if BY_CHANNEL:
                _grad_input_by_channel(
                    ACT, RESIDUAL, MASKED, dy, x, residual, mask, mean, rstd, weight, bias, sum_dz, sum_dz_xhat,
                    count, parameter, n0, n1, c0, c1, dx, d_residual,
                )  # fmt: skip
            else:
                _grad_input_by_row(
                    ACT, RESIDUAL, MASKED, dy, x, residual, mask, mean, rstd, weight, bias, sum_dz, sum_dz_xhat,
                    count, parameter, n0, n1, c0, c1, dx, d_residual,
                )  # fmt: skip

    return grad_input


@functools.cache
def _forward_kernel(BY_CHANNEL: int, ACT: int, RESIDUAL: int, MASKED: int, parallel: bool) -> Kernel:
    @kernel(parallel)
    def forward(
        x: Any, residual: Any, mask: Any, weight: Any, bias: Any, eps: float, parameter: Any, width: int,
        y: Any, mean: Any, var: Any, rstd: Any,
    ) -> None:  # fmt: skip
        N, C, _ = x.shape
        for block in prange(-(-C // width)):
            c0, c1 = block * width, min((block + 1) * width, C)
            if BY_CHANNEL:
                count = _moments_by_channel(MASKED, x, mask, 0, N, c0, c1, mean, var)
            else:
                count = _moments_by_row(MASKED, x, mask, 0, N, c0, c1, mean, var)
            for c in range(c0, c1):
                var[c] = var[c] / count if count > 0.0 else 0.0
                rstd[c] = 1.0 / math.sqrt(var[c] + eps)
            if BY_CHANNEL:
                _normalize_by_channel(ACT, RESIDUAL, x, residual, mean, rstd, weight, bias, parameter, 0, N, c0, c1, y)
            else:
                _normalize_by_row(ACT, RESIDUAL, x, residual, mean, rstd, weight, bias, parameter, 0, N, c0, c1, y)

    return forward


@functools.cache
def _backward_kernel(BY_CHANNEL: int, ACT: int, RESIDUAL: int, MASKED: int, parallel: bool) -> Kernel:
    @kernel(parallel)
    def backward(
        dy: Any, x: Any, residual: Any, mask: Any, mean: Any, rstd: Any, weight: Any, bias: Any, count: float,
        parameter: Any, width: int, sum_dz: Any, sum_dz_xhat: Any, dx: Any, d_residual: Any,
    ) -> None:  # fmt: skip
        N, C, _ = x.shape
        for block in prange(-(-C // width)):
            c0, c1 = block * width, min((block + 1) * width, C)
            if BY_CHANNEL:
                _grad_sums_by_channel(
                    ACT, RESIDUAL, dy, x, residual, mean, rstd, weight, bias, parameter, 0, N, c0, c1,
                    sum_dz, sum_dz_xhat,
                )  # fmt: skip
                _grad_input_by_channel(
                    ACT, RESIDUAL, MASKED, dy, x, residual, mask, mean, rstd, weight, bias, sum_dz, sum_dz_xhat,
                    count, parameter, 0, N, c0, c1, dx, d_residual,
                )  # fmt: skip
            else:
                _grad_sums_by_row(
                    ACT, RESIDUAL, dy, x, residual, mean, rstd, weight, bias, parameter, 0, N, c0, c1,
                    sum_dz, sum_dz_xhat,
                )  # fmt: skip
                _grad_input_by_row(
                    ACT, RESIDUAL, MASKED, dy, x, residual, mask, mean, rstd, weight, bias, sum_dz, sum_dz_xhat,
                    count, parameter, 0, N, c0, c1, dx, d_residual,
                )  # fmt: skip

    return backward


@functools.cache
def _update_running_kernel() -> Kernel:
    @kernel(parallel=False)
    def update_running(
        mean: Any, var: Any, correction: float, update_rate: float, running_mean: Any, running_var: Any, updated: Any
    ) -> None:
        updated[0] = True
        for c in range(mean.size):
            if not (math.isfinite(mean[c]) and math.isfinite(var[c])):
                updated[0] = False
        if updated[0]:
            for c in range(mean.size):
                running_mean[c] += update_rate * (mean[c] - running_mean[c])
                running_var[c] += update_rate * (correction * var[c] - running_var[c])

    return update_running


# --- What the rest of the package calls ------------------------------------------------------------------------------


class Compiled(NamedTuple):
    """An activation as kernels take it: its code, a constant of the kernel, and its parameter."""

    code: int
    parameter: Any


@functools.lru_cache(maxsize=256)
def _compiled(activation: ActivationSpec, dtype: np.dtype[Any]) -> Compiled:
    name, parameter = parse_activation(activation)
    return Compiled(CODES[name], dtype.type(parameter))


@functools.lru_cache(maxsize=256)
def _ones(channels: int, dtype: np.dtype[Any]) -> Array:
    return np.ones(channels, dtype)


@functools.lru_cache(maxsize=256)
def _zeros(channels: int, dtype: np.dtype[Any]) -> Array:
    return np.zeros(channels, dtype)


@functools.cache
def _no_mask(dtype: np.dtype[Any]) -> Array:
    return np.empty((0, 0), dtype)


def _parallel(x: Array) -> bool:
    # For one thread too: compiled as another kernel, the same sums may be put together in another order.
    return x.size >= SERIAL and not threads.forbidden()


def moments(x: Array, mask: Array | None, mean: Array, var: Array) -> None:
    """Write the mean and the biased variance of each channel into `mean` and `var`, `(C,)` of float64.

    Args:
        x: `(N, C, L)`, contiguous: float32, float64, or bfloat16 as uint16.
        mask: `(N, L)`, contiguous, of the type of `x` (float32 for bfloat16): what each value counts for; 1 if None.
        mean, var: Written. 0 where the mask leaves nothing.
    """
    cut = tiling(x.shape, x.itemsize, 1)
    run = _moments_kernel(cut.by_channel, mask is not None, _parallel(x))
    threads.run(run, x, _no_mask(arithmetic(x.dtype)) if mask is None else mask, cut.rows, cut.width, mean, var)


def normalize(
    x: Array,
    residual: Array | None,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    bias: Array | None,
    activation: ActivationSpec,
    y: Array,
) -> None:
    """Write `act((x - mean) * rstd * weight + bias + residual)` into `y`.

    Args:
        x, residual, y: `(N, C, L)`, contiguous, of one type.
        mean, rstd: `(C,)`, float64.
        weight, bias: `(C,)`, of the type of `x` (float32 for bfloat16); 1 and 0 if None.
        activation: As in `definition.normalize`.
    """
    act = _compiled(activation, arithmetic(x.dtype))
    cut = tiling(x.shape, x.itemsize, 1)
    run = _normalize_kernel(cut.by_channel, act.code, residual is not None, _parallel(x))
    c, dtype = x.shape[1], arithmetic(x.dtype)
    threads.run(
        run, x, x if residual is None else residual, mean, rstd,
        _ones(c, dtype) if weight is None else weight, _zeros(c, dtype) if bias is None else bias,
        act.parameter, cut.rows, cut.width, y,
    )  # fmt: skip


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
) -> None:
    """Write `sum dz` and `sum dz*xhat` of each channel, where `dz = dy * act'(z)`, with `z` recomputed from `x`.

    Args:
        dy, x, residual, mean, rstd, weight, bias, activation: As in `normalize`; `dy` like `x`.
        sum_dz, sum_dz_xhat: `(C,)`, float64. Written.
    """
    act = _compiled(activation, arithmetic(x.dtype))
    cut = tiling(x.shape, x.itemsize, 2)
    run = _grad_sums_kernel(cut.by_channel, act.code, residual is not None, _parallel(x))
    c, dtype = x.shape[1], arithmetic(x.dtype)
    threads.run(
        run, dy, x, x if residual is None else residual, mean, rstd,
        _ones(c, dtype) if weight is None else weight, _zeros(c, dtype) if bias is None else bias,
        act.parameter, cut.rows, cut.width, sum_dz, sum_dz_xhat,
    )  # fmt: skip


def grad_input(
    dy: Array,
    x: Array,
    residual: Array | None,
    mask: Array | None,
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
) -> None:
    """Write the gradient of `x` into `dx`, and `dz` into `d_residual`.

    Args:
        dy, x, residual, mean, rstd, weight, bias, activation: As in `grad_sums`.
        mask: As in `moments`.
        sum_dz, sum_dz_xhat: `(C,)`, float64, over all the values behind `mean` and `rstd`.
        count: How many these are; `inf` if `mean` and `rstd` are constants.
        dx: `(N, C, L)`, contiguous. Written.
        d_residual: Like `dx`; None if and only if `residual` is. Written.
    """
    act = _compiled(activation, arithmetic(x.dtype))
    cut = tiling(x.shape, x.itemsize, 2)
    run = _grad_input_kernel(cut.by_channel, act.code, residual is not None, mask is not None, _parallel(x))
    c, dtype = x.shape[1], arithmetic(x.dtype)
    threads.run(
        run, dy, x, x if residual is None else residual, _no_mask(dtype) if mask is None else mask, mean, rstd,
        _ones(c, dtype) if weight is None else weight, _zeros(c, dtype) if bias is None else bias,
        sum_dz, sum_dz_xhat, count, act.parameter, cut.rows, cut.width, dx, dx if d_residual is None else d_residual,
    )  # fmt: skip


def forward(
    x: Array,
    residual: Array | None,
    mask: Array | None,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    activation: ActivationSpec,
    y: Array,
    mean: Array,
    var: Array,
    rstd: Array,
) -> None:
    """`moments`, then `normalize`, block by block while a block is in the cache.

    Args:
        x, residual, mask, weight, bias, activation: As in `moments` and `normalize`.
        eps: Added to the variance.
        y: `(N, C, L)`, contiguous. Written.
        mean, var, rstd: `(C,)`, float64. Written.
    """
    cut = tiling(x.shape, x.itemsize, 1)
    if not cut.fused(x):
        moments(x, mask, mean, var)
        np.divide(1.0, np.sqrt(var + eps), out=rstd)
        return normalize(x, residual, mean, rstd, weight, bias, activation, y)
    act = _compiled(activation, arithmetic(x.dtype))
    run = _forward_kernel(cut.by_channel, act.code, residual is not None, mask is not None, _parallel(x))
    c, dtype = x.shape[1], arithmetic(x.dtype)
    threads.run(
        run, x, x if residual is None else residual, _no_mask(dtype) if mask is None else mask,
        _ones(c, dtype) if weight is None else weight, _zeros(c, dtype) if bias is None else bias,
        eps, act.parameter, cut.width, y, mean, var, rstd,
    )  # fmt: skip
    return None


def backward(
    dy: Array,
    x: Array,
    residual: Array | None,
    mask: Array | None,
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
) -> None:
    """`grad_sums`, then `grad_input`, block by block while a block is in the cache.

    Args:
        dy, x, residual, mask, mean, rstd, weight, bias, count, activation, dx, d_residual: As in `grad_input`.
        sum_dz, sum_dz_xhat: `(C,)`, float64. Written.
    """
    cut = tiling(x.shape, x.itemsize, 2)
    if not cut.fused(x):
        grad_sums(dy, x, residual, mean, rstd, weight, bias, activation, sum_dz, sum_dz_xhat)
        return grad_input(
            dy, x, residual, mask, mean, rstd, weight, bias, sum_dz, sum_dz_xhat, count, activation, dx, d_residual
        )
    act = _compiled(activation, arithmetic(x.dtype))
    run = _backward_kernel(cut.by_channel, act.code, residual is not None, mask is not None, _parallel(x))
    c, dtype = x.shape[1], arithmetic(x.dtype)
    threads.run(
        run, dy, x, x if residual is None else residual, _no_mask(dtype) if mask is None else mask, mean, rstd,
        _ones(c, dtype) if weight is None else weight, _zeros(c, dtype) if bias is None else bias,
        count, act.parameter, cut.width, sum_dz, sum_dz_xhat, dx, dx if d_residual is None else d_residual,
    )  # fmt: skip
    return None


def update_running(
    mean: Array, var: Array, count: float, update_rate: float, running_mean: Array, running_var: Array, updated: Array
) -> None:
    """Move the running statistics towards those of a batch, unless one of these is not finite.

    Args:
        mean, var: `(C,)`, float64; the variance is biased.
        count: How many values each channel has; the running variance takes `var * count / (count - 1)`.
        update_rate: The weight of the new batch.
        running_mean, running_var: `(C,)`. Changed in place.
        updated: `(1,)`, boolean: whether they were. Written.
    """
    correction = count / (count - 1) if count > 1 else 1.0
    threads.run(_update_running_kernel(), mean, var, correction, update_rate, running_mean, running_var, updated)
