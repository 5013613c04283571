"""How a kernel calls a stage, and a whole pass a kernel: by its address.

There is a stage for each activation, with and without residual, and so on, and a kernel for each loop over tiles. If
LLVM compiled stages into kernels, it would do so for every stage and kernel, and several times where the kernel is
parallel. Kernels that call stages by their addresses are compiled once for each type of data, and the same machine code
runs in all of them: results have the same bits in a serial and in a parallel kernel.

An address says nothing of types. So the types of a stage are written here, and a kernel is compiled only if what it
passes has these types. All stages return a float, so that one type of pointer serves them; only that of `moments` means
something. Kernels return nothing. Neither may raise an error: nothing would reach the caller.
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

from batchnorm.kernels.compilation import Kernel, Stage, pointer
from batchnorm.kernels.formats import arithmetic

__all__ = [
    "address", "call_backward_kernel", "call_forward_kernel", "call_grad_input", "call_grad_input_kernel",
    "call_grad_sums", "call_grad_sums_kernel", "call_moments", "call_moments_kernel", "call_normalize",
    "call_normalize_kernel", "kernel_address",
]  # fmt: skip


class _Signature(NamedTuple):
    """The types of a stage's or a kernel's arguments, and how many of them, the last ones, it writes."""

    types: tuple[Any, ...]
    written: int


class _Types(NamedTuple):
    """The types that signatures consist of, for data of a type."""

    number: Any
    data: Any
    table: Any
    counts: Any
    statistic: Any


@functools.cache
def _types(dtype: np.dtype[Any]) -> _Types:
    number = numba.from_dtype(arithmetic(dtype))
    return _Types(
        number,
        types.Array(numba.from_dtype(dtype), 3, "C"),
        types.Array(number, 1, "C"),
        types.Array(number, 2, "C"),
        types.Array(types.float64, 1, "C"),
    )


def _signature(stage: str, dtype: np.dtype[Any]) -> _Signature:
    """The signature of a stage for data of a type."""
    number, data, table, counts, statistic = _types(dtype)
    real = types.float64
    tile = (types.intp,) * 4
    constants = statistic, statistic, table, table  # mean, rstd, weight, bias
    sums = statistic, statistic
    return {
        "moments": _Signature((data, counts, *tile, *sums), 2),
        "normalize": _Signature((data, data, *constants, number, *tile, data), 1),
        "grad_sums": _Signature((data, data, data, *constants, number, *tile, *sums), 2),
        "grad_input": _Signature((data, data, data, counts, *constants, *sums, real, number, *tile, data, data), 2),
    }[stage]


def _kernel_signature(kernel: str, dtype: np.dtype[Any]) -> _Signature:
    """The signature of a kernel for data of a type."""
    number, data, table, counts, statistic = _types(dtype)
    real, place = types.float64, types.intp
    given = data, data, counts, table, table, number, types.intp, types.intp
    moments, sums = (statistic, statistic), (statistic, statistic)
    return {
        "moments": _Signature((place, *given, *moments), 2),
        "normalize": _Signature((place, *given, *moments, data), 1),
        "forward": _Signature((place, place, *given, real, data, *moments, statistic), 4),
        "grad_sums": _Signature((place, *given, data, *moments, *sums), 2),
        "grad_input": _Signature((place, *given, data, *moments, *sums, real, data, data), 2),
        "backward": _Signature(
            (place, place, *given, data, *moments, types.boolean, types.boolean, real, *sums, data, data), 4
        ),
    }[kernel]


# --- Addresses --------------------------------------------------------------------------------------------------------


@functools.cache
def address(stage: Stage, dtype: np.dtype[Any]) -> Any:
    """The address of a stage for data of a type. If NUMBA_DISABLE_JIT is set, it is the stage itself.

    The caches of its factory and of this function keep a stage alive; the address of a collected stage would dangle.
    """
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return stage
    compiled: Any = stage
    return pointer(compiled, _signature(compiled.__name__, dtype).types)


@functools.cache
def kernel_address(kernel: Kernel, dtype: np.dtype[Any]) -> Any:
    """The same for a kernel."""
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return kernel
    compiled: Any = kernel
    return pointer(compiled, _kernel_signature(compiled.__name__, dtype).types)


# --- Calls ------------------------------------------------------------------------------------------------------------


def _caller(stage: str) -> Callable[[Any, Any], float]:
    """What calls a stage with a tuple of arguments, inside a kernel."""
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return lambda address, arguments: float(address(*arguments))

    @intrinsic
    def call(typing_context: Any, address: Any, arguments: Any) -> Any:
        signature = _signature(stage, as_dtype(arguments[0].dtype))
        return types.float64(address, arguments), _call(stage, signature, tuple(arguments), types.float64)

    return cast(Callable[[Any, Any], float], call)


def _kernel_caller(kernel: str) -> Callable[[Any, Any], None]:
    """What calls a kernel with a tuple of arguments, inside a whole pass."""
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return lambda address, arguments: address(*arguments)

    @intrinsic
    def call(typing_context: Any, address: Any, arguments: Any) -> Any:
        data = next(each for each in arguments if isinstance(each, types.Array))
        signature = _kernel_signature(kernel, as_dtype(data.dtype))
        return types.none(address, arguments), _call(kernel, signature, tuple(arguments), types.none)

    return cast(Callable[[Any, Any], None], call)


def _call(name: str, signature: _Signature, given: tuple[Any, ...], result: Any) -> Any:
    """What generates the code of a call with a tuple of arguments of these types."""
    expected, written = signature
    fits = len(given) == len(expected) and all(map(_fits, given, expected))
    if not fits or not all(array.mutable for array in given[-written:]):
        raise errors.TypingError(f"{name} takes {expected}, and writes the last {written}; got {given}")

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer, packed = values
        unpacked = cgutils.unpack_tuple(builder, packed)
        passed = [
            value if isinstance(to, types.Array) else context.cast(builder, value, of, to)
            for value, of, to in zip(unpacked, given, expected, strict=True)
        ]
        function = ir.FunctionType(context.get_value_type(result), [context.get_value_type(t) for t in expected])
        return builder.call(builder.inttoptr(pointer, function.as_pointer()), passed)

    return generate


def _fits(given: Any, expected: Any) -> bool:
    """Whether a value of a type can be passed as one of another: an array as it is, a number converted."""
    if isinstance(expected, types.Array):
        return isinstance(given, types.Array) and (given.dtype, given.ndim, given.layout) == (
            expected.dtype,
            expected.ndim,
            expected.layout,
        )
    if isinstance(expected, types.Boolean):
        return isinstance(given, types.Boolean)
    return isinstance(given, types.Integer if isinstance(expected, types.Integer) else types.Number)


call_moments = _caller("moments")
call_normalize = _caller("normalize")
call_grad_sums = _caller("grad_sums")
call_grad_input = _caller("grad_input")

call_moments_kernel = _kernel_caller("moments")
call_normalize_kernel = _kernel_caller("normalize")
call_forward_kernel = _kernel_caller("forward")
call_grad_sums_kernel = _kernel_caller("grad_sums")
call_grad_input_kernel = _kernel_caller("grad_input")
call_backward_kernel = _kernel_caller("backward")
