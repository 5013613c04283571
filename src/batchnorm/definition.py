"""Batch normalization in float64 NumPy: the text to learn it from, and the oracle of all tests.

A layer sees `x` of shape `(N, C, *spatial)`: `N` samples, `C` channels, any number of positions per sample. Each
channel is normalized on its own. Training has five stages, three forward and two backward:

```
moments        mean = sum(x) / M,  var = sum((x - mean)^2) / M              over the M values of a channel
merge_moments  the moments of two parts of a batch become those of the whole
normalize      xhat = (x - mean) / sqrt(var + eps),  z = weight*xhat + bias (+ residual),  y = act(z)
grad_sums      dz = dy * act'(z),  sum dz  and  sum dz*xhat                 the gradients of bias and weight
grad_input     dx = weight/sqrt(var + eps) * (dz - (sum dz + xhat * sum dz*xhat) / M)
```

`update_running` keeps an average of the moments for evaluation. There `mean` and `var` are constants and the layer is
one multiplication and one addition per value, which `fold_linear` moves into the linear map in front.

The code is written for clarity and computes in float64, whatever the type of the input. NaN and infinity propagate as
in IEEE arithmetic: `relu(NaN)` is NaN.

Source: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
2015, algorithms 1 and 2.
"""

import difflib
import functools
import math
from collections.abc import Callable
from numbers import Real
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


# --- Checks of shapes and values --------------------------------------------------------------------------------------


def _ieee(stage: Callable[P, T]) -> Callable[P, T]:
    """Let NaN and infinity pass through a stage without NumPy's warnings."""

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
    """Reshape `(C,)` values so that they broadcast along axis 1 of `x`."""
    channels = f"the channels are axis 1 of x, here of shape {x.shape} (np.moveaxis brings them there)"
    return _vector(name, values, x.shape[1], channels).reshape((-1,) + (1,) * (x.ndim - 2))


def _axes(x: Array) -> tuple[int, ...]:
    """All axes except the channels: the axes over which a channel's statistics are taken."""
    return (0, *range(2, x.ndim))


def _counts(x: Array, mask: ArrayLike | None) -> Array:
    """How much each position counts, `(N, 1, *spatial)`: 1 without a mask."""
    positions = x.shape[:1] + x.shape[2:]
    mask = np.ones(positions) if mask is None else _float64(mask)
    if mask.ndim == 0 or mask.shape != positions[: mask.ndim]:
        raise ValueError(
            f"mask must have shape {positions}, x's without its channels, or the first axes of it, got {mask.shape}"
        )
    if not np.all((mask >= 0) & (mask < np.inf)):
        raise ValueError("mask must hold booleans, or weights that are finite and not negative; 0 leaves a value out")
    mask = mask.reshape(mask.shape + (1,) * (len(positions) - mask.ndim))
    return np.expand_dims(np.broadcast_to(mask, positions), axis=1)


