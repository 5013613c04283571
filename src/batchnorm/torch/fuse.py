"""Compute a layer, a residual and an activation in one pass if the result is the same, otherwise one after the other.

`follow(layer, x, residual, add, activation)` always means `activation(layer(x) + residual)`. Each call decides anew
whether one kernel may compute all of it. If hooks see a value in between, the residual has another shape or type, the
activation has no kernel, or the layer is not ours, the three are called one after the other. So no change to a model
between two calls can make the result wrong.
"""

import operator
from collections.abc import Callable, Iterable
from itertools import zip_longest
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from batchnorm.definition import ActivationSpec
from batchnorm.torch.adapters import Adapter, adapter
from batchnorm.torch.layers import BatchNorm1d, _Layer

__all__ = [
    "FUNCTIONS",
    "METHODS",
    "Followed",
    "added_activation",
    "can_wait",
    "follow",
    "follow_right",
    "is_activation",
    "is_identity",
    "is_ours",
    "obstacle",
    "obstacle_inside",
    "recognize",
    "sequence",
    "steps",
]

NONE: Any = MappingProxyType({})

# --- Activations, as PyTorch spells them ------------------------------------------------------------------------------

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
"""By type, without subclasses, which may compute something else."""

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
"""The `forward` of each type, and the function that it calls: either may have been replaced."""

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

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""The types, without subclasses, that return their input in evaluation."""
_METHODS = {name: getattr(Tensor, name) for name in METHODS}
_CALL = nn.Module.__call__


def recognize(activation: Any, args: tuple[Any, ...] = (), kwargs: Any = NONE) -> ActivationSpec:
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
    """Whether modules of this type still run PyTorch's own code."""
    forward, place, name, function = _COMPUTED.get(kind, (None, F, "relu", None))
    return kind.forward is forward and getattr(place, name) is function


def is_activation(module: Any) -> bool:
    """Whether this is one of PyTorch's activation modules, with or without a kernel."""
    return type(module).__module__ == nn.ReLU.__module__


def is_identity(module: Any) -> bool:
    """Whether calling this module does nothing but return its input."""
    plain = type(module) is nn.Identity or (type(module) in DROPOUTS and not module.training)
    return plain and not _is_watched(module)


def is_ours(layer: Any) -> bool:
    """Whether this is a batch normalization of this package with its original `forward`."""
    return getattr(type(layer), "forward", None) in (BatchNorm1d.forward, Followed.forward)


# --- The call ---------------------------------------------------------------------------------------------------------

ADD: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "+=": operator.iadd,
    "r+": lambda y, residual: residual + y,
}
"""How the source adds the residual. Without fusion, it is added in the same way."""


def follow(layer: Any, x: Any, residual: Any, add: str | None, activation: Any, *args: Any, **kwargs: Any) -> Any:
    """`activation(layer(x) + residual, *args, **kwargs)`, in one pass if possible.

    Args:
        layer: The layer: one of ours, or any other callable.
        x: Its input.
        residual: The residual; ignored if `add` is None.
        add: How it is added: `"+"`, `"+="`, `"r+"` (the residual on the left), or None.
        activation: A module, a function, the name of a method of tensors, or None.
        *args: The activation's other arguments.
        **kwargs: The activation's other arguments, by name.

    Returns:
        The result of the three one after the other; the same bits where they are not fused.
    """
    # In a symbolic trace x is no tensor, and the layer and what follows it are recorded separately.
    if (
        isinstance(x, Tensor)
        and (add is None or _fits(residual, x))
        and obstacle(layer, activation, args, kwargs) is None
    ):
        return _in_one_pass(layer, x, residual, recognize(activation, args, kwargs))
    y = layer(x)
    if add is not None:
        y = ADD[add](y, residual)
    if isinstance(activation, str):
        return getattr(y, activation)(*args, **kwargs)
    return y if activation is None else activation(y, *args, **kwargs)


def follow_right(residual: Any, layer: Any, x: Any, activation: Any, *args: Any, **kwargs: Any) -> Any:
    """`activation(residual + layer(x))`: `follow`, with its arguments in the order in which they are evaluated."""
    return follow(layer, x, residual, "r+", activation, *args, **kwargs)


