"""Find out why a model with batch normalization misbehaves, without changing it.

```
print(diagnose(model))                                            # checks of the state alone
print(diagnose(model, dataset, optimizer=model.optimizer))        # checks of the state and of the data
```
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from batchnorm.keras import batches
from batchnorm.keras.eager import eagerly, layer_input
from batchnorm.keras.models import named_layers, normalizations, refuse, to_float64
from batchnorm.whole import diagnosis as whole
from batchnorm.whole.evidence import Evidence, Layer, Producer, State
from batchnorm.whole.findings import Finding
from batchnorm.whole.randomness import random_states_kept
from batchnorm.whole.remedies import Data, Keras
from batchnorm.whole.report import Report

__all__ = ["Finding", "Report", "diagnose"]

LINEAR = (
    layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D, layers.Conv1DTranspose, layers.Conv2DTranspose,
    layers.Conv3DTranspose,
)  # fmt: skip
ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
"""The relative error of rounding, of types that are rougher than float32."""
COLORS = re.compile(r"\x1b\[\d*m")
RECTIFIERS = (keras.activations.relu, keras.activations.relu6)


def diagnose(
    model: Any,
    data: Iterable[Any] | None = None,
    *,
    optimizer: Any = None,
    forward: Callable[..., Any] | None = None,
    max_batches: int | None = 64,
) -> Report:
    """Find what is wrong with the batch normalizations of a model, and say how to fix it.

    Nothing changes: neither moving statistics and other variables nor random states, also if the model fails. Each
    batch is run three times, step by step: in training, in training with dropout and the like off, and in evaluation.
    On PyTorch, where an activation checkpoint (`keras.remat`) is seen, one batch is also run backward.

    Args:
        model: A built model with Keras' layers, ours, or subclasses of them.
        data: Batches of the size used in training, in a form that `calibrate` accepts; None checks the state alone.
        optimizer: The optimizer, whose weight decay is checked.
        forward: `forward(model, batch, training)`, called in place of `model(inputs, training=training)`; its result
            is compared between training and evaluation.
        max_batches: The largest number of batches to read; None reads all. The report says if there were more.

    Returns:
        The report: print it, go through `findings`, or call `to_json` and `to_html`.

    Raises:
        ValueError: If the model has no batch normalization, or the data have no batches; if a layer is called inside a
            function that is compiled on its own.
        RuntimeError: If a layer has not seen its first batch.
        TypeError: If `model` is not a model, or `data` is one batch.
    """
    refuse(model)
    read = batches.Indexed(data) if isinstance(data, keras.utils.PyDataset) else data
    with random_states_kept():
        return whole.diagnose(_Model(model, data, optimizer, forward or _call), read, max_batches)


def _call(model: Any, batch: Any, training: bool) -> Any:
    return model(batches.inputs(batch), training=training)


class _Unbuilt(RuntimeError):
    """A layer has not seen its first batch."""

    _keras_call_info_injected = True  # so that Keras adds no arguments to the message

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} does not know its size yet: call the model on one batch first")


class _Model:
    """A Keras model, as `whole.diagnose` sees it: a `whole.Model`."""

    def __init__(self, model: Any, data: Any, optimizer: Any, forward: Callable[..., Any]) -> None:
        self.model, self.optimizer, self.forward = model, optimizer, forward
        self.remedies = Keras(Data(_kind(data)))
        self.layers: dict[str, Any] = normalizations(model)
        self.training: dict[str, bool] = {}

    def find(self) -> Mapping[str, Layer]:
        if not self.model.built:
            name = next((name for name, layer in self.layers.items() if not layer.built), "")
            raise _Unbuilt(name or "the layer")
        return {
            name: Layer(_state(self.model, name, layer), decay=self._decay(layer))
            for name, layer in self.layers.items()
        }

    def _decay(self, layer: Any) -> float:
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        decay = getattr(optimizer, "weight_decay", None)
        if not decay:
            return 0.0
        decays = [optimizer._use_weight_decay(variable) for variable in layer.trainable_variables]
        return float(decay) if any(decays) else 0.0

    def size(self, batch: Any) -> int | None:
        return batches.size(batch)

    def run(self, batch: Any, evidence: Evidence) -> None:
        evidence.processes = _processes()
        around = None if evidence.batches else _Around(self.model, self.layers)
        if self.forward is _call:
            batches.inputs(batch)  # an error in the batch's form is not the model's
        with eagerly(), _explained(batch):
            self._pass(batch, evidence, "trained", around)
            trained = self._pass(batch, evidence, "quiet")
            evaluated = self._pass(batch, evidence, "evaluated")
        for a, b in zip(trained, evaluated, strict=False):
            evidence.outputs.add(a, b)
        if around is not None and around.checkpointed:
            for name, counted in self._step(batch).items():
                evidence.layers[name].counted = counted

    def _pass(self, batch: Any, evidence: Evidence, mode: str, around: "_Around | None" = None) -> list[Any]:
        """Call the model in one of the three ways, and return its outputs."""
        calls: dict[str, int] = {}

        def watch(name: str, layer: Any) -> Callable[..., Any]:
            call = layer.call

            def watched(inputs: Any, training: Any = None, mask: Any = None) -> Any:
                if mode == "trained":
                    self.training[name] = bool(training)
                if not evidence.layers[name].state.channels:
                    raise _Unbuilt(name)
                number = calls.get(name, 0)
                calls[name] = number + 1
                found, seen = evidence.reach(name), layer_input(inputs, mask, layer.axis, name)
                if not isinstance(seen, str):  # a mask that counts other positions in each channel has no batch size
                    found.takes(mode, number, *seen)
                learning = mode != "evaluated" and self.training.get(name, False)
                y = call(inputs, training=learning, mask=mask)
                if mode == "trained":
                    found.gives(np.moveaxis(to_float64(y), layer.axis, 1))
                return y

            return watched

        with _kept(self.model), _replaced({layer: watch(name, layer) for name, layer in self.layers.items()}):
            with around or ExitStack():
                outputs = self.forward(self.model, batch, mode == "trained")
            if around is not None:
                around.tell(evidence)
            return [to_float64(y) for y in keras.tree.flatten(outputs) if hasattr(y, "shape")]

    def _step(self, batch: Any) -> dict[str, tuple[int, int]]:
        """How often a forward pass moves each layer's statistics, and how often that and its backward pass do."""
        import torch

        moved = dict.fromkeys(self.layers, 0)

        def watch(name: str, layer: Any) -> Callable[..., Any]:
            call = layer.call

            def watched(*args: Any, **kwargs: Any) -> Any:
                before = to_float64(layer.moving_mean), to_float64(layer.moving_variance)
                try:
                    return call(*args, **kwargs)
                finally:  # a checkpoint breaks a repetition off as soon as it has what it needs
                    after = to_float64(layer.moving_mean), to_float64(layer.moving_variance)
                    moved[name] += any((a != b).any() for a, b in zip(before, after, strict=True))

            return watched

        with _kept(self.model), _replaced({layer: watch(name, layer) for name, layer in self.layers.items()}):
            outputs = self.forward(self.model, batch, True)
            forward = dict(moved)
            summed = [y.sum() for y in keras.tree.flatten(outputs) if getattr(y, "requires_grad", False)]
            learned = [variable.value for variable in self.model.trainable_variables if variable.value.requires_grad]
            if summed:
                torch.autograd.grad(summed, learned, allow_unused=True)  # leaves the gradients that are there
        return {name: (forward[name], moved[name]) for name in moved}


