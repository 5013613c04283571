"""Run compiled models eagerly while a tool observes their layers."""

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

__all__ = ["not_compiled"]

_lock = threading.Lock()
_running_eagerly = 0
_stance: AbstractContextManager[Any] = nullcontext()


@contextmanager
def not_compiled() -> Iterator[None]:
    """Run everything eagerly, because compiled code would not call hooks.

    All threads share one switch: the first to enter sets it, and the last to leave resets it.
    """
    global _running_eagerly, _stance
    with _lock:
        if _running_eagerly == 0:
            used = "torch._dynamo" in sys.modules  # its import takes seconds
            _stance = torch.compiler.set_stance("force_eager") if used else nullcontext()
            _stance.__enter__()
        _running_eagerly += 1
    try:
        yield
    finally:
        with _lock:
            _running_eagerly -= 1
            if _running_eagerly == 0:
                _stance.__exit__(None, None, None)
