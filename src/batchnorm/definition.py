"""Batch normalization in float64 NumPy: the text to learn it from, and the answer everything else is tested against.

A layer sees `x` of shape `(N, C, *spatial)`: `N` samples, `C` channels, any number of positions per sample. Each
channel is treated alone. In training it goes through five stages, three forward and two backward:

```
moments        mean = sum(x) / M,  var = sum((x - mean)^2) / M              over the M values of a channel
merge_moments  two sets of moments make one, for batches that come in parts
normalize      xhat = (x - mean) / sqrt(var + eps),  z = weight*xhat + bias (+ residual),  y = act(z)
grad_sums      dz = dy * act'(z),  sum dz  and  sum dz*xhat                 the gradients of bias and weight
grad_input     dx = weight/sqrt(var + eps) * (dz - (sum dz + xhat * sum dz*xhat) / M)
```

`update_running` keeps an average of the moments, with which the layer is evaluated: then `mean` and `var` are
constants, the layer is one multiplication and one addition per value, and `fold_linear` moves these into the linear map
in front.

Everything here is written for clarity, and computed in float64 whatever comes in. NaN and infinity go through as IEEE
arithmetic says: `relu(NaN)` is NaN.

Source: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
2015, algorithms 1 and 2.
"""

import difflib
import functools
import math
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ActivationSpec",
    "Moments",
    "activate",
    "activate_grad",
    "backward",
    "fold_linear",
    "forward",
    "grad_input",
    "grad_sums",
    "merge_moments",
    "moments",
    "normalize",
    "parse_activation",
    "reciprocal_std",
    "update_running",
]

P = ParamSpec("P")
T = TypeVar("T")

Array = NDArray[np.float64]

ActivationSpec = str | tuple[str, float] | None
"""How a user names an activation: `None`, `"relu"`, or with its parameter, `("leaky_relu", 0.2)`."""


# --- Shapes, and what may go in them ----------------------------------------------------------------------------------


def _ieee(stage: Callable[P, T]) -> Callable[P, T]:
    """Let NaN and infinity go through a stage without NumPy's warnings."""

    @functools.wraps(stage)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> T:
        with np.errstate(all="ignore"):
            return stage(*args, **kwargs)

    return quiet


def _float64(x: ArrayLike) -> Array:
    return np.asarray(x, dtype=np.float64)


def _batch(x: ArrayLike) -> Array:
    x = _float64(x)
    if x.ndim < 2:
        raise ValueError(f"x must have shape (N, C, *spatial), got {x.shape}; a single sample needs an axis in front")
    return x


def _like(x: Array, name: str, values: ArrayLike) -> Array:
    values = _float64(values)
    if values.shape != x.shape:
        raise ValueError(f"{name} must have x's shape {x.shape}, got {values.shape}; nothing is broadcast here")
    return values


def _vector(name: str, values: ArrayLike, size: int, channels: str) -> Array:
    values = _float64(values)
    if values.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), one value per channel, got {values.shape}; {channels}")
    return values


def _per_channel(x: Array, name: str, values: ArrayLike) -> Array:
    """Shape `(C,)` values so that they broadcast along axis 1 of `x`."""
    channels = f"the channels are axis 1 of x, here of shape {x.shape} (np.moveaxis brings them there)"
    return _vector(name, values, x.shape[1], channels).reshape((-1,) + (1,) * (x.ndim - 2))


def _axes(x: Array) -> tuple[int, ...]:
    """All axes but the channels': those a channel's statistics are taken over."""
    return (0, *range(2, x.ndim))


def _weights(x: Array, mask: ArrayLike | None) -> Array:
    """How often each value of a channel counts, `(N, 1, *spatial)`: once, or as the mask says."""
    positions = x.shape[:1] + x.shape[2:]
    mask = np.ones(positions) if mask is None else _float64(mask)
    if mask.ndim == 0 or mask.shape != positions[: mask.ndim]:
        raise ValueError(
            f"mask must have shape {positions}, x's without its channels, or the first axes of it, got {mask.shape}"
        )
    if not np.all((mask >= 0) & (mask < np.inf)):
        raise ValueError("mask must hold booleans, or weights that are finite and not negative; for no say, give 0")
    mask = mask.reshape(mask.shape + (1,) * (len(positions) - mask.ndim))
    return np.expand_dims(np.broadcast_to(mask, positions), axis=1)


