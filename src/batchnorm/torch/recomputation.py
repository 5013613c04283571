"""Activation checkpoints of PyTorch: is this code a repetition, and what must they not see?

A checkpoint runs a part of a model again in the backward pass. The repetition must compute what the first pass did,
but its batch has been counted already. A forward pass that somebody's own `backward` makes for the first time is no
repetition, although a backward pass is under way. Libraries with checkpoints of their own, and networks that invert
their layers, are not known here: they count a batch each time they repeat it, as with PyTorch's layers. So does a
model that is compiled inside a checkpoint that is not, because its graph cannot see who runs it.

A selective checkpoint (`create_selective_checkpoint_contexts`) compares the operations of the two passes, and keeps
results of the first for the second. The bookkeeping of running statistics is none of its business.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _pop_mode, _push_mode

__all__ = ["is_inside", "is_repetition", "unseen"]

CHECKPOINT = "torch.utils.checkpoint"


def is_inside() -> bool:
    """Whether the code that runs now is inside a checkpoint of PyTorch, for the first time or again."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "") == CHECKPOINT:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_repetition() -> bool:
    """Whether a checkpoint of PyTorch is repeating the code that runs now.

    The call stack tells. A checkpoint without reentrant autograd repeats inside `recompute_fn`. One with reentrant
    autograd repeats inside `CheckpointFunction.backward`, which then calls `torch.autograd.backward`: what that runs
    happens for the first time.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    frame, called = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == CHECKPOINT and (
            frame.f_code.co_name == "recompute_fn"
            or (frame.f_code.co_name == "backward" and called != "torch.autograd")
        ):
            return True
        frame, called = frame.f_back, name  # type: ignore[assignment]
    return False


@contextmanager
def unseen() -> Iterator[None]:
    """Hide operations from selective checkpoints; other modes of dispatch see them."""
    selective = _selective_modes()
    modes = [_pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())] if selective else []
    others = [mode for mode in reversed(modes) if not isinstance(mode, selective)]
    for mode in others:
        _push_mode(mode)
    try:
        yield
    finally:
        if modes:
            for _ in others:
                _pop_mode()
            for mode in reversed(modes):
                _push_mode(mode)


def _selective_modes() -> tuple[Any, ...]:
    """The classes of the modes by which a selective checkpoint sees the first pass and the second."""
    module = sys.modules.get(CHECKPOINT)
    return () if module is None else (module._CachingTorchDispatchMode, module._CachedTorchDispatchMode)
