"""Read selected tensors from `.safetensors` files, in float64.

A file is the length of its header (8 bytes, little-endian), the header (JSON: type, shape and offsets of each tensor),
and the bytes of the tensors.

Source: the format's own description, in the README of huggingface/safetensors.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.errors import InputError

__all__ = ["read"]

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U8": "|u1", "BOOL": "|u1",
}  # fmt: skip


def read(path: Path, wanted: Callable[[str, tuple[int, ...]], bool]) -> dict[str, NDArray[np.float64]]:
    """Some tensors of a file.

    Args:
        path: The file.
        wanted: Called with the name and the shape of each tensor.

    Returns:
        The tensors by name.

    Raises:
        InputError: If the file is not a valid `.safetensors` file, or the type of a wanted tensor is not supported.
    """
    broken = f"{path} is not a valid .safetensors file"
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(f"{broken}: its header is longer than the file; fetch it again.")
        try:
            header = json.loads(file.read(length))
            entries = {name: _entry(entry) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{broken}: its header is not readable; fetch it again.") from error
        found = {}
        for name, (dtype, shape, start, end) in entries.items():
            if not wanted(name, shape):
                continue
            if dtype not in DTYPES:
                raise InputError(f"{path} has {name} in type {dtype}, which cannot be read; save it in float32.")
            kind = np.dtype(DTYPES[dtype])
            if end - start != math.prod(shape) * kind.itemsize or not 0 <= start <= end <= size - 8 - length:
                raise InputError(f"{broken}: {name} is not where the header says; fetch it again.")
            file.seek(8 + length + start)
            values: Any = np.frombuffer(file.read(end - start), kind)
            if dtype == "BF16":  # the upper half of a float32
                values = (values.astype("<u4") << 16).view("<f4")
            found[name] = values.reshape(shape).astype(np.float64)
    return found


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    start, end = entry["data_offsets"]
    return str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), int(start), int(end)
