"""Sources of statistics: where a normalization gets its mean and variance from in training.

A source is a small value, given as `statistics=` to `batch_norm` or to a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer

from batchnorm.xla import formula, primitive, routes
from batchnorm.xla.formula import How, Moments

__all__ = [
    "OURS",
    "BatchStatistics",
    "Call",
    "Devices",
    "GhostStatistics",
    "Renorm",
    "Running",
    "RunningStatistics",
    "Statistics",
    "expect",
]

KEPT = "batchnorm_statistics"


class Running(NamedTuple):
    """The running statistics.

    Attributes:
        mean, var: `(C,)`.
    """

    mean: Any
    var: Any


class Devices(NamedTuple):
    """The devices that may pool their statistics.

    Attributes:
        axis_name: The mapped axes; None without others.
        groups: The groups of indices along them that pool separately; None for one group.
    """

    axis_name: Any = None
    groups: Any = None

    @property
    def are_many(self) -> bool:
        """Whether there may be others."""
        return self.axis_name is not None

    def number(self) -> Any:
        """How many there are."""
        return self.total(1) if self.are_many else 1

    def total(self, values: Any) -> Any:
        """The sum of an array, or of a number, over all."""
        return lax.psum(values, self.axis_name, axis_index_groups=self.groups)


ALONE = Devices()


class Call(NamedTuple):
    """One normalization, with its arguments checked.

    Attributes:
        x: The batch.
        arrays: Weight, bias, residual and counts, without those that are absent; `how` says which are present.
        how: Everything that is not an array.
        running: The running statistics; None if there are none.
        devices: Those that pool their statistics.
    """

    x: Any
    arrays: tuple[Any, ...]
    how: How
    running: Running | None
    devices: Devices


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, keeping nothing but its arguments and the statistics between forward and backward."""
    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    return jax.checkpoint(function, prevent_cse=False, policy=policy)


def _moments(wide: Any, counts: Any, axis: int, devices: Devices) -> Moments:
    found = formula.moments(wide, counts, axis)
    if devices.are_many:
        found = formula.merge(found, devices.total)
    return Moments(found.count, *(checkpoint_name(each, KEPT) for each in found[1:]))


def _compute(x: Any, *arrays: Any, how: How, devices: Devices = ALONE) -> tuple[Any, Moments]:
    """`y` and the moments, by the formula."""
    weight, bias, residual, counts = how.spread(arrays)
    wide = x.astype(formula.arithmetic(x.dtype))
    batch = _moments(wide, counts, how.axis, devices)
    return formula.normalize(wide, *batch[1:], weight, bias, residual, how).astype(x.dtype), batch


def _by_kernels(x: Any, *arrays: Any, how: How) -> tuple[Any, Moments]:
    """`y` and the moments, by the kernels."""
    y, *statistics = primitive.batch_norm(x, arrays, how)
    return y, Moments(formula.count(x, how.spread(arrays)[3], how.axis), *statistics)


class Statistics:
    """The base class of all sources of statistics."""

    needs_running = False
    """Whether a call needs running statistics."""

    unbiased = True
    """Whether the running variance moves towards the unbiased variance of the batch."""

    is_constant = False
    """Whether nothing of a batch counts, its mask included, and the running statistics do not move."""

    group_size: int | None = None
    """The smallest number of samples that are normalized on their own; None if it is the batch."""

    limits: tuple[Any, Any] | None = None
    """How far a correction towards the running statistics may go, `(r_max, d_max)`; None without a correction."""

    def normalize(self, call: Call) -> tuple[Any, Moments | None]:
        """`y`, and the moments towards which the running statistics move; None if they do not move."""
        raise TypeError(f"{type(self).__name__} is not a source of statistics: it needs a method `normalize`")


