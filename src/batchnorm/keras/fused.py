"""The layer on the torch backend, computed by `batchnorm.torch`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.definition import ActivationSpec
from batchnorm.torch.functional import batch_norm
from batchnorm.torch.sources import BatchStatistics, GhostStatistics, Statistics, SyncStatistics

__all__ = ["Trained", "evaluate", "takes", "train"]


class Trained(NamedTuple):
    """`y`, and the moving statistics after the batch."""

    y: Tensor
    moving_mean: Tensor
    moving_var: Tensor


def takes(x: Tensor, counts: Tensor | None, axis: int, size: int | None, synchronized: bool) -> bool:
    """Whether `batch_norm` can compute this call as Keras does; unlike Keras, it needs two values per channel.

    Args:
        x, counts, axis: As in `functional.moments`.
        size: The smallest number of samples per group, or None.
        synchronized: Whether processes pool their statistics; all of them must get the same answer.
    """
    if x.is_meta or (torch.compiler.is_compiling() and counts is not None):
        return False
    if counts is not None and (counts.shape[axis] != 1 or size is not None):
        return False  # a mask per channel, or a count per group
    if synchronized:
        return True
    values = x.numel() // max(1, x.shape[axis])
    if size is not None:
        values = values // max(1, len(x)) * min(size, len(x))
    if counts is not None and values > 0:
        values = int((counts > 0).expand(_positions(x, axis)).sum())
    return values > 1


def train(
    x: Tensor,
    counts: Tensor | None,
    moving_mean: Any,
    moving_var: Any,
    gamma: Any,
    beta: Any,
    axis: int,
    momentum: float,
    epsilon: float,
    activation: ActivationSpec,
    size: int | None,
    synchronized: bool,
    unbiased: bool,
) -> Trained:
    """Normalize by the statistics of the batch, of its groups of samples, or of all processes.

    Args:
        x, counts, axis: As in `functional.moments`; the counts are the same for all channels.
        moving_mean, moving_var: The moving statistics before the batch, which do not change.
        gamma, beta, epsilon, activation: As in `functional.normalize`.
        momentum: The weight of the old value.
        size: The smallest number of samples per group, or None.
        synchronized: Whether processes pool their statistics.
        unbiased: Whether the moving variance is the unbiased one.
    """
    statistics: Statistics = BatchStatistics(unbiased)
    if synchronized:
        statistics = SyncStatistics(unbiased=unbiased)
    elif size is not None:
        statistics = GhostStatistics(size, unbiased)
    rows = _rows(x, axis, size)
    mask = None
    if counts is not None:
        mask = counts.expand(_positions(x, axis)).squeeze(axis)
        mask = mask.reshape(-1) if rows.dim() < x.dim() else mask
    mean, var = (_as(x, t).detach().clone() for t in (moving_mean, moving_var))
    y = batch_norm(
        rows, mean, var, _as(x, gamma), _as(x, beta), True, 1.0 - momentum, epsilon,
        activation=activation, mask=mask, statistics=statistics,
    )  # fmt: skip
    return Trained(_restored(y, x, axis), mean, var)


def evaluate(
    x: Tensor, mean: Any, var: Any, gamma: Any, beta: Any, axis: int, epsilon: float, activation: ActivationSpec
) -> Tensor:
    """Normalize by given statistics."""
    mean, var, gamma, beta = (_as(x, t) for t in (mean, var, gamma, beta))
    y = batch_norm(_rows(x, axis, None), mean, var, gamma, beta, False, 0.0, epsilon, activation=activation)
    return _restored(y, x, axis)


def _as(x: Tensor, values: Any) -> Any:
    """A variable as a tensor in the type of the statistics of `x`."""
    if values is None:
        return None
    tensor: Tensor = values.value if hasattr(values, "value") else values
    return tensor.to(x.dtype if x.dtype is torch.float64 else torch.float32)


def _positions(x: Tensor, axis: int) -> tuple[int, ...]:
    shape = list(x.shape)
    shape[axis] = 1
    return tuple(shape)


def _rows(x: Tensor, axis: int, size: int | None) -> Tensor:
    """`x` with the channels in axis 1, without a copy: a matrix if they were last."""
    axis %= x.dim()
    if axis == 1:
        return x
    if axis == x.dim() - 1 and size is None and x.is_contiguous():
        return x.view(-1, x.shape[-1])
    return x.movedim(axis, 1)


def _restored(y: Tensor, x: Tensor, axis: int) -> Tensor:
    axis %= x.dim()  # PyTorch's ONNX exporter would write a negative axis into the file
    if y.dim() != x.dim():
        return y.reshape(x.shape)
    return y if axis == 1 else y.movedim(1, axis)
