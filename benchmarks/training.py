"""Whole models before and after `convert`: a training step, and forward in evaluation."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from batchnorm.bench.clock import Candidate, Record, interleave, records
from batchnorm.torch.allocator import reuse_memory
from benchmarks.networks import QUICK, stepper, subjects

NORMALIZATION = re.compile(r"batch_?norm|relu|threshold_backward|hardtanh|clamp|silu", re.IGNORECASE)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the output of the profiler's library, which bypasses Python, off the terminal."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def share(step: Callable[[], object]) -> float:
    """The share of normalizations and activations in the time of a step, by PyTorch's profiler."""
    with _silence(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = profiled.key_averages()
    times = {event.key: float(event.self_cpu_time_total) for event in events}
    return sum(time for key, time in times.items() if NORMALIZATION.search(key)) / sum(times.values())


def steps(seconds: float, quick: bool) -> Iterator[list[Record]]:
    """The records of a training step of each model in each layout."""
    for subject in subjects():
        [(x, target)] = subject.data(subject.shape(*QUICK if quick else ()))
        pair = subject.pair().items()
        candidates: dict[str, Candidate] = {name: partial(stepper(model), x, target) for name, model in pair}
        found = records(interleave(candidates, seconds))
        for record in found:
            record["share"] = round(share(candidates[record["candidate"]]), 3)
        reuse_memory()
        try:
            reused = {f"{name}, reused": step for name, step in candidates.items()}
            found += records(interleave(reused, seconds / 2), unit="eager, reused")
        finally:
            reuse_memory(False)
        yield [subject.about(x.shape) | record for record in found]


def forward(seconds: float, quick: bool) -> Iterator[list[Record]]:
    """The records of forward in evaluation of each model."""
    for subject in subjects():
        [(x, _)] = subject.data(subject.shape(*QUICK if quick else ()))
        pair = subject.pair().items()
        candidates: dict[str, Candidate] = {name: partial(model.eval(), x) for name, model in pair}
        with torch.no_grad():
            found = records(interleave(candidates, seconds))
        yield [subject.about(x.shape) | record for record in found]
