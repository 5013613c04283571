"""CPU tensors as the NumPy arrays that kernels take: views of their memory.

`Tensor.numpy` would mark the memory as shared with NumPy for good: it could be neither resized, as sharding does, nor
overwritten by a layer (`ownership`). So a view here knows an address, and nothing of the tensor. It is valid as long
as the caller holds the tensor.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.torch.call import PLAIN

__all__ = ["TYPES", "batch", "channels", "dense", "shape", "tables", "tensor", "view"]

TYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64), torch.bfloat16: np.dtype(np.uint16),
}  # fmt: skip
"""NumPy's types, and bfloat16 as the kernels read it."""


class _Memory:
    """What NumPy makes an array of."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


@functools.lru_cache(maxsize=1 << 12)
def _at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """The array at an address. Layers meet the same addresses in every step, and making an array takes a while."""
    return np.asarray(_Memory({"version": 3, "data": (address, False), "shape": shape, "typestr": TYPES[dtype].str}))


def view(t: Tensor) -> Any:
    """A contiguous tensor as an array of the same shape."""
    return _at(t.data_ptr(), t.shape, t.dtype)


def dense(t: Tensor, laid: torch.memory_format) -> Tensor:
    """A batch whose memory is as the kernels read it; a copy only if necessary."""
    if t.is_contiguous(memory_format=laid) and not t.is_neg() and not t._is_zerotensor() and type(t) in PLAIN:
        return t
    t = torch.zeros_like(t) if t._is_zerotensor() else t.detach()  # it has no memory
    return t.resolve_neg().contiguous(memory_format=laid)


def shape(size: torch.Size, laid: torch.memory_format) -> tuple[int, int, int]:
    """The shape of a batch for the kernels: `(N, C, L)`, or `(N*L, C, 1)` for channels last."""
    samples, channels, *positions = size
    length = math.prod(positions)
    return (samples, channels, length) if laid is torch.contiguous_format else (samples * length, channels, 1)


def batch(t: Tensor | None, laid: torch.memory_format) -> Any:
    """A dense batch as an array of that shape."""
    return None if t is None else _at(t.data_ptr(), shape(t.shape, laid), t.dtype)


def tables(weight: Tensor | None, bias: Tensor | None, channels: int, dtype: torch.dtype) -> Tensor:
    """Weight and bias as a copy of `(2, C)`, in the type of the arithmetic; 1 and 0 where there are none."""
    both = torch.empty((2, channels), dtype=dtype, device="cpu")
    with torch.no_grad():
        for row, values, otherwise in (both[0], weight, 1), (both[1], bias, 0):
            row.fill_(otherwise) if values is None else row.copy_(values)
    return both


def channels(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of `(C,)` as the kernels read them: dense, of a type; a copy only if necessary."""
    if values._is_zerotensor():
        return torch.zeros_like(values, dtype=dtype)
    if values.dtype is dtype and values.is_contiguous() and not values.is_neg() and type(values) in PLAIN:
        return values
    return values.detach().to(dtype).resolve_neg().contiguous()


def tensor(values: Any, dtype: torch.dtype) -> Tensor:
    """A tensor with these values of `(C,)`, in a type of NumPy's."""
    t = torch.empty(len(values), dtype=dtype, device="cpu")
    with np.errstate(over="ignore"):  # infinity, as in PyTorch
        view(t)[:] = values
    return t
