"""PyTorch's own operation, `torch.batch_norm`, and the activation after it."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import whole
from batchnorm.torch import arrays, cpu, recipes
from batchnorm.torch.activations import ACTIVATIONS, IN_PLACE
from batchnorm.torch.call import Batch, Call, Outcome, Plan, is_plain, is_recorded, is_tracing
from batchnorm.torch.layout import memory_format
from batchnorm.torch.recomputation import unseen
from batchnorm.torch.running import Running

__all__ = ["by_batch", "by_constants", "compute", "follow", "takes"]

NEAR = 8.0
"""The distance of a mean from 0, in standard deviations, up to which PyTorch's operation on the CPU is as exact as our
kernels: values are as far from their mean, too."""


def takes(call: Call, plan: Plan) -> bool:
    """Whether PyTorch's operation gives the same result."""
    x = call.x
    if call.counts is not None or plan.parts is not None or plan.group is not None or plan.adjust is not None:
        return False
    if plan.has_gradients:
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
    asks = strict and eager and call.x.dtype is call.arithmetic
    if asks and (running.mean is None or (plan.unbiased and cpu.can_move(running, call.x, plan))):
        moving = None if running.mean is None or running.var is None else (running.mean, running.var)
        batches = None if moving is None else running.batches  # without statistics, `normalize` counts
        z = by_batch(call.x, call.weight, call.bias, moving, float(running.rate()), batches, call.eps)
        return None if z is None else Outcome(_follow(call, z))
    if running.mean is None or running.var is None:
        return Outcome(_follow(call, _batch_norm(call, None, None, True, 0.0)))
    batch = _of_momentum_one(call, plan)
    z = _batch_norm(call, batch.mean, batch.var, True, 1.0)
    if asks:
        count, places = float(plan.count), (batch.mean.data_ptr(), batch.var.data_ptr())
        stay = 0, 0, cpu.ZERO[batch.mean.dtype], 0.0, 1.0, 0  # `whole.STAY`, for statistics of this type
        if not whole.accept(*places, len(batch.mean), (count - 1) / count, call.eps, NEAR, stay):
            return None
    return Outcome(_follow(call, z), batch)


def by_batch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: tuple[Tensor, Tensor] | None, rate: float,
    batches: Tensor | None, eps: float,
) -> Tensor | None:  # fmt: skip
    """A CPU tensor normalized by its own statistics, towards which the running ones move.

    Args:
        x, weight, bias, eps: As in `Call`.
        running: Running statistics of the type of `x` that `can_move`; None if there are none.
        rate: The weight of the batch in them.
        batches: Their counter of batches; None if there is none.

    Returns:
        None, and nothing has moved, if the kernels are more exact, or if a statistic of the batch is not finite.
    """
    channels = x.shape[1]
    mean, var, mean_at, var_at, like = _local.scratch.get((channels, x.dtype)) or _make_scratch(channels, x.dtype)
    z = torch.batch_norm(x, weight, bias, mean, var, True, 1.0, eps, False)
    count = x.numel() / channels
    mean_, var_ = (0, 0) if running is None else (running[0].data_ptr(), running[1].data_ptr())
    move = mean_, var_, like, rate, 1.0, 0 if batches is None else batches.data_ptr()
    if not whole.accept(mean_at, var_at, channels, (count - 1) / count, eps, NEAR, move):
        del _local.scratch[channels, x.dtype]  # what is not finite would stay in it
        return None
    if running is not None:
        torch._C._increment_version(running if batches is None else (*running, batches))
    return z


class _Local(threading.local):
    """The tensors that PyTorch writes the statistics of a batch to, as running ones that move with momentum 1.

    Each thread has its own, for every number of channels and type: mean, variance, their addresses, and a number of
    their type. Nothing reads them later: autograd keeps them, but does not use them in a backward pass by the
    statistics of a batch.
    """

    def __init__(self) -> None:
        self.scratch: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor, int, int, Any]] = {}


_local = _Local()


def _make_scratch(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int, int, Any]:
    with torch.inference_mode(False):
        mean, var = (torch.zeros(channels, dtype=dtype, device="cpu") for _ in range(2))
    made = mean, var, mean.data_ptr(), var.data_ptr(), cpu.ZERO[dtype]
    _local.scratch[channels, dtype] = made
    return made


