"""The memory of large CPU tensors: how it comes from the system, and whether it goes back."""

import ctypes
import functools
import platform
import sys
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["empty_like", "reuse_memory"]

LARGE = 1 << 23
"""Bytes from which a tensor is worth the advice: memory that often comes from the system, and several huge pages."""

HUGE_PAGE, MADV_HUGEPAGE = 1 << 21, 14
"""Bytes of a huge page (on x86-64), and Linux's number of the advice to use them, from its `mman.h`."""

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""glibc's numbers of two parameters of `mallopt`, from its `malloc.h`."""

DEFAULTS = {TRIM_THRESHOLD: 128 * 1024, MMAP_MAX: 65536}
KEPT = {TRIM_THRESHOLD: 2**31 - 1, MMAP_MAX: 0}


def empty_like(x: Tensor, laid: torch.memory_format) -> Tensor:
    """A CPU tensor like `x` to be filled at once, in huge pages if it is large.

    The system clears the pages of a large tensor at first touch. On Linux, pages of 2 MB take less time than as much
    memory in pages of 4 KB. The advice ends when the memory goes back to the system. PyTorch gives it, too, if the
    environment has `THP_MEM_ALLOC_ENABLE=1`.
    """
    y = torch.empty_like(x, memory_format=laid)
    if y.nbytes >= LARGE and (advise := _madvise()) is not None:
        start, end = y.data_ptr(), y.data_ptr() + y.nbytes
        first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        advise(first, last - first, MADV_HUGEPAGE)  # fails without effect where the system has none
    return y


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def reuse_memory(enabled: bool = True) -> None:
    """Let the whole process keep the memory of freed CPU tensors for new ones.

    By default, glibc returns the memory of a tensor of more than 32 MB to the system when it is freed, and the system
    clears the pages of the next one at first touch, a large part of the time of a layer that is limited by memory. With
    this switch the memory stays in the process: it grows to the peak and stays there, also while nothing is computed.
    Nothing else changes. It is the same as to start Python with `MALLOC_TRIM_THRESHOLD_` at `2147483647` and
    `MALLOC_MMAP_MAX_` at `0`.

    Args:
        enabled: Whether to keep it. False sets glibc's defaults and returns to the system what is free.

    Raises:
        RuntimeError: If the C library is not glibc.

    Source: mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc":
        raise RuntimeError(
            "reuse_memory sets options of glibc, the C library of most Linux systems; this is another one"
        )
    library = ctypes.CDLL(None)
    for option, value in (KEPT if enabled else DEFAULTS).items():
        if library.mallopt(option, value) != 1:
            raise RuntimeError(f"glibc does not accept mallopt({option}, {value})")
    if not enabled:
        library.malloc_trim(0)
