"""XLA's foreign function interface in pure Python: a function on NumPy arrays becomes a target of custom calls.

XLA calls a C function with a `CallFrame`: the buffers of the arguments and results, and named attributes. The
structures here are those of its header `xla/ffi/api/c_api.h` in the versions in `VERSIONS`. Buffers are wrapped, not
copied. The size of every structure is checked before it is read. An exception in the function becomes an XLA error.

XLA calls from its own threads, without the interpreter's lock, which `ctypes` acquires for the duration of a call.
"""

import ctypes
import functools
import math
import re
import sys
from collections.abc import Callable, Iterator
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p, cast, sizeof
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["HANDLER", "VERSIONS", "Function", "Version", "ask_for_large_pages", "large_pages", "target", "version"]

VERSIONS = {(0, 1), (0, 2), (0, 3)}
"""The versions of the interface in which the structures below are the same."""

Version = tuple[int, int]
Function = Callable[[list[NDArray[Any]], list[NDArray[Any]], dict[str, bytes]], None]
"""A function of the arguments, the results, which it fills, and the attributes."""

METADATA = 1  # XLA_FFI_Extension_Metadata
EXECUTE = 3  # XLA_FFI_ExecutionStage_EXECUTE
BUFFER = 1  # XLA_FFI_ArgType_BUFFER and XLA_FFI_RetType_BUFFER
STRING = 4  # XLA_FFI_AttrType_STRING
INTERNAL = 13  # XLA_FFI_Error_Code_INTERNAL

HUGE = 2 << 20
"""The size of a large page."""

HUGE_PAGES = 14  # MADV_HUGEPAGE

TYPES: dict[int, np.dtype[Any]] = {
    11: np.dtype(np.float32),
    12: np.dtype(np.float64),
    16: np.dtype(np.uint16),  # bfloat16, in the form that the kernels read
}
"""The NumPy types of XLA's `XLA_FFI_DataType`."""


class Extension(Structure):
    """`XLA_FFI_Extension_Base`."""


Extension._fields_ = [("struct_size", c_size_t), ("type", c_int), ("next", POINTER(Extension))]


class ApiVersion(Structure):
    """`XLA_FFI_Api_Version`."""

    _fields_ = (
        ("struct_size", c_size_t), ("extension", c_void_p), ("major", c_int), ("minor", c_int),
    )  # fmt: skip


class Metadata(Structure):
    """The beginning of `XLA_FFI_Metadata`."""

    _fields_ = (("struct_size", c_size_t), ("version", ApiVersion), ("traits", c_uint32))


class MetadataExtension(Structure):
    """`XLA_FFI_Metadata_Extension`."""

    _fields_ = (("base", Extension), ("metadata", POINTER(Metadata)))


class ErrorArguments(Structure):
    """`XLA_FFI_Error_Create_Args`."""

    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("message", c_char_p), ("code", c_int))


ERROR_SIZE = ErrorArguments.code.offset + sizeof(c_int)  # XLA counts up to the last field, without padding
CREATE_ERROR = ctypes.CFUNCTYPE(c_void_p, POINTER(ErrorArguments))


class Api(Structure):
    """The beginning of `XLA_FFI_Api`."""

    _fields_ = (
        ("struct_size", c_size_t), ("extension", c_void_p), ("version", ApiVersion), ("internal", c_void_p),
        ("create_error", CREATE_ERROR),
    )  # fmt: skip


class Many(Structure):
    """`XLA_FFI_Args` and `XLA_FFI_Rets`."""

    _fields_ = (
        ("struct_size", c_size_t), ("extension", c_void_p), ("size", c_int64), ("types", POINTER(c_int)),
        ("values", POINTER(c_void_p)),
    )  # fmt: skip


class Span(Structure):
    """`XLA_FFI_ByteSpan`."""

    _fields_ = (("start", c_void_p), ("length", c_size_t))


class Attributes(Structure):
    """`XLA_FFI_Attrs`."""

    _fields_ = (
        ("struct_size", c_size_t), ("extension", c_void_p), ("size", c_int64), ("types", POINTER(c_int)),
        ("names", POINTER(POINTER(Span))), ("values", POINTER(c_void_p)),
    )  # fmt: skip


class Buffer(Structure):
    """`XLA_FFI_Buffer`."""

    _fields_ = (
        ("struct_size", c_size_t), ("extension", c_void_p), ("dtype", c_int), ("data", c_void_p), ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    )  # fmt: skip


class CallFrame(Structure):
    """`XLA_FFI_CallFrame`, up to the attributes, which is what its size counts."""

    _fields_ = (
        ("struct_size", c_size_t), ("extension", POINTER(Extension)), ("api", POINTER(Api)), ("context", c_void_p),
        ("stage", c_int), ("arguments", Many), ("results", Many), ("attributes", Attributes),
    )  # fmt: skip


