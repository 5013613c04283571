"""Interleaved timing: every candidate runs once per round, so that a busy moment of the machine affects all of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["Candidate", "Record", "Samples", "interleave", "records"]

Candidate = Callable[[], object]
Samples = dict[str, Any]
"""The seconds of each call: one array per candidate."""
Record = dict[str, Any]
"""A row of a table, by column."""

FEWEST, MOST = 7, 2000
"""The smallest number of rounds, for a meaningful median, and the largest, so that fast cases end."""


def interleave(candidates: Mapping[str, Candidate], seconds: float, fewest: int = FEWEST) -> Samples:
    """Time the candidates, after two warm-up calls of each.

    Each round starts with another candidate, so that none always runs after the same one.

    Args:
        candidates: The functions to call, by name.
        seconds: The time for all candidates together.
        fewest: The smallest number of rounds, however long they take.

    Returns:
        The seconds of each call, the same number for every candidate.
    """
    for candidate in candidates.values():
        candidate()
        candidate()
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(MOST):
        if done >= fewest and time.perf_counter() - start >= seconds:
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            candidate = candidates[name]
            before = time.perf_counter()
            candidate()
            samples[name].append(time.perf_counter() - before)
    return {name: np.array(times) for name, times in samples.items()}


def records(samples: Samples, unit: str = "eager") -> list[Record]:
    """A record per candidate: median, 10% and 90% quantiles in microseconds, and its time in units of `unit`."""
    found = []
    for name, times in samples.items():
        low, median, high = np.quantile(times, [0.1, 0.5, 0.9]).tolist()
        found.append(
            {
                "candidate": name,
                "rounds": len(times),
                "median_us": round(median * 1e6, 2),
                "q10_us": round(low * 1e6, 2),
                "q90_us": round(high * 1e6, 2),
                f"speedup_over_{unit}": round(float(np.median(samples[unit])) / median, 3),
            }
        )
    return found