# --- What is around a layer -------------------------------------------------------------------------------------------


class _Around:
    """What comes before and after each normalization in one call, found by the identity of tensors.

    Args:
        model: The model.
        normalizations: Its batch normalizations by name, whose calls are already replaced.
    """

    def __init__(self, model: Any, normalizations: dict[str, Any]) -> None:
        self.model = model
        self.names = {id(layer): name for name, layer in normalizations.items()}
        self.made: dict[int, tuple[Any, str, Any]] = {}
        self.normalized: dict[int, tuple[Any, str]] = {}
        self.uses: dict[str, int] = {}
        self.pending: list[str] = []
        self.producers: dict[str, tuple[str, Any]] = {}
        self.dropouts: dict[str, tuple[str, ...]] = {}
        self.rectified: set[str] = set()
        self.checkpointed = False
        self._stack = ExitStack()

    def __enter__(self) -> "_Around":
        leaves = {
            layer: self._watch(name, layer)
            for name, layer in named_layers(self.model).items()
            if id(layer) in self.names or not list(layer._flatten_layers(include_self=False, recursive=False))
        }
        self._stack.enter_context(_replaced(leaves))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def tell(self, evidence: Evidence) -> None:
        """Add what was found to the evidence."""
        for name, layer in evidence.layers.items():
            layer.is_rectified = name in self.rectified
            layer.dropouts = self.dropouts.get(name, ())
            producer = self.producers.get(name)
            if producer is not None and self.uses[producer[0]] == 1:
                path, made = producer
                bias = None if made.bias is None else to_float64(made.bias)
                if made.bias is not None and not made.bias.trainable and not np.any(bias):
                    bias = None  # as the remedy leaves it
                layer.producer = Producer(path, _at(self.model, path, made), bias)

    def _watch(self, name: str, layer: Any) -> Callable[..., Any]:
        call = layer.call

        def watched(*args: Any, **kwargs: Any) -> Any:
            for x in keras.tree.flatten((args, kwargs)):
                self._takes(name, layer, x)
            y = call(*args, **kwargs)
            if id(layer) in self.names:
                path = self.names[id(layer)]
                self.normalized[id(y)] = y, path
                activation = getattr(getattr(layer, "activation", None), "fused", None)
                if (activation[0] if isinstance(activation, tuple) else activation) in ("relu", "relu6"):
                    self.rectified.add(path)
            elif isinstance(layer, LINEAR) and layer.activation in (None, keras.activations.linear):
                self.made[id(y)] = y, name, layer
            elif (
                isinstance(layer, layers.Dropout | layers.SpatialDropout1D | layers.SpatialDropout2D) and layer.rate > 0
            ):
                self.pending.append(name)
            return y

        return watched

    def _takes(self, name: str, layer: Any, x: Any) -> None:
        if id(x) in self.made and self.made[id(x)][0] is x:
            maker, made = self.made[id(x)][1:]
            self.uses[maker] = self.uses.get(maker, 0) + 1
            if id(layer) in self.names:
                self.producers[self.names[id(layer)]] = maker, made
        if id(layer) in self.names and keras.backend.backend() == "torch":
            from batchnorm.torch.recomputation import is_inside

            self.checkpointed = self.checkpointed or is_inside()
        if id(layer) in self.names and self.pending:
            self.dropouts[self.names[id(layer)]] = tuple(dict.fromkeys(self.pending))
            self.pending = []
        if id(x) in self.normalized and self.normalized[id(x)][0] is x:
            is_relu = isinstance(layer, layers.ReLU) and not layer.negative_slope and not layer.threshold
            if is_relu or (getattr(layer, "activation", None) in RECTIFIERS and isinstance(layer, layers.Activation)):
                self.rectified.add(self.normalized[id(x)][1])


