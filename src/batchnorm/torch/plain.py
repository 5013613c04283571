"""The plain call, which nearly every layer makes in nearly every step, in as few operations of Python as possible.

Such a call has ordinary tensors and no mask. It normalizes by the batch's own statistics, or in evaluation by the
running ones, and PyTorch runs it at once, outside of a backward pass. Then it is known what the table of routes would
choose: PyTorch's operation for small tensors on the CPU, our kernels for others. Both are reached here directly. For a
small tensor, the checks that end in this choice would take longer than the rest, and calls of short functions would,
too. On a GPU, the host must start the kernels faster than they run.

Whatever is unusual or wrong makes `compute` return None before anything has changed. The general way, through the
sources of statistics and the routes, then computes the call, or says what is wrong.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.torch import cards, cpu, function, gpu, native, recipes, routes
from batchnorm.torch.activations import Activation, parsed, resolve
from batchnorm.torch.call import PLAIN, Call, Plan
from batchnorm.torch.running import Running

__all__ = ["compute"]

_C = torch._C
MISSING: Any = object()
"""What a layer does not keep in its own dictionary: a subclass may compute it."""


def compute(layer: Any, x: Tensor, residual: Tensor | None, activation: Activation) -> Tensor | None:
    """Compute a plain call of a layer.

    Args:
        layer: The layer. In training its running statistics move.
        x: `(N, C, *spatial)`.
        residual: Like `x`.
        activation: As in `batch_norm`.

    Returns:
        `y`. None, with nothing changed, if the call is not plain.
    """
    own = layer.__dict__
    training, momentum, eps = own.get("training"), own.get("momentum"), own.get("eps")
    if (
        torch.compiler.is_compiling()
        or _C._are_functorch_transforms_active()
        or _C._is_tracing()
        or _C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or _C._current_graph_task_id() != -1
        or routes.allowed is not None
        or type(training) is not bool
        or (training and (own.get("statistics", MISSING) is not None or not own.get("track_running_stats")))
        or (training and type(momentum) is not float)
        or type(eps) is not float
        or not eps > 0
        or type(x) not in PLAIN
        or x.layout is not torch.strided
        or x.is_nested
        or x.dim() < 2
    ):
        return None
    stages: Any = cpu if x.is_cpu else gpu
    dtype, device = x.dtype, x.device
    if dtype not in stages.DTYPES or (stages is gpu and not gpu.is_available(device)):
        return None
    parameters, buffers, channels, size = own["_parameters"], own["_buffers"], x.shape[1], x.numel()
    mean, var, batches = buffers.get("running_mean"), buffers.get("running_var"), buffers.get("num_batches_tracked")
    skipped = own.get("num_batches_skipped")
    weight, bias, shape = parameters.get("weight"), parameters.get("bias"), (channels,)
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    for t in mean, var, weight, bias:
        if type(t) not in PLAIN or t.dtype is not exact or t.shape != shape or t.device != device:
            return None
    if (
        size == 0
        or (training and size < 2 * channels)
        or not (mean.is_contiguous() and var.is_contiguous())
        or (mean.requires_grad or var.requires_grad or mean.is_inference() or var.is_inference())
        or (mean.is_neg() or var.is_neg() or mean.data_ptr() == 0 or var.data_ptr() == 0)  # or without memory
        or not (type(batches) is Tensor and batches.dtype is torch.int64 and batches.device == device)
        or batches.is_inference()
        or not (type(skipped) is Tensor and skipped.dtype is torch.int64 and skipped.device == device)
        or (residual is not None and not _is_like(x, residual))
        or (stages is gpu and not (gpu.takes(x) and size >= cards.smallest(device)))
    ):
        return None
    layer._check_input_dim(x)
    named, then = (parsed(activation), None) if type(activation) is str else resolve(activation)
    small = stages is cpu and dtype is exact and (size < routes.SMALL or routes.is_small(x, training))
    if small and 1 in x.shape and not x.is_contiguous():
        return None
    saves = layer.save_memory and torch.is_grad_enabled() and recipes.pays(x)
    y: Tensor | None = None
    if small:
        if saves:
            return None
        in_place = not torch.is_grad_enabled()
        if training:
            y = native.by_batch(x, weight, bias, (mean, var), momentum, batches, eps)
        else:
            y = native.by_constants(x, weight, bias, mean, var, eps)
        if y is not None:
            y = native.follow(y, residual, *named, in_place)
    if y is None:
        call = Call(x, weight, bias, residual, None, eps, named, True, exact)
        if training:
            count, running = float(size // channels), Running(mean, var, momentum, batches, skipped)
            how = function.How(stages, Plan(count), count, None, eps, named, running)
        else:
            how = function.How(stages, Plan(math.inf, (mean, var)), math.inf, None, eps, named)
        with recipes.wanted() if saves else nullcontext():
            y, _ = function.run(call, how)
    return y if then is None else then(y)


def _is_like(x: Tensor, residual: Tensor) -> bool:
    return (
        type(residual) in PLAIN
        and residual.dtype is x.dtype
        and residual.shape == x.shape
        and residual.device == x.device
    )
