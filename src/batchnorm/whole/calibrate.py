"""Calibration: running statistics that are exactly those of the data.

`calibrate` is independent of the framework. It reads the data, merges the moments of each layer's inputs, writes them,
and reports what it did. It asks a framework's adapter, a `Model`, for everything else.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from batchnorm.definition import Moments, merge_moments, reciprocal_std

__all__ = [
    "Alone",
    "Calibration",
    "Layer",
    "Method",
    "Model",
    "Processes",
    "See",
    "Statistics",
    "calibrate",
    "expect_batches",
]

Method = Literal["parallel", "sequential"]
METHODS: tuple[Method, ...] = ("parallel", "sequential")

Statistics = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Mean and variance of each channel."""


# --- The result -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did.

    Attributes:
        samples: The number of samples, over all processes; a batch of unknown size counts as one.
        changes: How much each layer changed: the largest difference in its normalized output, over its channels, for an
            input one standard deviation from the mean. 0.01 is small; 1 is a standard deviation.
        skipped: The reason why each other layer is unchanged.
    """

    samples: int
    changes: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that were calibrated."""
        return tuple(self.changes)

    @property
    def largest(self) -> float:
        """The largest of the changes; 0 without any."""
        return max(self.changes.values(), default=0.0)

    def __str__(self) -> str:
        """A line of summary, and a line for each layer that was skipped."""
        summary = f"{_counted(len(self.changes), 'layer')} calibrated on {_counted(self.samples, 'sample')}"
        if self.changes:
            name = max(self.changes, key=self.changes.__getitem__)
            summary += f"; the largest change is {self.largest:.2g} standard deviations, in {_named(name)}"
        return "\n".join([summary, *(f"  {_named(name)} is unchanged: {why}" for name, why in self.skipped.items())])


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _named(name: str) -> str:
    return name or "the layer"


def change(old: Statistics, new: Statistics, eps: float) -> float:
    """The distance between the normalized outputs of two pairs of statistics: see `Calibration.changes`."""
    (old_mean, old_var), (new_mean, new_var) = old, new
    with np.errstate(all="ignore"):
        old_rstd, new_rstd = reciprocal_std(old_var, eps), reciprocal_std(new_var, eps)
        std = np.sqrt(new_var)
        differences = [np.abs(s * std * new_rstd - (new_mean + s * std - old_mean) * old_rstd) for s in (-1, 1)]
        return float(np.max(np.nan_to_num(differences, nan=np.inf), initial=0.0))


# --- The adapter ------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A layer to calibrate.

    Attributes:
        channels: The number of channels.
        eps: Added to the variance.
        dtype: The type of its running statistics, for error messages.
    """

    channels: int
    eps: float
    dtype: str


See = Callable[[str, Moments | str], Statistics | None]
"""Called before a layer runs, with its name and the moments of its input, or the reason why these are unknown.

