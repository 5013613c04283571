"""The stages on GPU tensors, by the Triton kernels, which are imported when they are first needed.

A step of training makes some hundred passes, most of them like one of the step before: only values and addresses are
others. So what a pass was made for is kept as a key, with how the kernels make it again. What is left to do on the host
is to build the key, to find room for the outputs, and to start the kernel.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.torch import deferred
from batchnorm.torch.call import Call, Plan, is_plain
from batchnorm.torch.function import Gradients, How, Needs, keeps_output
from batchnorm.torch.layout import memory_format
from batchnorm.torch.running import Running

__all__ = [
    "DTYPES", "STATISTICS", "again", "backward", "can_move", "forward", "is_available", "moments", "old_bias", "takes",
]  # fmt: skip

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The types that the kernels support."""

STATISTICS = torch.float32
"""The type of means, variances and sums."""

VECTOR = 16
"""Bytes that a thread loads at once."""

OLDEST = 8, 0
"""The oldest compute capability that the kernels support: Ampere."""


@functools.cache
def is_available(device: torch.device) -> bool:
    """Whether the kernels run on this device: an NVIDIA GPU, with Triton installed."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < OLDEST:
        return False
    try:
        _kernels()
    except ImportError:
        return False
    return True


def can_move(running: Running, x: Tensor, plan: Plan) -> bool:
    """Whether the forward kernel can move these running statistics.

    They must be dense and on the device of `x`. Their type must have the range of float32, so that what is finite in
    the kernel stays finite in them.
    """
    mean, var, batches, skipped = running.mean, running.var, running.batches, running.skipped
    if mean is None or var is None or mean.dtype is torch.float16 or var.dtype is torch.float16:
        return False
    return (
        is_plain(x, mean, var, batches, skipped)
        and mean.is_contiguous()
        and var.is_contiguous()
        and not (mean.is_neg() or var.is_neg() or mean._is_zerotensor() or var._is_zerotensor())
        and (batches is None or (batches.dtype is torch.int64 and batches.is_contiguous()))
        and (skipped is None or (skipped.dtype is torch.int64 and skipped.is_contiguous()))
    )


def takes(x: Tensor) -> bool:
    """Whether the kernels can load `x` in whole vectors; if channels are adjacent, they must fill whole vectors."""
    if x.is_contiguous() and x.numel() != x.shape[0] * x.shape[1]:
        return True
    return x.shape[1] * x.element_size() % VECTOR == 0


@functools.cache
def _kernels() -> Any:
    from batchnorm.kernels import gpu

    return gpu


def moments(call: Call) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel; zeros if `x` is empty."""
    x = call.x.detach()
    mean, var = x.new_zeros((2, x.shape[1]), dtype=STATISTICS)
    if x.numel() > 0:
        laid = memory_format(x)
        _kernels().moments(_dense(x, laid), _counts(call), mean, var, shape=_shape(x, laid))
    return mean, var


# --- Passes that were made before ------------------------------------------------------------------------------------


_forwards: dict[tuple[Any, ...], Any] = {}
_backwards: dict[tuple[Any, ...], Any] = {}
"""Passes that can be made again, on tensors without gaps that begin at a multiple of `VECTOR`."""

MOST_PASSES = 1 << 12
"""Passes that are kept, in each direction: more than a network makes, unless its inputs always have new shapes."""


def _keep(passes: dict[tuple[Any, ...], Any], key: tuple[Any, ...], again: Any) -> None:
    if len(passes) >= MOST_PASSES:
        passes.clear()
    passes[key] = again


def _at(t: Tensor | None) -> int:
    """Its address: 0 if there is none, and odd if its values are not those in memory."""
    if t is None:
        return 0
    return 1 if t.is_neg() else t.data_ptr()


_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


@functools.cache
def _quick_room() -> Callable[..., Tensor] | None:
    """What compiled graphs call instead of `torch.empty_strided`; None if this PyTorch has nothing that works like it.

    It leaves out the dispatcher, and knows the current device only. How much time that saves on a GPU's host was not
    measured; on the CPU its sibling takes half of that of `torch.empty_like`.
    """
    try:
        guards: Any = torch._C._dynamo.guards  # pyright: ignore[reportAttributeAccessIssue]
        make: Callable[..., Tensor] = guards._empty_strided_cuda
        made = make((2, 3), (1, 2), STATISTICS)
        works = made.is_cuda and made.dtype is STATISTICS and (made.shape, made.stride()) == ((2, 3), (1, 2))
    except Exception:  # it is private: whatever another version raises, PyTorch's public function will do
        return None
    return make if works else None


def _room(device: torch.device) -> Callable[..., Tensor]:
    """A function of two tuples, size and strides, and a type that makes a tensor there, without values."""
    quick = _quick_room() if device.index == _current_device() else None
    return quick or (lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device))


# --- The stages ------------------------------------------------------------------------------------------------------