def by_constants(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor | None:
    """A CPU tensor normalized by constants, dense ones of its type; None if the kernels are more exact."""
    if not whole.is_near(mean.data_ptr(), var.data_ptr(), x.shape[1], cpu.ZERO[x.dtype], eps, NEAR):
        return None
    if torch.is_grad_enabled():
        # Copies: a later batch changes the running statistics, and the backward pass must not see that.
        mean, var = mean.clone(), var.clone()
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)


def _of_momentum_one(call: Call, plan: Plan) -> Batch:
    """What PyTorch will turn into the statistics of the batch: running ones, which move with momentum 1."""
    with nullcontext() if call.is_eager or torch.compiler.is_compiling() else unseen():
        moments = call.x.new_zeros((2, call.x.shape[1]), dtype=call.arithmetic, layout=torch.strided)
    return Batch.of(moments, plan.count, is_unbiased=True)


def _is_near(mean: Tensor, var: Tensor, eps: float) -> bool:
    """Whether `|mean| <= NEAR * sqrt(var + eps)` in every channel."""
    like = cpu.ZERO.get(mean.dtype)
    if like is None or var.dtype is not mean.dtype or not (is_plain(mean, var) and mean.is_cpu):
        return mean.numel() == 0 or bool(torch.addcmul(var, mean, mean, value=-1 / NEAR**2).min() >= -eps)
    mean, var = arrays.channels(mean, mean.dtype), arrays.channels(var, var.dtype)
    return whole.is_near(mean.data_ptr(), var.data_ptr(), mean.numel(), like, eps, NEAR)


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
    return follow(z, call.residual, name, parameter, call.is_eager and not torch.is_grad_enabled())


def follow(z: Tensor, residual: Tensor | None, name: str, parameter: float, in_place: bool) -> Tensor:
    """Add a residual, and apply an activation by its name and parameter; over `z` if `in_place`."""
    if residual is not None:
        z = z.add_(residual) if in_place else z + residual
    activate = IN_PLACE.get(name) if in_place else None
    y: Tensor = (ACTIVATIONS[name] if activate is None else activate)(z, parameter)
    return y


def _follow_and_note(
    found: recipes.Recipes, call: Call, z: Tensor, constants: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """`_follow`, with a recipe for each value on the way: PyTorch keeps that before or after the activation."""
    name, parameter = call.activation
    if any(t is not None and not t.is_contiguous() for t in (call.weight, call.bias)):
        # With gaps, PyTorch rounds in a different order than with the copies that a recipe would own.
        return follow(z, call.residual, name, parameter, False)

    def activate(z: Tensor) -> Tensor:
        y: Tensor = ACTIVATIONS[name](z, parameter)
        return y

    noted = found.note(z, _again(call, z, constants), call.x)
    if call.residual is not None:
        before, z = z, z + call.residual
        noted = noted and found.note(z, torch.add, before, call.residual)
    if name == "none" or not noted:
        return activate(z)
    return found.follow(activate, z)


def _again(call: Call, z: Tensor, constants: tuple[Tensor | None, Tensor | None]) -> Callable[[Tensor], Tensor]:
    """What makes `z`, the output of PyTorch's operation, again from `x`."""
    weight, bias = (None if t is None else t.detach().clone() for t in (call.weight, call.bias))
    bare = call._replace(weight=weight, bias=bias, x=call.x.new_empty(0), residual=None)
    mean, var = constants
    node: Any = z.grad_fn
    if (
        mean is None
        and z.is_cpu
        and z.dtype is call.arithmetic
        and node.name() == "NativeBatchNormBackward0"
        and call.x.is_contiguous(memory_format=memory_format(call.x))
    ):
        # PyTorch computes `x*scale + shift`. With the statistics that it has kept as constants, the bits are the same,
        # in one pass instead of three. (With gaps in memory, it rounds in a different order.)
        mean, rstd = node._saved_result1, node._saved_result2
        bare = bare._replace(weight=rstd if weight is None else rstd * weight, eps=0.0)
        var = torch.ones_like(mean)

    def normalize(x: Tensor) -> Tensor:
        return _batch_norm(bare._replace(x=x), mean, var, mean is None, 0.0)

    return normalize
