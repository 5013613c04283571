"""`batch_norm`: check the arguments, normalize by a source of statistics, and move the running statistics."""

from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from batchnorm.jax.activations import Activation, resolve
from batchnorm.jax.statistics import BatchStatistics, Call, Devices, Running, RunningStatistics, Statistics, expect
from batchnorm.xla import formula
from batchnorm.xla.formula import How, Moments, arithmetic

__all__ = ["batch_norm", "expand_mask"]

BATCH, RUNNING = BatchStatistics(), RunningStatistics()


def batch_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    *,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
    axis: int = -1,
    activation: Activation = None,
    residual: Any = None,
    mask: Any = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    statistics: Statistics | None = None,
) -> tuple[Any, Running | None]:
    """Batch normalization with residual and activation, as a pure function.

    `y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)`, where `mean` and `var` are the batch's in
    training and the running ones otherwise. In training the running statistics move: `running += momentum * (batch -
    running)`, with the unbiased variance.

    It works under `jit`, `grad` of any order, forward differentiation, `vmap`, `shard_map`, `pmap`, and `jit` of
    sharded arrays, where the statistics are those of the whole array. Between forward and backward it keeps only its
    arguments and the statistics. Half precision is computed in float32.

    Args:
        x: The batch, of any rank from 2 on.
        running_mean, running_var: `(C,)`; required in evaluation. A batch whose statistics are not finite, or in which
            nothing counts, does not change them.
        weight, bias: `(C,)`, gamma and beta; 1 and 0 if None.
        training: Whether to normalize by the batch's statistics.
        momentum: The weight of the new batch in the running statistics; it may be traced.
        eps: Added to the variance, in the square of the units of `x`.
        axis: The channel axis of `x`.
        activation: None, or a name, or `(name, parameter)`: relu, relu6, leaky_relu (slope), silu, hardswish, elu
            (alpha), sigmoid, tanh, gelu. Or a module or another function of an array: JAX's own for these, such as
            `jax.nn.relu`, are computed as if they were named; any other is called with the normalized values.
        residual: Of the shape of `x`, added before the activation.
        mask: Booleans (which positions count in the statistics) or non-negative weights (2 counts a position twice).
            Its shape is that of `x` without its channels, or the first axes of that; or it has as many axes as `x`,
            each of the same length or of length 1. All positions are normalized. A traced mask with a negative or
            infinite weight makes the statistics NaN. Ignored in evaluation.
        axis_name: The mapped axes of `shard_map`, `pmap` or `vmap` over which the statistics are pooled by counts.
        axis_index_groups: Groups of indices along that axis that are pooled separately, as in `jax.lax.psum`.
        statistics: The source of the statistics in training; `BatchStatistics()` if None.

    Returns:
        `y`, of the shape and type of `x`; and the running statistics after the batch, which have no gradient, or None
        if none were given.

    Raises:
        ValueError: If `x` has fewer than two axes, or no axis `axis`; if another array does not fit it; if there is
            only one value per channel in training; if running statistics are missing; if the activation is unknown;
            if `eps` is negative; if a mask that is not traced has a negative or infinite weight.
        TypeError: If an argument is of the wrong kind; if `x` is not of a floating-point type; if `statistics` is not a
            source; if the activation is a class; if `eps` is traced.

    Source: Ioffe & Szegedy 2015, algorithm 1.
    """
    x = _array("x", x)
    expect(statistics)
    source = (statistics or BATCH) if training else RUNNING
    channels = _check(x, axis, eps)
    wide = arithmetic(x.dtype)
    running = _running(running_mean, running_var, x, channels, needed=source.needs_running)
    counts = None if mask is None or source.is_constant else expand_mask(_array("mask", mask), x, channels).astype(wide)
    if residual is not None:
        residual = _array("residual", residual)
        if residual.shape != x.shape:
            raise ValueError(f"residual must have the shape of x, {x.shape}, got {residual.shape}")
    weight, bias = (_vector(name, v, x, channels) for name, v in (("weight", weight), ("bias", bias)))
    if isinstance(counts, Tracer) and jnp.issubdtype(jnp.asarray(mask).dtype, jnp.floating):
        # An invalid weight is NaN by now, and the kernels would leave it out.
        weight = jnp.where(jnp.all(jnp.isfinite(counts)), 1 if weight is None else weight, jnp.nan)
        weight = jnp.broadcast_to(weight, (x.shape[channels],))
    given = [None if v is None else v.astype(wide) for v in (weight, bias)] + [residual, counts]
    named, then = resolve(activation)
    how = How(channels, float(eps), named, *(v is not None for v in given))
    arrays = tuple(v for v in given if v is not None)
    call = Call(x, arrays, how, running, Devices(axis_name, axis_index_groups))
    if not source.is_constant:
        _check_count(call, axis)
    y, batch = source.normalize(call)
    if then is not None:
        y = then(y)
    if running is None or batch is None:
        return y, running
    return y, _moved(running, batch, momentum, source.unbiased)


