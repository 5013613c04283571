"""How many threads a kernel runs on, and when it must not run on several.

Numba starts its threads at the first parallel kernel. Two situations would end the process, and are avoided here. With
GNU OpenMP, a forked child must not enter a parallel kernel if its parent has entered one. With the workqueue layer,
which Numba uses if neither OpenMP nor TBB is installed, two threads must not enter a parallel kernel at once.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

import numba
from numba.np.ufunc.parallel import get_num_threads, set_num_threads, threading_layer

__all__ = ["available", "concurrent", "follow", "forbidden", "run"]

_count: Callable[[], int] = get_num_threads
_STARTED: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
_one_at_a_time = threading.Lock()
_layer = ""


class _Mine(threading.local):
    """The number of threads that this thread has set last, which Numba keeps for each thread."""

    threads = 0


_mine = _Mine()
_in_child_of_user = False


def follow(count: Callable[[], int]) -> Callable[[], int]:
    """Have kernels use as many threads as `count()` says at each launch: a framework's own setting.

    A call that XLA makes without Python keeps the number of when it was prepared (`batchnorm.xla.prepared`).

    Returns:
        What kernels followed before.
    """
    global _count
    before, _count = _count, count
    return before


def available() -> int:
    """How many threads a parallel kernel may use now."""
    return min(_count(), _STARTED)


def forbidden() -> bool:
    """Whether parallel kernels must not be entered, even with one thread.

    They must not in the forked child of a process that used them, and there are none where NUMBA_DISABLE_JIT is set.
    """
    return _in_child_of_user or bool(numba.config.DISABLE_JIT)  # type: ignore[attr-defined]


def concurrent() -> bool:
    """Whether several threads may enter parallel kernels at once. It is known when one has run."""
    return _layer in ("omp", "tbb")


def run(kernel: Callable[..., Any], parallel: bool, *arguments: Any) -> Any:
    """Call a kernel, on `available()` threads if it is a parallel one, and return what it returns.

    Numba is told that number when it changes. Until then, what the same thread has told Numba otherwise holds.
    """
    global _layer
    if not parallel:
        return kernel(*arguments)
    wanted = available()
    if _mine.threads != wanted:  # Numba takes two locks to set it
        set_num_threads(wanted)
        _mine.threads = wanted
    if concurrent():
        return kernel(*arguments)
    with _one_at_a_time:
        result = kernel(*arguments)
        _layer = threading_layer()
    return result


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
