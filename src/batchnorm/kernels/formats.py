"""The types of data in memory, and the types in which kernels calculate.

NumPy has no bfloat16, so kernels take its 16 bits as uint16. They are the upper half of a float32, and kernels
calculate in float32.

A function here is what plain Python runs (NUMBA_DISABLE_JIT). Its overload chooses the same code by type when a kernel
is compiled.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from batchnorm.kernels.compilation import INLINED

__all__ = ["arithmetic", "load", "store"]

HALF_WORD = np.uint32(16)
ONE = np.uint32(1)
JUST_UNDER_HALF = np.uint32(0x7FFF)
NAN = np.uint16(0x7FC0)


def arithmetic(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type in which kernels calculate with data of a type."""
    return np.dtype(np.float32) if dtype == np.uint16 else dtype


def load(value: Any) -> Any:
    """A value from memory, as a number to calculate with."""
    return _load_bfloat16(value) if value.dtype == np.uint16 else value


def store(array: Any, i: int, value: Any) -> None:
    """Write a number to memory, `array[i]`, rounded to nearest, ties to even, where the memory's type needs it."""
    if array.dtype == np.uint16:
        _store_bfloat16(array, i, value)
    else:
        array[i] = value


def _load_bfloat16(value: Any) -> Any:
    return np.uint32(np.uint32(value) << HALF_WORD).view(np.float32)


def _load_as_it_is(value: Any) -> Any:
    return value


def _store_bfloat16(array: Any, i: int, value: Any) -> None:
    bits = np.float32(value).view(np.uint32)
    even = (bits >> HALF_WORD) & ONE
    rounded = np.uint16((bits + JUST_UNDER_HALF + even) >> HALF_WORD)
    array[i] = rounded if value == value else NAN


def _store_as_it_is(array: Any, i: int, value: Any) -> None:
    array[i] = value


@overload(load, jit_options=INLINED)
def _load(value: Any) -> Any:
    return _load_bfloat16 if value == types.uint16 else _load_as_it_is


@overload(store, jit_options=INLINED)
def _store(array: Any, i: int, value: Any) -> Any:
    return _store_bfloat16 if array.dtype == types.uint16 else _store_as_it_is
