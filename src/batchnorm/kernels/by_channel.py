"""The stages on one tile, walked by channel: the innermost loop goes along the positions `L` of one sample and channel.

This suits long runs of positions: the channel's numbers stay in registers. The loop over samples is outside the loop
over channels, because the runs of adjacent channels are adjacent in memory.

Sums are taken over four samples at a time; moments only where runs are short, and without counts. To enter a loop, to
add up the parts of a vector and to go through what is left of a run that is no multiple of a vector costs about as much
for four runs as for one.

`float(total)` marks where a sum leaves the data's type for float64. Compiled code needs no such word: Numba's `float`
leaves a float32 as it is. In plain Python, NumPy would add a float32 to a Python float in float32.
"""

import functools
from typing import Any

import numpy as np

from batchnorm.kernels.activations import activate, activate_grad
from batchnorm.kernels.compilation import Stage, inlined, stage
from batchnorm.kernels.formats import load, store
from batchnorm.kernels.formulas import affine, first_counted, merge, through_moments, uncenter, with_residual
from batchnorm.kernels.tiling import BLOCK, RUN

__all__ = ["grad_input", "grad_sums", "moments", "normalize"]


@inlined
def _affines(T: Any, mean: Any, rstd: Any, weight: Any, bias: Any, c0: int, c1: int) -> Any:
    """Center, scale and shift of each channel of a tile: see `affine`."""
    numbers = np.empty((c1 - c0, 3), T)
    for c in range(c0, c1):
        numbers[c - c0, 0], numbers[c - c0, 1], numbers[c - c0, 2] = affine(T, mean[c], rstd[c], weight[c], bias[c])
    return numbers