def forward(call: Call, how: How) -> tuple[Tensor, Tensor, None]:
    """`y` and the statistics: mean, variance, `1/sqrt(var + eps)`, and the bias; copies, if they are constants."""
    if how.statistics is not None:
        return _normalize(call, how.statistics, how)
    x, residual, counts, (weight, bias) = call.x, call.residual, _counts(call), _dense_vectors(call)
    size, stride, dtype, device, parts = tuple(x.shape), x.stride(), x.dtype, x.device, how.plan.parts
    channels, groups = size[1], 1 if parts is None else len(parts)
    constant, running = how.plan.constants is not None, _running(how)
    key = (
        size, stride, dtype, device, call.activation, groups, constant,
        None if weight is None else weight.dtype, None if bias is None else bias.dtype,
        None if residual is None else residual.stride(), counts is None,
        None if running is None else (
            running.mean.dtype, running.var.dtype, running.update_rate is None, running.unbiased,
            running.batches_tracked is None, running.batches_skipped is None,
        ),
    )  # fmt: skip
    if running is not None and not constant:
        torch._C._increment_version((running.mean, running.var))
    room = _room(device)
    statistics = room((4, groups, channels), (groups * channels, channels, 1), STATISTICS)
    again, at_x, at_residual, at_counts = _forwards.get(key), _at(x), _at(residual), _at(counts)
    if again is not None and (at_x | at_residual | at_counts) % VECTOR == 0:
        y = room(size, stride, dtype)
        again.forward(at_x, at_residual or None, at_counts or None, weight, bias, call.eps, y, statistics, running)
        return y, statistics, None
    laid = memory_format(x)
    dense, beside = _dense(x, laid), None if residual is None else _dense(residual, laid)
    y = torch.empty_like(dense)
    again = _kernels().forward_packed(
        dense, beside, counts, weight, bias, call.eps, call.activation, y, statistics,
        shape=_shape(x, laid), running=running, constant=constant, groups=groups, samples=len(x),
    )  # fmt: skip
    if again is not None and dense is x and beside is residual:
        _keep(_forwards, key, again)
    return y, statistics, None