# --- Stages 1 and 2: moments ------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """The moments of every channel of a batch.

    Attributes:
        count: The number of values per channel; with a mask, the sum of its weights.
        mean: `(C,)`.
        var: `(C,)`, biased: the mean of the squared distances from `mean`.
    """

    count: float  # type: ignore[assignment]  # hides tuple.count
    mean: Array
    var: Array


@_ieee
def moments(x: ArrayLike, mask: ArrayLike | None = None) -> Moments:
    """Count, mean and biased variance of every channel.

    `mean = sum(m*x) / sum(m)`, `var = sum(m*(x - mean)^2) / sum(m)`, where `m` is 1, or the mask.

    Args:
        x: `(N, C, *spatial)`.
        mask: `(N, *spatial)` or its first axes: booleans (which values count) or weights (how often each value counts:
            2 counts a value twice, 0 leaves it out, even if it is NaN).

    Returns:
        The moments; all 0 if nothing counts.

    Raises:
        ValueError: If `x` has fewer than two axes, or `mask` has another shape or a negative, infinite or NaN weight.

    Source: Ioffe & Szegedy 2015, algorithm 1, lines 1 and 2.
    """
    x = _batch(x)
    counts = _counts(x, mask)
    count = float(counts.sum())
    if count == 0:
        return Moments(0.0, np.zeros(x.shape[1]), np.zeros(x.shape[1]))
    x = np.where(counts > 0, x, 0.0)  # the product below would not do: 0 * NaN is NaN

    def average(values: Array) -> Array:
        return _float64((counts * values).sum(_axes(x)) / count)

    mean = average(x)
    # The mean of the differences corrects the rounding of the first sum: a constant channel has variance exactly 0.
    mean = mean + average(x - _per_channel(x, "mean", mean))
    return Moments(count, mean, average((x - _per_channel(x, "mean", mean)) ** 2))


@_ieee
def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of the union of two batches, from the moments of each.

    With `n = n_a + n_b` and `delta = mean_b - mean_a`:
    `mean = mean_a + delta * n_b/n`, `n*var = n_a*var_a + n_b*var_b + delta^2 * n_a*n_b/n`.

    The operation is associative and commutative, and moments of count 0 are its neutral element. So a batch may be
    split in any way.

    Args:
        a, b: The moments of each batch.

    Returns:
        The moments of both together.

    Raises:
        ValueError: If the two have different numbers of channels.

    Source: Chan, Golub & LeVeque, "Algorithms for computing the sample variance: analysis and recommendations", 1983,
    equations 1.5a and 1.5b, written there with sums instead of means.
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
        parameter: The default of its parameter; 0 for an activation without one.
    """

    value: Callable[[Array, float], Array]
    derivative: Callable[[Array, float], Array]
    parameter: float = 0.0


def _sigmoid(z: Array) -> Array:
    e = np.exp(-np.abs(z))  # the exponent is never positive, so it cannot overflow
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
"""Every activation that can be fused. `gelu` uses the normal distribution, not its tanh approximation.

At a kink the derivative is the one that PyTorch uses."""


def parse_activation(activation: ActivationSpec) -> tuple[str, float]:
    """The activation's name, as in `ACTIVATIONS`, and its parameter (leaky_relu's slope, elu's alpha, otherwise 0).

    Raises:
        ValueError: If the activation is unknown, or if it has no parameter and one is given.
    """
    match activation:
        case None:
            return "none", 0.0
        case str(name):
            parameter = None
        case (str(name), Real() as parameter):  # NumPy's numbers, too
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
    """`act(z)`, elementwise."""
    name, parameter = parse_activation(activation)
    return ACTIVATIONS[name].value(_float64(z), parameter)


@_ieee
def activate_grad(z: ArrayLike, activation: ActivationSpec = None) -> Array:
    """`act'(z)`, elementwise."""
    name, parameter = parse_activation(activation)
    return ACTIVATIONS[name].derivative(_float64(z), parameter)


# --- Stage 3: normalize -----------------------------------------------------------------------------------------------


