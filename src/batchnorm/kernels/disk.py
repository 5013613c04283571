"""Where compiled kernels are kept between processes, and how a kernel that is out of date is told from a current one.

Numba keeps a function on disk under a key: the file that the function stands in, its bytecode and the constants it
closes over. A kernel or a stage is made of more than that: of formulas and activations in other files of this package,
and of the compiler and its options. So the names of our files on disk carry a digest of all of these. If one of them
changes, the next kernel that is compiled replaces the files of the old digest.
"""

import contextlib
import functools
import hashlib
import importlib.resources
import pickle
import sys
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite  # type: ignore[import-untyped]
import numba
from numba.core import config
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

__all__ = ["DIGEST", "folder", "keep"]

SETTINGS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT")
"""Settings of Numba, from its environment variables, that change the code of a kernel but not Numba's key."""


def _digest() -> str:
    """A digest of everything that kernels are made of; empty if there are no source files, as in a frozen program."""
    package = importlib.resources.files("batchnorm")
    folders = package / "kernels", package / "xla"  # the latter has a function that calls kernels, and is kept as well
    sources = {
        f"{folder.name}/{file.name}": file
        for folder in folders
        for file in folder.iterdir()
        if file.name.endswith(".py")
    }
    if not sources:
        return ""
    compiler = [numba.__version__, llvmlite.__version__, *(str(getattr(config, name, None)) for name in SETTINGS)]
    digest = hashlib.sha256("\n".join(compiler).encode())
    for name, source in sorted(sources.items()):
        # Of equal length for every file, so that no text can move from one file to the next unseen.
        digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()[:16]


DIGEST = _digest()
PYTHON = f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}"


class _Files:
    """One file for each compiled kernel.

    Numba's own index of several kernels is written before their files are. Two processes that compile two kernels at
    once could then end with one of them under the other's key.
    """

    def __init__(self, folder: str, name: str) -> None:
        self.folder = Path(folder)
        self.name = name

    def path(self, key: Any) -> Path:
        """The file of the kernel with this key."""
        return self.folder / f"{self.name}-{DIGEST}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.nbc"

    def load(self, key: Any) -> Any:
        """What was saved under the key; None if there is nothing, or nothing that can be read."""
        try:
            return pickle.loads(self.path(key).read_bytes())
        except (OSError, EOFError, pickle.UnpicklingError):
            return None

    def save(self, key: Any, data: Any) -> None:
        """Save under the key, and remove what older code has saved."""
        path = self.path(key)
        written = path.with_suffix(f".{uuid.uuid4().hex}")
        try:
            written.write_bytes(dumps(data))
            written.replace(path)  # at once, so that nobody reads half a file
        finally:
            written.unlink(missing_ok=True)
        for file in self.folder.glob(f"{self.name}-*"):
            if not file.name.startswith(f"{self.name}-{DIGEST}-"):
                file.unlink(missing_ok=True)

    def flush(self) -> None:
        """Forget what has been saved."""
        for file in self.folder.glob(f"{self.name}-*.nbc"):
            file.unlink(missing_ok=True)


class _KernelCache(FunctionCache):
    """Numba's cache of one function, in files of our own. The folder is Numba's choice."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        name = function.__qualname__.replace(".<locals>", "")
        self._cache_file = _Files(self.cache_path, f"{name}.{PYTHON}")  # type: ignore[assignment]

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled kernel. It can be used even if the disk is full."""
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def keep(kernel: Any) -> None:
    """Have a kernel loaded from disk if it is there, and saved when it is compiled.

    If no folder can be written to, the kernel is compiled in every process, and a warning says so.
    """
    if not DIGEST:
        return
    try:
        kernel._cache = _KernelCache(kernel.py_func)  # what Numba's `cache=True` does with a class of its own
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        _warn()


def folder() -> Path | None:
    """Where compiled kernels are kept; None if nowhere."""
    try:
        return Path(_KernelCache(keep).cache_path) if DIGEST else None  # the choice depends on the file alone
    except RuntimeError:
        return None


@functools.cache  # once for all kernels
def _warn() -> None:
    warnings.warn(
        "batchnorm cannot keep its compiled kernels, because it finds no writable folder: every process compiles them "
        "again, which takes seconds. Set NUMBA_CACHE_DIR to a writable folder.",
        RuntimeWarning,
        stacklevel=1,
    )
