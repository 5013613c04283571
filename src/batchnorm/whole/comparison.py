"""Compare the outputs of two models on the same inputs, and judge whether rounding explains the difference."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["BATCH", "ROUNDING", "SIZES", "Outputs", "OutputsDiffer", "compare", "difference", "is_noise", "rounding"]

ROUNDING = {"float64": 1e-10, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""The largest difference, relative to the largest output, that rounding explains in each type."""


BATCH = 2
"""The number of samples in random inputs."""

SIZES = (8, 64, 256)
"""Sizes to try, in turn, for the other axes of random inputs: a network may need more than a few pixels."""


class OutputsDiffer(RuntimeError):
    """The outputs of two models differ. The message says by how much."""


class Outputs(NamedTuple):
    """The outputs of two models for the same inputs.

    Attributes:
        expected: The outputs of the original, by their path: float64 or complex128, or of a type that is not numeric.
        found: Those of the other model.
        dtypes: The types of the original's parameters and outputs, such as `"float32"`; unknown types are ignored.
        explained: Whether rounding is known to explain any difference, because the parts of the models are the same.
        notes: Remarks on these outputs, such as which of them could not be compared.
    """

    expected: Mapping[str, NDArray[Any]]
    found: Mapping[str, NDArray[Any]]
    dtypes: Iterable[str]
    explained: bool = False
    notes: tuple[str, ...] = ()


def compare(outputs: Outputs) -> float | None:
    """The largest difference between the outputs of two models, each relative to its own largest value.

    Args:
        outputs: The outputs of both models.

    Returns:
        The difference; None if there are no outputs to compare.

    Raises:
        OutputsDiffer: If rounding does not explain the difference, or if the shapes differ.
    """
    expected, found, dtypes, explained, _ = outputs
    shapes, new_shapes = ({path: y.shape for path, y in of.items()} for of in (expected, found))
    if shapes != new_shapes:
        raise OutputsDiffer(f"the folded model's outputs do not have the same shapes: {new_shapes}, not {shapes}")
    error = max((difference(y, found[path]) for path, y in expected.items()), default=None)
    limit = rounding(dtypes)
    if error is not None and not explained and not error <= limit:
        raise OutputsDiffer(
            f"the folded model's outputs differ by {error:.1e} of the largest, but rounding explains only {limit:.1e}: "
            f"this model does something that its graph does not show, and must not be folded"
        )
    return error


def rounding(dtypes: Iterable[str]) -> float:
    """The largest difference between outputs that rounding explains; the coarsest type decides."""
    return max((ROUNDING[dtype] for dtype in dtypes if dtype in ROUNDING), default=min(ROUNDING.values()))


def difference(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """The largest difference between two arrays, relative to the largest finite value that is expected.

    Args:
        expected: An array of any type. NaN and infinity in it are expected as well.
        found: The array of the other model.

    Returns:
        The difference; infinity if the shapes differ, or if a number that is not finite has another counterpart. For
        types that are not numeric, such as strings, 0 if the arrays are equal and infinity if not.
    """
    if expected.shape != found.shape:
        return float("inf")
    if expected.dtype.kind not in "biufc":
        return 0.0 if np.array_equal(expected, found) else float("inf")
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    expected, found = expected.astype(wide), found.astype(wide)
    same = (expected == found) | (np.isnan(expected) & np.isnan(found))
    with np.errstate(invalid="ignore"):
        apart = np.nan_to_num(np.abs(expected - found), nan=np.inf, posinf=np.inf)
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    return float(apart[~same].max(initial=0.0) / (largest or 1.0))


MARGIN = 10.0
"""Rounding explains a difference of up to this many times the effect of one more rounding of all weights."""


def is_noise(outputs: Outputs, rounded: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the difference is not larger than the original's own error, which the last digits of its weights cause.

    Args:
        outputs: The outputs of both models, of the same shapes.
        rounded: The outputs of the original after each of its weights has been rounded once more.
    """
    limit = rounding(outputs.dtypes)
    return all(
        difference(y, outputs.found[path]) <= max(limit, MARGIN * difference(y, rounded[path]))
        for path, y in outputs.expected.items()
    )
