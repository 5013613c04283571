"""Fold the batch normalizations of a model in evaluation into the layers beside them.

```
result = fold(model, example_inputs=x)
print(result)              # what was folded where, what was not and why, and how far the outputs differ
result.model.save("small.keras")
```

`batchnorm.whole.fold` decides what is folded. This module is its adapter for Keras.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import keras
import numpy as np
from keras import layers
from numpy.typing import NDArray

from batchnorm.keras.activations import Activation
from batchnorm.keras.copying import duplicate, kept_state, refuse_config
from batchnorm.keras.examples import Examples
from batchnorm.keras.graph import graphs
from batchnorm.keras.layers import BatchNormalization, KerasBatchNormalization
from batchnorm.keras.linear import channel_axis, is_linear, read_map, shift_problem, write_map
from batchnorm.keras.models import named_layers, refuse, to_float64
from batchnorm.whole.comparison import Outputs
from batchnorm.whole.fold import Folded, Place, Stays, fold_network
from batchnorm.whole.linear import LinearMap, Normalization

__all__ = ["fold"]

M = TypeVar("M")

SILENT = (
    layers.Identity,
    layers.Dropout,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.AlphaDropout,
    layers.ActivityRegularization,
)
"""Layers that return their input in evaluation."""

POOLING = (layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D)
"""Means over positions: scaling and shifting a channel before or after them gives the same."""

KNOWN = (KerasBatchNormalization.call, BatchNormalization.call)
"""The calls that compute a batch normalization and its activation."""

GRAPH = ("_inbound_nodes", "_outbound_nodes", "_build_shapes_dict", "_parent_path", "_path")
"""The attributes that hold a layer's place in its model."""


def fold(model: M, example_inputs: Any = None) -> Folded[M]:
    """A copy of a model whose batch normalizations are folded into the convolutions and dense layers beside them.

    In evaluation a normalization is one multiplication and one addition per channel, `y = s*x + t` with
    `s = gamma / sqrt(moving_variance + epsilon)` and `t = beta - moving_mean*s`. With a linear map `A v + b` before it,
    that is `(s*A) v + (s*b + t)`, and with one after it `(A*s) x + (b + A t)`: one linear map either way. Its weights
    are computed in float64 and rounded once.

    A normalization is folded only if the model's graph proves that this is correct: nothing else uses the value between
    the two layers, each is called once, and no operation reads their variables. It goes into the layer before it if
    possible (Dense, Conv, ConvTranspose, DepthwiseConv, SeparableConv, without an activation of their own), otherwise
    into the layer after it (Dense, even after Flatten and global averages; Conv and DepthwiseConv with
    `padding="valid"`). Dropout and other layers that do nothing in evaluation may lie in between. All others stay, and
    the result gives the reason.

    The copy is a model of the same class, for evaluation: with `training=True`, a folded normalization still does not
    normalize. A `keras.layers.Identity` takes the place of each, or its activation if it had one. If all of them are
    folded, the model's file needs nothing but Keras. A model or layer whose class creates its normalizations itself
    would create them again when it is loaded: its folded copy can be called, trained and exported, and its weights can
    be saved, but `save` raises an error that says so.

    The copy is compared with the original twice, before and after folding: on the example inputs, and on random inputs
    of the same shapes, or of the shapes that the model knows. The outputs may differ by as much as rounding explains:
    relative to the largest value 1e-10 in float64, 1e-4 in float32 (in which Keras computes float64, too, unless it
    runs on TensorFlow), 0.02 in float16 and 0.1 in bfloat16, where the coarsest type of a layer counts; or by ten times
    as much as the outputs of the original change if each of its weights is rounded once more. A fold that changes them
    by more is undone.

    Args:
        model: A built model, Functional, Sequential or subclassed, which does not change. A subclassed model must have
            `get_config`, as for saving.
        example_inputs: Inputs for one call of the model, on which to compare the two models. Only a call shows the
            graph of a subclassed model: without example inputs its normalizations stay.

    Returns:
        The new model; the layer into which each normalization was folded; and the reason why others were not.

    Raises:
        TypeError: If `model` is not a model, or cannot be copied: its copy must give the same outputs.
        ValueError: If it is not built, or if its copy can only be built by a call and there are no example inputs.
        OutputsDiffer: If more than four folds change the outputs by more than rounding explains.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2017, section 3.2.
    """
    refuse(model)
    given: Any = model
    if not isinstance(given, keras.Model):
        raise TypeError(
            f"model must be a keras.Model, got a layer, {type(given).__name__}: wrap it in keras.Sequential"
        )
    if not given.built:
        raise ValueError(f"{given.name} has not seen an input yet: call it on one batch first")
    examples = Examples(given, example_inputs)
    return fold_network(_Network(given, examples), lambda: _Network(given, examples))


