"""The layer on JAX in training, computed by our CPU kernels under XLA."""

from typing import Any

import jax.numpy as jnp

from batchnorm.definition import ActivationSpec, parse_activation
from batchnorm.keras.functional import Moments
from batchnorm.xla import formula, kernels, primitive
from batchnorm.xla.formula import How

__all__ = ["train"]


def train(
    x: Any, counts: Any, gamma: Any, beta: Any, axis: int, epsilon: float, activation: ActivationSpec
) -> tuple[Any, Moments] | None:
    """Normalize by the statistics of the batch, where the kernels can and should.

    Args:
        x: The batch, of float32, float64 or bfloat16.
        counts, axis: As in `functional.moments`.
        gamma, beta: `(C,)`, in the type of the arithmetic; 1 and 0 if None.
        epsilon: Added to the variance.
        activation: The activation of the kernels.

    Returns:
        `y`, of the type of `x`, and the moments of the batch; None where XLA's own program is the better one.
    """
    channels, wide = axis % x.ndim, formula.arithmetic(x.dtype)
    arrays = [gamma, beta, None, counts]
    how = How(channels, float(epsilon), parse_activation(activation), *(v is not None for v in arrays))
    given = [v for v in arrays if v is not None]
    if not kernels.pay(x, given, how):
        return None
    y, mean, low, var = primitive.batch_norm(x, given, how)
    count = jnp.broadcast_to(jnp.asarray(formula.count(x, counts, channels), wide), mean.shape)
    return y, Moments(count, mean + low, var)
