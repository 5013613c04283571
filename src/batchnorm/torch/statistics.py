"""Where the statistics of a normalization come from.

The stages of batch normalization are the same for every variant; an object of this module, given as `statistics=` to a
layer or to `batch_norm`, says which numbers they work with in training. Evaluation always uses the running statistics.
"""

from dataclasses import dataclass

__all__ = ["BatchStatistics", "RunningStatistics", "Statistics"]


@dataclass(frozen=True)
class BatchStatistics:
    """Of the batch itself, which also update the running ones: the default."""


@dataclass(frozen=True)
class RunningStatistics:
    """The running ones, in training too, and they stay as they are: a frozen layer. Weight and bias may still learn."""


Statistics = BatchStatistics | RunningStatistics
