"""Running statistics that are those of the data: exact, pooled over all of it, before a model is shipped.

```
calibrate(model, loader)                          # one pass
calibrate(model, loader, method="sequential")     # one pass for each layer: training and evaluation agree exactly
```
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from batchnorm.calibration import Calibration, change, watched
from batchnorm.definition import Moments, merge_moments
from batchnorm.torch import batches
from batchnorm.torch.functional import moments
from batchnorm.torch.layers import FORWARDS
from batchnorm.torch.pool import Pool
from batchnorm.torch.sources import RunningStatistics

__all__ = ["Calibration", "calibrate"]

Method = Literal["parallel", "sequential"]
METHODS: tuple[Method, ...] = ("parallel", "sequential")


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
    and frozen layers stay as they are. Frozen are layers with `RunningStatistics()`, and, in a model in which other
    batch normalizations train, those that evaluate. After an exception everything is as before.

    Args:
        model: With PyTorch's layers or ours.
        data: Batches: tensors; tuples or lists; mappings, named tuples or dataclasses. A sequence gives the model as
            many of its items as its forward must have (so labels are left out, but optional masks too: name them, or
            say `forward`), names give it the arguments that it has. Tensors are moved to the model's device. A
            `DataLoader`, or a list; "sequential" reads it several times.
        method: "parallel": one pass. Each layer normalizes with the statistics of the batch at hand, so a layer's
            inputs depend on how the data were split before it. "sequential": one pass for each layer, those before it
            already evaluating with their new statistics. Exact for the deepest network: in evaluation the inputs of
            each layer have the running statistics as their own (unless a layer takes what itself has given before).
            Each pass sees the same data only if the loader neither shuffles an incomplete epoch nor augments at random.
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
        ValueError: If there are no data, or no layer that they reach; if statistics are not finite; if `method` or
            `max_samples` is wrong; if the data can be read only once and `method` is "sequential".
        RuntimeError: If another process of the group failed; if a lazy layer has not seen its first batch.
        TypeError: If `data` is one batch; if it is not clear what to call the model with.

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
    if isinstance(data, Tensor | Mapping | str):
        raise TypeError(f"data must give batches, one after the other, got a {type(data).__name__}: pass [data]")
    pool = Pool(process_group)
    with pool.all_or_none():
        if method == "sequential" and isinstance(data, Iterator):
            raise ValueError(
                "method='sequential' reads the data once for each layer, and these can be read only once: "
                "pass a DataLoader or a list"
            )
        layers, skipped = _find(model)
        pool.agree({name: layer.num_features for name, layer in layers.items()})
    passes = _Passes(model, data, forward or batches.call, max_samples, progress)
    with _undone_on_error(model, layers.values()):
        before = {name: _statistics(layer) for name, layer in layers.items()}
        find = _in_parallel if method == "parallel" else _in_sequence

        def finish(name: str, pooled: Moments) -> None:
            if pooled.count <= 1:
                skipped[name] = "only one value came in, which has no variance"
                _write(layers[name], *before[name])
            else:
                _finish(name, layers[name], pooled, unbiased)

        samples, found = find(passes, layers, pool, finish)
        changed = [name for name in layers if name in found and name not in skipped]
        changes = {name: change(before[name], _statistics(layers[name]), layers[name].eps) for name in changed}
        skipped |= dict.fromkeys(layers.keys() - found.keys(), "no sample came in through a call of this module")
        skipped = {name: skipped[name] for name, _ in model.named_modules() if name in skipped}
        if not changes:
            reasons = "; ".join(f"{name or 'the layer'}: {reason}" for name, reason in skipped.items())
            raise ValueError(f"no batch normalization was calibrated ({reasons or 'the model has none'})")
    return Calibration(samples, changes, skipped)


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
        elif type(module).forward not in FORWARDS or "forward" in vars(module):
            skipped[name] = f"is a {type(module).__name__} with a forward of its own: what it normalizes is not known"
        else:
            layers[name] = module
    if any(layer.training for layer in layers.values()):
        frozen = [name for name, layer in layers.items() if not layer.training]
        skipped |= dict.fromkeys(frozen, "is frozen: it evaluates, while others train")
        layers = {name: layer for name, layer in layers.items() if layer.training}
    return layers, skipped


def _statistics(layer: Any) -> tuple[Any, Any]:
    return tuple(
        t.detach().to("cpu", torch.float64, copy=True).numpy() for t in (layer.running_mean, layer.running_var)
    )


def _write(layer: Any, mean: Any, var: Any) -> None:
    with torch.no_grad():
        for running, values in ((layer.running_mean, mean), (layer.running_var, var)):
            running.copy_(torch.from_numpy(np.asarray(values)))


def _finish(name: str, layer: Any, pooled: Moments, unbiased: bool) -> None:
    """Write the statistics of all the data."""
    var = pooled.var * (pooled.count / (pooled.count - 1) if unbiased and pooled.count > 1 else 1.0)
    written = [torch.from_numpy(np.asarray(values)).to(layer.running_mean.dtype) for values in (pooled.mean, var)]
    if not all(bool(values.isfinite().all()) for values in written):
        raise ValueError(
            f"the statistics of what comes into {name or 'the layer'} are not finite in {written[0].dtype}; "
            "nothing has been changed. Look for NaN or infinity in the data, or in the layers before it"
        )
    _write(layer, pooled.mean, var)


@contextmanager
def _undone_on_error(model: nn.Module, layers: Iterable[Any]) -> Iterator[None]:
    """All modules evaluate meanwhile; then their modes are as before, and after an exception the statistics too."""
    modes = [(module, module.training) for module in model.modules()]
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    synchronized = [wrapper.forward_sync_buffers for wrapper in wrappers]
    statistics = [(t, t.detach().clone()) for layer in layers for t in (layer.running_mean, layer.running_var)]
    try:
        for module, _ in modes:
            module.training = False  # not `model.eval()`, which a model may have made do something else
        for wrapper in wrappers:
            wrapper.forward_sync_buffers = False  # a process without data would not take part
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, values in statistics:
                tensor.copy_(values)
        raise
    finally:
        for module, training in modes:
            module.training = training
        for wrapper, value in zip(wrappers, synchronized, strict=True):
            wrapper.forward_sync_buffers = value


_eager = threading.Lock()
_calibrating, _stance = 0, nullcontext()


@contextmanager
def _not_compiled() -> Iterator[None]:
    """Compiled code would not call the hooks. The switch is one for all threads, and thrown back by the last."""
    global _calibrating, _stance
    with _eager:
        if _calibrating == 0:
            used = "torch._dynamo" in sys.modules  # its import takes seconds
            _stance = torch.compiler.set_stance("force_eager") if used else nullcontext()
            _stance.__enter__()
        _calibrating += 1
    try:
        yield
    finally:
        with _eager:
            _calibrating -= 1
            if _calibrating == 0:
                _stance.__exit__(None, None, None)


# --- Passes over the data --------------------------------------------------------------------------------------------

Collect = Callable[[str, Any, Tensor, Tensor | None], None]
"""What is done with a layer's input: its name, the layer, the input, the mask."""