@dataclass(frozen=True)
class BatchStatistics(Statistics):
    """The statistics of the batch, or with `axis_name` of the batches of all devices together: the default.

    Args:
        unbiased: Whether the running variance moves towards the unbiased variance, as in PyTorch. Flax and Keras use
            the biased one.
    """

    unbiased: bool = True

    def normalize(self, call: Call) -> tuple[Any, Moments | None]:
        """By our kernels, if there is one device and the batch is large enough."""
        x, devices = call.x, call.devices
        if devices.are_many:
            routes.expect_formula(x, "its statistics are those of several devices")
        elif how := routes.choose(x, call.arrays, call.how):
            return _by_kernels(x, *call.arrays, how=how)
        found: tuple[Any, Moments] = _recomputed(partial(_compute, how=call.how, devices=devices))(x, *call.arrays)
        return found


@dataclass(frozen=True)
class RunningStatistics(Statistics):
    """The running statistics, in training as well, and unchanged: a frozen layer. Weight and bias may still learn."""

    needs_running = True
    is_constant = True

    def normalize(self, call: Call) -> tuple[Any, Moments | None]:
        """By constants."""
        running, how = call.running, call.how
        assert running is not None
        routes.expect_formula(call.x, "its statistics are the running ones")

        def compute(x: Any, *arrays: Any) -> Any:
            wide = x.astype(formula.arithmetic(x.dtype))
            weight, bias, residual, _ = how.spread(arrays)
            mean, var = (jax.lax.stop_gradient(each).astype(wide.dtype) for each in running)
            return formula.normalize(wide, mean, None, var, weight, bias, residual, how).astype(x.dtype)

        return _recomputed(compute)(call.x, *call.arrays), None


