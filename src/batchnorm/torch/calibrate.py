"""Running statistics that are those of the data: exact, pooled over all of it, before a model is shipped.

```
calibrate(model, loader)                          # one pass
calibrate(model, loader, method="sequential")     # one pass for each layer: training and evaluation agree exactly
```
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.definition import Moments, merge_moments, reciprocal_std
from batchnorm.torch import batches
from batchnorm.torch.functional import moments
from batchnorm.torch.pool import Pool
from batchnorm.torch.statistics import RunningStatistics

__all__ = ["Calibration", "calibrate"]

Method = Literal["parallel", "sequential"]
METHODS: tuple[Method, ...] = ("parallel", "sequential")


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did.

    Attributes:
        samples: How many there were, over all processes; a batch without tensors counts as one.
        changes: How much each layer changed: the largest difference in its normalized output, over its channels, for an
            input one standard deviation from the mean. 0.01 is little, 1 is a standard deviation.
        skipped: Why each of the other layers is as it was.
    """

    samples: int
    changes: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that were calibrated, in the order in which they ran first."""
        return tuple(self.changes)

    @property
    def largest(self) -> float:
        """The largest of the changes; 0 without any."""
        return max(self.changes.values(), default=0.0)

    def __str__(self) -> str:
        """To read."""
        lines = [f"{len(self.changes)} layers calibrated on {self.samples} samples"]
        if self.changes:
            name = max(self.changes, key=self.changes.__getitem__)
            lines[0] += f"; the largest change is {self.largest:.2g} standard deviations, in {name}"
        return "\n".join([*lines, *(f"  {name} is as it was: {reason}" for name, reason in self.skipped.items())])


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    method: Method = "parallel",
    forward: Callable[[nn.Module, Any], object] | None = None,
    max_samples: int | None = None,
    unbiased: bool = True,
    process_group: Any = None,
    progress: bool = True,
) -> Calibration:
    """Set the running statistics of all batch normalizations to the statistics of the data.

    For each layer and channel, over all `n` values that come in: `running_mean = mean`, `running_var = var * n/(n-1)`.
    Batches are merged by their counts, with the variance between them: however the same inputs of a layer are split,
    the result is the same, to rounding.

    Nothing else changes: the model evaluates (dropout is off), modes are put back, parameters, `num_batches_tracked`
    and frozen layers stay as they are. After an exception everything is as before.

    Args:
        model: With PyTorch's layers or ours.
        data: Batches: tensors; tuples or lists; mappings, named tuples or dataclasses. A sequence gives the model as
            many of its items as its forward must have (so labels are left out), names give it the arguments that it
            has. Tensors are moved to the model's device. A `DataLoader`, or a list; "sequential" reads it several
            times.
        method: "parallel": one pass. Each layer normalizes with the statistics of the batch at hand, so a layer's
            inputs depend on how the data were split before it. "sequential": one pass for each layer, those before it
            already evaluating with their new statistics. Exact for the deepest network: in evaluation the inputs of
            each layer have the running statistics as their own. Each pass sees the same data only if the loader
            neither shuffles an incomplete epoch nor augments at random.
        forward: `forward(model, batch)`, called in place of the rules above.
        max_samples: Stop after the batch that reaches so many, on each process; None takes all.
        unbiased: Whether the running variance is the unbiased one, as in training. Layers normalize with the biased one
            in training, so False makes evaluation agree with it, which matters where few values come in.
        process_group: The processes that pool their statistics; None: all, if `torch.distributed` is initialized. Every
            process of the group must call. One without data may take part.
        progress: Whether to show a bar, where stderr is a terminal and rich is installed.

    Returns:
        What was done. Layers that no sample reached are among the skipped.

    Raises:
        ValueError: If there are no data; if statistics are not finite; if `method` or `max_samples` is wrong; if the
            data can be read only once and `method` is "sequential".
        RuntimeError: If another process of the group failed; if a lazy layer has not seen its first batch.
        TypeError: If it is not clear what to call the model with.

    Differs from `torch.optim.swa_utils.update_bn`:
        1. Pooled statistics, not an average of batches' that counts a short last batch as a full one and leaves out the
           variance between batches.
        2. Batches of any structure; a last batch of one sample; masks; processes.
        3. Dropout is off; frozen layers and momenta stay as they are, after exceptions too.

    Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3; Chan et al. 1983 for the merging.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be positive, got {max_samples}")
    if method == "sequential" and iter(data) is data:
        raise ValueError(
            "method='sequential' reads the data once for each layer, and these can be read only once: "
            "pass a DataLoader or a list"
        )
    layers, skipped = _find(model)
    pool = Pool(process_group)
    passes = _Passes(model, data, forward or batches.call, max_samples, progress)
    with _undone_on_error(model, layers.values()):
        before = {name: _statistics(layer) for name, layer in layers.items()}
        find = _in_parallel if method == "parallel" else _in_sequence
        samples, found = find(passes, layers, pool, unbiased)
        changes = {name: _change(before[name], _statistics(layers[name]), layers[name].eps) for name in found}
    skipped |= dict.fromkeys(layers.keys() - found.keys(), "no sample reached it")
    return Calibration(samples, changes, {name: skipped[name] for name, _ in model.named_modules() if name in skipped})


