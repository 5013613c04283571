"""Batch normalization in float64 NumPy: the text to learn it from, and the answer that everything else is tested against.

A layer sees `x` of shape `(N, C, *spatial)`: `N` samples, `C` channels, any number of positions per sample. Each channel is
treated alone. In training it goes through five stages, three forward and two backward:

```
moments        mean = sum(x) / M,  var = sum((x - mean)^2) / M              over the M values of a channel
merge_moments  two sets of moments make one, for batches that come in parts
normalize      xhat = (x - mean) / sqrt(var + eps),  z = weight*xhat + bias (+ residual),  y = act(z)
grad_sums      dz = dy * act'(z),  sum dz  and  sum dz*xhat                 the gradients of bias and weight
grad_input     dx = weight/sqrt(var + eps) * (dz - (sum dz + xhat * sum dz*xhat) / M)
```

`update_running` keeps an average of the moments, with which the layer is evaluated: then `mean` and `var` are constants, the layer is
one multiplication and one addition per value, and `fold_linear` moves these into the linear map in front.

Everything here is written for clarity, and computed in float64 whatever comes in.

Source: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift", 2015,
algorithms 1 and 2.
"""

import difflib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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

Array = NDArray[np.float64]

ActivationSpec = str | tuple[str, float] | None
"""How a user names an activation: `None`, `"relu"`, or with its parameter, `("leaky_relu", 0.2)`."""


# --- Shapes --------------------------------------------------------------------------------------------------------------------


def _float64(x: ArrayLike) -> Array:
    return np.asarray(x, dtype=np.float64)


def _per_channel(values: ArrayLike, x: Array) -> Array:
    """Shape `(C,)` values so that they broadcast along axis 1 of `x`."""
    return _float64(values).reshape((1, -1) + (1,) * (x.ndim - 2))


def _axes(x: Array) -> tuple[int, ...]:
    """All axes but the channels': those a channel's statistics are taken over."""
    return (0, *range(2, x.ndim))


def _weights(mask: ArrayLike | None, x: Array) -> Array:
    """The weight of every value of `x`: 1 everywhere, or the mask. Its axes are `(N, *spatial)`; missing last axes are broadcast."""
    if mask is None:
        return np.ones_like(x)
    mask = _float64(mask)
    expanded = mask.reshape(mask.shape[:1] + (1,) + mask.shape[1:] + (1,) * (x.ndim - 1 - mask.ndim))
    return np.broadcast_to(expanded, x.shape)


# --- Stages 1 and 2: moments ---------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """What a batch says about its channels.

    Attributes:
        count: How many values each channel has (the sum of the weights where there is a mask).
        mean: `(C,)`.
        var: `(C,)`, biased: the mean of the squared distances from `mean`.
    """

    count: float
    mean: Array
    var: Array


def moments(x: ArrayLike, mask: ArrayLike | None = None) -> Moments:
    """Count, mean and biased variance of every channel.

    `mean = sum(m*x) / sum(m)`, `var = sum(m*(x - mean)^2) / sum(m)`, where `m` is 1, or the mask.

    Args:
        x: `(N, C, *spatial)`.
        mask: `(N, *spatial)` or its first axes: booleans that say which values count, or non-negative weights (a weight of 2 counts a
            value twice).

    Returns:
        The moments. A channel without values has count 0, mean 0 and variance 0.

    Source: Ioffe & Szegedy 2015, algorithm 1, lines 1 and 2.
    """
    x = _float64(x)
    weights = _weights(mask, x)
    count = float(weights[:, 0].sum())
    if count == 0:
        return Moments(0.0, np.zeros(x.shape[1]), np.zeros(x.shape[1]))
    # A value of weight 0 is not there, even if it is NaN: np.where, not a product, leaves it out.
    counted = np.where(weights > 0, x, 0.0)
    mean = (weights * counted).sum(_axes(x)) / count
    centred = np.where(weights > 0, x - _per_channel(mean, x), 0.0)
    return Moments(count, mean, (weights * centred**2).sum(_axes(x)) / count)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of two batches together, from the moments of each.

    With `n = n_a + n_b` and `delta = mean_b - mean_a`:
    `mean = mean_a + delta * n_b/n`, `n*var = n_a*var_a + n_b*var_b + delta^2 * n_a*n_b/n`.

    This is associative and commutative, and moments of count 0 are its neutral element: a batch may be split in any way.

    Source: Chan, Golub & LeVeque, "Algorithms for computing the sample variance", 1983, equation 2.1.
    """
    count = a.count + b.count
    if count == 0:
        return a
    share = b.count / count
    delta = b.mean - a.mean
    mean = a.mean + delta * share
    var = a.var * (1 - share) + b.var * share + delta**2 * share * (1 - share)
    return Moments(count, mean, var)


