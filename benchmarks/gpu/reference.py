"""Batch normalization in float64, as the definition's formula says, with gradients by autograd."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import batchnorm.torch as bt
from batchnorm.definition import ActivationSpec, parse_activation

__all__ = ["KINKS", "Exact", "activate", "exact"]

KINKS = (-3.0, 0.0, 3.0, 6.0)
"""Where the derivative of an activation jumps."""

_ACTIVATIONS: dict[str, Any] = {
    "none": lambda z, _: z,
    "relu": lambda z, _: F.relu(z),
    "relu6": lambda z, _: F.relu6(z),
    "leaky_relu": lambda z, slope: F.leaky_relu(z, slope),
    "silu": lambda z, _: F.silu(z),
    "hardswish": lambda z, _: F.hardswish(z),
    "elu": lambda z, alpha: F.elu(z, alpha),
    "sigmoid": lambda z, _: torch.sigmoid(z),
    "tanh": lambda z, _: torch.tanh(z),
    "gelu": lambda z, _: F.gelu(z),
}


def activate(z: Tensor, activation: ActivationSpec) -> Tensor:
    """`act(z)`, by PyTorch."""
    name, parameter = parse_activation(activation)
    y: Tensor = _ACTIVATIONS[name](z, parameter)
    return y


class Exact(NamedTuple):
    """The right answers, and what errors may grow by.

    Attributes:
        tensors: `y`, the gradients, and the running statistics afterwards.
        z: What the activation is applied to.
        growth: `1 + max |mean| / std`: what rounding of a mean does to a normalized value.
    """

    tensors: dict[str, Tensor]
    z: Tensor
    growth: float


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape((1, -1) + (1,) * (like.dim() - 2))


def _moments(x: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """How much the values of a channel count, their mean and their biased variance."""
    axes = (0, *range(2, x.dim()))
    m = torch.ones_like(x[:, :1]) if counts is None else counts.unsqueeze(1)
    total = m.sum()
    mean = (m * x).sum(axes) / total
    return total, mean, (m * (x - _per_channel(mean, x)) ** 2).sum(axes) / total


def exact(
    given: dict[str, Tensor],
    dy: Tensor | None,
    activation: ActivationSpec,
    source: Any,
    training: bool,
    eps: float,
    rate: float,
) -> Exact:
    """Forward and backward.

    Args:
        given: `x`, `weight`, `bias`, `running_mean`, `running_var`, perhaps `residual` and `counts`, of any type.
        dy: The gradient of `y`; no gradients if None.
        activation: What follows.
        source: Of the statistics, in training.
        training: Whether the statistics are those of the batch.
        eps: Added to the variance.
        rate: The weight of the batch in the running statistics.
    """
    wide = {name: t.detach().double() for name, t in given.items()}
    inputs = {name: wide[name].requires_grad_() for name in ("x", "weight", "bias", "residual") if name in wide}
    x, counts = wide["x"], wide.get("counts")
    running = wide["running_mean"], wide["running_var"]
    constant = not training or isinstance(source, bt.RunningStatistics)
    sizes = source.sizes(len(x)) if isinstance(source, bt.GhostStatistics) and not constant else [len(x)]
    parts, growth = [], 1.0
    for part, counted in zip(
        x.split(sizes), [None] * len(sizes) if counts is None else counts.split(sizes), strict=True
    ):
        mean, var = running if constant else _moments(part, counted)[1:]
        std = (var + eps).sqrt()
        growth = max(growth, 1 + float((mean.abs() / std).detach().max()))
        xhat = (part - _per_channel(mean, x)) / _per_channel(std, x)
        if isinstance(source, bt.Renorm) and not constant:
            old = (running[1] + eps).sqrt()
            r = (std / old).clamp(1 / source.r_max, source.r_max).detach()
            d = ((mean - running[0]) / old).clamp(-source.d_max, source.d_max).detach()
            xhat = xhat * _per_channel(r, x) + _per_channel(d, x)
        parts.append(xhat)
    z = torch.cat(parts) * _per_channel(wide["weight"], x) + _per_channel(wide["bias"], x)
    if "residual" in wide:
        z = z + wide["residual"]
    y = activate(z, activation)
    tensors = {"y": y.detach()}
    if dy is not None:
        grads = torch.autograd.grad(y, list(inputs.values()), dy.double())
        tensors |= {f"d_{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    if constant:
        tensors |= {"running_mean": running[0], "running_var": running[1]}
    else:
        total, mean, var = _moments(x.detach(), counts)
        var = var * total / (total - 1)
        tensors["running_mean"] = running[0] + rate * (mean - running[0])
        tensors["running_var"] = running[1] + rate * (var - running[1])
    return Exact(tensors, z.detach(), growth)
