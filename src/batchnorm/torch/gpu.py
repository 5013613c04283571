"""The stages on GPU tensors, computed by the Triton kernels, which are imported when they are first needed."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from batchnorm.torch.call import Call, is_plain
from batchnorm.torch.function import Gradients, How, keeps_output
from batchnorm.torch.layout import memory_format
from batchnorm.torch.running import Running

__all__ = ["DTYPES", "STATISTICS", "backward", "can_move", "forward", "is_available", "moments", "old_bias", "takes"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The types that the kernels support."""

STATISTICS = torch.float32
"""The type of means, variances and sums."""

VECTOR = 16
"""Bytes that a thread loads at once."""

OLDEST = 8, 0
"""The oldest compute capability that the kernels support: Ampere."""


@functools.cache
def is_available(device: torch.device) -> bool:
    """Whether the kernels run on this device: an NVIDIA GPU, with Triton installed."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < OLDEST:
        return False
    try:
        _kernels()
    except ImportError:
        return False
    return True


def can_move(running: Running, x: Tensor) -> bool:
    """Whether the forward kernel can move these running statistics.

    They must be dense and on the device of `x`. Their type must have the range of float32, so that what is finite in
    the kernel stays finite in them.
    """
    mean, var, batches, skipped = running.mean, running.var, running.batches, running.skipped
    if mean is None or var is None or mean.dtype is torch.float16 or var.dtype is torch.float16:
        return False
    return is_plain(x, mean, var, batches, skipped) and all(
        t is None or (t.is_contiguous() and (t is mean or t is var or t.dtype is torch.int64))
        for t in (mean, var, batches, skipped)
    )


def takes(x: Tensor) -> bool:
    """Whether the kernels can load `x` in whole vectors; if channels are adjacent, they must fill whole vectors."""
    if x.is_contiguous() and x.numel() != x.shape[0] * x.shape[1]:
        return True
    return x.shape[1] * x.element_size() % VECTOR == 0


@functools.cache
def _kernels() -> Any:
    from batchnorm.kernels import gpu

    return gpu


def moments(call: Call) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel; zeros if `x` is empty."""
    x = call.x.detach()
    mean, var = x.new_zeros((2, x.shape[1]), dtype=STATISTICS)
    if x.numel() > 0:
        laid = memory_format(x)
        _kernels().moments(_dense(x, laid), _counts(call), mean, var, shape=_shape(x, laid))
    return mean, var


def forward(call: Call, how: How) -> tuple[Tensor, Tensor, None]:
    """`y` and the statistics: mean, variance, `1/sqrt(var + eps)`, and a copy of the bias, which may change later."""
    kernels, laid = _kernels(), memory_format(call.x)
    x = _dense(call.x, laid)
    y = torch.empty_like(x)
    shape, groups = _shape(x, laid), 1 if how.plan.parts is None else len(how.plan.parts)
    residual = None if call.residual is None else _dense(call.residual, laid)
    if how.statistics is not None:
        mean, _, rstd = how.statistics.unbind()
        bias = torch.zeros_like(mean) if call.bias is None else call.bias.detach().to(STATISTICS).expand_as(mean)
        statistics = torch.cat([how.statistics, bias[None]])
        if x.numel() > 0:
            kernels.normalize(
                x, residual, mean, rstd, *_dense_vectors(call), call.activation, y,
                shape=shape, groups=groups, samples=len(x),
            )  # fmt: skip
        return y, statistics, None
    statistics = torch.empty((4, groups, shape[1]), dtype=STATISTICS, device=x.device)
    moved = None
    if how.running is not None:
        running_mean, running_var, momentum, batches, skipped, _ = how.running
        assert running_mean is not None
        assert running_var is not None
        rate = None if momentum is None and batches is not None else float(momentum or 0.0)
        moved = kernels.Running(running_mean, running_var, rate, how.plan.unbiased, batches, skipped)
        torch.autograd.graph.increment_version((running_mean, running_var))
    kernels.forward_packed(
        x, residual, _counts(call), *_dense_vectors(call), call.eps, call.activation, y, statistics,
        shape=shape, running=moved, groups=groups, samples=len(x),
    )  # fmt: skip
    return y, statistics, None


