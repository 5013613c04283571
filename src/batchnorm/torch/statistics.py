"""Where the statistics of a normalization come from.

The stages of batch normalization are the same for every variant; an object of this module, given as `statistics=` to a
layer or to `batch_norm`, says which numbers they work with in training. Evaluation always uses the running statistics.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

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


@dataclass(frozen=True)
class BatchStatistics:
    """Of the batch itself, which also update the running ones: the default.

    Args:
        unbiased: Whether the running variance moves towards the unbiased one, as in PyTorch. False is Keras' way.
    """

    unbiased: bool = True


@dataclass(frozen=True)
class RunningStatistics:
    """The running ones, in training too, and they stay as they are: a frozen layer. Weight and bias may still learn."""


@dataclass(frozen=True)
class GhostStatistics:
    """Of groups of samples, each normalized by its own: a large batch with the noise of a small one.

    A batch of `N` samples is cut into `max(1, N // batch_size)` groups of consecutive samples, as equal as can be: no
    group is smaller than `batch_size`, and the sizes differ by one at most. The running statistics are updated once,
    with the statistics of the whole batch.

    Args:
        batch_size: Samples per group.
        unbiased: As in `BatchStatistics`.

    Raises:
        ValueError: If `batch_size` is not a positive number.

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


@dataclass(frozen=True)
class SyncStatistics:
    """Of the batches of all processes together, whatever part of the samples each has; none is allowed, too.

    Every process must call the layer as often as the others, and its backward pass. There is one collective in each
    pass, and one more when a layer is wider than 256 channels and than all before it. Without `torch.distributed`, or
    in a group of one, these are the statistics of the batch.

    Args:
        process_group: Of `torch.distributed`; the default one if None.
        unbiased: As in `BatchStatistics`.

    Raises:
        RuntimeError: In a call, in all processes, if one of them fails, if their channels or types differ, or if `x`
            needs a gradient in some only; in the others, if one process is gone, at once or after the group's timeout.

    Source: Peng et al. 2018, "MegDet", section 3.3. Merged as by Chan et al. 1983.
    """

    process_group: Any = None
    unbiased: bool = True

    @property
    def group(self) -> Group | None:
        """The processes that there are now besides this one; None if it is alone."""
        return Group.of(self.process_group)

    def __deepcopy__(self, memo: Any) -> "SyncStatistics":
        return self  # a process group cannot be copied, and a copy of a layer works with the same processes

    def __reduce__(self) -> Any:
        if self.process_group is not None:
            raise TypeError(
                "a process group cannot be saved: save the state dict, or set layer.statistics = SyncStatistics() first"
            )
        return SyncStatistics, (None, self.unbiased)


@dataclass(frozen=True)
class Renorm:
    """Batch renormalization: of the batch, corrected towards the running ones. For small batches, or dependent samples.

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

    def limits(self, steps: Any) -> tuple[Any, Any]:
        """`r_max` and `d_max` after so many batches, a tensor or a number; None for any number."""
        if steps is None or self.warmup_steps == 0:
            return self.r_max, self.d_max
        past = steps / self.warmup_steps - 1
        r_share, d_share = past / 7, past / 4
        if isinstance(past, torch.Tensor):  # a limit may be infinite, and 0 * infinity is no limit
            r_max, d_max = 1 + (self.r_max - 1) * r_share.clamp(0, 1), self.d_max * d_share.clamp(0, 1)
            return torch.where(past > 0, r_max, 1.0), torch.where(past > 0, d_max, 0.0)
        if past <= 0:
            return 1.0, 0.0
        return 1 + (self.r_max - 1) * min(r_share, 1.0), self.d_max * min(d_share, 1.0)


Statistics = BatchStatistics | RunningStatistics | GhostStatistics | SyncStatistics | Renorm


def expect(statistics: Any) -> None:
    """See that these are statistics.

    Raises:
        TypeError: If not.
    """
    if statistics is not None and not isinstance(statistics, Statistics):
        hint = ": an instance is wanted, with brackets" if isinstance(statistics, type) else ""
        raise TypeError(
            "statistics must be BatchStatistics(), RunningStatistics(), GhostStatistics(...), SyncStatistics() or "
            f"Renorm(), got {statistics!r}{hint}"
        )
