"""What the parts of the package need besides NumPy and Numba, and what is said where it is not installed."""

from importlib.util import find_spec

__all__ = ["EXTRAS", "missing", "require"]

EXTRAS = {
    "torch": ("torch",),
    "keras": ("keras",),
    "jax": ("jax", "flax"),
    "onnx": ("onnx",),
    "study": ("torch", "sklearn", "joblib", "plotly", "jinja2", "rich"),
    "bench": ("torch", "rich"),
}
"""The packages without which a part does not start, by the name of the part and of its extra."""


def require(extra: str) -> None:
    """Check that the packages of a part are installed, before it imports them.

    Args:
        extra: The name of the part and of its extra.

    Raises:
        ModuleNotFoundError: If one is not. The message names the extra that brings it.
    """
    for package in EXTRAS[extra]:
        if find_spec(package) is None:
            raise ModuleNotFoundError(missing(f"batchnorm.{extra}", package, extra), name=package)


def missing(what: str, package: str, extra: str) -> str:
    """The sentence that says what is not installed, and how to get it."""
    return f'{what} needs {package}, which is not installed; pip install "batchnorm[{extra}]" brings it.'
