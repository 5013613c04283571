"""How tensors lie in memory, and how kernels see them: three axes, contiguous."""

import torch
from torch import Tensor

__all__ = ["lay_out", "lay_out_counts", "memory_format"]


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


def lay_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The tensor as kernels see it: `(N, C, L)`, or `(N*L, C, 1)` where channels are last. Copied if it must be."""
    x = (x.resolve_neg() if x.is_neg() else x).contiguous(memory_format=memory_format)
    if memory_format is torch.contiguous_format:
        return x.view(x.shape[0], x.shape[1], x.shape[2:].numel())
    return x.movedim(1, -1).view(-1, x.shape[1], 1)


def lay_out_counts(counts: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Counts of shape `(N, *spatial)` as kernels see them beside such a tensor: `(N, L)` or `(N*L, 1)`."""
    rows = counts.shape[0] if memory_format is torch.contiguous_format else counts.numel()
    return counts.resolve_neg().contiguous().view(rows, counts.numel() // max(1, rows))
