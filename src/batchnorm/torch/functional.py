"""`batch_norm`: checks, and the choice of the path.

Three paths lead to the same answers. On the CPU the kernels run, inside one autograd function, or as an operator in
what `torch.compile` makes; tensors so small that its overhead would show take PyTorch's own operation. Everything else
(other devices, other types of data, `torch.export`, `torch.func`, forward-mode and higher derivatives) is composed of
PyTorch's elementary operations, each differentiable in any way.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchnorm.definition import ActivationSpec, Moments, parse_activation
from batchnorm.kernels import launch as kernels
from batchnorm.kernels import threads
from batchnorm.torch import autograd, composed, operators, transforms, variants
from batchnorm.torch.arrays import memory_format
from batchnorm.torch.statistics import BatchStatistics, Renorm, RunningStatistics, Statistics, expect

__all__ = ["batch_norm", "moments"]

threads.follow(torch.get_num_threads)
_parse = functools.lru_cache(maxsize=256)(parse_activation)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationSpec = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """Batch normalization, with what usually follows it in the same pass over memory.

    `y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)`, where `mean` and `var` are those of the batch
    in training and the running ones otherwise. In training the running ones move: `running += momentum * (batch -
    running)`, with the unbiased variance.

    Args:
        x: `(N, C, *spatial)`, of any strides.
        running_mean, running_var: `(C,)`; updated in place in training. Needed in evaluation. A batch whose statistics
            are not finite leaves them as they are.
        weight, bias: `(C,)`, gamma and beta; 1 and 0 if None.
        training: Whether to use the batch's statistics.
        momentum: The weight of the new batch in the running statistics.
        eps: Added to the variance, in the square of the units of `x`.
        activation: None, or a name, or `(name, parameter)`: relu, relu6, leaky_relu (slope), silu, hardswish, elu
            (alpha), sigmoid, tanh, gelu.
        residual: Of the shape of `x`, added before the activation.
        mask: `(N, *spatial)` or its first axes: booleans that say which positions count in the statistics, or
            non-negative weights (a weight of 2 counts a position twice). All positions are normalized. Without effect
            in evaluation.
        statistics: Where the statistics come from in training; `BatchStatistics()` if None.

    Returns:
        `y`, of the shape and type of `x`, in the memory format that `torch.nn.functional.batch_norm` gives.

    Raises:
        ValueError: If `x` has fewer than two axes; if `residual` or `mask` do not fit `x`; if there is only one value
            per channel in training; if a mask is negative or keeps fewer than two values; if the activation is
            unknown; if `eps` is negative; if a group of `GhostStatistics` has fewer than two values.
        TypeError: If `statistics` or `mask` are of another type.
        RuntimeError: If `weight`, `bias`, or a running statistic is not of shape `(C,)`, or has another floating-point
            type than `x` where `x` is float32 or float64; if the running statistics are missing in evaluation, or for
            `Renorm`; from `SyncStatistics`, as there.
        NotImplementedError: If `x` is not of a floating-point type.

    Differs from `torch.nn.functional.batch_norm`:
        1. `activation`, `residual`, `mask` and `statistics`.
        2. A batch whose statistics are not finite leaves the running statistics as they are.
        3. Statistics are float64 inside, and `x - mean` is taken before anything is multiplied: the error does not
           grow with `mean / std` (except in tensors so small that PyTorch's own operation is called).

    Source: Ioffe & Szegedy 2015, algorithm 1.
    """
    return normalize(
        x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, mask, statistics
    ).y


def moments(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Count, mean and biased variance of every channel, in float64: `definition.moments` of a tensor.

    Args:
        x: `(N, C, *spatial)`.
        mask: As in `batch_norm`; it may leave nothing.

    Returns:
        The count, and arrays of `(C,)`; zeros where nothing is counted.

    Raises:
        ValueError: If `x` has fewer than two axes; if the mask does not fit it, or is negative.
        NotImplementedError: If `x` is not of a floating-point type.
    """
    _check(x, None, None, None, None, None)
    weights = None if mask is None else _expand_mask(mask, x)
    if weights is not None:
        _check_weights(weights)
    count = composed.count(x, weights)
    mean, var = np.zeros((2, x.shape[1]))
    if count > 0 and _is_plain(x):
        mean, var = autograd.moments(x, weights)
    elif count > 0:
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        found = composed.moments(x.detach().to(exact), None if weights is None else weights.to(exact))
        mean, var = (values.cpu().double().numpy() for values in found)
    return Moments(count, mean, var)


class Normalized(NamedTuple):
    """`y`, and whether the batch went into the running statistics; None if it was not asked."""

    y: Tensor
    updated: bool | Tensor | None


def normalize(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: ActivationSpec,
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: Statistics | None,
    steps: Tensor | None = None,
) -> Normalized:
    """What `batch_norm` does; it also says what became of the running statistics. For layers, which count `steps`."""
    activation = parse_activation(activation) if torch.compiler.is_compiling() else _parse(activation)
    if statistics is not None:
        expect(statistics)
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    running = not training or isinstance(statistics, RunningStatistics)
    if running and (running_mean is None or running_var is None):
        raise RuntimeError(
            "running_mean and running_var must be defined in evaluation mode, and with RunningStatistics(): "
            "pass both, or training=True"
        )
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    unbiased = _is_unbiased(statistics)
    recomputed = not running and _is_recomputed()
    if recomputed and running_mean is not None and running_var is not None:
        running_mean, running_var = running_mean.clone(), running_var.clone()
    if not running and statistics is not None and not isinstance(statistics, BatchStatistics):
        return _normalize_variant(
            x, running_mean, running_var, weight, bias, momentum, eps, activation, residual, mask, statistics, steps,
            recomputed,
        )  # fmt: skip
    plain = _is_plain(x)
    # A trace and what is made of it know PyTorch's operation, and it asks nothing of sizes that are not fixed.
    if (plain and _takes_one_operation(x, residual, mask, running)) or (
        running and not torch.compiler.is_compiling() and torch._C._is_tracing()
    ):
        if not running and not unbiased and running_mean is not None and running_var is not None:
            y = _one_operation_biased(
                x, running_mean, running_var, weight, bias, float(momentum), eps, activation, residual
            )
        else:
            y = _one_operation(
                x, running_mean, running_var, weight, bias, not running, float(momentum), eps, activation, residual
            )
        return Normalized(y, None if running or recomputed else True)
    _check(x, running_mean, running_var, weight, bias, residual)
    weights = None if running or mask is None else _expand_mask(mask, x)
    count = math.inf if running else _count(x, weights)
    mean, var = (running_mean, running_var) if running else (None, None)
    if not isinstance(count, Tensor) and count == 0:
        mean = var = x.new_zeros(x.shape[1])  # the moments of nothing
    if plain and _takes_kernels(x, residual, running_mean, running_var, weight, bias):
        batch = autograd.Batch(float(count), eps, mean, var)
        y = autograd.batch_norm(x, weight, bias, residual, weights, batch, activation)
        mean, var = batch.mean, batch.var
    elif mean is None and _takes_operator(x, residual):
        through = transforms if transforms.active() else operators
        y, mean, var = through.batch_norm(x, weight, bias, residual, weights, eps, activation)
    else:
        if running and running_mean is not None and running_var is not None:
            mean, var = running_mean.detach(), running_var.detach()
        y, mean, var = composed.forward(x, weight, bias, residual, weights, mean, var, eps, activation)
        if not transforms.active():
            y = y.contiguous(memory_format=memory_format(x))
    if running:
        return Normalized(y, None)
    if running_mean is None or running_var is None:
        return Normalized(y, True)
    updated = _update_running(running_mean, running_var, count, mean, var, momentum, unbiased)
    return Normalized(y, None if recomputed else updated)


def _is_unbiased(statistics: Statistics | None) -> bool:
    """Whether the running variance moves towards the unbiased one."""
    if isinstance(statistics, Renorm):
        statistics = statistics.statistics
    return statistics is None or isinstance(statistics, RunningStatistics) or statistics.unbiased


def _normalize_variant(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    activation: tuple[str, float],
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: Any,
    steps: Tensor | None,
    recomputed: bool,
) -> Normalized:
    """Training by other statistics than those of the batch."""
    group = variants.group_of(statistics)
    if recomputed and isinstance(statistics, Renorm):
        raise RuntimeError(
            "Renorm() cannot be inside an activation checkpoint: the running statistics that it corrected towards have "
            "moved on when the forward pass is repeated. Leave the layer out of the checkpoint"
        )
    try:
        _check(x, running_mean, running_var, weight, bias, residual)
        weights = None if mask is None else _expand_mask(mask, x)
        if group is None:
            _count(x, weights)
        elif weights is not None:
            _check_weights(weights)
    except Exception:
        if group is not None:
            group.fail(x.device)  # the others wait for this process
        raise
    if x.numel() == 0 and group is None:  # the moments of nothing
        mean = x.new_zeros(x.shape[1])
        y, _, _ = composed.forward(x, weight, bias, residual, None, mean, mean, eps, activation)
        return Normalized(y, False)
    by_kernels = _is_plain(x) and _are_plain(x, residual, running_mean, running_var, weight, bias)
    y, count, mean, var = variants.normalize(
        x, weight, bias, residual, weights, running_mean, running_var, eps, activation, statistics, group, steps,
        by_kernels,
    )  # fmt: skip
    if not by_kernels and not transforms.active():
        y = y.contiguous(memory_format=memory_format(x))
    if running_mean is None or running_var is None:
        return Normalized(y, True)
    updated = _update_running(running_mean, running_var, count, mean, var, momentum, _is_unbiased(statistics))
    return Normalized(y, None if recomputed else updated)


def _is_recomputed() -> bool:
    """Whether a backward pass is under way: a checkpoint then repeats a forward pass that has been counted."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


# --- Checks ----------------------------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    if x.dim() < 2:
        raise ValueError(f"expected x of shape (N, C, *spatial), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise NotImplementedError(f"batch_norm takes floating-point tensors, got {x.dtype}: convert x, e.g. x.float()")
    exact = x.dtype is torch.float32 or x.dtype is torch.float64
    for name, value in (
        ("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias)
    ):  # fmt: skip
        if value is None:
            continue
        if value.numel() != x.shape[1] or value.dim() != 1:
            raise RuntimeError(
                f"{name} should contain {x.shape[1]} elements, in one axis, not {tuple(value.shape)}: "
                f"x has shape {tuple(x.shape)}, and its second axis is the channels"
            )
        if exact and value.dtype is not x.dtype:
            raise RuntimeError(
                f"mixed dtype: x is {x.dtype} and {name} is {value.dtype}; convert one of them, e.g. with .to(x.dtype)"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")


def _expand_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as weights of shape `(N, *spatial)`, of the type of `x` (float32 for half precision)."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    positions = (x.shape[0], *x.shape[2:])
    fits = 1 <= mask.dim() <= len(positions) and all(
        m in (1, size) for m, size in zip(mask.shape, positions, strict=False)
    )
    if not fits:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not fit x of shape {tuple(x.shape)}: "
            f"it must have the shape {positions}, without channels, or its first axes"
        )
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    weights = mask.detach().to(x.device, dtype)
    return weights.reshape(mask.shape + (1,) * (len(positions) - mask.dim())).expand(positions)


def _check_weights(weights: Tensor) -> None:
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("mask must hold booleans, or weights that are finite and not negative")


def _count(x: Tensor, weights: Tensor | None) -> float | Tensor:
    """How many values each channel has, which must be two at least."""
    values = x.numel() // max(1, x.shape[1])
    if weights is not None and (torch.compiler.is_compiling() or transforms.active()):
        return weights.sum(dtype=weights.dtype)  # what is the same for all cannot depend on what a mask holds
    if weights is not None and values > 0:
        _check_weights(weights)
        values = int((weights > 0).sum())
        if values == 0:
            raise ValueError(
                f"mask leaves nothing of x of shape {tuple(x.shape)}: skip this batch, or normalize with training=False"
            )
    if values == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}"
            f"{'' if weights is None else ' of which the mask keeps one'}. The variance of one value is 0. "
            "Drop the last, incomplete batch (drop_last=True), use larger batches, or evaluate (model.eval())"
        )
    count: float = torch.sym_float(values) if weights is None else float(weights.sum(dtype=torch.float64))  # pyright: ignore[reportAssignmentType]
    return count


# --- The running statistics ------------------------------------------------------------------------------------------


def _update_running(
    running_mean: Tensor,
    running_var: Tensor,
    count: float | Tensor,
    mean: Any,
    var: Any,
    momentum: float | Tensor,
    unbiased: bool,
) -> bool | Tensor:
    """`definition.update_running`, in place; a batch whose statistics are not finite, or that is empty, is left out."""
    if not isinstance(count, Tensor) and count == 0:
        return False
    if not unbiased:  # what follows multiplies by count / (count - 1)
        one = torch.where(count > 1, (count - 1) / count, 1.0) if isinstance(count, Tensor) else (count - 1) / count
        var = var * one if isinstance(count, Tensor) or count > 1 else var
    if isinstance(mean, np.ndarray) and running_mean.dtype is torch.bfloat16:
        mean, var = torch.from_numpy(mean), torch.from_numpy(var)
    if isinstance(mean, np.ndarray):
        updated = np.empty(1, np.bool_)
        kernels.update_running(
            mean,
            var,
            float(count),
            float(momentum),
            running_mean.detach().numpy(),
            running_var.detach().numpy(),
            updated,
        )
        torch.autograd.graph.increment_version((running_mean, running_var))
        return bool(updated[0])
    if transforms.active() and not torch.compiler.is_compiling():
        return transforms.update_running(running_mean, running_var, count, mean, var, momentum)
    if torch.autograd.forward_ad._current_level >= 0:
        mean, var = (torch.autograd.forward_ad.unpack_dual(values).primal for values in (mean, var))
    with torch.no_grad():
        correction: float | Tensor
        if isinstance(count, Tensor):
            correction = torch.where(count > 1, count / (count - 1), 1.0)
        else:
            correction = count / (count - 1) if count > 1 else 1.0
        # Converted first: a variance above 65504 is finite, but not in the float16 of `model.half()`.
        mean, var = mean.to(running_mean.dtype), (var * correction).to(running_var.dtype)
        finite: Tensor = var.isfinite().all() & mean.isfinite().all()
        if isinstance(count, Tensor):
            finite = finite & (count > 0)
        for running, batch in ((running_mean, mean), (running_var, var)):
            running.copy_(torch.where(finite, running + momentum * (batch - running), running))
        return finite


# --- The choice of the path -------------------------------------------------------------------------------------------


_KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _is_plain(x: Tensor) -> bool:
    """Whether this is an ordinary CPU tensor of a type that the kernels know, outside of transformations."""
    return (
        (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and x.is_cpu
        and x.dtype in _KERNEL_DTYPES
        and not (
            torch.compiler.is_compiling()
            or torch._C._is_tracing()
            or torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0
            or torch._C._len_torch_dispatch_stack() > 0
        )
    )


def _takes_operator(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the operators are for this: inside `torch.func`, or in a compiled graph that stays here."""
    if torch.compiler.is_compiling():
        fits = not (torch.compiler.is_exporting() or transforms.active()) and x.numel() >= SMALL_COMPILED
    else:
        fits = (
            transforms.active()
            and transforms.reach_kernels()
            and torch.autograd.forward_ad._current_level < 0
            and torch._C._len_torch_dispatch_stack() == 0
            and x.numel() > 0
        )
    return fits and x.is_cpu and x.dtype in _KERNEL_DTYPES and (residual is None or residual.dtype is x.dtype)


def _takes_kernels(x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> bool:
    """Whether the kernels can compute this, where `x` is plain: whether all else is, too."""
    return x.numel() > 0 and _are_plain(x, residual, *parameters)


def _are_plain(x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> bool:
    if residual is not None and residual.dtype is not x.dtype:
        return False
    for tensor in (residual, *parameters):
        if tensor is None:
            continue
        if not tensor.is_cpu or (type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter):
            return False
    return True


# --- The path of PyTorch's own operation, for small tensors ----------------------------------------------------------

SMALL, SMALL_EVALUATION, SMALL_COMPILED = 1 << 17, 1 << 20, 1 << 15
"""Values from which on the kernels are called: in training (twice as many where channels are last), in evaluation, and
in training in a compiled graph.

An autograd function in Python takes about 30 us more, forward and backward, than PyTorch's operation in C++, and from
cold caches several times that. From about these sizes on, on two cores, the kernels make up for it. In evaluation there
is less to make up with: PyTorch's operation reads once and writes once, and the activation is applied in place. In a
compiled graph an operator in Python takes some 100 us more than loops of its own, which are several times as slow.
"""


def _takes_one_operation(x: Tensor, residual: Tensor | None, mask: Tensor | None, running: bool) -> bool:
    """Whether this is small, has nothing that PyTorch's operation lacks, and would not spoil the running statistics."""
    values = x.numel()
    small = SMALL_EVALUATION if running else SMALL if x.is_contiguous() else 2 * SMALL
    if values >= small or x.dtype is torch.bfloat16:
        return False
    if x.dim() < 2 or (residual is not None and (residual.shape != x.shape or residual.dtype is not x.dtype)):
        return False
    # Where the stride of an axis of length one hides that channels are last, PyTorch's gradient (2.13, CPU) is wrong.
    if not x.is_contiguous() and 1 in x.shape:
        return False
    if running:
        return True
    return mask is None and values > x.shape[1] and math.isfinite(torch.linalg.vector_norm(x.detach()).item())


def _one_operation_biased(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    activation: tuple[str, float],
    residual: Tensor | None,
) -> Tensor:
    """Training, with the biased variance for the running one, which PyTorch's operation does not give."""
    mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
    y = _one_operation(x, mean, var, weight, bias, True, 1.0, eps, activation, residual)
    count = x.numel() // x.shape[1]
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * ((count - 1) / count), momentum)
    return y


def _one_operation(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: tuple[str, float],
    residual: Tensor | None,
) -> Tensor:
    """`torch.batch_norm`, then what follows it."""
    if (weight is not None and weight.dim() != 1) or (bias is not None and bias.dim() != 1):
        _check(x, running_mean, running_var, weight, bias, residual)  # PyTorch's operation takes any shape
    if running_mean is not None and running_var is not None:
        if not training and torch.is_grad_enabled() and not torch._C._is_tracing():
            # Copies: a later batch changes the running statistics, and a backward pass to come must not see it.
            running_mean, running_var = running_mean.clone(), running_var.clone()
        if training:
            # PyTorch changes them without telling autograd, and keeps them for a backward pass that does not need them.
            torch.autograd.graph.increment_version((running_mean, running_var))
            running_mean, running_var = running_mean.data, running_var.data
    try:
        z = torch.batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, False)
    except RuntimeError:
        _check(x, running_mean, running_var, weight, bias, residual)  # it knows better what is wrong
        raise
    name, parameter = activation
    if not torch.is_grad_enabled() and not torch._C._is_tracing():  # no one else has z: what follows may take its place
        if residual is not None:
            z += residual
        if name == "relu":
            return torch.relu_(z)
    elif residual is not None:
        z = z + residual
    y: Tensor = composed.ACTIVATIONS[name](z, parameter)
    return y
