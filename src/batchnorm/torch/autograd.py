"""The kernels as a function that PyTorch differentiates."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.kernels import cpu as kernels
from batchnorm.torch import composed
from batchnorm.torch.arrays import array, mask_array, memory_format, numbers

__all__ = ["Batch", "backward", "batch_norm", "forward", "gradient"]


class Batch:
    """The statistics of one call, arrays of `(C,)`: those given, or filled in by the forward pass.

    Attributes:
        count: How many values are behind the statistics; infinity if they are constants.
        eps: Added to the variance.
        mean, var, rstd: float64; None until they are known.
    """

    __slots__ = ("count", "eps", "mean", "rstd", "var")

    def __init__(self, count: float, eps: float, mean: Tensor | None = None, var: Tensor | None = None) -> None:
        self.count = count
        self.eps = eps
        self.mean: Any = None
        self.var: Any = None
        self.rstd: Any = None
        if mean is not None and var is not None:
            # Copies: a later batch changes the running statistics, and a backward pass to come must not see it.
            self.mean, self.var = (t.detach().to(torch.float64, copy=True).numpy() for t in (mean, var))
            self.rstd = 1.0 / np.sqrt(self.var + self.eps)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    batch: Batch,
    activation: tuple[str, float],
) -> Tensor:
    """`y`, differentiable; fills in the statistics of `batch` if it has none yet."""
    if not torch.is_grad_enabled():
        return forward(x, numbers(weight), numbers(bias), residual, weights, batch, activation, memory_format(x))
    y: Tensor = _BatchNorm.apply(x, weight, bias, residual, weights, batch, activation)
    return y


def forward(
    x: Tensor,
    weight: Any,
    bias: Any,
    residual: Tensor | None,
    weights: Tensor | None,
    batch: Batch,
    activation: tuple[str, float],
    memory_format: torch.memory_format,
) -> Tensor:
    """`y`; fills in the statistics of `batch` if it has none yet. `weight` and `bias` are arrays."""
    y = torch.empty_like(x, memory_format=memory_format)
    x_array, y_array, residual_array = array(x, memory_format), array(y, memory_format), None
    if residual is not None:
        residual_array = array(residual, memory_format)
    if batch.mean is None:
        batch.mean, batch.var, batch.rstd = (np.empty(x.shape[1]) for _ in range(3))
        kernels.forward(
            x_array, residual_array, mask_array(weights, memory_format), weight, bias,
            batch.eps, activation, y_array, batch.mean, batch.var, batch.rstd,
        )  # fmt: skip
    else:
        kernels.normalize(x_array, residual_array, batch.mean, batch.rstd, weight, bias, activation, y_array)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Any,
    bias: Any,
    residual: Tensor | None,
    weights: Tensor | None,
    batch: Batch,
    activation: tuple[str, float],
    memory_format: torch.memory_format,
    needs_x: bool,
    needs_residual: bool,
) -> tuple[Tensor | None, Any, Any, Tensor | None]:
    """`dx`, the arrays `d_weight` and `d_bias`, and `d_residual`; None for what is not needed."""
    dx, d_residual = (
        torch.empty_like(x, memory_format=memory_format) if needed else None
        for needed in (needs_x, needs_residual and residual is not None)
    )
    x_array, dy_array, dx_array, residual_array, d_residual_array = (
        array(t, memory_format) for t in (x, dy, dx, residual, d_residual)
    )
    numbers: tuple[Any, Any, Any, Any] = batch.mean, batch.rstd, weight, bias
    sum_dz, sum_dz_xhat = (np.empty(x.shape[1]) for _ in range(2))
    if dx_array is None and d_residual_array is None:
        kernels.grad_sums(dy_array, x_array, residual_array, *numbers, activation, sum_dz, sum_dz_xhat)
    else:
        if dx_array is None:
            dx_array = np.empty_like(x_array)
        if residual_array is not None and d_residual_array is None:
            d_residual_array = np.empty_like(x_array)
        kernels.backward(
            dy_array, x_array, residual_array, mask_array(weights, memory_format), *numbers, batch.count, activation,
            sum_dz, sum_dz_xhat, dx_array, d_residual_array,
        )  # fmt: skip
    return dx, sum_dz_xhat, sum_dz, d_residual


def gradient(values: Any, parameter: Tensor) -> Tensor:
    """An array of float64 as the gradient of a parameter."""
    if parameter.dtype is torch.float32:  # NumPy is quicker
        return torch.from_numpy(values.astype(np.float32))
    return torch.from_numpy(values).to(parameter.dtype)


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
        batch: Batch,
        activation: tuple[str, float],
    ) -> Tensor:
        laid = memory_format(x)
        arrays = numbers(weight), numbers(bias)
        y = forward(x, *arrays, residual, weights, batch, activation, laid)
        # Without an activation dz = dy, whatever the residual is.
        ctx.has_residual = residual is not None
        ctx.save_for_backward(x, weight, bias, residual if activation[0] != "none" else None, weights)
        ctx.batch, ctx.arrays, ctx.activation, ctx.laid = batch, arrays, activation, laid
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight, bias, residual, weights = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or _is_batched(dy):
            return (*_differentiable_backward(ctx, dy, x, weight, bias, residual, weights), None, None, None)
        numbers: tuple[Any, Any] = ctx.arrays
        dx, d_weight, d_bias, d_residual = backward(
            dy, x, *numbers, residual, weights, ctx.batch, ctx.activation, ctx.laid, needs_x, needs_residual
        )
        return (
            dx,
            gradient(d_weight, weight) if needs_weight else None,
            gradient(d_bias, bias) if needs_bias else None,
            dy if needs_residual and residual is None else d_residual,
            None,
            None,
            None,
        )


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
    batch: Batch = ctx.batch
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
        y, _, _ = composed.forward(x_, weight_, bias_, residual_, weights, mean, var, batch.eps, ctx.activation)
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph) if wanted else ())
    result = [
        next(found) if needed and t is not None else None
        for t, needed in zip(inputs, ctx.needs_input_grad, strict=False)
    ]
    if ctx.has_residual and residual is None and ctx.needs_input_grad[3]:
        result[3] = dy
    return result
