"""Batch normalization from PyTorch's elementary operations: for any device, type and order of derivative."""

from typing import Any

import torch
from torch import Tensor

from batchnorm.torch.activations import ACTIVATIONS
from batchnorm.torch.call import Batch, Call, Outcome, Plan
from batchnorm.torch.layout import memory_format

__all__ = ["adjusted", "compute", "forward", "statistics", "together"]


def compute(call: Call, plan: Plan) -> Outcome:
    """Compute any call by any plan."""
    y, count, mean, var = forward(call, plan)
    if not torch._C._are_functorch_transforms_active():
        y = y.contiguous(memory_format=memory_format(call.x))
    if plan.constants is not None and plan.count != 0:
        return Outcome(y)
    return Outcome(y, Batch.of(torch.stack([mean.detach(), var.detach()]), count))


def forward(call: Call, plan: Plan) -> tuple[Tensor, Any, Tensor, Tensor]:
    """`y`, and the count, mean and biased variance of the whole call, differentiable."""
    y, count, mean, var = _forward(call._replace(x=call.x.to(call.arithmetic)), plan, call.x)
    return y.to(call.x.dtype), count, mean, var


def _forward(call: Call, plan: Plan, x: Tensor) -> tuple[Tensor, Any, Tensor, Tensor]:
    if plan.parts is not None:
        calls = [call.part(part.samples) for part in plan.parts]
        moments = [_moments(each) for each in calls]
        y = torch.cat([_normalize(each, mean, var) for each, (mean, var) in zip(calls, moments, strict=True)])
        return y, *together([(part.count, *each) for part, each in zip(plan.parts, moments, strict=True)])
    count, mean, var = statistics(call, plan, x)
    if plan.adjust is None:
        return _normalize(call, mean, var), count, mean, var
    weight, bias = adjusted(call, *plan.adjust(mean, var))
    return _normalize(call._replace(weight=weight, bias=bias), mean, var), count, mean, var


def statistics(call: Call, plan: Plan, x: Tensor) -> tuple[Any, Tensor, Tensor]:
    """Count, mean and biased variance of a call, which may be empty; pooled over the processes of the plan's group.

    The call's `x` must be float32 or float64.
    """
    if plan.constants is not None:
        return plan.count, *plan.constants
    mean, var = _moments(call)
    if plan.group is None:
        return plan.count, mean, var
    return plan.group.pool(x, call.positions(), plan.count, mean, var)


def adjusted(call: Call, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and bias that include the correction `xhat * r + d`."""
    if call.weight is not None:
        r, d = r * call.weight, d * call.weight
    return r, d if call.bias is None else d + call.bias


def together(found: list[tuple[Any, Tensor, Tensor]]) -> tuple[Any, Tensor, Tensor]:
    """The moments of all parts together, by the law of total variance.

    Args:
        found: Count, mean and variance of each part.
    """
    total: Any = sum(count for count, _, _ in found)
    mean: Any = sum(count / total * mean for count, mean, _ in found)
    var: Any = sum(count / total * (var + (mean_part - mean) ** 2) for count, mean_part, var in found)
    return total, mean, var


def _moments(call: Call) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel; zeros, with a gradient, if the call is empty."""
    z, axes = call.x, (0, *range(2, call.x.dim()))
    if call.x.numel() == 0:
        nothing = z.sum(axes)  # differentiable, because all processes must take part in the backward pass
        return nothing, nothing
    if call.counts is None:
        var, mean = torch.var_mean(z, axes, correction=0)
        return mean, var
    counts = call.counts.unsqueeze(1)
    total, kept = counts.sum().clamp(min=torch.finfo(counts.dtype).tiny), counts > 0
    mean = (counts * torch.where(kept, z, 0)).sum(axes) / total
    centered = z - mean.reshape((1, -1) + (1,) * (z.dim() - 2))
    return mean, (counts * torch.where(kept, centered, 0) ** 2).sum(axes) / total


def _normalize(call: Call, mean: Tensor, var: Tensor) -> Tensor:
    """`y` for given statistics."""

    def per_channel(values: Tensor) -> Tensor:
        return values.to(call.arithmetic).reshape((1, -1) + (1,) * (call.x.dim() - 2))

    scale = per_channel(torch.rsqrt(var.to(call.arithmetic) + call.eps))
    if call.weight is not None:
        scale = scale * per_channel(call.weight)
    z = (call.x - per_channel(mean)) * scale
    if call.bias is not None:
        z = z + per_channel(call.bias)
    if call.residual is not None:
        z = z + call.residual
    name, parameter = call.activation
    y: Tensor = ACTIVATIONS[name](z, parameter)
    return y
