"""The stages on CPU tensors, by the Numba kernels, which take NumPy arrays."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from batchnorm.kernels import launch, threads
from batchnorm.torch.allocator import empty_like
from batchnorm.torch.call import Call, Part
from batchnorm.torch.function import Gradients, How, Needs, keeps_output
from batchnorm.torch.layout import memory_format
from batchnorm.torch.running import Running

__all__ = ["DTYPES", "STATISTICS", "backward", "can_move", "forward", "moments", "old_bias", "tables"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""The types that the kernels support."""

STATISTICS = torch.float64
"""The type of means, variances and sums."""

_TYPES = {
    torch.float32: np.dtype(np.float32).str, torch.float64: np.dtype(np.float64).str,
    torch.bfloat16: np.dtype(np.uint16).str,
}  # fmt: skip
"""How NumPy writes the types."""

threads.follow(torch.get_num_threads)


def can_move(running: Running, x: Tensor) -> bool:
    """Whether `forward` moves the running statistics itself: never."""
    return False


Tables = tuple[Any, Any]
"""Weight and bias as arrays in the type of the arithmetic; None where there are none."""


def moments(call: Call) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel; zeros if `x` is empty."""
    mean, var = torch.zeros((2, call.x.shape[1]), dtype=STATISTICS, device="cpu")
    if call.x.numel() > 0:
        laid = memory_format(call.x)
        with torch.no_grad():
            launch.moments(_array(call.x, laid), _counts(call, laid), mean.numpy(), var.numpy())
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
    arrays = _array(y, laid), _array(x, laid), _array(call.residual, laid), _counts(call, laid)
    for part, mean, var, rstd in zip(how.parts, *statistics.numpy(), strict=True):
        y_, x_, residual, counts = _of_part(part, x, arrays)
        if how.statistics is None:
            launch.forward(x_, residual, counts, *affine, call.eps, call.activation, y_, mean, var, rstd)
        else:
            launch.normalize(x_, residual, mean, rstd, *affine, call.activation, y_)
    return y, statistics, affine


def backward(dy: Tensor, call: Call, how: How, statistics: Tensor, affine: Tables, needs: Needs) -> Gradients:
    """The gradients.

    Args:
        dy: The gradient of `y`.
        call, how: As in `forward`, with `y` in place of the residual if the call `keeps_output`.
        statistics, affine: From `forward`.
        needs: As in `Needs`.
    """
    x, laid = call.x, memory_format(call.x)
    dense = dy.resolve_neg().contiguous(memory_format=laid)
    is_copy = type(dense) is Tensor and dense.data_ptr() != dy.data_ptr()
    over_dy = needs.dx and (needs.may_overwrite_dy or is_copy)
    dx = None
    if needs.dx:
        dx = dense if over_dy else empty_like(x, laid)
    d_residual = empty_like(x, laid) if needs.d_residual and call.residual is not None else None
    group = how.plan.group if needs.dx else None
    sums = torch.zeros((2, len(how.parts), x.shape[1]), dtype=STATISTICS, device="cpu")
    if x.numel() == 0:
        if group is not None:
            group.reduce(sums.clone())
        return dx, sums[1, 0], sums[0, 0], d_residual
    inputs = _array(x, laid), _array(call.residual, laid)
    written = _output(dx, laid), _output(d_residual, laid)
    dy_array = written[0] if over_dy else _array(dense, laid)
    if dx is not None or d_residual is not None:  # the kernels write both or none
        written = tuple(
            np.empty_like(of) if out is None and of is not None else out
            for of, out in zip(inputs, written, strict=True)
        )
    arrays = dy_array, *inputs, _counts(call, laid), *written
    for part, mean, _, rstd, *own in zip(how.parts, *statistics.numpy(), *sums.numpy(), strict=True):
        dy_, x_, residual, counts, *outputs = _of_part(part, x, arrays)
        given = mean, rstd, *affine
        of_output = keeps_output(call)
        if outputs[0] is not None and group is None:
            launch.backward(
                dy_, x_, residual, counts, *given, part.count, call.activation, *own, *outputs, of_output=of_output
            )
            continue
        exact = launch.grad_sums(dy_, x_, residual, *given, call.activation, *own, of_output=of_output)
        if group is not None:
            all_dz, all_dz_xhat = group.reduce(sums.clone())[:, 0].numpy()
            launch.grad_input(
                dy_, x_, residual, counts, *given, all_dz, all_dz_xhat, part.count, call.activation, *outputs,
                of_output=of_output, exact=exact,
            )  # fmt: skip
    d_bias, d_weight = sums[:, 0] if len(how.parts) == 1 else sums.sum(1)
    return dx, d_weight, d_bias, d_residual


def old_bias(statistics: Tensor, affine: Tables) -> Tensor:
    """The bias as it was in `forward`."""
    return torch.from_numpy(affine[1])


# --- Tensors as arrays -----------------------------------------------------------------------------------------------


def _array(t: Tensor | None, laid: torch.memory_format) -> Any:
    """The tensor as the kernels take it: `(N, C, L)`, or `(N*L, C, 1)` for channels last; copied only if necessary."""
    if t is None:
        return None
    t = t.contiguous(memory_format=laid)
    if type(t if t._base is None else t._base) is Parameter:
        t = t.detach().clone()  # sharding could not free the memory of a parameter that NumPy has seen
    if t.dtype is torch.bfloat16:
        t = t.detach().view(torch.uint16)
    if laid is torch.contiguous_format:
        return t.numpy(force=True).reshape(t.shape[0], t.shape[1], t.shape[2:].numel())
    return t.movedim(1, -1).numpy(force=True).reshape(-1, t.shape[1], 1)


class _Memory:
    """What NumPy makes an array of."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def _output(t: Tensor | None, laid: torch.memory_format) -> Any:
    """A dense tensor of our own as such an array.

    `Tensor.numpy` would mark its memory as shared with NumPy for good, and no layer could overwrite it any more.
    """
    if t is None:
        return None
    shape = (t.numel() // t.shape[1], t.shape[1], 1)
    if laid is torch.contiguous_format:
        shape = (t.shape[0], t.shape[1], t.shape[2:].numel())
    interface = {"version": 3, "data": (t.data_ptr(), False), "shape": shape, "typestr": _TYPES[t.dtype]}
    return np.asarray(_Memory(interface))


def _counts(call: Call, laid: torch.memory_format) -> Any:
    """The counts that go with such an array: `(N, L)` or `(N*L, 1)`."""
    if call.counts is None:
        return None
    rows = call.counts.shape[0] if laid is torch.contiguous_format else call.counts.numel()
    return call.counts.contiguous().numpy(force=True).reshape(rows, call.counts.numel() // rows)


def tables(call: Call) -> Tables:
    """Weight and bias as the kernels take them: copies.

    So the bias may change before the backward pass, as PyTorch allows, and nothing keeps alive the memory of a
    parameter that sharding frees.
    """
    weight, bias = (
        None if values is None else values.detach().to(call.arithmetic, copy=True).numpy()
        for values in (call.weight, call.bias)
    )
    return weight, bias


def _of_part(part: Part, x: Tensor, arrays: tuple[Any, ...]) -> list[Any]:
    """The rows of each array that belong to one part of the samples."""
    if part.samples.stop is None:
        return list(arrays)
    length = len(arrays[1]) // len(x)
    rows = slice(part.samples.start * length, part.samples.stop * length)
    views = {id(array): array[rows] for array in arrays if array is not None}  # one view of what is given twice
    return [None if array is None else views[id(array)] for array in arrays]
