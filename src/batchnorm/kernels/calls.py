"""How a kernel calls a stage: by its address.

There is a stage for each activation, with and without residual, and so on, and a kernel for each loop over tiles. If
LLVM compiled stages into kernels, it would do so for every pair of them, and several times where the kernel is
parallel. Kernels that call stages by their addresses are compiled once for each type of data, and the same machine code
runs in all of them: results have the same bits in a serial and in a parallel kernel.

An address says nothing of types. So the types of a stage are written here, and a kernel is compiled only if what it
passes has these types.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils, errors
from numba.extending import intrinsic

from batchnorm.kernels.compilation import Stage
from batchnorm.kernels.formats import arithmetic

__all__ = ["address", "call_grad_input", "call_grad_sums", "call_moments", "call_normalize"]


def _types(stage: str, dtype: np.dtype[Any]) -> tuple[Any, ...]:
    """The types of a stage's arguments, for data of a type."""
    number = numba.from_dtype(arithmetic(dtype))
    data, table = types.Array(numba.from_dtype(dtype), 3, "C"), types.Array(number, 1, "C")
    counts, statistic, real = types.Array(number, 2, "C"), types.Array(types.float64, 1, "C"), types.float64
    tile = (types.intp,) * 4
    constants = statistic, statistic, table, table  # mean, rstd, weight, bias
    written = statistic, statistic
    if stage == "moments":
        return (data, counts, *tile, *written)
    if stage == "normalize":
        return (data, data, *constants, number, *tile, data)
    if stage == "grad_sums":
        return (data, data, data, *constants, number, *tile, *written)
    return (data, data, data, counts, *constants, *written, real, number, *tile, data, data)


@functools.cache
def address(stage: Stage, dtype: np.dtype[Any]) -> Any:
    """The address of a stage for data of a type. If NUMBA_DISABLE_JIT is set, it is the stage itself.

    A stage must not be collected while its address is in use: its factory and this function keep it.
    """
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return stage
    compiled: Any = stage
    arguments = _types(compiled.__name__, dtype)
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
        expected = _types(stage, numba.np.numpy_support.as_dtype(given[0].dtype))
        if len(given) != len(expected) or not all(map(_fits, given, expected)):
            raise errors.TypingError(f"{stage} takes {expected}; got {given}")

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