Finish = Callable[[str, Moments], None]
"""What is done with the moments of all that came into a layer."""


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

    def run(self, layers: Layers, collect: Collect, what: str, start: Callable[[], None] = lambda: None) -> int:
        """One pass; `collect` sees what comes into the layers, `start` when a batch begins. Returns the samples."""

        def hook(name: str) -> Callable[..., None]:
            def see(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                layer.training = False  # whatever the model's forward has done
                if name in layers:
                    collect(name, layer, args[0] if args else kwargs["input"], kwargs.get("mask"))

            return see

        handles = [
            layer.register_forward_pre_hook(hook(name), with_kwargs=True)  # the last one: sees what the layer will see
            for name, layer in self.model.named_modules()
            if isinstance(layer, _BatchNorm)
        ]
        samples = 0
        try:
            for batch in watched(self.data, what, self.progress):
                start()
                with torch.no_grad(), _not_compiled():
                    self.forward(self.model, batches.move(batch, self.device))
                size = batches.size(batch)
                samples += 1 if size is None else size
                if self.max_samples is not None and samples >= self.max_samples:
                    break
        finally:
            for handle in handles:
                handle.remove()
        return samples


def _add(found: dict[str, Moments], name: str, batch: Moments) -> None:
    """Merge what came in now with what came in before; nothing does not count as something."""
    if batch.count > 0:
        found[name] = merge_moments(found[name], batch) if name in found else batch


def _in_parallel(passes: _Passes, layers: Layers, pool: Pool, finish: Finish) -> tuple[int, dict[str, Moments]]:
    found: dict[str, Moments] = {}

    def collect(name: str, layer: Any, x: Tensor, mask: Tensor | None) -> None:
        batch = moments(x, mask)
        _add(found, name, batch)
        # The layer evaluates with the statistics of the batch. One value has no variance: it takes those so far.
        seen = found[name] if batch.count == 1 else batch
        if seen.count > 0:
            _write(layer, seen.mean, seen.var if seen.count > 1 else np.ones_like(seen.var))

    with pool.all_or_none():
        samples = passes.run(layers, collect, "calibrating")
        samples, found, _ = pool.merge(samples, found)
    _demand(samples)
    for name, pooled in found.items():
        finish(name, pooled)
    return samples, found


class _Seen:
    """The moments of some layers, and which of them ever run after another one of them."""

    def __init__(self) -> None:
        self.found: dict[str, Moments] = {}
        self.late: set[str] = set()
        self.first = ""

    def start(self) -> None:
        """A batch begins."""
        self.first = ""

    def collect(self, name: str, layer: Any, x: Tensor, mask: Tensor | None) -> None:
        """See what comes into a layer."""
        self.first = self.first or name or "."  # the name of the whole model is empty
        if (name or ".") != self.first:
            self.late.add(name)
        _add(self.found, name, moments(x, mask))


def _in_sequence(passes: _Passes, layers: Layers, pool: Pool, finish: Finish) -> tuple[int, dict[str, Moments]]:
    """In each pass those layers are done before which, in every batch, only layers that were done have run."""
    done: dict[str, Moments] = {}
    samples = 0
    while len(done) < len(layers):
        left = {name: layer for name, layer in layers.items() if name not in done}
        seen = _Seen()
        with pool.all_or_none():
            what = f"calibrating, {len(done)} of {len(layers)} layers done"
            samples = passes.run(left, seen.collect, what, seen.start)
            samples, found, late = pool.merge(samples, seen.found, seen.late)
        _demand(samples)
        ready = {name: pooled for name, pooled in found.items() if name not in late} or dict(list(found.items())[:1])
        for name, pooled in ready.items():
            finish(name, pooled)
        if not ready:
            break
        done |= ready
    return samples, done


def _demand(samples: int) -> None:
    if samples == 0:
        raise ValueError("there is nothing to calibrate with: the data gave no samples")
