"""Record the batch normalizations of a model while `fit` trains it.

```
model.fit(x, y, callbacks=[Watch(every=10, to="statistics.csv")])
```
"""

from typing import Any

import keras
import numpy as np

from batchnorm.keras.models import normalizations, to_float64
from batchnorm.whole.evidence import gap
from batchnorm.whole.recording import Record, Recorder, Sink

__all__ = ["Record", "Watch"]


class Watch(keras.callbacks.Callback):
    """A callback that records each batch normalization, step by step.

    The training step is compiled, and of its results a callback sees only the moving statistics. Those of the batch
    follow from the moving ones before and after it, `batch = (after - momentum * before) / (1 - momentum)`. Gradients
    and outputs are not visible, so `grad_in`, `grad_out` and `dead` are None. With `steps_per_execution` above 1, or
    with renormalization, the statistics of a batch are None, too.

    Args:
        every: Record one step in `every`, beginning with the first.
        to: Where the records go in addition to `records`: a `.csv` file, which is replaced when it is first opened; a
            folder, for TensorBoard; a writer with `add_scalar`; or a function that is called with each `Record`.
        keep: The number of records to keep in memory. Each step gives one record per layer.
        live: Whether to show a line on stderr, if that is a terminal and rich is installed. Off by default, because
            `fit` has a line of its own.

    Attributes:
        recorder: The recorder; `str(recorder)` is the last recorded step in one line.

    Raises:
        ValueError: If `every` or `keep` is not positive; in `fit`, if the model has no batch normalization.
        InputError: If the file cannot be written, or TensorBoard is not installed.
        TypeError: If `to` is none of these.
    """

    def __init__(self, every: int = 1, *, to: Sink | None = None, keep: int = 10_000, live: bool = False) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be positive, got {every}")
        self.every = every
        self.recorder = Recorder(to, keep, live)
        self.layers: dict[str, Any] = {}
        self.skipped: dict[str, int] = {}
        self._before: dict[str, tuple[Any, Any]] = {}

    @property
    def records(self) -> list[Record]:
        """The most recent records."""
        return list(self.recorder.records)

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the layers."""
        # A layer that is not built yet is one that the model does not call.
        self.layers = {name: layer for name, layer in normalizations(self.model).items() if layer.built}
        if not self.layers:
            raise ValueError("model has no batch normalization, so there is nothing to watch")
        self.recorder.open()

    def on_train_end(self, logs: Any = None) -> None:
        """Close the file."""
        self.recorder.close()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Copy the moving statistics."""
        if self.recorder.steps % self.every == 0:
            self._before = {name: self._statistics(layer) for name, layer in self.layers.items()}

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Record the change of the moving statistics."""
        self.recorder.steps += 1
        before, self._before = self._before, {}
        self.recorder.add([self._record(name, self.layers[name], *old) for name, old in before.items()])

    def _statistics(self, layer: Any) -> tuple[Any, Any]:
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()  # the trainer keeps the variables in a state of its own
        return to_float64(layer.moving_mean), to_float64(layer.moving_variance)

    @np.errstate(all="ignore")  # the mean of inf and -inf is NaN without a word
    def _record(self, name: str, layer: Any, old_mean: Any, old_var: Any) -> Record:
        mean, var = self._statistics(layer)
        learning = layer.trainable and getattr(layer, "frozen", None) is None
        stood = learning and (mean == old_mean).all() and (var == old_var).all()
        if stood:
            self.skipped[name] = self.skipped.get(name, 0) + 1
        rate = 1 - float(layer.momentum)
        executed = getattr(self.model, "steps_per_execution", 1)
        averages = float(mean.mean()), float(var.mean())
        skipped = self.skipped.get(name, 0)
        if not learning or layer.renorm or executed != 1 or rate == 0 or stood:
            return Record(self.recorder.steps, name, None, None, *averages, skipped=skipped)
        batch_mean, batch_var = (old + (new - old) / rate for old, new in ((old_mean, mean), (old_var, var)))
        distance = gap(batch_mean, np.maximum(batch_var, 0), mean, var, layer.epsilon)
        batch = float(batch_mean.mean()), float(batch_var.mean())
        return Record(self.recorder.steps, name, *batch, *averages, distance, skipped=skipped)
