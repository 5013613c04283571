"""Moving statistics that are those of the data: exact, pooled over all of it, before a model is shipped.

```
calibrate(model, dataset)                          # one pass
calibrate(model, dataset, method="sequential")     # one pass for each layer: training and evaluation agree exactly
```
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from batchnorm.calibration import Calibration, change, watched
from batchnorm.definition import Moments, merge_moments, moments
from batchnorm.keras.functional import expand_mask
from batchnorm.keras.layers import BatchNormalization
from batchnorm.keras.models import named_layers, numbers, refuse

__all__ = ["Calibration", "calibrate"]

Method = Literal["parallel", "sequential"]
METHODS: tuple[Method, ...] = ("parallel", "sequential")
COMPILED = ("TracerArrayConversionError", "NotImplementedError", "OperatorNotAllowedInGraphError")
"""The errors, of JAX and TensorFlow, of a tensor that is none yet."""

KNOWN = (keras.layers.BatchNormalization.call, BatchNormalization.call)
"""The calls that normalize just what they are given."""


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

    For each layer and channel, over all `n` values that come in: `moving_mean = mean`, `moving_variance = var`. Batches
    are merged by their counts, with the variance between them: however the same inputs of a layer are split, the result
    is the same, to rounding. The model is called step by step, not compiled, and evaluates: dropout is off.

    Nothing else changes: other weights, the statistics that renormalization corrects towards, `trainable`, and layers
    that are frozen stay as they are. Frozen are those that `freeze` has seen, and, in a model in which other batch
    normalizations are trainable, those that are not. After an exception everything is as before.

    On PyTorch all processes of `torch.distributed`, if it is initialized, pool their statistics, and each must call.

    Args:
        model: With Keras' layers or ours; built.
        data: Batches as `fit` takes them, of which only the inputs are used: tensors or arrays, tuples or lists of
            inputs, targets and weights, mappings from names to inputs. A `tf.data.Dataset`, a `keras.utils.PyDataset`,
            a `DataLoader`, or a list; "sequential" reads it several times.
        method: "parallel": one pass. Each layer normalizes with the statistics of the batch at hand, so a layer's
            inputs depend on how the data were split before it. "sequential": one pass for each layer, those before it
            already evaluating with their new statistics: exact for the deepest network.
        forward: `forward(model, batch)`, called in place of `model(inputs, training=False)`.
        max_samples: Stop after the batch that reaches so many; None takes all.
        unbiased: Whether the moving variance is the unbiased one. Keras' layers keep the biased one.
        progress: Whether to show a bar, where stderr is a terminal and rich is installed.

    Returns:
        What was done. Layers that no sample reached are among the skipped.

    Raises:
        ValueError: If there are no data, or no layer that they reach; if statistics are not finite; if `method` or
            `max_samples` is wrong; if the data can be read only once and `method` is "sequential"; if a layer is called
            inside of a function that is compiled on its own.
        RuntimeError: If a layer has not seen its first batch; if another process fails or has other layers.
        TypeError: If this is no model; if `data` is one batch, or a batch has more than inputs, targets and weights.

    Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3; Chan et al. 1983 for the merging.
    """
    refuse(model)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be positive, got {max_samples}")
    if isinstance(data, Mapping | str | np.ndarray) or ops.is_tensor(data):
        raise TypeError(f"data must give batches, one after the other, got a {type(data).__name__}: pass [data]")
    if method == "sequential" and isinstance(data, Iterator):
        raise ValueError(
            "method='sequential' reads the data once for each layer, and these can be read only once: "
            "pass a dataset or a list"
        )
    pool = _processes()
    with pool.all_or_none():
        layers, skipped = _find(model)
        passes = _Passes(model, data, forward or _call, max_samples, progress)
        pool.agree({name: layer.moving_mean.shape[0] for name, layer in layers.items()})
    with _undone_on_error(layers.values()):
        before = {name: _statistics(layer) for name, layer in layers.items()}
        samples, found = (_in_parallel if method == "parallel" else _in_sequence)(passes, layers, pool, unbiased)
        for name, pooled in found.items():
            if pooled.count <= 1:
                skipped[name] = "only one value came in, which has no variance"
                _write(layers[name], *before[name])
        skipped |= {name: reason for name, reason in passes.refused.items() if name not in found}
        missed = [name for name in layers if name not in found and name not in skipped]
        skipped |= dict.fromkeys(missed, "no sample came in")
        changed = [name for name in layers if name in found and name not in skipped]
        changes = {name: change(before[name], _statistics(layers[name]), layers[name].epsilon) for name in changed}
        skipped = {name: skipped[name] for name in named_layers(model) if name in skipped}
        if not changes:
            reasons = "; ".join(f"{name or 'the layer'}: {reason}" for name, reason in skipped.items())
            raise ValueError(f"no batch normalization was calibrated ({reasons or 'the model has none'})")
    return Calibration(samples, changes, skipped)


# --- Layers ----------------------------------------------------------------------------------------------------------

