"""Batch normalizations among the tensors of a PyTorch model, by the names in its state dict."""

from collections.abc import Mapping
from typing import Any

from batchnorm.whole.evidence import State

__all__ = ["is_part", "states"]

PARTS = ("running_mean", "running_var", "weight", "bias", "num_batches_tracked")


def is_part(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor may be part of a batch normalization."""
    return len(shape) <= 1 and name.rpartition(".")[2] in PARTS


def states(tensors: Mapping[str, Any]) -> list[State]:
    """The batch normalizations: all that have a running mean and a running variance.

    A state dict does not contain eps and momentum, so PyTorch's defaults are assumed.

    Args:
        tensors: float64 arrays by name, all for which `is_part` holds.
    """
    found = []
    for name, mean in tensors.items():
        prefix, _, part = name.rpartition(".")
        if part != "running_mean":
            continue

        def get(part: str, prefix: str = prefix) -> Any:
            return tensors.get(f"{prefix}.{part}" if prefix else part)

        var, weight, bias, batches = (get(part) for part in PARTS[1:])
        if var is None or mean.ndim != 1 or mean.shape != var.shape:
            continue
        at = f"model.get_submodule({prefix!r})" if prefix else "model"
        weight, bias = (None if t is None or t.shape != mean.shape else t for t in (weight, bias))
        found.append(
            State(
                prefix,
                at,
                "BatchNorm",
                len(mean),
                mean,
                var,
                weight,
                bias,
                batches=None if batches is None or batches.size != 1 else int(batches.item()),
                learns=None if weight is None and bias is None else True,
            )
        )
    return found
