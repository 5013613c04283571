"""Activations by their Keras names, and which of them the kernels can fuse."""

from collections.abc import Callable, Hashable
from typing import Any

import keras
from keras import layers, ops

from batchnorm.definition import ActivationSpec, parse_activation

__all__ = ["Activation", "KerasActivation"]

KerasActivation = ActivationSpec | Callable[[Any], Any]
"""How a user names an activation: as in Keras, or `("leaky_relu", slope)`, `("elu", alpha)`."""

FUSED: dict[str, ActivationSpec] = {
    "linear": None,
    "relu": "relu",
    "relu6": "relu6",
    "leaky_relu": ("leaky_relu", 0.2),
    "silu": "silu",
    "swish": "silu",
    "hard_silu": "hardswish",
    "hard_swish": "hardswish",
    "elu": ("elu", 1.0),
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "gelu": "gelu",
}
"""The activations that the kernels compute, by Keras' names, with the default parameters of `keras.activations`."""

OTHER_NAMES = {"hardswish": "hard_swish", "none": None, "linear": None}
"""The names of `batchnorm.torch` that differ from Keras', and the names of the identity."""

WITH_PARAMETER: dict[str, Callable[[Any, float], Any]] = {
    "leaky_relu": lambda z, slope: ops.leaky_relu(z, negative_slope=slope),
    "elu": lambda z, alpha: ops.elu(z, alpha=alpha),
}

OPERATIONS = {getattr(ops, name): name for name in FUSED if hasattr(ops, name) and name != "gelu"}
"""Functions of `keras.ops` that compute the same; `keras.ops.gelu` is an approximation."""

RECTIFIERS = {(None, 0.0, 0.0): "relu", (6.0, 0.0, 0.0): "relu6"}
"""What `ReLU(max_value, negative_slope, threshold)` is called."""

LAYERS: dict[type, Callable[[Any], KerasActivation]] = {
    layers.Activation: lambda layer: layer.activation,
    layers.ELU: lambda layer: ("elu", float(layer.alpha)),
    layers.LeakyReLU: lambda layer: ("leaky_relu", float(layer.negative_slope)),
    layers.ReLU: lambda layer: RECTIFIERS.get((layer.max_value, layer.negative_slope, layer.threshold), layer),
}
"""What layers compute, by names and functions where there are some. Exactly these types: a subclass may differ."""


class Activation:
    """An activation: Keras' function, its entry in a config, and its name in the kernels.

    Args:
        given: None, a name that `keras.activations.get` knows, a function, a layer, or `("leaky_relu", slope)` or
            `("elu", alpha)`. "hardswish" and "none" work as well.

    Attributes:
        fused: The activation as the kernels take it; None for the identity, and where they cannot compute it.
        is_fused: Whether the kernels compute it.
        function: What computes it on any backend.
        layer: The layer that computes it, with its weights if it has any; None if a function does.

    Raises:
        ValueError: If the activation is unknown.
        TypeError: If it is a class.
    """

    def __init__(self, given: Any = None) -> None:
        if isinstance(given, type):
            raise TypeError(f"activation must be a function or a layer, got a class: write {given.__name__}()")
        if isinstance(given, dict):  # of a saved config
            given = keras.activations.get(given)
        given = LAYERS.get(type(given), lambda given: given)(given)
        self.layer = given if isinstance(given, layers.Layer) else None
        if isinstance(given, list | tuple):
            name, parameter = parse_activation(tuple(given))
            if name not in WITH_PARAMETER:
                raise ValueError(f"activation {name!r} takes no parameter, got {given!r}")
            function = WITH_PARAMETER[name]
            self._pair: list[Any] | None = [name, parameter]
            self.fused: ActivationSpec = (name, parameter)
            self.is_fused = True
            self.function: Callable[[Any], Any] = lambda z: function(z, parameter)
            return
        self._pair = None
        if isinstance(given, str):
            given = OTHER_NAMES.get(given, given)
        if isinstance(given, Hashable):
            given = OPERATIONS.get(given, given)
        self.function = keras.activations.get(given)
        found = next((name for name in FUSED if keras.activations.get(name) is self.function), None)
        self.fused = None if found is None else FUSED[found]
        self.is_fused = found is not None

    @property
    def config(self) -> Any:
        """The entry in a saved config.

        Raises:
            ValueError: If a file would say the name of another function.
        """
        if self._pair is not None:
            return self._pair
        if self.is_none:
            return None
        config = keras.activations.serialize(self.function)
        if isinstance(config, str) and keras.activations.get(config) is not self.function:
            raise ValueError(
                f"the activation {self.function!r} would be saved under the name {config!r}, which is another function "
                "in Keras: register it with keras.saving.register_keras_serializable, under a name of its own"
            )
        return config

    @property
    def is_none(self) -> bool:
        """Whether this is the identity."""
        return self.is_fused and self.fused is None

    def __call__(self, z: Any) -> Any:
        """`act(z)`."""
        return z if self.is_none else self.function(z)
