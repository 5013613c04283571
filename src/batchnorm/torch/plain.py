"""The plain call, which nearly every layer makes in nearly every step, in as few operations of Python as possible.

Such a call has ordinary tensors on the CPU and no mask. It normalizes by the batch's own statistics, and PyTorch runs
it at once, outside of a backward pass. Then it is known what the table of routes would choose: PyTorch's operation for
small tensors, our kernels for others. Both are reached here directly, because the checks that end in this choice would
take longer than a small tensor's computation.

Whatever is unusual or wrong makes `compute` return None before anything has changed. The general way, through the
sources of statistics and the routes, then computes the call, or says what is wrong.
"""

from typing import Any

import torch
from torch import Tensor

from batchnorm.torch import cpu, function, native, recipes, routes
from batchnorm.torch.activations import ACTIVATIONS, resolve
from batchnorm.torch.call import PLAIN, Call, Plan, arithmetic, is_eager
from batchnorm.torch.running import Running

__all__ = ["compute"]


def compute(asked: tuple[Any, ...], running: Running) -> tuple[Tensor, str] | None:
    """Compute a plain call by the statistics of the batch.

    Args:
        asked: The arguments of `Call.of`.
        running: The running statistics. They move.

    Returns:
        `y` and the name of its route. None, with nothing changed, if the call is not plain.
    """
    x, weight, bias, residual, mask, eps, activation = asked
    if type(x) not in PLAIN or mask is not None or not is_eager() or torch._C._current_graph_task_id() != -1:
        return None
    if not x.is_cpu or x.layout is not torch.strided or x.is_nested or x.dtype not in cpu.DTYPES or x.dim() < 2:
        return None
    size, channels = x.numel(), x.shape[1]
    if size <= channels or type(eps) is not float or not eps > 0 or not routes.is_free():
        return None
    if not (_fit(x, channels, weight, bias) and _can_move(x, channels, running)):
        return None
    if residual is not None and not (
        type(residual) in PLAIN and residual.is_cpu and residual.dtype is x.dtype and residual.shape == x.shape
    ):
        return None
    named, then = resolve(activation)
    y: Tensor | None = None
    if x.dtype is not torch.bfloat16 and routes.is_small(x, training=True):
        if residual is not None or recipes.active(x) is not None or (1 in x.shape and not x.is_contiguous()):
            return None
        y, route = native.exactly(x, weight, bias, running, eps), "native"
        if y is not None and named[0] != "none":
            y = torch.relu(y) if named[0] == "relu" else ACTIVATIONS[named[0]](y, named[1])
    if y is None:
        call = Call(x, weight, bias, residual, None, eps, named, True, arithmetic(x.dtype), None)
        y, route = function.compute(cpu, call, Plan(float(size // channels)), running).y, "numba"
    if running.mean is None:
        running.note(True)
    return y if then is None else then(y), route


def _fit(x: Tensor, channels: int, *values: Tensor | None) -> bool:
    """Whether weight and bias are ordinary tensors that fit `x`."""
    for t in values:
        if t is not None and not (
            type(t) in PLAIN
            and t.is_cpu
            and (t.dtype is x.dtype or (t.dtype is torch.float32 and x.dtype is torch.bfloat16))
            and t.shape == (channels,)
        ):
            return False
    return True


def _can_move(x: Tensor, channels: int, running: Running) -> bool:
    """Whether running statistics are ordinary tensors that fit `x` and that a kernel can move."""
    mean, var = running.mean, running.var
    if mean is None or var is None:
        return mean is var
    return (
        _fit(x, channels, mean, var)
        and mean.dtype is var.dtype
        and mean.dtype is not torch.bfloat16
        and mean.is_contiguous()
        and var.is_contiguous()
        and not (mean.requires_grad or var.requires_grad or mean.is_inference() or var.is_inference())
        and type(running.momentum) is float
    )