# --- Activations ---------------------------------------------------------------------------------------------------------------


class Activation(NamedTuple):
    """An activation and its derivative, both functions of `(z, parameter)`; `parameter` is the default (0 where there is none)."""

    value: Callable[[Array, float], Array]
    derivative: Callable[[Array, float], Array]
    parameter: float = 0.0


def _sigmoid(z: Array) -> Array:
    e = np.exp(-np.abs(z))  # of a number that is never positive, so it cannot overflow
    return np.where(z >= 0, 1.0, e) / (1.0 + e)


def _normal_cdf(z: Array) -> Array:
    return 0.5 * _float64(np.vectorize(math.erfc, otypes=[np.float64])(-z / math.sqrt(2)))


def _normal_pdf(z: Array) -> Array:
    return np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(lambda z, _: z, lambda z, _: np.ones_like(z)),
    "relu": Activation(lambda z, _: np.maximum(z, 0.0), lambda z, _: 1.0 * ~(z <= 0)),
    "relu6": Activation(lambda z, _: np.clip(z, 0.0, 6.0), lambda z, _: 1.0 * ~((z <= 0) | (z >= 6))),
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
        lambda z, _: 1.0 - np.tanh(z) ** 2,
    ),
    "gelu": Activation(
        lambda z, _: z * _normal_cdf(z),
        lambda z, _: _normal_cdf(z) + z * _normal_pdf(z),
    ),
}
"""Every activation that can be fused. At a kink the derivative is the one of the two sides that PyTorch takes."""


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
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown activation {name!r}{hint} Known are {', '.join(ACTIVATIONS)}.")
    default = ACTIVATIONS[name].parameter
    if parameter is None:
        return name, default
    if default == 0:
        raise ValueError(f"activation {name!r} takes no parameter, got {parameter}")
    return name, float(parameter)


def activate(z: ArrayLike, activation: ActivationSpec = None) -> Array:
    """`act(z)`, value by value."""
    name, parameter = parse_activation(activation)
    return ACTIVATIONS[name].value(_float64(z), parameter)


def activate_grad(z: ArrayLike, activation: ActivationSpec = None) -> Array:
    """`act'(z)`, value by value."""
    name, parameter = parse_activation(activation)
    return ACTIVATIONS[name].derivative(_float64(z), parameter)


# --- Stage 3: normalize --------------------------------------------------------------------------------------------------------


