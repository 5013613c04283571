"""`batch_norm`: checks, choice of the path, automatic differentiation.

Three paths lead to the same answers. On the CPU the kernels run, inside one autograd function; tensors so small that
its overhead would show take PyTorch's own operation. Everything else (other devices, other types of data,
`torch.compile`, `torch.func`, forward-mode and higher derivatives) is composed of PyTorch's elementary operations, each
differentiable in any way.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.definition import ActivationSpec, Moments, parse_activation
from batchnorm.kernels import cpu as kernels
from batchnorm.kernels import threads
from batchnorm.torch.statistics import BatchStatistics, RunningStatistics, Statistics

__all__ = ["ACTIVATIONS", "batch_norm", "moments"]

threads.follow(torch.get_num_threads)
_parse = functools.lru_cache(maxsize=256)(parse_activation)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationSpec = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """Batch normalization, with what usually follows it in the same pass over memory.

    `y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)`, where `mean` and `var` are those of the batch
    in training and the running ones otherwise. In training the running ones move: `running += momentum * (batch -
    running)`, with the unbiased variance.

    Args:
        x: `(N, C, *spatial)`, of any strides.
        running_mean, running_var: `(C,)`; updated in place in training. Needed in evaluation. A batch whose statistics
            are not finite leaves them as they are.
        weight, bias: `(C,)`, gamma and beta; 1 and 0 if None.
        training: Whether to use the batch's statistics.
        momentum: The weight of the new batch in the running statistics.
        eps: Added to the variance, in the square of the units of `x`.
        activation: None, or a name, or `(name, parameter)`: relu, relu6, leaky_relu (slope), silu, hardswish, elu
            (alpha), sigmoid, tanh, gelu.
        residual: Of the shape of `x`, added before the activation.
        mask: `(N, *spatial)` or its first axes: booleans that say which positions count in the statistics, or
            non-negative weights (a weight of 2 counts a position twice). All positions are normalized. Without effect
            in evaluation.
        statistics: Where the statistics come from in training; `BatchStatistics()` if None.

    Returns:
        `y`, of the shape and type of `x`, in the memory format that `torch.nn.functional.batch_norm` gives.

    Raises:
        ValueError: If `x` has fewer than two axes; if `residual` or `mask` do not fit `x`; if there is only one value
            per channel in training; if a mask is negative or keeps fewer than two values; if the activation is
            unknown; if `eps` is negative.
        RuntimeError: If `weight`, `bias`, or a running statistic is not of shape `(C,)`, or has another floating-point
            type than `x` where `x` is float32 or float64; if the running statistics are missing in evaluation.
        NotImplementedError: If `x` is not of a floating-point type.

    Differs from `torch.nn.functional.batch_norm`:
        1. `activation`, `residual`, `mask` and `statistics`.
        2. A batch whose statistics are not finite leaves the running statistics as they are.
        3. Statistics are float64 inside, and `x - mean` is taken before anything is multiplied: the error does not
           grow with `mean / std` (except in tensors so small that PyTorch's own operation is called).

    Source: Ioffe & Szegedy 2015, algorithm 1.
    """
    return normalize(
        x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, mask, statistics
    ).y


def moments(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Count, mean and biased variance of every channel, in float64: `definition.moments` of a tensor.

    Args:
        x: `(N, C, *spatial)`.
        mask: As in `batch_norm`; it may leave nothing.

    Returns:
        The count, and arrays of `(C,)`; zeros where nothing is counted.

    Raises:
        ValueError: If `x` has fewer than two axes; if the mask does not fit it, or is negative.
        NotImplementedError: If `x` is not of a floating-point type.
    """
    _check(x, None, None, None, None, None)
    weights = None if mask is None else _expand_mask(mask, x)
    if weights is not None:
        _check_weights(weights)
    count = float(x.numel() // max(1, x.shape[1]) if weights is None else weights.sum(dtype=torch.float64))
    mean, var = np.zeros((2, x.shape[1]))
    if count > 0 and _is_plain(x):
        memory_format = _memory_format(x)
        kernels.moments(_array(x.detach(), memory_format), _mask_array(weights, memory_format), mean, var)
    elif count > 0:
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        found = _composed_moments(x.detach().to(exact), None if weights is None else weights.to(exact))
        mean, var = (values.cpu().double().numpy() for values in found)
    return Moments(count, mean, var)


class Normalized(NamedTuple):
    """`y`, and whether the batch went into the running statistics; None if it was not asked."""

    y: Tensor
    updated: bool | Tensor | None


def normalize(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: ActivationSpec,
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: Statistics | None,
) -> Normalized:
    """What `batch_norm` does; it also says what became of the running statistics. For layers."""
    activation = parse_activation(activation) if torch.compiler.is_compiling() else _parse(activation)
    if statistics is not None and not isinstance(statistics, BatchStatistics | RunningStatistics):
        raise TypeError(f"statistics must be BatchStatistics() or RunningStatistics(), got {statistics!r}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    running = not training or isinstance(statistics, RunningStatistics)
    if running and (running_mean is None or running_var is None):
        raise RuntimeError(
            "running_mean and running_var must be defined in evaluation mode, and with RunningStatistics(): "
            "pass both, or training=True"
        )
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    recomputed = not running and _is_recomputed()
    if recomputed and running_mean is not None and running_var is not None:
        running_mean, running_var = running_mean.clone(), running_var.clone()
    plain = _is_plain(x)
    # A trace and what is made of it know PyTorch's operation, and it asks nothing of sizes that are not fixed.
    if (plain and _takes_one_operation(x, residual, mask, running)) or (
        running and not torch.compiler.is_compiling() and torch._C._is_tracing()
    ):
        y = _one_operation(
            x, running_mean, running_var, weight, bias, not running, float(momentum), eps, activation, residual
        )
        return Normalized(y, None if running or recomputed else True)
    _check(x, running_mean, running_var, weight, bias, residual)
    weights = None if running or mask is None else _expand_mask(mask, x)
    count = math.inf if running else _count(x, weights)
    mean, var = (running_mean, running_var) if running else (None, None)
    if not isinstance(count, Tensor) and count == 0:
        mean = var = x.new_zeros(x.shape[1])  # the moments of nothing
    if plain and _takes_kernels(x, residual, running_mean, running_var, weight, bias):
        batch = _Batch(float(count), mean, var, eps)
        y = _with_kernels(x, weight, bias, residual, weights, batch, activation)
        mean, var = batch.mean, batch.var
    else:
        y, mean, var = _composed(x, weight, bias, residual, weights, mean, var, eps, activation)
    if running:
        return Normalized(y, None)
    if running_mean is None or running_var is None:
        return Normalized(y, True)
    updated = _update_running(running_mean, running_var, count, mean, var, momentum)
    return Normalized(y, None if recomputed else updated)


def _is_recomputed() -> bool:
    """Whether a backward pass is under way: a checkpoint then repeats a forward pass that has been counted."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


# --- Checks ----------------------------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    if x.dim() < 2:
        raise ValueError(f"expected x of shape (N, C, *spatial), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise NotImplementedError(f"batch_norm takes floating-point tensors, got {x.dtype}: convert x, e.g. x.float()")
    exact = x.dtype is torch.float32 or x.dtype is torch.float64
    for name, value in (
        ("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias)
    ):  # fmt: skip
        if value is None:
            continue
        if value.numel() != x.shape[1] or value.dim() != 1:
            raise RuntimeError(
                f"{name} should contain {x.shape[1]} elements, in one axis, not {tuple(value.shape)}: "
                f"x has shape {tuple(x.shape)}, and its second axis is the channels"
            )
        if exact and value.dtype is not x.dtype:
            raise RuntimeError(
                f"mixed dtype: x is {x.dtype} and {name} is {value.dtype}; convert one of them, e.g. with .to(x.dtype)"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")


def _expand_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as weights of shape `(N, *spatial)`, of the type of `x` (float32 for half precision)."""
    positions = (x.shape[0], *x.shape[2:])
    fits = 1 <= mask.dim() <= len(positions) and all(
        m in (1, size) for m, size in zip(mask.shape, positions, strict=False)
    )
    if not fits:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not fit x of shape {tuple(x.shape)}: "
            f"it must have the shape {positions}, without channels, or its first axes"
        )
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    weights = mask.detach().to(x.device, dtype)
    return weights.reshape(mask.shape + (1,) * (len(positions) - mask.dim())).expand(positions)


def _check_weights(weights: Tensor) -> None:
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("mask must hold booleans, or weights that are finite and not negative")


def _count(x: Tensor, weights: Tensor | None) -> float | Tensor:
    """How many values each channel has, which must be two at least."""
    values = x.numel() // max(1, x.shape[1])
    if weights is not None and torch.compiler.is_compiling():
        return weights.sum(dtype=weights.dtype)  # a graph cannot depend on what a mask holds
    if weights is not None and values > 0:
        _check_weights(weights)
        values = int((weights > 0).sum())
        if values == 0:
            raise ValueError(
                f"mask leaves nothing of x of shape {tuple(x.shape)}: skip this batch, or normalize with training=False"
            )
    if values == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}"
            f"{'' if weights is None else ' of which the mask keeps one'}. The variance of one value is 0. "
            "Drop the last, incomplete batch (drop_last=True), use larger batches, or evaluate (model.eval())"
        )
    return torch.sym_float(values) if weights is None else float(weights.sum(dtype=torch.float64))


