"""What `calibrate` gives back, for every framework, and how it says how much a layer has changed."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.definition import reciprocal_std

__all__ = ["Calibration", "change", "watched"]

Statistics = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did.

    Attributes:
        samples: How many there were, over all processes; a batch without tensors counts as one.
        changes: How much each layer changed: the largest difference in its normalized output, over its channels, for an
            input one standard deviation from the mean. 0.01 is little, 1 is a standard deviation.
        skipped: Why each of the other layers is as it was.
    """

    samples: int
    changes: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that were calibrated."""
        return tuple(self.changes)

    @property
    def largest(self) -> float:
        """The largest of the changes; 0 without any."""
        return max(self.changes.values(), default=0.0)

    def __str__(self) -> str:
        """To read."""
        lines = [f"{len(self.changes)} layers calibrated on {self.samples} samples"]
        if self.changes:
            name = max(self.changes, key=self.changes.__getitem__)
            lines[0] += f"; the largest change is {self.largest:.2g} standard deviations, in {name}"
        return "\n".join([*lines, *(f"  {name} is as it was: {reason}" for name, reason in self.skipped.items())])


def change(old: Statistics, new: Statistics, eps: float) -> float:
    """How far apart two pairs of mean and variance let the normalized output be: see `Calibration.changes`."""
    (old_mean, old_var), (new_mean, new_var) = old, new
    with np.errstate(all="ignore"):
        old_rstd, new_rstd = reciprocal_std(old_var, eps), reciprocal_std(new_var, eps)
        std = np.sqrt(new_var)
        differences = [np.abs(s * std * new_rstd - (new_mean + s * std - old_mean) * old_rstd) for s in (-1, 1)]
        return float(np.max(np.nan_to_num(differences, nan=np.inf), initial=0.0))


def watched(data: Iterable[Any], what: str, progress: bool) -> Iterator[Any]:
    """The data, with a bar if someone is there to see it."""
    if progress and sys.stderr.isatty() and find_spec("rich"):
        from rich.console import Console
        from rich.progress import track

        try:
            total = len(data)  # type: ignore[arg-type]
        except TypeError:
            total = None
        yield from track(data, what, total=total, console=Console(stderr=True), transient=True)
    else:
        yield from data
