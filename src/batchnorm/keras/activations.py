"""Activations by their Keras names, and which of them the kernels can fuse."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

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


class Activation:
    """An activation: Keras' function, its entry in a config, and its name in the kernels.

    Args:
        given: None, a name that `keras.activations.get` knows, a function, or `("leaky_relu", slope)` or
            `("elu", alpha)`. "hardswish" and "none" work as well.

    Attributes:
        config: The entry in a saved config.
        fused: The activation in the form of the kernels; None for the identity, or if they cannot compute it.
        is_fused: Whether the kernels compute it.

    Raises:
        ValueError: If the activation is unknown.
    """

    def __init__(self, given: Any = None) -> None:
        if isinstance(given, list | tuple):
            name, parameter = parse_activation(tuple(given))
            if name not in WITH_PARAMETER:
                raise ValueError(f"activation {name!r} takes no parameter, got {given!r}")
            function = WITH_PARAMETER[name]
            self.config: Any = [name, parameter]
            self.fused: ActivationSpec = (name, parameter)
            self.is_fused = True
            self._function: Callable[[Any], Any] = lambda z: function(z, parameter)
            return
        if isinstance(given, str):
            given = OTHER_NAMES.get(given, given)
        self._function = keras.activations.get(given)
        self.config = None if given is None else keras.activations.serialize(self._function)
        found = next((name for name in FUSED if keras.activations.get(name) is self._function), None)
        self.fused = None if found is None else FUSED[found]
        self.is_fused = found is not None

    @property
    def is_none(self) -> bool:
        """Whether this is the identity."""
        return self.is_fused and self.fused is None

    def __call__(self, z: Any) -> Any:
        """`act(z)`."""
        return z if self.is_none else self._function(z)
