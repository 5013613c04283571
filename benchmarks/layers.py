"""Forward + backward of one normalization with its activation: ours, PyTorch's, and a plain copy of the tensor."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

import batchnorm.torch as bt
from benchmarks.cases import LARGE, Case
from benchmarks.clock import interleave

DIMENSIONS = {2: 1, 3: 1, 4: 2, 5: 3}


def _step(layer: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dy: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        for tensor in inputs:
            tensor.grad = None
        layer(*inputs).backward(dy)

    return step


def candidates(case: Case) -> dict[str, Callable[[], object]]:
    """What is timed for a case, by name. `copy` is the unit in which the others are told."""
    dimension, channels = DIMENSIONS[len(case.shape)], case.shape[1]
    x, dy = case.tensor().requires_grad_(), case.tensor()
    inputs = [x, case.tensor().requires_grad_()] if case.residual else [x]
    theirs = getattr(nn, f"BatchNorm{dimension}d")(channels)
    ours = getattr(bt, f"BatchNorm{dimension}d")(channels, activation=case.activation)
    activate = {"relu": torch.relu, "silu": nn.functional.silu, None: lambda z: z}[case.activation]

    def eager(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = theirs(x)
        return activate(y if residual is None else y + residual)

    def batchnorm(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        result: torch.Tensor = ours(x, residual=residual)
        return result

    source, target = x.detach(), torch.empty_like(dy)
    return {
        "copy": lambda: target.copy_(source),
        "eager": _step(eager, inputs, dy),
        "batchnorm": _step(batchnorm, inputs, dy),
    }


def run(cases: Iterable[Case], seconds: float) -> Iterable[dict[str, object]]:
    """A record per case and candidate."""
    for case in cases:
        times = interleave(candidates(case), seconds)
        copy, eager = np.median(times["copy"]), np.median(times["eager"])
        for name, samples in times.items():
            low, median, high = np.quantile(samples, [0.1, 0.5, 0.9])
            yield {
                "benchmark": "layer",
                "case": case.name,
                "where": case.where,
                "large": np.prod(case.shape) >= LARGE,
                "candidate": name,
                "rounds": len(samples),
                "median_us": round(median * 1e6, 1),
                "q10_us": round(low * 1e6, 1),
                "q90_us": round(high * 1e6, 1),
                "copies": round(median / copy, 2),
                "speedup_over_eager": round(eager / median, 2),
            }
