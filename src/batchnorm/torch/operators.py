"""The kernels as operators of PyTorch, for graphs that `torch.compile` makes: what it cannot look into, it calls.

`batchnorm::forward` and `batchnorm::backward` normalize by the statistics of a batch, as `batch_norm` does in training
on the CPU. Inductor would compose them of loops of its own, of which the sums over a channel are slow.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from batchnorm.torch import autograd as kernels
from batchnorm.torch import composed
from batchnorm.torch.arrays import memory_format, numbers

__all__ = ["batch_norm", "differentiate_backward", "differentiate_forward", "keep_backward", "keep_forward"]

OPTIONAL = "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask"
HOW = "float eps, str activation, float parameter"
LIBRARY = Library("batchnorm", "DEF")
LIBRARY.define(f"forward(Tensor x, {OPTIONAL}, {HOW}) -> (Tensor y, Tensor mean, Tensor var)")
LIBRARY.define(
    f"backward(Tensor dy, Tensor x, {OPTIONAL}, Tensor mean, Tensor var, {HOW}, bool needs_x, bool needs_residual)"
    " -> (Tensor dx, Tensor d_weight, Tensor d_bias, Tensor d_residual)"
)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    eps: float,
    activation: tuple[str, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """`y`, and the mean and the biased variance of the batch, float64, which have no gradient."""
    y, mean, var = torch.ops.batchnorm.forward(x, weight, bias, residual, weights, eps, *activation)
    return y, mean, var


# --- What they compute -----------------------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    parameter: float,
) -> tuple[Tensor, Tensor, Tensor]:
    laid = memory_format(x)
    if x.numel() == 0:
        mean, var = (torch.zeros(x.shape[1], dtype=torch.float64) for _ in range(2))
        return torch.empty_like(x, memory_format=laid), mean, var
    batch = kernels.Batch(composed.count(x, mask), eps)
    with torch.no_grad():
        y = kernels.forward(x, numbers(weight), numbers(bias), residual, mask, batch, (activation, parameter), laid)
    return y, torch.from_numpy(batch.mean), torch.from_numpy(batch.var)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    parameter: float,
    needs_x: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    laid = memory_format(x)
    dx: Tensor | None
    d_residual: Tensor | None
    if x.numel() == 0:
        dx, d_residual = (torch.empty_like(x, memory_format=laid) for _ in range(2))
        d_weight, d_bias = np.zeros((2, x.shape[1]))
    else:
        batch = kernels.Batch(composed.count(x, mask), eps, mean, var)
        arrays = numbers(weight), numbers(bias)
        dx, d_weight, d_bias, d_residual = kernels.backward(
            dy, x, *arrays, residual, mask, batch, (activation, parameter), laid, needs_x, needs_residual
        )
    return (
        x.new_empty(0) if dx is None or not needs_x else dx,
        x.new_empty(0) if weight is None else kernels.gradient(d_weight, weight),
        x.new_empty(0) if bias is None else kernels.gradient(d_bias, bias),
        x.new_empty(0) if d_residual is None or residual is None or not needs_residual else d_residual,
    )


LIBRARY.impl("forward", _forward, "CPU")
LIBRARY.impl("backward", _backward, "CPU")


# --- What a graph knows of them before it runs -----------------------------------------------------------------------


def _like_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2))
    return torch.empty_like(x, memory_format=memory_format(x)), mean, var


def _like_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_x, needs_residual = others[-2:]

    def like(t: Tensor | None, needed: bool = True) -> Tensor:
        if t is None or not needed:
            return x.new_empty(0)
        return torch.empty_like(x, memory_format=memory_format(x)) if t.dim() > 1 else torch.empty_like(t)

    return like(x, needs_x), like(weight), like(bias), like(residual, needs_residual)


# --- Their derivatives -----------------------------------------------------------------------------------------------


def keep_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep what the gradients of `forward` need."""
    x, weight, bias, residual, mask, eps, activation, parameter = inputs
    _, mean, var = output
    ctx.has_residual = residual is not None
    residual = residual if activation != "none" else None  # dz = dy, whatever the residual is
    ctx.save_for_backward(x, weight, bias, residual, mask, mean, var)
    ctx.how = eps, activation, parameter
    ctx.mark_non_differentiable(mean, var)


def differentiate_forward(
    ctx: Any, dy: Tensor, *_: Any, backward: Any = torch.ops.batchnorm.backward
) -> tuple[Any, ...]:
    """The gradients of all inputs, by `backward`."""
    x, weight, bias, residual, mask, mean, var = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    dx, d_weight, d_bias, d_residual = backward(
        dy, x, weight, bias, residual, mask, mean, var, *ctx.how, needs_x, needs_residual and residual is not None
    )
    if ctx.has_residual and residual is None:
        d_residual = dy
    found = (dx, needs_x), (d_weight, needs_weight), (d_bias, needs_bias), (d_residual, needs_residual)
    return (*(gradient if needed else None for gradient, needed in found), None, None, None, None)


def keep_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what the gradients of `backward` need."""
    ctx.save_for_backward(*inputs[:6])
    ctx.how = inputs[8:11]
    ctx.needs = inputs[11:]


def differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """The gradients of the gradients; the statistics are taken as what they are, functions of `x`."""
    dy, x, weight, bias, residual, mask = ctx.saved_tensors
    eps, name, parameter = ctx.how
    needs_x, needs_residual = ctx.needs
    with torch.enable_grad():
        inputs = [None if t is None else t.view_as(t).requires_grad_() for t in (dy, x, weight, bias, residual)]
        dy_, x_, weight_, bias_, residual_ = inputs
        assert x_ is not None
        y, _, _ = composed.forward(x_, weight_, bias_, residual_, mask, None, None, eps, (name, parameter))
        found = (x_, needs_x), (weight_, True), (bias_, True), (residual_, needs_residual)
        outer = {t: grad for (t, needed), grad in zip(found, grads, strict=True) if needed and t is not None}
        if not outer:
            return (None,) * 13
        first = torch.autograd.grad(y, list(outer), dy_, create_graph=True)
        second = torch.autograd.grad(
            first, [t for t in inputs if t is not None], list(outer.values()), create_graph=True, allow_unused=True
        )
    result = iter(second)
    return (*(None if t is None else next(result) for t in inputs), *(None,) * 8)


register_fake("batchnorm::forward", _like_forward, lib=LIBRARY)
register_fake("batchnorm::backward", _like_backward, lib=LIBRARY)
register_autograd("batchnorm::forward", differentiate_forward, setup_context=keep_forward, lib=LIBRARY)
register_autograd("batchnorm::backward", differentiate_backward, setup_context=keep_backward, lib=LIBRARY)
