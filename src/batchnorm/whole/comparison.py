"""The outputs of two models on the same inputs: how far are they apart, and does rounding explain it?"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["ROUNDING", "Outputs", "OutputsDiffer", "compare", "difference", "is_noise", "rounding"]

ROUNDING = {"float64": 1e-10, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""How far apart rounding may bring the outputs, relative to the largest, by the types of a model's numbers."""


class OutputsDiffer(RuntimeError):
    """The outputs of two models are not the same. The message says how far they are apart."""


class Outputs(NamedTuple):
    """What two models give for the same inputs.

    Attributes:
        expected: The outputs of the original, by where they are: float64 or complex128, or what is not numbers.
        found: Those of the other model.
        dtypes: The types of the original's parameters and outputs, such as `"float32"`; others are ignored.
        explained: Whether rounding is known to explain any difference, because the parts of the models are the same.
        notes: What has to be said of these outputs, such as which of them could not be compared.
    """

    expected: Mapping[str, NDArray[Any]]
    found: Mapping[str, NDArray[Any]]
    dtypes: Iterable[str]
    explained: bool = False
    notes: tuple[str, ...] = ()


def compare(outputs: Outputs) -> float | None:
    """The largest difference between the outputs of two models, each relative to its own largest value.

    Args:
        outputs: Of both models.

    Returns:
        The difference; None if there are no outputs to compare.

    Raises:
        OutputsDiffer: If rounding does not explain the difference, or if the outputs are not of the same shapes.
    """
    expected, found, dtypes, explained, _ = outputs
    shapes, new_shapes = ({path: y.shape for path, y in of.items()} for of in (expected, found))
    if shapes != new_shapes:
        raise OutputsDiffer(f"the folded model's outputs are not of the same shapes: {new_shapes}, not {shapes}")
    error = max((difference(y, found[path]) for path, y in expected.items()), default=None)
    limit = rounding(dtypes)
    if error is not None and not explained and not error <= limit:
        raise OutputsDiffer(
            f"the folded model's outputs differ by {error:.1e} of the largest, where rounding explains {limit:.1e}: "
            f"this model does something that its graph does not show, and must not be folded"
        )
    return error


def rounding(dtypes: Iterable[str]) -> float:
    """How far apart the outputs of a model may be for rounding: the coarsest of its types decides."""
    return max((ROUNDING[dtype] for dtype in dtypes if dtype in ROUNDING), default=min(ROUNDING.values()))


def difference(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """The largest difference between two arrays, relative to the largest finite value that is expected.

    Args:
        expected: Numbers of any type; NaN and infinity are expected where they are.
        found: The same, from the other model.

    Returns:
        The difference; infinity if the shapes are not the same, or if a number is not finite where the other array has
        another one. What is not numbers, such as strings, is either equal, which is 0, or not, which is infinity.
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
"""How many times as far as one more rounding of all weights moves it an output may be off for rounding."""


def is_noise(outputs: Outputs, rounded: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the original itself is as inexact as the outputs are apart: in some, the last digit of a weight counts.

    Args:
        outputs: Of both models, of the same shapes.
        rounded: What the original gives if each of its weights is rounded once more.
    """
    limit = rounding(outputs.dtypes)
    return all(
        difference(y, outputs.found[path]) <= max(limit, MARGIN * difference(y, rounded[path]))
        for path, y in outputs.expected.items()
    )
