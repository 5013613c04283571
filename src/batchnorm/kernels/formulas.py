"""The formulas for one channel, which both walking orders share."""

import math
from typing import Any

from batchnorm.kernels.compilation import inlined
from batchnorm.kernels.formats import load

__all__ = ["OUTPUT", "affine", "first_counted", "is_finite", "merge", "through_moments", "uncenter", "with_residual"]

OUTPUT = 2
"""`RESIDUAL` of a backward stage that gets `y` in place of the residual: all that relu asks of `z` is its sign, which
`y` has as well."""


@inlined
def affine(T: Any, mean: float, rstd: float, weight: Any, bias: Any) -> Any:
    """`center, scale, shift`, of type `T`, with `z = (x - center)*scale + shift`.

    `center` is the mean rounded to `T`, and `shift` makes up for the rounding. Near the mean, `x - center` is exact.
    """
    center = T(mean)
    scale = rstd * weight
    return center, T(scale), T(bias - (mean - center) * scale)


@inlined
def with_residual(RESIDUAL: int, z: Any, residual: Any) -> Any:
    """`z` in a backward stage that has a residual, or `y` in its place."""
    return load(residual) if RESIDUAL == OUTPUT else z + load(residual)


@inlined
def through_moments(
    T: Any, mean: float, rstd: float, weight: Any, sum_dz: float, sum_dz_xhat: float, count: float
) -> Any:
    """`slope, level`, of type `T`, with `dx = scale*dz - ((x - center)*slope + level)`; both are 0 if `count = inf`."""
    if math.isinf(count):
        return T(0), T(0)
    center = T(mean)
    scale = rstd * weight
    slope = scale * rstd * sum_dz_xhat / count
    return T(slope), T(scale * sum_dz / count - (mean - center) * slope)


@inlined
def merge(count: float, mean: float, squares: float, count_b: float, mean_b: float, squares_b: float) -> Any:
    """`definition.merge_moments` for one channel, on sums of squares (`count * var`) instead of variances."""
    total = count + count_b
    delta = mean_b - mean
    share = count_b / total
    return total, mean + delta * share, squares + squares_b + delta * delta * count * share


@inlined
def uncenter(count: float, center: Any, sum_d: Any, sum_d2: Any) -> Any:
    """The mean, and the sum of squares about it, from the sums of `d = x - center` and of `d^2`.

    The subtraction is safe if `center` is the mean of at least `1/k` as many values: then `sum d^2` is at most `1 + k`
    times the squares that the merge will give. If at least an eighth as many values came before a group, their mean is
    its center: `k` is 1 if as many came before, and at most 8. Otherwise the group's center is the mean of at least an
    eighth of its own values, so that again `k <= 8`.
    """
    # `float` changes nothing in compiled code. In plain Python, NumPy would round the sum to the type of `center`.
    return float(center) + sum_d / count, sum_d2 - (sum_d / count) * sum_d


@inlined
def first_counted(counts: Any, n0: int, n1: int, l0: int, l1: int) -> Any:
    """The first position with a positive count, or `(-1, -1)`: its value is what the others are measured from."""
    for n in range(n0, n1):
        for i in range(l0, l1):
            if counts[n, i] > 0:
                return n, i
    return -1, -1


@inlined
def is_finite(sums: Any, c0: int, c1: int) -> bool:
    """Whether all these sums are finite."""
    total = 0.0
    for c in range(c0, c1):
        total += abs(sums[c])
    return total < math.inf
