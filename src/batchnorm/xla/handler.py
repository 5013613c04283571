"""The C function that XLA calls, compiled: it calls the kernels without Python, and so without the interpreter's lock.

Python takes as long to read the frame of a call as the kernels do to normalize tens of thousands of values. So a call
that comes again is `prepared`. The compiled function finds it by its attribute and the types and shapes of its buffers.
All else it leaves to a handler in Python: a call that is not prepared, and a frame that is not as expected.

The machine code is kept on disk and knows nothing of the process. It finds the table of calls by a symbol.
"""

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numpy as np
from numba import types
from numpy.typing import NDArray

from batchnorm.kernels.compilation import c_function, inlined, pointer
from batchnorm.kernels.memory import BYTE, INTEGER, WORD, address_of, call, read, record
from batchnorm.xla.call_frame import BUFFER, EXECUTE, STRING, TYPES, Attributes, Buffer, CallFrame, Many, Span
from batchnorm.xla.prepared import ARGUMENTS, RESULTS, Made, data

__all__ = ["prepare", "start"]

Array = NDArray[Any]

MOST = 512
"""The largest number of prepared calls. A network has two for each kind and shape of its layers."""

CALL = np.dtype([(name, np.int64) for name in ("run", "entry", "layout", "in_place", "text", "length")])
"""A prepared call: the function that makes it, with its entry, and what it is known by.

Attributes:
    layout: The address of its `_layout`.
    in_place: Whether the first result has the memory of the first argument.
    text, length: Its attribute.
"""

TABLE = np.dtype([("python", np.int64), ("calls", np.int64, MOST + 1)])
"""The address of the handler in Python, and those of the prepared calls, up to the first 0.

They are read while others are added. So a call is written before its address, and read only through it: whatever the
order in which a processor sees other writes, it sees no address, or the whole call.
"""

SYMBOL = "batchnorm_xla_calls"

_table = np.zeros(1, TABLE)
_address_of_table = address_of(SYMBOL)


# --- What XLA calls ---------------------------------------------------------------------------------------------------

SIZE_OF_FRAME, SIZE_OF_MANY = ctypes.sizeof(CallFrame), ctypes.sizeof(Many)
SIZE_OF_ATTRIBUTES, SIZE_OF_BUFFER = ctypes.sizeof(Attributes), ctypes.sizeof(Buffer)
EXTENSION, STAGE = CallFrame.extension.offset, CallFrame.stage.offset
GIVEN, FOUND, ATTRIBUTES = CallFrame.arguments.offset, CallFrame.results.offset, CallFrame.attributes.offset
SIZE, KINDS, VALUES = Many.size.offset, Many.types.offset, Many.values.offset
NUMBER, KIND, VALUE = (ATTRIBUTES + getattr(Attributes, name).offset for name in ("size", "types", "values"))
DTYPE, RANK, DIMS = Buffer.dtype.offset, Buffer.rank.offset, Buffer.dims.offset
START, LENGTH = Span.start.offset, Span.length.offset
CALLS = TABLE.fields["calls"][1]  # type: ignore[index]


@inlined
def _is_as_expected(frame: int) -> bool:
    """Whether a frame is that of a call, with a string for an attribute, and its structures have the sizes we know."""
    return (
        read(frame, WORD) == SIZE_OF_FRAME
        and read(frame + EXTENSION, WORD) == 0
        and read(frame + STAGE, INTEGER) == EXECUTE
        and read(frame + GIVEN, WORD) == SIZE_OF_MANY
        and read(frame + FOUND, WORD) == SIZE_OF_MANY
        and read(frame + ATTRIBUTES, WORD) == SIZE_OF_ATTRIBUTES
        and read(frame + NUMBER, WORD) == 1
        and read(read(frame + KIND, WORD), INTEGER) == STRING
    )


@inlined
def _follow(many: int, layout: int) -> int:
    """Where a layout goes on after these buffers; 0 if they have another one, or are not as expected."""
    size = read(many + SIZE, WORD)
    if size != read(layout, WORD):
        return 0
    kinds, buffers = read(many + KINDS, WORD), read(many + VALUES, WORD)
    layout += 8
    for i in range(size):
        buffer = read(buffers + 8 * i, WORD)
        if read(kinds + 4 * i, INTEGER) != BUFFER or read(buffer, WORD) != SIZE_OF_BUFFER:
            return 0
        rank, dims = read(buffer + RANK, WORD), read(buffer + DIMS, WORD)
        if read(buffer + DTYPE, INTEGER) != read(layout, WORD) or rank != read(layout + 8, WORD):
            return 0
        layout += 16
        for _ in range(rank):
            if read(dims, WORD) != read(layout, WORD):
                return 0
            dims += 8
            layout += 8
    return layout


