"""The stages of batch normalization in `keras.ops`, for any backend and channel axis, differentiable and compilable.

`batchnorm.definition` defines them. Here the channels may be any axis of `x`, and a mask may differ between channels.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from batchnorm.keras.activations import Activation

__all__ = [
    "Call",
    "Moments",
    "arithmetic",
    "expand_mask",
    "group_moments",
    "group_sizes",
    "moments",
    "normalize",
    "per_channel",
    "type_name",
]


class Call(NamedTuple):
    """One normalization: `y = act((x - mean) / sqrt(var + epsilon) * gamma + beta)`.

    Attributes:
        x: The batch.
        counts: From `expand_mask`; 1 everywhere if None.
        gamma, beta: `(C,)`, tensors or variables; 1 and 0 if None.
        axis: The channel axis of `x`.
        epsilon: Added to the variance, in the square of the units of `x`.
        activation: The activation.
    """

    x: Any
    counts: Any
    gamma: Any
    beta: Any
    axis: int
    epsilon: float
    activation: Activation

    def cast(self) -> "Call":
        """The same call in the type in which it is computed."""
        kind = arithmetic(self.x)
        tensors = {name: getattr(self, name) for name in ("x", "counts", "gamma", "beta")}
        return self._replace(**{name: ops.cast(t, kind) for name, t in tensors.items() if t is not None})


class Moments(NamedTuple):
    """The moments of every channel of a batch.

    Attributes:
        count: `(C,)`: the number of values of each channel; with a mask, the sum of its weights.
        mean: `(C,)`; 0 where nothing counts.
        var: `(C,)`, biased: the mean of the squared distances from `mean`.
    """

    count: Any
    mean: Any
    var: Any


def type_name(x: Any) -> str:
    """The type of a tensor by its name in Keras, such as `"float32"`."""
    return str(keras.backend.standardize_dtype(x.dtype))


def arithmetic(x: Any) -> str:
    """The type in which `x` is computed: float64 for float64, float32 for all others.

    `keras.backend.result_type` would give float32 for float64, too, on all backends except TensorFlow.
    """
    return "float64" if type_name(x) == "float64" else "float32"


def per_channel(values: Any, x: Any, axis: int) -> Any:
    """Reshape `(C,)` values so that they broadcast along the channels of `x`."""
    shape = [1] * len(x.shape)
    shape[axis] = -1
    return ops.reshape(values, shape)


def _reduced(x: Any, axis: int, first: int = 0) -> tuple[int, ...]:
    """The axes from `first` onwards, without the channels."""
    channels = axis % len(x.shape)
    return tuple(i for i in range(first, len(x.shape)) if i != channels)


# --- Masks -----------------------------------------------------------------------------------------------------------


def expand_mask(mask: Any, x: Any, axis: int) -> Any:
    """The mask as counts that broadcast to `x`.

    Args:
        mask: The shape of `x` without its channels; or the first axes of `x`, as from `keras.layers.Masking`; or as
            many axes as `x`, each of the same length or of length 1.
        x: The batch; the counts get its type.
        axis: The channel axis of `x`.

    Raises:
        ValueError: If the shape of the mask does not fit, or fits in two ways.
    """
    shape, channels = tuple(x.shape), axis % len(x.shape)
    given, axes = tuple(mask.shape), len(mask.shape)
    positions = shape[:channels] + shape[channels + 1 :]

    def fits(target: tuple[int | None, ...]) -> bool:
        return all(m in (1, None, n) or n is None for m, n in zip(given, target, strict=True))

    if axes == len(shape) and fits(shape):
        return ops.cast(mask, x.dtype)
    leading = 0 < axes < len(shape) and fits(shape[:axes])
    without = 0 < axes < len(shape) and fits(positions[:axes])
    if leading and without and axes > channels and None not in (*given, *shape[1:axes]):
        raise ValueError(
            f"mask of shape {given} can be read in two ways for inputs of shape {shape} with channels in axis {axis}: "
            f"give it with {len(shape)} axes, e.g. ops.expand_dims(mask, {channels}) if it has none for the channels, "
            f"or ops.expand_dims(mask, -1) if it covers the first axes"
        )
    if without:
        after = max(0, axes - channels)  # the mask's axes behind the channels
        mask = ops.reshape(mask, _expanded(mask, axes - after, after, len(shape) - axes - 1))
    elif leading:
        mask = ops.reshape(mask, _expanded(mask, axes, 0, len(shape) - axes - 1))
    else:
        raise ValueError(
            f"mask of shape {given} does not fit inputs of shape {shape} with channels in axis {axis}: it must have "
            f"the shape {positions}, without channels, or the first axes of the inputs', or as many axes as the inputs"
        )
    return ops.cast(mask, x.dtype)


def _expanded(mask: Any, before: int, after: int, missing: int) -> tuple[Any, ...]:
    """A mask's shape with an axis of length 1 for the channels, and with the axes missing at the end."""
    shape = tuple(ops.shape(mask))
    return (*shape[:before], 1, *shape[before : before + after], *(1,) * missing)


# --- Moments ---------------------------------------------------------------------------------------------------------


