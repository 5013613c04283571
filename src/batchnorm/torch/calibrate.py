"""Calibration: running statistics that are exactly those of the data, for a model about to be used.

```
calibrate(model, loader)                          # one pass
calibrate(model, loader, method="sequential")     # one pass per layer: training and evaluation agree exactly
```
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.torch import batches
from batchnorm.torch.adapters import eps_of, is_batch_norm
from batchnorm.torch.eager import not_compiled
from batchnorm.torch.functional import moments
from batchnorm.torch.pool import Pool
from batchnorm.torch.survey import expect_module, is_frozen, is_unsized, keeps_statistics, survey
from batchnorm.whole import calibrate as whole
from batchnorm.whole.calibrate import Calibration, Method

__all__ = ["Calibration", "calibrate"]


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

    For each layer and channel, over all `n` input values: `running_mean = mean`, `running_var = var * n/(n-1)`. Batches
    are merged by their counts, including the variance between them, so the result does not depend, up to rounding, on
    how the inputs of a layer are split.

    Nothing else changes. The model runs in evaluation, with dropout off, and gets its modes back. Parameters, frozen
    layers and `num_batches_tracked` stay as they are. A layer is frozen if it has `RunningStatistics()`, or if it
    evaluates while other batch normalizations of the model train. After an exception everything is as before.

    Args:
        model: A model with PyTorch's layers or ours.
        data: Batches: tensors, tuples, lists, mappings, named tuples or dataclasses. From a sequence, the model gets as
            many items as its forward requires: labels are left out, but so are optional masks (use names or `forward`
            for these). From named items, the model gets those that are its arguments. Tensors are moved to the model's
            device. `data` may be a `DataLoader` or a list; "sequential" reads it several times.
        method: "parallel": one pass. Each layer normalizes by the statistics of the current batch, so a layer's inputs
            depend on how the data are split. "sequential": one pass per layer; the layers before it already evaluate
            with their new statistics. The result is exact at any depth: in evaluation, the inputs of each layer have
            its running statistics (unless a layer's input depends on its own earlier output). Each pass sees the same
            data only if the loader neither shuffles an incomplete epoch nor augments at random.
        forward: `forward(model, batch)`, called instead of the rules above.
        max_samples: Stop after the batch that reaches this number of samples, in each process; None reads all. The
            samples of a batch are counted by its first tensor, or by a list of tensors if the first layer sees as many.
        unbiased: Whether the running variance is the unbiased one, as in training. Layers normalize by the biased one
            in training, so False makes evaluation agree with training, which matters if a channel has few values.
        process_group: The processes that pool their statistics; None means all, if `torch.distributed` is initialized.
            Every process of the group must call; a process may have no data.
        progress: Whether to show a progress bar, if stderr is a terminal and rich is installed.

    Returns:
        What was done. Layers that no sample reached are among the skipped.

    Raises:
        ValueError: If there are no data, or they reach no layer; if statistics are not finite; if `method` or
            `max_samples` is invalid; if the data can be read only once and `method` is "sequential".
        RuntimeError: If another process of the group failed; if a lazy layer has not seen its first batch.
        TypeError: If `model` is not a module; if `data` is one batch, or not iterable; if it is not clear how to call
            the model.

    Differs from `torch.optim.swa_utils.update_bn`:
        1. The statistics are pooled. An average over batches counts a short last batch as a full one, and leaves out
           the variance between batches.
        2. Batches may have any structure, a last batch may have one sample, and masks and processes are respected.
        3. Dropout is off; frozen layers and momenta stay as they are, even after exceptions.

    Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3; Chan et al. 1983 for the merging.
    """
    expect_module(model)
    return whole.calibrate(
        _Model(model, forward or batches.call),
        data,
        method=method,
        max_samples=max_samples,
        unbiased=unbiased,
        processes=Pool(process_group),
        progress=progress,
    )


class _Model:
    """A PyTorch model, as `whole.calibrate` sees it: a `whole.Model`."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Any], object]) -> None:
        self.model, self.forward = model, forward
        tensors = (*model.parameters(), *model.buffers())
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.layers: dict[str, Any] = {}
        self.first, self.seen = "", list[int]()  # the first layer that runs, and the lengths of its inputs

    def find(self) -> Mapping[str, whole.Layer | str]:
        found: dict[str, whole.Layer | str] = {}
        for name, layer, _, reason in survey(self.model):
            if is_unsized(layer):
                raise RuntimeError(
                    f"{name or 'the layer'} does not know its size yet: call the model on one batch first"
                )
            if not keeps_statistics(layer):
                found[name] = "keeps no running statistics"
            elif is_frozen(layer):
                found[name] = "is frozen"
            elif reason:
                found[name] = f"{reason}: what it normalizes is not known"
            else:
                self.layers[name] = layer
                found[name] = whole.Layer(len(layer.running_mean), eps_of(layer), str(layer.running_mean.dtype))
        if any(layer.training for layer in self.layers.values()):
            evaluating = [name for name, layer in self.layers.items() if not layer.training]
            found |= dict.fromkeys(evaluating, "is frozen: it evaluates, while others train")
        return found

    def run(self, batch: Any, names: Collection[str], see: whole.See) -> None:
        def watch(name: str) -> Callable[..., None]:
            def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                layer.training = False  # even if the model's forward has changed it
                x = args[0] if args else kwargs.get("input", next(iter(kwargs.values())))
                if not self.seen:
                    self.first = name
                if name == self.first:
                    self.seen.append(len(x))
                if name in names:
                    statistics = see(name, moments(x, kwargs.get("mask")))
                    if statistics is not None:  # `layer` may be a replica on another device
                        _write(layer, *statistics)

            return hook

        self.seen = []
        with ExitStack() as stack:
            stack.enter_context(_evaluating(self.model))
            for name, layer in self.model.named_modules():
                if is_batch_norm(layer):
                    # As the last hook, it sees what the layer will see.
                    stack.callback(layer.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(not_compiled())
            self.forward(self.model, batches.move(batch, self.device))

    def size(self, batch: Any) -> int | None:
        return batches.size(batch, self.seen)

    def read(self, name: str) -> whole.Statistics:
        mean, var = (t.detach().to("cpu", torch.float64, copy=True).numpy() for t in _running(self.layers[name]))
        return mean, var

    def write(self, name: str, mean: Any, var: Any) -> None:
        _write(self.layers[name], mean, var)

    def keep(self, name: str) -> Callable[[], None]:
        kept = [(tensor, tensor.detach().clone()) for tensor in _running(self.layers[name])]

        def put_back() -> None:
            with torch.no_grad():
                for tensor, values in kept:
                    tensor.copy_(values)

        return put_back


def _running(layer: Any) -> tuple[Any, Any]:
    return layer.running_mean, layer.running_var


def _write(layer: Any, mean: Any, var: Any) -> None:
    with torch.no_grad():
        for running, values in zip(_running(layer), (mean, var), strict=True):
            running.copy_(torch.from_numpy(np.asarray(values)))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """All modules evaluate; then their modes are as before."""
    modes = [(module, module.training) for module in model.modules()]
    wrappers = [module for module, _ in modes if isinstance(module, DistributedDataParallel)]
    synchronized = [wrapper.forward_sync_buffers for wrapper in wrappers]
    try:
        for module, _ in modes:
            module.training = False  # not `model.eval()`, which a model may override
        for wrapper in wrappers:
            wrapper.forward_sync_buffers = False  # a process without data would not take part
        yield
    finally:
        for module, training in modes:
            module.training = training
        for wrapper, value in zip(wrappers, synchronized, strict=True):
            wrapper.forward_sync_buffers = value
