"""Running statistics, moved towards those of a batch."""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

from numpy.typing import NDArray

from batchnorm.kernels.compilation import inlined, kernel

__all__ = ["move", "moved"]

Array = NDArray[Any]


@inlined
def moved(mean: Any, var: Any, rate: float, correction: float, running_mean: Any, running_var: Any) -> Any:
    """`move`, for the inside of a kernel."""
    stored = running_mean.dtype.type
    for c in range(mean.size):
        if not (math.isfinite(stored(mean[c])) and math.isfinite(stored(var[c] * correction))):
            return False
    for c in range(mean.size):
        old_mean, old_var, new_var = float(running_mean[c]), float(running_var[c]), var[c] * correction
        if rate < 0.5:
            running_mean[c] = old_mean + rate * (mean[c] - old_mean)
            running_var[c] = old_var + rate * (new_var - old_var)
        else:  # exact if the rate is 1
            running_mean[c] = mean[c] + (1.0 - rate) * (old_mean - mean[c])
            running_var[c] = new_var + (1.0 - rate) * (old_var - new_var)
    return True


@functools.cache
def _move() -> Callable[..., bool]:
    @kernel(False)
    def move(mean: Any, var: Any, rate: float, correction: float, running_mean: Any, running_var: Any) -> Any:
        return moved(mean, var, rate, correction, running_mean, running_var)

    return cast(Callable[..., bool], move)


def move(mean: Array, var: Array, rate: float, correction: float, running_mean: Array, running_var: Array) -> bool:
    """`running += rate * (batch - running)` in float64, unless a statistic of the batch is not finite.

    Args:
        mean, var: `(C,)`, float64: those of the batch.
        rate: The weight of the batch.
        correction: The factor from `var` to the variance that counts.
        running_mean, running_var: `(C,)`, both float32 or both float64. Written, unless a statistic of the batch is not
            finite in their type.

    Returns:
        Whether they were written.
    """
    return _move()(mean, var, rate, correction, running_mean, running_var)
