"""How the output of PyTorch's batch normalization lies in memory."""

import torch
from torch import Tensor

__all__ = ["memory_format"]


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
