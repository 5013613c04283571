"""The cost of other sources of statistics: forward + backward of a layer, against the statistics of the batch."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import batchnorm.torch as bt
from batchnorm.bench.cases import CASES, Case
from batchnorm.bench.clock import Candidate, Record, interleave, records

VARIANT_CASES = [
    case for case in CASES if case.group == "network" and case.activation == "relu" and not case.residual
    and len(case.shape) == 4
]  # fmt: skip


def candidates(case: Case) -> dict[str, Candidate]:
    """The functions to time for a case, by name."""
    samples, channels = case.shape[:2]
    x, dy = case.tensor().requires_grad_(), case.tensor()
    mask = torch.rand(samples, *case.shape[2:]) > 0.2

    def layer(statistics: Any = None) -> bt.BatchNorm2d:
        return bt.BatchNorm2d(channels, activation="relu", statistics=statistics)

    def step(layer: bt.BatchNorm2d, mask: Tensor | None = None) -> None:
        x.grad = None
        layer(x, mask=mask).backward(dy)

    return {
        "batch": partial(step, layer()),
        "ghost, 4 groups": partial(step, layer(bt.GhostStatistics(max(1, samples // 4)))),
        "renorm": partial(step, layer(bt.Renorm(warmup_steps=0))),
        "running": partial(step, layer(bt.RunningStatistics())),
        "mask": partial(step, layer(), mask),
    }


def run(seconds: float, quick: bool) -> Iterator[list[Record]]:
    """The records of each case."""
    for case in VARIANT_CASES[-2:] if quick else VARIANT_CASES:
        about = {"case": case.name, "layout": case.layout, "large": int(case.large)}
        yield [about | record for record in records(interleave(candidates(case), seconds), unit="batch")]
