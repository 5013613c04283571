"""How kernels are compiled: by Numba, at their first call."""

from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, cast

import numba
import numpy as np

from batchnorm.kernels import disk

__all__ = ["INLINED", "Kernel", "inlined", "kernel", "stage"]

Function = TypeVar("Function", bound=Callable[..., Any])
Kernel = Callable[..., None]


class _Options(TypedDict):
    """The options that all code inside a kernel shares."""

    fastmath: set[str]
    error_model: Literal["numpy"]


OPTIONS: _Options = {
    # These let LLVM vectorize sums. NaN and infinity keep their meaning: `nnan` and `ninf` are not among them.
    "fastmath": {"reassoc", "contract", "nsz", "arcp", "afn"},
    "error_model": "numpy",  # 1/0 is infinity; a test for zero would keep loops from being vectorized
}
INLINED: Any = {**OPTIONS, "forceinline": True}


def inlined(function: Function) -> Function:
    """A function for the inside of a loop: compiled once, and inlined by LLVM."""
    return cast(Function, numba.njit(**INLINED)(function))


def stage(function: Function) -> Function:
    """A stage on one tile: inlined before compilation, so that branches on constant arguments vanish."""
    return cast(Function, numba.njit(inline="always", **OPTIONS)(function))


def kernel(parallel: bool) -> Callable[[Kernel], Kernel]:
    """A kernel for one thread or for several (`prange`), compiled at its first call and kept on disk.

    A kernel may close over integers and modules. Integers are constants to LLVM: branches on them vanish. A kernel that
    closed over a compiled function would be compiled again in every process.

    If NUMBA_DISABLE_JIT is set, a kernel is plain Python. As in compiled code, 1/0 is infinity without a word.
    """

    def compile_lazily(function: Kernel) -> Kernel:
        if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
            return np.errstate(all="ignore")(function)
        # On disk, a kernel is known by its name and by what it closes over, not by whether it is parallel.
        function.__qualname__ += "_parallel" if parallel else "_serial"
        compiled = numba.njit(parallel=parallel, nogil=True, **OPTIONS)(function)
        disk.keep(compiled)
        return cast(Kernel, compiled)

    return compile_lazily
