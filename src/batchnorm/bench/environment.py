"""The versions and hardware behind a measurement. Nothing in it identifies a machine or a person."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import batchnorm

__all__ = ["cpu", "environment"]


def environment() -> dict[str, str | int]:
    """Versions, threads and processor, by column; the version of a missing package is empty."""
    packages = ("torch", "numba", "numpy", "jax", "tensorflow")
    return {
        "batchnorm": batchnorm.__version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        "threads": torch.get_num_threads(),
        "cpu": cpu(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu() -> str:
    """The processor's model from Linux, otherwise what Python reports."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