def obstacle(layer: Any, activation: Any, args: tuple[Any, ...] = (), kwargs: Any = NONE) -> str | None:
    """The reason why the layer cannot be fused with what follows it now; None if it can."""
    if torch.compiler.is_compiling():
        return "the compiler fuses on its own"
    if not is_ours(layer):
        return "not a layer of this package"
    if added_activation(layer) is not None or (isinstance(layer, Followed) and steps(layer)):
        return "has an activation of its own"
    if _is_watched(layer):
        return "has hooks"
    return _obstacle_of_activation(activation, args, kwargs)


def _obstacle_of_activation(activation: Any, args: tuple[Any, ...] = (), kwargs: Any = NONE) -> str | None:
    if isinstance(activation, nn.Module) and _is_watched(activation):
        return "what follows has hooks"
    if activation is not None and recognize(activation, args, kwargs) is None:
        return "what follows has no kernel"
    return None


def _is_watched(module: nn.Module) -> bool:
    """Whether calling this module runs more than its class's `forward`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or type(module).__call__ is not _CALL
        or _has_any_global_hook()
    )


def _fits(residual: Any, x: Any) -> bool:
    """Whether the residual is added without broadcasting and type promotion."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype is x.dtype
        and residual.device == x.device
    )


def _in_one_pass(layer: Any, x: Tensor, residual: Tensor | None, activation: ActivationSpec) -> Tensor:
    y: Tensor = layer._run(x, residual, None, activation)
    return y


# --- Layers whose class calls what follows ----------------------------------------------------------------------------


class Followed(_Layer):
    """A layer whose class calls something with the normalized values: `Adapter.then`.

    Each call decides anew, as in `follow`, whether the first of these is computed in the same pass.
    """

    _adapter: Adapter

    def forward(self, input: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """As in our other layers; `activation`, if it has been set, comes before everything else."""
        if isinstance(input, torch.fx.Proxy):
            return super().forward(input, residual=residual, mask=mask)
        following, activation = steps(self), added_activation(self)
        if activation is None and following and obstacle_inside(self) is None:
            activation, *following = recognize(following[0]), *following[1:]
        y = self._run(input, residual, mask, activation)
        for step in following:
            y = step(y)
        return y


def steps(layer: Any) -> list[Any]:
    """What the class of a layer calls with the normalized values, in order, without identities.

    Args:
        layer: A batch normalization, ours or not.
    """
    known = adapter(type(layer))
    found = [] if known is None else [getattr(layer, name, None) for name in known.then]
    return [step for step in found if step is not None and not is_identity(step)]


def obstacle_inside(layer: Any) -> str | None:
    """The reason why a layer cannot be fused now with the first of its `steps`; None if it can."""
    return (
        "the compiler fuses on its own" if torch.compiler.is_compiling() else _obstacle_of_activation(steps(layer)[0])
    )


def added_activation(layer: Any) -> ActivationSpec:
    """The activation that this package has added to a layer of ours, not one that its class calls."""
    taken = isinstance(layer, Followed) and "activation" in type(layer)._adapter.then
    activation: ActivationSpec = None if taken else layer.activation
    return activation


# --- A layer that waits for its residual ------------------------------------------------------------------------------

_FRESH = {
    nn.Linear.forward,
    *(kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    *(kind.forward for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
}
"""The forwards whose result shares no memory with anything else."""


def can_wait(layer: Any, producer: Any) -> bool:
    """Whether the layer may be called later than in the source, after its residual is computed.

    It may if nothing else can reach its input, which the producer returned, and if nothing observes the layer.
    """
    return (
        isinstance(producer, nn.Module)
        and type(producer).forward in _FRESH
        and not _is_watched(producer)
        and obstacle(layer, None) is None
    )


# --- A chain of modules -----------------------------------------------------------------------------------------------


def sequence(modules: Iterable[Any], x: Any) -> Any:
    """Call the modules in order, like `nn.Sequential`, but each layer together with its activation."""
    modules = list(modules)
    done = False
    for module, following in zip_longest(modules, modules[1:]):
        if done:  # this one was fused with the one before
            done = False
        elif recognize(following) is None:
            x = module(x)
        else:
            x = follow(module, x, None, None, following)
            done = True
    return x
