"""How many threads a kernel runs on, and when it must not run on several.

Numba starts its threads at the first parallel kernel. Its OpenMP layer loads the same library as PyTorch, so that both
share one pool. Two of its habits end the process, and are kept from happening here: a forked child that enters a
parallel kernel after its parent did (GNU OpenMP), and two threads that enter one at once (the workqueue layer, where
neither OpenMP nor TBB is installed).
"""

import os
import threading
from collections.abc import Callable
from typing import Any

import numba
from numba.np.ufunc.parallel import get_num_threads, set_num_threads, threading_layer

__all__ = ["available", "follow", "forbidden", "run"]

_count: Callable[[], int] = get_num_threads
_STARTED: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
_one_at_a_time = threading.Lock()
_layer = ""
_in_child_of_user = False


def follow(count: Callable[[], int]) -> None:
    """Have kernels use as many threads as `count` says: a framework's own setting, asked at every launch."""
    global _count
    _count = count


def available() -> int:
    """How many threads a parallel kernel may use now."""
    return min(_count(), _STARTED)


def forbidden() -> bool:
    """Whether parallel kernels must not be entered, with one thread neither: in the child of a process that did so."""
    return _in_child_of_user


def run(kernel: Callable[..., None], *arguments: Any) -> None:
    """Call a kernel, on `available()` threads if it is a parallel one."""
    global _layer
    if not kernel.targetoptions["parallel"]:  # type: ignore[attr-defined]
        kernel(*arguments)
        return
    set_num_threads(available())
    if _layer in ("omp", "tbb"):
        kernel(*arguments)
        return
    with _one_at_a_time:
        kernel(*arguments)
        _layer = threading_layer()


def _before_fork() -> None:
    global _parent_used_threads
    try:
        threading_layer()
    except ValueError:  # not started
        _parent_used_threads = False
    else:
        _parent_used_threads = True


def _in_forked_child() -> None:
    global _in_child_of_user
    _in_child_of_user = _in_child_of_user or _parent_used_threads


_parent_used_threads = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_forked_child)
