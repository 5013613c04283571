"""The stages of batch normalization in one autograd function.

The stages of a device are a module, such as `cpu` or `gpu`. Between forward and backward the function keeps `x`, the
statistics, and whatever else the gradient of the activation needs. A caller may change the residual or the bias before
the backward pass, because PyTorch's own operations do not keep them. So they may not be kept as they are.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from batchnorm.torch import composed, ownership, recipes
from batchnorm.torch.call import Batch, Call, Outcome, Part, Plan, arithmetic
from batchnorm.torch.layout import memory_format
from batchnorm.torch.running import Running

__all__ = ["Gradients", "How", "Needs", "compute", "keeps_output", "own_residual", "run"]

Gradients = tuple[Tensor | None, Tensor, Tensor, Tensor | None]
"""`dx`, `d_weight`, `d_bias` and `d_residual`; None for a gradient that is not needed."""


class Needs(NamedTuple):
    """What a backward pass must compute, and whether it may overwrite `dy` with `dx`."""

    dx: bool
    d_residual: bool
    may_overwrite_dy: bool


class How(NamedTuple):
    """Everything that the function needs besides tensors.

    Attributes:
        stages: The module of the device. `moments(call)` returns mean and variance; `forward(call, how)` returns `y`,
            the statistics, and what to keep for backward; `backward(dy, call, how, statistics, kept, needs)` returns
            the `Gradients` that are needed, with `y` as the call's residual if the forward call `keeps_output`;
            `old_bias(statistics, kept)` returns the bias as it was in the forward pass; `again(call, how, statistics,
            kept)` returns a function of `x` and the residual that makes `y` again, the same bits by the same stage,
            and refers to nothing that an optimizer might change.
        plan: The plan.
        count: The total count behind the statistics, over all processes; infinity for constants.
        statistics: `(3, parts, C)`: mean, variance and `1/sqrt(var + eps)`; None if the forward pass computes them or,
            by constants, copies them.
        eps: Added to the variance.
        activation: A name and its parameter.
        running: The running statistics that the forward pass must move; None if they are moved afterwards.
    """

    stages: Any
    plan: Plan
    count: Any
    statistics: Tensor | None
    eps: float
    activation: tuple[str, float]
    running: Running | None = None

    @property
    def parts(self) -> list[Part]:
        """The groups of samples; one group of all samples if the plan has no parts."""
        return [Part(slice(None), self.count)] if self.plan.parts is None else self.plan.parts


def compute(stages: Any, call: Call, plan: Plan, running: Running) -> Outcome:
    """Compute a call by any plan that the stages support."""
    count, found, moved = plan.count, None, None
    if plan.constants is not None:
        plan = plan._replace(group=None)
    if plan.group is not None or plan.adjust is not None:
        mean, var = plan.constants or stages.moments(call)
        if plan.group is not None:
            total, mean, var = plan.group.pool(call.x, call.positions(), count, mean, var)
            count = total if total.is_cuda else float(total)  # to read it would be to wait for the GPU
        found = _known(call, mean, var, stages.STATISTICS)
        if plan.adjust is not None:
            with torch.no_grad():
                r, d = plan.adjust(mean, var)
            weight, bias = composed.adjusted(call, r, d)
            call = call._replace(weight=weight, bias=bias)
            plan = plan._replace(adjust=None)
    elif plan.constants is None and stages.can_move(running, call.x, plan):
        moved = running
    y, statistics = run(call, How(stages, plan, count, found, call.eps, call.activation, moved))
    if running.mean is None or moved is not None:
        return Outcome(y)
    if plan.parts is None:
        return Outcome(y, Batch.of(statistics[:2, 0], count))
    means, variances, *_ = statistics
    count, mean, var = composed.together(
        [(part.count, mean, var) for part, mean, var in zip(plan.parts, means, variances, strict=True)]
    )
    return Outcome(y, Batch.of(torch.stack([mean, var]), count))


def run(call: Call, how: How) -> tuple[Tensor, Tensor]:
    """`y` with its history, and the statistics."""
    if not torch.is_grad_enabled():
        y, statistics, _ = how.stages.forward(call, how)
        return y, statistics
    if call.residual is not None and any(t is not None and t.requires_grad for t in call[:4]):
        call = own_residual(call)
    told: list[Tensor] = []
    y = _BatchNorm.apply(*call[:4], (call, how, told))
    return y, told[0]


def keeps_output(call: Call) -> bool:
    """Whether the backward pass gets `y` instead of the residual.

    All that relu asks of `z` is its sign, which `y` has as well. PyTorch's relu keeps `y`, too.
    """
    return call.residual is not None and call.activation[0] == "relu"


def own_residual(call: Call) -> Call:
    """The same call with a private copy of the residual, if the backward pass needs it.

    PyTorch's activations keep `z`, a tensor of their own. A copy of the residual takes the same memory.
    """
    if call.residual is None or call.activation[0] in ("none", "relu"):
        return call
    return call._replace(residual=call.residual.clone(memory_format=memory_format(call.x)))


def _known(call: Call, mean: Tensor, var: Tensor, dtype: torch.dtype) -> Tensor:
    """Statistics in the layout of `How`, copied because a later batch may change the originals."""
    with torch.no_grad():
        found = torch.empty((3, 1, call.x.shape[1]), dtype=dtype, device=call.x.device)
        found[0].copy_(mean)
        found[1].copy_(var)
        torch.rsqrt(found[1] + call.eps, out=found[2])
    return found


class _BatchNorm(torch.autograd.Function):
    """`y` of a call. Tensors that may need a gradient are also arguments of their own, where PyTorch looks for them."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        call, how, told = arguments[4]
        y: Tensor
        y, statistics, ctx.kept = how.stages.forward(call, how)
        told.append(statistics)
        if (found := recipes.active(y)) is not None and any(ctx.needs_input_grad):
            found.note(y, how.stages.again(call, how, statistics, ctx.kept), call.x, call.residual)
        ctx.keeps_output = keeps_output(call)
        # Without an activation dz = dy, whatever the residual is.
        ctx.has_residual = call.residual is not None
        residual = call.residual if call.activation[0] != "none" else None
        ctx.save_for_backward(call.x, call.weight, y if ctx.keeps_output else residual, call.counts)
        ctx.how, ctx.statistics = how, statistics
        bias = ctx.bias = call.bias
        ctx.bias_version = None if bias is None or bias.is_inference() else bias._version
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (dy,) = grads
        x, weight, residual, counts = ctx.saved_tensors
        how, needs = ctx.how, ctx.needs_input_grad
        call = Call(x, weight, ctx.bias, residual, counts, how.eps, how.activation, True, arithmetic(x.dtype))
        if torch.is_grad_enabled() or _is_batched(dy):
            return (*_differentiable_backward(ctx, dy, call), None)
        returns_dy = needs[3] and residual is None
        free = needs[0] and not returns_dy and dy.is_cpu and ownership.may_overwrite(dy)
        dx, d_weight, d_bias, d_residual = how.stages.backward(
            dy, call, how, ctx.statistics, ctx.kept, Needs(needs[0], needs[3], free)
        )
        return (
            dx,
            _like(d_weight, weight) if needs[1] else None,
            _like(d_bias, ctx.bias) if needs[2] else None,
            dy if returns_dy else d_residual,
            None,
        )


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    return gradient if gradient.dtype is parameter.dtype else gradient.to(parameter.dtype)


