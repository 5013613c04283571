"""The stages on one tile, walked by row: the innermost loop goes along a row, all `channels * L` values of one sample.

This suits short runs of positions (7 x 7 images, and `L = 1`, which is no special case). The tile's values of one
sample are adjacent. Per-channel numbers are spread into tables with one entry for each value of a row; the tables stay
in the L1 cache.
"""

from typing import Any

import numpy as np

from batchnorm.kernels.activations import activate, activate_grad
from batchnorm.kernels.compilation import inlined, stage
from batchnorm.kernels.formats import load, store
from batchnorm.kernels.formulas import OUTPUT, affine, first_counted, merge, through_moments, uncenter
from batchnorm.kernels.tiling import FIRST_ROWS, ROWS, TABLE_STRIDE, TABLES

__all__ = ["grad_input", "grad_sums", "moments", "normalize"]

# --- Tables ----------------------------------------------------------------------------------------------------------


@inlined
def _scratch(dtype: Any) -> Any:
    """Room for all tables of a stage.

    They share one array because LLVM does not vectorize a loop in which too many arrays might overlap.
    """
    return np.empty(TABLES * TABLE_STRIDE, dtype)


@inlined
def _table(scratch: Any, number: int, width: int) -> Any:
    """One of the tables in `scratch`."""
    return scratch[number * TABLE_STRIDE : number * TABLE_STRIDE + width]


@inlined
def _rows(x: Any) -> Any:
    """`(N, C, L)` as a matrix with one row per sample."""
    return x.reshape((x.shape[0], x.shape[1] * x.shape[2]))


@inlined
def _spread(value: Any, c: int, L: int, table: Any) -> None:
    """Write one channel's number at all its positions in a row; channel `c = 0` is the tile's first."""
    for j in range(c * L, (c + 1) * L):
        table[j] = value


@inlined
def _flush(total: Any, sums: Any) -> None:
    """Add a table of sums to one of float64, and clear it."""
    for j in range(total.size):
        sums[j] += total[j]
        total[j] = 0


@inlined
def _collect(c: int, L: int, sums: Any) -> float:
    """Add up the sums at one channel's positions, and clear them."""
    total = 0.0
    for j in range(c * L, (c + 1) * L):
        total += sums[j]
        sums[j] = 0.0
    return total


@inlined
def _spread_counts(counts: Any, n: int, table: Any) -> None:
    """Write the counts of one sample's positions, once for each channel."""
    L = counts.shape[1]
    for j in range(0, table.size, L):
        for i in range(L):
            table[j + i] = counts[n, i]


@inlined
def _spread_affine(mean: Any, rstd: Any, weight: Any, bias: Any, c0: int, c1: int, L: int, scratch: Any) -> None:
    """Fill tables 0, 1 and 2 with center, scale and shift: see `affine`."""
    width = (c1 - c0) * L
    center, scale, shift = _table(scratch, 0, width), _table(scratch, 1, width), _table(scratch, 2, width)
    for c in range(c1 - c0):
        center_c, scale_c, shift_c = affine(
            scratch.dtype.type, mean[c0 + c], rstd[c0 + c], weight[c0 + c], bias[c0 + c]
        )
        _spread(center_c, c, L, center)
        _spread(scale_c, c, L, scale)
        _spread(shift_c, c, L, shift)


# --- Stages ----------------------------------------------------------------------------------------------------------


