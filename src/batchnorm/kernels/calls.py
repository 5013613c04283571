"""How a kernel calls a stage: by its address.

There is a stage for each activation, with and without residual, and so on, and a kernel for each loop over tiles. If
LLVM compiled stages into kernels, it would do so for every stage and kernel, and several times where the kernel is
parallel. Kernels that call stages by their addresses are compiled once for each type of data, and the same machine code
runs in all of them: results have the same bits in a serial and in a parallel kernel.

An address says nothing of types. So the types of a stage are written here, and a kernel is compiled only if what it
passes has these types. All stages return a float, so that one type of pointer serves them; only that of `moments` means
something. A stage must not raise an error: nothing would reach the kernel.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils, errors
from numba.extending import intrinsic
from numba.np.numpy_support import as_dtype

from batchnorm.kernels.compilation import Stage
from batchnorm.kernels.formats import arithmetic

__all__ = ["address", "call_grad_input", "call_grad_sums", "call_moments", "call_normalize"]


class _Signature(NamedTuple):
    """The types of a stage's arguments, and how many of them, the last ones, it writes."""

    types: tuple[Any, ...]
    written: int


def _signature(stage: str, dtype: np.dtype[Any]) -> _Signature:
    """The signature of a stage for data of a type."""
    number = numba.from_dtype(arithmetic(dtype))
    data, table = types.Array(numba.from_dtype(dtype), 3, "C"), types.Array(number, 1, "C")
    counts, statistic, real = types.Array(number, 2, "C"), types.Array(types.float64, 1, "C"), types.float64
    tile = (types.intp,) * 4
    constants = statistic, statistic, table, table  # mean, rstd, weight, bias
    sums = statistic, statistic
    return {
        "moments": _Signature((data, counts, *tile, *sums), 2),
        "normalize": _Signature((data, data, *constants, number, *tile, data), 1),
        "grad_sums": _Signature((data, data, data, *constants, number, *tile, *sums), 2),
        "grad_input": _Signature((data, data, data, counts, *constants, *sums, real, number, *tile, data, data), 2),
    }[stage]


@functools.cache
def address(stage: Stage, dtype: np.dtype[Any]) -> Any:
    """The address of a stage for data of a type. If NUMBA_DISABLE_JIT is set, it is the stage itself.

    The caches of its factory and of this function keep a stage alive; the address of a collected stage would dangle.
    """
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return stage
    compiled: Any = stage
    arguments = _signature(compiled.__name__, dtype).types
    compiled.compile(arguments)
    found = compiled.overloads[arguments]
    return found.library.get_pointer_to_function(found.fndesc.llvm_cfunc_wrapper_name)


def _caller(stage: str) -> Callable[[Any, Any], float]:
    """What calls a stage with a tuple of arguments, inside a kernel."""
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return lambda address, arguments: float(address(*arguments))

    @intrinsic
    def call(typing_context: Any, address: Any, arguments: Any) -> Any:
        given = tuple(arguments)
        expected, written = _signature(stage, as_dtype(given[0].dtype))
        fits = len(given) == len(expected) and all(map(_fits, given, expected))
        if not fits or not all(array.mutable for array in given[-written:]):
            raise errors.TypingError(f"{stage} takes {expected}, and writes the last {written}; got {given}")

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            pointer, packed = values
            unpacked = cgutils.unpack_tuple(builder, packed)
            passed = [
                value if isinstance(to, types.Array) else context.cast(builder, value, of, to)
                for value, of, to in zip(unpacked, given, expected, strict=True)
            ]
            function = ir.FunctionType(ir.DoubleType(), [context.get_value_type(t) for t in expected])
            return builder.call(builder.inttoptr(pointer, function.as_pointer()), passed)

        return types.float64(address, arguments), generate

    return cast(Callable[[Any, Any], float], call)


def _fits(given: Any, expected: Any) -> bool:
    """Whether a value of a type can be passed as one of another: an array as it is, a number converted."""
    if isinstance(expected, types.Array):
        return isinstance(given, types.Array) and (given.dtype, given.ndim, given.layout) == (
            expected.dtype,
            expected.ndim,
            expected.layout,
        )
    return isinstance(given, types.Integer if isinstance(expected, types.Integer) else types.Number)


call_moments = _caller("moments")
call_normalize = _caller("normalize")
call_grad_sums = _caller("grad_sums")
call_grad_input = _caller("grad_input")
