"""The stages on CPU tensors, by the Numba kernels, which take NumPy arrays."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.kernels import launch, threads, whole
from batchnorm.kernels.running import move
from batchnorm.torch import arrays
from batchnorm.torch.allocator import empty_like
from batchnorm.torch.call import Call, Part, Plan, is_plain
from batchnorm.torch.function import Gradients, How, Needs, keeps_output
from batchnorm.torch.layout import memory_format
from batchnorm.torch.running import Running, correction

__all__ = ["DTYPES", "STATISTICS", "again", "backward", "can_move", "forward", "moments", "old_bias", "tables"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""The types that the kernels support."""

STATISTICS = torch.float64
"""The type of means, variances and sums."""

EMPTY = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}
"""A tensor of each type of the arithmetic. Its `new_empty` takes half the time of `torch.empty`."""

TABLES = 3 * 8
"""Bytes before the tables of a whole pass, for each channel: those of its statistics. Behind their three rows, a fourth
row holds two tables of float32, or a fourth and a fifth row two of float64."""

ZERO = {torch.float32: np.float32(0), torch.float64: np.float64(0)}
"""A number of the type of the running statistics, for the kernels."""

threads.follow(torch.get_num_threads)


def can_move(running: Running, x: Tensor, plan: Plan) -> bool:
    """Whether `forward` can move these running statistics: dense ones, by one batch that is not empty."""
    mean, var, batches = running.mean, running.var, running.batches
    return (
        mean is not None
        and var is not None
        and plan.parts is None
        and bool(plan.count != 0)
        and mean.dtype is var.dtype
        and (mean.dtype is torch.float32 or mean.dtype is torch.float64)
        and mean.is_contiguous()
        and var.is_contiguous()
        and is_plain(x, mean, var)
        and not (mean.is_inference() or var.is_inference())
        and not (mean.is_neg() or var.is_neg() or mean._is_zerotensor() or var._is_zerotensor())
        and (batches is None or (type(batches) is Tensor and batches.is_cpu and batches.dtype is torch.int64))
        and (batches is None or not batches.is_inference())
    )


