"""Batch normalization inside `torch.func`: an ensemble under `vmap` is one batch normalization with more channels.

`grad`, `vjp` and `vmap`, nested in any order, reach the kernels; `jvp` and `functionalize` need elementary operations.
Running statistics move as they would without a transform. If `vmap` maps over them, each moves by its own batch;
otherwise they move by all batches together, as if these were one batch.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from batchnorm.torch import operators
from batchnorm.torch.call import Batch, Call, Outcome, Plan
from batchnorm.torch.running import Running, correction, move

__all__ = ["active", "compute", "takes", "update"]


def active() -> bool:
    """Whether the code runs inside a transform."""
    return torch._C._are_functorch_transforms_active()


def takes(call: Call, plan: Plan) -> bool:
    """Whether the operators can compute this call, and there are plain tensors inside all active transforms."""
    known = _functorch.TransformType.Vmap, _functorch.TransformType.Grad
    return (
        active()
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and all(each.key() in known for each in _functorch.get_interpreter_stack() or ())
        and call.x.numel() > 0
        and operators.takes(call, plan)
    )


def compute(call: Call, plan: Plan) -> Outcome:
    """Compute a call by the statistics of the batch."""
    return operators.compute(call, plan, forward=_Forward.apply)


# --- The operators under vmap ----------------------------------------------------------------------------------------


def _fold(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Merge the ensemble's axis `dim`, if there is one, with the channels: `(N, B*C, *spatial)`, or `(B*C,)`."""
    if t is None:
        return None
    channels = 1 if t.dim() - (dim is not None) > 1 else 0
    if dim is not None:
        t = t.movedim(dim, channels)
    else:
        t = t.unsqueeze(channels)
        t = t.expand(*t.shape[:channels], size, *t.shape[channels + 1 :])
    return t.flatten(channels, channels + 1)


def _unfold(t: Tensor, size: int) -> tuple[Tensor, int | None]:
    """The inverse of `_fold`, and the ensemble's axis; an output that was not needed is empty and has none."""
    if t.shape == (0,):
        return t, None
    channels = min(t.dim() - 1, 1)
    return t.unflatten(channels, (size, -1) if t.shape[channels] else (size, 0)), channels


def _map(
    function: Any, info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...], mask: int
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The `vmap` rule of an operator: more channels, or one member at a time if each has its own mask."""
    size = info.batch_size
    if in_dims[mask] is None:
        folded = (
            _fold(t, dim, size) if isinstance(t, Tensor) and i != mask else t
            for i, (t, dim) in enumerate(zip(arguments, in_dims, strict=True))
        )
        outputs, dims = zip(*(_unfold(t, size) for t in function.apply(*folded)), strict=True)
        return outputs, dims
    each = [
        function.apply(*(t if dim is None else t.select(dim, i) for t, dim in zip(arguments, in_dims, strict=True)))
        for i in range(size)
    ]
    stacked = tuple(torch.stack(outputs) for outputs in zip(*each, strict=True))
    return stacked, (0,) * len(stacked)


class _Forward(torch.autograd.Function):
    """The operator `batchnorm::forward`."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        y, statistics = torch.ops.batchnorm.forward(*arguments)
        return y, statistics

    setup_context = staticmethod(operators.keep_forward)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return operators.differentiate_forward(ctx, *grads, backward=_Backward.apply)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return _map(_Forward, info, in_dims, arguments, mask=4)


class _Backward(torch.autograd.Function):
    """The operator `batchnorm::backward`."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dx, d_weight, d_bias, d_residual = torch.ops.batchnorm.backward(*arguments)
        return dx, d_weight, d_bias, d_residual

    setup_context = staticmethod(operators.keep_backward)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return operators.differentiate_backward(ctx, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return _map(_Backward, info, in_dims, arguments, mask=5)


# --- The running statistics ------------------------------------------------------------------------------------------


def _unwrap(t: Tensor, levels: list[int] | None = None) -> tuple[Tensor, list[int]]:
    """The plain tensor inside all wrappers, with the axes that `vmap` maps in front, and the levels of these axes.

    Call it outside the transforms. With `levels`, each of these levels gets an axis, if need be of length 1.
    """
    dims = []
    while _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_batchedtensor(t):
            dims.append((_functorch.maybe_get_level(t), _functorch.maybe_get_bdim(t)))
        t = _functorch.get_unwrapped(t)
    t = t.detach()
    dims.reverse()
    for place, (_, dim) in enumerate(dims):
        t = t.movedim(dim + place, place)
    own = [level for level, _ in dims]
    for place, level in enumerate(levels or ()):
        if level not in own:
            t = t.unsqueeze(place)
    return t, own


def update(running: Running, batch: Batch, unbiased: bool) -> None:
    """`running.update` under `vmap`, which may map the running statistics, the batch, or both."""
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        if running.mean is None or running.var is None:
            return _count(running, True)
        if not isinstance(batch.count, Tensor) and batch.count == 0:
            return _count(running, False)
        averages = running.momentum is None and running.batches is not None
        given = [batch.count, running.batches if averages else running.momentum or 0.0]
        tensors = [_tensor(value, batch.var) for value in (*given, batch.mean, batch.var, running.mean, running.var)]
        levels = sorted({level for t in tensors for level in _unwrap(t)[1]})
        count, rate, mean, var, old_mean, old_var = (_unwrap(t, levels)[0] for t in tensors)
        own = set(_unwrap(running.mean)[1]) | set(_unwrap(running.var)[1])
        pooled = [place for place, level in enumerate(levels) if level not in own]
        exact = var.dtype
        rate = (rate.to(exact) + 1).reciprocal() if averages else rate.to(exact)
        count = count.to(exact).unsqueeze(-1).expand(*mean.shape[:-1], 1)
        if batch.is_unbiased:
            var = var / correction(count)
        if pooled:
            total = count.sum(pooled, keepdim=True)
            center = (count * mean).sum(pooled, keepdim=True) / total
            var = (count * (var + (mean - center) ** 2)).sum(pooled, keepdim=True) / total
            mean, count = center, total
        if unbiased:
            var = var * correction(count)
        moved = move(old_mean, old_var, Batch.of(torch.stack([mean, var]), count.squeeze(-1)), rate.unsqueeze(-1))
        _count(running, moved.squeeze(pooled) if isinstance(moved, Tensor) else moved)


def _tensor(value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.as_tensor(
        value, dtype=torch.float32 if like.device.type == "mps" else torch.float64, device=like.device
    )


def _count(running: Running, moved: bool | Tensor) -> None:
    """Add to the counters of a layer. A whole ensemble counts as skipped if any of its members does."""
    if running.batches is None:
        return
    told = torch.as_tensor(moved, device=running.batches.device)
    for counter, said, pooled in ((running.batches, told, told.all()), (running.skipped, ~told, (~told).any())):
        if counter is not None:
            plain, _ = _unwrap(counter)
            plain.add_(said if plain.dim() else pooled)
