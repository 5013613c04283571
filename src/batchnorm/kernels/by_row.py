"""The stages on one tile, walked by row: the innermost loop goes along a row, all `channels * L` values of one sample.

This suits short runs of positions (small images, and `L = 1`, which is no special case). The tile's values of one
sample are adjacent. Per-channel numbers are spread into tables with one entry for each value of a row; the tables stay
in the L1 cache, or in the L2 cache if rows are long.

Samples are adjacent if a tile has all channels. Then a row is several of them (`samples_per_row`), because entering a
loop costs time, too. Sums are taken over two rows at a time where a tensor is in the cache: this needs fewer loads and
stores of tables. From memory, rows are read one after the other.
"""

import functools
from typing import Any

import numpy as np

from batchnorm.kernels.activations import activate, activate_grad
from batchnorm.kernels.compilation import Stage, inlined, stage
from batchnorm.kernels.formats import load, store
from batchnorm.kernels.formulas import affine, first_counted, merge, through_moments, uncenter, with_residual
from batchnorm.kernels.tiling import FIRST_ROWS, PAIRS_UP_TO, ROW_LENGTH, ROWS, TABLE_STRIDE, samples_per_row

__all__ = ["grad_input", "grad_sums", "moments", "normalize"]

_samples_per_row = inlined(samples_per_row)

# --- Tables ----------------------------------------------------------------------------------------------------------


@inlined
def _scratch(dtype: Any, tables: int) -> Any:
    """Room for some tables of a stage.

    They share one array because LLVM does not vectorize a loop in which too many arrays might overlap.
    """
    return np.empty(tables * TABLE_STRIDE, dtype)


@inlined
def _table(scratch: Any, number: int, width: int) -> Any:
    """One of the tables in `scratch`."""
    return scratch[number * TABLE_STRIDE : number * TABLE_STRIDE + width]