@contextmanager
def _explained(batch: Any) -> Iterator[None]:
    """Add the shapes of the batch to the model's errors, in one sentence."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        kind = type(error)
        if kind not in (ValueError, TypeError, RuntimeError):  # a subclass may need other arguments, or be ours
            raise
        arrays = [leaf for leaf in keras.tree.flatten(batch) if hasattr(leaf, "shape")]
        shapes = ", ".join(str(tuple(array.shape)) for array in arrays) or "no arrays"
        # Keras says which call failed, then why, and then what the arguments were.
        lines = [line for line in COLORS.sub("", str(error)).splitlines() if line.strip()]
        said = [line for line in lines if not line.startswith("Exception encountered when calling")]
        raise kind(f"the model fails on a batch of data of shape {shapes}: {(said or lines or [''])[0]}") from error


@contextmanager
def _replaced(calls: dict[Any, Callable[..., Any]]) -> Iterator[None]:
    """Replace the calls of some layers, and put back the previous ones afterwards."""
    before = {layer: vars(layer).get("call") for layer in calls}
    try:
        for layer, call in calls.items():
            object.__setattr__(layer, "call", call)
        yield
    finally:
        for layer, call in before.items():
            if call is None:
                vars(layer).pop("call", None)
            else:
                object.__setattr__(layer, "call", call)


@contextmanager
def _kept(model: Any) -> Iterator[None]:
    """Restore all variables that do not learn, random states included."""
    learned = {id(variable) for variable in model.trainable_variables}
    held = [variable for variable in model.variables if id(variable) not in learned]
    held += [generator.state for generator in _generators(model)]
    kept = [(variable, ops.copy(variable)) for variable in {id(v): v for v in held}.values()]
    try:
        yield
    finally:
        for variable, values in kept:
            variable.assign(values)


def _generators(model: Any) -> list[Any]:
    """The sources of random numbers in all layers."""
    found = [getattr(layer, "seed_generator", None) for layer in named_layers(model).values()]
    return [generator for generator in found if generator is not None]


# --- The state of a layer ---------------------------------------------------------------------------------------------


def _at(model: Any, name: str, layer: Any) -> str:
    """A layer as an expression of Python."""
    if not name:
        return "model"
    found, text = model, "model"
    try:
        for part in name.split("/"):
            found, text = found.get_layer(part), f"{text}.get_layer({part!r})"
    except (AttributeError, ValueError):
        found = None
    if found is layer:
        return text
    place = [id(inner) for inner in model._flatten_layers()].index(id(layer))
    return f"list(model._flatten_layers())[{place}]"


def _state(model: Any, name: str, layer: Any) -> State:
    if not layer.built:  # Keras builds a layer when it is called, so nothing has called this one
        return State(name, _at(model, name, layer), type(layer).__name__, 0, learns=None)
    affine = [weight for weight in (layer.gamma, layer.beta) if weight is not None]
    frozen = getattr(layer, "frozen", None) is not None or not layer.trainable
    gamma = None if layer.gamma is None else to_float64(layer.gamma)
    return State(
        name,
        _at(model, name, layer),
        type(layer).__name__,
        int(layer.moving_mean.shape[0]),
        to_float64(layer.moving_mean),
        to_float64(layer.moving_variance),
        gamma,
        None if layer.beta is None else to_float64(layer.beta),
        float(layer.epsilon),
        1 - float(layer.momentum),
        rounding=ROUNDING.get(layer.variable_dtype, 2.0**-23),
        trains=not frozen,
        is_frozen=frozen,
        learns=any(weight.trainable for weight in affine) if affine else None,
        group=getattr(layer, "virtual_batch_size", None),
        is_corrected=bool(layer.renorm),
        is_synchronized=bool(layer.synchronized),
    )


def _processes() -> int:
    """The number of processes or replicas that train, each on a batch of its own."""
    backend = keras.backend.backend()
    if backend == "torch":
        import torch.distributed as dist

        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if backend == "tensorflow":
        import tensorflow as tf

        return int(tf.distribute.get_strategy().num_replicas_in_sync)
    return 1


def _kind(data: Any) -> str:
    """How the data are stored: see `Data`."""
    if type(data).__module__.startswith("tensorflow"):
        return "dataset"
    if isinstance(data, list | tuple) and data:
        if all(isinstance(batch, np.ndarray) for batch in data):
            return "arrays"
        if all(isinstance(batch, tuple) and all(isinstance(p, np.ndarray) for p in batch) for batch in data):
            return "pairs"
    return ""
