"""Activations as a user writes them, and what computes each: a kernel, by its name, or a call after the normalization.

`resolve` is the one place that tells these apart. It is asked in every call, so that a hook on an activation, or a
function that somebody has put in the place of PyTorch's, is seen from then on.
"""

import functools
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from batchnorm.definition import ActivationSpec, parse_activation

__all__ = [
    "ACTIVATIONS", "FUNCTIONS", "IN_PLACE", "METHODS", "NONE", "Activation", "activate", "is_activation", "is_watched",
    "parsed", "recognize", "resolve", "said",
]  # fmt: skip

Activation = ActivationSpec | Callable[[Tensor], Tensor]
"""How a user writes an activation: None, a name, `(name, parameter)`, a module, or any other function of a tensor."""

Call = Callable[[Tensor], Tensor]

NONE: dict[str, Any] = {}
"""No named arguments. (A read-only mapping would not be empty in compiled graphs.)"""

# --- By name ----------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Any] = {
    "none": lambda z, _: z,
    "relu": lambda z, _: torch.relu(z),
    "relu6": lambda z, _: F.relu6(z),
    "leaky_relu": F.leaky_relu,
    "silu": lambda z, _: F.silu(z),
    "hardswish": lambda z, _: F.hardswish(z),
    "elu": F.elu,
    "sigmoid": lambda z, _: torch.sigmoid(z),
    "tanh": lambda z, _: torch.tanh(z),
    "gelu": lambda z, _: F.gelu(z),
}

IN_PLACE: dict[str, Any] = {
    "relu": lambda z, _: torch.relu_(z),
    "relu6": lambda z, _: F.relu6(z, inplace=True),
    "leaky_relu": lambda z, slope: F.leaky_relu(z, slope, inplace=True),
    "silu": lambda z, _: F.silu(z, inplace=True),
    "hardswish": lambda z, _: F.hardswish(z, inplace=True),
    "elu": lambda z, alpha: F.elu(z, alpha, inplace=True),
    "sigmoid": lambda z, _: torch.sigmoid_(z),
    "tanh": lambda z, _: torch.tanh_(z),
}
"""Those that can be written over `z`."""

parsed = functools.lru_cache(maxsize=256)(parse_activation)
"""`parse_activation`, which remembers; it takes only what is hashable."""


def resolve(activation: Activation) -> tuple[tuple[str, float], Call | None]:
    """What computes an activation.

    Args:
        activation: As a user writes it.

    Returns:
        The name and the parameter of the kernels; and what to call with the normalized values, or None. One of the two
        does nothing.

    Raises:
        ValueError: If a name is unknown.
        TypeError: If the activation is a class.
    """
    if callable(activation):
        named = None if is_watched(activation) else recognize(activation)
        if named is None:
            if isinstance(activation, type):
                raise TypeError(
                    f"activation must be a function or a module, got a class: write {activation.__name__}()"
                )
            return ("none", 0.0), activation
        activation = named
    try:
        return (parse_activation if torch.compiler.is_compiling() else parsed)(activation), None
    except TypeError:  # it is not hashable
        return parse_activation(activation), None


def activate(z: Tensor, activation: Activation) -> Tensor:
    """`act(z)`, by PyTorch's own operations."""
    (name, parameter), then = resolve(activation)
    y: Tensor = ACTIVATIONS[name](z, parameter) if then is None else then(z)
    return y


def said(activation: Any) -> str:
    """An activation in a sentence."""
    if isinstance(activation, nn.Module | str | tuple) or activation is None:
        return repr(activation)
    return str(getattr(activation, "__name__", activation))


# --- As PyTorch spells them -------------------------------------------------------------------------------------------

MODULES: dict[type[nn.Module], Callable[[Any], ActivationSpec]] = {
    nn.ReLU: lambda _: "relu",
    nn.ReLU6: lambda _: "relu6",
    nn.LeakyReLU: lambda module: ("leaky_relu", module.negative_slope),
    nn.SiLU: lambda _: "silu",
    nn.Hardswish: lambda _: "hardswish",
    nn.ELU: lambda module: ("elu", module.alpha),
    nn.Sigmoid: lambda _: "sigmoid",
    nn.Tanh: lambda _: "tanh",
    nn.GELU: lambda module: "gelu" if module.approximate == "none" else None,
}
"""Exactly these types: a subclass may compute something else."""