def moments(call: Call) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel; zeros if `x` is empty."""
    mean, var = torch.zeros((2, call.x.shape[1]), dtype=STATISTICS, device="cpu")
    if call.x.numel() > 0:
        laid = memory_format(call.x)
        with torch.no_grad():
            x = arrays.dense(call.x, laid)
            launch.moments(arrays.batch(x, laid), _counts(call, laid), mean.numpy(), var.numpy())
    return mean, var


def forward(call: Call, how: How) -> tuple[Tensor, Tensor, Tensor | None]:
    """`y`, the statistics (their first rows as in `How`), and weight and bias as `tables`; None if they are behind."""
    x, laid = call.x, memory_format(call.x)
    y = empty_like(x, laid)
    if how.statistics is None and how.plan.parts is None and call.counts is None and x.numel() > 0:
        return y, _forward_whole(call, how, y, laid), None
    statistics = how.statistics
    if statistics is None:
        statistics = torch.empty((3, len(how.parts), x.shape[1]), dtype=STATISTICS, device="cpu")
    affine = tables(call)
    if x.numel() == 0:
        return y, statistics, affine
    held = y, arrays.dense(x, laid), None if call.residual is None else arrays.dense(call.residual, laid)
    data = *(arrays.batch(t, laid) for t in held), _counts(call, laid)
    weight, bias = arrays.view(affine)
    for part, mean, var, rstd in zip(how.parts, *arrays.view(statistics), strict=True):
        y_, x_, residual, counts = _of_part(part, x, data)
        if how.statistics is None:
            launch.forward(x_, residual, counts, weight, bias, call.eps, call.activation, y_, mean, var, rstd)
        else:
            launch.normalize(x_, residual, mean, rstd, weight, bias, call.activation, y_)
        if how.running is not None:
            moved = _move(how.running, part.count, mean, var, how.plan.unbiased)
            how.running.note(moved)
    return y, statistics, affine


def again(call: Call, how: How, statistics: Tensor, kept: Tensor | None) -> Callable[..., Tensor]:
    """What makes `y` again from `x` and the residual, by the stage that made it."""
    laid, activation = memory_format(call.x), call.activation
    descriptor = _descriptor(call.x.shape, laid, call.x.dtype, activation, int(call.residual is not None))
    parts, channels = how.plan.parts, call.x.shape[1]

    def make(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y, x = empty_like(x, laid), arrays.dense(x, laid)
        residual = None if residual is None else arrays.dense(residual, laid)
        if parts is None:
            beside, at = x if residual is None else residual, statistics.data_ptr()
            affine = at + TABLES * channels if kept is None else kept.data_ptr()
            whole.normalize(descriptor, x.data_ptr(), beside.data_ptr(), y.data_ptr(), affine, at)
            return y
        data = tuple(arrays.batch(t, laid) for t in (y, x, residual))
        weight, bias = arrays.view(_affine(statistics, kept))
        for part, mean, _, rstd in zip(parts, *arrays.view(statistics), strict=True):
            y_, x_, residual_ = _of_part(part, x, data)
            launch.normalize(x_, residual_, mean, rstd, weight, bias, activation, y_)
        return y

    return make


@functools.lru_cache(maxsize=1 << 12)
def _descriptor(
    size: torch.Size, laid: torch.memory_format, dtype: torch.dtype, activation: tuple[str, float], residual: int,
    in_place: bool = False,
) -> whole.Descriptor:  # fmt: skip
    """What a whole pass is made for. Layers meet the same ones in every step, and describing one takes a while."""
    return whole.Descriptor(arrays.shape(size, laid), arrays.TYPES[dtype], activation, residual, in_place)


def _forward_whole(call: Call, how: How, y: Tensor, laid: torch.memory_format) -> Tensor:
    """`forward` of a batch without counts, or by constants: `y` is written, the statistics and tables returned."""
    x, exact, weight, bias, running = arrays.dense(call.x, laid), call.arithmetic, call.weight, call.bias, how.running
    residual, channels = x if call.residual is None else arrays.dense(call.residual, laid), x.shape[1]
    weight = None if weight is None else arrays.channels(weight, exact)
    bias = None if bias is None else arrays.channels(bias, exact)
    statistics = EMPTY[STATISTICS].new_empty((4 if exact is torch.float32 else 5, 1, channels))
    descriptor = _descriptor(x.shape, laid, x.dtype, call.activation, int(call.residual is not None))
    at = statistics.data_ptr()
    affine = 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr()
    if how.plan.constants is not None:
        mean, var = how.plan.constants
        dtype = mean.dtype if mean.dtype is var.dtype and mean.dtype in ZERO else torch.float64
        mean, var = arrays.channels(mean, dtype), arrays.channels(var, dtype)
        constants = *affine, mean.data_ptr(), var.data_ptr(), ZERO[dtype], call.eps
        whole.normalize(
            descriptor, x.data_ptr(), residual.data_ptr(), y.data_ptr(), at + TABLES * channels, at, constants
        )
        return statistics
    moved = whole.forward(
        descriptor, x.data_ptr(), residual.data_ptr(), y.data_ptr(), *affine, at + TABLES * channels, at, call.eps,
        whole.STAY if running is None else _how_to_move(running, how.count, how.plan.unbiased),
    )  # fmt: skip
    if running is not None and not moved:
        running.note(False)
    elif running is not None:
        moving = running.mean, running.var, running.batches
        torch._C._increment_version([t for t in moving if t is not None])
    return statistics


def _affine(statistics: Tensor, kept: Tensor | None) -> Tensor:
    """Weight and bias as `(2, C)`: kept apart, or behind the statistics."""
    exact = torch.float32 if len(statistics) == 4 else torch.float64
    return statistics[3:].view(exact).view(2, -1) if kept is None else kept


def _move(running: Running, count: float, mean: Any, var: Any, unbiased: bool) -> bool:
    """Move running statistics that the kernel `can_move`, if those of the batch are finite."""
    assert running.mean is not None
    assert running.var is not None
    *_, rate, factor, _ = _how_to_move(running, count, unbiased)
    moved = move(mean, var, rate, factor, arrays.view(running.mean), arrays.view(running.var))
    if moved:
        torch.autograd.graph.increment_version((running.mean, running.var))
    return moved


def _how_to_move(running: Running, count: float, unbiased: bool) -> whole.Move:
    """How to move running statistics that the kernel `can_move`."""
    mean, var, momentum, batches, _, _ = running
    assert mean is not None
    assert var is not None
    rate = running.rate() if momentum is None else momentum
    factor = float(correction(count)) if unbiased else 1.0
    counter = 0 if batches is None else batches.data_ptr()
    return mean.data_ptr(), var.data_ptr(), ZERO[mean.dtype], float(rate), factor, counter


def backward(dy: Tensor, call: Call, how: How, statistics: Tensor, kept: Tensor | None, needs: Needs) -> Gradients:
    """The gradients.

    Args:
        dy: The gradient of `y`.
        call, how: As in `forward`, with `y` in place of the residual if the call `keeps_output`.
        statistics, kept: From `forward`.
        needs: As in `Needs`.
    """
    x, laid = call.x, memory_format(call.x)
    given = arrays.dense(dy, laid)
    is_copy = type(given) is Tensor and given.data_ptr() != dy.data_ptr()
    dx = d_residual = None
    if needs.dx:
        dx = given if needs.may_overwrite_dy or is_copy else empty_like(x, laid)
    if needs.d_residual and call.residual is not None:
        d_residual = empty_like(x, laid)
    group = how.plan.group if needs.dx else None
    if x.numel() == 0:
        if group is not None:
            group.reduce(torch.zeros((2, len(how.parts), x.shape[1]), dtype=STATISTICS))
        d_weight, d_bias = (torch.zeros(x.shape[1], dtype=call.arithmetic, device="cpu") for _ in range(2))
        return dx, d_weight, d_bias, d_residual
    held = [given, arrays.dense(x, laid), None if call.residual is None else arrays.dense(call.residual, laid)]
    held += [dx, d_residual]
    if dx is not None or d_residual is not None:  # the kernels write both or none
        held[3] = empty_like(x, laid) if dx is None else dx
        held[4] = empty_like(x, laid) if d_residual is None and call.residual is not None else d_residual
    if held[3] is not None and group is None and how.plan.parts is None and call.counts is None:
        return dx, *_backward_whole(held, call, how, laid, statistics, kept), d_residual
    affine = _affine(statistics, kept)
    return dx, *_backward_by_parts(held, call, how, laid, statistics[:3], affine), d_residual


def _backward_whole(
    held: list[Tensor | None], call: Call, how: How, laid: torch.memory_format, statistics: Tensor,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`backward` of a batch without counts: what `held` has room for is written, the rest returned."""
    dy, x, residual, dx, d_residual = held
    assert dy is not None
    assert x is not None
    assert dx is not None
    empty, channels = EMPTY[call.arithmetic], x.shape[1]
    d_weight, d_bias = empty.new_empty(channels), empty.new_empty(channels)
    kind, at = 0 if residual is None else 1 + keeps_output(call), statistics.data_ptr()
    whole.backward(
        _descriptor(x.shape, laid, x.dtype, call.activation, kind, dx is dy),
        dy.data_ptr(), x.data_ptr(), (x if residual is None else residual).data_ptr(), dx.data_ptr(),
        (dx if d_residual is None else d_residual).data_ptr(),
        at + TABLES * channels if kept is None else kept.data_ptr(), at,
        d_weight.data_ptr(), d_bias.data_ptr(), how.count,
    )  # fmt: skip
    return d_weight, d_bias


