"""Training with statistics that are not just those of the batch: by groups, over processes, renormalized."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchnorm.torch import autograd, composed
from batchnorm.torch.statistics import GhostStatistics, Renorm, SyncStatistics
from batchnorm.torch.sync import Group

__all__ = ["Trained", "group_of", "normalize"]

Variant = GhostStatistics | SyncStatistics | Renorm


class Trained(NamedTuple):
    """`y`, and the statistics that the running ones shall move towards: arrays where the kernels found them."""

    y: Tensor
    count: Any
    mean: Any
    var: Any


def group_of(statistics: Any) -> Group | None:
    """The processes behind the statistics; None if this one is alone, or for others than synchronized ones."""
    if isinstance(statistics, Renorm):
        statistics = statistics.statistics
    return statistics.group if isinstance(statistics, SyncStatistics) else None


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    activation: tuple[str, float],
    statistics: Variant,
    group: Group | None,
    steps: Any,
    by_kernels: bool,
) -> Trained:
    """Normalize by what `statistics` say, and tell the statistics of the whole batch.

    Args:
        x, weight, bias, residual, running_mean, running_var, eps: As in `batch_norm`.
        weights: The mask as weights, `(N, *spatial)`.
        activation: As `parse_activation` gives it.
        statistics: Which.
        group: The processes that take part; None if this one is alone.
        steps: How many batches have been counted before; None if nobody counts.
        by_kernels: Whether the kernels can compute this.

    Raises:
        ValueError: If there are fewer than two values per channel, in a group or in all processes together.
        RuntimeError: If renormalization has no running statistics; from `Group`.
    """
    if isinstance(statistics, GhostStatistics):
        return _ghost(x, weight, bias, residual, weights, eps, activation, statistics.sizes(len(x)), by_kernels)
    count: Any
    mean: Any
    var: Any
    batch = autograd.Batch(0.0, eps)
    if by_kernels:
        mean, var = autograd.moments(x, weights)
        count = composed.count(x, weights)
        if group is not None:
            means = torch.from_numpy(mean), torch.from_numpy(var)
            pooled = group.pool(x, composed.positions(x, weights), count, *means)
            count, mean, var = float(pooled[0]), pooled[1].numpy(), pooled[2].numpy()
        batch.count, batch.group = count, group
        batch.fill(mean, var)
    else:
        count, mean, var = composed.statistics(x, weights, group)
    if isinstance(statistics, Renorm):
        weight, bias = _renormalize(statistics, weight, bias, mean, var, running_mean, running_var, eps, steps, x)
    if by_kernels:
        return Trained(autograd.batch_norm(x, weight, bias, residual, weights, batch, activation), count, mean, var)
    y, mean, var = composed.forward(x, weight, bias, residual, weights, mean, var, eps, activation)
    return Trained(y, count, mean.detach(), var.detach())


# --- Groups ----------------------------------------------------------------------------------------------------------


def _ghost(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    eps: float,
    activation: tuple[str, float],
    sizes: list[int],
    by_kernels: bool,
) -> Trained:
    parts = _parts(x, weights, sizes)
    means: Any
    variances: Any
    if by_kernels:
        batch = autograd.Batch(0.0, eps)
        batch.parts = [(samples, autograd.Batch(float(count), eps)) for samples, count in parts]
        y = autograd.batch_norm(x, weight, bias, residual, weights, batch, activation)
        means, variances = (np.stack([getattr(part, name) for _, part in batch.parts]) for name in ("mean", "var"))
    else:
        y, means, variances = composed.forward_by_parts(
            x, weight, bias, residual, weights, [samples for samples, _ in parts], eps, activation
        )
        means, variances = means.detach(), variances.detach()
    # The law of total variance gives the statistics of the whole batch.
    total = sum(count for _, count in parts)
    shares = [count / total for _, count in parts]
    mean = sum(share * part for share, part in zip(shares, means, strict=True))
    var = sum(share * (v + (m - mean) ** 2) for share, m, v in zip(shares, means, variances, strict=True))
    return Trained(y, total, mean, var)


def _parts(x: Tensor, weights: Tensor | None, sizes: list[int]) -> list[tuple[slice, Any]]:
    """The samples of each group, and how many values a channel has there."""
    found: list[tuple[slice, Any]] = []
    positions, start = x.shape[2:].numel(), 0
    for size in sizes:
        samples = slice(start, start + size)
        count: Any = float(size * positions)
        if weights is not None:
            count = weights[samples].sum(dtype=torch.float64)
            if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
                count = float(count)
                if int((weights[samples] > 0).sum()) < 2:
                    raise ValueError(
                        f"mask leaves fewer than two values of samples {start} to {start + size - 1}, a group of "
                        f"GhostStatistics; x has shape {tuple(x.shape)}. Use a larger batch_size"
                    )
        elif size * positions == 1:
            raise ValueError(
                f"Expected more than 1 value per channel in each group when training, got input size {x.size()} in "
                f"groups of {size}. Use GhostStatistics(batch_size=2) or more"
            )
        found.append((samples, count))
        start += size
    return found


# --- Renormalization -------------------------------------------------------------------------------------------------


def _renormalize(
    renorm: Renorm,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Any,
    var: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    steps: Any,
    x: Tensor,
) -> tuple[Tensor, Tensor]:
    """`weight * r` and `weight * d + bias`, with which plain normalization gives the renormalized output."""
    if running_mean is None or running_var is None:
        raise RuntimeError("Renorm() corrects towards running statistics: give running_mean and running_var")
    with torch.no_grad():
        mean, var = (
            torch.from_numpy(t)
            if isinstance(t, np.ndarray)
            else t.detach().to(torch.promote_types(t.dtype, torch.float32))
            for t in (mean, var)
        )
        old_mean, old_var = (t.detach().to(mean.dtype) for t in (running_mean, running_var))
        r_max, d_max = renorm.limits(steps)
        old_rstd = torch.rsqrt(old_var + eps)
        r = torch.sqrt(var + eps) * old_rstd
        d = (mean - old_mean) * old_rstd
        r = torch.clamp(r, 1 / r_max, r_max)
        d = torch.clamp(d, -d_max, d_max)
        dtype = x.dtype if x.dtype is torch.float64 else torch.float32
        r, d = r.to(dtype), d.to(dtype)
    if weight is not None:
        r, d = r * weight, d * weight
    return r, d if bias is None else d + bias
