"""The layer for Flax NNX: Flax's own, with a fused activation, weighted masks, and sources of statistics."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from batchnorm.jax.activations import Activation, resolve
from batchnorm.jax.functional import batch_norm
from batchnorm.jax.statistics import BatchStatistics, Statistics, expect

__all__ = ["BatchNorm", "adopt", "release", "source"]

BIASED = BatchStatistics(unbiased=False)


class BatchNorm(nnx.BatchNorm):  # type: ignore[misc, unused-ignore]
    """Batch normalization and its activation, for Flax NNX.

    `y = act((x - mean) / sqrt(var + epsilon) * scale + bias + residual)`, where `mean` and `var` are the batch's in
    training and the running ones otherwise. In training `mean` and `var` of the layer move: `running = momentum *
    running + (1 - momentum) * batch`, with the biased variance.

    Args:
        num_features: The number of channels.
        activation: As in `batch_norm`. A module becomes a part of the layer, with its parameters.
        statistics: The source of the statistics in training; `BatchStatistics(unbiased=False)`, as in Flax, if None.
        **kwargs: Flax's: `use_running_average`, `axis`, `momentum`, `epsilon`, `dtype`, `param_dtype`, `use_bias`,
            `use_scale`, `bias_init`, `scale_init`, `axis_name`, `axis_index_groups`, `promote_dtype`, `rngs` and the
            rest. `use_fast_variance` has no effect: the variance is always the mean squared distance from the mean.

    Raises:
        ValueError: If the activation is unknown; in a call, as in `batch_norm`.
        TypeError: If `statistics` is not a source; if the activation is a class.

    Differs from `flax.nnx.BatchNorm`:
        1. The constructor takes `activation` and `statistics`; a call takes `residual`.
        2. The variance is never `E[x^2] - E[x]^2`.
        3. With a mask, the means of several devices are weighted by their counts; Flax averages them without weights.
        4. A mask may omit the channel axis, or hold weights. A mask with fewer axes than `x` is an error if it fits
           both without the channel axis and as NumPy would broadcast it, which is Flax's reading. If it leaves out a
           whole channel, the statistics of this channel are 0, not NaN.
        5. A batch whose statistics are not finite, or in which nothing counts, does not change the running statistics.
        6. With `dtype` in half precision, the statistics stay in float32.
        7. A single value per channel is an error in training.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2.
    """

    activation: Activation
    statistics: Statistics | None

    def __init__(
        self,
        num_features: int,
        *,
        activation: Activation = None,
        statistics: Statistics | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, **kwargs)
        resolve(activation)
        expect(statistics)
        self.activation = activation
        self.statistics = statistics

    def __call__(
        self, x: Any, use_running_average: bool | None = None, *, mask: Any = None, residual: Any = None
    ) -> Any:
        """Normalize `x`; in training, move the running statistics.

        Args:
            x: The batch, of any rank from 2 on.
            use_running_average: Whether to normalize by the running statistics; the layer's attribute if None.
            mask, residual: As in `batch_norm`.

        Returns:
            `y`, of the shape of `x`, in `dtype` or else the common type of `x` and the parameters.

        Raises:
            ValueError: As in `batch_norm`; if neither the layer nor the call sets `use_running_average`.
        """
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        if evaluate is None:
            raise ValueError(
                "BatchNorm does not know whether to use the running statistics: pass use_running_average to it or to "
                "the call, or call train() or eval()"
            )
        running = self.mean[...], self.var[...]
        scale, bias = (None if v is None else v[...] for v in (self.scale, self.bias))
        promote = getattr(self, "promote_dtype", promote_dtype)  # Flax 0.12.0 has no such argument
        x, _, _, scale, bias = promote((x, *running, scale, bias), dtype=self.dtype)
        if mask is not None:
            mask = _whole(jnp.asarray(mask), x, self.axis)
        y, moved = batch_norm(
            x, *running, weight=scale, bias=bias, training=not evaluate, momentum=1 - self.momentum, eps=self.epsilon,
            axis=self.axis, activation=self.activation, residual=residual, mask=mask, axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups, statistics=source(self),
        )  # fmt: skip
        if not evaluate and not source(self).is_constant:
            assert moved is not None
            self.mean[...], self.var[...] = moved
        return y if self.dtype is None else y.astype(self.dtype)


def _whole(mask: Any, x: Any, axis: int) -> Any:
    """A mask that Flax would broadcast, with as many axes as `x`; any other mask unchanged, for `batch_norm`."""
    if not 0 < mask.ndim < x.ndim:
        return mask
    channels = axis % x.ndim
    positions = x.shape[:channels] + x.shape[channels + 1 :]

    def fits(target: tuple[int, ...]) -> bool:
        return all(m in (1, n) for m, n in zip(mask.shape, target, strict=True))

    if not fits(x.shape[-mask.ndim :]):
        return mask
    if fits(positions[: mask.ndim]) and mask.size > 1:
        raise ValueError(
            f"mask of shape {mask.shape} can be read in two ways for x of shape {x.shape} with channels in axis "
            f"{axis}, as NumPy broadcasts it and as the first axes without the channels: give it as many axes as x"
        )
    return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)


def source(layer: Any) -> Statistics:
    """The source of the statistics of a layer, ours or Flax's, in training."""
    return getattr(layer, "statistics", None) or BIASED


# --- Flax's layers that become ours -----------------------------------------------------------------------------------


def adopt(layer: Any) -> None:
    """Turn Flax's layer into ours, in place."""
    object.__setattr__(layer, "__class__", BatchNorm)
    layer.activation, layer.statistics = None, None


def release(layer: Any) -> None:
    """Turn our layer into Flax's, in place."""
    del layer.activation, layer.statistics
    object.__setattr__(layer, "__class__", nnx.BatchNorm)
