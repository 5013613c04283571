"""The stages on one tile, walked by channel: the innermost loop goes along the positions `L` of one sample and channel.

This suits long runs of positions: the channel's numbers stay in registers.

`float(total)` marks where a sum leaves the data's type for float64. Compiled code needs no such word: Numba's `float`
leaves a float32 as it is. In plain Python, NumPy would add a float32 to a Python float in float32.
"""

import functools
from typing import Any

from batchnorm.kernels.activations import activate, activate_grad
from batchnorm.kernels.compilation import Stage, stage
from batchnorm.kernels.formats import load, store
from batchnorm.kernels.formulas import OUTPUT, affine, first_counted, merge, through_moments, uncenter
from batchnorm.kernels.tiling import BLOCK, RUN

__all__ = ["grad_input", "grad_sums", "moments", "normalize"]


@functools.cache
def moments(COUNTED: int) -> Stage:
    """The stage that writes each channel's mean, and its sum of squares about the mean.

    It returns how much was counted per channel.
    """

    @stage
    def moments(x: Any, counts: Any, n0: int, n1: int, c0: int, c1: int, mean: Any, squares: Any) -> float:
        T = counts.dtype.type
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
                    center = load(x[first_n, c, first_i]) if count == 0.0 else T(mean_c)
                    if 8 * count < size:
                        sum_d = 0.0
                        for n in range(g0, g1):
                            for r0 in range(l0, l1, RUN):
                                row, total = x[n, c, r0 : min(r0 + RUN, l1)], T(0)
                                if COUNTED:
                                    times = counts[n, r0 : min(r0 + RUN, l1)]
                                    for i in range(row.size):
                                        total += times[i] * (load(row[i]) - center) if times[i] > 0 else T(0)
                                else:
                                    for i in range(row.size):
                                        total += load(row[i]) - center
                                sum_d += float(total)
                        center = T(center + sum_d / size)
                    sum_d, sum_d2 = 0.0, 0.0
                    for n in range(g0, g1):
                        for r0 in range(l0, l1, RUN):
                            row, total, total_d2 = x[n, c, r0 : min(r0 + RUN, l1)], T(0), T(0)
                            if COUNTED:
                                times = counts[n, r0 : min(r0 + RUN, l1)]
                                for i in range(row.size):
                                    d = load(row[i]) - center if times[i] > 0 else T(0)
                                    total += times[i] * d
                                    total_d2 += times[i] * d * d
                            else:
                                for i in range(row.size):
                                    d = load(row[i]) - center
                                    total += d
                                    total_d2 += d * d
                            sum_d += float(total)
                            sum_d2 += float(total_d2)
                    mean_b, squares_b = uncenter(size, center, sum_d, sum_d2)
                    count, mean_c, squares_c = merge(count, mean_c, squares_c, size, mean_b, squares_b)
            mean[c] = mean_c
            squares[c] = squares_c
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
        for c in range(c0, c1):
            center, scale, shift = affine(T, mean[c], rstd[c], weight[c], bias[c])
            for n in range(n0, n1):
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
        for c in range(c0, c1):
            center, scale, shift = affine(T, mean[c], rstd[c], weight[c], bias[c])
            sum_z, sum_d = 0.0, 0.0
            for n in range(n0, n1):
                for r0 in range(0, L, RUN):
                    r1 = min(r0 + RUN, L)
                    dy_row, row, residual_row = dy[n, c, r0:r1], x[n, c, r0:r1], residual[n, c, r0:r1]
                    total, total_d = T(0), T(0)
                    for i in range(row.size):
                        d = load(row[i]) - center
                        z = d * scale + shift
                        if RESIDUAL == OUTPUT:
                            z = load(residual_row[i])
                        elif RESIDUAL:
                            z += load(residual_row[i])
                        dz = activate_grad(ACT, EXACT, parameter, z, load(dy_row[i]))
                        total += dz
                        total_d += dz * d
                    sum_z += float(total)
                    sum_d += float(total_d)
            sum_dz[c] = sum_z
            sum_dz_xhat[c] = rstd[c] * (sum_d - (mean[c] - center) * sum_z)
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
        for c in range(c0, c1):
            center, scale, shift = affine(T, mean[c], rstd[c], weight[c], bias[c])
            slope, level = through_moments(T, mean[c], rstd[c], weight[c], sum_dz[c], sum_dz_xhat[c], count)
            for n in range(n0, n1):
                dy_row, row, residual_row = dy[n, c], x[n, c], residual[n, c]
                dx_row, d_residual_row = dy_row if IN_PLACE else dx[n, c], d_residual[n, c]
                times = counts[n] if COUNTED else row
                for i in range(row.size):
                    d = load(row[i]) - center
                    z = d * scale + shift
                    if RESIDUAL == OUTPUT:
                        z = load(residual_row[i])
                    elif RESIDUAL:
                        z += load(residual_row[i])
                    dz = activate_grad(ACT, EXACT, parameter, z, load(dy_row[i]))
                    if COUNTED:
                        store(dx_row, i, scale * dz - (times[i] * (d * slope + level) if times[i] > 0 else T(0)))
                    else:
                        store(dx_row, i, scale * dz - (d * slope + level))
                    if RESIDUAL:
                        store(d_residual_row, i, dz)
        return 0.0

    return grad_input
