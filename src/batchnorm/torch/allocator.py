"""What happens to the memory of a CPU tensor that is freed."""

import ctypes
import platform

__all__ = ["reuse_memory"]

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""glibc's numbers of two parameters of `mallopt`, from its `malloc.h`."""

DEFAULTS = {TRIM_THRESHOLD: 128 * 1024, MMAP_MAX: 65536}
KEPT = {TRIM_THRESHOLD: 2**31 - 1, MMAP_MAX: 0}


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
