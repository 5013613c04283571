"""Where the time of a layer goes: the kernels on memory already in use, on fresh memory, and inside the layer."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from batchnorm.bench import layers
from batchnorm.bench.cases import CASES, Case
from batchnorm.bench.clock import Candidate, Record, interleave, records
from batchnorm.kernels import launch
from batchnorm.torch.allocator import reuse_memory

KERNEL_CASES = [case for case in CASES if case.group == "network" and case.activation == "relu" and not case.residual]


def array(t: torch.Tensor, case: Case) -> np.ndarray:
    """The tensor as the kernels take it: `(N, C, L)`, or `(N*L, C, 1)` for channels last; a view."""
    n, channels = t.shape[:2]
    if case.channels_last:
        return t.movedim(1, -1).view(-1, channels, 1).numpy()
    return t.view(n, channels, -1).numpy()


def candidates(case: Case) -> dict[str, Candidate]:
    """The functions to time for a case, by name."""
    x, dy, y, dx = (case.tensor() for _ in range(4))
    channels, count = x.shape[1], x.numel() / x.shape[1]
    x_array, dy_array = array(x, case), array(dy, case)
    mean, var, rstd, sum_dz, sum_dz_xhat = np.empty((5, channels))
    weight, bias = np.ones(channels, np.float32), np.zeros(channels, np.float32)

    def both(y: Any, dx: Any) -> None:
        launch.forward(x_array, None, None, weight, bias, 1e-5, "relu", y, mean, var, rstd)
        launch.backward(
            dy_array, x_array, None, None, mean, rstd, weight, bias, count, "relu", sum_dz, sum_dz_xhat, dx, None
        )

    whole = layers.candidates(case, "training")
    return {
        "copy": whole["copy"],
        "kernels": partial(both, array(y, case), array(dx, case)),
        "fresh memory": lambda: both(array(torch.empty_like(x), case), array(torch.empty_like(x), case)),
        "layer": whole["batchnorm"],
        "eager": whole["eager"],
    }


def _reused(case: Case, seconds: float) -> list[Record]:
    """The records of the layers where memory is reused."""
    reuse_memory()
    try:
        whole = layers.candidates(case, "training")
        pair = {f"{name}, reused": whole[of] for name, of in (("layer", "batchnorm"), ("eager", "eager"))}
        return records(interleave(pair, seconds / 2), unit="eager, reused")
    finally:
        reuse_memory(False)


def run(seconds: float, quick: bool) -> Iterator[list[Record]]:
    """The records of forward + backward of each layer of real networks."""
    for case in KERNEL_CASES:
        if quick and case.large:
            continue
        found = records(interleave(candidates(case), seconds))
        copy = next(record["median_us"] for record in found if record["candidate"] == "copy")
        if case.large:
            found += _reused(case, seconds)
        about = {"case": case.name, "group": case.group, "layout": case.layout, "large": int(case.large)}
        yield [about | record | {"copies": round(record["median_us"] / copy, 3)} for record in found]
