"""Take the batch normalizations out of a model that is only evaluated: they go into the layers beside them.

```
result = fold(model, example_inputs=x)
print(result)              # which normalization went where, and why others stay; how far the outputs differ
result.model.save("small.keras")
```
"""

from collections import Counter
from typing import Any, TypeVar

import keras
import numpy as np
from keras import layers, tree
from numpy.typing import NDArray

from batchnorm.definition import reciprocal_std
from batchnorm.folded import Folded, difference
from batchnorm.keras.activations import Activation
from batchnorm.keras.graph import Graph, Unproven, graphs
from batchnorm.keras.layers import BatchNormalization
from batchnorm.keras.linear import LinearMap, is_linear
from batchnorm.keras.models import named_layers, numbers, refuse

__all__ = ["fold"]

M = TypeVar("M")
Array = NDArray[np.float64]

ROUNDING = {"float64": 1e-10, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""How far outputs may differ for rounding, relative to the largest."""

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
"""Layers that hand on what they get, in evaluation."""

POOLING = (layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D)
"""Means over positions: a multiplication and an addition for each channel may as well come after them."""


GRAPH = ("_inbound_nodes", "_outbound_nodes", "_build_shapes_dict", "_parent_path", "_path")
"""Where a layer is in its model."""


def fold(model: M, example_inputs: Any = None) -> Folded[M]:
    """A copy of a model in which batch normalizations have gone into the convolutions and dense layers beside them.

    In evaluation a normalization is one multiplication and one addition per channel, `y = s*x + t` with
    `s = gamma / sqrt(moving_variance + epsilon)` and `t = beta - moving_mean*s`. With a linear map `A v + b` before it,
    that is `(s*A) v + (s*b + t)`, and with one after it `(A*s) x + (b + A t)`: one linear map either way. Its weights
    are computed in float64 and rounded once.

    This is done wherever the model's graph proves it: the value between the two is used by nothing else, each is called
    once, and no operation reads their variables. A normalization goes into the layer before it if it can (Dense, Conv,
    ConvTranspose, DepthwiseConv, SeparableConv, without an activation of their own), otherwise into the layer after it
    (Dense, also behind Flatten and global averages; Conv with `padding="valid"`), through dropout and the like. All
    others stay, and the result says why.

    The copy is a model of the same class, for evaluation: with `training=True` nothing is normalized in it any more. A
    normalization that is gone is a `keras.layers.Identity`, or what remains of our layer, its activation: where all of
    them are gone, its file needs nothing but Keras.

    Args:
        model: Functional, Sequential or subclassed; built; it is left as it is. One that is subclassed must have
            `get_config`, as for a file.
        example_inputs: What the model is called with, to compare the two models. Of a subclassed model only a call
            shows the graph: without example inputs its normalizations stay.

    Returns:
        The new model, which normalization went into which layer, and why others did not.

    Raises:
        TypeError: If `model` is not a model, or cannot be copied.
        ValueError: If it is not built, or if only a call can build its copy and there are no example inputs.
        RuntimeError: If the outputs on the example inputs differ by more than rounding explains: relative to the
            largest value 1e-10 in float64, 1e-4 in float32, 0.02 in float16 and 0.1 in bfloat16 (the coarsest type of a
            layer counts); or if they have other shapes or another structure.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2017, section 3.2.
    """
    refuse(model)
    given: Any = model
    if not isinstance(given, keras.Model):
        raise TypeError(
            f"model must be a keras.Model, got a layer, {type(given).__name__}: put it into keras.Sequential"
        )
    if not given.built:
        raise ValueError(f"{given.name} has not seen an input yet: call it on one batch first")
    copy = _copy(given, example_inputs)
    changed = {name for name, layer in named_layers(given).items() if "call" in vars(layer)}
    folding = _Folding(copy, example_inputs, changed)
    folding.find()
    folding.apply()
    error = None if example_inputs is None else _compare(given, copy, example_inputs)
    return Folded(copy, folding.folded, folding.skipped, error)


def _copy(model: Any, example_inputs: Any) -> Any:
    """A model of the same class with the same weights."""
    try:
        copy = type(model).from_config(model.get_config())
        if not copy.built:
            if example_inputs is not None:
                copy(example_inputs, training=False)
            else:
                copy.build_from_config(model.get_build_config())
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} cannot be copied, which takes get_config and from_config, as for a file: {error}"
        ) from error
    if not all(layer.built for layer in copy._flatten_layers()):
        raise ValueError(f"{model.name} has layers that only a call builds: give example inputs")
    copy.set_weights(model.get_weights())
    return copy


# --- What goes where --------------------------------------------------------------------------------------------------


class _Folding:
    """Which normalizations go into which layers of a model that may be changed.

    Attributes:
        folded: What each normalization goes into.
        skipped: Why each of the others stays.
    """

    def __init__(self, model: Any, example_inputs: Any, changed: set[str]) -> None:
        self.names = {id(layer): name for name, layer in named_layers(model).items()}
        self.layers = named_layers(model)
        self.changed = changed
        self.graphs, self.closed = graphs(model, example_inputs)
        self.calls = sum((graph.calls() for graph in self.graphs), Counter[int]())
        self.read = {key for graph in self.graphs for key in graph.variables()}
        self.maps: dict[int, LinearMap] = {}
        self.gone: set[int] = set()
        self.folded: dict[str, str] = {}
        self.skipped: dict[str, str] = {}

    def find(self) -> None:
        """Decide: into the layers before, in their order, then into those after, from the last one on."""
        left: dict[str, tuple[Any, Graph, Any]] = {}
        for name, layer in self.layers.items():
            if not isinstance(layer, layers.BatchNormalization):
                continue
            try:
                graph, node = self._place(layer)
                self._check(name, layer, node)
                left[name] = layer, graph, node
                self.folded[name] = self.names[id(self._into_before(graph, node, layer))]
            except Unproven as reason:
                self.skipped[name] = str(reason)
        for name, (layer, graph, node) in reversed(left.items()):
            if name in self.skipped:
                try:
                    self.folded[name] = self.names[id(self._into_after(graph, node, layer))]
                    del self.skipped[name]
                except Unproven as reason:
                    self.skipped[name] += f", and {reason}"
        self.folded, self.skipped = (
            {name: found[name] for name in self.layers if name in found} for found in (self.folded, self.skipped)
        )

    def apply(self) -> None:
        """Change the weights, and take out the normalizations."""
        for map in self.maps.values():
            map.write()
        for name in self.folded:
            _retire(self.layers[name])

    def _place(self, layer: Any) -> tuple[Graph, Any]:
        if id(layer) in self.closed:
            raise Unproven(self.closed[id(layer)])
        count = self.calls[id(layer)]
        if count != 1:
            raise Unproven(f"is called {count} times" if count else "is never called")
        graph = next(graph for graph in self.graphs if graph.call(layer) is not None)
        return graph, graph.call(layer)

    def _check(self, name: str, layer: Any, node: Any) -> None:
        """Why a normalization must stay, by itself."""
        if type(layer) not in (layers.BatchNormalization, BatchNormalization) or name in self.changed:
            raise Unproven(f"is a {type(layer).__name__} with a call of its own")
        if node.arguments.kwargs.get("training") or True in node.arguments.args[1:]:
            raise Unproven("is told to train, whatever the model does")
        self._is_read(layer, "has")
        values = {name: getattr(layer, name) for name in ("moving_mean", "moving_variance", "gamma", "beta")}
        for name, variable in values.items():
            if variable is not None and not np.isfinite(numbers(variable)).all():
                raise Unproven(f"has a {name} that is not finite")
        if not (numbers(layer.moving_variance) + layer.epsilon > 0).all():
            raise Unproven("has a moving_variance that, with epsilon, is not positive")

    def _is_read(self, layer: Any, said: str) -> None:
        if any(id(variable) in self.read for variable in layer.variables):
            raise Unproven(f"{said} variables that something else reads")

    def _map(self, layer: Any, where: str) -> LinearMap:
        """The linear map, if it may change."""
        said = f"{type(layer).__name__} {where} it"
        if not is_linear(layer) or self.names.get(id(layer)) in self.changed:
            raise Unproven(f"{where} it is {_a(type(layer).__name__)}, which it cannot go into")
        self._is_read(layer, f"{said} has")
        if self.calls[id(layer)] != 1:
            raise Unproven(f"{said} is called {self.calls[id(layer)]} times")
        map = self.maps.get(id(layer)) or LinearMap(layer)
        if not map.plain:
            raise Unproven(f"{said} is quantized, or has weights that are not its own")
        return map

    def _silent(self, layer: Any) -> bool:
        if id(layer) in self.gone:
            return True
        linear = type(layer) is layers.Activation and layer.activation is keras.activations.linear
        return (type(layer) in SILENT or linear) and self.names.get(id(layer)) not in self.changed

    def _into_before(self, graph: Graph, node: Any, layer: Any) -> Any:
        maker = graph.before(node)
        while maker is not None and self._silent(maker.operation):
            maker = graph.before(maker)
        if maker is None or isinstance(maker.operation, layers.InputLayer):
            raise Unproven("nothing that it could go into comes before it")
        map = self._map(maker.operation, "before")
        if not map.bare:
            raise Unproven(f"{type(maker.operation).__name__} before it has an activation of its own")
        scale, shift = _scale_and_shift(layer)
        rank = len(node.outputs[0].shape)
        if map.axis % rank != layer.axis % rank or map.channels != len(scale):
            raise Unproven(f"{type(maker.operation).__name__} before it has its {map.channels} channels elsewhere")
        self._accept(map, lambda: map.then(scale, shift))
        if getattr(layer, "activation", None) is None or layer.activation.is_none:
            self.gone.add(id(layer))
        return maker.operation

    def _into_after(self, graph: Graph, node: Any, layer: Any) -> Any:
        if type(layer) is BatchNormalization and not layer.activation.is_none:
            raise Unproven("what comes after it is its own activation")
        scale, shift = _scale_and_shift(layer)
        axis, user = layer.axis % len(node.outputs[0].shape), graph.after(node)
        while True:
            operation, (tensor,) = user.operation, user.arguments.keras_tensors
            rank = len(tensor.shape)
            if type(operation) is layers.Flatten and operation.data_format == "channels_last":
                if None in tensor.shape[1:]:
                    raise Unproven("Flatten after it has inputs of any size")
                inner, outer = int(np.prod(tensor.shape[axis + 1 :])), int(np.prod(tensor.shape[1:axis]))
                scale, shift = (np.tile(np.repeat(values, inner), outer) for values in (scale, shift))
                axis = 1
            elif type(operation) in POOLING:
                if axis != (1 if operation.data_format == "channels_first" else rank - 1):
                    raise Unproven(f"{type(operation).__name__} after it has its channels elsewhere")
                axis = axis if operation.keepdims else 1
            elif not self._silent(operation):
                break
            user = graph.after(user)
        map = self._map(operation, "after")
        channels = 1 if map.axis == 1 else rank - 1
        if axis != channels or not map.takes(len(scale)):
            raise Unproven(
                f"{type(operation).__name__} after it pads with zeros, or does not take its channels one by one"
            )
        self._accept(map, lambda: map.after(scale, shift))
        self.gone.add(id(layer))
        return operation

    def _accept(self, map: LinearMap, change: Any) -> None:
        before = map.kernel, map.bias.copy()
        change()
        if not map.fits():
            map.kernel, map.bias = before
            raise Unproven(f"{type(map.layer).__name__} beside it would have weights that are not finite")
        self.maps[id(map.layer)] = map


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _scale_and_shift(layer: Any) -> tuple[Array, Array]:
    scale = reciprocal_std(numbers(layer.moving_variance), layer.epsilon)
    if layer.gamma is not None:
        scale = scale * numbers(layer.gamma)
    shift = -numbers(layer.moving_mean) * scale
    return scale, shift if layer.beta is None else shift + numbers(layer.beta)


def _retire(layer: Any) -> None:
    """Leave of a normalization its activation, in place: the graph, and who else holds it, have this object."""
    activation = layer.activation if type(layer) is BatchNormalization else Activation()
    same = {"name": layer.name, "dtype": layer.dtype_policy.name}
    rest: Any
    if activation.is_none:
        rest = layers.Identity(**same)
    elif isinstance(activation.config, list):
        name, parameter = activation.config
        rest = layers.LeakyReLU(parameter, **same) if name == "leaky_relu" else layers.ELU(parameter, **same)
    else:
        rest = layers.Activation(keras.activations.get(activation.config), **same)
    rest.built = True
    kept = {name: layer.__dict__[name] for name in GRAPH if name in layer.__dict__}
    layer.__class__ = type(rest)
    layer.__dict__.clear()
    layer.__dict__.update(rest.__dict__ | kept)
    for node in layer._inbound_nodes:  # the graph says how it was called: with a mask, or told to evaluate
        node.arguments = type(node.arguments)(node.arguments.keras_tensors[0])


# --- The same outputs? ------------------------------------------------------------------------------------------------


def _compare(model: Any, copy: Any, example_inputs: Any) -> float | None:
    """The largest difference in the outputs of two models, each tensor's relative to its largest value."""
    outputs = [one(example_inputs, training=False) for one in (model, copy)]
    before, after = (tree.flatten(output) for output in outputs)
    shapes, new_shapes = ([tuple(y.shape) for y in found] for found in (before, after))
    if shapes != new_shapes:
        raise RuntimeError(f"the folded model's outputs are not of the same shapes: {new_shapes}, not {shapes}")
    types = {layer.compute_dtype for layer in model._flatten_layers()}
    limit = max((ROUNDING[name] for name in types if name in ROUNDING), default=1e-4)
    error = max((difference(numbers(a), numbers(b)) for a, b in zip(before, after, strict=True)), default=None)
    if error is not None and not error <= limit:
        raise RuntimeError(
            f"the folded model's outputs on the example inputs differ by {error:.1e} of the largest, where rounding "
            f"explains {limit:.1e}: this model does something that its graph does not show, and must not be folded"
        )
    return error
