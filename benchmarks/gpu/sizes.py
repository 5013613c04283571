"""From which size on the kernels take less time than PyTorch's operation: a line of the table in `torch/cards.py`."""

from collections.abc import Iterable, Iterator

import batchnorm.torch as bt
from batchnorm.bench.clock import Record
from benchmarks.gpu import layers
from benchmarks.gpu.cases import Layer
from benchmarks.gpu.session import Session

__all__ = ["crossing", "ladder", "sizes"]

SAMPLES = 2, 8, 32, 128
PLANES = (64, 4), (64, 14)
"""Channels and the side of an image."""


def ladder(quick: bool) -> Iterator[Layer]:
    """Layers of 2^11 to 2^20 values in both layouts, the smallest first."""
    planes, samples = (PLANES[:1], SAMPLES[:1]) if quick else (PLANES, SAMPLES)
    shapes = sorted(((n, c, side, side) for c, side in planes for n in samples), key=lambda s: s[0] * s[2])
    for shape in shapes:
        for last in (False, True):
            yield Layer(shape, last)


def sizes(session: Session, bandwidth: float) -> None:
    """Time PyTorch's operation and ours on the ladder, and print the line."""
    records: list[Record] = []
    for layer in ladder(session.quick):
        if session.late():
            session.say(f"out of time: sizes from {layer.name} on left out")
            break
        n, channels, *positions = layer.shape
        values = {"values": n * channels * positions[0] * positions[1]}
        for candidate in ("eager", "batchnorm"):
            with session.attempt(f"{candidate}, {layer.name}"), bt.route("triton" if session.on_gpu else "native"):
                records.append(layers.measure(candidate, layer, session, bandwidth) | values)
    session.add("sizes", records)
    by_gpu, on_the_wall = (crossing(records, column) for column in ("median_us", "wall_us"))
    session.say(f'for torch/cards.py: "{session.sources["gpu"]}": {by_gpu} by GPU time, {on_the_wall} on the wall')


def crossing(records: Iterable[Record], column: str) -> int:
    """The number of values from which on the kernels are nowhere slower; 0 if they are nowhere at all."""
    times: dict[tuple[str, int], dict[str, float]] = {}
    for r in records:
        times.setdefault((r["case"], r["values"]), {})[r["candidate"]] = r[column]
    slower = [
        values
        for (_, values), by in times.items()
        if {"eager", "batchnorm"} <= set(by) and by["batchnorm"] > by["eager"]
    ]
    return max(slower) + 1 if slower else 0
