"""The stages of batch normalization in one autograd function.

The stages are those of a device, a module such as `cpu` or `gpu`. Between its forward and its backward pass the
function keeps `x`, the statistics, and what else the gradient of the activation needs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from batchnorm.torch import composed
from batchnorm.torch.call import Batch, Call, Outcome, Part, Plan, arithmetic
from batchnorm.torch.running import Running

__all__ = ["Gradients", "How", "compute"]

Gradients = tuple[Tensor | None, Tensor, Tensor, Tensor | None]
"""`dx`, `d_weight`, `d_bias` and `d_residual`; None for what is not needed."""


class How(NamedTuple):
    """What the function needs to know besides tensors.

    Attributes:
        stages: The module of the device: `moments(call)`, `forward(call, how)`, which gives `y`, the statistics and
            what to keep, and `backward(dy, call, how, statistics, kept, needs)`, which gives `Gradients`.
        plan: The plan.
        count: How much the values behind the statistics count, over all processes; infinity for constants.
        statistics: `(3, parts, C)`: mean, variance and `1/sqrt(var + eps)`; None if the forward pass shall find them.
        eps: Added to the variance.
        activation: A name and its parameter.
        running: The running statistics that the forward pass shall move; None if that is done afterwards.
    """

    stages: Any
    plan: Plan
    count: Any
    statistics: Tensor | None
    eps: float
    activation: tuple[str, float]
    running: Running | None = None

    def call(self, *tensors: Any) -> Call:
        """The call of these tensors, which are `x`, weight, bias, residual and counts."""
        x, weight, bias, residual, counts = tensors
        return Call(x, weight, bias, residual, counts, self.eps, self.activation, True, arithmetic(x.dtype))

    @property
    def parts(self) -> list[Part]:
        """The groups of samples; all samples are one group if there are no others."""
        return [Part(slice(None), self.count)] if self.plan.parts is None else self.plan.parts


def compute(stages: Any, call: Call, plan: Plan, running: Running) -> Outcome:
    """Any plan of a call that the stages can compute."""
    count, found, moved = plan.count, None, None
    if plan.constants is not None:
        found = _statistics(stages, call, *plan.constants)
        plan = plan._replace(constants=(found[0, 0], found[1, 0]))
    elif plan.group is not None or plan.adjust is not None:
        mean, var = stages.moments(call)
        if plan.group is not None:
            total, mean, var = plan.group.pool(call.x, call.positions(), count, mean, var)
            count = float(total)
        found = _statistics(stages, call, mean, var)
        if plan.adjust is not None:
            with torch.no_grad():
                r, d = plan.adjust(mean, var)
            weight, bias = composed.adjusted(call, r, d)
            call = call._replace(weight=weight, bias=bias)
            plan = plan._replace(adjust=None)
    elif stages.MOVES_RUNNING and running.mean is not None:
        moved = running
    how = How(stages, plan, count, found, call.eps, call.activation, moved)
    if torch.is_grad_enabled():
        y, statistics = _BatchNorm.apply(*call[:5], how)
    else:
        y, statistics, _ = stages.forward(call, how)
    if running.mean is None or moved is not None:
        return Outcome(y)
    if plan.parts is None:
        return Outcome(y, Batch.of(statistics[:2, 0], count))
    means, variances, *_ = statistics
    count, mean, var = composed.together(
        [(part.count, mean, var) for part, mean, var in zip(plan.parts, means, variances, strict=True)]
    )
    return Outcome(y, Batch.of(torch.stack([mean, var]), count))


def _statistics(stages: Any, call: Call, mean: Tensor, var: Tensor) -> Tensor:
    """Given statistics as `How` has them. They are copies: a later batch may change the originals."""
    with torch.no_grad():
        found = torch.empty((3, 1, call.x.shape[1]), dtype=stages.STATISTICS, device=call.x.device)
        found[0].copy_(mean)
        found[1].copy_(var)
        torch.rsqrt(found[1] + call.eps, out=found[2])
    return found


class _BatchNorm(torch.autograd.Function):
    """`y` and the statistics."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        x, weight, bias, residual, counts, how = arguments
        call = how.call(x, weight, bias, residual, counts)
        y, statistics, kept = how.stages.forward(call, how)
        # Without an activation dz = dy, whatever the residual is.
        ctx.has_residual = call.residual is not None
        residual = call.residual if call.activation[0] != "none" else None
        ctx.save_for_backward(call.x, call.weight, residual, call.counts, statistics)
        ctx.bias, ctx.bias_version = call.bias, None if call.bias is None else call.bias._version
        ctx.how, ctx.kept = how, kept
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return y, statistics

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        dy = grads[0]
        if dy is None:
            return (None,) * 6
        x, weight, residual, counts, statistics = ctx.saved_tensors
        call = ctx.how.call(x, weight, ctx.bias, residual, counts)
        if torch.is_grad_enabled() or _is_batched(dy):
            return (*_differentiable_backward(ctx, dy, call), None, None)
        needs = ctx.needs_input_grad
        dx, d_weight, d_bias, d_residual = ctx.how.stages.backward(
            dy, call, ctx.how, statistics, ctx.kept, (needs[0], needs[3])
        )
        return (
            dx,
            d_weight.to(weight.dtype) if needs[1] else None,
            d_bias.to(ctx.bias.dtype) if needs[2] else None,
            dy if needs[3] and residual is None else d_residual,
            None,
            None,
        )


def _is_batched(dy: Tensor) -> bool:
    """Whether `vmap` maps the backward pass over many `dy` at once: `is_grads_batched`, `jacobian(vectorize=True)`."""
    return torch._C._are_functorch_transforms_active() or _functorch.is_legacy_batchedtensor(dy)


def _differentiable_backward(ctx: Any, dy: Tensor, call: Call) -> list[Tensor | None]:
    """The gradients as a graph of their own, for derivatives of a higher order."""
    if ctx.bias is not None and ctx.bias._version != ctx.bias_version:
        raise RuntimeError(
            "the bias of a batch normalization has been modified by an inplace operation between the forward pass and "
            "a backward pass with create_graph=True, which needs the bias as it was"
        )
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # New names for the inputs: one tensor may have come in twice, as x and as the residual, and each wants its own
        # share.
        inputs = [None if t is None else t.view_as(t) for t in call[:4]]
        x, weight, bias, residual = inputs
        assert x is not None
        named = call._replace(x=x, weight=weight, bias=bias, residual=residual)
        y, *_ = composed.forward(named, ctx.how.plan)
    needed = [t is not None and needs for t, needs in zip(inputs, ctx.needs_input_grad, strict=False)]
    wanted = [t for t, is_needed in zip(inputs, needed, strict=True) if t is not None and is_needed]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph) if wanted else ())
    result = [next(found) if is_needed else None for is_needed in needed]
    if ctx.has_residual and call.residual is None and ctx.needs_input_grad[3]:
        result[3] = dy
    return result
