"""PyTorch's own operation, `torch.batch_norm`, and the activation after it."""

import ctypes
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from batchnorm.kernels import whole
from batchnorm.torch import cpu, recipes
from batchnorm.torch.activations import ACTIVATIONS
from batchnorm.torch.call import Batch, Call, Outcome, Plan, is_recorded, is_tracing
from batchnorm.torch.recomputation import unseen
from batchnorm.torch.running import Running

__all__ = ["LIMITS", "compute", "exactly", "takes"]

NEAR = 8.0
"""The distance of a mean from 0, in standard deviations, up to which PyTorch's operation on the CPU is as exact as our
kernels: values are as far from their mean, too."""

LIMITS = {torch.float32: np.float32(NEAR), torch.float64: np.float64(NEAR)}
"""The same in each type that it computes as exactly."""


def takes(call: Call, plan: Plan) -> bool:
    """Whether PyTorch's operation gives the same result."""
    x = call.x
    if call.counts is not None or plan.parts is not None or plan.group is not None or plan.adjust is not None:
        return False
    if (not isinstance(plan.count, Tensor) and plan.count == 0) or (
        call.residual is not None and call.residual.dtype is not x.dtype
    ):
        return False
    if not call.is_eager and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    # On the CPU, if the stride of an axis of length 1 hides a channels-last layout, the gradient is wrong (2.13).
    return not x.is_cpu or x.is_contiguous() or is_tracing() or 1 not in x.shape


def compute(call: Call, plan: Plan, running: Running, *, strict: bool = False) -> Outcome | None:
    """Compute a call without a mask, by the statistics of the batch or by constants.

    On the CPU, PyTorch computes `x*scale + shift` with `shift = bias - mean*scale`, whose rounding error grows with
    `mean / std`. Where that would cost accuracy, and for values that are not finite or so large that PyTorch's variance
    is not, a strict call returns None and changes nothing.
    """
    eager = call.is_eager and call.x.is_cpu and not call.x.is_mkldnn
    if plan.constants is not None:
        mean, var = plan.constants
        if strict and eager and not _is_near(mean, var, call.eps):
            return None
        if torch.is_grad_enabled() and (call.is_eager or not is_recorded()):
            # Copies: a later batch changes the running statistics, and the backward pass must not see that.
            mean, var = mean.clone(), var.clone()
        return Outcome(_follow(call, _batch_norm(call, mean, var, False, 0.0), (mean, var)))
    if eager and call.x.dtype is call.arithmetic:
        return _compute_eagerly(call, plan, running, strict)
    if running.mean is None or running.var is None:
        return Outcome(_follow(call, _batch_norm(call, None, None, True, 0.0)))
    batch = _of_momentum_one(call, plan)
    return Outcome(_follow(call, _batch_norm(call, batch.mean, batch.var, True, 1.0)), batch)


def _compute_eagerly(call: Call, plan: Plan, running: Running, strict: bool) -> Outcome | None:
    """By the statistics of the batch, which PyTorch returns on the CPU: so it can be asked how exact it was."""
    if strict and (running.mean is None or (plan.unbiased and cpu.can_move(running, call.x, plan))):
        found = exactly(call.x, call.weight, call.bias, running, call.eps)
        return None if found is None else Outcome(_follow(call, found))
    batch = None if running.mean is None else _of_momentum_one(call, plan)
    mean, var = (None, None) if batch is None else (batch.mean, batch.var)
    z, batch_mean, rstd = torch.native_batch_norm(call.x, call.weight, call.bias, mean, var, True, 1.0, call.eps)
    return None if strict and not _was_near(batch_mean, rstd) else Outcome(_follow(call, z), batch)