@stage
def moments(COUNTED: int, x: Any, counts: Any, n0: int, n1: int, c0: int, c1: int, mean: Any, squares: Any) -> float:
    """Write each channel's mean, and its sum of squares about the mean. Returns how much was counted per channel."""
    T = counts.dtype.type
    L = x.shape[2]
    channels, j0, j1, width = c1 - c0, c0 * L, c1 * L, (c1 - c0) * L
    x_rows, scratch, sums = _rows(x), _scratch(counts.dtype), _scratch(np.float64)
    center, times = _table(scratch, 0, width), _table(scratch, 1, width)
    total, total_d2 = _table(scratch, 2, width), _table(scratch, 3, width)
    sum_d, sum_d2 = _table(sums, 0, width), _table(sums, 1, width)
    total[:], total_d2[:], sum_d[:], sum_d2[:] = T(0), T(0), 0.0, 0.0
    count = 0.0
    for c in range(c0, c1):
        mean[c] = 0.0
        squares[c] = 0.0
    g0 = n0
    while g0 < n1:
        g1 = min(g0 + max(ROWS, g0 - n0), n1)  # a group is as large as all before it: see `uncenter`
        size = float((g1 - g0) * L)
        first_n, first_i = g0, 0
        if COUNTED:
            size = 0.0
            for n in range(g0, g1):
                for i in range(L):
                    size += float(counts[n, i])
            first_n, first_i = first_counted(counts, g0, g1, 0, L)
        if size > 0.0:
            for c in range(channels):
                _spread(load(x[first_n, c0 + c, first_i]) if count == 0.0 else T(mean[c0 + c]), c, L, center)
            if 8 * count < size:
                near = g1 if COUNTED else min(g0 + FIRST_ROWS, g1)
                for n in range(g0, near):
                    row = x_rows[n, j0:j1]
                    if COUNTED:
                        _spread_counts(counts, n, times)
                        for j in range(width):
                            total[j] += times[j] * (load(row[j]) - center[j]) if times[j] > 0 else T(0)
                    else:
                        for j in range(width):
                            total[j] += load(row[j]) - center[j]
                _flush(total, sum_d)
                values = size if COUNTED else float((near - g0) * L)
                for c in range(channels):
                    _spread(T(center[c * L] + _collect(c, L, sum_d) / values), c, L, center)
            for b0 in range(g0, g1, ROWS):
                b1 = min(b0 + ROWS, g1)
                fours = b0 if COUNTED else b0 + (b1 - b0) // 4 * 4
                for n in range(b0, fours, 4):  # the totals are read and written once for four rows
                    row_0, row_1 = x_rows[n, j0:j1], x_rows[n + 1, j0:j1]
                    row_2, row_3 = x_rows[n + 2, j0:j1], x_rows[n + 3, j0:j1]
                    for j in range(width):
                        d_0, d_1 = load(row_0[j]) - center[j], load(row_1[j]) - center[j]
                        d_2, d_3 = load(row_2[j]) - center[j], load(row_3[j]) - center[j]
                        total[j] += (d_0 + d_1) + (d_2 + d_3)
                        total_d2[j] += (d_0 * d_0 + d_1 * d_1) + (d_2 * d_2 + d_3 * d_3)
                for n in range(fours, b1):
                    row = x_rows[n, j0:j1]
                    if COUNTED and L == 1:
                        times_n = counts[n, 0]
                        if times_n > 0:
                            for j in range(width):
                                d = load(row[j]) - center[j]
                                total[j] += times_n * d
                                total_d2[j] += times_n * d * d
                    elif COUNTED:
                        _spread_counts(counts, n, times)
                        for j in range(width):
                            d = load(row[j]) - center[j] if times[j] > 0 else T(0)
                            total[j] += times[j] * d
                            total_d2[j] += times[j] * d * d
                    else:
                        for j in range(width):
                            d = load(row[j]) - center[j]
                            total[j] += d
                            total_d2[j] += d * d
                _flush(total, sum_d)
                _flush(total_d2, sum_d2)
            for c in range(channels):
                mean_b, squares_b = uncenter(size, center[c * L], _collect(c, L, sum_d), _collect(c, L, sum_d2))
                _, mean[c0 + c], squares[c0 + c] = merge(count, mean[c0 + c], squares[c0 + c], size, mean_b, squares_b)
            count += size
        g0 = g1
    return count