It returns the statistics by which the layer must normalize this input; None means the layer's own.
"""


class Model(Protocol):
    """A model, as `calibrate` sees it: batch normalizations by name. The name is empty if the model itself is one."""

    def find(self) -> Mapping[str, Layer | str]:
        """All batch normalizations, in the model's order: a layer to calibrate, or the reason why it is skipped.

        Raises:
            RuntimeError: If a layer does not know its size yet.
        """
        ...

    def run(self, batch: Any, names: Collection[str], see: See) -> None:
        """Call the model on a batch.

        Meanwhile the whole model evaluates, and `see` is called for the layers with these names. Afterwards everything
        is as before, except for the statistics that `see` has returned.
        """
        ...

    def size(self, batch: Any) -> int | None:
        """The number of samples in a batch that has just been `run`; None if it is unknown."""
        ...

    def read(self, name: str) -> Statistics:
        """Copies of the running statistics of a layer."""
        ...

    def write(self, name: str, mean: NDArray[np.float64], var: NDArray[np.float64]) -> None:
        """Set the running statistics of a layer."""
        ...

    def keep(self, name: str) -> Callable[[], None]:
        """Copy the statistics of a layer, and return a function that restores them, to the bit."""
        ...


class Processes(Protocol):
    """The processes that pool their statistics. Each calls `agree` once, then `merge` as often as the others."""

    def all_or_none(self) -> AbstractContextManager[None]:
        """Surround one call of `agree` or `merge` and the code before it: an error here is one in all processes."""
        ...

    def agree(self, sizes: Mapping[str, int]) -> None:
        """Check that all processes have the same layers, with these numbers of channels."""
        ...

    def merge(
        self, samples: int, found: Mapping[str, Moments], marked: Collection[str] = ()
    ) -> tuple[int, dict[str, Moments], set[str]]:
        """The sum of the samples, the moments merged, and the layers that any process marked."""
        ...


class Alone:
    """One process."""

    def all_or_none(self) -> AbstractContextManager[None]:
        """Do nothing: no other process waits."""
        return nullcontext()

    def agree(self, sizes: Mapping[str, int]) -> None:
        """Do nothing: there is no other process."""

    def merge(
        self, samples: int, found: Mapping[str, Moments], marked: Collection[str] = ()
    ) -> tuple[int, dict[str, Moments], set[str]]:
        """The arguments, as there is no other process."""
        return samples, dict(found), set(marked)


# --- The tool ---------------------------------------------------------------------------------------------------------


def expect_batches(data: Any) -> None:
    """Raise an error unless `data` can give batches.

    Raises:
        TypeError: If it is one batch, or not iterable.
    """
    named = isinstance(data, Mapping) or (isinstance(data, tuple) and hasattr(data, "_fields"))
    if named or isinstance(data, str | bytes) or (hasattr(data, "shape") and hasattr(data, "dtype")):
        raise TypeError(f"data must give batches, one after the other, got a {type(data).__name__}: pass [data]")
    if not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(f"data must give batches, one after the other, got {data!r}: pass a data loader or a list")


def calibrate(
    model: Model,
    data: Iterable[Any],
    *,
    method: Method,
    max_samples: int | None,
    unbiased: bool,
    processes: Processes,
    progress: bool,
) -> Calibration:
    """Set the running statistics of all layers to the statistics of their inputs.

    For each layer and channel, over all `n` values: `running_mean = mean`, `running_var = var`, or `var * n/(n-1)` if
    `unbiased`. Batches are merged by their counts, including the variance between them.

    "parallel" needs one pass: each layer normalizes by the current batch. "sequential" needs several: a pass completes
    the layers that, in every batch, run only after complete layers, which evaluate with their new statistics.

    Args:
        model: The model.
        data: The batches.
        method: "parallel" or "sequential".
        max_samples: Stop after the batch that reaches this number of samples, in each process; None reads all.
        unbiased: Whether the running variance is the unbiased one.
        processes: The processes that pool their statistics.
        progress: Whether to show a progress bar, if stderr is a terminal and rich is installed.

    Returns:
        What was done.

    Raises:
        ValueError: If there are no data, or they reach no layer; if statistics are not finite; if `method` or
            `max_samples` is invalid; if the data can be read only once and `method` is "sequential".
        TypeError: If `data` is one batch, or not iterable.

    Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3; Chan et al. 1983 for the merging.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be positive, got {max_samples}")
    expect_batches(data)
    with processes.all_or_none():
        if method == "sequential" and isinstance(data, Iterator):
            raise ValueError(
                "method='sequential' reads the data once for each layer, but an iterator can be read only once: "
                "pass a data loader or a list"
            )
        found = model.find()
        layers = {name: layer for name, layer in found.items() if isinstance(layer, Layer)}
        processes.agree({name: layer.channels for name, layer in layers.items()})
    skipped = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    before = {name: model.read(name) for name in layers}
    samples, left = 0, list(layers)
    with _undone_on_error(model, layers) as undo:
        refused: Mapping[str, str] = {}
        while left:
            seen = _Pass(model, left, normalize_by_batch=method == "parallel")
            refused = seen.refused
            done = f"{len(layers) - len(left)} of {_counted(len(layers), 'layer')} done"
            with processes.all_or_none():
                what = "calibrating" if method == "parallel" else f"calibrating, {done}"
                seen.read(_watched(data, what, progress), max_samples)
                samples, pooled, late = processes.merge(seen.samples, seen.found, seen.late)
            if samples == 0:
                raise ValueError("there is nothing to calibrate with: the data have no samples")
            complete = {name: m for name, m in pooled.items() if name not in late} or dict(list(pooled.items())[:1])
            for name, moments in complete.items():
                if moments.count > 1:
                    _write(model, name, layers[name].dtype, moments, unbiased)
                else:
                    undo[name]()
                    skipped[name] = "its input had only one value, which has no variance"
            left = [name for name in left if name not in complete]
            if method == "parallel" or not complete:
                break
        for name in left:
            undo[name]()
            skipped[name] = refused.get(name, "no call of this layer had any samples")
        changes = {n: change(before[n], model.read(n), layer.eps) for n, layer in layers.items() if n not in skipped}
        skipped = {name: skipped[name] for name in found if name in skipped}
        if not changes:
            reasons = "; ".join(f"{_named(name)}: {reason}" for name, reason in skipped.items())
            raise ValueError(f"no batch normalization was calibrated ({reasons or 'the model has none'})")
    return Calibration(samples, changes, skipped)