Layers = Mapping[str, Any]
"""Batch normalizations by name."""


def _find(model: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The layers to calibrate; and why the others are not."""
    layers, skipped = {}, {}
    for name, layer in named_layers(model).items():
        if not isinstance(layer, keras.layers.BatchNormalization):
            continue
        if not layer.built:
            raise RuntimeError(f"{name or 'the layer'} does not know its size yet: call the model on one batch first")
        if getattr(layer, "frozen", None) is not None:
            skipped[name] = "is frozen"
        elif type(layer).call not in KNOWN or "call" in vars(layer):
            skipped[name] = f"is a {type(layer).__name__} with a call of its own: what it normalizes is not known"
        else:
            layers[name] = layer
    if any(layer.trainable for layer in layers.values()):
        frozen = [name for name, layer in layers.items() if not layer.trainable]
        skipped |= dict.fromkeys(frozen, "is frozen: it is not trainable, while others are")
        layers = {name: layer for name, layer in layers.items() if layer.trainable}
    return layers, skipped


def _variables(layer: Any) -> list[Any]:
    return [layer.moving_mean, layer.moving_variance, *([layer.moving_stddev] if layer.renorm else [])]


def _statistics(layer: Any) -> tuple[Any, Any]:
    return numbers(layer.moving_mean), numbers(layer.moving_variance)


def _write(layer: Any, mean: Any, var: Any) -> None:
    layer.moving_mean.assign(mean)
    layer.moving_variance.assign(var)
    if layer.renorm:
        layer.moving_stddev.assign(np.sqrt(var + layer.epsilon))  # of which Keras makes the variance


def _finish(name: str, layer: Any, pooled: Moments, unbiased: bool) -> None:
    """Write the statistics of all the data."""
    if pooled.count <= 1:
        return
    var = pooled.var * (pooled.count / (pooled.count - 1) if unbiased else 1.0)
    dtype = np.dtype(np.float64 if layer.moving_mean.dtype == "float64" else np.float32)
    with np.errstate(over="ignore"):
        finite = all(np.isfinite(values.astype(dtype)).all() for values in (pooled.mean, var))
    if not finite:
        raise ValueError(
            f"the statistics of what comes into {name or 'the layer'} are not finite in {dtype}; nothing has been "
            "changed. Look for NaN or infinity in the data, or in the layers before it"
        )
    _write(layer, pooled.mean, var)


@contextmanager
def _undone_on_error(layers: Iterable[Any]) -> Iterator[None]:
    """After an exception the statistics are as before."""
    kept = [(variable, ops.copy(variable)) for layer in layers for variable in _variables(layer)]
    try:
        yield
    except BaseException:
        for variable, values in kept:
            variable.assign(values)
        raise


# --- Processes -------------------------------------------------------------------------------------------------------


class _Alone:
    """One process, with the methods of `batchnorm.torch.pool.Pool`."""

    def all_or_none(self) -> Any:
        return nullcontext()

    def agree(self, sizes: Mapping[str, int]) -> None:
        """There is nobody to agree with."""

    def merge(
        self, samples: int, found: dict[str, Moments], marked: Collection[str] = ()
    ) -> tuple[int, dict[str, Moments], Collection[str]]:
        return samples, found, marked


def _processes() -> Any:
    """Those that calibrate together."""
    if keras.backend.backend() != "torch":
        return _Alone()
    from batchnorm.torch.pool import Pool

    return Pool()


# --- Passes over the data --------------------------------------------------------------------------------------------

Collect = Callable[[str, Any, Moments], None]
"""What is done with the moments of a layer's input."""


class _Passes:
    """The model on all of the data, as often as it is wanted."""

    def __init__(
        self,
        model: Any,
        data: Iterable[Any],
        forward: Callable[[Any, Any], object],
        max_samples: int | None,
        progress: bool,
    ) -> None:
        self.model, self.data, self.forward = model, data, forward
        self.max_samples, self.progress = max_samples, progress
        self.refused: dict[str, str] = {}

    def run(self, layers: Layers, collect: Collect, what: str, start: Callable[[], None] = lambda: None) -> int:
        """One pass; `collect` sees what comes into the layers, `start` when a batch begins. Returns the samples."""
        every = {
            name: layer
            for name, layer in named_layers(self.model).items()
            if isinstance(layer, keras.layers.BatchNormalization) and "call" not in vars(layer)
        }
        samples = 0
        with _eagerly():
            try:
                for name, layer in every.items():
                    object.__setattr__(layer, "call", self._watch(name, layer, collect if name in layers else None))
                for batch in watched(_batches(self.data), what, self.progress):
                    start()
                    self.forward(self.model, batch)
                    size = _size(batch)
                    samples += 1 if size is None else size
                    if self.max_samples is not None and samples >= self.max_samples:
                        break
            finally:
                for layer in every.values():
                    vars(layer).pop("call", None)
        return samples

    def _watch(self, name: str, layer: Any, collect: Collect | None) -> Callable[..., Any]:
        """In place of a layer's call: evaluates, whatever it is told."""
        call = layer.call

        def see(inputs: Any, training: Any = None, mask: Any = None) -> Any:
            if collect is not None and name not in self.refused:
                try:
                    found = _moments(inputs, mask, layer.axis, name)
                except _Refused as reason:
                    self.refused[name] = str(reason)
                else:
                    collect(name, layer, found)
            return call(inputs, training=False, mask=mask)

        return see


class _Refused(Exception):
    """Why the moments of an input cannot be taken."""


def _moments(x: Any, mask: Any, axis: int, name: str) -> Moments:
    try:
        values = np.moveaxis(numbers(x), axis, 1)
        weights = None if mask is None else numbers(expand_mask(ops.convert_to_tensor(mask), x, axis))
    except Exception as error:
        if type(error).__name__ in COMPILED:
            raise ValueError(
                f"{name or 'the layer'} is called inside of a function that is compiled on its own, where its inputs "
                "cannot be seen: call the model without it, with forward=lambda model, batch: ..."
            ) from error
        raise
    if weights is not None:
        weights = np.moveaxis(weights, axis, 1)
        if weights.shape[1] != 1:
            raise _Refused("its mask counts other positions in each channel")
        weights = np.broadcast_to(weights[:, 0], (len(values), *values.shape[2:]))
    return moments(values, weights)


@contextmanager
def _eagerly() -> Iterator[None]:
    """Without gradients, and with the functions of TensorFlow that a model has, step by step."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        before = tf.config.functions_run_eagerly()
        tf.config.run_functions_eagerly(True)
        try:
            yield
        finally:
            tf.config.run_functions_eagerly(before)
        return
    quiet: Any = nullcontext()
    if backend == "torch":
        import torch

        quiet = torch.no_grad()
    with quiet:
        yield


def _batches(data: Any) -> Any:
    """A `PyDataset` counts its batches, and does not say where it ends."""
    if isinstance(data, keras.utils.PyDataset):
        return (data[index] for index in range(len(data)))
    return data


def _inputs(batch: Any) -> Any:
    """What `fit` would call the model with."""
    if isinstance(batch, tuple | list):
        if not 1 <= len(batch) <= 3:
            raise TypeError(
                f"a batch of {len(batch)} parts is not inputs, targets and weights; say what it is with "
                "forward=lambda model, batch: ..."
            )
        return batch[0]
    return batch


def _call(model: Any, batch: Any) -> Any:
    return model(_inputs(batch), training=False)


def _size(batch: Any) -> int | None:
    """How many samples: the length of the first tensor; None without a tensor."""
    leaves = keras.tree.flatten(_inputs(batch) if isinstance(batch, tuple | list) and 1 <= len(batch) <= 3 else batch)
    return next((int(leaf.shape[0]) for leaf in leaves if len(getattr(leaf, "shape", ())) > 0), None)


def _add(found: dict[str, Moments], name: str, batch: Moments) -> None:
    """Merge what came in now with what came in before; nothing does not count as something."""
    if batch.count > 0:
        found[name] = merge_moments(found[name], batch) if name in found else batch


def _in_parallel(passes: _Passes, layers: Layers, pool: Any, unbiased: bool) -> tuple[int, dict[str, Moments]]:
    found: dict[str, Moments] = {}

    def collect(name: str, layer: Any, batch: Moments) -> None:
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
        _finish(name, layers[name], pooled, unbiased)
    return samples, found


class _Seen:
    """The moments of some layers, and which of them ever run after another one of them."""

    def __init__(self) -> None:
        self.found: dict[str, Moments] = {}
        self.late: set[str] = set()
        self.first: str | None = None

    def start(self) -> None:
        """A batch begins."""
        self.first = None

    def collect(self, name: str, layer: Any, batch: Moments) -> None:
        """See what comes into a layer."""
        if self.first is None:
            self.first = name
        elif name != self.first:
            self.late.add(name)
        _add(self.found, name, batch)


def _in_sequence(passes: _Passes, layers: Layers, pool: Any, unbiased: bool) -> tuple[int, dict[str, Moments]]:
    """In each pass those layers are done before which, in every batch, only layers that were done have run."""
    done: dict[str, Moments] = {}
    samples = 0
    while len(done) < len(layers):
        seen = _Seen()

        left = {name: layer for name, layer in layers.items() if name not in done}
        what = f"calibrating, {len(done)} of {len(layers)} layers done"
        with pool.all_or_none():
            samples = passes.run(left, seen.collect, what, seen.start)
            samples, found, late = pool.merge(samples, seen.found, seen.late)
        _demand(samples)
        ready = {name: m for name, m in found.items() if name not in late} or dict(list(found.items())[:1])
        for name, pooled in ready.items():
            _finish(name, layers[name], pooled, unbiased)
        if not ready:
            break
        done |= ready
    return samples, done


def _demand(samples: int) -> None:
    if samples == 0:
        raise ValueError("there is nothing to calibrate with: the data gave no samples")
