"""The stages on CPU tensors: Numba's kernels. NumPy is in this file only."""

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import launch, threads
from batchnorm.torch.call import Call

__all__ = [
    "DTYPES",
    "MOVES_RUNNING",
    "STATISTICS",
    "TAKES_GROUPS",
    "backward",
    "forward",
    "grad_input",
    "grad_sums",
    "moments",
    "normalize",
    "tables",
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""The types that the kernels know."""

STATISTICS = torch.float64
"""The type of means, variances and sums."""

TAKES_GROUPS = False
"""Whether one call does all groups of samples."""

MOVES_RUNNING = False
"""Whether `forward` moves the running statistics."""

threads.follow(torch.get_num_threads)


def _on_tensors(kernel: Any) -> Any:
    """A kernel that takes tensors where the one given takes arrays."""

    def on_tensors(*arguments: Any) -> None:
        kernel(*(_array(argument) if isinstance(argument, Tensor) else argument for argument in arguments))

    on_tensors.__doc__ = f"`kernels.launch.{kernel.__name__}` of tensors."
    return on_tensors


def _array(t: Tensor) -> Any:
    """The tensor's memory as kernels take it."""
    return t.view(torch.uint16).numpy() if t.dtype is torch.bfloat16 else t.numpy()


def tables(call: Call, kept: bool) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias as kernels take them.

    They are copies. So a later change of the bias, which PyTorch allows before the backward pass, does no harm; and
    nothing holds on to the memory of a parameter, which sharding wants to free.
    """
    weight, bias = call.weight, call.bias
    return (
        None if weight is None else weight.detach().to(call.arithmetic, copy=True),
        None if bias is None else bias.detach().to(call.arithmetic, copy=True),
    )


moments = _on_tensors(launch.moments)
normalize = _on_tensors(launch.normalize)
forward = _on_tensors(launch.forward)
grad_sums = _on_tensors(launch.grad_sums)
_grad_input = _on_tensors(launch.grad_input)
_backward = _on_tensors(launch.backward)


def grad_input(*arguments: Any) -> None:
    """`kernels.launch.grad_input` of tensors; the last two, `dx` and `d_residual`, may be None."""
    *given, dx, d_residual = arguments
    _grad_input(*given, *_all_written(given, dx, d_residual))


def backward(*arguments: Any) -> None:
    """`kernels.launch.backward` of tensors; the last two, `dx` and `d_residual`, may be None."""
    *given, dx, d_residual = arguments
    if dx is None and d_residual is None:
        dy, x, residual, _, *numbers, _, activation, sum_dz, sum_dz_xhat = given
        grad_sums(dy, x, residual, *numbers, activation, sum_dz, sum_dz_xhat)
    else:
        _backward(*given, *_all_written(given, dx, d_residual))


def _all_written(given: list[Any], dx: Tensor | None, d_residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Memory for both gradients where there is a residual: kernels write all or nothing."""
    x, residual = given[1:3]
    return (
        torch.empty_like(x) if dx is None else dx,
        torch.empty_like(x) if d_residual is None and residual is not None else d_residual,
    )
