"""Means, ratios and losses from the records of the layers."""

from collections.abc import Iterable, Sequence
from math import exp, log
from typing import NamedTuple

from batchnorm.bench.clock import Record

__all__ = ["Range", "copies", "losses", "others", "speedups", "summarize"]


class Range(NamedTuple):
    """A summary of the ratios of several cases.

    Attributes:
        mean: The geometric mean.
        low: The lowest ratio.
        high: The highest ratio.
        lowest: The case with the lowest ratio.
        highest: The case with the highest ratio.
    """

    mean: float
    low: float
    high: float
    lowest: str
    highest: str


def summarize(ratios: dict[str, float]) -> Range | None:
    """Summarize ratios by case; None if there are none."""
    if not ratios:
        return None
    lowest, highest = (extreme(ratios, key=lambda name: ratios[name]) for extreme in (min, max))
    mean = exp(sum(log(ratio) for ratio in ratios.values()) / len(ratios))
    return Range(mean, ratios[lowest], ratios[highest], lowest, highest)


def others(records: Iterable[Record]) -> list[str]:
    """The candidates except ours and the copy, which is the unit."""
    names = dict.fromkeys(record["candidate"] for record in records)
    return [name for name in names if name != "copy" and not name.startswith("batchnorm")]


def speedups(
    records: Iterable[Record], over: str = "eager", groups: Sequence[str] = (), ours: str = "batchnorm"
) -> dict[str, float]:
    """The time of `over` divided by that of `ours`, by case, in `groups` (all if empty), where both were timed."""
    times: dict[str, dict[str, float]] = {}
    for record in records:
        if not groups or record["group"] in groups:
            times.setdefault(record["case"], {})[record["candidate"]] = record["median_us"]
    return {case: found[over] / found[ours] for case, found in times.items() if {over, ours} <= set(found)}


def copies(records: Iterable[Record], layout: str, candidate: str = "batchnorm") -> dict[str, float]:
    """The time of large network layers in copies of their tensor, by case."""
    return {
        record["case"]: record["copies"]
        for record in records
        if record["large"] and record["group"] == "network"
        if (record["layout"], record["candidate"]) == (layout, candidate)
    }


def losses(records: Iterable[Record], over: str = "eager") -> dict[str, float]:
    """The cases in which we are slower than `over`, worst first."""
    slower = {case: ratio for case, ratio in speedups(records, over).items() if ratio < 1}
    return dict(sorted(slower.items(), key=lambda item: item[1]))
