"""Find out why a model with batch normalization misbehaves, without changing it.

```
print(diagnose(model))                                       # checks of the state alone
print(diagnose(model, loader, optimizer=optimizer))          # checks of the state and of the data
```
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, IterableDataset

from batchnorm.torch import batches
from batchnorm.torch.adapters import eps_of
from batchnorm.torch.eager import not_compiled
from batchnorm.torch.observer import Surroundings, moments_of, watch_calls
from batchnorm.torch.sources import BatchStatistics, Statistics
from batchnorm.torch.survey import expect_module, is_frozen, is_unsized, keeps_statistics, survey
from batchnorm.torch.tracing import leaves
from batchnorm.torch.untouched import random_states_kept, untouched
from batchnorm.whole import diagnosis as whole
from batchnorm.whole.evidence import Evidence, Layer, Producer, State
from batchnorm.whole.findings import Finding
from batchnorm.whole.remedies import Data, PyTorch
from batchnorm.whole.report import Report

__all__ = ["Finding", "Report", "diagnose"]


def diagnose(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    max_batches: int | None = 64,
) -> Report:
    """Find what is wrong with the batch normalizations of a model, and say how to fix it.

    The model does not change, even if it raises an exception: statistics, modes, hooks, gradients and random states
    stay as they are. Each batch runs three times without gradients: in training, in training with dropout and the like
    off, and in evaluation. A model in evaluation is examined as `model.train()` would leave it. If there is an
    activation checkpoint, one batch also runs backward.

    Args:
        model: Any module with PyTorch's layers, ours, or subclasses of them.
        data: Batches of the size used in training, in a form that `calibrate` accepts; None checks the state alone.
        optimizer: The optimizer, whose weight decay is checked.
        forward: `forward(model, batch)`, called in place of the rules of `calibrate`; its result is compared between
            training and evaluation.
        max_batches: The largest number of batches to read; None reads all. The report says if there were more.

    Returns:
        The report: print it, go through `findings`, or call `to_json` and `to_html`.

    Raises:
        ValueError: If the model has no batch normalization, or the data have no batches.
        RuntimeError: If a lazy layer has not seen its first batch.
        TypeError: If an argument is of another type, `data` is one batch, or it is not clear how to call the model.
    """
    expect_module(model)
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    with random_states_kept():
        return whole.diagnose(_Model(model, data, optimizer, forward or batches.call), data, max_batches)


class _Model:
    """A PyTorch model, as `whole.diagnose` sees it: a `whole.Model`."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        optimizer: torch.optim.Optimizer | None,
        forward: Callable[[nn.Module, Any], object],
    ) -> None:
        self.outer, self.forward, self.optimizer = model, forward, optimizer
        # DistributedDataParallel would wait for a backward pass that never comes.
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        tensors = (*model.parameters(), *model.buffers())
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.remedies = PyTorch(Data(_kind(data)))
        self.layers: dict[str, Any] = {}
        self.is_known = False
        self.is_training = True

    def find(self) -> Mapping[str, Layer]:
        found = survey(self.outer)
        self.layers = {name: layer for name, layer, *_ in found}
        lazy = [name for name, layer in self.layers.items() if is_unsized(layer)]
        lazy += [name for name, tensor in self.outer.named_parameters() if is_lazy(tensor)]
        if lazy:
            raise RuntimeError(
                f"{lazy[0] or 'the layer'} does not know its size yet: call the model on one batch first"
            )
        self.is_training = any(layer.training for layer in self.layers.values())
        decays = self._decays()
        with untouched(self.model):
            self._train()
            return {
                name: Layer(_state(name, layer), decay=decays.get(name, 0.0)) for name, layer in self.layers.items()
            }

    def _decays(self) -> dict[str, float]:
        """The largest weight decay of each layer's weight and bias."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        decay = {id(p): float(group.get("weight_decay", 0.0)) for group in groups for p in group["params"]}
        return {
            name: max((decay.get(id(p), 0.0) for p in layer.parameters(recurse=False) if p.requires_grad), default=0.0)
            for name, layer in self.layers.items()
        }

    def _train(self) -> None:
        """Put the model in training mode, unless it already trains in modes of its own."""
        if not self.is_training:
            self.model.train()

    def size(self, batch: Any) -> int | None:
        return batches.size(batch)

    def run(self, batch: Any, evidence: Evidence) -> None:
        evidence.is_training = self.is_training
        evidence.processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        batch = batches.move(batch, self.device)
        with torch.no_grad(), not_compiled(), _quiet(), _explained(batch):
            if not self.is_known:
                self._look_around(batch, evidence)
            self._pass(batch, evidence, "trained")
            trained = self._pass(batch, evidence, "quiet")
            evaluated = self._pass(batch, evidence, "evaluated")
        for path, y in evaluated.items():
            if path in trained:
                evidence.outputs.add(*(t.detach().double().cpu().numpy() for t in (trained[path], y)))

    def _pass(self, batch: Any, evidence: Evidence, mode: str) -> dict[str, Tensor]:
        """Call the model in one of the three ways, and return its outputs."""
        calls: dict[str, int] = {}
        order = len([layer for layer in evidence.layers.values() if layer.order is not None])

        def comes(name: str, module: Any, x: Tensor, mask: Tensor | None) -> None:
            nonlocal order
            layer, number = evidence.layers[name], calls.get(name, 0)
            calls[name] = number + 1
            if layer.order is None:
                layer.order, order = order, order + 1
            seen = moments_of(x, mask)  # in evaluation, too: padding is padding in both modes
            layer.add(mode, number, seen)

        def leaves_layer(name: str, y: Any) -> None:
            if isinstance(y, Tensor) and y.numel():
                highest = y.detach().transpose(0, 1).flatten(1).amax(1).double().cpu().numpy()
                before = evidence.layers[name].highest
                evidence.layers[name].highest = highest if before is None else np.maximum(before, highest)

        with untouched(self.model), watch_calls(self.layers, comes, leaves_layer if mode == "trained" else None):
            self._train()
            if mode != "trained":
                for module in self.model.modules():
                    if mode == "evaluated" or not isinstance(module, _BatchNorm):
                        module.training = False
            outputs = self.forward(self.model, batch)
        return {path: y for path, y in leaves(outputs, Tensor) if y.is_floating_point()}

    # --- What is around the layers ------------------------------------------------------------------------------------

    def _look_around(self, batch: Any, evidence: Evidence) -> None:
        self.is_known = True
        with untouched(self.model):
            self._train()
            with Surroundings(self.model, self.layers) as around:
                self.forward(self.model, batch)
        prefix = "module." if self.model is not self.outer else ""
        for name, layer in evidence.layers.items():
            layer.is_rectified = name in around.rectified
            layer.dropouts = tuple(prefix + dropout for dropout in around.dropouts.get(name, ()))
            if name in around.producers:
                producer = self.model.get_submodule(around.producers[name])
                bias: Any = producer.bias
                values = None if bias is None else bias.detach().double().cpu().numpy()
                at = prefix + around.producers[name]
                layer.producer = Producer(at, _at(at), values)
        if around.checkpointed:
            for name, counted in self._step(batch).items():
                evidence.layers[name].counted = counted

    def _step(self, batch: Any) -> dict[str, tuple[int, int]]:
        """How often each layer counts the batch in a forward pass alone, and in a forward and a backward pass.

        Gradients go to stand-ins for the parameters, which share their memory.
        """
        before: dict[str, Any] = {}
        counted: dict[str, list[int]] = {name: [] for name in self.layers}
        forward, layers = self.forward, self.layers

        class Step(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self, batch: Any) -> None:
                outputs = forward(self.model, batch)
                count()
                summed = [y.sum() for _, y in leaves(outputs, Tensor) if y.requires_grad]
                if summed:
                    torch.autograd.backward(summed)
                count()

        def count() -> None:
            for name, layer in layers.items():
                if _tracked(layer) is not None:
                    counted[name].append(int(_tracked(layer)) - before[name])

        with untouched(self.model), torch.enable_grad():
            self._train()
            before |= {name: int(_tracked(layer)) for name, layer in layers.items() if _tracked(layer) is not None}
            stand_ins: dict[str, Any] = {
                f"model.{name}": parameter.detach().requires_grad_(parameter.requires_grad)
                for name, parameter in self.model.named_parameters()
            }
            torch.func.functional_call(Step(self.model), stand_ins, (batch,))
        return {name: (numbers[0], numbers[1]) for name, numbers in counted.items() if numbers}


def _at(name: str) -> str:
    """A module as an expression of Python."""
    return f"model.get_submodule({name!r})" if name else "model"


def _tracked(layer: Any) -> Any:
    """The number of batches that the layer has counted; None for classes that are always frozen."""
    return getattr(layer, "num_batches_tracked", None)


def _state(name: str, layer: Any) -> State:
    """The state of a layer in its current mode."""

    def array(tensor: Any) -> Any:
        return None if tensor is None else tensor.detach().to("cpu", torch.float64, copy=True).numpy()

    given = getattr(layer, "statistics", None)  # of a layer that is not ours it may be anything
    source = given if isinstance(given, Statistics) else BatchStatistics()
    keeps = keeps_statistics(layer)
    learns = [p.requires_grad for p in (layer.weight, layer.bias) if p is not None]
    return State(
        name,
        _at(name),
        type(layer).__name__,
        getattr(layer, "num_features", None) or len(layer.running_mean),
        array(layer.running_mean) if keeps else None,
        array(layer.running_var) if keeps else None,
        array(layer.weight),
        array(layer.bias),
        eps_of(layer),
        getattr(layer, "momentum", 0.0),
        None if _tracked(layer) is None else int(_tracked(layer)),
        int(getattr(layer, "num_batches_skipped", 0)),
        torch.finfo(torch.float32 if layer.weight is None else layer.weight.dtype).eps,
        trains=layer.training or not keeps,
        is_frozen=is_frozen(layer),
        learns=any(learns) if learns else None,
        group=source.group_size,
        is_corrected=source.limits is not None,
        is_synchronized=isinstance(layer, nn.SyncBatchNorm) or source.is_synchronized,
    )


def _kind(data: Any) -> str:
    """How the data are stored: see `Data`."""
    if isinstance(data, DataLoader):
        known = data.batch_size is not None and not isinstance(data.dataset, IterableDataset)
        return "loader" if known else ""
    if not isinstance(data, list | tuple) or not data:
        return ""
    if all(isinstance(batch, Tensor) for batch in data):
        return "tensors"
    pairs = all(isinstance(batch, list | tuple) and all(isinstance(p, Tensor) for p in batch) for batch in data)
    return "tensor pairs" if pairs else ""


@contextmanager
def _explained(batch: Any) -> Iterator[None]:
    """Add the shapes of the batch to the model's errors, in one sentence."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if type(error) not in (RuntimeError, ValueError):
            raise
        shapes = ", ".join(str(tuple(t.shape)) for _, t in leaves(batch, Tensor)) or "no tensors"
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise type(error)(f"the model fails on a batch of data of shape {shapes}: {said}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warning that a checkpoint gives if there are no gradients."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        yield
