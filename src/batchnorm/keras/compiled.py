"""The layer on the JAX backend, computed by our CPU kernels inside XLA's programs."""

from typing import Any

from keras import ops

from batchnorm.definition import parse_activation
from batchnorm.keras.functional import Call, Moments, arithmetic

__all__ = ["train"]


def train(call: Call) -> tuple[Any, Moments] | None:
    """Normalize by the statistics of the batch, and return `y` and its moments.

    The moments have no derivative: they are those towards which the moving statistics move.

    Returns:
        None if the kernels cannot compute this, or if XLA's own loops are as fast: with a mask, for a small batch, in
        float16, in bfloat16 with an activation that they lack, inside `shard_map`, on a GPU or a TPU, or with a version
        of JAX that we do not know.
    """
    import jax
    import jax.numpy as jnp

    if jax.__version_info__ < (0, 7, 1) or jax.default_backend() != "cpu":
        return None
    from batchnorm.xla import formula, primitive, routes

    x, axis = call.x, call.axis % call.x.ndim
    if call.counts is not None:
        routes.expect_formula(x, "it has a mask")
        return None
    if not call.activation.is_fused and x.dtype in (jnp.float16, jnp.bfloat16):
        # The kernels would round the values before the activation, which the formula has in float32.
        routes.expect_formula(x, "its activation has no kernel")
        return None
    given = [None if v is None else ops.cast(v, arithmetic(x)) for v in (call.gamma, call.beta)]
    arrays = [v for v in given if v is not None]
    activation = parse_activation(call.activation.fused if call.activation.is_fused else None)
    how = routes.choose(x, arrays, formula.How(axis, float(call.epsilon), activation, *(v is not None for v in given)))
    if how is None:
        return None
    y, mean, low, var = primitive.batch_norm(x, arrays, how)
    batch = Moments(jnp.full_like(mean, formula.count(x, None, axis)), mean + low, var)
    return y if call.activation.is_fused else call.activation(y), batch