# --- Stages 1 and 2: moments ------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """What a batch says about its channels.

    Attributes:
        count: How many values each channel has (the sum of the weights where there is a mask).
        mean: `(C,)`.
        var: `(C,)`, biased: the mean of the squared distances from `mean`.
    """

    count: float  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    mean: Array
    var: Array


@_ieee
def moments(x: ArrayLike, mask: ArrayLike | None = None) -> Moments:
    """Count, mean and biased variance of every channel.

    `mean = sum(m*x) / sum(m)`, `var = sum(m*(x - mean)^2) / sum(m)`, where `m` is 1, or the mask.

    Args:
        x: `(N, C, *spatial)`.
        mask: `(N, *spatial)` or its first axes: booleans that say which values count, or weights that say how often
            (a weight of 2 counts a value twice, a weight of 0 leaves it out, even if it is NaN).

    Returns:
        The moments. Without values they are all 0.

    Raises:
        ValueError: If `x` has fewer than two axes, or `mask` has another shape or a negative, infinite or NaN weight.

    Source: Ioffe & Szegedy 2015, algorithm 1, lines 1 and 2.
    """
    x = _batch(x)
    weights = _weights(x, mask)
    count = float(weights.sum())
    if count == 0:
        return Moments(0.0, np.zeros(x.shape[1]), np.zeros(x.shape[1]))
    x = np.where(weights > 0, x, 0.0)  # not left to the product below: 0 * NaN is NaN

    def average(values: Array) -> Array:
        return _float64((weights * values).sum(_axes(x)) / count)

    mean = average(x)
    # The mean of what is left puts right what rounding did to the first sum: a constant channel has variance 0 exactly.
    mean = mean + average(x - _per_channel(x, "mean", mean))
    return Moments(count, mean, average((x - _per_channel(x, "mean", mean)) ** 2))


@_ieee
def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of two batches together, from the moments of each.

    With `n = n_a + n_b` and `delta = mean_b - mean_a`:
    `mean = mean_a + delta * n_b/n`, `n*var = n_a*var_a + n_b*var_b + delta^2 * n_a*n_b/n`.

    This is associative and commutative, and moments of count 0 are its neutral element: a batch may be split in any
    way.

    Raises:
        ValueError: If the two have different numbers of channels.

    Source: Chan, Golub & LeVeque, "Algorithms for computing the sample variance: analysis and recommendations", 1983,
    equations 1.5a and 1.5b, there with sums in place of means.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"only moments of the same channels can be merged, got {a.mean.shape} and {b.mean.shape}")
    if a.count == 0:
        return b
    if b.count == 0:
        return a
    count = a.count + b.count
    share = b.count / count
    delta = b.mean - a.mean
    mean = a.mean + delta * share
    var = a.var * (1 - share) + b.var * share + delta**2 * share * (1 - share)
    return Moments(count, mean, var)


# --- Activations ------------------------------------------------------------------------------------------------------


class Activation(NamedTuple):
    """An activation and its derivative, both functions of `(z, parameter)`.

    Attributes:
        value: `act(z)`.
        derivative: `act'(z)`.
        parameter: Its default; 0 for an activation that has none.
    """

    value: Callable[[Array, float], Array]
    derivative: Callable[[Array, float], Array]
    parameter: float = 0.0


def _sigmoid(z: Array) -> Array:
    e = np.exp(-np.abs(z))  # never of a positive number, so it cannot overflow
    return np.where(z >= 0, 1.0, e) / (1.0 + e)


def _normal_cdf(z: Array) -> Array:
    # erfc, not 1 + erf: the left tail keeps its digits
    return 0.5 * _float64(np.vectorize(math.erfc, otypes=[np.float64])(-z / math.sqrt(2)))


def _normal_pdf(z: Array) -> Array:
    return np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(
        lambda z, _: z,
        lambda z, _: np.ones_like(z),
    ),
    "relu": Activation(
        lambda z, _: np.maximum(z, 0.0),
        lambda z, _: np.where(z <= 0, 0.0, 1.0),
    ),
    "relu6": Activation(
        lambda z, _: np.clip(z, 0.0, 6.0),
        lambda z, _: np.where((z <= 0) | (z >= 6), 0.0, 1.0),
    ),
    "leaky_relu": Activation(
        lambda z, slope: np.where(z > 0, z, slope * z),
        lambda z, slope: np.where(z > 0, 1.0, slope),
        0.01,
    ),
    "silu": Activation(
        lambda z, _: z * _sigmoid(z),
        lambda z, _: _sigmoid(z) * (1.0 + z * _sigmoid(-z)),
    ),
    "hardswish": Activation(
        lambda z, _: z * np.clip(z + 3.0, 0.0, 6.0) / 6.0,
        lambda z, _: np.where(z <= -3, 0.0, np.where(z >= 3, 1.0, z / 3.0 + 0.5)),
    ),
    "elu": Activation(
        lambda z, alpha: np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0.0))),
        lambda z, alpha: np.where(z > 0, 1.0, alpha * np.exp(np.minimum(z, 0.0))),
        1.0,
    ),
    "sigmoid": Activation(
        lambda z, _: _sigmoid(z),
        lambda z, _: _sigmoid(z) * _sigmoid(-z),
    ),
    "tanh": Activation(
        lambda z, _: np.tanh(z),
        lambda z, _: 4.0 * _sigmoid(2.0 * z) * _sigmoid(-2.0 * z),  # 1 - tanh^2, without its cancellation
    ),
    "gelu": Activation(
        lambda z, _: z * _normal_cdf(z),
        lambda z, _: _normal_cdf(z) + z * _normal_pdf(z),
    ),
}
"""Every activation that can be fused. `gelu` is the one with the normal distribution, not its approximation by tanh.

