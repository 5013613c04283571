"""Calibration: moving statistics that are exactly those of the data, for a model about to be used.

```
calibrate(model, dataset)                          # one pass
calibrate(model, dataset, method="sequential")     # one pass per layer: training and evaluation agree exactly
```
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from batchnorm.definition import Moments, moments
from batchnorm.keras import batches
from batchnorm.keras.eager import eagerly, layer_input
from batchnorm.keras.layers import BatchNormalization, KerasBatchNormalization
from batchnorm.keras.models import normalizations, refuse, to_float64
from batchnorm.whole import calibrate as whole
from batchnorm.whole.calibrate import Calibration, Method

__all__ = ["Calibration", "calibrate"]

KNOWN = (KerasBatchNormalization.call, BatchNormalization.call)
"""The calls that normalize their input itself."""


def calibrate(
    model: Any,
    data: Iterable[Any],
    *,
    method: Method = "parallel",
    forward: Callable[[Any, Any], object] | None = None,
    max_samples: int | None = None,
    unbiased: bool = False,
    progress: bool = True,
) -> Calibration:
    """Set the moving statistics of all batch normalizations to the statistics of the data.

    For each layer and channel, over all `n` input values: `moving_mean = sum(x)/n`, `moving_variance = sum((x -
    mean)^2)/n`. Batches are merged by their counts, including the variance between them, so the result does not depend,
    up to rounding, on how the inputs of a layer are split. The model runs uncompiled and in evaluation, with dropout
    off.

    Nothing else changes: other weights, the statistics towards which renormalization corrects, `trainable`, and frozen
    layers stay as they are. A layer is frozen if `freeze` has frozen it, or if it is not trainable while other batch
    normalizations of the model are. After an exception everything is as before.

    On PyTorch all processes of `torch.distributed`, if it is initialized, pool their statistics, and each must call.

    Args:
        model: A built model with Keras' layers or ours.
        data: Batches in a form that `fit` accepts, of which only the inputs are used: tensors or arrays, tuples or
            lists of inputs, targets and weights, mappings from names to inputs. `data` may be a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a `DataLoader` or a list; "sequential" reads it several times.
        method: "parallel": one pass. Each layer normalizes by the statistics of the current batch, so a layer's inputs
            depend on how the data are split. "sequential": one pass per layer; the layers before it already evaluate
            with their new statistics. The result is exact at any depth.
        forward: `forward(model, batch)`, called instead of `model(inputs, training=False)`.
        max_samples: Stop after the batch that reaches this number of samples; None reads all.
        unbiased: Whether the moving variance is the unbiased one. Keras' layers keep the biased one.
        progress: Whether to show a progress bar, if stderr is a terminal and rich is installed.

    Returns:
        What was done. Layers that no sample reached are among the skipped.

    Raises:
        ValueError: If there are no data, or they reach no layer; if statistics are not finite; if `method` or
            `max_samples` is invalid; if the data can be read only once and `method` is "sequential"; if a layer is
            called inside a function that is compiled on its own.
        RuntimeError: If a layer has not seen its first batch; if another process fails or has other layers.
        TypeError: If `model` is not a model; if `data` is one batch, or a batch has more parts than inputs, targets and
            weights.

    Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3; Chan et al. 1983 for the merging.
    """
    refuse(model)
    return whole.calibrate(
        _Model(model, forward or _call),
        batches.Indexed(data) if isinstance(data, keras.utils.PyDataset) else data,
        method=method,
        max_samples=max_samples,
        unbiased=unbiased,
        processes=_processes(),
        progress=progress,
    )


class _Model:
    """A Keras model, as `whole.calibrate` sees it: a `whole.Model`."""

    def __init__(self, model: Any, forward: Callable[[Any, Any], object]) -> None:
        self.model, self.forward = model, forward
        self.layers: dict[str, Any] = {}

    def find(self) -> Mapping[str, whole.Layer | str]:
        found: dict[str, whole.Layer | str] = {}
        for name, layer in normalizations(self.model).items():
            if not layer.built and self.model.built:
                found[name] = "nothing has called it, so it has no statistics"
                continue
            if not layer.built:
                raise RuntimeError(
                    f"{name or 'the layer'} does not know its size yet: call the model on one batch first"
                )
            if getattr(layer, "frozen", None) is not None:
                found[name] = "is frozen"
            elif type(layer).call not in KNOWN:
                found[name] = f"has a call of its own, {type(layer).__name__}.call: what it normalizes is not known"
            elif "call" in vars(layer):
                found[name] = "has had its call replaced: what it normalizes is not known"
            else:
                self.layers[name] = layer
                found[name] = whole.Layer(layer.moving_mean.shape[0], layer.epsilon, str(layer.moving_mean.dtype))
        if any(layer.trainable for layer in self.layers.values()):
            constant = [name for name, layer in self.layers.items() if not layer.trainable]
            found |= dict.fromkeys(constant, "is frozen: it is not trainable, while others are")
        return found

    def run(self, batch: Any, names: Collection[str], see: whole.See) -> None:
        layers = {name: layer for name, layer in normalizations(self.model).items() if "call" not in vars(layer)}
        try:
            for name, layer in layers.items():
                object.__setattr__(layer, "call", _watch(name, layer, see if name in names else None))
            with eagerly():
                self.forward(self.model, batch)
        finally:
            for layer in layers.values():
                vars(layer).pop("call", None)

    def size(self, batch: Any) -> int | None:
        return batches.size(batch)

    def read(self, name: str) -> whole.Statistics:
        layer = self.layers[name]
        return to_float64(layer.moving_mean), to_float64(layer.moving_variance)

    def write(self, name: str, mean: Any, var: Any) -> None:
        _write(self.layers[name], mean, var)

    def keep(self, name: str) -> Callable[[], None]:
        layer = self.layers[name]
        variables = [layer.moving_mean, layer.moving_variance, *([layer.moving_stddev] if layer.renorm else [])]
        kept = [(variable, ops.copy(variable)) for variable in variables]

        def put_back() -> None:
            for variable, values in kept:
                variable.assign(values)

        return put_back


def _write(layer: Any, mean: Any, var: Any) -> None:
    layer.moving_mean.assign(mean)
    layer.moving_variance.assign(var)
    if layer.renorm:
        layer.moving_stddev.assign(np.sqrt(var + layer.epsilon))  # Keras computes the variance from this


def _processes() -> whole.Processes:
    """The processes that calibrate together."""
    if keras.backend.backend() != "torch":
        return whole.Alone()
    from batchnorm.torch.pool import Pool

    return Pool()


def _call(model: Any, batch: Any) -> Any:
    return model(batches.inputs(batch), training=False)


def _watch(name: str, layer: Any, see: whole.See | None) -> Callable[..., Any]:
    """A replacement for a layer's call, which always evaluates."""
    call = layer.call

    def watched(inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if see is not None:
            statistics = see(name, _moments(inputs, mask, layer.axis, name))
            if statistics is not None:
                _write(layer, *statistics)
        return call(inputs, training=False, mask=mask)

    return watched


def _moments(x: Any, mask: Any, axis: int, name: str) -> Moments | str:
    """The moments of an input; or the reason why they cannot be taken."""
    seen = layer_input(x, mask, axis, name)
    return seen if isinstance(seen, str) else moments(*seen)
