"""CPU tensors as the NumPy arrays that kernels take: views of their memory.

`Tensor.numpy` would mark the memory as shared with NumPy for good: it could be neither resized, as sharding does, nor
overwritten by a layer (`ownership`). So a view here knows an address, and nothing of the tensor. It is valid as long
as the caller holds the tensor.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.torch.call import is_plain

__all__ = ["batch", "table", "tensor", "view"]

_TYPES = {
    torch.float32: np.dtype(np.float32).str, torch.float64: np.dtype(np.float64).str,
    torch.bfloat16: np.dtype(np.uint16).str,
}  # fmt: skip
"""How NumPy writes the types."""


class _Memory:
    """What NumPy makes an array of."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


@functools.lru_cache(maxsize=1 << 12)
def _at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """The array at an address. Layers meet the same addresses in every step, and making an array takes a while."""
    return np.asarray(_Memory({"version": 3, "data": (address, False), "shape": shape, "typestr": _TYPES[dtype]}))


def view(t: Tensor) -> Any:
    """A contiguous tensor as an array of the same shape."""
    return _at(t.data_ptr(), t.shape, t.dtype)


def batch(t: Tensor | None, laid: torch.memory_format) -> Any:
    """A batch as the kernels take it: `(N, C, L)`, or `(N*L, C, 1)` for channels last; copied only if necessary."""
    if t is None:
        return None
    is_last = laid is not torch.contiguous_format
    if not t.is_contiguous(memory_format=laid) or t.is_neg() or t._is_zerotensor() or not is_plain(t):
        t = (t.detach().clone() if t._is_zerotensor() else t.detach().resolve_neg()).contiguous(memory_format=laid)
        t = t.view(torch.uint16) if t.dtype is torch.bfloat16 else t
        array = (t.movedim(1, -1) if is_last else t).numpy()  # keeps the copy
        return array.reshape(-1, t.shape[1], 1) if is_last else array.reshape(*t.shape[:2], -1)
    samples, channels = t.shape[:2]
    size = t.numel()
    shape = (size // channels, channels, 1) if is_last else (samples, channels, size // (samples * channels))
    return _at(t.data_ptr(), shape, t.dtype)


def table(values: Tensor | None, dtype: torch.dtype) -> Any:
    """A copy of `(C,)` values in a type of NumPy's."""
    if values is None:
        return None
    if values.dtype is dtype and values.is_contiguous() and not values.is_neg():
        return view(values).copy()
    return values.detach().to(dtype, copy=True).numpy()


def tensor(values: Any, dtype: torch.dtype) -> Tensor:
    """A tensor with these values of `(C,)`, in a type of NumPy's."""
    t = torch.empty(len(values), dtype=dtype, device="cpu")
    with np.errstate(over="ignore"):  # infinity, as in PyTorch
        view(t)[:] = values
    return t
