"""How kernels are compiled: by Numba, at their first call."""

import gc
from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, cast

import numba
import numpy as np
from numba.core.event import Event, Listener, register

from batchnorm.kernels import disk

__all__ = ["INLINED", "Kernel", "Stage", "c_function", "inlined", "kernel", "pointer", "stage"]

Function = TypeVar("Function", bound=Callable[..., Any])
Kernel = Callable[..., None]
Stage = Callable[..., float]


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


class _WithoutCollector(Listener):
    """Stops Python's search for cycles while a function of ours is compiled.

    Compilers make many objects and free few. In a process with a framework in memory, the search would take a fifth of
    the time.
    """

    def __init__(self) -> None:
        self.depth = 0  # a function is compiled while another is; one thread compiles at a time, as Numba has a lock
        self.enabled = True

    def on_start(self, event: Event) -> None:
        """A function is about to be compiled."""
        if _is_ours(event):
            if self.depth == 0:
                self.enabled = gc.isenabled()
                gc.disable()
            self.depth += 1

    def on_end(self, event: Event) -> None:
        """A function is compiled, or could not be."""
        if _is_ours(event):
            self.depth -= 1
            if self.depth == 0 and self.enabled:
                gc.enable()


def _is_ours(event: Event) -> bool:
    data: Any = event.data
    module = getattr(data["dispatcher"].py_func, "__module__", None)  # functions made by `exec` have None
    return isinstance(module, str) and module.startswith("batchnorm.")


register("numba:compile", _WithoutCollector())


def inlined(function: Function) -> Function:
    """A function for the inside of a loop: compiled once, and inlined by LLVM."""
    return cast(Function, numba.njit(**INLINED)(function))


def stage(function: Stage) -> Stage:
    """A stage on one tile, which kernels call by its address (`calls`); compiled when that is asked for, kept on disk.

    A stage may close over integers: they are constants, and branches on them vanish.
    """
    return cast(Stage, _kept(function, _full_name(function)))


def c_function(function: Function) -> Function:
    """What C calls by its `pointer`, and what calls kernels; compiled when that is asked for, kept on disk.

    Its arithmetic is that of NumPy, to the bit.
    """
    return cast(Function, _kept(function, _full_name(function), fastmath=False))


def pointer(compiled: Any, arguments: tuple[Any, ...]) -> int:
    """The address of a compiled function, for C or compiled code. It is good for as long as the function is kept.

    Args:
        compiled: A stage, a kernel or a `c_function`. An error in it does not reach what calls it.
        arguments: The types of its arguments, Numba's.
    """
    compiled.compile(arguments)
    found = compiled.overloads[arguments]
    address: int = found.library.get_pointer_to_function(found.fndesc.llvm_cfunc_wrapper_name)
    return address


def kernel(parallel: bool) -> Callable[[Kernel], Kernel]:
    """A loop over tiles for one thread or for several (`prange`), compiled at its first call and kept on disk."""

    def compile_lazily(function: Kernel) -> Kernel:
        # On disk, a kernel is known by its name, not by whether it is parallel.
        name = f"{function.__name__}_{'parallel' if parallel else 'serial'}"
        return cast(Kernel, _kept(function, name, parallel=parallel, nogil=True))

    return compile_lazily


def _full_name(function: Callable[..., Any]) -> str:
    """A name that tells it from functions of the same name in other modules: they must not share a file on disk."""
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def _kept(function: Callable[..., Any], name: str, **options: Any) -> Any:
    """The function, to be compiled by Numba at its first call and kept on disk under a name.

    If NUMBA_DISABLE_JIT is set, it is plain Python. As in compiled code, 1/0 is infinity without a word.
    """
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return np.errstate(all="ignore")(function)
    function.__qualname__ = name
    all_options: dict[str, Any] = {**OPTIONS, **options}
    compiled = numba.njit(**all_options)(function)
    disk.keep(compiled)
    return compiled
