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

    The orders of the rounds are balanced, because a candidate finds the caches, the memory and the threads as the one
    before has left them: within the rounds of a whole cycle of orders, it runs after each of the others equally often.
    What comes first in a round, and a cycle that time cuts short, are not balanced.

    Args:
        candidates: The functions to call, by name.
        seconds: The time for all candidates together.
        fewest: The smallest number of rounds, however long they take.

    Returns:
        The seconds of each call, the same number for every candidate.

    Source: Williams 1949, "Experimental designs balanced for the estimation of residual effects of treatments".
    """
    for candidate in candidates.values():
        candidate()
        candidate()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    orders = _orders(list(candidates))
    start = time.perf_counter()
    for done in range(MOST):
        if done >= fewest and time.perf_counter() - start >= seconds:
            break
        for name in orders[done % len(orders)]:
            candidate = candidates[name]
            before = time.perf_counter()
            candidate()
            samples[name].append(time.perf_counter() - before)
    return {name: np.array(times) for name, times in samples.items()}


def _orders(names: list[str]) -> list[list[str]]:
    """Orders in which each name comes right after each of the others equally often.

    The first is a zigzag, 0, 1, n-1, 2, n-2, ..., in which no two steps are alike; the others are it moved on by 1, 2,
    ..., and for an odd number of names also all of them reversed.
    """
    n = len(names)
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(n)]
    orders = [[names[(i + start) % n] for i in zigzag] for start in range(n)]
    return orders + [order[::-1] for order in orders] if n % 2 else orders


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
