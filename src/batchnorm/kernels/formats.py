"""The types that data may have in memory, and the type that kernels calculate in.

NumPy has no bfloat16: its 16 bits come as uint16. They are the upper half of a float32, in which kernels calculate.
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
    """The type in which data of a type are calculated."""
    return np.dtype(np.float32) if dtype == np.uint16 else dtype


def load(value: Any) -> Any:
    """A value from memory, as a number to calculate with."""
    raise AssertionError("only inside a kernel")


def store(array: Any, i: int, value: Any) -> None:
    """Write a number to memory, `array[i]`, rounded to the nearest (to even) if need be."""
    raise AssertionError("only inside a kernel")


@overload(load, jit_options=INLINED)
def _load(value: Any) -> Any:
    def bfloat16(value: Any) -> Any:
        return np.uint32(np.uint32(value) << HALF_WORD).view(np.float32)

    def same(value: Any) -> Any:
        return value

    return bfloat16 if value == types.uint16 else same


@overload(store, jit_options=INLINED)
def _store(array: Any, i: int, value: Any) -> Any:
    def bfloat16(array: Any, i: int, value: Any) -> None:
        bits = np.float32(value).view(np.uint32)
        even = (bits >> HALF_WORD) & ONE
        rounded = np.uint16((bits + JUST_UNDER_HALF + even) >> HALF_WORD)
        array[i] = rounded if value == value else NAN

    def same(array: Any, i: int, value: Any) -> None:
        array[i] = value

    return bfloat16 if array.dtype == types.uint16 else same
