"""`batch_norm`: check the call, plan its statistics, compute it by a route, and move the running statistics."""

from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.definition import Moments
from batchnorm.torch import composed, cpu, deferred, transforms
from batchnorm.torch.activations import Activation
from batchnorm.torch.call import Batch, Call, Plan, is_plain, is_symbolic, is_tracing
from batchnorm.torch.recomputation import is_repetition, unseen
from batchnorm.torch.routes import choose
from batchnorm.torch.running import Running
from batchnorm.torch.running import update as running_update
from batchnorm.torch.sources import BatchStatistics, RunningStatistics, Statistics, expect

__all__ = ["batch_norm", "moments", "normalize"]

BATCH, RUNNING = BatchStatistics(), RunningStatistics()


def batch_norm(
    x: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    statistics: Statistics | None = None,
    input: Tensor | None = None,
) -> Tensor:
    """Batch normalization, with residual and activation in the same pass over memory.

    `y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)`, where `mean` and `var` are the batch's in
    training and the running ones otherwise. In training the running statistics move: `running += momentum * (batch -
    running)`, with the unbiased variance.

    Args:
        x: `(N, C, *spatial)`, of any strides. `input`, its name in PyTorch, is accepted instead.
        running_mean, running_var: `(C,)`; updated in place in training, required in evaluation. A batch whose
            statistics are not finite does not change them.
        weight, bias: `(C,)`, gamma and beta; 1 and 0 if None.
        training: Whether to normalize by the batch's statistics.
        momentum: The weight of the new batch in the running statistics.
        eps: Added to the variance, in the square of the units of `x`.
        activation: None, or a name, or `(name, parameter)`: relu, relu6, leaky_relu (slope), silu, hardswish, elu
            (alpha), sigmoid, tanh, gelu. Or a module or another function of a tensor: PyTorch's own for these, such as
            `nn.LeakyReLU(0.2)` or `torch.tanh`, are computed as if they were named; any other, and a module with hooks,
            is called with the normalized values.
        residual: Of the shape of `x`, added before the activation.
        mask: `(N, *spatial)` or its first axes: booleans (which positions count in the statistics) or non-negative
            weights (2 counts a position twice). All positions are normalized. Ignored in evaluation.
        statistics: The source of the statistics in training; `BatchStatistics()` if None.

    Returns:
        `y`, of the shape and type of `x`, in the memory format that `torch.nn.functional.batch_norm` gives.

    Raises:
        ValueError: If `x` has fewer than two axes; if `residual` or `mask` do not fit `x`; if there is only one value
            per channel in training; if a mask is negative, not finite, or keeps fewer than two values (a GPU tells
            this late, so that nobody waits: this call or a later one raises it, and meanwhile the running statistics
            skip the batch); if the activation is unknown; if `eps` is negative, or 0 in training; if a group of
            `GhostStatistics` has fewer than two values; if a constant of a source is neither of `(C,)` nor one number.
        TypeError: If an argument is of the wrong kind: `x`, `residual`, `mask` or values per channel no tensor, `eps`
            no number, `statistics` no source of statistics; if `x` is missing; if the activation is a class.
        RuntimeError: If `weight`, `bias`, or a running statistic is not of shape `(C,)`, or has another floating-point
            type than `x` where `x` is float32 or float64; if the running statistics are missing in evaluation, or with
            `Renorm`; if they require a gradient or have a tangent; with `SyncStatistics`, as described there.
        NotImplementedError: If `x` does not have a floating-point type.

    Differs from `torch.nn.functional.batch_norm`:
        1. It has the arguments `activation`, `residual`, `mask` and `statistics`.
        2. A batch whose statistics are not finite does not change the running statistics.
        3. On the CPU, statistics are float64 inside, and `x - mean` is computed before any multiplication: the error
           does not grow with `mean / std`. Small tensors whose mean is near 0 go to PyTorch's own operation, which is
           as exact for them. Squares are summed in the type of the arithmetic, though: if the values of a channel are
           2^59 = 6e17 or more apart, float32 may overflow. Then the variance is infinite, `y` is `act(bias +
           residual)`, as in PyTorch, and the batch counts as not finite.
        4. Running statistics with a tangent are an error in training, too.

    Source: Ioffe & Szegedy 2015, algorithm 1.
    """
    if (x is None) == (input is None):
        raise TypeError("batch_norm takes one tensor to normalize, as x, or as input, its name in torch.nn.functional")
    expect(statistics)
    running = Running(running_mean, running_var, momentum)
    asked = x if input is None else input, weight, bias, residual, mask if training else None, eps, activation
    return normalize(asked, running, statistics if training else RUNNING)[0]


