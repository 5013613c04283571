"""The stages of batch normalization in one autograd function.

The stages are those of a module, `cpu` for instance: `moments`, `normalize`, `grad_sums`, `grad_input`, and `forward`
and `backward`, which run them back to back. Between its forward and its backward pass the function keeps `x`, the
statistics, and what else the gradient of the activation needs.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from batchnorm.torch import composed
from batchnorm.torch.call import Batch, Call, Outcome, Part, Plan
from batchnorm.torch.layout import lay_out, lay_out_counts, memory_format
from batchnorm.torch.running import Running

__all__ = ["How", "backward", "compute", "forward", "moments"]


class How(NamedTuple):
    """What the function needs to know besides tensors.

    Attributes:
        stages: The module that computes the stages.
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

    @property
    def parts(self) -> list[Part]:
        """The groups of samples; all samples are one group if there are no others."""
        return [Part(slice(None), self.count)] if self.plan.parts is None else self.plan.parts


def compute(stages: Any, call: Call, plan: Plan, running: Running) -> Outcome:
    """Any plan of a call that the stages can compute."""
    count, found = plan.count, None
    moved = None
    if plan.constants is not None:
        found = _statistics(stages, call, *plan.constants)
        plan = plan._replace(constants=(found[0, 0], found[1, 0]))
    elif plan.group is not None or plan.adjust is not None:
        mean, var = moments(stages, call)
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
        y, statistics = forward(call, how, stages.tables(call, kept=False))
    if running.mean is None or moved is not None:
        return Outcome(y)
    if plan.parts is None:
        return Outcome(y, Batch.of(statistics[:2, 0], count))
    means, variances, _ = statistics
    count, mean, var = composed.together(
        [(part.count, mean, var) for part, mean, var in zip(plan.parts, means, variances, strict=True)]
    )
    return Outcome(y, Batch.of(torch.stack([mean, var]), count))