# --- Layers ----------------------------------------------------------------------------------------------------------

Layers = Mapping[str, Any]
"""Batch normalizations by name."""


def _find(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """The layers to calibrate; and why the others are not."""
    layers, skipped = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None):
            raise RuntimeError(f"{name or 'the layer'} does not know its size yet: call the model on one batch first")
        if module.running_mean is None or module.running_var is None:
            skipped[name] = "keeps no running statistics"
        elif isinstance(getattr(module, "statistics", None), RunningStatistics):
            skipped[name] = "is frozen"
        elif model.training and not module.training:
            skipped[name] = "is frozen: it evaluates in a model that trains"
        else:
            layers[name] = module
    return layers, skipped


def _sizes(layers: Layers) -> dict[str, int]:
    return {name: layer.num_features for name, layer in layers.items()}


def _demand(samples: int) -> None:
    if samples == 0:
        raise ValueError("there is nothing to calibrate with: the data gave no samples")


def _statistics(layer: Any) -> tuple[Any, Any]:
    return tuple(
        t.detach().to("cpu", torch.float64, copy=True).numpy() for t in (layer.running_mean, layer.running_var)
    )


def _write(layer: Any, mean: Any, var: Any) -> None:
    for running, values in ((layer.running_mean, mean), (layer.running_var, var)):
        running.copy_(torch.from_numpy(np.asarray(values)))


def _finish(name: str, layer: Any, pooled: Moments, unbiased: bool) -> None:
    """Write the statistics of all the data."""
    var = pooled.var * (pooled.count / (pooled.count - 1) if unbiased and pooled.count > 1 else 1.0)
    written = [torch.from_numpy(np.asarray(values)).to(layer.running_mean.dtype) for values in (pooled.mean, var)]
    if not all(bool(values.isfinite().all()) for values in written):
        raise ValueError(
            f"the statistics of what comes into {name or 'the layer'} are not finite; nothing has been changed. "
            "Look for NaN or infinity in the data, or in the layers before it"
        )
    _write(layer, pooled.mean, var)


def _change(old: tuple[Any, Any], new: tuple[Any, Any], eps: float) -> float:
    (old_mean, old_var), (new_mean, new_var) = old, new
    with np.errstate(all="ignore"):
        old_rstd, new_rstd = reciprocal_std(old_var, eps), reciprocal_std(new_var, eps)
        std = np.sqrt(new_var)
        differences = [np.abs(s * std * new_rstd - (new_mean + s * std - old_mean) * old_rstd) for s in (-1, 1)]
    return float(np.max(differences, initial=0.0))


@contextmanager
def _undone_on_error(model: nn.Module, layers: Iterable[Any]) -> Iterator[None]:
    """All modules evaluate meanwhile; then their modes are as before, and after an exception the statistics too."""
    modes = [(module, module.training) for module in model.modules()]
    statistics = [(t, t.detach().clone()) for layer in layers for t in (layer.running_mean, layer.running_var)]
    try:
        for module, _ in modes:
            module.training = False  # not `model.eval()`, which a model may have made do something else
        with torch.no_grad():
            yield
    except BaseException:
        with torch.no_grad():
            for tensor, values in statistics:
                tensor.copy_(values)
        raise
    finally:
        for module, training in modes:
            module.training = training