@_ieee
def reciprocal_std(var: ArrayLike, eps: float = 1e-5) -> Array:
    """`rstd = 1 / sqrt(var + eps)`.

    Args:
        var: `(C,)`, biased.
        eps: Added to the variance, in its units. It keeps `rstd` finite for a constant channel.

    Returns:
        `(C,)`.

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
        mean: `(C,)`: the batch's in training, the running mean in evaluation.
        rstd: `(C,)`, from `reciprocal_std`.
        weight: `(C,)`, gamma; 1 if None.
        bias: `(C,)`, beta; 0 if None.
        residual: Like `x`, added before the activation, as in the blocks of a residual network.
        activation: A name in `ACTIVATIONS`, or `(name, parameter)`.

    Returns:
        `y`, like `x`.

    Raises:
        ValueError: If `x` has fewer than two axes, `mean`, `rstd`, `weight` or `bias` does not have one value per
            channel, `residual` has another shape than `x`, or the activation is unknown.

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

    `z` is recomputed from `x`: the forward pass keeps only `x`, `mean` and `rstd`.

    Args:
        dy: The gradient of the loss with respect to `y`; like `x`.
        x, mean, rstd, weight, bias, residual, activation: As in the call of `normalize`.

    Returns:
        `sum dz` and `sum dz*xhat`, `(C,)` each.

    Raises:
        ValueError: As in `normalize`, and if `dy` has another shape than `x`.

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

    The subtracted term is the effect of `x` through the mean and the variance. A value of weight `m` has `m` times the
    effect on them, so its term is multiplied by `m`; it is 0 if the mask leaves the value out. If the statistics do not
    depend on `x` (evaluation, frozen layers), the term vanishes everywhere: `count = inf`.

    Args:
        dy: The gradient of the loss with respect to `y`; like `x`.
        x, mean, rstd, weight, bias, residual, activation: As in the call of `normalize`.
        sum_dz, sum_dz_xhat: `(C,)`, from `grad_sums`, summed over everything that was normalized with this `mean` and
            `rstd`, including other parts of the batch and the values that the mask leaves out.
        count: The count of the moments; `inf` if `mean` and `rstd` are constants.
        mask: As in the call of `moments`.

    Returns:
        `dx` and `d_residual`, like `x`.

    Raises:
        ValueError: As in `grad_sums` and `moments`.

    Source: Ioffe & Szegedy 2015, section 3, with the first four of the six gradients combined.
    """
    x = _batch(x)
    xhat, z = _pre_activation(x, mean, rstd, weight, bias, residual)
    dz = _like(x, "dy", dy) * activate_grad(z, activation)
    share = _counts(x, mask) / count
    through_moments = share * (_per_channel(x, "sum_dz", sum_dz) + xhat * _per_channel(x, "sum_dz_xhat", sum_dz_xhat))
    scale = _per_channel(x, "rstd", rstd) * (1.0 if weight is None else _per_channel(x, "weight", weight))
    # The product alone would not do: a value with share 0 takes nothing from the sums, even if they are not finite.
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

    A value that the mask leaves out is still normalized; it only does not affect the moments.

    Args:
        x, weight, bias, residual, activation: As in `normalize`.
        mask: As in `moments`.
        eps: As in `reciprocal_std`.

    Returns:
        `y`, like `x`, and the moments.

    Raises:
        ValueError: As in the stages.
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

    Every `dy` counts, even where the mask leaves `x` out. Where nothing depends on `y`, as in padding, `dy` is 0. But
    `x` must be finite there too, because `dy * xhat` enters the sums and 0 * NaN is NaN.

    Args:
        dy: The gradient of the loss with respect to `y`; like `x`.
        x, weight, bias, residual, activation, mask, eps: As in the call of `forward`.

    Returns:
        `dx`, `d_weight`, `d_bias` and `d_residual`, with or without a weight, a bias and a residual.

    Raises:
        ValueError: As in the stages.
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
    batch, the result is the plain average over the batches. (The variance of all values together also includes the
    variance of the batch means; `merge_moments` computes it.)

    Independent values vary less about their own mean than about the mean of all data: on average by `(M - 1)/M`.
    `unbiased` corrects this, as PyTorch and the paper do and Keras does not. The normalization of the batch itself is
    never corrected. The correction needs a count above 1, and treats weights as numbers of repetitions.

    A batch without values, or with a mean or variance that is not finite, changes nothing.

    Args:
        running_mean, running_var: `(C,)`.
        batch: From `moments`.
        update_rate: From 0 (keep the old) to 1 (replace it by the new).
        unbiased: Whether to multiply the variance by `count / (count - 1)`.

    Returns:
        The new running mean and variance.

    Raises:
        ValueError: If the batch has another number of channels, or `update_rate` is not from 0 to 1.

    Source: Ioffe & Szegedy 2015, algorithm 2, line 10, with the moving averages of section 3.1.
    """
    running_mean = _vector("running_mean", running_mean, batch.mean.size, "batch.mean has one per channel")
    running_var = _vector("running_var", running_var, batch.mean.size, "batch.mean has one per channel")
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
    """A linear map and the batch normalization after it, in evaluation, as one linear map.

    `(A v + b - mean) * s + bias = (s*A) v + (b - mean)*s + bias` with `s = weight / sqrt(var + eps)`.

    Args:
        matrix: `(C, ...)`: one row per channel. A convolution's kernel `(C, C_in, *kernel)` has this form too.
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
