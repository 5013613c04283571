"""Record the batch normalizations of a model while it trains.

```
with watch(model, every=10, to="statistics.csv") as seen:
    for x, y in loader:
        ...                      # the usual training step
print(seen)                      # the last step in one line; `seen.records` has the most recent records
```
"""

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.torch.adapters import eps_of
from batchnorm.torch.survey import keeps_statistics, survey
from batchnorm.whole.evidence import gap
from batchnorm.whole.recording import Record, Recorder, Sink

__all__ = ["Record", "watch"]

PARTS = ("batch_mean", "batch_var", "running_mean", "running_var")
"""What `gap` compares, in its order."""


class watch(Recorder):
    """A context manager that records each batch normalization of a model, step by step.

    A step is a call of the model in training mode. It is recorded when the next step begins, or at the end, so that its
    gradients are known. Steps that are not recorded cost one counter. The model does not change, but it has hooks while
    it is watched, and a compiled model is compiled again because of them.

    Args:
        model: Any module with PyTorch's layers or ours.
        every: Record one step in `every`, beginning with the first.
        to: Where the records go in addition to `records`: a `.csv` file, which is replaced when it is first opened; a
            folder, for TensorBoard; a writer with `add_scalar`; or a function that is called with each `Record`.
        keep: The number of records to keep in memory. Each step gives one record per layer.
        live: Whether to show a line on stderr, if that is a terminal and rich is installed.

    Attributes:
        records: The most recent records.
        steps: The number of training steps so far.

    Raises:
        ValueError: If the model has no batch normalization, or `every` or `keep` is not positive.
        InputError: If the file cannot be written, or TensorBoard is not installed.
        TypeError: If `to` is none of these.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 1,
        *,
        to: Sink | None = None,
        keep: int = 10_000,
        live: bool = True,
    ) -> None:
        super().__init__(to, keep, live)
        if every < 1:
            raise ValueError(f"every must be positive, got {every}")
        self.model, self.every = model, every
        self.layers: dict[str, Any] = {name: layer for name, layer, *_ in survey(model)}
        if not self.layers:
            raise ValueError("model has no batch normalization, so there is nothing to watch")
        self._step: _Step | None = None
        self._hook: Any = None

    def __enter__(self) -> "watch":
        self.open()
        self._hook = self.model.register_forward_pre_hook(self._begin)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hook.remove()
        try:
            if kind is None:
                self._end()
            elif self._step is not None:
                self._step.remove()
        finally:
            self._step = None
            self.close()
        if kind is None and self.steps == 0:
            warnings.warn(
                "watch saw no training step: the model was never called in training mode; watch the module that you "
                "call",
                stacklevel=2,
            )

    def _begin(self, model: nn.Module, args: Any) -> None:
        if not model.training:
            return
        self._end()
        self.steps += 1
        if (self.steps - 1) % self.every == 0:
            self._step = _Step(self.layers)

    def _end(self) -> None:
        step, self._step = self._step, None
        if step is not None:
            step.remove()
            self.add(step.records(self.steps))


class _Step:
    """One recorded step. Nothing waits for the device before `records` is called."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self.layers = layers
        self.found: dict[str, dict[str, Any]] = {}
        self.handles: list[Any] = []
        for name, layer in layers.items():
            self.handles.append(layer.register_forward_hook(self._watch(name), with_kwargs=True))

    def remove(self) -> None:
        """Remove all hooks."""
        while self.handles:
            self.handles.pop().remove()

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any], y: Any) -> None:
            # Only the first call counts: a checkpoint repeats calls in the backward pass, and a layer may be reused.
            given = args[0] if args else kwargs.get("input")
            if name in self.found or not isinstance(given, Tensor) or not isinstance(y, Tensor) or not layer.training:
                return
            found = self.found[name] = {}
            with torch.no_grad():
                x = given.detach()
                if x.numel():
                    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
                    axes = [axis for axis in range(x.dim()) if axis != 1]
                    found["batch"] = torch.stack(_mean_and_var(x, axes))
                    found["dead"] = (y.detach().amax(axes) <= 0).float().mean()
            for key, tensor in (("grad_in", given), ("grad_out", y)):
                if tensor.requires_grad:
                    self.handles.append(tensor.register_hook(self._keep(found, key)))

        return hook

    @staticmethod
    def _keep(found: dict[str, Any], key: str) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            with torch.no_grad():
                found[key] = torch.linalg.vector_norm(grad.detach().float())

        return hook

    def records(self, step: int) -> list[Record]:
        """A record of each layer that was called."""
        records = []
        for name, found in self.found.items():
            layer = self.layers[name]
            known: dict[str, Any] = dict(zip(PARTS, found.get("batch", ()), strict=False))
            if keeps_statistics(layer):
                known |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
            arrays = {part: tensor.detach().cpu().double().numpy() for part, tensor in known.items()}
            mean, var, running_mean, running_var = (arrays.get(part) for part in PARTS)
            distance = None
            if mean is not None and var is not None and running_mean is not None and running_var is not None:
                distance = gap(mean, var, running_mean, running_var, eps_of(layer))
            with np.errstate(all="ignore"):  # the mean of inf and -inf is NaN without a word
                numbers: dict[str, Any] = {part: float(array.mean()) for part, array in arrays.items()}
            numbers |= {key: float(found[key]) for key in ("grad_out", "grad_in", "dead") if key in found}
            skipped = int(getattr(layer, "num_batches_skipped", 0))
            records.append(Record(step, name, gap=distance, skipped=skipped, **numbers))
        return records


def _mean_and_var(x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """The mean and the biased variance of each channel.

    PyTorch has them as a part of its batch normalization, which on a CPU takes a third to a twentieth of the time of
    `var_mean` over the same axes.
    """
    if x.device.type in ("cpu", "cuda"):
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        return mean, var
    var, mean = torch.var_mean(x, axes, correction=0)
    return mean, var
