"""The formula of batch normalization in PyTorch's elementary operations: any device, type and order of derivative."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "forward", "moments"]

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


def moments(z: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
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


def forward(
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
        mean, var = moments(z, weights)
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
