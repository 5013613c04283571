"""Sources of statistics: where a normalization gets its mean and variance from.

The stages of batch normalization are the same for every variant; only the statistics differ. A source, given as
`statistics=` to a layer or to `batch_norm`, turns each training `Call` into a `Plan`. Evaluation always uses the
running statistics. A subclass of `Statistics` with its own `plan` is a source, too.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.torch import deferred
from batchnorm.torch.call import Call, Part, Plan, is_symbolic, is_tracing
from batchnorm.torch.running import Running
from batchnorm.torch.sync import Group

__all__ = [
    "BatchStatistics",
    "GhostStatistics",
    "Renorm",
    "RunningStatistics",
    "Statistics",
    "SyncStatistics",
    "expect",
]


class Statistics:
    """The base class of all sources of statistics."""

    needs_running = False
    """Whether a call needs running statistics."""

    is_constant = False
    """Whether nothing of a batch counts, its mask included, and the running statistics do not move."""

    is_synchronized = False
    """Whether the statistics are those of all processes together."""

    group_size: int | None = None
    """The smallest number of samples that are normalized on their own; None if it is the batch."""

    limits: tuple[float, float] | None = None
    """How far a correction towards the running statistics may go, `(r_max, d_max)`; None without a correction."""

    def plan(self, call: Call, running: Running) -> Plan:
        """Plan the statistics by which a call is normalized.

        Args:
            call: The call.
            running: Its running statistics.

        Returns:
            The plan.

        Raises:
            ValueError: If the call has too few values.
            RuntimeError: If running statistics or other requirements are missing.
        """
        raise TypeError(f"{type(self).__name__} is not a source of statistics: it needs a method `plan`")

    def fail(self, device: torch.device) -> None:
        """Tell the other processes, which are waiting for this one, that it failed before its collective."""


@dataclass(frozen=True)
class BatchStatistics(Statistics):
    """The statistics of the batch, towards which the running statistics move: the default.

    Args:
        unbiased: Whether the running variance moves towards the unbiased variance, as in PyTorch. Keras uses the
            biased one.
    """

    unbiased: bool = True

    def plan(self, call: Call, running: Running) -> Plan:
        """The whole batch; the errors are those of `batch_norm`."""
        count = _count_two(call)
        if isinstance(count, Tensor) or count != 0:
            return Plan(count, None, None, None, None, self.unbiased)
        nothing = call.x.new_zeros(call.x.shape[1])  # the moments of an empty batch
        return Plan(count, (nothing, nothing), unbiased=self.unbiased)


@dataclass(frozen=True)
class RunningStatistics(Statistics):
    """The running statistics, in training as well, and unchanged: a frozen layer. Weight and bias may still learn."""

    needs_running = True
    is_constant = True

    def plan(self, call: Call, running: Running) -> Plan:
        """The running statistics as constants."""
        mean, var = running.mean, running.var
        assert mean is not None
        assert var is not None
        return Plan(torch.inf, (mean, var))


@dataclass(frozen=True)
class GhostStatistics(Statistics):
    """The statistics of groups of samples: a large batch with the noise of a small one.

    A batch of `N` samples is cut into `max(1, N // batch_size)` groups of consecutive samples. The sizes of the groups
    differ by at most one, and none is smaller than `batch_size` unless the whole batch is. The running statistics are
    updated once, with the statistics of the whole batch.

    Args:
        batch_size: The smallest number of samples per group.
        unbiased: As in `BatchStatistics`.

    Raises:
        ValueError: If `batch_size` is not a positive integer.

    Source: Hoffer, Hubara & Soudry 2017, "Train longer, generalize better", algorithm 1, which updates the running
    statistics with each group in turn.
    """

    batch_size: int
    unbiased: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.batch_size, int | np.integer) and self.batch_size > 0):
            raise ValueError(f"batch_size must be a positive integer, got {self.batch_size!r}")
        object.__setattr__(self, "batch_size", int(self.batch_size))  # it may be NumPy's

    @property
    def group_size(self) -> int:  # type: ignore[override]
        """`batch_size`."""
        return self.batch_size

    def sizes(self, samples: int) -> list[int]:
        """The number of samples of each group."""
        samples = int(samples)  # the number of groups is fixed in a compiled graph
        groups = max(1, samples // self.batch_size)
        small = samples // groups
        larger = samples - small * groups
        return [small + (group < larger) for group in range(groups)]

    def plan(self, call: Call, running: Running) -> Plan:
        """A part for each group, each with at least two values per channel."""
        if call.is_opaque and not is_symbolic():
            return self._plan_without_waiting(call)
        count = _count_two(call)
        if call.x.numel() == 0:
            return BatchStatistics(self.unbiased).plan(call, running)
        parts, start = [], 0
        for size in self.sizes(call.x.shape[0]):
            samples = slice(start, start + size)
            part = call.part(samples)
            if call.counts is None and part.positions() == 1:
                raise ValueError(
                    f"Expected more than 1 value per channel in each group when training, got input size "
                    f"{call.x.size()} in groups of {size}. Use GhostStatistics(batch_size=2) or more"
                )
            if call.counts is not None and not is_symbolic() and part.positions() < 2:
                raise ValueError(
                    f"mask leaves fewer than two values of samples {start} to {start + size - 1}, a group of "
                    f"GhostStatistics; x has shape {tuple(call.x.shape)}. Use a larger batch_size"
                )
            parts.append(Part(samples, part.total()))
            start += size
        return Plan(count, parts=parts, unbiased=self.unbiased)

    def _plan_without_waiting(self, call: Call) -> Plan:
        """The same for a mask on a GPU, in as many operations for many groups as for two."""
        assert call.counts is not None
        sizes = self.sizes(call.x.shape[0])
        enough = (_by_group(_kept(call.counts), sizes) >= 2).all()
        deferred.expect(
            enough,
            f"mask leaves fewer than two values of one of the {len(sizes)} groups of GhostStatistics; x has shape "
            f"{tuple(call.x.shape)}. Use a larger batch_size",
        )
        totals, ends = torch.where(enough, _by_group(call.counts, sizes), 0.0), np.cumsum(sizes).tolist()
        parts = [Part(slice(end - size, end), total) for size, end, total in zip(sizes, ends, totals, strict=True)]
        return Plan(totals.sum(), parts=parts, unbiased=self.unbiased)


@dataclass(frozen=True)
class SyncStatistics(Statistics):
    """The statistics of the batches of all processes together, however the samples are split among them.

    A process may have no samples. All processes must call the layer, and its backward pass, equally often. Each pass
    needs one collective, and one more the first time that a layer is wider than 256 channels and all layers before it.
    Without `torch.distributed`, or in a group of one process, these are the statistics of the batch.

    Args:
        process_group: A group of `torch.distributed`; the default group if None.
        unbiased: As in `BatchStatistics`.

    Raises:
        RuntimeError: In a call, in all processes: if one of them fails, if their channels or types differ, or if `x`
            needs a gradient in only some of them. If a process dies, the others fail immediately or after the group's
            timeout.

    Source: Peng et al. 2018, "MegDet", section 3.3. Merged as by Chan et al. 1983.
    """

    process_group: Any = None
    unbiased: bool = True
    is_synchronized = True

    @property
    def processes(self) -> Group | None:
        """The current group of processes; None if there are no others."""
        return Group.of(self.process_group)

    def plan(self, call: Call, running: Running) -> Plan:
        """The batches of all processes; the total count is known only after the collective."""
        group = self.processes
        if group is None:
            return BatchStatistics(self.unbiased).plan(call, running)
        return Plan(call.total(), group=group, unbiased=self.unbiased)

    def fail(self, device: torch.device) -> None:
        """Make the other processes fail as well."""
        group = self.processes
        if group is not None:
            group.fail(device)

    def __deepcopy__(self, memo: Any) -> "SyncStatistics":
        return self  # a process group cannot be copied; a copied layer keeps it

    def __reduce__(self) -> Any:
        if self.process_group is not None:
            raise TypeError(
                "a process group cannot be saved: save the state dict, or set layer.statistics = SyncStatistics() first"
            )
        return SyncStatistics, (None, self.unbiased)


@dataclass(frozen=True)
class Renorm(Statistics):
    """Batch renormalization: batch statistics corrected towards the running ones, for small or dependent batches.

    `y = xhat * r + d` before weight and bias, where
    `r = clip(std / running_std, 1/r_max, r_max)` and `d = clip((mean - running_mean) / running_std, -d_max, d_max)` are
    constants in the backward pass. Without the clips, `y` would be the same as in evaluation.

    Both limits grow with the layer's `num_batches_tracked`, which is in its state dict. For `warmup_steps` batches
    there is no correction (`r = 1, d = 0`). Then `r_max` grows linearly until `8 * warmup_steps` and `d_max` until
    `5 * warmup_steps`; in the paper these are 5,000, 40,000 and 25,000. `batch_norm` has no counter and uses the full
    limits.

    Args:
        r_max: The largest `r`, at least 1.
        d_max: The largest `d`, at least 0, in standard deviations.
        warmup_steps: The number of batches without correction; 0 for the full limits from the first batch.
        statistics: The statistics to correct: `BatchStatistics()`, or `SyncStatistics()` for all processes.

    Raises:
        ValueError: If a limit is out of its range.
        TypeError: If `statistics` is neither `BatchStatistics` nor `SyncStatistics`.

    Source: Ioffe 2017, "Batch renormalization", algorithm 1 and section 4.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup_steps: int = 5000
    statistics: BatchStatistics | SyncStatistics = field(default_factory=BatchStatistics)

    def __post_init__(self) -> None:
        if not (self.r_max >= 1 and self.d_max >= 0 and self.warmup_steps >= 0):
            raise ValueError(f"r_max must be at least 1, d_max and warmup_steps at least 0: {self!r}")
        if not isinstance(self.statistics, BatchStatistics | SyncStatistics):
            raise TypeError(f"statistics must be BatchStatistics() or SyncStatistics(), got {self.statistics!r}")

    @property
    def is_synchronized(self) -> bool:  # type: ignore[override]
        """As of the inner statistics."""
        return self.statistics.is_synchronized

    @property
    def limits(self) -> tuple[float, float]:  # type: ignore[override]
        """The full ones."""
        return self.r_max, self.d_max

    def plan(self, call: Call, running: Running) -> Plan:
        """The plan of the inner statistics, with the correction."""
        if running.is_recomputed:
            raise RuntimeError(
                "Renorm() cannot be inside an activation checkpoint: it corrects towards the running statistics, which "
                "have moved by the time the forward pass is repeated. Leave the layer out of the checkpoint"
            )
        old_mean, old_var = running.mean, running.var
        if old_mean is None or old_var is None:
            raise RuntimeError("Renorm() corrects towards the running statistics: pass running_mean and running_var")
        plan = self.statistics.plan(call, running)
        if plan.constants is not None:
            return plan
        r_max, d_max = self.limits_after(running.batches)

        def adjust(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
            exact = torch.promote_types(mean.dtype, torch.float32)
            mean, var, mean_before, var_before = (t.detach().to(exact) for t in (mean, var, old_mean, old_var))
            rstd_before = torch.rsqrt(var_before + call.eps)
            r = torch.clamp(torch.sqrt(var + call.eps) * rstd_before, 1 / r_max, r_max)
            d = torch.clamp((mean - mean_before) * rstd_before, -d_max, d_max)
            return r.to(call.arithmetic), d.to(call.arithmetic)

        return plan._replace(adjust=adjust)

    def fail(self, device: torch.device) -> None:
        """As for the inner statistics."""
        self.statistics.fail(device)

    def limits_after(self, steps: Any) -> tuple[Any, Any]:
        """`r_max` and `d_max` after a number of batches; the full limits if `steps` is None.

        Args:
            steps: The number of batches so far: a number, a tensor, or None.
        """
        if steps is None or self.warmup_steps == 0:
            return self.r_max, self.d_max
        if isinstance(steps, Tensor):  # not in the default type, which may be float16
            steps = steps.to(torch.float32 if steps.device.type == "mps" else torch.float64)
        past = steps / self.warmup_steps - 1
        r_share, d_share = past / 7, past / 4
        if isinstance(past, Tensor):  # a limit may be infinite, and 0 * infinity is NaN
            r_max, d_max = 1 + (self.r_max - 1) * r_share.clamp(0, 1), self.d_max * d_share.clamp(0, 1)
            return torch.where(past > 0, r_max, 1.0), torch.where(past > 0, d_max, 0.0)
        if past <= 0:
            return 1.0, 0.0
        return 1 + (self.r_max - 1) * min(r_share, 1.0), self.d_max * min(d_share, 1.0)


def expect(statistics: Any) -> None:
    """Raise an error unless `statistics` is a source of statistics or None.

    Raises:
        TypeError: If `statistics` is neither.
    """
    if statistics is not None and not isinstance(statistics, Statistics):
        hint = "; pass an instance, with parentheses" if isinstance(statistics, type) else ""
        raise TypeError(
            "statistics must be BatchStatistics(), RunningStatistics(), GhostStatistics(...), SyncStatistics() or "
            f"Renorm(), or another subclass of Statistics, got {statistics!r}{hint}"
        )


def _count_two(call: Call) -> float | Tensor:
    """The total count of each channel's values, of which there must be at least two, or none."""
    if not call.is_eager and is_tracing():
        tracer: Any = torch._C
        state = tracer._get_tracing_state()
        tracer._set_tracing_state(None)  # now sizes are numbers, so that this batch can be checked
        try:
            _count_two(call)
        finally:
            tracer._set_tracing_state(state)
        return call.total()
    if call.counts is not None and call.is_opaque:
        total = call.total()
        if is_symbolic():  # a graph for all values cannot check some of them
            return total
        enough = _kept(call.counts).sum() >= 2
        deferred.expect(
            enough,
            f"mask leaves fewer than two values of each channel of x of shape {tuple(call.x.shape)}: skip such a "
            "batch, or use larger ones",
        )
        return torch.where(enough, total, 0.0)
    values = call.positions()
    if values != 1 and call.counts is None:
        return torch.sym_float(values) if isinstance(values, torch.SymInt) else float(values)  # pyright: ignore[reportReturnType]
    size = call.x.size()
    if call.counts is not None and values == 0 and call.x.numel() > 0:
        raise ValueError(
            f"mask leaves no position of x of shape {tuple(size)}: skip this batch, or normalize with training=False"
        )
    if values == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {size}"
            f"{'' if call.counts is None else ' of which the mask keeps one'}. The variance of one value is 0. "
            "Drop the last, incomplete batch (drop_last=True), use larger batches, or evaluate (model.eval())"
        )
    return call.total()


def _kept(counts: Tensor) -> Tensor:
    """Which positions count; all of them if no count is a number, because then the mask's error is another one."""
    return ~(counts <= 0)


def _by_group(values: Tensor, sizes: list[int]) -> Tensor:
    """The sum over each group of samples: `(N, ...)` to `(groups,)`, where sizes differ by one at most."""
    each = values.reshape(len(values), -1).sum(1, dtype=torch.float64)
    larger = sizes[0] * sizes.count(sizes[0])
    return torch.cat([each[:larger].view(-1, sizes[0]).sum(1), each[larger:].view(-1, sizes[-1]).sum(1)])
