"""The evidence of `diagnose`: the state of each layer, and the statistics of its inputs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchnorm.definition import Moments, merge_moments
from batchnorm.whole.chance import is_real

__all__ = ["Batch", "Distance", "Evidence", "Inputs", "Layer", "Outputs", "Producer", "State", "batch", "gap"]

Array = NDArray[np.float64]


# --- The state of a layer ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """The state of a batch normalization, without data.

    Attributes:
        name: Its name in the model; empty if the model itself is the layer.
        at: The layer as an expression of Python, in which `model` is the model.
        kind: The name of its class.
        channels: The number of channels.
        mean, var: `(C,)`: the running statistics; None if it keeps none.
        weight, bias: `(C,)`: gamma and beta; None where there is none.
        eps: Added to the variance.
        update_rate: The weight of a new batch in the running statistics; None for the average of all batches.
        batches: The number of batches that have moved the running statistics; None if they were not counted.
        skipped: The number of batches that were skipped because they were not finite.
        rounding: The relative rounding error of gamma's type.
        trains: Whether it normalizes by the statistics of the batch in training and moves the running ones.
        is_frozen: Whether a lasting setting makes it normalize by its running statistics in training.
        learns: Whether gamma or beta learn; None if there are none.
        group: The number of samples whose statistics are taken together; None for the whole batch.
        is_corrected: Whether batch statistics are corrected towards the running ones, as in batch renormalization.
        is_synchronized: Whether the processes pool their statistics.
    """

    name: str
    at: str
    kind: str
    channels: int
    mean: Array | None = None
    var: Array | None = None
    weight: Array | None = None
    bias: Array | None = None
    eps: float = 1e-5
    update_rate: float | None = 0.1
    batches: int | None = None
    skipped: int = 0
    rounding: float = 2.0**-23
    trains: bool = True
    is_frozen: bool = False
    learns: bool | None = True
    group: int | None = None
    is_corrected: bool = False
    is_synchronized: bool = False

    @property
    def memory(self) -> float:
        """The variance of a running average of independent batches, relative to that of one batch."""
        if self.update_rate is None:
            return 1 / max(1, self.batches or 1)
        return self.update_rate / (2 - self.update_rate)


class Producer(NamedTuple):
    """The convolution or linear layer whose output goes straight into a normalization, and nowhere else.

    Attributes:
        name: Its name in the model.
        at: The layer as an expression of Python.
        bias: Its bias; None if it has none.
    """

    name: str
    at: str
    bias: Array | None


# --- The inputs of a layer --------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The statistics of one input of a layer.

    The two errors are sampling errors. They treat the samples as independent, but not the positions within a sample,
    because the pixels of an image are alike.

    Attributes:
        samples: The number of samples.
        moments: The moments of all values.
        mean_error2, var_error2: `(C,)`: the squared standard errors of mean and variance; 0 for a single sample.
    """

    samples: int
    moments: Moments
    mean_error2: Array
    var_error2: Array


def batch(x: Array, counts: Array | None = None) -> Batch:
    """The statistics of an input.

    With `r_i = sum over positions of (x - mean)` in sample `i`: `mean_error2 = n/(n-1) * sum(r_i^2) / M^2`, the usual
    error of a ratio of sums over clusters. For the variance `r_i` sums `(x - mean)^2 - var`.

    Args:
        x: `(N, C, L)`.
        counts: `(N, 1, L)`: how much each position counts; 1 everywhere if None.

    Source: Cochran 1977, "Sampling techniques", equation 6.12.
    """
    samples = len(x)
    if counts is None:
        counts = np.ones((samples, 1, x.shape[2]))
    else:
        x = np.where(counts > 0, x, 0.0)
    count = float(counts.sum())
    mean = (counts * x).sum((0, 2)) / count
    deviations = x - mean[:, None]
    var = (counts * deviations**2).sum((0, 2)) / count
    by_sample = (counts * deviations).sum(2), (counts * (deviations**2 - var[:, None])).sum(2)
    scale = samples / max(1, samples - 1) / count**2 if samples > 1 else 0.0
    mean_error2, var_error2 = (scale * (sums**2).sum(0) for sums in by_sample)
    return Batch(samples, Moments(count, mean, var), mean_error2, var_error2)


def gap(mean: Array, var: Array, running_mean: Array, running_var: Array, eps: float) -> float:
    """How far the statistics of an input are from the running ones: the root mean square of `deviation`."""
    return _size(*deviation(mean, var, running_mean, running_var, eps))


