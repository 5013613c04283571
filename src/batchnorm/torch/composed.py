"""The formula of batch normalization in PyTorch's elementary operations: any device, type and order of derivative."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.torch.sync import Group

__all__ = ["ACTIVATIONS", "count", "forward", "forward_by_parts", "moments", "positions", "statistics"]

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
    total, kept = weights.sum().clamp(min=torch.finfo(weights.dtype).tiny), weights > 0
    mean = (weights * torch.where(kept, z, 0)).sum(axes) / total
    centered = z - mean.reshape((1, -1) + (1,) * (z.dim() - 2))
    return mean, (weights * torch.where(kept, centered, 0) ** 2).sum(axes) / total


def statistics(x: Tensor, weights: Tensor | None, group: Group | None) -> tuple[Any, Tensor, Tensor]:
    """Count, mean and biased variance of a batch, which may be empty; over all processes of a group."""
    z = x.to(x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32)
    total: Any = count(x, None) if weights is None else weights.sum(dtype=torch.float64)
    if x.numel() == 0:
        mean = var = z.sum((0, *range(2, z.dim())))  # zeros, with a gradient: all processes take part backward
    else:
        mean, var = moments(z, weights)
    return (total, mean, var) if group is None else group.pool(x, positions(x, weights), total, mean, var)


def count(x: Tensor, weights: Tensor | None) -> float:
    """How much the values of a channel count together."""
    return x.numel() / max(1, x.shape[1]) if weights is None else float(weights.sum(dtype=torch.float64))


def positions(x: Tensor, weights: Tensor | None) -> int:
    """How many values of a channel the mask keeps."""
    return x.numel() // max(1, x.shape[1]) if weights is None else int((weights > 0).sum())


def forward_by_parts(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    parts: list[slice],
    eps: float,
    activation: tuple[str, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """`y`, each part of the samples normalized by its own statistics; and these, a row for each part."""
    found = [
        forward(
            x[part], weight, bias, None if residual is None else residual[part],
            None if weights is None else weights[part], None, None, eps, activation,
        )
        for part in parts
    ]  # fmt: skip
    y, mean, var = zip(*found, strict=True)
    return torch.cat(y), torch.stack(mean), torch.stack(var)


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