def _moved(running: Running, batch: Moments, momentum: Any, unbiased: bool) -> Running:
    """The running statistics after a batch: `definition.update_running`."""
    if _array("momentum", momentum).ndim > 0:
        raise ValueError(f"momentum must be a number, got shape {jnp.shape(momentum)}")
    count, mean, low, var = lax.stop_gradient(batch)
    count = jnp.asarray(count, var.dtype)
    if unbiased:
        var = jnp.where(count > 1, var * (count / jnp.where(count > 1, count - 1, 1)), var)
    usable = jnp.all(jnp.isfinite(mean)) & jnp.all(jnp.isfinite(var)) & (count > 0)

    def move(old: Any, new: Any) -> Any:
        moved = (old + momentum * (new.astype(old.dtype) - old)).astype(old.dtype)
        return lax.stop_gradient(jnp.where(usable, moved, old))

    return Running(move(running.mean, mean + low), move(running.var, var))


# --- Checks -----------------------------------------------------------------------------------------------------------


def _array(name: str, values: Any) -> Any:
    """The values of an argument as an array."""
    try:
        return jnp.asarray(values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array, got {type(values).__name__}") from error


def _check(x: Any, axis: int, eps: float) -> int:
    """The channel axis, not negative."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be of a floating-point type, got {x.dtype} of shape {x.shape}: convert it first")
    if x.ndim < 2:
        raise ValueError(f"x must have at least two axes, samples and channels, got shape {x.shape}")
    if not (isinstance(axis, int) and -x.ndim <= axis < x.ndim):
        raise ValueError(f"axis must be one of the {x.ndim} axes of x, of shape {x.shape}, got {axis!r}")
    if isinstance(eps, Tracer):
        raise TypeError(
            f"eps must be a number, got a traced value of shape {eps.shape}: programs have it as a constant"
        )
    if not isinstance(eps, Real | np.ndarray | jax.Array):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    return axis % int(x.ndim)


def _check_count(call: Call, axis: int) -> None:
    """Raise an error if there is only one value per channel. How many a mask leaves is not known at trace time."""
    x, how = call.x, call.how
    if not how.counts and formula.count(x, None, how.axis) == 1 and call.devices.number() == 1:
        raise ValueError(
            f"training needs more than 1 value per channel, got x of shape {x.shape} with channels in axis {axis}: "
            "drop the last, incomplete batch, use larger batches, or evaluate"
        )


def _vector(name: str, values: Any, x: Any, axis: int) -> Any:
    if values is None:
        return None
    values = _array(name, values)
    if values.shape != (x.shape[axis],):
        raise ValueError(
            f"{name} must have shape ({x.shape[axis]},), one value per channel, got {values.shape}; "
            f"x has shape {x.shape} with channels in axis {axis}"
        )
    return values


def _running(mean: Any, var: Any, x: Any, axis: int, needed: bool) -> Running | None:
    if (mean is None) != (var is None):
        raise ValueError("running_mean and running_var must be given together, got only one of them")
    if mean is None:
        if needed:
            raise ValueError("running_mean and running_var are needed: these statistics are computed from them")
        return None
    return Running(_vector("running_mean", mean, x, axis), _vector("running_var", var, x, axis))


def expand_mask(mask: Any, x: Any, axis: int) -> Any:
    """A mask as counts, with as many axes as `x`.

    Args:
        mask: As in `batch_norm`.
        x: The batch.
        axis: Its channel axis, not negative.

    Raises:
        ValueError: If the mask does not fit, or has a negative or infinite weight and is not traced.
    """
    positions = x.shape[:axis] + x.shape[axis + 1 :]
    whole = mask.ndim == x.ndim
    target = x.shape if whole else positions
    if not (0 < mask.ndim <= x.ndim and all(m in (1, n) for m, n in zip(mask.shape, target, strict=False))):
        raise ValueError(
            f"mask of shape {mask.shape} does not fit x of shape {x.shape} with channels in axis {axis}: it must have "
            f"the shape {positions}, without channels, or the first axes of that, or as many axes as x"
        )
    if not whole:
        mask = mask.reshape(mask.shape + (1,) * (len(positions) - mask.ndim))
        mask = jnp.expand_dims(mask, axis)
    if mask.dtype == jnp.bool_:
        return mask
    sound = (mask >= 0) & (mask < jnp.inf)
    if not isinstance(mask, Tracer):
        if not bool(jnp.all(sound)):
            raise ValueError("mask must hold booleans, or weights that are finite and not negative")
        return mask
    return jnp.where(sound, mask.astype(arithmetic(x.dtype)), jnp.nan)
