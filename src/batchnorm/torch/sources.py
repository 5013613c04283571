"""Where the statistics of a normalization come from.

The stages of batch normalization are the same for every variant. An object of this module, given as `statistics=` to a
layer or to `batch_norm`, says which statistics they work with in training: it turns a `Call` into a `Plan`. Evaluation
always uses the running statistics.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from batchnorm.torch.call import Call, Part, Plan, is_symbolic
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
    """What all sources of statistics have in common."""

    needs_running = False
    """Whether a call needs running statistics."""

    def plan(self, call: Call, running: Running) -> Plan:
        """Say by which statistics a call is normalized.

        Args:
            call: The call.
            running: The running statistics that go with it.

        Raises:
            ValueError: If there are too few values.
            RuntimeError: If something else is missing.
        """
        raise TypeError(f"{type(self).__name__} does not say where statistics come from: it needs a method `plan`")

    def fail(self, device: torch.device) -> None:
        """Tell the other processes that wait for this one that it has failed before it could call them."""


@dataclass(frozen=True)
class BatchStatistics(Statistics):
    """The statistics of the batch itself, which also update the running ones: the default.

    Args:
        unbiased: Whether the running variance moves towards the unbiased one, as in PyTorch. False is Keras' way.
    """

    unbiased: bool = True

    def plan(self, call: Call, running: Running) -> Plan:
        """The whole batch. The errors are those of `batch_norm`."""
        count = _count_two(call)
        if isinstance(count, Tensor) or count != 0:
            return Plan(count, None, None, None, None, self.unbiased)
        nothing = call.x.new_zeros(call.x.shape[1])  # the moments of nothing
        return Plan(count, (nothing, nothing), unbiased=self.unbiased)


@dataclass(frozen=True)
class RunningStatistics(Statistics):
    """The running statistics, in training too, and they stay as they are: a frozen layer. Weight and bias may learn."""

    needs_running = True

    def plan(self, call: Call, running: Running) -> Plan:
        """Constants."""
        mean, var = running.mean, running.var
        assert mean is not None
        assert var is not None
        return Plan(torch.inf, (mean.detach(), var.detach()))


@dataclass(frozen=True)
class GhostStatistics(Statistics):
    """The statistics of groups of samples: a large batch with the noise of a small one.

    A batch of `N` samples is cut into `max(1, N // batch_size)` groups of consecutive samples, as equal as can be: no
    group is smaller than `batch_size`, and the sizes differ by one at most. The running statistics are updated once,
    with the statistics of the whole batch.

    Args:
        batch_size: Samples per group.
        unbiased: As in `BatchStatistics`.

    Raises:
        ValueError: If `batch_size` is not a positive integer.

    Source: Hoffer, Hubara & Soudry 2017, "Train longer, generalize better", algorithm 1, which updates the running
    statistics with each group in turn.
    """

    batch_size: int
    unbiased: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.batch_size, int) and self.batch_size > 0):
            raise ValueError(f"batch_size must be a positive integer, got {self.batch_size!r}")

    def sizes(self, samples: int) -> list[int]:
        """How many samples each group has."""
        samples = int(samples)  # a compiled graph has as many groups as its batch has
        groups = max(1, samples // self.batch_size)
        small = samples // groups
        larger = samples - small * groups
        return [small + (group < larger) for group in range(groups)]

    def plan(self, call: Call, running: Running) -> Plan:
        """A part for each group; each must have two values per channel."""
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


@dataclass(frozen=True)
class SyncStatistics(Statistics):
    """The statistics of the batches of all processes together, however the samples are split among them.

    A process may have no samples at all. Every process must call the layer, and its backward pass, as often as the
    others. There is one collective in each pass, and one more when a layer is wider than 256 channels and than all
    before it. Without `torch.distributed`, or in a group of one, these are the statistics of the batch.

    Args:
        process_group: Of `torch.distributed`; the default one if None.
        unbiased: As in `BatchStatistics`.

    Raises:
        RuntimeError: In a call, in all processes, if one of them fails, if their channels or types differ, or if `x`
            needs a gradient in some only. If a process dies, the others fail immediately or after the group's timeout.

    Source: Peng et al. 2018, "MegDet", section 3.3. Merged as by Chan et al. 1983.
    """

    process_group: Any = None
    unbiased: bool = True

    @property
    def group(self) -> Group | None:
        """The processes that there are now besides this one; None if it is alone."""
        return Group.of(self.process_group)

    def plan(self, call: Call, running: Running) -> Plan:
        """The whole batch of all processes; how many values there are is known only when they have met."""
        group = self.group
        if group is None:
            return BatchStatistics(self.unbiased).plan(call, running)
        return Plan(call.total(), group=group, unbiased=self.unbiased)

    def fail(self, device: torch.device) -> None:
        """Make the other processes fail, too."""
        group = self.group
        if group is not None:
            group.fail(device)

    def __deepcopy__(self, memo: Any) -> "SyncStatistics":
        return self  # a process group cannot be copied, and a copy of a layer works with the same processes

    def __reduce__(self) -> Any:
        if self.process_group is not None:
            raise TypeError(
                "a process group cannot be saved: save the state dict, or set layer.statistics = SyncStatistics() first"
            )
        return SyncStatistics, (None, self.unbiased)


@dataclass(frozen=True)
class Renorm(Statistics):
    """Batch renormalization: batch statistics, corrected towards the running ones. For small or dependent batches.

    `y = xhat * r + d` before weight and bias, where
    `r = clip(std / running_std, 1/r_max, r_max)` and `d = clip((mean - running_mean) / running_std, -d_max, d_max)` are
    constants of the backward pass. Without the clips `y` would be what evaluation gives.

    Both limits grow with the layer's `num_batches_tracked`, which is in its state dict: for `warmup_steps` batches
    there is no correction (`r = 1, d = 0`), then `r_max` grows linearly until `8 * warmup_steps` and `d_max` until
    `5 * warmup_steps`; the paper has 5,000, 40,000 and 25,000. `batch_norm`, which counts nothing, takes full limits.

    Args:
        r_max: At least 1.
        d_max: At least 0, in standard deviations.
        warmup_steps: Batches without correction; 0 for full limits from the first one on.
        statistics: Those of the batch: `BatchStatistics()`, or `SyncStatistics()` for that of all processes.

    Raises:
        ValueError: If a limit is out of its range.
        TypeError: If `statistics` are others.

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

    def plan(self, call: Call, running: Running) -> Plan:
        """The plan of the statistics inside, and the correction."""
        if running.is_recomputed:
            raise RuntimeError(
                "Renorm() cannot be inside an activation checkpoint: the running statistics that it corrected towards "
                "have moved on when the forward pass is repeated. Leave the layer out of the checkpoint"
            )
        old_mean, old_var = running.mean, running.var
        if old_mean is None or old_var is None:
            raise RuntimeError("Renorm() corrects towards running statistics: give running_mean and running_var")
        plan = self.statistics.plan(call, running)
        if plan.constants is not None:
            return plan
        r_max, d_max = self.limits(running.batches)

        def adjust(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
            exact = torch.promote_types(mean.dtype, torch.float32)
            mean, var, mean_before, var_before = (t.detach().to(exact) for t in (mean, var, old_mean, old_var))
            rstd_before = torch.rsqrt(var_before + call.eps)
            r = torch.clamp(torch.sqrt(var + call.eps) * rstd_before, 1 / r_max, r_max)
            d = torch.clamp((mean - mean_before) * rstd_before, -d_max, d_max)
            return r.to(call.arithmetic), d.to(call.arithmetic)

        return plan._replace(adjust=adjust)

    def fail(self, device: torch.device) -> None:
        """As the statistics inside."""
        self.statistics.fail(device)

    def limits(self, steps: Any) -> tuple[Any, Any]:
        """`r_max` and `d_max` after so many batches, a tensor or a number; None for any number."""
        if steps is None or self.warmup_steps == 0:
            return self.r_max, self.d_max
        past = steps / self.warmup_steps - 1
        r_share, d_share = past / 7, past / 4
        if isinstance(past, Tensor):  # a limit may be infinite, and 0 * infinity is no limit
            r_max, d_max = 1 + (self.r_max - 1) * r_share.clamp(0, 1), self.d_max * d_share.clamp(0, 1)
            return torch.where(past > 0, r_max, 1.0), torch.where(past > 0, d_max, 0.0)
        if past <= 0:
            return 1.0, 0.0
        return 1 + (self.r_max - 1) * min(r_share, 1.0), self.d_max * min(d_share, 1.0)


def expect(statistics: Any) -> None:
    """See that this is a source of statistics, or None.

    Raises:
        TypeError: If not.
    """
    if statistics is not None and not isinstance(statistics, Statistics):
        hint = ": an instance is wanted, with brackets" if isinstance(statistics, type) else ""
        raise TypeError(
            "statistics must be BatchStatistics(), RunningStatistics(), GhostStatistics(...), SyncStatistics() or "
            f"Renorm(), got {statistics!r}{hint}"
        )


def _count_two(call: Call) -> float | Tensor:
    """How much the values of each channel count; there must be two at least, or none."""
    if call.counts is not None and is_symbolic():
        return call.total()  # what is the same for all values cannot depend on them
    values = call.positions()
    if values != 1 and call.counts is None:
        return torch.sym_float(values) if isinstance(values, torch.SymInt) else float(values)
    size = call.x.size()
    if call.counts is not None and values == 0 and call.x.numel() > 0:
        raise ValueError(
            f"mask leaves nothing of x of shape {tuple(size)}: skip this batch, or normalize with training=False"
        )
    if values == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {size}"
            f"{'' if call.counts is None else ' of which the mask keeps one'}. The variance of one value is 0. "
            "Drop the last, incomplete batch (drop_last=True), use larger batches, or evaluate (model.eval())"
        )
    return call.total()
