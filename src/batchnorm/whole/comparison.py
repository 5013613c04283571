"""The outputs of two models on the same inputs: how far are they apart, and does rounding explain it?"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["ROUNDING", "Outputs", "OutputsDiffer", "compare", "difference", "rounding"]

ROUNDING = {"float64": 1e-10, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""How far apart rounding may bring the outputs, relative to the largest, by the types of a model's numbers."""

MARGIN = 10.0
"""How many times as far as one rounding of all weights moves it an output may be off for rounding."""


class OutputsDiffer(RuntimeError):
    """The outputs of two models are not the same. The message says how far they are apart."""


class Outputs(NamedTuple):
    """What two models give for the same inputs.

    Attributes:
        expected: The outputs of the original, by where they are: float64 or complex128, or what is not numbers.
        found: Those of the other model.
        dtypes: The types of the original's parameters and outputs, such as `"float32"`; others are ignored.
        rounded: What the original gives if each of its weights is rounded once more; asked for only where the types do
            not explain the difference.
    """

    expected: Mapping[str, NDArray[Any]]
    found: Mapping[str, NDArray[Any]]
    dtypes: Iterable[str]
    rounded: Callable[[], Mapping[str, NDArray[Any]]] | None = None


def compare(outputs: Outputs) -> float | None:
    """The largest difference between the outputs of two models, each relative to its own largest value.

    Rounding explains what the types of the model say, or `MARGIN` times as much as the same output of the original
    moves when its weights are rounded once more: in some networks the last digit of a weight decides much.

    Args:
        outputs: Of both models.

    Returns:
        The difference; None if there are no outputs to compare.

    Raises:
        OutputsDiffer: If rounding does not explain the difference, or if the outputs are not of the same shapes.
    """
    expected, found, dtypes, rounded = outputs
    shapes, new_shapes = ({path: y.shape for path, y in of.items()} for of in (expected, found))
    if shapes != new_shapes:
        raise OutputsDiffer(f"the folded model's outputs are not of the same shapes: {new_shapes}, not {shapes}")
    errors = {path: difference(y, found[path]) for path, y in expected.items()}
    limits = dict.fromkeys(errors, rounding(dtypes))
    if rounded is not None and any(not error <= limits[path] for path, error in errors.items()):
        limits |= {path: max(limits[path], MARGIN * difference(expected[path], y)) for path, y in rounded().items()}
    for path, error in errors.items():
        if not error <= limits[path]:
            raise OutputsDiffer(
                f"the folded model's outputs differ by {error:.1e} of the largest, where rounding explains "
                f"{limits[path]:.1e}: this model does something that its graph does not show, and must not be folded"
            )
    return max(errors.values(), default=None)


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
        another one. 0 for what is not numbers, such as strings.
    """
    if expected.dtype.kind not in "biufc":
        return 0.0
    if expected.shape != found.shape:
        return float("inf")
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    expected, found = expected.astype(wide), found.astype(wide)
    same = (expected == found) | (np.isnan(expected) & np.isnan(found))
    with np.errstate(invalid="ignore"):
        apart = np.nan_to_num(np.abs(expected - found), nan=np.inf, posinf=np.inf)
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    return float(apart[~same].max(initial=0.0) / (largest or 1.0))
