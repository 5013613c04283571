"""Whether a gradient may be overwritten: `dx` takes the memory of `dy` where nothing else refers to it.

So the backward pass writes to memory that it has just read, instead of to a third tensor, and a large layer needs no
fresh pages from the system. Whatever else refers to `dy` is counted: Python objects, PyTorch's own references to the
tensor (a gradient that two branches share, one that was captured or accumulated), and tensors that share its memory.
"""

import functools
import sys
import threading
from typing import Any

import torch
from torch import Tensor

__all__ = ["may_overwrite"]

References = tuple[int, ...]


def may_overwrite(dy: Tensor) -> bool:
    """Whether nothing but the call of `Function.backward` refers to its argument.

    To be called by `backward` itself, whose references to its argument are known. Memory that belongs to NumPy, a file
    or another process is not resizable: nobody counts who else uses it.
    """
    return type(dy) is Tensor and _references(dy) == _alone() and dy.untyped_storage().resizable()


def _references(t: Tensor) -> References:
    """References to the Python object, to PyTorch's tensor, to the Python object of its memory, and to the memory."""
    storage, internal = t.untyped_storage(), torch._C
    shared = internal._storage_Use_Count(storage._cdata)
    return sys.getrefcount(t), t._use_count(), sys.getrefcount(storage), shared  # type: ignore[attr-defined]


@functools.cache
def _alone() -> References:
    """The references to a gradient that only `backward` holds, measured once in a backward pass made for it.

    It runs in a thread of its own: PyTorch's modes, its hooks for saved tensors and its default device belong to the
    thread of the caller. If two threads measure at once, they find the same. Empty, which nothing equals, if this
    version of PyTorch does not tell.
    """
    found: list[References] = []
    thread = threading.Thread(target=_measure, args=(found,))
    thread.start()
    thread.join()
    return found[0] if found else ()


class _Probe(torch.autograd.Function):
    """The identity, whose backward pass counts the references to its argument."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        x, ctx.found = arguments
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        ctx.found.append(_counted_below(dy))
        return dy, None


def _counted_below(dy: Tensor) -> References:
    """Counted at the same depth of calls as in `may_overwrite`: every call adds a reference."""
    return _references(dy)


def _measure(found: list[References]) -> None:
    if hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count"):
        x = torch.ones(2, device="cpu", requires_grad=True)
        _Probe.apply(x, found).mul(2).sum().backward()