# --- Passes over the data --------------------------------------------------------------------------------------------

Collect = Callable[[str, Any, Tensor, Tensor | None], None]
"""What is done with a layer's input: its name, the layer, the input, the mask."""


class _Passes:
    """The model on all of the data, as often as it is wanted."""

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        forward: Callable[[nn.Module, Any], object],
        max_samples: int | None,
        progress: bool,
    ) -> None:
        self.model, self.data, self.forward = model, data, forward
        self.max_samples, self.progress = max_samples, progress
        tensors = (*model.parameters(), *model.buffers())
        self.device = tensors[0].device if tensors else torch.device("cpu")

    def run(self, layers: Layers, collect: Collect, what: str) -> int:
        """One pass; `collect` sees what comes into the layers. Returns the number of samples."""

        def hook(name: str) -> Callable[..., None]:
            def see(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                collect(name, layer, args[0] if args else kwargs["input"], kwargs.get("mask"))

            return see

        handles = [
            layer.register_forward_pre_hook(hook(name), with_kwargs=True)  # the last one: sees what the layer will see
            for name, layer in layers.items()
        ]
        samples = 0
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code would not call the hooks
                for batch in _watched(self.data, what, self.progress):
                    self.forward(self.model, batches.move(batch, self.device))
                    size = batches.size(batch)
                    samples += 1 if size is None else size
                    if self.max_samples is not None and samples >= self.max_samples:
                        break
        finally:
            for handle in handles:
                handle.remove()
        return samples


def _in_parallel(passes: _Passes, layers: Layers, pool: Pool, unbiased: bool) -> tuple[int, dict[str, Moments]]:
    found: dict[str, Moments] = {}

    def collect(name: str, layer: Any, x: Tensor, mask: Tensor | None) -> None:
        batch = moments(x, mask)
        found[name] = merge_moments(found[name], batch) if name in found else batch
        # The layer evaluates with the statistics of the batch. One value has no variance: it takes those so far.
        seen = found[name] if batch.count <= 1 else batch
        if seen.count > 1:
            _write(layer, seen.mean, seen.var)

    with pool.all_or_none():
        samples = passes.run(layers, collect, "calibrating")
        samples, found = pool.merge(samples, _sizes(layers), found)
    _demand(samples)
    for name, pooled in found.items():
        _finish(name, layers[name], pooled, unbiased)
    return samples, found


def _in_sequence(passes: _Passes, layers: Layers, pool: Pool, unbiased: bool) -> tuple[int, dict[str, Moments]]:
    """In each pass the first layer that comes, among those not done yet, is calibrated."""
    done: dict[str, Moments] = {}
    samples = 0
    while len(done) < len(layers):
        left = {name: layer for name, layer in layers.items() if name not in done}
        found: dict[str, Moments] = {}

        def collect(name: str, layer: Any, x: Tensor, mask: Tensor | None, found: dict[str, Moments] = found) -> None:
            if not found or name in found:
                batch = moments(x, mask)
                found[name] = merge_moments(found[name], batch) if found else batch

        with pool.all_or_none():
            samples = passes.run(left, collect, f"calibrating layer {len(done) + 1} of {len(layers)}")
            samples, found = pool.merge(samples, _sizes(left), found, first_only=True)
        _demand(samples)
        if not found:
            break
        for name, pooled in found.items():
            _finish(name, layers[name], pooled, unbiased)
        done |= found
    return samples, done


def _watched(data: Iterable[Any], what: str, progress: bool) -> Iterator[Any]:
    """The data, with a bar if someone is there to see it."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        progress = False
    if progress and (console := Console(stderr=True)).is_terminal:
        total = len(data) if isinstance(data, Sized) else None
        yield from track(data, what, total=total, console=console, transient=True)
    else:
        yield from data
