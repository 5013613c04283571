"""Activations by the names that Keras knows, and those of them that the kernels compute."""

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
"""What the kernels can compute, by Keras' names. Parameters are those of `keras.activations`."""

OTHER_NAMES = {"hardswish": "hard_swish", "none": None, "linear": None}
"""Those of `batchnorm.torch`, and what does nothing."""

WITH_PARAMETER: dict[str, Callable[[Any, float], Any]] = {
    "leaky_relu": lambda z, slope: ops.leaky_relu(z, negative_slope=slope),
    "elu": lambda z, alpha: ops.elu(z, alpha=alpha),
}


class Activation:
    """An activation as Keras computes it, how it is written in a config, and how the kernels know it.

    Args:
        given: None, a name that `keras.activations.get` knows, a function, or `("leaky_relu", slope)` or
            `("elu", alpha)`. "hardswish" and "none" are understood as well.

    Attributes:
        config: What goes into a file.
        fused: What the kernels compute; None if they compute all but this.
        is_fused: Whether they compute it.

    Raises:
        ValueError: If there is no such activation.
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
        """Whether there is nothing to compute."""
        return self.is_fused and self.fused is None

    def __call__(self, z: Any) -> Any:
        """`act(z)`."""
        return z if self.is_none else self._function(z)
