"""The random states of Python and NumPy."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

__all__ = ["random_states_kept"]


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the random states of Python and of NumPy's global generator."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