def moments(stages: Any, call: Call) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, in the type of the stages; zeros of nothing."""
    mean, var = call.x.new_zeros((2, call.x.shape[1]), dtype=stages.STATISTICS)
    if call.x.numel() > 0:
        laid = memory_format(call.x)
        with torch.no_grad():
            counts = None if call.counts is None else lay_out_counts(call.counts, laid)
            stages.moments(lay_out(call.x.detach(), laid), counts, mean, var)
    return mean, var


def _statistics(stages: Any, call: Call, mean: Tensor, var: Tensor) -> Tensor:
    """Given statistics as `How` has them. They are copies: a later batch may change the originals."""
    with torch.no_grad():
        found = torch.empty((3, 1, call.x.shape[1]), dtype=stages.STATISTICS, device=call.x.device)
        found[0].copy_(mean)
        found[1].copy_(var)
        torch.rsqrt(found[1] + call.eps, out=found[2])
    return found


Tables = tuple[Tensor | None, Tensor | None]


def forward(call: Call, how: How, numbers: Tables) -> tuple[Tensor, Tensor]:
    """`y`, and the statistics as in `How`. The numbers are weight and bias as the `tables` of the stages gives them."""
    x, stages = call.x, how.stages
    laid = memory_format(x)
    y = torch.empty_like(x, memory_format=laid)
    statistics = how.statistics
    if statistics is None:
        statistics = torch.empty((3, len(how.parts), x.shape[1]), dtype=stages.STATISTICS, device=x.device)
    if x.numel() == 0:
        return y, statistics
    tensors = _laid_out(laid, call, y)
    for (x_, residual, counts, y_), (mean, var, rstd), _, groups in _groups(how, call, tensors, statistics):
        if how.running is not None:
            groups = groups | {"running": how.running, "unbiased": how.plan.unbiased}
        if how.statistics is None:
            stages.forward(x_, residual, counts, *numbers, call.eps, call.activation, y_, mean, var, rstd, **groups)
        else:
            stages.normalize(x_, residual, mean, rstd, *numbers, call.activation, y_)
    return y, statistics


Gradients = tuple[Tensor | None, Tensor, Tensor, Tensor | None]


def backward(
    dy: Tensor, call: Call, how: How, numbers: Tables, statistics: Tensor, needs: tuple[bool, bool]
) -> Gradients:
    """`dx`, `d_weight`, `d_bias` and `d_residual`.

    Args:
        dy: The gradient of `y`.
        call, how, numbers: As in `forward`.
        statistics: From `forward`.
        needs: Whether `dx` and `d_residual` are needed; None is returned for what is not.
    """
    x, stages = call.x, how.stages
    laid = memory_format(x)
    group = how.plan.group if needs[0] else None
    dx = torch.empty_like(x, memory_format=laid) if needs[0] else None
    d_residual = torch.empty_like(x, memory_format=laid) if needs[1] and call.residual is not None else None
    shape = 2, len(how.parts), x.shape[1]
    if x.numel() == 0:
        sums = torch.zeros(shape, dtype=stages.STATISTICS, device=x.device)
        if group is not None:
            group.reduce(sums.clone())
        return dx, sums[1, 0], sums[0, 0], d_residual
    sums = torch.empty(shape, dtype=stages.STATISTICS, device=x.device)
    tensors = _laid_out(laid, call, dy, dx, d_residual)
    for of_group, (mean, _, rstd, *own), count, groups in _groups(how, call, tensors, (*statistics, *sums)):
        x_, residual, counts, dy_, dx_, d_residual_ = of_group
        given = mean, rstd, *numbers
        if group is None:
            stages.backward(dy_, x_, residual, counts, *given, count, call.activation, *own, dx_, d_residual_, **groups)
        else:
            stages.grad_sums(dy_, x_, residual, *given, call.activation, *own)
            total = group.reduce(torch.stack(own))
            stages.grad_input(dy_, x_, residual, counts, *given, *total, count, call.activation, dx_, d_residual_)
    d_bias, d_weight = sums[:, 0] if len(how.parts) == 1 else sums.sum(1)
    return dx, d_weight, d_bias, d_residual


def _laid_out(laid: torch.memory_format, call: Call, *others: Tensor | None) -> list[Tensor | None]:
    """`x`, the residual, the counts and others as kernels see them."""
    x, residual, *rest = (None if t is None else lay_out(t, laid) for t in (call.x, call.residual, *others))
    return [x, residual, None if call.counts is None else lay_out_counts(call.counts, laid), *rest]


def _groups(how: How, call: Call, tensors: list[Tensor | None], numbers: Iterable[Tensor]) -> Iterator[Any]:
    """What kernels need of each group of samples that has statistics of its own, or of all, if the stages take all.

    Args:
        how, call: The call.
        tensors: Of `_laid_out`.
        numbers: `(parts, C)` each.

    Yields:
        The tensors and the numbers of a group, its count, and further arguments.
    """
    parts = how.parts
    if len(parts) == 1:
        yield tensors, [each[0] for each in numbers], how.count, {}
    elif how.stages.TAKES_GROUPS:
        yield tensors, list(numbers), None, {"groups": len(parts), "samples": len(call.x)}
    else:
        first = tensors[0]
        assert first is not None
        length = first.shape[0] // len(call.x)
        for part, *own in zip(parts, *numbers, strict=True):
            rows = slice(part.samples.start * length, part.samples.stop * length)
            yield [None if t is None else t[rows] for t in tensors], own, part.count, {}


class _BatchNorm(torch.autograd.Function):
    """`y` and the statistics."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        x, weight, bias, residual, counts, how = arguments
        call = Call(x, weight, bias, residual, counts, how.eps, how.activation)
        numbers = how.stages.tables(call, kept=True)
        y, statistics = forward(call, how, numbers)
        # Without an activation dz = dy, whatever the residual is.
        ctx.has_residual = call.residual is not None
        residual = call.residual if call.activation[0] != "none" else None
        ctx.save_for_backward(call.x, call.weight, residual, call.counts, statistics)
        ctx.bias, ctx.bias_version = call.bias, None if call.bias is None else call.bias._version
        ctx.how, ctx.numbers = how, numbers
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return y, statistics

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        dy = grads[0]
        if dy is None:
            return (None,) * 6
        x, weight, residual, counts, statistics = ctx.saved_tensors
        call = Call(x, weight, ctx.bias, residual, counts, ctx.how.eps, ctx.how.activation)
        if torch.is_grad_enabled() or _is_batched(dy):
            return (*_differentiable_backward(ctx, dy, call), None, None)
        needs = ctx.needs_input_grad
        dx, d_weight, d_bias, d_residual = backward(dy, call, ctx.how, ctx.numbers, statistics, (needs[0], needs[3]))
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
