"""Interleaved timing: every candidate runs once a round, so that a busy moment of the machine falls on all of them."""

import time
from collections.abc import Callable, Mapping

import numpy as np


def interleave(
    candidates: Mapping[str, Callable[[], object]], seconds: float, rounds: int = 0
) -> dict[str, np.ndarray]:
    """Seconds of each call of each candidate: `rounds`, or as many as fit into `seconds` (7 at least, 500 at most)."""
    for candidate in candidates.values():
        candidate()
        candidate()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    done = 0
    while done < (rounds or 7) or (not rounds and done < 500 and time.perf_counter() - start < seconds):
        for name, candidate in candidates.items():
            before = time.perf_counter()
            candidate()
            samples[name].append(time.perf_counter() - before)
        done += 1
    return {name: np.array(times) for name, times in samples.items()}
