"""Memory by its address, and C functions by theirs, in compiled code."""

import ctypes
from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import extending, types
from numba.core import cgutils

from batchnorm.kernels.compilation import inlined

__all__ = ["BYTE", "INTEGER", "WORD", "address_of", "array", "call", "read", "record"]

WORD, INTEGER, BYTE = np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.uint8)


def _intrinsic(function: Callable[..., Any]) -> Callable[..., int]:
    """Numba's decorator: the function generates the code of a call with the arguments after its first one."""
    return cast(Callable[..., int], extending.intrinsic(function))


@_intrinsic
def read(_: Any, address: Any, dtype: Any) -> Any:
    """The number of a type at an address."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(builder.inttoptr(values[0], context.get_value_type(dtype.dtype).as_pointer()))

    return dtype.dtype(address, dtype), generate


@_intrinsic
def call(_: Any, address: Any, arguments: Any) -> Any:
    """Call the C function at an address with a tuple of arguments. If it returns nothing, the result has no meaning."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        passed = cgutils.unpack_tuple(builder, values[1])
        function = ir.FunctionType(ir.IntType(64), [value.type for value in passed])
        return builder.call(builder.inttoptr(values[0], function.as_pointer()), passed)

    return types.int64(address, arguments), generate


def address_of(symbol: str) -> Callable[..., int]:
    """A function for compiled code, without arguments: the address of a symbol, found when the code is loaded."""

    @_intrinsic
    def find(_: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            known = builder.module.globals.get(symbol)
            found = ir.GlobalVariable(builder.module, ir.IntType(64), symbol) if known is None else known
            return builder.ptrtoint(found, ir.IntType(64))

        return types.int64(), generate

    return find


# --- Arrays -----------------------------------------------------------------------------------------------------------


def _pointer_in_python(address: int, like: Any) -> Any:
    return ctypes.cast(address, ctypes.POINTER(np.ctypeslib.as_ctypes_type(np.asarray(like).dtype)))


@_intrinsic
def _pointer_in_compiled_code(_: Any, address: Any, like: Any) -> Any:
    to = types.CPointer(like.dtype if isinstance(like, types.DType | types.CPointer) else like)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(to))

    return to(address, like), generate


_pointer: Any = _pointer_in_python if numba.config.DISABLE_JIT else _pointer_in_compiled_code  # type: ignore[attr-defined]
"""`(address, like)`: an address as a pointer."""


@inlined
def array(address: int, like: Any, shape: Any) -> Any:
    """The array of a shape at an address.

    Args:
        address: Its address.
        like: What says the type of its values: a number of that type, or, in compiled code only, a pointer to such
            numbers or the dtype.
        shape: Its shape.
    """
    return numba.carray(_pointer(address, like), shape)  # type: ignore[attr-defined]


@inlined
def record(address: int, dtype: Any) -> Any:
    """The record at an address."""
    return array(address, dtype, (1,))[0]
