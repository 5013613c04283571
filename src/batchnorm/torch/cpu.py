"""The stages on CPU tensors, by the Numba kernels, which take NumPy arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.kernels import launch, threads
from batchnorm.kernels.running import move as launch_move
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

threads.follow(torch.get_num_threads)


def can_move(running: Running, x: Tensor, plan: Plan) -> bool:
    """Whether `forward` can move these running statistics: dense ones, by one batch that is not empty."""
    mean, var = running.mean, running.var
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
    )


Tables = tuple[Any, Any]
"""Weight and bias as arrays in the type of the arithmetic; None where there are none."""


def moments(call: Call) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel; zeros if `x` is empty."""
    mean, var = torch.zeros((2, call.x.shape[1]), dtype=STATISTICS, device="cpu")
    if call.x.numel() > 0:
        laid = memory_format(call.x)
        with torch.no_grad():
            launch.moments(arrays.batch(call.x, laid), _counts(call, laid), mean.numpy(), var.numpy())
    return mean, var


def forward(call: Call, how: How) -> tuple[Tensor, Tensor, Tables]:
    """`y`, the statistics as in `How`, and weight and bias as arrays."""
    x, laid, affine = call.x, memory_format(call.x), tables(call)
    y = empty_like(x, laid)
    statistics = how.statistics
    if statistics is None:
        statistics = torch.empty((3, len(how.parts), x.shape[1]), dtype=STATISTICS, device="cpu")
    if x.numel() == 0:
        return y, statistics, affine
    given = arrays.batch(y, laid), arrays.batch(x, laid), arrays.batch(call.residual, laid), _counts(call, laid)
    for part, mean, var, rstd in zip(how.parts, *arrays.view(statistics), strict=True):
        y_, x_, residual, counts = _of_part(part, x, given)
        if how.statistics is None:
            launch.forward(x_, residual, counts, *affine, call.eps, call.activation, y_, mean, var, rstd)
        else:
            launch.normalize(x_, residual, mean, rstd, *affine, call.activation, y_)
        if how.running is not None:
            _move(how.running, part.count, mean, var, how.plan.unbiased)
    return y, statistics, affine


def again(call: Call, how: How, statistics: Tensor, affine: Tables) -> Callable[..., Tensor]:
    """What makes `y` again from `x` and the residual, by the stage that made it."""
    parts, activation, laid = how.parts, call.activation, memory_format(call.x)

    def make(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = empty_like(x, laid)
        given = arrays.batch(y, laid), arrays.batch(x, laid), arrays.batch(residual, laid)
        for part, mean, _, rstd in zip(parts, *arrays.view(statistics), strict=True):
            y_, x_, residual_ = _of_part(part, x, given)
            launch.normalize(x_, residual_, mean, rstd, *affine, activation, y_)
        return y

    return make


def _move(running: Running, count: float, mean: Any, var: Any, unbiased: bool) -> None:
    """Move running statistics that the kernel `can_move`, and count the batch."""
    assert running.mean is not None
    assert running.var is not None
    rate = float(running.rate())
    factor = float(correction(count)) if unbiased else 1.0
    moved = launch_move(mean, var, rate, factor, arrays.view(running.mean), arrays.view(running.var))
    if moved:
        torch.autograd.graph.increment_version((running.mean, running.var))
    running.note(moved)


def backward(dy: Tensor, call: Call, how: How, statistics: Tensor, affine: Tables, needs: Needs) -> Gradients:
    """The gradients.

    Args:
        dy: The gradient of `y`.
        call, how: As in `forward`, with `y` in place of the residual if the call `keeps_output`.
        statistics, affine: From `forward`.
        needs: As in `Needs`.
    """
    x, laid = call.x, memory_format(call.x)
    dy = torch.zeros_like(dy) if dy._is_zerotensor() else dy  # it has no memory
    dense = dy.resolve_neg().contiguous(memory_format=laid)
    is_copy = type(dense) is Tensor and dense.data_ptr() != dy.data_ptr()
    over_dy = needs.dx and (needs.may_overwrite_dy or is_copy)
    dx = None
    if needs.dx:
        dx = dense if over_dy else empty_like(x, laid)
    d_residual = empty_like(x, laid) if needs.d_residual and call.residual is not None else None
    group = how.plan.group if needs.dx else None
    sums = np.zeros((2, len(how.parts), x.shape[1]))
    if x.numel() == 0:
        if group is not None:
            group.reduce(torch.from_numpy(sums))
        d_bias, d_weight = (torch.zeros(x.shape[1], dtype=call.arithmetic, device="cpu") for _ in range(2))
        return dx, d_weight, d_bias, d_residual
    inputs = arrays.batch(x, laid), arrays.batch(call.residual, laid)
    written = arrays.batch(dx, laid), arrays.batch(d_residual, laid)
    dy_array = written[0] if over_dy else arrays.batch(dense, laid)
    if dx is not None or d_residual is not None:  # the kernels write both or none
        written = tuple(
            np.empty_like(of) if out is None and of is not None else out
            for of, out in zip(inputs, written, strict=True)
        )
    given = dy_array, *inputs, _counts(call, laid), *written
    for part, mean, _, rstd, *own in zip(how.parts, *arrays.view(statistics), *sums, strict=True):
        dy_, x_, residual, counts, *outputs = _of_part(part, x, given)
        constants = mean, rstd, *affine
        of_output = keeps_output(call)
        if outputs[0] is not None and group is None:
            launch.backward(
                dy_, x_, residual, counts, *constants, part.count, call.activation, *own, *outputs, of_output=of_output
            )
            continue
        exact = launch.grad_sums(dy_, x_, residual, *constants, call.activation, *own, of_output=of_output)
        if group is not None:
            all_dz, all_dz_xhat = group.reduce(torch.from_numpy(sums.copy()))[:, 0].numpy()
            launch.grad_input(
                dy_, x_, residual, counts, *constants, all_dz, all_dz_xhat, part.count, call.activation, *outputs,
                of_output=of_output, exact=exact,
            )  # fmt: skip
    d_bias, d_weight = (
        arrays.tensor(each, call.arithmetic) for each in (sums[:, 0] if len(how.parts) == 1 else sums.sum(1))
    )
    return dx, d_weight, d_bias, d_residual


def old_bias(statistics: Tensor, affine: Tables) -> Tensor:
    """The bias as it was in `forward`."""
    return torch.from_numpy(affine[1])


# --- Tensors as arrays -----------------------------------------------------------------------------------------------


def _counts(call: Call, laid: torch.memory_format) -> Any:
    """The counts that go with the array of a batch: `(N, L)` or `(N*L, 1)`."""
    if call.counts is None:
        return None
    rows = call.counts.shape[0] if laid is torch.contiguous_format else call.counts.numel()
    return call.counts.contiguous().numpy(force=True).reshape(rows, call.counts.numel() // rows)


def tables(call: Call) -> Tables:
    """Weight and bias as the kernels take them: copies, because the bias may change before the backward pass."""
    return arrays.table(call.weight, call.arithmetic), arrays.table(call.bias, call.arithmetic)


def _of_part(part: Part, x: Tensor, arrays: tuple[Any, ...]) -> list[Any]:
    """The rows of each array that belong to one part of the samples."""
    if part.samples.stop is None:
        return list(arrays)
    length = len(arrays[1]) // len(x)
    rows = slice(part.samples.start * length, part.samples.stop * length)
    views = {id(array): array[rows] for array in arrays if array is not None}  # one view of what is given twice
    return [None if array is None else views[id(array)] for array in arrays]