def moments(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Count, mean and biased variance of every channel, in float64: `definition.moments` of a tensor.

    Args:
        x: `(N, C, *spatial)`.
        mask: As in `batch_norm`, but it may leave out all positions.

    Returns:
        The count, and arrays of `(C,)`; zeros if nothing counts.

    Raises:
        ValueError: If `x` has fewer than two axes; if the mask does not fit it, is negative or not finite. On a GPU,
            the error may be that of an earlier mask, which has not been told yet.
        NotImplementedError: If `x` does not have a floating-point type.
    """
    call = Call.of(x.detach(), None, None, None, mask, 0.0, None)
    count = float(call.total())
    if call.counts is not None:
        deferred.tell()  # the GPU has been waited for
    if count == 0:
        return Moments(0.0, *np.zeros((2, x.shape[1])))
    if x.is_cpu and x.dtype in cpu.DTYPES and call.is_eager and is_plain(x):
        mean, var = cpu.moments(call)
    else:
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        counts = None if call.counts is None else call.counts.to(exact)
        _, mean, var = composed.statistics(call._replace(x=call.x.to(exact), counts=counts), Plan(count), x)
    return Moments(count, mean.cpu().double().numpy(), var.cpu().double().numpy())


def normalize(asked: tuple[Any, ...], running: Running, source: Statistics | None) -> tuple[Tensor, str]:
    """`batch_norm` of arguments that are not checked yet, for layers that also count batches.

    Args:
        asked: The arguments of `Call.of`.
        running: The running statistics. They move unless the source normalizes by constants.
        source: The source of the statistics; the batch if None.

    Returns:
        `y`, and the name of the route that computed it.
    """
    source = BATCH if source is None else source
    if not isinstance(source, Statistics):
        expect(source)
    if source.is_constant:
        asked = (*asked[:4], None, *asked[5:])
    try:
        _check_eps(asked[5], source)
        call = Call.of(*asked)
        running.check(call.x, source.needs_running)
        if not source.needs_running and (call.is_eager or not torch.compiler.is_compiling()) and is_repetition():
            running = running._replace(is_recomputed=True)
        plan = source.plan(call, running)
        if plan.constants is not None:
            call, plan = call._replace(counts=None), _per_channel(plan, plan.constants, call.x.shape[1], source)
        elif call.is_opaque and isinstance(plan.count, Tensor) and not is_symbolic() and not is_tracing():
            call, plan = _without_unsound(call, plan, plan.count > 0)
        if not call.is_eager and (plan.parts is not None or plan.group is not None) and is_tracing():
            raise RuntimeError(
                f"torch.jit.trace cannot record {source!r}: the trace would hold what depends on this batch and this "
                "process; trace the model after model.eval()"
            )
        chosen = choose(call, plan)
    except Exception as error:
        given = *asked[:4], running.mean
        device = next((t.device for t in given if isinstance(t, Tensor)), torch.device("cpu"))
        source.fail(device)  # the other processes wait for this one
        if isinstance(error, TypeError | AttributeError | ValueError):
            _check_kinds(asked, running)
        raise
    if plan.constants is not None and plan.count != 0:
        running = Running()  # constants move nothing
    elif running.is_recomputed:
        with unseen():
            running = running.copy()
    outcome = chosen.compute(call, plan, running)
    if outcome is None:  # the route would have been less exact than the ones after it
        chosen = choose(call, plan, after=chosen)
        outcome = chosen.compute(call, plan, running)
        assert outcome is not None
    if call.is_eager or torch.compiler.is_compiling():
        _record(running, outcome.batch, plan, is_mapped=False)
    else:
        with unseen():
            _record(running, outcome.batch, plan, is_mapped=transforms.active())
    return outcome.y if call.then is None else call.then(outcome.y), chosen.name


def _per_channel(plan: Plan, constants: tuple[Tensor, Tensor], channels: int, source: Statistics) -> Plan:
    """The same plan, with constants of `(C,)`: a source may give one number for all channels."""
    if is_tracing() or all(t.dim() == 1 and t.shape[0] == channels for t in constants):
        return plan
    if any(t.numel() != 1 for t in constants if tuple(t.shape) != (channels,)):
        shapes = " and ".join(str(tuple(t.shape)) for t in constants)
        raise ValueError(
            f"{source!r} gives a mean and a variance of shapes {shapes} for x with {channels} channels: "
            f"each must be of shape ({channels},), or one number"
        )
    mean, var = (t.reshape(1).expand(channels) if t.numel() == 1 else t for t in constants)
    return plan._replace(constants=(mean, var))


def _without_unsound(call: Call, plan: Plan, sound: Tensor) -> tuple[Call, Plan]:
    """The same, but nothing counts if the mask is not sound: then the running statistics skip the batch.

    Only the GPU knows, and its error comes late. A mask that is not sound has no positive total.
    """
    counts, count = (torch.where(sound, values, 0.0) for values in (call.counts, plan.count))  # type: ignore[arg-type]
    return call._replace(counts=counts), plan._replace(count=count)


def _record(running: Running, batch: Batch | None, plan: Plan, is_mapped: bool) -> None:
    """Move the running statistics and count the batch, if the route has not done so."""
    if batch is not None:
        update = transforms.update if is_mapped else running_update
        update(running, batch, plan.unbiased)
    elif running.mean is None:
        running.note(True)


def _check_kinds(asked: tuple[Any, ...], running: Running) -> None:
    """Say which argument is of the wrong kind, once something has failed: checking each call would take time."""
    tensors = dict(zip(("x", "weight", "bias", "residual"), asked, strict=False))
    for name, value in (tensors | {"running_mean": running.mean, "running_var": running.var}).items():
        if not isinstance(value, Tensor) and (value is not None or name == "x"):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not isinstance(asked[5], Real | Tensor):
        raise TypeError(f"eps must be a number, got {asked[5]!r}")


def _check_eps(eps: float, source: Statistics) -> None:
    """Check `eps` as PyTorch does, with its message."""
    if not (eps > 0 or (source.needs_running and eps == 0)):
        wanted = "non-negative" if source.needs_running else "positive during training"
        raise ValueError(f"batch_norm eps must be {wanted}, but got {eps}")