def again(call: Call, how: How, statistics: Tensor, kept: None) -> Callable[..., Tensor]:
    """What makes `y` again from `x` and the residual, by the statistics that made it and copies of the parameters."""
    weight, bias = (None if t is None else t.detach().clone() for t in (call.weight, call.bias))
    bare = call._replace(weight=weight, bias=bias, residual=None, counts=None, x=statistics)
    how = how._replace(statistics=statistics[:3], running=None)

    def make(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y, *_ = forward(bare._replace(x=x, residual=residual), how)
        return y

    return make


def _running(how: How) -> Any:
    """The running statistics that the kernel moves, or normalizes by if they are constants."""
    if how.plan.constants is not None:
        constants = [_vector(t if t.dtype in DTYPES else t.to(STATISTICS)) for t in how.plan.constants]
        return _kernels().Running(*constants, 0.0, False, None, None)
    if how.running is None:
        return None
    mean, var, momentum, batches, skipped, _ = how.running
    rate = None if momentum is None and batches is not None else float(momentum or 0.0)
    return _kernels().Running(mean, var, rate, how.plan.unbiased, batches, skipped)


def _normalize(call: Call, found: Tensor, how: How) -> tuple[Tensor, Tensor, None]:
    """`forward` by statistics that are known."""
    laid, (mean, _, rstd) = memory_format(call.x), found.unbind()
    x = _dense(call.x, laid)
    y = torch.empty_like(x)
    bias = torch.zeros_like(mean) if call.bias is None else call.bias.detach().to(STATISTICS).expand_as(mean)
    if x.numel() > 0:
        _kernels().normalize(
            x, None if call.residual is None else _dense(call.residual, laid), mean, rstd, *_dense_vectors(call),
            call.activation, y, shape=_shape(x, laid), samples=len(x),
            groups=1 if how.plan.parts is None else len(how.plan.parts),
        )  # fmt: skip
    return y, torch.cat([found, bias[None]]), None


def backward(dy: Tensor, call: Call, how: How, statistics: Tensor, kept: None, needs: Needs) -> Gradients:
    """The gradients.

    Args:
        dy: The gradient of `y`.
        call, how: As in `forward`, with `y` in place of the residual if the call `keeps_output`.
        statistics: From `forward`.
        kept: None; nothing else is kept.
        needs: As in `Needs`; `dy` is never overwritten.
    """
    x, residual, counts, weight = call.x, call.residual, _counts(call), _dense_vectors(call)[0]
    if counts is not None and how.plan.group is None:  # the other processes would wait for one that fails here
        deferred.tell()
    if x.numel() == 0 or (how.plan.group is not None and needs.dx):
        return _backward_in_stages(dy, call, how, statistics, needs)
    size, stride, dtype, device = tuple(x.shape), x.stride(), x.dtype, x.device
    _, groups, channels = statistics.shape
    count, of_output = _count(call, how), keeps_output(call)
    of_each = isinstance(count, Tensor)
    key = (
        size, stride, dy.stride(), dtype, device, call.activation, groups,
        None if weight is None else weight.dtype, None if residual is None else residual.stride(), counts is None,
        needs[:2], of_output, of_each, not of_each and count == math.inf,
    )  # fmt: skip
    room = _room(device)
    sums = ((channels,), (1,)) if groups == 1 else ((groups, channels), (channels, 1))
    d_bias, d_weight = room(*sums, STATISTICS), room(*sums, STATISTICS)
    again, at_x, at_dy = _backwards.get(key), _at(x), _at(dy)
    at_residual, at_counts = _at(residual), _at(counts)
    if again is not None and (at_x | at_dy | at_residual | at_counts) % VECTOR == 0:
        dx = room(size, stride, dtype) if needs.dx else None
        d_residual = room(size, stride, dtype) if needs.d_residual and residual is not None else None
        again.backward(
            at_dy, at_x, at_residual or None, at_counts or None, weight, statistics, count, d_bias, d_weight, dx,
            d_residual,
        )  # fmt: skip
    else:
        laid = memory_format(x)
        dense, dense_dy = _dense(x, laid), _dense(dy, laid)
        beside = None if residual is None else _dense(residual, laid)
        dx = torch.empty_like(dense) if needs.dx else None
        d_residual = torch.empty_like(dense) if needs.d_residual and residual is not None else None
        again = _kernels().backward_packed(
            dense_dy, dense, beside, counts, weight, statistics, count, call.activation, d_bias, d_weight, dx,
            d_residual, of_output=of_output, shape=_shape(x, laid), samples=len(x),
        )  # fmt: skip
        if again is not None and dense is x and dense_dy is dy and beside is residual:
            _keep(_backwards, key, again)
    if groups > 1:
        d_bias, d_weight = d_bias.sum(0), d_weight.sum(0)
    return dx, d_weight, d_bias, d_residual


def _backward_in_stages(dy: Tensor, call: Call, how: How, statistics: Tensor, needs: Needs) -> Gradients:
    """The gradients of no values, or of values that share their statistics with other processes."""
    laid, group = memory_format(call.x), how.plan.group if needs.dx else None
    x, dy = _dense(call.x, laid), _dense(dy, laid)
    residual = None if call.residual is None else _dense(call.residual, laid)
    dx = torch.empty_like(x) if needs.dx else None
    d_residual = torch.empty_like(x) if needs.d_residual and residual is not None else None
    sums = torch.zeros((2, x.shape[1]), dtype=STATISTICS, device=x.device)
    mean, _, rstd, bias = statistics
    given = mean, rstd, _dense_vectors(call)[0], bias[0]
    how_far: dict[str, Any] = {"of_output": keeps_output(call), "shape": _shape(x, laid)}
    if x.numel() > 0:
        _kernels().grad_sums(dy, x, residual, *given, call.activation, *sums, **how_far)
    total = sums if group is None else group.reduce(sums.clone())
    if x.numel() > 0:
        _kernels().grad_input(
            dy, x, residual, _counts(call), *given, *total, _count(call, how), call.activation, dx, d_residual,
            **how_far,
        )  # fmt: skip
    d_bias, d_weight = sums.unbind()
    return dx, d_weight, d_bias, d_residual


def old_bias(statistics: Tensor, kept: None) -> Tensor:
    """The bias as it was in `forward`."""
    return statistics[3, 0]


def _count(call: Call, how: How) -> Any:
    """The count behind the statistics: a number, one per group, or None for the number of values in each group."""
    if how.plan.parts is None:
        return how.count.reshape(1).to(STATISTICS) if isinstance(how.count, Tensor) else how.count
    if call.counts is None:
        return None
    found = [part.count for part in how.plan.parts]
    if isinstance(found[0], Tensor):
        return torch.stack(found).to(STATISTICS)
    return torch.tensor(found, dtype=STATISTICS, device=call.x.device)


def _dense(x: Tensor, laid: torch.memory_format) -> Tensor:
    """The tensor in this memory format, without gaps, aligned to a vector."""
    x = x.resolve_neg() if x.is_neg() else x
    if not x.is_contiguous(memory_format=laid):
        return x.contiguous(memory_format=laid)
    return x if x.data_ptr() % VECTOR == 0 else x.clone(memory_format=laid)


def _dense_vectors(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias as the kernels read them."""
    weight, bias = call.weight, call.bias
    return None if weight is None else _vector(weight), None if bias is None else _vector(bias)


def _vector(t: Tensor) -> Tensor:
    """Values of `(C,)` whose memory the kernels may read by its address: a copy only if necessary."""
    if t.is_contiguous() and not t.is_neg() and not t._is_zerotensor():
        return t
    return (torch.zeros_like(t) if t._is_zerotensor() else t.detach()).resolve_neg().contiguous()


def _shape(x: Tensor, laid: torch.memory_format) -> tuple[int, int, int]:
    """`(N, C, L)`, or `(N*L, C, 1)` for channels last."""
    n, c, *positions = x.shape
    length = math.prod(positions)
    return (n, c, length) if laid is torch.contiguous_format else (n * length, c, 1)


def _counts(call: Call) -> Tensor | None:
    """The counts without gaps; `(N, L)` and `(N*L, 1)` are the same memory."""
    return None if call.counts is None else call.counts.contiguous()
