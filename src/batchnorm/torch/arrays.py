"""Tensors as the kernels take them: arrays that share their memory."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["array", "mask_array", "memory_format", "numbers"]


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of PyTorch's output: channels last if the strides of `x` say so, even with gaps; else contiguous."""
    if x.is_contiguous() or x.dim() not in (4, 5):
        return torch.contiguous_format
    channels_last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if x.is_contiguous(memory_format=channels_last):
        return channels_last
    span = 0
    for axis in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.stride(axis) < span or x.stride(axis) == 0:
            return torch.contiguous_format
        span = x.stride(axis) * x.shape[axis]
    return channels_last


def array(x: Tensor | None, memory_format: torch.memory_format) -> Any:
    """The tensor as the kernels take it: `(N, C, L)`, or `(N*L, C, 1)` where channels are last; copied if need be."""
    if x is None:
        return None
    x = x.contiguous(memory_format=memory_format)
    if x.dtype is torch.bfloat16:
        x = x.detach().view(torch.uint16)
    if memory_format is torch.contiguous_format:
        return x.numpy(force=True).reshape(x.shape[0], x.shape[1], x.shape[2:].numel())
    return x.movedim(1, -1).numpy(force=True).reshape(-1, x.shape[1], 1)


def mask_array(weights: Tensor | None, memory_format: torch.memory_format) -> Any:
    """A mask of shape `(N, *spatial)` as the kernels take it, beside an `array` of this format."""
    if weights is None:
        return None
    rows = weights.shape[0] if memory_format is torch.contiguous_format else weights.numel()
    return weights.contiguous().numpy(force=True).reshape(rows, weights.numel() // max(1, rows))


def numbers(values: Tensor | None) -> Any:
    """Weight or bias as the kernels take them."""
    if values is None:
        return None
    if values.dtype is torch.bfloat16:
        values = values.float()
    return values.contiguous().numpy(force=True)