def reciprocal_std(var: ArrayLike, eps: float = 1e-5) -> Array:
    """`rstd = 1 / sqrt(var + eps)`. `eps`, in the units of the variance, keeps a channel that never changes finite."""
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
    xhat = (x - _per_channel(mean, x)) * _per_channel(rstd, x)
    z = xhat
    if weight is not None:
        z = z * _per_channel(weight, x)
    if bias is not None:
        z = z + _per_channel(bias, x)
    if residual is not None:
        z = z + _float64(residual)
    return xhat, z


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

    Source: Ioffe & Szegedy 2015, algorithm 1, lines 3 and 4.
    """
    _, z = _pre_activation(_float64(x), mean, rstd, weight, bias, residual)
    return activate(z, activation)


# --- Stages 4 and 5: the gradient ----------------------------------------------------------------------------------------------


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

    Source: Ioffe & Szegedy 2015, section 3, the last two of the six gradients.
    """
    x = _float64(x)
    xhat, z = _pre_activation(x, mean, rstd, weight, bias, residual)
    dz = _float64(dy) * activate_grad(z, activation)
    return dz.sum(_axes(x)), (dz * xhat).sum(_axes(x))


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

    The subtracted part is how `x` acts through the mean and the variance. A value that the mask leaves out has no say in these, so
    nothing is subtracted for it (and a weight `m` multiplies it). With statistics that do not depend on `x` (evaluation, frozen layers)
    the part vanishes for all: `count = inf`.

    Args:
        dy: The gradient of the loss with respect to `y`; like `x`.
        x, mean, rstd, weight, bias, residual, activation: As they were given to `normalize`.
        sum_dz, sum_dz_xhat: `(C,)`, from `grad_sums`, over all the values that `mean` and `rstd` come from.
        count: How many these are; `inf` if `mean` and `rstd` are constants.
        mask: As it was given to `moments`.

    Returns:
        `dx` and `d_residual`, like `x`.

    Source: Ioffe & Szegedy 2015, section 3, with the first four of the six gradients written as one.
    """
    x = _float64(x)
    xhat, z = _pre_activation(x, mean, rstd, weight, bias, residual)
    dz = _float64(dy) * activate_grad(z, activation)
    through_moments = (_per_channel(sum_dz, x) + xhat * _per_channel(sum_dz_xhat, x)) / count
    weights = _weights(mask, x)
    scale = _float64(rstd) if weight is None else _float64(rstd) * _float64(weight)
    # np.where: a NaN that the mask leaves out stays out of the rest.
    return _per_channel(scale, x) * (dz - np.where(weights > 0, weights * through_moments, 0.0)), dz


# --- All stages of one layer ---------------------------------------------------------------------------------------------------


def forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: ActivationSpec = None,
    mask: ArrayLike | None = None,
    eps: float = 1e-5,
) -> tuple[Array, Moments]:
    """Batch normalization in training: `moments`, then `normalize`. Returns `y` and the moments."""
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
    """The gradient of `forward`: `grad_sums`, then `grad_input`. Returns `dx`, `d_weight`, `d_bias`, `d_residual`."""
    batch = moments(x, mask)
    rstd = reciprocal_std(batch.var, eps)
    d_bias, d_weight = grad_sums(dy, x, batch.mean, rstd, weight, bias, residual, activation)
    dx, d_residual = grad_input(
        dy, x, batch.mean, rstd, d_bias, d_weight, batch.count, weight, bias, residual, activation, mask
    )
    return dx, d_weight, d_bias, d_residual


# --- Evaluation ----------------------------------------------------------------------------------------------------------------


def update_running(
    running_mean: ArrayLike,
    running_var: ArrayLike,
    batch: Moments,
    update_rate: float,
    unbiased: bool = True,
) -> tuple[Array, Array]:
    """The running statistics after one more batch: `running + update_rate * (batch - running)`.

    `update_rate` is the weight of the new batch: PyTorch's `momentum`, or one minus Keras'. With `1/k` for the k-th batch the result is the
    plain average of all.

    A batch varies less about its own mean than about the mean of all data, by `(M - 1)/M`. `unbiased` makes up for this, as PyTorch and
    the paper do and Keras does not; the normalization of the batch itself never does. A count of one or less stays as it is.

    Args:
        running_mean, running_var: `(C,)`.
        batch: From `moments`.
        update_rate: From 0 (keep the old) to 1 (take the new).
        unbiased: Whether to multiply the variance by `count / (count - 1)`.

    Returns:
        The new running mean and variance.

    Source: Ioffe & Szegedy 2015, algorithm 2, lines 8 to 10.
    """
    correction = batch.count / (batch.count - 1) if unbiased and batch.count > 1 else 1.0
    running_mean, running_var = _float64(running_mean), _float64(running_var)
    return (
        running_mean + update_rate * (batch.mean - running_mean),
        running_var + update_rate * (correction * batch.var - running_var),
    )


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

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2017, section 3.2.
    """
    matrix, mean = _float64(matrix), _float64(mean)
    scale = reciprocal_std(var, eps) * (1.0 if weight is None else _float64(weight))
    offset = np.zeros_like(mean) if offset is None else _float64(offset)
    shift: Any = 0.0 if bias is None else _float64(bias)
    return matrix * scale.reshape((-1,) + (1,) * (matrix.ndim - 1)), (offset - mean) * scale + shift