def deviation(mean: Array, var: Array, running_mean: Array, running_var: Array, eps: float) -> tuple[Array, Array]:
    """How an input that is normalized by running statistics differs from one that is normalized by its own.

    `shift = (mean - running_mean) / sqrt(running_var + eps)`; `scale = sqrt((var + eps) / (running_var + eps))`.

    Args:
        mean, var: `(C,)`: the statistics of the input.
        running_mean, running_var: `(C,)`: the running statistics; a negative variance counts as 0.
        eps: Added to the variances.

    Returns:
        The mean of the normalized values, `shift`, instead of 0, and the factor of their standard deviation, `scale`.
    """
    with np.errstate(all="ignore"):
        floor = np.maximum(running_var, 0.0) + eps
        return (mean - running_mean) / np.sqrt(floor), np.sqrt((var + eps) / floor)


def _size(shift: Array, scale: Array) -> float:
    """The error of a normalized value, as in `Distance`."""
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.mean(shift**2 + (scale - 1) ** 2)))


class Distance(NamedTuple):
    """How far running statistics are from those of the data.

    Attributes:
        size: The error of a normalized value, in standard deviations: a root mean square over values and channels.
        errors: The largest distance of a channel, in standard errors.
        is_real: Whether chance hardly produces such a distance.
    """

    size: float
    errors: float
    is_real: bool