# --- The adapter ------------------------------------------------------------------------------------------------------


@dataclass
class _Channels:
    """The place of a normalization's channels in a value that comes after it.

    Attributes:
        axis: Their axis.
        order: The channel of each index along the axis.
    """

    axis: int
    order: NDArray[Any]

    def flatten(self, shape: tuple[Any, ...]) -> None:
        """Merge all axes except the first of a value of this shape."""
        if None in shape[1:]:
            raise Stays("Flatten after it has inputs of any size")
        inner, outer = math.prod(shape[self.axis + 1 :]), math.prod(shape[1 : self.axis])
        self.axis, self.order = 1, np.tile(np.repeat(self.order, inner), outer)


class _Network:
    """A copy of a model, as `fold_network` sees it.

    Attributes:
        model: The copy.
        layers: Its layers, by name.
        names_of: The names of the layers, by their ids.
        changed: The names of layers whose `call` has been replaced.
        calls: The number of calls of each layer, by its id.
        read: The ids of the variables that something other than their layer reads.
        silent: The ids of the folded normalizations that now return their input.
        gone: The names of all folded normalizations.
    """

    constants = ("moving_mean", "moving_variance", "gamma", "beta", "epsilon")

    def __init__(self, original: Any, examples: Examples) -> None:
        self.examples = examples
        self.model = duplicate(original, examples.given)
        examples.require_the_same(self.model)
        self.layers = named_layers(self.model)
        self.names_of = {id(layer): name for name, layer in self.layers.items()}
        self.changed = {name for name, layer in named_layers(original).items() if "call" in vars(layer)}
        with kept_state(self.model):  # a layer may count its symbolic calls
            self.graphs, self.closed = graphs(self.model, examples.given)
        self.calls = sum((graph.calls() for graph in self.graphs), Counter[int]())
        self.read = {key for graph in self.graphs for key in graph.variables()}
        self.silent: set[int] = set()
        self.gone: list[str] = []

    def names(self) -> list[str]:
        return [name for name, layer in self.layers.items() if isinstance(layer, KerasBatchNormalization)]

    def normalization(self, name: str) -> Normalization:
        layer = self.layers[name]
        if id(layer) in self.closed:
            raise Stays(self.closed[id(layer)])
        if (inner := _activation(layer).layer) is not None:
            raise Stays(f"has an activation that is a layer, {inner.name}, which could not take its place")
        count = self.calls[id(layer)]
        if count != 1:
            raise Stays(f"is called {count} times" if count else "is never called")
        if type(layer).call not in KNOWN or name in self.changed:
            raise Stays(f"is {_a(type(layer).__name__)} with a call of its own")
        _, node = self._place(name)
        if node.arguments.kwargs.get("training") or True in node.arguments.args[1:]:
            raise Stays("is always called with training=True")
        self._require_unread(layer, "has")
        gamma, beta = (None if values is None else to_float64(values) for values in (layer.gamma, layer.beta))
        return Normalization(
            to_float64(layer.moving_mean), to_float64(layer.moving_variance), gamma, beta, layer.epsilon
        )

    def before(self, name: str) -> Place:
        graph, node = self._place(name)
        maker = graph.before(node)
        while maker is not None and self._hands_on(maker.operation):
            maker = graph.before(maker)
        if maker is None or isinstance(maker.operation, layers.InputLayer):
            raise Stays("nothing that it could go into comes before it")
        layer = maker.operation
        place = self._beside(layer, "before")
        if layer.activation is not keras.activations.linear:
            raise Stays(f"{place.said} has an activation of its own")
        rank = len(node.outputs[0].shape)
        if channel_axis(layer) % rank != self.layers[name].axis % rank:
            raise Stays(f"{place.said} has its channels on another axis")
        return place

    def after(self, name: str) -> Place:
        layer = self.layers[name]
        if not _activation(layer).is_none:
            raise Stays("what comes after it is its own activation")
        graph, node = self._place(name)
        rank = len(node.outputs[0].shape)
        channels = _Channels(layer.axis % rank, np.arange(node.outputs[0].shape[layer.axis]))
        while True:
            node = graph.after(node)
            operation, (tensor,) = node.operation, node.arguments.keras_tensors
            rank = len(tensor.shape)
            if type(operation) is layers.Flatten and operation.data_format == "channels_last":
                channels.flatten(tensor.shape)
            elif type(operation) in POOLING:
                if channels.axis != channel_axis(operation) % rank:
                    raise Stays(f"{type(operation).__name__} after it has its channels on another axis")
                channels.axis = channels.axis if operation.keepdims else 1
            elif not self._hands_on(operation):
                break
        place = self._beside(operation, "after", channels.order)
        problem = shift_problem(operation)
        if problem is not None:
            raise Stays(f"{place.said} {problem}")
        if channels.axis != channel_axis(operation) % rank:
            raise Stays(f"{place.said} has its channels on another axis")
        return place

    def linear_map(self, place: Place) -> LinearMap:
        layer = self.layers[place.layer]
        self._require_unread(layer, f"{place.said} has")
        if self.calls[id(layer)] != 1:
            raise Stays(f"{place.said} is called {self.calls[id(layer)]} times")
        if not layer.built or layer.quantization_mode is not None or getattr(layer, "lora_enabled", False):
            raise Stays(f"{place.said} is quantized, or has weights that are not its own")
        return read_map(layer)

    def take_out(self, name: str, place: Place) -> None:
        self.gone.append(name)
        if _activation(self.layers[name]).is_none:
            self.silent.add(id(self.layers[name]))

    def finish(self, maps: Mapping[str, LinearMap]) -> Any:
        for name, map in maps.items():
            write_map(self.layers[name], map)
        for name in self.gone:
            _retire(self.layers[name])
        refuse_config(self.examples.original, self.model)
        return self.model

    def outputs(self) -> Outputs:
        return self.examples.compare(self.model)

    def _place(self, name: str) -> tuple[Any, Any]:
        """The graph that calls a normalization, and the call."""
        layer = self.layers[name]
        return next((graph, node) for graph in self.graphs if (node := graph.call(layer)) is not None)

    def _beside(self, layer: Any, where: str, channels: NDArray[Any] | None = None) -> Place:
        name = self.names_of.get(id(layer))
        if name is None or not is_linear(layer) or name in self.changed:
            raise Stays(f"{where} it is {_a(type(layer).__name__)}, which it cannot go into")
        return Place(name, f"{type(layer).__name__} {where} it", channels)

    def _require_unread(self, layer: Any, said: str) -> None:
        if any(id(variable) in self.read for variable in layer.variables):
            raise Stays(f"{said} variables that something else reads")

    def _hands_on(self, layer: Any) -> bool:
        if id(layer) in self.silent:
            return True
        linear = type(layer) is layers.Activation and layer.activation is keras.activations.linear
        return (type(layer) in SILENT or linear) and self.names_of.get(id(layer)) not in self.changed


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _activation(layer: Any) -> Activation:
    activation: Activation = layer.activation if isinstance(layer, BatchNormalization) else Activation()
    return activation


def _retire(layer: Any) -> None:
    """Turn a normalization into its activation, in place, because the graph and other layers refer to the object."""
    activation = _activation(layer)
    same = {"name": layer.name, "dtype": layer.dtype_policy.name}
    rest: Any
    if activation.is_none:
        rest = layers.Identity(**same)
    elif isinstance(activation.fused, tuple):
        name, parameter = activation.fused
        rest = layers.LeakyReLU(parameter, **same) if name == "leaky_relu" else layers.ELU(parameter, **same)
    else:
        rest = layers.Activation(activation.function, **same)
    rest.built = True
    kept = {name: layer.__dict__[name] for name in GRAPH if name in layer.__dict__}
    layer.__class__ = type(rest)
    layer.__dict__.clear()
    layer.__dict__.update(rest.__dict__ | kept)
    for node in layer._inbound_nodes:  # it was called with a mask, or with training=False
        node.arguments = type(node.arguments)(node.arguments.keras_tensors[0])