@functools.cache
def moments(COUNTED: int) -> Stage:
    """The stage that writes each channel's mean, and its sum of squares about the mean.

    It returns how much was counted per channel.
    """

    @stage
    def moments(x: Any, counts: Any, n0: int, n1: int, c0: int, c1: int, mean: Any, squares: Any) -> float:
        T = counts.dtype.type
        L, channels = x.shape[2], c1 - c0
        rows = max(1, BLOCK // L)
        center, sum_d, sum_d2 = np.empty(channels, T), np.empty(channels), np.empty(channels)
        mean[c0:c1], squares[c0:c1] = 0.0, 0.0
        count = 0.0
        for g0 in range(n0, n1, rows):
            g1 = min(g0 + rows, n1)
            for l0 in range(0, L, BLOCK):
                l1 = min(l0 + BLOCK, L)
                size = float((g1 - g0) * (l1 - l0))
                first_n, first_i = g0, l0
                if COUNTED:
                    size = 0.0
                    for n in range(g0, g1):
                        times = counts[n, l0:l1]
                        for i in range(times.size):
                            size += float(times[i])
                    if size == 0.0:
                        continue
                    first_n, first_i = first_counted(counts, g0, g1, l0, l1)
                for c in range(channels):
                    center[c] = load(x[first_n, c0 + c, first_i]) if count == 0.0 else T(mean[c0 + c])
                if 8 * count < size:
                    # An eighth of a group is enough: see `uncenter`.
                    near_n, near_l = (g1, l1) if COUNTED else (g0 + (g1 - g0 + 7) // 8, min(l0 + RUN, l1))
                    sum_d[:] = 0.0
                    for n in range(g0, near_n):
                        for c in range(channels):
                            center_c = center[c]
                            for r0 in range(l0, near_l, RUN):
                                row, total = x[n, c0 + c, r0 : min(r0 + RUN, near_l)], T(0)
                                if COUNTED:
                                    times = counts[n, r0 : min(r0 + RUN, near_l)]
                                    for i in range(row.size):
                                        total += times[i] * (load(row[i]) - center_c) if times[i] > 0 else T(0)
                                else:
                                    for i in range(row.size):
                                        total += load(row[i]) - center_c
                                sum_d[c] += float(total)
                    near_size = size if COUNTED else float((near_n - g0) * (near_l - l0))
                    for c in range(channels):
                        center[c] = T(center[c] + sum_d[c] / near_size)
                sum_d[:], sum_d2[:] = 0.0, 0.0
                n = g0
                while not COUNTED and n + 4 <= g1:  # then `L` is at most `BLOCK // 4`, a single run
                    for c in range(channels):
                        center_c, total, total_d2 = center[c], T(0), T(0)
                        row_0, row_1 = x[n, c0 + c], x[n + 1, c0 + c]
                        row_2, row_3 = x[n + 2, c0 + c], x[n + 3, c0 + c]
                        for i in range(row_0.size):
                            d_0, d_1 = load(row_0[i]) - center_c, load(row_1[i]) - center_c
                            d_2, d_3 = load(row_2[i]) - center_c, load(row_3[i]) - center_c
                            total += (d_0 + d_1) + (d_2 + d_3)
                            total_d2 += (d_0 * d_0 + d_1 * d_1) + (d_2 * d_2 + d_3 * d_3)
                        sum_d[c] += float(total)
                        sum_d2[c] += float(total_d2)
                    n += 4
                for last in range(n, g1):
                    for c in range(channels):
                        center_c = center[c]
                        for r0 in range(l0, l1, RUN):
                            row, total, total_d2 = x[last, c0 + c, r0 : min(r0 + RUN, l1)], T(0), T(0)
                            if COUNTED:
                                times = counts[last, r0 : min(r0 + RUN, l1)]
                                for i in range(row.size):
                                    d = load(row[i]) - center_c if times[i] > 0 else T(0)
                                    total += times[i] * d
                                    total_d2 += times[i] * d * d
                            else:
                                for i in range(row.size):
                                    d = load(row[i]) - center_c
                                    total += d
                                    total_d2 += d * d
                            sum_d[c] += float(total)
                            sum_d2[c] += float(total_d2)
                for c in range(channels):
                    mean_b, squares_b = uncenter(size, center[c], sum_d[c], sum_d2[c])
                    _, mean[c0 + c], squares[c0 + c] = merge(
                        count, mean[c0 + c], squares[c0 + c], size, mean_b, squares_b
                    )
                count += size
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
        T = weight.dtype.type
        affines = _affines(T, mean, rstd, weight, bias, c0, c1)
        for n in range(n0, n1):
            for c in range(c0, c1):
                center, scale, shift = affines[c - c0, 0], affines[c - c0, 1], affines[c - c0, 2]
                row, residual_row, y_row = x[n, c], residual[n, c], y[n, c]
                for i in range(row.size):
                    z = (load(row[i]) - center) * scale + shift
                    if RESIDUAL:
                        z += load(residual_row[i])
                    store(y_row, i, activate(ACT, parameter, z))
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
        affines = _affines(T, mean, rstd, weight, bias, c0, c1)
        sum_dz[c0:c1], sum_dz_xhat[c0:c1] = 0.0, 0.0
        n = n0
        while n + 4 <= n1:
            for c in range(c0, c1):
                center, scale, shift = affines[c - c0, 0], affines[c - c0, 1], affines[c - c0, 2]
                for r0 in range(0, L, RUN):
                    r1, total, total_d = min(r0 + RUN, L), T(0), T(0)
                    row_0, row_1, row_2, row_3 = (
                        x[n, c, r0:r1], x[n + 1, c, r0:r1], x[n + 2, c, r0:r1], x[n + 3, c, r0:r1]
                    )  # fmt: skip
                    dy_0, dy_1, dy_2, dy_3 = (
                        dy[n, c, r0:r1], dy[n + 1, c, r0:r1], dy[n + 2, c, r0:r1], dy[n + 3, c, r0:r1]
                    )  # fmt: skip
                    residual_0, residual_1 = residual[n, c, r0:r1], residual[n + 1, c, r0:r1]
                    residual_2, residual_3 = residual[n + 2, c, r0:r1], residual[n + 3, c, r0:r1]
                    for i in range(row_0.size):
                        d_0, d_1 = load(row_0[i]) - center, load(row_1[i]) - center
                        d_2, d_3 = load(row_2[i]) - center, load(row_3[i]) - center
                        z_0, z_1 = d_0 * scale + shift, d_1 * scale + shift
                        z_2, z_3 = d_2 * scale + shift, d_3 * scale + shift
                        if RESIDUAL:
                            z_0 = with_residual(RESIDUAL, z_0, residual_0[i])
                            z_1 = with_residual(RESIDUAL, z_1, residual_1[i])
                            z_2 = with_residual(RESIDUAL, z_2, residual_2[i])
                            z_3 = with_residual(RESIDUAL, z_3, residual_3[i])
                        dz_0 = activate_grad(ACT, EXACT, parameter, z_0, load(dy_0[i]))
                        dz_1 = activate_grad(ACT, EXACT, parameter, z_1, load(dy_1[i]))
                        dz_2 = activate_grad(ACT, EXACT, parameter, z_2, load(dy_2[i]))
                        dz_3 = activate_grad(ACT, EXACT, parameter, z_3, load(dy_3[i]))
                        total += (dz_0 + dz_1) + (dz_2 + dz_3)
                        total_d += (dz_0 * d_0 + dz_1 * d_1) + (dz_2 * d_2 + dz_3 * d_3)
                    sum_dz[c] += float(total)
                    sum_dz_xhat[c] += float(total_d)
            n += 4
        for last in range(n, n1):
            for c in range(c0, c1):
                center, scale, shift = affines[c - c0, 0], affines[c - c0, 1], affines[c - c0, 2]
                for r0 in range(0, L, RUN):
                    r1, total, total_d = min(r0 + RUN, L), T(0), T(0)
                    row, dy_row, residual_row = x[last, c, r0:r1], dy[last, c, r0:r1], residual[last, c, r0:r1]
                    for i in range(row.size):
                        d = load(row[i]) - center
                        z = d * scale + shift
                        if RESIDUAL:
                            z = with_residual(RESIDUAL, z, residual_row[i])
                        dz = activate_grad(ACT, EXACT, parameter, z, load(dy_row[i]))
                        total += dz
                        total_d += dz * d
                    sum_dz[c] += float(total)
                    sum_dz_xhat[c] += float(total_d)
        for c in range(c0, c1):
            sum_dz_xhat[c] = rstd[c] * (sum_dz_xhat[c] - (mean[c] - affines[c - c0, 0]) * sum_dz[c])
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
        affines, slopes = _affines(T, mean, rstd, weight, bias, c0, c1), np.empty((c1 - c0, 2), T)
        for c in range(c0, c1):
            slopes[c - c0, 0], slopes[c - c0, 1] = through_moments(
                T, mean[c], rstd[c], weight[c], sum_dz[c], sum_dz_xhat[c], count
            )
        for n in range(n0, n1):
            for c in range(c0, c1):
                center, scale, shift = affines[c - c0, 0], affines[c - c0, 1], affines[c - c0, 2]
                slope, level = slopes[c - c0, 0], slopes[c - c0, 1]
                dy_row, row, residual_row = dy[n, c], x[n, c], residual[n, c]
                dx_row, d_residual_row = dy_row if IN_PLACE else dx[n, c], d_residual[n, c]
                times = counts[n] if COUNTED else row
                for i in range(row.size):
                    d = load(row[i]) - center
                    z = d * scale + shift
                    if RESIDUAL:
                        z = with_residual(RESIDUAL, z, residual_row[i])
                    dz = activate_grad(ACT, EXACT, parameter, z, load(dy_row[i]))
                    if COUNTED:
                        store(dx_row, i, scale * dz - (times[i] * (d * slope + level) if times[i] > 0 else T(0)))
                    else:
                        store(dx_row, i, scale * dz - (d * slope + level))
                    if RESIDUAL:
                        store(d_residual_row, i, dz)
        return 0.0

    return grad_input