@dataclass
class Inputs:
    """The statistics of all the batches that went into a layer.

    Attributes:
        batches: The number of batches.
        samples: The number of samples.
        unusable: The number of batches that were not finite; nothing else counts them.
        moments: The moments of all values together.
        tests: The number of channels in all layers, each of which is tested.
    """

    batches: int = 0
    samples: int = 0
    unusable: int = 0
    moments: Moments | None = None
    tests: int = 1
    _within: Any = 0.0  # the sum of the variances within the batches, weighted by samples
    _freedom: int = 0
    _mean2: Any = 0.0  # the variance of a sample's mean, times the degrees of freedom
    _var2: Any = 0.0
    _centers: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # of the batches: mean and sum of squares

    def add(self, new: Batch) -> None:
        """Count a batch."""
        if new.samples == 0 or new.moments.count == 0:
            return
        if not (np.isfinite(new.moments.mean).all() and np.isfinite(new.moments.var).all()):
            self.unusable += 1
            return
        self.batches += 1
        self.samples += new.samples
        self.moments = new.moments if self.moments is None else merge_moments(self.moments, new.moments)
        self._within = self._within + new.samples * new.moments.var
        self._freedom += new.samples - 1
        self._mean2 = self._mean2 + (new.samples - 1) * new.samples * new.mean_error2
        self._var2 = self._var2 + (new.samples - 1) * new.samples * new.var_error2
        share = new.samples / self.samples
        for name, value in (("mean", new.moments.mean), ("var", new.moments.var)):
            center, squares = self._centers.get(name, (0.0, 0.0))
            step = value - center
            center = center + share * step
            self._centers[name] = center, squares + new.samples * step * (value - center)

    @property
    def batch_size(self) -> float:
        """The mean number of samples per batch."""
        return self.samples / max(1, self.batches)

    @property
    def values(self) -> float:
        """The mean number of values per channel in a batch."""
        return 0.0 if self.moments is None else self.moments.count / self.batches

    @property
    def within(self) -> Array:
        """`(C,)`: the mean variance within a batch."""
        return np.asarray(self._within / max(1, self.samples), np.float64)

    @property
    def freedom(self) -> int:
        """The degrees of freedom of the sampling errors."""
        return self._freedom or max(0, self.batches - 1)

    def _per_sample(self, name: str) -> Array:
        """`(C,)`: the variance of one sample's estimate of the mean, or of the variance."""
        if self._freedom:
            return np.asarray((self._mean2 if name == "mean" else self._var2) / self._freedom, np.float64)
        # With batches of one sample, only the differences between batches are known.
        return np.asarray(self._centers[name][1] / max(1, self.batches - 1), np.float64)

    @property
    def independent(self) -> float:
        """The number of independent values per channel in a batch, for the median channel.

        The mean of so many independent values has the standard error that the mean of a batch has: `1 + var / error^2`.
        """
        error2 = self._per_sample("mean") / self.batch_size
        moves = self.within > 0
        if not moves.any():
            return self.values
        with np.errstate(divide="ignore"):
            return float(np.median(1 + self.within[moves] / error2[moves]))

    def spread(self) -> tuple[float, float, bool]:
        """How much the means of the batches differ.

        Returns:
            The number of independent values whose means would differ as much, over all channels; the largest ratio of
            the variance between batches to that expected by chance; whether chance hardly produces such a ratio.
        """
        if self.batches < 2 or not self._freedom or self.moments is None:
            return math.inf, 1.0, False
        between = self._centers["mean"][1] / (self.batches - 1)
        chance = self._per_sample("mean")
        moves = (self.moments.var > 0) & (chance > 0)
        if not moves.any():
            return math.inf, 1.0, False
        largest = float((between[moves] / chance[moves]).max())
        share = float((between[moves] / self.batch_size / self.moments.var[moves]).mean())
        real = is_real(largest, self.batches - 1, self._freedom, self.tests)
        return 1 / share if share > 0 else math.inf, largest, real

    def distance(self, state: State) -> Distance:
        """How far the running statistics are from the statistics of these inputs.

        For an input of mean `m` and standard deviation `s`, the normalized value is off by `d = (m - mean)/std` on
        average, and its standard deviation is `s/std` instead of 1. Chance explains the sampling error of the inputs,
        and that of a running average over batches of this size.
        """
        if self.moments is None or state.mean is None or state.var is None:
            return Distance(0.0, 0.0, False)
        with np.errstate(all="ignore"):
            shift, scale = deviation(self.moments.mean, self.moments.var, state.mean, state.var, state.eps)
            exactness = 1 / self.samples + state.memory / self.batch_size
            mean_errors2 = (self.moments.mean - state.mean) ** 2 / (self._per_sample("mean") * exactness)
            logarithm2 = (2 * np.log(scale)) ** 2
            var_errors2 = logarithm2 / (self._per_sample("var") * exactness / (self.moments.var + state.eps) ** 2)
            differs = np.array([shift != 0, scale != 1])
            errors2 = np.where(differs, np.nan_to_num([mean_errors2, var_errors2], nan=0.0, posinf=np.inf), 0.0)
        largest = float(errors2.max(initial=0.0))
        return Distance(_size(shift, scale), math.sqrt(largest), is_real(largest, 1, self.freedom, 2 * self.tests))

    def distance_to(self, other: "Inputs") -> Distance:
        """How far other inputs are from these, in standard deviations of these."""
        if self.moments is None or other.moments is None:
            return Distance(0.0, 0.0, False)
        with np.errstate(all="ignore"):
            var = self.moments.var
            shift = np.nan_to_num((other.moments.mean - self.moments.mean) / np.sqrt(var), posinf=0.0, neginf=0.0)
            scale = np.nan_to_num(np.sqrt(other.moments.var / var), nan=1.0, posinf=1.0)
            errors = [i._per_sample("mean") / i.samples for i in (self, other)]
            shift_errors2 = np.where(shift != 0, (other.moments.mean - self.moments.mean) ** 2 / sum(errors), 0.0)
            largest = float(max(np.nan_to_num(shift_errors2).max(), self._logarithm_errors2(other, 0.0).max()))
        freedom = min(self.freedom, other.freedom)
        return Distance(_size(shift, scale), math.sqrt(largest), is_real(largest, 1, freedom, 2 * self.tests))

    def varies_from(self, other: "Inputs", eps: float) -> bool:
        """Whether the variance of these inputs differs from that of others by more than chance."""
        largest = float(self._logarithm_errors2(other, eps).max())
        return is_real(largest, 1, min(self.freedom, other.freedom), self.tests)

    def _logarithm_errors2(self, other: "Inputs", eps: float) -> Array:
        """`(C,)`: the squared difference of the logarithms of two variances, in squared standard errors."""
        assert self.moments is not None
        assert other.moments is not None
        with np.errstate(all="ignore"):
            mine, others = self.moments.var + eps, other.moments.var + eps
            error2 = (
                self._per_sample("var") / self.samples / mine**2 + other._per_sample("var") / other.samples / others**2
            )
            return np.where(mine != others, np.nan_to_num(np.log(mine / others) ** 2 / error2, nan=0.0), 0.0)


