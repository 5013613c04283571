"""Compute a layer, a residual and an activation in one pass if the result is the same, otherwise one after the other.

`follow(layer, x, residual, add, activation)` always means `activation(layer(x) + residual)`. Each call decides anew
whether one kernel may compute all of it. If hooks see a value in between, the residual has another shape or type, the
activation has no kernel, or the layer is not ours, the three are called one after the other. So no change to a model
between two calls can make the result wrong.
"""

import operator
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.torch.activations import NONE, Activation, is_watched, recognize
from batchnorm.torch.adapters import Adapter, adapter
from batchnorm.torch.layers import BatchNorm1d, _Layer

__all__ = [
    "Followed",
    "added_activation",
    "can_wait",
    "follow",
    "follow_right",
    "is_identity",
    "is_ours",
    "obstacle",
    "obstacle_inside",
    "sequence",
    "steps",
]

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""Exactly these types hand on their input in evaluation."""


def is_identity(module: Any) -> bool:
    """Whether calling this module does nothing but return its input."""
    plain = type(module) is nn.Identity or (type(module) in DROPOUTS and not module.training)
    return plain and not is_watched(module)


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
    if is_watched(layer):
        return "has hooks"
    return _obstacle_of_activation(activation, args, kwargs)


def _obstacle_of_activation(activation: Any, args: tuple[Any, ...] = (), kwargs: Any = NONE) -> str | None:
    if is_watched(activation):
        return "what follows has hooks"
    if activation is not None and recognize(activation, args, kwargs) is None:
        return "what follows has no kernel"
    return None


def _fits(residual: Any, x: Any) -> bool:
    """Whether the residual is added without broadcasting and type promotion."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype is x.dtype
        and residual.device == x.device
    )


def _in_one_pass(layer: Any, x: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
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


def added_activation(layer: Any) -> Activation:
    """The activation that this package has added to a layer of ours; not one that its class calls itself."""
    taken = isinstance(layer, Followed) and "activation" in type(layer)._adapter.then
    activation: Activation = None if taken else layer.activation
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
        and not is_watched(producer)
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
