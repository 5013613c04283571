"""CIFAR-10's Python version: pickles, read without running anything that a pickle may ask for."""

import io
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_pickled_batch"]

REBUILD = np.empty(0).__reduce__()[0]

ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): REBUILD,
    ("numpy._core.multiarray", "_reconstruct"): REBUILD,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
"""What an array is rebuilt from, by the names of NumPy 1 and 2. A pickle that asks for anything else is refused."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def read_pickled_batch(content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The images, `(N, 3072)`, and the labels, `(N,)`, in one of the pickles of CIFAR-10.

    Args:
        content: A pickled dictionary with `data` and `labels`, as Python 2 or 3 writes it.

    Raises:
        ValueError: If it is anything else. The message says why.

    Source: Krizhevsky, "The CIFAR-10 dataset", the section on the Python version.
    """
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise any
        raise ValueError(str(error) or type(error).__name__) from error
    if not isinstance(batch, dict):
        raise ValueError(f"it holds a {type(batch).__name__} and not a dictionary")
    data, labels = (batch.get(name, batch.get(name.decode())) for name in (b"data", b"labels"))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2:
        raise ValueError("its data are not a matrix of bytes")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise ValueError("its labels are not a list of small integers")
    if not len(data):
        raise ValueError("it holds no images")
    if len(labels) != len(data):
        raise ValueError(f"it has {len(data)} images and {len(labels)} labels")
    return data, np.asarray(labels, np.uint8)
