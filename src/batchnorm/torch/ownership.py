"""Whether a gradient may be overwritten: `dx` takes the memory of `dy` where nobody else has a part in it.

So the backward pass writes to memory that it has just read, instead of to a third tensor, and a large layer needs no
fresh pages from the system. Whoever else refers to `dy` is counted: Python objects, PyTorch's own references to the
tensor (a gradient that two branches share, one that was captured or accumulated), and tensors that share its memory.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_ours"]


def is_ours(dy: Tensor) -> bool:
    """Whether a gradient, an argument of `Function.backward`, has no other owner than the call of `backward`.

    To be called by `backward` itself, whose references to its argument are known.
    """
    return type(dy) is Tensor and _references(dy) == _alone() and dy.untyped_storage().resizable()


def _references(t: Tensor) -> tuple[int, int, int]:
    """References to the Python object, to PyTorch's tensor, and to its memory."""
    tensor, memory = t._use_count(), torch._C._storage_Use_Count(t.untyped_storage()._cdata)  # type: ignore[attr-defined]
    return sys.getrefcount(t), tensor, memory


@functools.cache
def _alone() -> tuple[int, int, int]:
    """The references to a gradient that nobody else has: of a first backward pass, made for this purpose."""
    found: list[tuple[int, int, int]] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            return arguments[0].clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (dy,) = grads
            found.append(_seen_by(dy))
            return dy

    with torch.enable_grad():
        x = torch.ones(2, requires_grad=True)
        Probe.apply(x).mul(2).sum().backward()
    return found[0]


def _seen_by(dy: Tensor) -> tuple[int, int, int]:
    """As many calls below `backward` as in `is_ours`."""
    return _references(dy)
