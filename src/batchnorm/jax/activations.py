"""Activations as a user writes them, and what computes each: the formula, by its name, or a call afterwards."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from batchnorm.definition import ActivationSpec, parse_activation
from batchnorm.xla.formula import ACTIVATIONS, arithmetic

__all__ = ["Activation", "activate", "resolve"]

Activation = ActivationSpec | Callable[[Any], Any]
"""How a user writes an activation: None, a name, `(name, parameter)`, a module, or any other function of an array."""

FUNCTIONS: dict[Any, tuple[str, dict[str, float]]] = {
    jax.nn.relu: ("relu", {}),
    jax.nn.relu6: ("relu6", {}),
    jax.nn.leaky_relu: ("leaky_relu", {"negative_slope": 0.01}),
    jax.nn.silu: ("silu", {}),
    jax.nn.hard_silu: ("hardswish", {}),
    jax.nn.elu: ("elu", {"alpha": 1.0}),
    jax.nn.sigmoid: ("sigmoid", {}),
    jnp.tanh: ("tanh", {}),
}
"""JAX's functions, which are also those of `flax.nnx`: the activation's name, and the parameter with its default.

`jax.nn.gelu` is not among them: it is an approximation unless it is told otherwise.
"""


def resolve(activation: Activation) -> tuple[tuple[str, float], Callable[[Any], Any] | None]:
    """What computes an activation.

    Args:
        activation: As a user writes it.

    Returns:
        The name and the parameter of the formula; and what to call with the normalized values, or None. One of the two
        does nothing.

    Raises:
        ValueError: If a name is unknown.
        TypeError: If the activation is a class.
    """
    if not callable(activation):
        return parse_activation(activation), None
    if isinstance(activation, type):
        raise TypeError(f"activation must be a function or a module, got a class: write {activation.__name__}()")
    named = _recognize(activation)
    return (("none", 0.0), activation) if named is None else (named, None)


def activate(z: Any, activation: Activation) -> Any:
    """`act(z)`; one that is known is computed in float32 where `z` is of half precision."""
    (name, parameter), then = resolve(activation)
    if then is not None:
        return then(z)
    return ACTIVATIONS[name](z.astype(arithmetic(z.dtype)), parameter).astype(z.dtype)


def _recognize(function: Any) -> tuple[str, float] | None:
    """The name and the parameter of one of JAX's functions, also with arguments from `functools.partial`."""
    args, given = (), {}
    if isinstance(function, functools.partial):
        function, args, given = function.func, function.args, function.keywords
    if function is jax.nn.gelu:
        return ("gelu", 0.0) if not args and given == {"approximate": False} else None
    try:
        name, parameters = FUNCTIONS[function]
    except (KeyError, TypeError):  # a TypeError: it is not hashable
        return None
    if args or given.keys() - parameters.keys():
        return None
    (value,) = (parameters | given).values() or (0.0,)
    return (name, float(value)) if isinstance(value, int | float) else None
