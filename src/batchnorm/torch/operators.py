"""The stages as registered operators, which the graphs of `torch.compile` can call.

`batchnorm::forward` and `batchnorm::backward` normalize by the statistics of a batch, as `batch_norm` does in training
on the CPU. The residual of `batchnorm::backward` is `y` if the call `keeps_output`. Without these operators, Inductor
generates loops of its own, whose sums over a channel are slow.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from batchnorm.torch import composed, cpu, function
from batchnorm.torch.call import Batch, Call, Outcome, Plan, arithmetic
from batchnorm.torch.layout import memory_format

__all__ = ["compute", "differentiate_backward", "differentiate_forward", "keep_backward", "keep_forward", "takes"]

OPTIONAL = "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? counts"
HOW = "float eps, str activation, float parameter"
LIBRARY = Library("batchnorm", "DEF")
LIBRARY.define(f"forward(Tensor x, {OPTIONAL}, {HOW}) -> (Tensor y, Tensor statistics)")
LIBRARY.define(
    f"backward(Tensor dy, Tensor x, {OPTIONAL}, {HOW}, Tensor statistics, bool needs_x, bool needs_residual)"
    " -> (Tensor dx, Tensor d_weight, Tensor d_bias, Tensor d_residual)"
)


def takes(call: Call, plan: Plan) -> bool:
    """Whether the operators can compute this: by the statistics of the batch, on the CPU, in a supported type."""
    x, residual = call.x, call.residual
    return x.is_cpu and x.dtype in cpu.DTYPES and plan.is_simple and (residual is None or residual.dtype is x.dtype)


def compute(call: Call, plan: Plan, forward: Any = torch.ops.batchnorm.forward) -> Outcome:
    """Compute a call by the statistics of the batch."""
    call = function.own_residual(call)
    if call.bias is not None:  # it may change before the backward pass
        call = call._replace(bias=call.bias.clone())
    y, statistics = forward(*call[:6], *call.activation)
    mean, var, _ = statistics.unbind()
    return Outcome(y, Batch(statistics[:2], mean, var, plan.count))


# --- The implementations ---------------------------------------------------------------------------------------------


def _asked(arguments: tuple[Any, ...]) -> tuple[Call, function.How]:
    """The call that the arguments of `forward` describe, and how to compute it."""
    x, weight, bias, residual, counts, eps, name, parameter = arguments
    call = Call(x, weight, bias, residual, counts, eps, (name, parameter), arithmetic=arithmetic(x.dtype))
    count = float(call.total())
    return call, function.How(cpu, Plan(count), count, None, call.eps, call.activation)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, how = _asked(arguments)
    if call.x.numel() == 0:
        return _like_forward(*arguments)[0], call.x.new_zeros((3, call.x.shape[1]), dtype=cpu.STATISTICS)
    with torch.no_grad():
        y, statistics, _ = cpu.forward(call, how)
    return y, statistics[:3, 0]


def _backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *asked, statistics, needs_x, needs_residual = arguments
    call, how = _asked(tuple(asked))
    with torch.no_grad():
        dx, d_weight, d_bias, d_residual = cpu.backward(
            dy,
            call,
            how,
            statistics.contiguous()[:, None],
            cpu.tables(call),
            function.Needs(needs_x, needs_residual, False),
        )
    # The outputs of an operator must not share memory, even if they are not needed.
    return (
        call.x.new_empty(0) if dx is None else dx,
        call.x.new_empty(0) if call.weight is None else d_weight.to(call.weight.dtype),
        call.x.new_empty(0) if call.bias is None else d_bias.to(call.bias.dtype),
        call.x.new_empty(0) if d_residual is None else d_residual,
    )


LIBRARY.impl("forward", _forward, "CPU")
LIBRARY.impl("backward", _backward, "CPU")


# --- Shapes and types, for graphs under construction -----------------------------------------------------------------


def _like_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=memory_format(x))
    return y, x.new_empty((3, x.shape[1]), dtype=cpu.STATISTICS)


def _like_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_x, needs_residual = others[-2:]

    def like(t: Tensor | None, needed: bool = True) -> Tensor:
        if t is None or not needed:
            return x.new_empty(0)
        return torch.empty_like(x, memory_format=memory_format(x)) if t.dim() > 1 else torch.empty_like(t)

    return like(x, needs_x), like(weight), like(bias), like(residual, needs_residual)


# --- Their derivatives -----------------------------------------------------------------------------------------------


def keep_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the gradients of `forward` need."""
    x, weight, bias, residual, counts, eps, activation, parameter = inputs
    y, statistics = output
    ctx.has_residual = residual is not None
    if residual is not None and activation == "relu":
        residual = y
    elif activation == "none":
        residual = None  # dz = dy, whatever the residual is
    ctx.save_for_backward(x, weight, bias, residual, counts, statistics)
    ctx.how = eps, activation, parameter
    ctx.mark_non_differentiable(statistics)


