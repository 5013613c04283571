"""How kernels are compiled: when they are first called, by Numba, and kept on disk."""

from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, cast

from numba import njit

__all__ = ["INLINED", "inlined", "kernel", "stage"]

Function = TypeVar("Function", bound=Callable[..., Any])
Kernel = Callable[..., None]


class _Options(TypedDict):
    """The options that all code inside a kernel shares."""

    fastmath: set[str]
    error_model: Literal["numpy"]


OPTIONS: _Options = {
    # These let LLVM vectorize sums. NaN and infinity keep their meaning: neither `nnan` nor `ninf` is among them.
    "fastmath": {"reassoc", "contract", "nsz", "arcp", "afn"},
    "error_model": "numpy",  # 1/0 is infinity; a test for it would keep loops from being vectorized
}
INLINED: Any = {**OPTIONS, "forceinline": True}


def inlined(function: Function) -> Function:
    """A piece of the inside of a loop: compiled once, and inlined by LLVM."""
    return cast(Function, njit(**INLINED)(function))


def stage(function: Function) -> Function:
    """A stage on one tile: inlined before compilation, so that the constants it is given decide what is compiled."""
    return cast(Function, njit(inline="always", **OPTIONS)(function))


def kernel(parallel: bool) -> Callable[[Kernel], Kernel]:
    """A kernel for one thread or for several (`prange`), compiled at its first call and kept on disk.

    It may close over integers, which are constants to LLVM: branches on them vanish. If it closed over another compiled
    function, it would be compiled again in every process.
    """

    def compile_lazily(function: Kernel) -> Kernel:
        # The disk cache knows a kernel by its name and by what it closes over, not by its options.
        function.__qualname__ += "_parallel" if parallel else "_serial"
        return cast(Kernel, njit(parallel=parallel, nogil=True, cache=True, **OPTIONS)(function))

    return compile_lazily