# --- All of it --------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """A layer, and what the data showed about it.

    Attributes:
        state: The layer.
        order: Its place in the order of the layers' first calls; None if it was never called.
        calls: The largest number of calls in one step.
        trained: The inputs in training.
        quiet: The inputs in training, with everything random off.
        evaluated: The inputs in evaluation.
        by_call: The inputs in training, for each call of a step.
        highest: `(C,)`: the largest output.
        is_rectified: Whether a ReLU follows, so that an output below 0 is off.
        producer: The layer that computes its input; None if unknown.
        dropouts: The names of the dropouts that were called since the previous layer.
        counted: How often a step has counted the batch after the forward pass and after the backward pass; None if
            nothing was recomputed.
        decay: The weight decay of gamma and beta; 0 if there is none, or no optimizer was given.
    """

    state: State
    order: int | None = None
    calls: int = 0
    trained: Inputs = field(default_factory=Inputs)
    quiet: Inputs = field(default_factory=Inputs)
    evaluated: Inputs = field(default_factory=Inputs)
    by_call: list[Inputs] = field(default_factory=list)
    highest: Array | None = None
    is_rectified: bool = False
    producer: Producer | None = None
    dropouts: tuple[str, ...] = ()
    counted: tuple[int, int] | None = None
    decay: float = 0.0

    @property
    def follows_batch(self) -> bool:
        """Whether it normalizes by the statistics of the batch alone."""
        return self.state.trains and not self.state.is_frozen and not self.state.is_corrected

    def takes(self, mode: str, number: int, x: Array, counts: Array | None) -> None:
        """Count an input.

        Args:
            mode: "trained", "quiet" or "evaluated".
            number: The number of the call in this step, from 0.
            x: `(N, C, *positions)`.
            counts: `(N, *positions)`: how much each position counts; 1 everywhere if None.
        """
        if len(x) == 0 or (counts is not None and not counts.any()):
            return
        with np.errstate(invalid="ignore", over="ignore"):
            new = batch(x.reshape(len(x), x.shape[1], -1), None if counts is None else counts.reshape(len(x), 1, -1))
        self.add(mode, number, new)

    def add(self, mode: str, number: int, new: Batch) -> None:
        """Count an input that is summarized already; `mode` and `number` as in `takes`."""
        getattr(self, mode).add(new)
        if mode == "trained":
            self.calls = max(self.calls, number + 1)
            while len(self.by_call) <= number:
                self.by_call.append(Inputs())
            self.by_call[number].add(new)

    def gives(self, y: Array) -> None:
        """Note the largest outputs of `y`, `(N, C, *positions)`."""
        if y.size:
            highest = np.moveaxis(y, 1, 0).reshape(y.shape[1], -1).max(1)
            self.highest = highest if self.highest is None else np.maximum(self.highest, highest)


@dataclass
class Outputs:
    """The distance between the outputs of training and evaluation, both with everything random off."""

    _difference2: float = 0.0
    _variance: float = 0.0

    def add(self, trained: Array, evaluated: Array) -> None:
        """Add the outputs for a batch, whose first axis is the samples; outputs of different shapes are skipped."""
        if trained.shape != evaluated.shape or trained.ndim == 0 or len(trained) < 2:
            return
        self._difference2 += float(np.sum((trained - evaluated) ** 2))
        self._variance += float(np.sum((trained - trained.mean(0)) ** 2))

    @property
    def gap(self) -> float | None:
        """The distance in standard deviations of the output in training; None if the outputs cannot be compared."""
        if not (0 < self._variance < math.inf and math.isfinite(self._difference2)):
            return None
        return math.sqrt(self._difference2 / self._variance)


@dataclass
class Evidence:
    """All that is known about a model.

    Attributes:
        layers: Its batch normalizations, by name.
        batches, samples: The numbers that were read; 0 without data.
        is_complete: Whether all the data were read.
        processes: The number of processes that train.
        is_training: Whether the model was in training when it was examined.
        outputs: The model's outputs.
    """

    layers: Mapping[str, Layer]
    batches: int = 0
    samples: int = 0
    is_complete: bool = True
    processes: int = 1
    is_training: bool = True
    outputs: Outputs = field(default_factory=Outputs)

    def reach(self, name: str) -> Layer:
        """The layer, which is called now."""
        layer = self.layers[name]
        if layer.order is None:
            layer.order = sum(other.order is not None for other in self.layers.values())
        return layer

    def in_order(self) -> list[Layer]:
        """The layers that were called, in the order of their first calls."""
        called = [layer for layer in self.layers.values() if layer.order is not None]
        return sorted(called, key=lambda layer: layer.order or 0)

    def count_tests(self) -> None:
        """Tell all inputs how many channels are tested."""
        tests = sum(layer.state.channels for layer in self.layers.values())
        for layer in self.layers.values():
            for inputs in (layer.trained, layer.quiet, layer.evaluated, *layer.by_call):
                inputs.tests = tests
