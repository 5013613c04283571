"""The layer on the torch backend, computed by `batchnorm.torch`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.keras.functional import Call
from batchnorm.torch.functional import batch_norm
from batchnorm.torch.sources import BatchStatistics, GhostStatistics, Statistics, SyncStatistics

__all__ = ["Source", "Trained", "evaluate", "takes", "train"]


class Source(NamedTuple):
    """Where the statistics of a batch come from.

    Attributes:
        size: The smallest number of samples per group, or None.
        synchronized: Whether processes pool their statistics.
        unbiased: Whether the moving variance is the unbiased one.
    """

    size: int | None
    synchronized: bool
    unbiased: bool

    def statistics(self) -> Statistics:
        """The source as `batchnorm.torch` names it."""
        if self.synchronized:
            return SyncStatistics(unbiased=self.unbiased)
        if self.size is not None:
            return GhostStatistics(self.size, self.unbiased)
        return BatchStatistics(self.unbiased)


class Trained(NamedTuple):
    """`y`, and the moving statistics after the batch."""

    y: Tensor
    moving_mean: Tensor
    moving_var: Tensor


def takes(call: Call, source: Source) -> bool:
    """Whether `batch_norm` can compute this as Keras does: unlike Keras, it rejects fewer than two values per channel.

    If processes pool their statistics, all of them get the same answer.
    """
    x: Tensor = call.x
    counts, axis, size = call.counts, call.axis, source.size
    if x.is_meta or call.epsilon <= 0 or (torch.compiler.is_compiling() and counts is not None):
        return False
    if counts is not None and (counts.shape[axis] != 1 or size is not None):
        return False  # a mask per channel, or a count per group
    if source.synchronized:
        return True
    values = x.numel() // max(1, x.shape[axis])
    if size is not None:
        values = values // max(1, len(x)) * min(size, len(x))
    if counts is not None and values > 0:
        values = int((counts > 0).expand(_positions(x, axis)).sum())
    return values > 1


def train(call: Call, source: Source, moving_mean: Any, moving_var: Any, momentum: float) -> Trained:
    """Normalize by the statistics of the batch, of its groups of samples, or of all processes.

    Args:
        call: The call; its counts are the same for all channels.
        source: Where the statistics come from.
        moving_mean, moving_var: The moving statistics before the batch; they are not changed.
        momentum: The weight of the old value.
    """
    x, counts, axis = call.x, call.counts, call.axis
    rows = _rows(x, axis, source.size)
    mask = None
    if counts is not None:
        mask = counts.expand(_positions(x, axis)).squeeze(axis)
        mask = mask.reshape(-1) if rows.dim() < x.dim() else mask
    mean, var = (_as(x, t).detach().clone() for t in (moving_mean, moving_var))
    y = batch_norm(
        rows, mean, var, _as(x, call.gamma), _as(x, call.beta), True, 1.0 - momentum, call.epsilon,
        activation=call.activation.fused, mask=mask, statistics=source.statistics(),
    )  # fmt: skip
    return Trained(_activated(_restored(y, x, axis), call), mean, var)


def evaluate(call: Call, mean: Any, var: Any) -> Tensor:
    """Normalize by given statistics."""
    x = call.x
    mean, var, gamma, beta = (_as(x, t) for t in (mean, var, call.gamma, call.beta))
    y = batch_norm(
        _rows(x, call.axis, None), mean, var, gamma, beta, False, 0.0, call.epsilon, activation=call.activation.fused
    )
    return _activated(_restored(y, x, call.axis), call)


def _activated(y: Tensor, call: Call) -> Tensor:
    """`y` with an activation that the kernels do not compute."""
    activated: Tensor = y if call.activation.is_fused else call.activation(y)
    return activated


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