def _backward_by_parts(
    held: list[Tensor | None], call: Call, how: How, laid: torch.memory_format, statistics: Tensor, affine: Tensor
) -> tuple[Tensor, Tensor]:
    """`backward` of any call."""
    dy, x, residual, dx, d_residual = (arrays.batch(t, laid) for t in held)
    if held[3] is held[0]:
        dx = dy  # the kernels ask whether it is the same array
    sums = np.zeros((2, len(how.parts), x.shape[1]))
    given, group = (dy, x, residual, _counts(call, laid), dx, d_residual), how.plan.group if dx is not None else None
    for part, mean, _, rstd, *own in zip(how.parts, *arrays.view(statistics), *sums, strict=True):
        dy_, x_, residual_, counts, *outputs = _of_part(part, call.x, given)
        weight, bias = arrays.view(affine)
        constants = mean, rstd, weight, bias
        of_output = keeps_output(call)
        if outputs[0] is not None and group is None:
            launch.backward(
                dy_, x_, residual_, counts, *constants, part.count, call.activation, *own, *outputs, of_output=of_output
            )
            continue
        exact = launch.grad_sums(dy_, x_, residual_, *constants, call.activation, *own, of_output=of_output)
        if group is not None:
            all_dz, all_dz_xhat = group.reduce(torch.from_numpy(sums.copy()))[:, 0].numpy()
            launch.grad_input(
                dy_, x_, residual_, counts, *constants, all_dz, all_dz_xhat, part.count, call.activation, *outputs,
                of_output=of_output, exact=exact,
            )  # fmt: skip
    d_bias, d_weight = (
        arrays.tensor(each, call.arithmetic) for each in (sums[:, 0] if len(how.parts) == 1 else sums.sum(1))
    )
    return d_weight, d_bias


def old_bias(statistics: Tensor, kept: Tensor | None) -> Tensor:
    """The bias as it was in `forward`."""
    return _affine(statistics, kept)[1]


def tables(call: Call) -> Tensor:
    """Weight and bias as `(2, C)`, copied because the bias may change before the backward pass."""
    return arrays.tables(call.weight, call.bias, call.x.shape[1], call.arithmetic)


# --- Tensors as arrays -----------------------------------------------------------------------------------------------


def _counts(call: Call, laid: torch.memory_format) -> Any:
    """The counts that go with the array of a batch: `(N, L)` or `(N*L, 1)`."""
    if call.counts is None:
        return None
    rows = call.counts.shape[0] if laid is torch.contiguous_format else call.counts.numel()
    return call.counts.contiguous().numpy(force=True).reshape(rows, call.counts.numel() // rows)


def _of_part(part: Part, x: Tensor, arrays: tuple[Any, ...]) -> list[Any]:
    """The rows of each array that belong to one part of the samples."""
    if part.samples.stop is None:
        return list(arrays)
    length = len(arrays[1]) // len(x)
    rows = slice(part.samples.start * length, part.samples.stop * length)
    views = {id(array): array[rows] for array in arrays if array is not None}  # one view of what is given twice
    return [None if array is None else views[id(array)] for array in arrays]