def moments(x: Any, counts: Any, axis: int) -> Moments:
    """Count, mean and biased variance of every channel: `mean = sum(w*x)/sum(w)`, `var = sum(w*(x - mean)^2)/sum(w)`.

    Args:
        x: The batch, of float32 or float64.
        counts: From `expand_mask`, or None. Values with count 0 are left out, even if they are NaN.
        axis: The channel axis of `x`.

    Source: Ioffe & Szegedy 2015, algorithm 1, lines 1 and 2.
    """
    axes = _reduced(x, axis)
    if counts is None:
        shape = ops.shape(x)
        count = ops.cast(ops.prod(ops.stack([ops.cast(shape[i], "int32") for i in axes])), x.dtype)
        count = count * ops.ones((x.shape[axis],), x.dtype)
        some = ops.where(count > 0, count, 1)  # a batch may be empty
        mean = ops.sum(x, axes) / some
        return Moments(count, mean, ops.sum(ops.square(x - per_channel(mean, x, axis)), axes) / some)
    counts = ops.broadcast_to(counts, ops.shape(x))
    count = ops.sum(counts, axes)
    some = ops.where(count > 0, count, 1)
    mean = ops.sum(_counted(counts, x), axes) / some
    kept = ops.where(counts > 0, x - per_channel(mean, x, axis), 0)
    return Moments(count, mean, ops.sum(counts * ops.square(kept), axes) / some)


def _counted(counts: Any, x: Any) -> Any:
    """`counts * x`, and 0 where the count is 0, because 0 * NaN and its gradient would be NaN."""
    return counts * ops.where(counts > 0, x, 0)


def group_sizes(samples: Any, size: int) -> tuple[Any, Any]:
    """The number of groups of consecutive samples in a batch, and the group of each sample.

    There are `max(1, samples // size)` groups, whose sizes differ by at most one; with more than one group, none is
    smaller than `size`.
    """
    # A Python integer where the size of the batch is static: in compiled code, JAX needs a static number of groups.
    groups = max(1, samples // size) if isinstance(samples, int) else ops.maximum(1, samples // size)
    small = samples // groups
    larger = samples - small * groups  # the first groups have one sample more
    sample = ops.arange(samples)
    behind = larger + ops.maximum(sample - larger * (small + 1), 0) // ops.maximum(small, 1)
    return groups, ops.where(sample < larger * (small + 1), sample // (small + 1), behind)


def group_moments(x: Any, counts: Any, axis: int, size: int) -> tuple[Moments, Any, Any]:
    """The moments of the whole batch, and for each sample the mean and variance of its group.

    The moments of the batch follow by the law of total variance: `var = sum(n_g (var_g + (mean_g - mean)^2)) / n`.

    Args:
        x, counts, axis: As in `moments`; the first axis is the samples.
        size: The smallest number of samples per group.

    Returns:
        The moments, and the means and variances, which broadcast to `x`.

    Source: Hoffer, Hubara & Soudry 2017, algorithm 1.
    """
    channels = axis % len(x.shape)
    samples = ops.shape(x)[0]
    groups, group = group_sizes(samples, size)
    inside = _reduced(x, axis, first=1)
    counts = ops.broadcast_to(ops.ones((), x.dtype) if counts is None else counts, ops.shape(x))

    def gather(values: Any) -> Any:
        """Sum the values of each sample and position by group."""
        return _segment_sum(ops.sum(values, inside) if inside else values, group, groups)

    def spread(values: Any) -> Any:
        """Give each sample the value of its group."""
        shape = [samples] + [1] * (len(x.shape) - 1)
        shape[channels] = x.shape[channels]
        return ops.reshape(ops.take(values, group, axis=0), shape)

    count = gather(counts)
    some = ops.where(count > 0, count, 1)
    mean = gather(_counted(counts, x)) / some
    var = gather(counts * ops.square(ops.where(counts > 0, x - spread(mean), 0))) / some
    total = ops.sum(count, 0)
    share = count / ops.where(total > 0, total, 1)
    center = ops.sum(share * mean, 0)
    return Moments(total, center, ops.sum(share * (var + ops.square(mean - center)), 0)), spread(mean), spread(var)


def _segment_sum(values: Any, group: Any, groups: Any) -> Any:
    """`keras.ops.segment_sum`, which on PyTorch sums float64 in float32."""
    if keras.backend.backend() == "torch":
        return values.new_zeros((groups, values.shape[1])).index_add(0, group, values)
    return ops.segment_sum(values, group, num_segments=groups)


# --- Normalize -------------------------------------------------------------------------------------------------------


def normalize(call: Call, mean: Any, var: Any) -> Any:
    """`y` of a call that has been cast, by these statistics.

    Args:
        call: The call.
        mean, var: `(C,)`, or with as many axes as `x`.

    Source: Ioffe & Szegedy 2015, algorithm 1, lines 3 and 4.
    """
    x, axis, gamma = call.x, call.axis, call.gamma
    scale = ops.rsqrt(var + call.epsilon)
    if len(scale.shape) == 1 and gamma is not None:
        scale = scale * gamma
        gamma = None
    if len(scale.shape) == 1:
        mean, scale = per_channel(mean, x, axis), per_channel(scale, x, axis)
    z = (x - mean) * scale
    if gamma is not None:
        z = z * per_channel(gamma, x, axis)
    if call.beta is not None:
        z = z + per_channel(call.beta, x, axis)
    return call.activation(z)