def exactly(x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running, eps: float) -> Tensor | None:
    """PyTorch's operation on a CPU tensor, by the statistics of the batch; it moves the running ones that `can_move`.

    None, and nothing is moved, if the kernels are more exact, or if a statistic of the batch is not finite.
    """
    mean, var = running.mean, running.var
    if mean is None or var is None:
        z, batch_mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        return z if _was_near(batch_mean, rstd) else None
    mean_at, var_at, size = mean.data_ptr(), var.data_ptr(), mean.nbytes
    old_mean, old_var = ctypes.string_at(mean_at, size), ctypes.string_at(var_at, size)
    z, batch_mean, rstd = torch.native_batch_norm(x, weight, bias, mean, var, True, float(running.rate()), eps)
    if not _was_near(batch_mean, rstd):
        ctypes.memmove(mean_at, old_mean, size)
        ctypes.memmove(var_at, old_var, size)
        return None
    running.note(True)
    return z


def _of_momentum_one(call: Call, plan: Plan) -> Batch:
    """What PyTorch will turn into the statistics of the batch: running ones, which move with momentum 1."""
    with nullcontext() if call.is_eager or torch.compiler.is_compiling() else unseen():
        moments = call.x.new_zeros((2, call.x.shape[1]), dtype=call.arithmetic, layout=torch.strided)
    return Batch.of(moments, plan.count, is_unbiased=True)


def _is_near(mean: Tensor, var: Tensor, eps: float) -> bool:
    """Whether `|mean| <= NEAR * sqrt(var + eps)` in every channel."""
    return mean.numel() == 0 or bool(torch.addcmul(var, mean, mean, value=-1 / NEAR**2).min() >= -eps)


def _was_near(mean: Tensor, rstd: Tensor) -> bool:
    """Whether `|mean| * rstd <= NEAR` in every channel, and no variance was infinite."""
    return whole.is_near(mean.data_ptr(), rstd.data_ptr(), mean.numel(), LIMITS[mean.dtype])


def _batch_norm(call: Call, mean: Tensor | None, var: Tensor | None, training: bool, momentum: float) -> Tensor:
    x, weight, bias = call.x, call.weight, call.bias
    if x.dtype is not call.arithmetic:
        given = [weight, bias, mean, var]
        if len({t.dtype for t in given if t is not None}) > 1:  # they must have one type
            weight, bias, mean, var = (None if t is None else t.to(call.arithmetic) for t in given)
    cudnn = not x.is_cpu and torch.backends.cudnn.enabled
    return torch.batch_norm(x, weight, bias, mean, var, training, momentum, call.eps, cudnn)


def _follow(call: Call, z: Tensor, constants: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:
    """Add the residual and apply the activation; in place where nothing else uses `z`."""
    name, parameter = call.activation
    if (found := recipes.active(z)) is not None and z.requires_grad:
        return _follow_and_note(found, call, z, constants)
    if torch.is_grad_enabled() or not call.is_eager:
        z = z if call.residual is None else z + call.residual
    else:
        z = z if call.residual is None else z.add_(call.residual)
        if name == "relu":
            return torch.relu_(z)
    y: Tensor = ACTIVATIONS[name](z, parameter)
    return y


def _follow_and_note(
    found: recipes.Recipes, call: Call, z: Tensor, constants: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """`_follow`, with a recipe for each value on the way: PyTorch keeps that before or after the activation."""
    weight, bias = (None if t is None else t.detach().clone() for t in (call.weight, call.bias))
    bare = call._replace(weight=weight, bias=bias, x=call.x.new_empty(0), residual=None)
    name, parameter = call.activation

    def normalize(x: Tensor) -> Tensor:
        return _batch_norm(bare._replace(x=x), *constants, constants[0] is None, 0.0)

    def activate(z: Tensor) -> Tensor:
        y: Tensor = ACTIVATIONS[name](z, parameter)
        return y

    noted = found.note(z, normalize, call.x)
    if call.residual is not None:
        before, z = z, z + call.residual
        noted = noted and found.note(z, torch.add, before, call.residual)
    if name == "none" or not noted:
        return activate(z)
    with found.expecting(activate, z):
        y = activate(z)
    found.note(y, activate, z)
    return y