class _Pass:
    """One pass over the data, and the inputs of some layers.

    Attributes:
        samples: The number of samples.
        found: The moments of each layer's inputs.
        late: The layers that ever ran after another of these layers.
        refused: The reason why the moments of a layer's input are unknown.
    """

    def __init__(self, model: Model, names: Collection[str], normalize_by_batch: bool) -> None:
        self.model, self.names, self.normalize_by_batch = model, names, normalize_by_batch
        self.samples = 0
        self.found: dict[str, Moments] = {}
        self.late: set[str] = set()
        self.refused: dict[str, str] = {}
        self._first: str | None = None

    def read(self, batches: Iterable[Any], max_samples: int | None) -> None:
        """Call the model on the batches until there are enough samples."""
        for batch in batches:
            self._first = None
            self.model.run(batch, self.names, self._see)
            size = self.model.size(batch)
            self.samples += 1 if size is None else size
            if max_samples is not None and self.samples >= max_samples:
                break

    def _see(self, name: str, batch: Moments | str) -> Statistics | None:
        """A `See`."""
        if isinstance(batch, str):
            self.refused[name] = batch
            self.found.pop(name, None)
            return None
        if self._first is None:
            self._first = name
        elif name != self._first and not self.normalize_by_batch:
            self.late.add(name)
        if batch.count == 0 or name in self.refused:
            return None
        so_far = self.found[name] = merge_moments(self.found[name], batch) if name in self.found else batch
        if not self.normalize_by_batch:
            return None
        # A single value has no variance, so the layer uses that of all values so far.
        shown = so_far if batch.count == 1 else batch
        return shown.mean, shown.var if shown.count > 1 else np.ones_like(shown.var)


def _write(model: Model, name: str, dtype: str, moments: Moments, unbiased: bool) -> None:
    """Write the statistics of all the data, and raise an error if the layer's type cannot hold them."""
    var = moments.var * (moments.count / (moments.count - 1) if unbiased else 1.0)
    with np.errstate(over="ignore"):
        model.write(name, moments.mean, var)
    if not all(np.isfinite(values).all() for values in model.read(name)):
        raise ValueError(
            f"the statistics of the inputs of {_named(name)} are not finite in {dtype}; nothing has been changed. Look "
            "for NaN or infinity in the data, or in the layers before it"
        )


@contextmanager
def _undone_on_error(model: Model, names: Iterable[str]) -> Iterator[dict[str, Callable[[], None]]]:
    """Yield a function for each layer that restores its statistics. After an exception all are restored."""
    undo = {name: model.keep(name) for name in names}
    try:
        yield undo
    except BaseException:
        for put_back in undo.values():
            put_back()
        raise


def _watched(data: Iterable[Any], what: str, progress: bool) -> Iterator[Any]:
    """The data, with a progress bar if stderr is a terminal."""
    if progress and sys.stderr.isatty() and find_spec("rich"):
        from rich.console import Console
        from rich.progress import track

        try:
            total = len(data)  # type: ignore[arg-type]
        except TypeError:
            total = None
        yield from track(data, what, total=total, console=Console(stderr=True), transient=True)
    else:
        yield from data