# --- The running statistics ------------------------------------------------------------------------------------------


def _update_running(
    running_mean: Tensor, running_var: Tensor, count: float | Tensor, mean: Any, var: Any, momentum: float | Tensor
) -> bool | Tensor:
    """`definition.update_running`, in place; a batch whose statistics are not finite, or that is empty, is left out."""
    if not isinstance(count, Tensor) and count == 0:
        return False
    if isinstance(mean, np.ndarray) and running_mean.dtype is torch.bfloat16:
        mean, var = torch.from_numpy(mean), torch.from_numpy(var)
    if isinstance(mean, np.ndarray):
        updated = np.empty(1, np.bool_)
        kernels.update_running(
            mean,
            var,
            float(count),
            float(momentum),
            running_mean.detach().numpy(),
            running_var.detach().numpy(),
            updated,
        )
        torch.autograd.graph.increment_version((running_mean, running_var))
        return bool(updated[0])
    with torch.no_grad():
        correction: float | Tensor
        if isinstance(count, Tensor):
            correction = torch.where(count > 1, count / (count - 1), 1.0)
        else:
            correction = count / (count - 1) if count > 1 else 1.0
        # Converted first: a variance above 65504 is finite, but not in the float16 of `model.half()`.
        mean, var = mean.to(running_mean.dtype), (var * correction).to(running_var.dtype)
        finite: Tensor = var.isfinite().all() & mean.isfinite().all()
        for running, batch in ((running_mean, mean), (running_var, var)):
            running.copy_(torch.where(finite, running + momentum * (batch - running), running))
        return finite


