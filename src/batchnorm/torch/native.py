"""PyTorch's own operation, `torch.batch_norm`, and the activation after it."""

import torch
from torch import Tensor

from batchnorm.torch import composed, recipes
from batchnorm.torch.call import Batch, Call, Outcome, Plan, is_tracing
from batchnorm.torch.running import Running, is_finite

__all__ = ["compute", "takes"]


def takes(call: Call, plan: Plan) -> bool:
    """Whether PyTorch's operation gives the same result."""
    x = call.x
    if call.counts is not None or plan.parts is not None or plan.group is not None or plan.adjust is not None:
        return False
    if plan.count == 0 or (call.residual is not None and call.residual.dtype is not x.dtype):
        return False
    if not call.is_eager and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    # On the CPU, if the stride of an axis of length 1 hides a channels-last layout, the gradient is wrong (2.13).
    return not x.is_cpu or x.is_contiguous() or is_tracing() or 1 not in x.shape


def compute(call: Call, plan: Plan, running: Running) -> Outcome:
    """Compute a call without a mask, by the statistics of the batch or by constants."""
    if plan.constants is not None:
        mean, var = plan.constants
        if torch.is_grad_enabled() and (call.is_eager or not is_tracing()):
            # Copies: a later batch changes the running statistics, and the backward pass must not see that.
            mean, var = mean.clone(), var.clone()
        return Outcome(_follow(call, _batch_norm(call, mean, var, False, 0.0), (mean, var)))
    if running.mean is None or running.var is None:
        return Outcome(_follow(call, _batch_norm(call, None, None, True, 0.0)))
    x = call.x
    if x.is_cpu and call.is_eager and plan.unbiased and x.dtype is call.arithmetic and is_finite(x):
        rate = running.rate()
        assert isinstance(rate, float)
        # PyTorch changes them without telling autograd, and saves them although the backward pass does not need them.
        torch.autograd.graph.increment_version((running.mean, running.var))
        z = _batch_norm(call, running.mean.data, running.var.data, True, rate)
        running.note(True)
        return Outcome(_follow(call, z))
    # PyTorch returns a batch's statistics only by moving running ones: with momentum 1 these become the batch's.
    batch = Batch.of(x.new_zeros((2, x.shape[1]), dtype=call.arithmetic), plan.count, is_unbiased=True)
    return Outcome(_follow(call, _batch_norm(call, batch.mean, batch.var, True, 1.0)), batch)


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
    if (found := recipes.active()) is not None and z.requires_grad:
        return _follow_and_note(found, call, z, constants)
    if torch.is_grad_enabled() or not call.is_eager:
        z = z if call.residual is None else z + call.residual
    else:
        z = z if call.residual is None else z.add_(call.residual)
        if name == "relu":
            return torch.relu_(z)
    y: Tensor = composed.ACTIVATIONS[name](z, parameter)
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
        y: Tensor = composed.ACTIVATIONS[name](z, parameter)
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