HANDLER = ctypes.CFUNCTYPE(c_void_p, POINTER(CallFrame))


@functools.cache
def _advice() -> Any:
    """The C library's `madvise` where there are large pages, Linux; None elsewhere."""
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def large_pages() -> int:
    """The address of the function that asks for large pages; 0 if there is none."""
    return cast(advise, c_void_p).value or 0 if (advise := _advice()) is not None else 0


def ask_for_large_pages(array: NDArray[Any]) -> None:
    """Have Linux give memory that has not been written to in pages of 2 MB, as NumPy does for its own arrays.

    XLA takes fresh memory for every result. In pages of 4 KB, getting it takes longer than a kernel that fills it.

    Args:
        array: A contiguous array. Below 4 MB nothing is done.
    """
    if array.nbytes < 2 * HUGE or (advise := _advice()) is None:
        return
    begin = -(-array.ctypes.data // HUGE) * HUGE
    advise(c_void_p(begin), c_size_t((array.ctypes.data + array.nbytes - begin) // HUGE * HUGE), HUGE_PAGES)


def version(headers: str) -> Version | None:
    """The version of the interface, read from XLA's headers; None if it is unknown."""
    try:
        text = Path(headers, "xla/ffi/api/c_api.h").read_text(encoding="utf-8")
    except OSError:
        return None
    found = (re.search(rf"^#define XLA_FFI_API_{part}\s+(\d+)", text, re.MULTILINE) for part in ("MAJOR", "MINOR"))
    numbers = tuple(int(each.group(1)) for each in found if each is not None)
    return numbers if len(numbers) == 2 and numbers in VERSIONS else None


def target(function: Function, version: Version) -> Any:
    """The C function that XLA calls, `XLA_FFI_Handler`. Keep it: it must live as long as XLA may call it.

    Args:
        function: What it computes.
        version: The version of the interface.
    """

    def handle(given: Any) -> int | None:
        frame = given.contents
        try:
            if frame.struct_size != sizeof(CallFrame):
                raise _unexpected(frame, sizeof(CallFrame))
            if frame.extension:
                _describe(frame.extension, version)
            elif frame.stage == EXECUTE:
                arguments, results = list(_buffers(frame.arguments)), list(_buffers(frame.results))
                function(arguments, results, _attributes(frame.attributes))
            return None
        except BaseException as error:  # a C function must not raise, only return an error of XLA's
            return _error(frame.api, f"batchnorm: {type(error).__name__}: {error}")

    return HANDLER(handle)


def _describe(extension: Any, version: Version) -> None:
    """Answer the call in which XLA asks for the version."""
    while extension:
        if extension.contents.type == METADATA:
            metadata = cast(extension, POINTER(MetadataExtension)).contents.metadata.contents
            metadata.version.major, metadata.version.minor = version
        extension = extension.contents.next


def _error(api: Any, message: str) -> int | None:
    if not api:  # XLA is only asking for the version, and refuses a target that returns none
        return None
    created: int = api.contents.create_error(
        ErrorArguments(ERROR_SIZE, None, message.encode(errors="replace"), INTERNAL)
    )
    return created


def _expect(structure: Any, size: int) -> None:
    if structure.struct_size != size:
        raise _unexpected(structure, size)


def _unexpected(structure: Any, size: int) -> RuntimeError:
    return RuntimeError(f"XLA's {type(structure).__name__} has {structure.struct_size} bytes, not {size}")


def _buffers(many: Any) -> Iterator[NDArray[Any]]:
    _expect(many, sizeof(Many))
    for i in range(many.size):
        if many.types[i] != BUFFER:
            raise RuntimeError(f"XLA passes a value of type {many.types[i]}, which is not a buffer")
        buffer = Buffer.from_address(many.values[i])  # a cast takes five times as long
        _expect(buffer, sizeof(Buffer))
        if (dtype := TYPES.get(buffer.dtype)) is None:
            raise RuntimeError(f"XLA passes a buffer of type {buffer.dtype}, which the kernels do not take")
        shape = tuple(buffer.dims[: buffer.rank])
        size = math.prod(shape) * dtype.itemsize
        memory: Any = (ctypes.c_char * size).from_address(buffer.data) if size else b""
        yield np.ndarray(shape, dtype, memory)


def _attributes(attributes: Any) -> dict[str, bytes]:
    _expect(attributes, sizeof(Attributes))
    found = {}
    for i in range(attributes.size):
        if attributes.types[i] != STRING:
            raise RuntimeError(f"XLA passes an attribute of type {attributes.types[i]}, which is not a string")
        name, value = attributes.names[i].contents, Span.from_address(attributes.values[i])
        found[ctypes.string_at(name.start, name.length).decode()] = ctypes.string_at(value.start, value.length)
    return found
