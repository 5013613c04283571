"""Read and write ONNX models, including those that are too large for one file."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from onnx import ModelProto, checker

from batchnorm.errors import InputError

__all__ = ["check_valid", "first_line", "portable", "read", "replace_file"]

LARGEST = 2**31 - 1
"""The largest file of Protocol Buffers, in bytes. A larger model stores its weights in a second file."""


def read(path: Path) -> ModelProto:
    """A model from a file, with its weights.

    Raises:
        InputError: If the file or its weights cannot be read.
    """
    try:
        return onnx.load_model(path, format="protobuf")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from error
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX file.") from error
    except checker.ValidationError as error:
        raise InputError(f"{path} cannot be read with its weights ({first_line(error)}).") from error


def replace_file(model: ModelProto, path: Path) -> None:
    """Write a model to a file, which keeps its old content until the new one is complete.

    Raises:
        InputError: If the file cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            _save(model, Path(folder) / path.name)
            for part in sorted(Path(folder).iterdir(), reverse=True):  # the weights before the file that names them
                part.replace(path.with_name(part.name))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}).") from error


@contextmanager
def portable(model: ModelProto) -> Iterator[bytes | str]:
    """A model in a form that the checker and onnxruntime accept: its bytes, or a file's path if there are too many."""
    data = _serialized(model)
    if data is not None:
        yield data
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _save(model, path)
        yield os.fspath(path)


def check_valid(model: ModelProto) -> None:
    """Raise an error unless a model is valid.

    Raises:
        onnx.checker.ValidationError: If it is not.
    """
    with portable(model) as given:
        checker.check_model(given)


def first_line(error: Exception) -> str:
    """The first line of an error's message, without a full stop."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _serialized(model: ModelProto) -> bytes | None:
    """The bytes of a model, or None if there are too many for one file."""
    try:
        data = model.SerializeToString()
    except (EncodeError, ValueError):
        return None
    return data if len(data) <= LARGEST else None


def _save(model: ModelProto, path: Path) -> None:
    data = _serialized(model)
    if data is not None:
        path.write_bytes(data)
        return
    copy = ModelProto()  # saving the weights in a second file removes them from the model
    copy.CopyFrom(model)
    onnx.save_model(copy, path, format="protobuf", save_as_external_data=True, location=f"{path.name}.data")
