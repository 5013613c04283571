"""The stages on GPU tensors: Triton's kernels, imported when they are first needed."""

import functools
from typing import Any

import torch
from torch import Tensor

from batchnorm.torch.call import Call
from batchnorm.torch.running import Running

__all__ = [
    "DTYPES",
    "MOVES_RUNNING",
    "STATISTICS",
    "TAKES_GROUPS",
    "backward",
    "forward",
    "grad_input",
    "grad_sums",
    "is_available",
    "moments",
    "normalize",
    "tables",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The types that the kernels know."""

STATISTICS = torch.float32
"""The type of means, variances and sums."""

TAKES_GROUPS = True
"""Whether one call does all groups of samples."""

MOVES_RUNNING = True
"""Whether `forward` moves the running statistics."""

OLDEST = 8, 0
"""The oldest compute capability that the kernels are for: Ampere."""


@functools.cache
def is_available(device: torch.device) -> bool:
    """Whether the kernels run on this device: an NVIDIA GPU, with Triton installed."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < OLDEST:
        return False
    try:
        _kernels()
    except ImportError:
        return False
    return True


@functools.cache
def _kernels() -> Any:
    from batchnorm.kernels import gpu

    return gpu


def tables(call: Call, kept: bool) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias as kernels take them.

    A bias that is kept for the backward pass is copied, since PyTorch allows it to change before that.
    """
    bias = call.bias
    if kept and bias is not None and call.activation[0] != "none":
        bias = bias.detach().clone()
    return call.weight, bias


def moments(*arguments: Any) -> None:
    """`kernels.gpu.moments`."""
    _kernels().moments(*arguments)


def normalize(*arguments: Any) -> None:
    """`kernels.gpu.normalize`."""
    _kernels().normalize(*arguments)


def forward(*arguments: Any, running: Running | None = None, unbiased: bool = True, **groups: int) -> None:
    """`kernels.gpu.forward`, which moves the running statistics and counts the batch."""
    kernels, moved = _kernels(), None
    if running is not None:
        rate = 0.0 if running.momentum is None and running.batches is None else running.momentum
        moved = kernels.Running(running.mean, running.var, rate, unbiased, running.batches, running.skipped)
        torch.autograd.graph.increment_version((running.mean, running.var))  # type: ignore[arg-type]
    kernels.forward(*arguments, running=moved, **groups)


def grad_sums(*arguments: Any) -> None:
    """`kernels.gpu.grad_sums`."""
    _kernels().grad_sums(*arguments)


def grad_input(*arguments: Any) -> None:
    """`kernels.gpu.grad_input`."""
    _kernels().grad_input(*arguments)


def backward(*arguments: Any, **groups: int) -> None:
    """`kernels.gpu.backward`."""
    _kernels().backward(*arguments, **groups)