def _is_batched(dy: Tensor) -> bool:
    """Whether `vmap` maps the backward pass over many `dy`: `is_grads_batched`, `jacobian(vectorize=True)`."""
    return torch._C._are_functorch_transforms_active() or _functorch.is_legacy_batchedtensor(dy)


def _differentiable_backward(ctx: Any, dy: Tensor, call: Call) -> list[Tensor | None]:
    """The gradients as a differentiable graph, for higher derivatives."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if ctx.keeps_output:
            assert call.residual is not None
            dy = torch.where(call.residual <= 0, 0, dy)
            call = call._replace(residual=None, activation=("none", 0.0))
        # Views of the inputs: one tensor may be both x and the residual, and each needs its own gradient.
        inputs = [None if t is None else t.view_as(t) for t in call[:4]]
        x, weight, bias, residual = inputs
        assert x is not None
        if bias is not None and ctx.bias_version is not None and bias._version != ctx.bias_version:
            kept = ctx.how.stages.old_bias(ctx.statistics, ctx.kept).to(bias.dtype)
            bias = kept + (bias - bias.detach())  # the values of the forward pass, with the history of the bias
        named, plan = call._replace(x=x, weight=weight, bias=bias, residual=residual), ctx.how.plan
        if plan.constants is not None:
            plan = plan._replace(constants=(ctx.statistics[0, 0], ctx.statistics[1, 0]))  # as they were
        y, *_ = composed.forward(named, plan)
    needed = [t is not None and needs for t, needs in zip(inputs, ctx.needs_input_grad, strict=False)]
    wanted = [t for t, is_needed in zip(inputs, needed, strict=True) if t is not None and is_needed]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph) if wanted else ())
    result = [next(found) if is_needed else None for is_needed in needed]
    if ctx.has_residual and call.residual is None and ctx.needs_input_grad[3]:
        result[3] = dy
    return result
