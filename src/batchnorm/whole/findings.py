"""The findings of `diagnose`, and the numbers of a layer that its report plots."""

from dataclasses import dataclass
from typing import Literal, get_args

from batchnorm.whole.evidence import Array

__all__ = ["SEVERITIES", "Finding", "Profile", "Severity"]

Severity = Literal["info", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a layer, or worth knowing.

    Attributes:
        layer: The layer's name; empty if the model itself is the layer.
        check: The name of the check.
        severity: "info" (nothing is wrong), "warning" (it costs accuracy or speed), "error" (evaluation is wrong).
        evidence: What was measured.
        cause: Why it happens, and what follows from it.
        remedy: A line of code that fixes it.
    """

    layer: str
    check: str
    severity: Severity
    evidence: str
    cause: str
    remedy: str


@dataclass(frozen=True)
class Profile:
    """The numbers of a layer, for plots.

    Attributes:
        name: Its name.
        channels: The number of channels.
        gap: The distance between its inputs in evaluation and its running statistics, in standard deviations; None if
            there were no data, or no statistics.
        weight, var: `(C,)`: gamma and the running variance; None where there is none.
        errors: The largest such distance of a channel, in standard errors; None as for `gap`.
    """

    name: str
    channels: int
    gap: float | None
    weight: Array | None
    var: Array | None
    errors: float | None = None
