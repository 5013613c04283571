"""PyTorch's activation checkpoints: whether one is repeating the current code, and how to hide operations from them.

A checkpoint runs a part of a model again in the backward pass. The repetition must compute what the first pass did,
but the batch has already been counted. A forward pass that a custom `backward` runs for the first time is not a
repetition, although a backward pass is under way. Checkpoints of other libraries, and networks that invert their
layers, are not recognized: they count a batch each time they repeat it, as they do with PyTorch's layers. So does a
compiled model inside a checkpoint that is not compiled, because its graph cannot see what runs it.

A selective checkpoint (`create_selective_checkpoint_contexts`) compares the operations of the two passes, and keeps
results of the first for the second. The bookkeeping of running statistics must be hidden from it.
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

    The call stack shows it. A checkpoint without reentrant autograd repeats inside `recompute_fn`. One with reentrant
    autograd repeats inside `CheckpointFunction.backward`, which then calls `torch.autograd.backward`: whatever runs
    inside that call is not a repetition.
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
    modes: list[Any] = [_pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())] if selective else []
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
    """The dispatch modes of a selective checkpoint, for its first pass and its second."""
    module = sys.modules.get(CHECKPOINT)
    return () if module is None else (module._CachingTorchDispatchMode, module._CachedTorchDispatchMode)
