"""The stages of batch normalization in `jax.numpy`, for any channel axis, differentiable to any order.

`batchnorm.definition` defines them. A mean is kept as two numbers, `mean + low`, because if the mean is a million
standard deviations from 0, its rounding to float32 would cost all digits of `x - mean`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = [
    "ACTIVATIONS",
    "How",
    "Moments",
    "arithmetic",
    "count",
    "forward",
    "gradients",
    "merge",
    "moments",
    "normalize",
    "per_channel",
]


class How(NamedTuple):
    """Everything about a normalization that is not an array.

    Attributes:
        axis: The channel axis, not negative.
        eps: Added to the variance.
        activation: A name and its parameter.
        weight, bias, residual, counts: Which of these arrays there are.
        batch: The number of axes that come before those of one normalization, in all arrays: `vmap` adds them.
        least: The number of values from which our kernels compute.
    """

    axis: int
    eps: float
    activation: tuple[str, float]
    weight: bool = False
    bias: bool = False
    residual: bool = False
    counts: bool = False
    batch: int = 0
    least: int = 0

    def spread(self, arrays: Sequence[Any]) -> list[Any]:
        """Weight, bias, residual and counts, with None for those that are absent from `arrays`."""
        left = iter(arrays)
        return [next(left) if there else None for there in self[3:7]]


class Moments(NamedTuple):
    """The moments of every channel of a batch.

    Attributes:
        count: The number of values per channel; with a mask, the sum of its weights. A number, or `(C,)`.
        mean, low: `(C,)`; the mean is `mean + low`. 0 where nothing counts.
        var: `(C,)`, biased.
    """

    count: Any
    mean: Any
    low: Any
    var: Any


def arithmetic(dtype: Any) -> Any:
    """The type in which data of this type are computed: float32 for half precision, otherwise the same."""
    return jnp.promote_types(dtype, jnp.float32)


def per_channel(values: Any, x: Any, axis: int) -> Any:
    """Reshape `(C,)` values so that they broadcast along the channels of `x`."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return jnp.reshape(values, shape)


def _others(x: Any, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(x.ndim) if i != axis)


# --- Moments ----------------------------------------------------------------------------------------------------------


def count(x: Any, counts: Any, axis: int) -> Any:
    """The number of values per channel, or the sum of their weights: see `moments`."""
    if counts is None:
        return x.size // max(1, x.shape[axis])
    shape = list(x.shape)
    shape[axis] = counts.shape[axis]
    return jnp.sum(jnp.broadcast_to(counts, shape), _others(x, axis))


def _divisor(size: Any) -> Any:
    """A number of values, and 1 for none: a batch may be empty. One of unknown size is taken not to be."""
    return max(1, size) if isinstance(size, int) else size


def moments(x: Any, counts: Any, axis: int) -> Moments:
    """Count, mean and biased variance of every channel: `mean = sum(w*x)/sum(w)`, `var = sum(w*(x - mean)^2)/sum(w)`.

    Every sum is about a center near the mean, which is a constant for the derivative: `low` and `var` are the same for
    any center. `var` waits for `low`, because XLA would wake another thread for two sums that can be taken at once.

    Args:
        x: The batch, of float32 or float64.
        counts: How much each position counts, with as many axes as `x`, to which they broadcast; 1 if None. Values with
            count 0 are left out, even if they are NaN.
        axis: The channel axis of `x`.

    Source: Ioffe & Szegedy 2015, algorithm 1, lines 1 and 2.
    """
    axes, size = _others(x, axis), count(x, counts, axis)
    if counts is None:
        some: Any = _divisor(size)

        def average(values: Any) -> Any:
            return jnp.sum(values, axes) / some

        def about(center: Any) -> Any:
            return x - per_channel(center, x, axis)
    else:
        some, kept = jnp.where(size == 0, 1, size), counts > 0

        def average(values: Any) -> Any:
            return jnp.sum(counts * values, axes) / some

        def about(center: Any) -> Any:
            return jnp.where(kept, x - per_channel(center, x, axis), 0)  # not a product, because 0 * NaN is NaN

    mean = jax.lax.stop_gradient(average(about(jnp.zeros(x.shape[axis], x.dtype))))
    low = average(about(mean))
    center = jax.lax.stop_gradient(mean + low)
    return Moments(size, mean, low, average(jnp.square(about(center))) - jnp.square(mean - center + low))


def merge(own: Moments, total: Callable[[Any], Any]) -> Moments:
    """The moments of all parts together, by their counts: exact for any split, even if some parts are empty.

    `mean = sum n_i mean_i / n`, `var = sum n_i (var_i + (mean_i - mean)^2) / n`.

    Args:
        own: The moments of a part.
        total: Sums an array `(2, ...)` over all parts.

    Source: Chan, Golub & LeVeque 1983.
    """
    size = jnp.broadcast_to(jnp.asarray(own.count, own.mean.dtype), own.mean.shape)
    all_sizes, weighted = total(jnp.stack([size, size * own.mean]))
    some = jnp.where(all_sizes == 0, 1, all_sizes)
    mean = weighted / some
    delta = (own.mean - mean) + own.low
    low, square = total(jnp.stack([size * delta, size * (own.var + jnp.square(delta))])) / some
    return Moments(all_sizes, mean, low, square - jnp.square(low))