@inlined
def _rows(x: Any, samples: int) -> Any:
    """`(N, C, L)` as a matrix with some samples in each row."""
    return x.reshape((x.shape[0] // samples, samples * x.shape[1] * x.shape[2]))


@inlined
def _spread(channels: int, L: int, table: Any) -> None:
    """Write the first numbers of a table, one for each channel, at all positions of the first sample.

    If `L = 1`, they are there already: loops over channels are then loops over adjacent numbers, which LLVM vectorizes.
    """
    if L > 1:
        for c in range(channels - 1, -1, -1):
            value = table[c]
            for j in range(c * L, (c + 1) * L):
                table[j] = value


@inlined
def _repeat(sample: int, table: Any) -> None:
    """Copy the first `sample` values, those of one sample, to the others."""
    for start in range(sample, table.size, sample):
        for j in range(sample):
            table[start + j] = table[j]


@inlined
def _in_pairs(x: Any, tensors: int, width: int) -> bool:
    """Whether a stage that reads some tensors like `x` takes sums over two rows at a time: see `PAIRS_UP_TO`."""
    return width <= ROW_LENGTH or x.size * x.itemsize * tensors <= PAIRS_UP_TO


@inlined
def _flush(total: Any, sums: Any) -> None:
    """Add a table of sums to one of float64, and clear it."""
    for j in range(total.size):
        sums[j] += total[j]
        total[j] = 0


@inlined
def _fold(sample: int, sums: Any) -> None:
    """Add the sums of all samples to those of the first, and clear the others."""
    for start in range(sample, sums.size, sample):
        for j in range(sample):
            sums[j] += sums[start + j]
            sums[start + j] = 0.0


@inlined
def _collect(channels: int, L: int, sums: Any) -> None:
    """Add up the sums at each channel's positions in the first sample: one for each channel, at the table's beginning.

    If `L = 1`, they are there already.
    """
    if L > 1:
        for c in range(channels):
            total = 0.0
            for j in range(c * L, (c + 1) * L):
                total += sums[j]
            sums[c] = total


@inlined
def _spread_counts(counts: Any, n: int, sample: int, table: Any) -> None:
    """Write the counts of the positions of the samples of a row, from `n` on, once for each channel."""
    L = counts.shape[1]
    for start in range(0, table.size, sample):
        for j in range(start, start + sample, L):
            for i in range(L):
                table[j + i] = counts[n + start // sample, i]


@inlined
def _spread_affine(
    mean: Any, rstd: Any, weight: Any, bias: Any, c0: int, c1: int, L: int, width: int, scratch: Any
) -> None:
    """Fill tables 0, 1 and 2 with center, scale and shift: see `affine`."""
    channels = c1 - c0
    center, scale, shift = _table(scratch, 0, width), _table(scratch, 1, width), _table(scratch, 2, width)
    for c in range(channels):
        center[c], scale[c], shift[c] = affine(
            scratch.dtype.type, mean[c0 + c], rstd[c0 + c], weight[c0 + c], bias[c0 + c]
        )
    for table in (center, scale, shift):
        _spread(channels, L, table)
        _repeat(channels * L, table)


# --- Stages ----------------------------------------------------------------------------------------------------------


@functools.cache
def moments(COUNTED: int) -> Stage:
    """The stage that writes each channel's mean, and its sum of squares about the mean.

    It returns how much was counted per channel.
    """

    @stage
    def moments(x: Any, counts: Any, n0: int, n1: int, c0: int, c1: int, mean: Any, squares: Any) -> float:
        T = counts.dtype.type
        L = x.shape[2]
        channels, sample, samples = c1 - c0, (c1 - c0) * L, _samples_per_row(x.shape, c1 - c0)
        x_rows, j0, width, block = _rows(x, samples), c0 * L, samples * sample, samples * ROWS
        j1 = j0 + width
        scratch, sums = _scratch(counts.dtype, 4), _scratch(np.float64, 2)
        center, times = _table(scratch, 0, width), _table(scratch, 1, width)
        total, total_d2 = _table(scratch, 2, width), _table(scratch, 3, width)
        sum_d, sum_d2 = _table(sums, 0, width), _table(sums, 1, width)
        total[:], total_d2[:], sum_d[:], sum_d2[:] = T(0), T(0), 0.0, 0.0
        pairs = _in_pairs(x, 1, width)
        count = 0.0
        for c in range(c0, c1):
            mean[c] = 0.0
            squares[c] = 0.0
        g0 = n0
        while g0 < n1:
            g1 = min(g0 + max(block, g0 - n0), n1)  # a group is as large as all before it: see `uncenter`
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
                    center[c] = load(x[first_n, c0 + c, first_i]) if count == 0.0 else T(mean[c0 + c])
                _spread(channels, L, center)
                _repeat(sample, center)
                if 8 * count < size:
                    near = g1 if COUNTED else min(g0 + samples * FIRST_ROWS, g1)
                    for r in range(g0 // samples, near // samples):
                        row = x_rows[r, j0:j1]
                        if COUNTED:
                            _spread_counts(counts, r * samples, sample, times)
                            for j in range(width):
                                total[j] += times[j] * (load(row[j]) - center[j]) if times[j] > 0 else T(0)
                        else:
                            for j in range(width):
                                total[j] += load(row[j]) - center[j]
                    _flush(total, sum_d)
                    _fold(sample, sum_d)
                    _collect(channels, L, sum_d)
                    near_size = size if COUNTED else float((near - g0) * L)
                    for c in range(channels):
                        center[c] = T(center[c * L] + sum_d[c] / near_size)
                    sum_d[:] = 0.0
                    _spread(channels, L, center)
                    _repeat(sample, center)
                for b0 in range(g0, g1, block):
                    b1 = min(b0 + block, g1)
                    r, r1 = b0 // samples, b1 // samples
                    while not COUNTED and pairs and r + 1 < r1:
                        row, next_row = x_rows[r, j0:j1], x_rows[r + 1, j0:j1]
                        for j in range(width):
                            d, next_d = load(row[j]) - center[j], load(next_row[j]) - center[j]
                            total[j] += d + next_d
                            total_d2[j] += d * d + next_d * next_d
                        r += 2
                    for last in range(r, r1):
                        row = x_rows[last, j0:j1]
                        if COUNTED:
                            _spread_counts(counts, last * samples, sample, times)
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
                _fold(sample, sum_d)
                _fold(sample, sum_d2)
                _collect(channels, L, sum_d)
                _collect(channels, L, sum_d2)
                for c in range(channels):
                    mean_b, squares_b = uncenter(size, center[c * L], sum_d[c], sum_d2[c])
                    _, mean[c0 + c], squares[c0 + c] = merge(
                        count, mean[c0 + c], squares[c0 + c], size, mean_b, squares_b
                    )
                sum_d[:], sum_d2[:] = 0.0, 0.0
                count += size
            g0 = g1
        return count

    return moments


@functools.cache
def normalize(ACT: int, RESIDUAL: int) -> Stage:
    """The stage that writes `y`."""

    @stage
    def normalize(
        x: Any, residual: Any, mean: Any, rstd: Any, weight: Any, bias: Any, parameter: Any, n0: int, n1: int,
        c0: int, c1: int, y: Any,
    ) -> float:  # fmt: skip
        L = x.shape[2]
        samples = _samples_per_row(x.shape, c1 - c0)
        x_rows, residual_rows, y_rows = _rows(x, samples), _rows(residual, samples), _rows(y, samples)
        j0, width = c0 * L, samples * (c1 - c0) * L
        j1 = j0 + width
        scratch = _scratch(weight.dtype, 3)
        center, scale, shift = _table(scratch, 0, width), _table(scratch, 1, width), _table(scratch, 2, width)
        _spread_affine(mean, rstd, weight, bias, c0, c1, L, width, scratch)
        for r in range(n0 // samples, n1 // samples):
            row, residual_row, y_row = x_rows[r, j0:j1], residual_rows[r, j0:j1], y_rows[r, j0:j1]
            for j in range(width):
                z = (load(row[j]) - center[j]) * scale[j] + shift[j]
                if RESIDUAL:
                    z += load(residual_row[j])
                store(y_row, j, activate(ACT, parameter, z))
        return 0.0

    return normalize


@functools.cache
def grad_sums(ACT: int, RESIDUAL: int, EXACT: int) -> Stage:
    """The stage that writes `sum dz` and `sum dz*xhat` of each channel. `residual` is `y` if `RESIDUAL` is `OUTPUT`."""

    @stage
    def grad_sums(
        dy: Any, x: Any, residual: Any, mean: Any, rstd: Any, weight: Any, bias: Any, parameter: Any, n0: int,
        n1: int, c0: int, c1: int, sum_dz: Any, sum_dz_xhat: Any,
    ) -> float:  # fmt: skip
        T = weight.dtype.type
        L = x.shape[2]
        sample, samples = (c1 - c0) * L, _samples_per_row(x.shape, c1 - c0)
        dy_rows, x_rows, residual_rows = _rows(dy, samples), _rows(x, samples), _rows(residual, samples)
        j0, width, block = c0 * L, samples * sample, samples * ROWS
        j1 = j0 + width
        scratch, sums = _scratch(weight.dtype, 5), _scratch(np.float64, 2)
        center, scale, shift = _table(scratch, 0, width), _table(scratch, 1, width), _table(scratch, 2, width)
        total, total_d = _table(scratch, 3, width), _table(scratch, 4, width)
        sum_z, sum_d = _table(sums, 0, width), _table(sums, 1, width)
        total[:], total_d[:], sum_z[:], sum_d[:] = T(0), T(0), 0.0, 0.0
        pairs = _in_pairs(x, 2, width)
        _spread_affine(mean, rstd, weight, bias, c0, c1, L, width, scratch)
        for b0 in range(n0, n1, block):
            b1 = min(b0 + block, n1)
            r, r1 = b0 // samples, b1 // samples
            while pairs and r + 1 < r1:
                dy_row, row, residual_row = dy_rows[r, j0:j1], x_rows[r, j0:j1], residual_rows[r, j0:j1]
                next_dy_row, next_row = dy_rows[r + 1, j0:j1], x_rows[r + 1, j0:j1]
                next_residual_row = residual_rows[r + 1, j0:j1]
                for j in range(width):
                    d, next_d = load(row[j]) - center[j], load(next_row[j]) - center[j]
                    z, next_z = d * scale[j] + shift[j], next_d * scale[j] + shift[j]
                    if RESIDUAL:
                        z = with_residual(RESIDUAL, z, residual_row[j])
                        next_z = with_residual(RESIDUAL, next_z, next_residual_row[j])
                    dz = activate_grad(ACT, EXACT, parameter, z, load(dy_row[j]))
                    next_dz = activate_grad(ACT, EXACT, parameter, next_z, load(next_dy_row[j]))
                    total[j] += dz + next_dz
                    total_d[j] += dz * d + next_dz * next_d
                r += 2
            for last in range(r, r1):
                dy_row, row, residual_row = dy_rows[last, j0:j1], x_rows[last, j0:j1], residual_rows[last, j0:j1]
                for j in range(width):
                    d = load(row[j]) - center[j]
                    z = d * scale[j] + shift[j]
                    if RESIDUAL:
                        z = with_residual(RESIDUAL, z, residual_row[j])
                    dz = activate_grad(ACT, EXACT, parameter, z, load(dy_row[j]))
                    total[j] += dz
                    total_d[j] += dz * d
            _flush(total, sum_z)
            _flush(total_d, sum_d)
        _fold(sample, sum_z)
        _fold(sample, sum_d)
        _collect(c1 - c0, L, sum_z)
        _collect(c1 - c0, L, sum_d)
        for c in range(c1 - c0):
            sum_dz[c0 + c] = sum_z[c]
            sum_dz_xhat[c0 + c] = rstd[c0 + c] * (sum_d[c] - (mean[c0 + c] - center[c * L]) * sum_z[c])
        return 0.0

    return grad_sums


@functools.cache
def grad_input(ACT: int, RESIDUAL: int, COUNTED: int, EXACT: int, IN_PLACE: int) -> Stage:
    """The stage that writes `dx`, over `dy` if `IN_PLACE`, and `dz` into `d_residual` if there is a residual."""

    @stage
    def grad_input(
        dy: Any, x: Any, residual: Any, counts: Any, mean: Any, rstd: Any, weight: Any, bias: Any, sum_dz: Any,
        sum_dz_xhat: Any, count: float, parameter: Any, n0: int, n1: int, c0: int, c1: int, dx: Any, d_residual: Any,
    ) -> float:  # fmt: skip
        T = weight.dtype.type
        L = x.shape[2]
        sample, samples = (c1 - c0) * L, _samples_per_row(x.shape, c1 - c0)
        dy_rows, x_rows, residual_rows = _rows(dy, samples), _rows(x, samples), _rows(residual, samples)
        dx_rows, d_residual_rows = _rows(dx, samples), _rows(d_residual, samples)
        j0, width = c0 * L, samples * sample
        j1 = j0 + width
        scratch = _scratch(weight.dtype, 6)
        center, scale, shift = _table(scratch, 0, width), _table(scratch, 1, width), _table(scratch, 2, width)
        slope, level, times = _table(scratch, 3, width), _table(scratch, 4, width), _table(scratch, 5, width)
        _spread_affine(mean, rstd, weight, bias, c0, c1, L, width, scratch)
        for c in range(c1 - c0):
            slope[c], level[c] = through_moments(
                T, mean[c0 + c], rstd[c0 + c], weight[c0 + c], sum_dz[c0 + c], sum_dz_xhat[c0 + c], count
            )
        for table in (slope, level):
            _spread(c1 - c0, L, table)
            _repeat(sample, table)
        for r in range(n0 // samples, n1 // samples):
            dy_row, row, residual_row = dy_rows[r, j0:j1], x_rows[r, j0:j1], residual_rows[r, j0:j1]
            dx_row, d_residual_row = dy_row if IN_PLACE else dx_rows[r, j0:j1], d_residual_rows[r, j0:j1]
            if COUNTED:
                _spread_counts(counts, r * samples, sample, times)
            for j in range(width):
                d = load(row[j]) - center[j]
                z = d * scale[j] + shift[j]
                if RESIDUAL:
                    z = with_residual(RESIDUAL, z, residual_row[j])
                dz = activate_grad(ACT, EXACT, parameter, z, load(dy_row[j]))
                if COUNTED:
                    store(dx_row, j, scale[j] * dz - (times[j] * (d * slope[j] + level[j]) if times[j] > 0 else T(0)))
                else:
                    store(dx_row, j, scale[j] * dz - (d * slope[j] + level[j]))
                if RESIDUAL:
                    store(d_residual_row, j, dz)
        return 0.0

    return grad_input