_COMPUTED: dict[type[nn.Module], tuple[Any, Any, str, Any]] = {
    kind: (kind.forward, place, name, getattr(place, name))
    for kind, place, name in (
        (nn.ReLU, F, "relu"),
        (nn.ReLU6, F, "hardtanh"),
        (nn.LeakyReLU, F, "leaky_relu"),
        (nn.SiLU, F, "silu"),
        (nn.Hardswish, F, "hardswish"),
        (nn.ELU, F, "elu"),
        (nn.Sigmoid, torch, "sigmoid"),
        (nn.Tanh, torch, "tanh"),
        (nn.GELU, F, "gelu"),
    )
}
"""By their types: their `forward`, and the function that it calls. Somebody may put others in the place of these."""

FUNCTIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    **{function: (function.__name__, ("inplace",)) for function in (F.relu, F.relu6, F.silu, F.hardswish)},
    **dict.fromkeys((torch.relu, torch.relu_, F.relu_), ("relu", ())),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_, F.sigmoid), ("sigmoid", ())),
    **dict.fromkeys((torch.tanh, torch.tanh_, F.tanh), ("tanh", ())),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), ("leaky_relu", ("negative_slope", "inplace"))),
    **dict.fromkeys((F.elu, F.elu_), ("elu", ("alpha", "inplace"))),
    F.gelu: ("gelu", ()),
}
"""Functions of a tensor: the activation's name, and the names of the function's other arguments in order."""

METHODS = {name + suffix: name for name in ("relu", "sigmoid", "tanh") for suffix in ("", "_")}
"""Methods of a tensor."""

_METHODS = {name: getattr(Tensor, name) for name in METHODS}
_CALL = nn.Module.__call__


def recognize(activation: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] = NONE) -> ActivationSpec:
    """The activation that `activation(z, *args, **kwargs)` computes, or `z.<activation>(...)`; None without a kernel.

    Args:
        activation: A module, a function, or the name of a method of tensors.
        args: Its arguments after `z`.
        kwargs: Its named arguments.
    """
    if isinstance(activation, nn.Module):
        module = MODULES.get(type(activation)) if _is_original(type(activation)) else None
        spec = None if module is None or args or kwargs else module(activation)
        return spec if not isinstance(spec, tuple) or isinstance(spec[1], Real) else None
    if isinstance(activation, str):
        replaced = getattr(Tensor, activation, None) is not _METHODS.get(activation)
        return None if args or kwargs or replaced else METHODS.get(activation)
    try:
        name, parameters = FUNCTIONS[activation]
    except (KeyError, TypeError):  # a TypeError: it is not hashable
        return None
    if not args and not kwargs:
        return name
    given = dict(zip(parameters, args, strict=False)) | kwargs
    given.pop("inplace", None)
    if len(args) > len(parameters) or given.pop("approximate", "none") != "none":
        return None
    value = given.pop(parameters[0], None) if parameters else None
    if given or not isinstance(value, Real | None):
        return None
    return name if value is None else (name, float(value))


def _is_original(kind: type[nn.Module]) -> bool:
    """Whether modules of this type compute what PyTorch's compute: nothing has been put in the place of its code."""
    forward, place, name, function = _COMPUTED.get(kind, (None, F, "relu", None))
    return kind.forward is forward and getattr(place, name) is function


def is_activation(module: Any) -> bool:
    """Whether this is one of PyTorch's activation modules, with or without a kernel."""
    return type(module).__module__ == nn.ReLU.__module__


def is_watched(module: Any) -> bool:
    """Whether calling this runs more than the `forward` of its class, as far as it is a module."""
    return isinstance(module, nn.Module) and bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or type(module).__call__ is not _CALL
        or _has_any_global_hook()
    )