# --- The path of the kernels -----------------------------------------------------------------------------------------


_KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _is_plain(x: Tensor) -> bool:
    """Whether this is an ordinary CPU tensor of a type that the kernels know, outside of transformations."""
    return (
        (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and x.is_cpu
        and x.dtype in _KERNEL_DTYPES
        and not (
            torch.compiler.is_compiling()
            or torch._C._is_tracing()
            or torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0
            or torch._C._len_torch_dispatch_stack() > 0
        )
    )


def _takes_kernels(x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> bool:
    """Whether the kernels can compute this, where `x` is plain: whether all else is, too."""
    if x.numel() == 0 or (residual is not None and residual.dtype is not x.dtype):
        return False
    for tensor in (residual, *parameters):
        if tensor is None:
            continue
        if not tensor.is_cpu or (type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter):
            return False
    return True


class _Batch:
    """The statistics of one call, arrays of `(C,)`: from the running ones, or filled in by the forward pass."""

    __slots__ = ("count", "eps", "mean", "rstd", "var")

    def __init__(self, count: float, running_mean: Tensor | None, running_var: Tensor | None, eps: float) -> None:
        self.count = count
        self.eps = eps
        self.mean: Any = None
        self.var: Any = None
        self.rstd: Any = None
        if running_mean is not None and running_var is not None:
            # Copies: a later batch changes the running statistics, and a backward pass to come must not see it.
            self.mean, self.var = (t.detach().to(torch.float64, copy=True).numpy() for t in (running_mean, running_var))
            self.rstd = 1.0 / np.sqrt(self.var + self.eps)


def _with_kernels(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    batch: _Batch,
    activation: tuple[str, float],
) -> Tensor:
    if not torch.is_grad_enabled():
        return _forward(x, _numbers(weight), _numbers(bias), residual, weights, batch, activation, _memory_format(x))
    y: Tensor = _BatchNorm.apply(x, weight, bias, residual, weights, batch, activation)
    return y


def _memory_format(x: Tensor) -> torch.memory_format:
    """The format of PyTorch's output: channels last if the strides of `x` say so, even with gaps; else contiguous."""
    if x.is_contiguous() or x.dim() not in (4, 5):
        return torch.contiguous_format
    channels_last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if x.is_contiguous(memory_format=channels_last):
        return channels_last
    span = 0
    for axis in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.stride(axis) < span or x.stride(axis) == 0:
            return torch.contiguous_format
        span = x.stride(axis) * x.shape[axis]
    return channels_last


def _array(x: Tensor | None, memory_format: torch.memory_format) -> Any:
    """The tensor as the kernels take it: `(N, C, L)`, or `(N*L, C, 1)` where channels are last; copied if need be."""
    if x is None:
        return None
    x = x.contiguous(memory_format=memory_format)
    if x.dtype is torch.bfloat16:
        x = x.detach().view(torch.uint16)
    if memory_format is torch.contiguous_format:
        return x.numpy(force=True).reshape(x.shape[0], x.shape[1], -1)
    return x.movedim(1, -1).numpy(force=True).reshape(-1, x.shape[1], 1)


def _mask_array(weights: Tensor | None, memory_format: torch.memory_format) -> Any:
    if weights is None:
        return None
    rows = weights.shape[0] if memory_format is torch.contiguous_format else weights.numel()
    return weights.contiguous().numpy(force=True).reshape(rows, -1)


def _numbers(values: Tensor | None) -> Any:
    if values is None:
        return None
    if values.dtype is torch.bfloat16:
        values = values.float()
    return values.contiguous().numpy(force=True)


def _gradient(values: Any, parameter: Tensor) -> Tensor:
    if parameter.dtype is torch.float32:  # NumPy is quicker
        return torch.from_numpy(values.astype(np.float32))
    return torch.from_numpy(values).to(parameter.dtype)


def _forward(
    x: Tensor,
    weight: Any,
    bias: Any,
    residual: Tensor | None,
    weights: Tensor | None,
    batch: _Batch,
    activation: tuple[str, float],
    memory_format: torch.memory_format,
) -> Tensor:
    """`y`; fills in the statistics of `batch` if it has none yet."""
    y = torch.empty_like(x, memory_format=memory_format)
    x_array, y_array, residual_array = _array(x, memory_format), _array(y, memory_format), None
    if residual is not None:
        residual_array = _array(residual, memory_format)
    if batch.mean is None:
        batch.mean, batch.var, batch.rstd = np.empty((3, x.shape[1]))
        kernels.forward(
            x_array, residual_array, _mask_array(weights, memory_format), weight, bias,
            batch.eps, activation, y_array, batch.mean, batch.var, batch.rstd,
        )  # fmt: skip
    else:
        kernels.normalize(x_array, residual_array, batch.mean, batch.rstd, weight, bias, activation, y_array)
    return y


class _BatchNorm(torch.autograd.Function):
    """Forward and backward by the kernels. Between the two it keeps its inputs and the statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        weights: Tensor | None,
        batch: _Batch,
        activation: tuple[str, float],
    ) -> Tensor:
        memory_format = _memory_format(x)
        numbers = _numbers(weight), _numbers(bias)
        y = _forward(x, *numbers, residual, weights, batch, activation, memory_format)
        # Without an activation dz = dy, whatever the residual is.
        ctx.has_residual = residual is not None
        ctx.save_for_backward(x, weight, bias, residual if activation[0] != "none" else None, weights)
        ctx.batch, ctx.numbers, ctx.activation, ctx.memory_format = batch, numbers, activation, memory_format
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight, bias, residual, weights = ctx.saved_tensors
        batch, activation, memory_format = ctx.batch, ctx.activation, ctx.memory_format
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or _is_batched(dy):
            return (*_differentiable_backward(ctx, dy, x, weight, bias, residual, weights), None, None, None)

        dx = torch.empty_like(x, memory_format=memory_format) if needs_x else None
        d_residual = None
        if needs_residual:
            d_residual = dy if residual is None else torch.empty_like(x, memory_format=memory_format)
        x_array, dy_array, dx_array, residual_array = (_array(t, memory_format) for t in (x, dy, dx, residual))
        d_residual_array = None if residual is None else _array(d_residual, memory_format)
        numbers: tuple[Any, Any, Any, Any] = batch.mean, batch.rstd, *ctx.numbers
        mask = _mask_array(weights, memory_format)
        sum_dz, sum_dz_xhat = np.empty((2, x.shape[1]))
        if dx_array is None and d_residual_array is None:
            kernels.grad_sums(dy_array, x_array, residual_array, *numbers, activation, sum_dz, sum_dz_xhat)
        else:
            if dx_array is None:
                dx_array = np.empty_like(x_array)
            if residual_array is not None and d_residual_array is None:
                d_residual_array = np.empty_like(x_array)
            kernels.backward(
                dy_array, x_array, residual_array, mask, *numbers, batch.count, activation,
                sum_dz, sum_dz_xhat, dx_array, d_residual_array,
            )  # fmt: skip
        d_weight = _gradient(sum_dz_xhat, weight) if needs_weight else None
        d_bias = _gradient(sum_dz, bias) if needs_bias else None
        return dx, d_weight, d_bias, d_residual, None, None, None


def _is_batched(dy: Tensor) -> bool:
    """Whether `vmap` maps the backward pass over many `dy` at once: `is_grads_batched`, `jacobian(vectorize=True)`."""
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(dy)


def _differentiable_backward(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
) -> list[Tensor | None]:
    """The gradients as a graph of their own, for derivatives of a higher order."""
    batch: _Batch = ctx.batch
    mean, var = None, None
    if np.isinf(batch.count):
        mean = torch.from_numpy(batch.mean).to(x.dtype)
        var = torch.from_numpy(batch.var).to(x.dtype)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # New names for the inputs: one tensor may have come in twice, as x and as the residual, and each wants its own
        # share.
        inputs = [None if t is None else t.view_as(t) for t in (x, weight, bias, residual)]
        x_, weight_, bias_, residual_ = inputs
        assert x_ is not None
        y, _, _ = _composed(x_, weight_, bias_, residual_, weights, mean, var, batch.eps, ctx.activation)
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph) if wanted else ())
    result = [
        next(found) if needed and t is not None else None
        for t, needed in zip(inputs, ctx.needs_input_grad, strict=False)
    ]
    if ctx.has_residual and residual is None and ctx.needs_input_grad[3]:
        result[3] = dy
    return result


# --- The path of PyTorch's own operation, for small tensors ----------------------------------------------------------

SMALL, SMALL_EVALUATION = 1 << 17, 1 << 20
"""Values from which on the kernels are called, in training (twice as many where channels are last) and in evaluation.

An autograd function in Python takes about 30 us more, forward and backward, than PyTorch's operation in C++, and from
cold caches several times that. From about these sizes on, on two cores, the kernels make up for it. In evaluation there
is less to make up with: PyTorch's operation reads once and writes once, and the activation is applied in place.
"""


def _takes_one_operation(x: Tensor, residual: Tensor | None, mask: Tensor | None, running: bool) -> bool:
    """Whether this is small, has nothing that PyTorch's operation lacks, and would not spoil the running statistics."""
    values = x.numel()
    small = SMALL_EVALUATION if running else SMALL if x.is_contiguous() else 2 * SMALL
    if values >= small or x.dtype is torch.bfloat16:
        return False
    if x.dim() < 2 or (residual is not None and (residual.shape != x.shape or residual.dtype is not x.dtype)):
        return False
    # Where the stride of an axis of length one hides that channels are last, PyTorch's gradient (2.13, CPU) is wrong.
    if not x.is_contiguous() and 1 in x.shape:
        return False
    if running:
        return True
    return mask is None and values > x.shape[1] and math.isfinite(torch.linalg.vector_norm(x.detach()).item())


def _one_operation(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: tuple[str, float],
    residual: Tensor | None,
) -> Tensor:
    """`torch.batch_norm`, then what follows it."""
    if (weight is not None and weight.dim() != 1) or (bias is not None and bias.dim() != 1):
        _check(x, running_mean, running_var, weight, bias, residual)  # PyTorch's operation takes any shape
    if running_mean is not None and running_var is not None:
        if not training and torch.is_grad_enabled() and not torch._C._is_tracing():
            # Copies: a later batch changes the running statistics, and a backward pass to come must not see it.
            running_mean, running_var = running_mean.clone(), running_var.clone()
        if training:
            # PyTorch changes them without telling autograd, and keeps them for a backward pass that does not need them.
            torch.autograd.graph.increment_version((running_mean, running_var))
            running_mean, running_var = running_mean.data, running_var.data
    try:
        z = torch.batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, False)
    except RuntimeError:
        _check(x, running_mean, running_var, weight, bias, residual)  # it knows better what is wrong
        raise
    name, parameter = activation
    if not torch.is_grad_enabled() and not torch._C._is_tracing():  # no one else has z: what follows may take its place
        if residual is not None:
            z += residual
        if name == "relu":
            return torch.relu_(z)
    elif residual is not None:
        z = z + residual
    y: Tensor = ACTIVATIONS[name](z, parameter)
    return y


# --- The path of PyTorch's own operations ----------------------------------------------------------------------------

ACTIVATIONS: dict[str, Any] = {
    "none": lambda z, _: z,
    "relu": lambda z, _: torch.relu(z),
    "relu6": lambda z, _: F.relu6(z),
    "leaky_relu": F.leaky_relu,
    "silu": lambda z, _: F.silu(z),
    "hardswish": lambda z, _: F.hardswish(z),
    "elu": F.elu,
    "sigmoid": lambda z, _: torch.sigmoid(z),
    "tanh": lambda z, _: torch.tanh(z),
    "gelu": lambda z, _: F.gelu(z),
}


def _composed_moments(z: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, of the type of `z`."""
    axes = (0, *range(2, z.dim()))
    if weights is None:
        var, mean = torch.var_mean(z, axes, correction=0)
        return mean, var
    weights = weights.unsqueeze(1)
    total, kept = weights.sum(), weights > 0
    mean = (weights * torch.where(kept, z, 0)).sum(axes) / total
    centered = z - mean.reshape((1, -1) + (1,) * (z.dim() - 2))
    return mean, (weights * torch.where(kept, centered, 0) ** 2).sum(axes) / total


def _composed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: tuple[str, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """`y`, and the statistics: `mean` and `var` if given, else the batch's. Half precision is computed in float32."""
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32

    def per_channel(values: Tensor) -> Tensor:
        return values.to(dtype).reshape((1, -1) + (1,) * (x.dim() - 2))

    z = x.to(dtype)
    if mean is None or var is None:
        mean, var = _composed_moments(z, weights)
    else:
        mean, var = mean.detach(), var.detach()
    scale = per_channel(torch.rsqrt(var.to(dtype) + eps))
    if weight is not None:
        scale = scale * per_channel(weight)
    z = (z - per_channel(mean)) * scale
    if bias is not None:
        z = z + per_channel(bias)
    if residual is not None:
        z = z + residual
    name, parameter = activation
    return ACTIVATIONS[name](z, parameter).to(x.dtype), mean, var