@dataclass(frozen=True)
class GhostStatistics(Statistics):
    """The statistics of groups of samples: a large batch with the noise of a small one.

    A batch of `N` samples is cut into `max(1, N // batch_size)` groups of consecutive samples. The sizes of the groups
    differ by at most one, and none is smaller than `batch_size` unless the whole batch is. The running statistics move
    once, towards the statistics of the whole batch.

    Args:
        batch_size: The smallest number of samples per group.
        unbiased: As in `BatchStatistics`.

    Raises:
        ValueError: If `batch_size` is not a positive integer; in a call, if a group has one value per channel, if the
            channels are the first axis, or with `axis_name`.

    Source: Hoffer, Hubara & Soudry 2017, "Train longer, generalize better", algorithm 1.
    """

    batch_size: int
    unbiased: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.batch_size, int) and self.batch_size > 0):
            raise ValueError(f"batch_size must be a positive integer, got {self.batch_size!r}")

    @property
    def group_size(self) -> int:  # type: ignore[override]
        """`batch_size`."""
        return self.batch_size

    def normalize(self, call: Call) -> tuple[Any, Moments | None]:
        """Groups of equal size together, under `vmap`."""
        x, how = call.x, call.how
        if call.devices.are_many:
            raise ValueError("GhostStatistics makes the batch smaller and cannot be combined with axis_name")
        if how.axis == 0:
            raise ValueError(
                f"GhostStatistics groups the first axis of x, of shape {x.shape}: it cannot be the channels"
            )
        groups = max(1, len(x) // self.batch_size)
        small = len(x) // groups
        larger = len(x) - small * groups
        if small * (x.size // max(1, len(x) * x.shape[how.axis])) == 1:
            raise ValueError(
                f"GhostStatistics needs more than 1 value per channel in each group, got x of shape {x.shape} in "
                f"groups of {small}: use GhostStatistics(batch_size=2) or more"
            )
        weight, bias, residual, counts = how.spread(call.arrays)
        by_kernels = routes.choose(x, call.arrays, how, groups)
        compute: Any = partial(_by_kernels, how=by_kernels) if by_kernels else partial(_compute, how=how)

        def one_group(*given: Any) -> tuple[Any, Moments]:
            y, batch = compute(*given)
            return y, batch._replace(
                count=jnp.broadcast_to(jnp.asarray(batch.count, batch.mean.dtype), batch.mean.shape)
            )

        def cut(values: Any, start: int, number: int, size: int) -> Any:
            if values is None:
                return None
            values = jnp.broadcast_to(values, (len(x), *values.shape[1:]))[start : start + number * size]
            return values.reshape(number, size, *values.shape[1:])

        outputs, found = [], []
        for start, number, size in (0, larger, small + 1), (larger * (small + 1), groups - larger, small):
            if number == 0:
                continue
            given = [cut(x, start, number, size), weight, bias]
            given += [cut(values, start, number, size) for values in (residual, counts)]
            axes = tuple(a for a, values in zip((0, None, None, 0, 0), given, strict=True) if values is not None)
            there = [values for values in given if values is not None]
            y, moments = jax.vmap(one_group if by_kernels else _recomputed(one_group), in_axes=axes)(*there)
            outputs.append(y.reshape(number * size, *x.shape[1:]))
            found.append(moments)
        parts = Moments(*(jnp.concatenate(values) for values in zip(*found, strict=True)))
        whole = formula.merge(parts, lambda values: jnp.sum(values, 1, keepdims=True))
        return jnp.concatenate(outputs), Moments(*(values[0] for values in whole))


@dataclass(frozen=True)
class Renorm(Statistics):
    """Batch renormalization: batch statistics corrected towards the running ones, for small or dependent batches.

    `y = xhat * r + d` before weight and bias, where `r = clip(std / running_std, 1/r_max, r_max)` and
    `d = clip((mean - running_mean) / running_std, -d_max, d_max)` are constants in the backward pass.

    Args:
        r_max: The largest `r`, at least 1. It may be traced, because the paper raises both limits slowly, by a schedule
            over the steps.
        d_max: The largest `d`, at least 0, in standard deviations.
        unbiased: As in `BatchStatistics`.

    Raises:
        ValueError: If a limit is out of its range.

    Source: Ioffe 2017, "Batch renormalization", algorithm 1.
    """

    r_max: Any = 3.0
    d_max: Any = 5.0
    unbiased: bool = True
    needs_running = True

    def __post_init__(self) -> None:
        for name, least in ("r_max", 1), ("d_max", 0):
            value = getattr(self, name)
            is_number = isinstance(value, Real | np.ndarray | jax.Array)
            if not isinstance(value, Tracer) and not (is_number and np.all(np.asarray(value) >= least)):
                raise ValueError(f"{name} must be at least {least}, got {value!r}")

    @property
    def limits(self) -> tuple[Any, Any]:  # type: ignore[override]
        """Both."""
        return self.r_max, self.d_max

    def normalize(self, call: Call) -> tuple[Any, Moments | None]:
        """By the statistics of the batch, or of all devices, with a corrected weight and bias."""
        running, how = call.running, call.how
        assert running is not None
        routes.expect_formula(call.x, "its statistics are corrected")

        def compute(x: Any, r_max: Any, d_max: Any, *arrays: Any) -> tuple[Any, Moments]:
            weight, bias, residual, counts = how.spread(arrays)
            wide = x.astype(formula.arithmetic(x.dtype))
            batch = _moments(wide, counts, how.axis, call.devices)
            old_mean, old_var = (each.astype(wide.dtype) for each in running)
            old_rstd = 1 / jnp.sqrt(old_var + how.eps)
            r = jnp.clip(jnp.sqrt(batch.var + how.eps) * old_rstd, 1 / r_max, r_max)
            d = jnp.clip(((batch.mean - old_mean) + batch.low) * old_rstd, -d_max, d_max)
            r, d = jax.lax.stop_gradient((r, d))
            if weight is not None:
                r, d = r * weight, d * weight
            y = formula.normalize(wide, *batch[1:], r, d if bias is None else d + bias, residual, how)
            return y.astype(x.dtype), batch

        found: tuple[Any, Moments] = _recomputed(compute)(call.x, self.r_max, self.d_max, *call.arrays)
        return found


OURS = BatchStatistics, RunningStatistics, GhostStatistics, Renorm
"""The sources that other frameworks have, too."""


def expect(statistics: Any) -> None:
    """Raise an error unless `statistics` is a source of statistics or None.

    Raises:
        TypeError: If it is neither.
    """
    if statistics is not None and not isinstance(statistics, Statistics):
        raise TypeError(f"statistics must be a source such as BatchStatistics(), got {statistics!r}")