@inlined
def _is(known: Any, frame: int) -> bool:
    """Whether a frame, as expected, is that of a prepared call."""
    text = read(read(frame + VALUE, WORD), WORD)
    same: bool = read(text + LENGTH, WORD) == known.length
    if same:
        after = _follow(frame + GIVEN, known.layout)
        same = after != 0 and _follow(frame + FOUND, after) != 0
    if same:
        first, result = data(read(frame + ARGUMENTS, WORD), 0), data(read(frame + RESULTS, WORD), 0)
        same = (first == result) == (known.in_place != 0)
    if same:
        letters = read(text + START, WORD)
        for i in range(known.length):
            same &= read(letters + i, BYTE) == read(known.text + i, BYTE)
    return same


@functools.cache
def _handler() -> Any:
    @c_function
    def handle(frame: int) -> int:
        table = _address_of_table()
        if _is_as_expected(frame):
            place = table + CALLS
            address = read(place, WORD)
            while address != 0:
                known = record(address, CALL)
                if _is(known, frame):
                    x = data(read(frame + ARGUMENTS, WORD), 0)  # twice: its address is passed as two types of pointer
                    return call(known.run, (frame, known.entry, x, x))
                place += 8
                address = read(place, WORD)
        return call(read(table, WORD), (frame,))

    return handle


def start(python: int) -> int:
    """The address of the C function that XLA calls.

    Args:
        python: That of the handler in Python.
    """
    _table[0]["python"] = python
    llvm.add_symbol(SYMBOL, _table.ctypes.data)
    return pointer(_handler(), (types.intp,))


# --- Preparing --------------------------------------------------------------------------------------------------------

_codes = {dtype: code for code, dtype in TYPES.items()}
_times: dict[Any, int] = {}
_kept: list[Any] = []
_lock = threading.Lock()


def _layout(*groups: Sequence[Array]) -> list[int]:
    """Of arguments and results: how many, and of each the type, the rank and the dimensions."""
    words = []
    for buffers in groups:
        words.append(len(buffers))
        for buffer in buffers:
            words += [_codes[buffer.dtype], buffer.ndim, *buffer.shape]
    return words


def prepare(text: bytes, arguments: Sequence[Array], results: Sequence[Array], made: Callable[[], Made]) -> None:
    """Have the compiled function make a call from now on, if this is the second time that it comes.

    What is called once is not worth compiling anything. A call that cannot be prepared is left to Python for good, with
    a warning if that is due to an error: its results do not depend on it.

    Args:
        text: Its attribute.
        arguments, results: Its buffers, of which the types and shapes count, and whether the first ones are the same.
        made: Prepares it, as `prepared` does.
    """
    layout, in_place = _layout(arguments, results), arguments[0].ctypes.data == results[0].ctypes.data
    key = text, in_place, *layout
    with _lock:
        if len(_kept) == MOST:
            return
        _times[key] = times = _times.get(key, 0) + 1
    if times != 2:
        return
    try:
        found = made()
    except Exception as error:
        logging.getLogger("batchnorm").warning(
            "XLA calls the kernels of batchnorm through Python for shape %s, because preparing the call failed: %r",
            arguments[0].shape, error,
        )  # fmt: skip
        return
    if found is None:
        return
    run, entry = found
    words, letters = np.array(layout, np.int64), np.frombuffer(text, np.uint8)
    known = np.array((run, entry.ctypes.data, words.ctypes.data, in_place, letters.ctypes.data, len(text)), CALL)
    with _lock:
        if (place := len(_kept)) == MOST:
            return
        _kept.append((known, entry, words, letters))
    with _lock:  # a lock taken again is a barrier: the call is written before its address
        _table[0]["calls"][place] = known.ctypes.data


def _forget() -> None:
    """Leave every call to Python: in a forked child, in which parallel kernels may not run."""
    _table[0]["calls"][0] = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
