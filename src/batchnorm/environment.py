"""Where the package runs: versions, threads, caches, devices and routes, for bug reports and measurements.

Paths and the value of `CUDA_VISIBLE_DEVICES` may reveal more than you want.
"""

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import batchnorm

__all__ = ["columns", "cpu", "environment", "system", "text", "versions"]

PACKAGES = (
    "numpy", "numba", "torch", "triton", "keras", "tensorflow", "tensorflow-cpu", "jax", "onnx", "onnxruntime",
    "scikit-learn",
)  # fmt: skip

VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER", "NUMBA_DISABLE_JIT",
    "TRITON_INTERPRET", "KERAS_BACKEND", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
"""The environment variables that change what is computed, or where."""


def environment() -> dict[str, Any]:
    """All that a bug report needs. An entry that cannot be determined gives the reason instead."""
    return {
        "batchnorm": batchnorm.__version__,
        "python": platform.python_version(),
        "system": system(),
        "cpu": cpu(),
        "packages": {name: number for name, number in versions(PACKAGES).items() if number},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **_of_kernels(),
        **_of_torch(),
    }


def text(found: dict[str, Any]) -> str:
    """An environment as lines of text, one for each entry."""

    def said(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {each}" for name, each in value.items())
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    width = max(map(len, found))
    return "\n".join(f"{name:<{width}}  {said(value) or 'none'}" for name, value in found.items())


def columns() -> dict[str, str | int]:
    """Versions, PyTorch's threads and the processor, as columns for tables of measurements."""
    import torch

    return {
        "batchnorm": batchnorm.__version__,
        "python": platform.python_version(),
        **versions(("torch", "numba", "numpy", "jax", "tensorflow")),
        "threads": torch.get_num_threads(),
        "cpu": cpu(),
        "system": system(),
    }


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The version of each package; empty for those that are not installed."""
    return {package: _version(package) for package in packages}


def system() -> str:
    """The operating system and the architecture."""
    return f"{platform.system()} {platform.machine()}"


def cpu() -> str:
    """The processor's model from Linux, otherwise what Python reports."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    first = dict(reversed(fields))
    name = first.get("model name", platform.processor() or platform.machine())
    # Clouds give several generations one name.
    return f"{name} (family {first['cpu family']}, model {first['model']})" if "cpu family" in first else name


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _of_kernels() -> dict[str, Any]:
    """The threads of Numba's kernels, and the folder of the compiled kernels."""
    from batchnorm.kernels import disk, threads

    folder = disk.folder()
    kept = "nowhere: no writable folder" if folder is None else _without_home(folder)
    return {
        "numba threads": "none: kernels run without threads here" if threads.forbidden() else threads.available(),
        "compiled kernels": kept,
    }


def _of_torch() -> dict[str, Any]:
    """PyTorch's threads and devices, and the routes available on them."""
    try:
        torch: Any = importlib.import_module("torch")
        routes = importlib.import_module("batchnorm.torch.routes").ROUTES
        gpu = importlib.import_module("batchnorm.torch.gpu")
        smallest = importlib.import_module("batchnorm.torch.cards").smallest
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        names = [f"cuda:{i} {torch.cuda.get_device_name(device)}" for i, device in enumerate(devices)]
        ours = {name: smallest(d) for name, d in zip(names, devices, strict=True) if gpu.is_available(d)}
    except ModuleNotFoundError as error:
        return {"routes": f"none: {error.name} is not installed"}
    except Exception as error:  # a bug report must not fail with the bug
        return {"routes": f"none: PyTorch does not start ({error})"}
    return {
        "torch threads": torch.get_num_threads(),
        "devices": ["cpu", *names],
        "routes": [route.name for route in routes if ours or route.name != "triton"],
        "triton": {name: f"for tensors of {values} values and more" for name, values in ours.items()}
        or "no GPU for these kernels",
    }


def _without_home(path: Path) -> str:
    """A path without the user's name."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
