"""The kernels as a function that PyTorch differentiates."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from batchnorm.kernels import launch as kernels
from batchnorm.torch import composed
from batchnorm.torch.arrays import array, mask_array, memory_format, numbers
from batchnorm.torch.sync import Group

__all__ = ["Batch", "backward", "batch_norm", "forward", "gradient", "moments"]


class Batch:
    """The statistics of one call, arrays of `(C,)`: those given, or filled in by the forward pass.

    Attributes:
        count: How many values are behind the statistics; infinity if they are constants.
        eps: Added to the variance.
        mean, var, rstd: float64; None until they are known.
        group: The processes over which the sums of the backward pass are taken; None for this one.
        parts: Samples that are normalized by statistics of their own, in place of those here; None for all together.
    """

    __slots__ = ("count", "eps", "group", "mean", "parts", "rstd", "var")

    def __init__(self, count: float, eps: float, mean: Tensor | None = None, var: Tensor | None = None) -> None:
        self.count = count
        self.eps = eps
        self.mean: Any = None
        self.var: Any = None
        self.rstd: Any = None
        self.group: Group | None = None
        self.parts: list[tuple[slice, Batch]] | None = None
        if mean is not None and var is not None:
            # Copies: a later batch changes the running statistics, and a backward pass to come must not see it.
            self.fill(*(t.detach().to(torch.float64, copy=True).numpy() for t in (mean, var)))

    def fill(self, mean: Any, var: Any) -> None:
        """Give the statistics."""
        self.mean, self.var = mean, var
        self.rstd = 1.0 / np.sqrt(var + self.eps)

    def rows(self, length: int) -> "list[tuple[slice, Batch]]":
        """The rows of an array of the kernels, `length` for a sample, and the statistics that normalize them."""
        if self.parts is None:
            return [(slice(None), self)]
        return [(slice(samples.start * length, samples.stop * length), part) for samples, part in self.parts]


def moments(x: Tensor, weights: Tensor | None) -> tuple[Any, Any]:
    """Mean and biased variance of every channel, arrays of `(C,)` of float64; zeros of nothing."""
    mean, var = (np.zeros(x.shape[1]) for _ in range(2))
    if x.numel() > 0:
        laid = memory_format(x)
        kernels.moments(array(x.detach(), laid), mask_array(weights, laid), mean, var)
    return mean, var


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
    if x.numel() == 0:
        return y
    x_array, y_array, residual_array, mask = array(x, memory_format), array(y, memory_format), None, None
    if residual is not None:
        residual_array = array(residual, memory_format)
    if weights is not None:
        mask = mask_array(weights, memory_format)
    for rows, part in batch.rows(len(x_array) // len(x)):
        added = None if residual_array is None else residual_array[rows]
        if part.mean is None:
            part.mean, part.var, part.rstd = (np.empty(x.shape[1]) for _ in range(3))
            kernels.forward(
                x_array[rows], added, None if mask is None else mask[rows], weight, bias, part.eps, activation,
                y_array[rows], part.mean, part.var, part.rstd,
            )  # fmt: skip
        else:
            kernels.normalize(x_array[rows], added, part.mean, part.rstd, weight, bias, activation, y_array[rows])
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
    needed = dx_array is not None or d_residual_array is not None
    if needed and dx_array is None:
        dx_array = np.empty_like(x_array)
    if needed and residual_array is not None and d_residual_array is None:
        d_residual_array = np.empty_like(x_array)
    mask = mask_array(weights, memory_format)
    d_weight, d_bias = None, None
    for rows, part in batch.rows(len(x_array) // max(1, len(x))):
        given = [None if each is None else each[rows] for each in (dy_array, x_array, residual_array, mask)]
        written = [None if each is None else each[rows] for each in (dx_array, d_residual_array)]
        sum_dz, sum_dz_xhat = _backward(
            given, weight, bias, part, activation, written, batch.group if needs_x else None
        )
        d_weight = sum_dz_xhat if d_weight is None else d_weight + sum_dz_xhat
        d_bias = sum_dz if d_bias is None else d_bias + sum_dz
    return dx, d_weight, d_bias, d_residual


def _backward(
    given: list[Any],
    weight: Any,
    bias: Any,
    batch: Batch,
    activation: tuple[str, float],
    written: Any,
    group: Group | None,
) -> tuple[Any, Any]:
    """`sum dz` and `sum dz*xhat` of what is given, dy, x, residual and mask; writes dx and d_residual if wanted."""
    dy, x, residual, mask = given
    dx, d_residual = written  # None if neither is needed; then there is no group
    numbers: tuple[Any, Any, Any, Any] = batch.mean, batch.rstd, weight, bias
    sum_dz, sum_dz_xhat = (np.zeros(x.shape[1]) for _ in range(2))
    if x.size > 0 and group is None and dx is not None:
        kernels.backward(dy, x, residual, mask, *numbers, batch.count, activation, sum_dz, sum_dz_xhat, dx, d_residual)
        return sum_dz, sum_dz_xhat
    if x.size > 0:
        kernels.grad_sums(dy, x, residual, *numbers, activation, sum_dz, sum_dz_xhat)
    if group is not None and dx is not None:
        total_dz, total_dz_xhat = group.reduce(torch.from_numpy(np.stack([sum_dz, sum_dz_xhat]))).numpy()
        if x.size > 0:
            kernels.grad_input(
                dy, x, residual, mask, *numbers, total_dz, total_dz_xhat, batch.count, activation, dx, d_residual
            )
    return sum_dz, sum_dz_xhat


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
    return torch._C._are_functorch_transforms_active() or _functorch.is_legacy_batchedtensor(dy)


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
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # New names for the inputs: one tensor may have come in twice, as x and as the residual, and each wants its own
        # share.
        inputs = [None if t is None else t.view_as(t) for t in (x, weight, bias, residual)]
        x_, weight_, bias_, residual_ = inputs
        assert x_ is not None
        how = batch.eps, ctx.activation
        if batch.parts is not None:
            parts = [samples for samples, _ in batch.parts]
            y, _, _ = composed.forward_by_parts(x_, weight_, bias_, residual_, weights, parts, *how)
        else:
            if np.isinf(batch.count):
                mean, var = (torch.from_numpy(values).to(x.dtype) for values in (batch.mean, batch.var))
            else:
                _, mean, var = composed.statistics(x_, weights, batch.group)
            y, _, _ = composed.forward(x_, weight_, bias_, residual_, weights, mean, var, *how)
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph) if wanted else ())
    result = [
        next(found) if needed and t is not None else None
        for t, needed in zip(inputs, ctx.needs_input_grad, strict=False)
    ]
    if ctx.has_residual and residual is None and ctx.needs_input_grad[3]:
        result[3] = dy
    return result