At a kink the derivative is that of the side which PyTorch takes."""


def parse_activation(activation: ActivationSpec) -> tuple[str, float]:
    """The activation's name, as in `ACTIVATIONS`, and its parameter (leaky_relu's slope, elu's alpha; else 0).

    Raises:
        ValueError: If there is no such activation, or a parameter is given to one that has none.
    """
    match activation:
        case None:
            return "none", 0.0
        case str(name):
            parameter = None
        case (str(name), int() | float() as parameter):
            pass
        case _:
            raise ValueError(f"activation must be a name or (name, parameter), got {activation!r}")
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(name.lower(), ACTIVATIONS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown activation {name!r}; {hint}known are {', '.join(ACTIVATIONS)}")
    default = ACTIVATIONS[name].parameter
    if parameter is None:
        return name, default
    if default == 0 and parameter != 0:
        raise ValueError(f"activation {name!r} takes no parameter, got {parameter}")
    return name, float(parameter)


@_ieee
def activate(z: ArrayLike, activation: ActivationSpec = None) -> Array:
    """`act(z)`, value by value."""
    name, parameter = parse_activation(activation)
    return ACTIVATIONS[name].value(_float64(z), parameter)


@_ieee
def activate_grad(z: ArrayLike, activation: ActivationSpec = None) -> Array:
    """`act'(z)`, value by value."""
    name, parameter = parse_activation(activation)
    return ACTIVATIONS[name].derivative(_float64(z), parameter)


# --- Stage 3: normalize -----------------------------------------------------------------------------------------------


@_ieee
def reciprocal_std(var: ArrayLike, eps: float = 1e-5) -> Array:
    """`rstd = 1 / sqrt(var + eps)`. `eps`, in the units of the variance, keeps a channel that never changes finite.

    Raises:
        ValueError: If `eps` is negative or NaN.
    """
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    return 1.0 / np.sqrt(_float64(var) + eps)


def _pre_activation(
    x: Array,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    residual: ArrayLike | None,
) -> tuple[Array, Array]:
    """`xhat` and `z`."""
    xhat = (x - _per_channel(x, "mean", mean)) * _per_channel(x, "rstd", rstd)
    z = xhat
    if weight is not None:
        z = z * _per_channel(x, "weight", weight)
    if bias is not None:
        z = z + _per_channel(x, "bias", bias)
    if residual is not None:
        z = z + _like(x, "residual", residual)
    return xhat, z


@_ieee
def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: ActivationSpec = None,
) -> Array:
    """`y = act((x - mean) * rstd * weight + bias + residual)`.

    Args:
        x: `(N, C, *spatial)`.
        mean: `(C,)`: of this batch in training, of the running average in evaluation.
        rstd: `(C,)`, from `reciprocal_std`.
        weight: `(C,)`, gamma; 1 if None.
        bias: `(C,)`, beta; 0 if None.
        residual: Like `x`, added before the activation, as the blocks of a residual network do.
        activation: A name in `ACTIVATIONS`, or `(name, parameter)`.

    Returns:
        `y`, like `x`.

    Raises:
        ValueError: If `x` has fewer than two axes, `mean`, `rstd`, `weight` or `bias` does not have one value per
            channel, `residual` has another shape than `x`, or there is no such activation.

    Source: Ioffe & Szegedy 2015, algorithm 1, lines 3 and 4.
    """
    _, z = _pre_activation(_batch(x), mean, rstd, weight, bias, residual)
    return activate(z, activation)


# --- Stages 4 and 5: the gradient -------------------------------------------------------------------------------------


@_ieee
def grad_sums(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: ActivationSpec = None,
) -> tuple[Array, Array]:
    """`sum dz` and `sum dz*xhat`, where `dz = dy * act'(z)`: the gradients of `bias` and of `weight`.

    `z` is computed again from `x`: the forward pass keeps nothing but `x`, `mean` and `rstd`.

    Args:
        dy: The gradient of the loss with respect to `y`; like `x`.
        x, mean, rstd, weight, bias, residual, activation: As they were given to `normalize`.

    Returns:
        `(C,)` and `(C,)`.

    Raises:
        ValueError: As `normalize` does, and if `dy` has another shape than `x`.

    Source: Ioffe & Szegedy 2015, section 3, the last two of the six gradients.
    """
    x = _batch(x)
    xhat, z = _pre_activation(x, mean, rstd, weight, bias, residual)
    dz = _like(x, "dy", dy) * activate_grad(z, activation)
    return dz.sum(_axes(x)), (dz * xhat).sum(_axes(x))


@_ieee
def grad_input(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    sum_dz: ArrayLike,
    sum_dz_xhat: ArrayLike,
    count: float,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: ActivationSpec = None,
    mask: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """The gradients of `x` and of `residual`.

    `dx = weight*rstd * (dz - (sum dz + xhat * sum dz*xhat) / count)`, `d_residual = dz`.

    The subtracted part is how `x` acts through the mean and the variance. A value of weight `m` has `m` times the say
    in these, so for it the part is `m` times as large, and 0 if the mask leaves it out. With statistics that do not
    depend on `x` (evaluation, frozen layers) the part vanishes for all: `count = inf`.

    Args:
        dy: The gradient of the loss with respect to `y`; like `x`.
        x, mean, rstd, weight, bias, residual, activation: As they were given to `normalize`.
        sum_dz, sum_dz_xhat: `(C,)`, from `grad_sums`, added up over everything that was normalized with this `mean` and
            `rstd`: other parts of the batch, and what the mask leaves out, belong to it.
        count: That of the moments; `inf` if `mean` and `rstd` are constants.
        mask: As it was given to `moments`.

    Returns:
        `dx` and `d_residual`, like `x`.

    Raises:
        ValueError: As `grad_sums` and `moments` do.

    Source: Ioffe & Szegedy 2015, section 3, with the first four of the six gradients written as one.
    """
    x = _batch(x)
    xhat, z = _pre_activation(x, mean, rstd, weight, bias, residual)
    dz = _like(x, "dy", dy) * activate_grad(z, activation)
    share = _weights(x, mask) / count
    through_moments = share * (_per_channel(x, "sum_dz", sum_dz) + xhat * _per_channel(x, "sum_dz_xhat", sum_dz_xhat))
    scale = _per_channel(x, "rstd", rstd) * (1.0 if weight is None else _per_channel(x, "weight", weight))
    # Not left to the product: a value without a share takes nothing from the sums, even if they are not finite.
    return scale * (dz - np.where(share > 0, through_moments, 0.0)), dz


# --- All stages of one layer ------------------------------------------------------------------------------------------


def forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: ActivationSpec = None,
    mask: ArrayLike | None = None,
    eps: float = 1e-5,
) -> tuple[Array, Moments]:
    """Batch normalization in training: `moments`, then `normalize`.

    A value that the mask leaves out is normalized like the others; it only has no say in the moments.

    Args:
        x, weight, bias, residual, activation: As in `normalize`.
        mask: As in `moments`.
        eps: As in `reciprocal_std`.

    Returns:
        `y`, like `x`, and the moments.

    Raises:
        ValueError: As the stages do.
    """
    batch = moments(x, mask)
    return normalize(x, batch.mean, reciprocal_std(batch.var, eps), weight, bias, residual, activation), batch


def backward(
    dy: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: ActivationSpec = None,
    mask: ArrayLike | None = None,
    eps: float = 1e-5,
) -> tuple[Array, Array, Array, Array]:
    """The gradient of `forward`: `grad_sums`, then `grad_input`.

    Every `dy` counts, also where the mask leaves `x` out. Where nothing depends on `y`, as in padding, `dy` is 0; `x`
    has to be finite there too, because `dy * xhat` is summed up, and 0 * NaN is NaN.

    Args:
        dy: The gradient of the loss with respect to `y`; like `x`.
        x, weight, bias, residual, activation, mask, eps: As they were given to `forward`.

    Returns:
        `dx`, `d_weight`, `d_bias` and `d_residual`, whether or not there was a weight, a bias or a residual.

    Raises:
        ValueError: As the stages do.
    """
    batch = moments(x, mask)
    rstd = reciprocal_std(batch.var, eps)
    d_bias, d_weight = grad_sums(dy, x, batch.mean, rstd, weight, bias, residual, activation)
    dx, d_residual = grad_input(
        dy, x, batch.mean, rstd, d_bias, d_weight, batch.count, weight, bias, residual, activation, mask
    )
    return dx, d_weight, d_bias, d_residual


# --- Evaluation -------------------------------------------------------------------------------------------------------


@_ieee
def update_running(
    running_mean: ArrayLike,
    running_var: ArrayLike,
    batch: Moments,
    update_rate: float,
    unbiased: bool = True,
) -> tuple[Array, Array]:
    """The running statistics after one more batch: `(1 - update_rate) * running + update_rate * batch`.

    `update_rate` is the weight of the new batch: PyTorch's `momentum`, or one minus Keras'. With `1/k` for the k-th
    batch the result is the plain average over the batches. (The variance of all their values together also counts how
    far the batch means lie apart: `merge_moments` gives that one.)

    Independent values vary less about their own mean than about that of all data, on average by `(M - 1)/M`. `unbiased`
    makes up for this, as PyTorch and the paper do and Keras does not; the normalization of the batch itself never does.
    It needs a count above one, and takes weights as numbers of repeats.

    A batch without values, or with a mean or variance that is not finite, changes nothing.

    Args:
        running_mean, running_var: `(C,)`.
        batch: From `moments`.
        update_rate: From 0 (keep the old) to 1 (take the new).
        unbiased: Whether to multiply the variance by `count / (count - 1)`.

    Returns:
        The new running mean and variance.

    Raises:
        ValueError: If the batch has another number of channels, or `update_rate` is not from 0 to 1.

    Source: Ioffe & Szegedy 2015, algorithm 2, line 10, with the moving averages of section 3.1.
    """
    running_mean = _vector("running_mean", running_mean, batch.mean.size, "the batch says how many")
    running_var = _vector("running_var", running_var, batch.mean.size, "the batch says how many")
    if not 0 <= update_rate <= 1:
        raise ValueError(f"update_rate, the weight of the new batch, must be from 0 to 1, got {update_rate}")
    if batch.count == 0 or not np.isfinite([batch.mean, batch.var]).all():
        return running_mean, running_var
    correction = batch.count / (batch.count - 1) if unbiased and batch.count > 1 else 1.0
    return (
        (1 - update_rate) * running_mean + update_rate * batch.mean,
        (1 - update_rate) * running_var + update_rate * correction * batch.var,
    )


@_ieee
def fold_linear(
    matrix: ArrayLike,
    offset: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    """The linear map that equals a linear map followed by batch normalization in evaluation.

    `(A v + b - mean) * s + bias = (s*A) v + (b - mean)*s + bias` with `s = weight / sqrt(var + eps)`.

    Args:
        matrix: `(C, ...)`: one row per channel; a convolution's kernel `(C, C_in, *kernel)` is such a map too.
        offset: `(C,)`; 0 if None.
        mean, var: `(C,)`, the running statistics.
        weight, bias: `(C,)`, gamma and beta; 1 and 0 if None.
        eps: As in the layer.

    Returns:
        The new matrix and the new offset.

    Raises:
        ValueError: If `matrix` has fewer than two axes, or another argument does not have one value per row.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2017, section 3.2.
    """
    matrix = _float64(matrix)
    if matrix.ndim < 2:
        raise ValueError(f"matrix must have shape (C, ...), with one row per channel, got {matrix.shape}")

    def rows(name: str, values: ArrayLike) -> Array:
        return _vector(name, values, len(matrix), f"the channels are axis 0 of matrix, here of shape {matrix.shape}")

    scale = reciprocal_std(rows("var", var), eps) * (1.0 if weight is None else rows("weight", weight))
    shift = ((0.0 if offset is None else rows("offset", offset)) - rows("mean", mean)) * scale
    if bias is not None:
        shift = shift + rows("bias", bias)
    return matrix * scale.reshape((-1,) + (1,) * (matrix.ndim - 1)), shift
