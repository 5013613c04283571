"""What `fold` gives back, for every kind of model, and how it compares outputs."""

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Folded", "difference"]

Model = TypeVar("Model")


@dataclass(frozen=True)
class Folded(Generic[Model]):
    """A model whose batch normalizations have gone into the layers beside them, and what became of each.

    Attributes:
        model: The new model; the one that was given is as it was.
        folded: What each normalization went into: the names of layers, in the order in which they run.
        skipped: Why each of the others is still there.
        max_error: The largest difference between the outputs of the two models on the example inputs, relative to the
            largest output; None without example inputs.
    """

    model: Model
    folded: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    max_error: float | None = None

    def __str__(self) -> str:
        """All of it but the model, to read."""
        lines = [f"{len(self.folded)} of {len(self.folded) + len(self.skipped)} batch normalizations folded"]
        if self.max_error is not None:
            lines[0] += f"; outputs differ by {self.max_error:.1e} of the largest at most"
        lines += [f"  {name} -> {into}" for name, into in self.folded.items()]
        lines += [f"  {name} stays: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def difference(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """The largest difference of two arrays, relative to the largest finite value that is expected.

    Args:
        expected: Numbers, float64 or complex; NaN and infinity are expected where they are.
        found: Of the same shape.

    Returns:
        The difference; infinity if one of them is not finite where the other is another value.
    """
    same = (expected == found) | (np.isnan(expected) & np.isnan(found))
    with np.errstate(invalid="ignore"):
        apart = np.nan_to_num(np.abs(expected - found), nan=np.inf, posinf=np.inf)
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    return float(apart[~same].max(initial=0.0) / (largest or 1.0))
