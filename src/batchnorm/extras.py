"""The packages that each part needs besides NumPy and Numba, and the error if one is not installed."""

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
"""The packages without which a part cannot be imported, by the name of the part and of its extra."""


def require(extra: str) -> None:
    """Raise an error unless the packages of a part are installed, before it imports them.

    Args:
        extra: The name of the part and of its extra.

    Raises:
        ModuleNotFoundError: If one is missing. The message names the extra that installs it.
    """
    for package in EXTRAS[extra]:
        if find_spec(package) is None:
            raise ModuleNotFoundError(missing(f"batchnorm.{extra}", package, extra), name=package)


def missing(what: str, package: str, extra: str) -> str:
    """The sentence that says what is not installed, and how to install it."""
    return f'{what} needs {package}, which is not installed; install it with pip install "batchnorm[{extra}]".'