def differentiate_forward(
    ctx: Any, dy: Tensor, *_: Any, backward: Any = torch.ops.batchnorm.backward
) -> tuple[Any, ...]:
    """The gradients of all inputs, computed by `backward`."""
    *asked, statistics = ctx.saved_tensors
    has_saved = asked[3] is not None
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    dx, d_weight, d_bias, d_residual = backward(dy, *asked, *ctx.how, statistics, needs_x, needs_residual and has_saved)
    if ctx.has_residual and not has_saved:
        d_residual = dy
    found = (dx, needs_x), (d_weight, needs_weight), (d_bias, needs_bias), (d_residual, needs_residual)
    return (*(gradient if needed else None for gradient, needed in found), None, None, None, None)


def keep_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what the gradients of `backward` need."""
    ctx.save_for_backward(*inputs[:6])
    ctx.how = inputs[6:9]
    ctx.needs = inputs[10:]


def differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """The gradients of the gradients, with the statistics as functions of `x`."""
    dy, x, weight, bias, residual, counts = ctx.saved_tensors
    eps, name, parameter = ctx.how
    needs_x, needs_residual = ctx.needs
    needed = needs_x, weight is not None, bias is not None, needs_residual and isinstance(residual, Tensor)
    outer = tuple(grad for grad, is_needed in zip(grads, needed, strict=True) if is_needed)
    if not outer:
        return (None,) * 12
    asked = Call(x, weight, bias, residual, counts, eps, (name, parameter), arithmetic=arithmetic(x.dtype))
    by_output = function.keeps_output(asked)  # y says where z is positive; the residual itself has no part in it
    if by_output:
        asked = asked._replace(activation=("none", 0.0))
    inputs = dy, x, weight, bias, torch.zeros_like(x) if by_output else residual

    def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return composed.forward(asked._replace(x=x, weight=weight, bias=bias, residual=residual), Plan(torch.inf))[0]

    def differentiate(dy: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        gradients = _pull_back(normalize, tensors, torch.where(residual <= 0, 0, dy) if by_output else dy)
        return tuple(g for g, is_needed in zip(gradients, needed, strict=True) if is_needed and g is not None)

    return (*_pull_back(differentiate, inputs, outer), *(None,) * 7)


def _pull_back(function: Any, inputs: tuple[Tensor | None, ...], grads: Any) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs, of which some are None, by `torch.func`: under its transforms, autograd cannot."""

    def of_tensors(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return function(*(None if t is None else next(given) for t in inputs))

    pull: Any = torch.func.vjp(of_tensors, *(t for t in inputs if t is not None))[1]
    found = iter(pull(grads))
    return tuple(None if t is None else next(found) for t in inputs)


register_fake("batchnorm::forward", _like_forward, lib=LIBRARY)
register_fake("batchnorm::backward", _like_backward, lib=LIBRARY)
register_autograd("batchnorm::forward", differentiate_forward, setup_context=keep_forward, lib=LIBRARY)
register_autograd("batchnorm::backward", differentiate_backward, setup_context=keep_backward, lib=LIBRARY)
