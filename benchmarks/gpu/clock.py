"""How long work takes on a GPU: in replays of a CUDA graph, which leave out the host, and on the wall, with it."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

__all__ = ["copy_bandwidth", "replayed", "sets", "stream", "wall", "walled"]

Call = Callable[[], Any]
GRAPH_US = 1000.0
"""Microseconds that a replay should take at least: the start of a graph costs some ten."""
MOST = 400
"""Calls in a graph, at most."""


@contextmanager
def stream(device: torch.device) -> Iterator[None]:
    """A stream of its own, on which graphs can be captured: autograd runs a backward pass on the stream of its forward.

    On the CPU there is nothing to do.
    """
    if device.type != "cuda":
        yield
        return
    own = torch.cuda.Stream()
    own.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(own):
        yield
    torch.cuda.synchronize()


def sets(device: torch.device, tensor_bytes: int, tensors: int) -> int:
    """How many sets of tensors to rotate among, so that none is found in the L2 cache: three times its size."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(100, -(-3 * cache // (tensor_bytes * tensors))))


def replayed(calls: Sequence[Call], device: torch.device, seconds: float = 0.03, count: int = 0) -> tuple[float, int]:
    """Microseconds of a call, as the median of replays, and how many calls a replay has.

    Args:
        calls: The same work on different tensors; they take turns.
        device: Where.
        seconds: How long to replay.
        count: Calls of a replay, if known; else as many as take a millisecond.
    """
    for call in calls[:2]:
        call()
    if device.type != "cuda":
        return wall(calls, device, 2), len(calls)
    if count:
        return _replay(calls, count, seconds), count
    count = max(len(calls), min(MOST, 10))
    found = _replay(calls, count, 0.0)
    if found * count < GRAPH_US and count < MOST:
        count = min(MOST, int(GRAPH_US / found) + 1)
        found = _replay(calls, count, seconds)
    elif seconds:
        found = _replay(calls, count, seconds)
    return found, count


def _replay(calls: Sequence[Call], count: int, seconds: float) -> float:
    graph = torch.cuda.CUDAGraph()
    # Outputs are kept for a round: freed at once, the next call would write where the cache still has the last one's.
    outputs: deque[Any] = deque(maxlen=len(calls))
    torch.cuda.synchronize()
    graph.capture_begin()
    try:
        for i in range(count):
            outputs.append(calls[i % len(calls)]())
    finally:
        graph.capture_end()
    outputs.clear()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 4 or (time.perf_counter() < until and len(times) < 200):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times[1:]) * 1e3 / count


def wall(calls: Sequence[Call], device: torch.device, iterations: int, rounds: int = 1) -> float:
    """Microseconds of a call as the host sees it: the median of rounds, each without a wait inside."""
    found = []
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        for i in range(iterations):
            calls[i % len(calls)]()
        end = time.perf_counter()
        _wait(device)
        found.append((end - start) / iterations * 1e6)
    return median(found)


def walled(calls: Sequence[Call], device: torch.device, iterations: int) -> float:
    """Microseconds of a call until the device has done it too, of many called one right after the other."""
    _wait(device)
    start = time.perf_counter()
    for i in range(iterations):
        calls[i % len(calls)]()
    _wait(device)
    return (time.perf_counter() - start) / iterations * 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device: torch.device, size: int, seconds: float = 0.05) -> float:
    """Bytes per second that a copy of `size` bytes of random numbers reads and writes."""
    pairs = []
    for _ in range(sets(device, size, 2)):
        source = torch.randn(size // 2, device=device, dtype=torch.bfloat16)
        pairs.append((torch.empty_like(source), source))
    calls = [lambda pair=pair: _copy(*pair) for pair in pairs]
    found, _ = replayed(calls, device, seconds)
    return 2 * size / found * 1e6


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