# --- Normalize --------------------------------------------------------------------------------------------------------


def _relu6(z: Any) -> Any:
    return jnp.where(z <= 0, 0, jnp.where(z >= 6, 6, z))


ACTIVATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "none": lambda z, _: z,
    "relu": lambda z, _: jnp.where(z <= 0, 0, z),
    "relu6": lambda z, _: _relu6(z),
    "leaky_relu": lambda z, slope: jnp.where(z > 0, z, slope * z),
    "silu": lambda z, _: z * jax.nn.sigmoid(z),
    "hardswish": lambda z, _: z * (_relu6(z + 3) / 6),
    "elu": lambda z, alpha: jnp.where(z > 0, z, alpha * jnp.expm1(jnp.where(z > 0, 0, z))),
    "sigmoid": lambda z, _: jax.nn.sigmoid(z),
    "tanh": lambda z, _: jnp.tanh(z),
    "gelu": lambda z, _: jax.nn.gelu(z, approximate=False),
}
"""`act(z)`, with the derivative of the definition at a kink."""


def _rstd(var: Any, eps: float) -> Any:
    return jax.lax.rsqrt(var + eps)


def normalize(x: Any, mean: Any, low: Any, var: Any, weight: Any, bias: Any, residual: Any, how: How) -> Any:
    """`y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)`, in the type of the arithmetic.

    Args:
        x: The batch.
        mean, low, var: `(C,)`, or with as many axes as `x`; the mean is `mean + low`, and `low` is 0 if None.
        weight, bias: `(C,)`; 1 and 0 if None.
        residual: Added before the activation, like `x`; 0 if None.
        how: The rest.

    Source: Ioffe & Szegedy 2015, algorithm 1, lines 3 and 4.
    """

    def spread(values: Any) -> Any:
        return per_channel(values, x, how.axis) if values.ndim == 1 else values

    scale = _rstd(var, how.eps)
    if weight is not None:
        scale = spread(scale) * spread(weight) if scale.ndim != 1 else scale * weight
    z = x - spread(mean)
    if low is not None:
        z = z - spread(low)
    z = z * spread(scale)
    if bias is not None:
        z = z + spread(bias)
    if residual is not None:
        z = z + residual.astype(z.dtype)
    name, parameter = how.activation
    return ACTIVATIONS[name](z, parameter)


# --- All stages -------------------------------------------------------------------------------------------------------


def forward(x: Any, *arrays: Any, how: How) -> tuple[Any, Any, Any, Any]:
    """`y`, and mean, low and var of the batch.

    Args:
        x: The batch, of any floating-point type.
        arrays: Weight, bias, residual and counts, without those that are absent.
        how: The rest.
    """
    weight, bias, residual, counts = how.spread(arrays)
    wide = x.astype(arithmetic(x.dtype))
    _, mean, low, var = moments(wide, counts, how.axis)
    return normalize(wide, mean, low, var, weight, bias, residual, how).astype(x.dtype), mean, low, var


def gradients(dy: Any, mean: Any, low: Any, var: Any, x: Any, *arrays: Any, how: How) -> tuple[Any, ...]:
    """The gradients of `x` and of the weight, bias and residual that are present.

    `dx = weight*rstd * (dz - (sum dz + xhat * sum dz*xhat) / count)`, `d_residual = dz = dy * act'(z)`.

    Args:
        dy: The gradient of `y`.
        mean, low, var: From `forward`.
        x, arrays, how: As in `forward`.

    Source: Ioffe & Szegedy 2015, section 3.
    """
    weight, bias, residual, counts = how.spread(arrays)
    wide = x.astype(arithmetic(x.dtype))
    axes = _others(x, how.axis)

    def spread(values: Any) -> Any:
        return per_channel(values, x, how.axis)

    rstd = _rstd(var, how.eps)
    d = wide - spread(mean) - spread(low)
    z = d * spread(rstd if weight is None else rstd * weight)
    if bias is not None:
        z = z + spread(bias)
    if residual is not None:
        z = z + residual.astype(z.dtype)
    name, parameter = how.activation
    _, pull = jax.vjp(lambda z: ACTIVATIONS[name](z, parameter), z)
    (dz,) = pull(dy.astype(z.dtype))
    sum_dz, sum_dz_xhat = jnp.sum(dz, axes), jnp.sum(dz * d, axes) * rstd
    through = spread(sum_dz) + d * spread(rstd * sum_dz_xhat)
    if counts is None:
        through = through / _divisor(count(x, None, how.axis))
    else:
        size = count(x, counts, how.axis)
        # Not the product alone: a value of count 0 must get 0 from the sums, even if they are not finite.
        through = jnp.where(counts > 0, counts / spread(jnp.where(size == 0, 1, size)) * through, 0)
    dx = spread(rstd if weight is None else rstd * weight) * (dz - through)
    found = [dx.astype(x.dtype)]
    if weight is not None:
        found.append(sum_dz_xhat)
    if bias is not None:
        found.append(sum_dz)
    if residual is not None:
        found.append(dz.astype(residual.dtype))
    return tuple(found)
