"""Calibration: running statistics that are exactly those of the data, for a model about to be used.

```
calibrate(model, batches)                          # one pass
calibrate(model, batches, method="sequential")     # one pass per layer: training and evaluation agree exactly
```
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from batchnorm.definition import Moments, moments
from batchnorm.jax import batches
from batchnorm.jax.layers import BatchNorm, source
from batchnorm.jax.modules import evaluating, named_modules, refuse, to_float64, watched
from batchnorm.whole import calibrate as whole
from batchnorm.whole.calibrate import Calibration, Method

__all__ = ["Calibration", "calibrate"]


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
    """Set the running statistics of all batch normalizations to the statistics of the data.

    For each layer and channel, over all `n` input values: `mean = sum(x)/n`, `var = sum((x - mean)^2)/n`. Batches are
    merged by their counts, including the variance between them, so the result does not depend, up to rounding, on how
    the inputs of a layer are split. The model runs uncompiled and in evaluation, with dropout off.

    Nothing else changes, and frozen layers stay as they are. A layer is frozen if it has `RunningStatistics()`, or if
    it evaluates while other batch normalizations of the model train. After an exception everything is as before.

    Args:
        model: A module with Flax's layers or ours.
        data: Batches: arrays, tuples or lists that begin with the inputs, or mappings with `forward`. "sequential"
            reads them several times.
        method: "parallel": one pass. Each layer normalizes by the statistics of the current batch, so a layer's inputs
            depend on how the data are split. "sequential": one pass per layer; the layers before it already evaluate
            with their new statistics.
        forward: `forward(model, batch)`, called instead of `model(inputs)`.
        max_samples: Stop after the batch that reaches this number of samples; None reads all.
        unbiased: Whether the running variance is the unbiased one. Flax's layers keep the biased one.
        progress: Whether to show a progress bar, if stderr is a terminal and rich is installed.

    Returns:
        What was done. Layers that no sample reached are among the skipped.

    Raises:
        ValueError: If there are no data, or they reach no layer; if statistics are not finite; if `method` or
            `max_samples` is invalid; if the data can be read only once and `method` is "sequential"; if a layer is
            called inside a function that is compiled on its own.
        TypeError: If `model` is not a module; if `data` is one batch.

    Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3; Chan et al. 1983 for the merging.
    """
    refuse(model)
    return whole.calibrate(
        _Model(model, forward or batches.call), data, method=method, max_samples=max_samples, unbiased=unbiased,
        processes=whole.Alone(), progress=progress,
    )  # fmt: skip


class _Model:
    """A model of Flax, as `whole.calibrate` sees it: a `whole.Model`."""

    def __init__(self, model: Any, forward: Callable[[Any, Any], object]) -> None:
        self.model, self.forward = model, forward
        self.layers: dict[str, Any] = {}

    def find(self) -> Mapping[str, whole.Layer | str]:
        found: dict[str, whole.Layer | str] = {}
        layers = {name: m for name, m in named_modules(self.model).items() if isinstance(m, nnx.BatchNorm)}
        trains = any(not layer.use_running_average for layer in layers.values())
        for name, layer in layers.items():
            if type(layer) not in (nnx.BatchNorm, BatchNorm):
                found[name] = f"has a call of its own, {type(layer).__name__}.__call__: what it normalizes is not known"
            elif source(layer).is_constant:
                found[name] = "is frozen"
            elif trains and layer.use_running_average:
                found[name] = "is frozen: it evaluates, while others train"
            else:
                self.layers[name] = layer
                found[name] = whole.Layer(layer.num_features, layer.epsilon, str(layer.mean[...].dtype))
        return found

    def run(self, batch: Any, names: Collection[str], see: whole.See) -> None:
        def watch(name: str, layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
            def normalize(x: Any, use_running_average: Any = None, *, mask: Any = None, **more: Any) -> Any:
                if name in names:
                    statistics = see(name, _moments(x, mask, layer.axis, name))
                    if statistics is not None:
                        self.write(name, *statistics)
                return call(x, True, mask=mask, **more)

            return normalize

        with evaluating(self.model), watched(self.layers, watch):
            self.forward(self.model, batch)

    def size(self, batch: Any) -> int | None:
        return batches.size(batch)

    def read(self, name: str) -> whole.Statistics:
        layer = self.layers[name]
        return to_float64(layer.mean), to_float64(layer.var)

    def write(self, name: str, mean: Any, var: Any) -> None:
        layer = self.layers[name]
        for variable, values in (layer.mean, mean), (layer.var, var):
            variable[...] = jnp.asarray(values, variable[...].dtype)

    def keep(self, name: str) -> Callable[[], None]:
        layer = self.layers[name]
        kept = layer.mean[...], layer.var[...]

        def put_back() -> None:
            layer.mean[...], layer.var[...] = kept

        return put_back


def _moments(x: Any, mask: Any, axis: int, name: str) -> Moments | str:
    """The moments of an input; or the reason why they cannot be taken."""
    seen = batches.layer_input(x, mask, axis, name)
    return seen if isinstance(seen, str) else moments(*seen)