@stage
def normalize(
    ACT: int, RESIDUAL: int, x: Any, residual: Any, mean: Any, rstd: Any, weight: Any, bias: Any, parameter: Any,
    n0: int, n1: int, c0: int, c1: int, y: Any,
) -> None:  # fmt: skip
    """Write `y`."""
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
def grad_sums(
    ACT: int, RESIDUAL: int, dy: Any, x: Any, residual: Any,
    mean: Any, rstd: Any, weight: Any, bias: Any, parameter: Any,
    n0: int, n1: int, c0: int, c1: int, sum_dz: Any, sum_dz_xhat: Any,
) -> None:  # fmt: skip
    """Write `sum dz` and `sum dz*xhat` of each channel. `residual` is `y` if `RESIDUAL` is `OUTPUT`."""
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
        for n in range(b0, pairs, 2):  # the totals are read and written once for two rows
            dy_0, row_0, residual_0 = dy_rows[n, j0:j1], x_rows[n, j0:j1], residual_rows[n, j0:j1]
            dy_1, row_1, residual_1 = dy_rows[n + 1, j0:j1], x_rows[n + 1, j0:j1], residual_rows[n + 1, j0:j1]
            for j in range(width):
                d_0, d_1 = load(row_0[j]) - center[j], load(row_1[j]) - center[j]
                z_0, z_1 = d_0 * scale[j] + shift[j], d_1 * scale[j] + shift[j]
                if RESIDUAL == OUTPUT:
                    z_0, z_1 = load(residual_0[j]), load(residual_1[j])
                elif RESIDUAL:
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
                if RESIDUAL == OUTPUT:
                    z = load(residual_row[j])
                elif RESIDUAL:
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
def grad_input(
    ACT: int, RESIDUAL: int, COUNTED: int, dy: Any, x: Any, residual: Any, counts: Any,
    mean: Any, rstd: Any, weight: Any, bias: Any,
    sum_dz: Any, sum_dz_xhat: Any, count: float, parameter: Any,
    n0: int, n1: int, c0: int, c1: int, dx: Any, d_residual: Any,
) -> None:  # fmt: skip
    """Write `dx`, and `dz` into `d_residual` if there is a residual."""
    T = weight.dtype.type
    L = x.shape[2]
    j0, j1, width = c0 * L, c1 * L, (c1 - c0) * L
    dy_rows, x_rows, residual_rows = _rows(dy), _rows(x), _rows(residual)
    dx_rows, d_residual_rows = _rows(dx), _rows(d_residual)
    scratch = _scratch(weight.dtype)
    center, scale, shift = _table(scratch, 0, width), _table(scratch, 1, width), _table(scratch, 2, width)
    slope, level, times = _table(scratch, 3, width), _table(scratch, 4, width), _table(scratch, 5, width)
    _spread_affine(mean, rstd, weight, bias, c0, c1, L, scratch)
    for c in range(c0, c1):
        slope_c, level_c = through_moments(T, mean[c], rstd[c], weight[c], sum_dz[c], sum_dz_xhat[c], count)
        _spread(slope_c, c - c0, L, slope)
        _spread(level_c, c - c0, L, level)
    for n in range(n0, n1):
        dy_row, row, residual_row = dy_rows[n, j0:j1], x_rows[n, j0:j1], residual_rows[n, j0:j1]
        dx_row, d_residual_row = dx_rows[n, j0:j1], d_residual_rows[n, j0:j1]
        if COUNTED and L == 1:
            times_n = counts[n, 0]
            for j in range(width):
                d = load(row[j]) - center[j]
                z = d * scale[j] + shift[j]
                if RESIDUAL == OUTPUT:
                    z = load(residual_row[j])
                elif RESIDUAL:
                    z += load(residual_row[j])
                dz = activate_grad(ACT, parameter, z, load(dy_row[j]))
                store(dx_row, j, scale[j] * dz - (times_n * (d * slope[j] + level[j]) if times_n > 0 else T(0)))
                if RESIDUAL:
                    store(d_residual_row, j, dz)
            continue
        if COUNTED:
            _spread_counts(counts, n, times)
        for j in range(width):
            d = load(row[j]) - center[j]
            z = d * scale[j] + shift[j]
            if RESIDUAL == OUTPUT:
                z = load(residual_row[j])
            elif RESIDUAL:
                z += load(residual_row[j])
            dz = activate_grad(ACT, parameter, z, load(dy_row[j]))
            if COUNTED:
                store(dx_row, j, scale[j] * dz - (times[j] * (d * slope[j] + level[j]) if times[j] > 0 else T(0)))
            else:
                store(dx_row, j, scale[j] * dz - (d * slope[j] + level[j]))
            if RESIDUAL:
                store(d_residual_row, j, dz)