def backward(dy: Tensor, call: Call, how: How, statistics: Tensor, kept: None, needs: tuple[bool, bool]) -> Gradients:
    """The gradients.

    Args:
        dy: The gradient of `y`.
        call, how: As in `forward`, with `y` in place of the residual if the call `keeps_output`.
        statistics: From `forward`.
        kept: None; nothing else is kept.
        needs: Whether `dx` and `d_residual` are needed.
    """
    kernels, laid = _kernels(), memory_format(call.x)
    x, dy = _dense(call.x, laid), _dense(dy, laid)
    residual = None if call.residual is None else _dense(call.residual, laid)
    dx = torch.empty_like(x) if needs[0] else None
    d_residual = torch.empty_like(x) if needs[1] and residual is not None else None
    group = how.plan.group if needs[0] else None
    shape, groups = _shape(x, laid), statistics.shape[1]
    sums = torch.empty((2, groups, shape[1]), dtype=STATISTICS, device=x.device)
    if x.numel() == 0:
        sums.zero_()
        if group is not None:
            group.reduce(sums.clone())
    elif group is None:
        kernels.backward_packed(
            dy, x, residual, _counts(call), _dense_vectors(call)[0], statistics, _count(call, how), call.activation,
            sums, dx, d_residual, of_output=keeps_output(call), shape=shape, samples=len(x),
        )  # fmt: skip
    else:
        mean, _, rstd, bias = statistics
        given = mean, rstd, _dense_vectors(call)[0], bias[0]
        of_output = keeps_output(call)
        kernels.grad_sums(dy, x, residual, *given, call.activation, *sums, of_output=of_output, shape=shape)
        total = group.reduce(sums.clone())
        kernels.grad_input(
            dy, x, residual, _counts(call), *given, *total, how.count, call.activation, dx, d_residual,
            of_output=of_output, shape=shape,
        )  # fmt: skip
    d_bias, d_weight = (sums.sum(1) if groups > 1 else sums.view(2, -1)).unbind()
    return dx, d_weight, d_bias, d_residual


def old_bias(statistics: Tensor, kept: None) -> Tensor:
    """The bias as it was in `forward`."""
    return statistics[3, 0]


def _count(call: Call, how: How) -> Any:
    """The count behind the statistics: a number, one per group, or None for the number of values in each group."""
    if how.plan.parts is None:
        return how.count
    if call.counts is None:
        return None
    return torch.tensor([part.count for part in how.plan.parts], dtype=STATISTICS, device=call.x.device)


def _dense(x: Tensor, laid: torch.memory_format) -> Tensor:
    """The tensor in this memory format, without gaps, aligned to a vector."""
    x = x.resolve_neg() if x.is_neg() else x
    if not x.is_contiguous(memory_format=laid):
        return x.contiguous(memory_format=laid)
    return x if x.data_ptr() % VECTOR == 0 else x.clone(memory_format=laid)


def _dense_vectors(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias without gaps, because kernels get addresses only."""
    weight, bias = call.weight, call.bias
    return None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous()


def _shape(x: Tensor, laid: torch.memory_format) -> tuple[int, int, int]:
    """`(N, C, L)`, or `(N*L, C, 1)` for channels last."""
    n, c, *positions = x.shape
    length = math.prod(positions)
    return (n, c, length) if laid is torch.contiguous_format else (n * length, c, 1)


def _counts(call: Call) -> Tensor | None:
    """The counts without gaps; `(N, L)` and `(N*L, 1)` are the same memory."""
    return None if call.counts is None else call.counts.contiguous()
