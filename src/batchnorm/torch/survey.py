"""Which batch normalizations a model has, and which of them a tool may change.

A layer counts as a batch normalization if it has the forward of PyTorch's class, of ours, or of another known class
(`adapters`). A subclass that inherits the forward counts; one with a forward of its own does not, because it may
compute something else.
"""

from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.torch.adapters import adapter, forward_of, is_always_frozen, is_batch_norm, resembles
from batchnorm.torch.fuse import is_ours
from batchnorm.torch.sources import RunningStatistics

__all__ = ["Found", "deviation", "expect_module", "is_frozen", "is_unsized", "keeps_statistics", "survey"]


class Found(NamedTuple):
    """One batch normalization of a model.

    Attributes:
        name: Its name, as in `named_modules`; empty if it is the model itself.
        layer: The layer.
        ours: Whether its class is ours, or inherits our forward.
        reason: Why it may compute something else, as a phrase that follows its name; empty if it does not.
    """

    name: str
    layer: Any
    ours: bool
    reason: str


def expect_module(model: Any) -> None:
    """Raise an error unless `model` is a module.

    Raises:
        TypeError: If it is not one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def survey(model: nn.Module) -> list[Found]:
    """All batch normalizations of a model and everything that resembles one, each once, as in `named_modules`."""
    expect_module(model)
    return [
        Found(name, module, is_ours(module), deviation(module))
        for name, module in model.named_modules()
        if is_batch_norm(module) or resembles(module)
    ]


def deviation(layer: nn.Module) -> str:
    """Why a layer may not compute a batch normalization, as a phrase that follows its name; empty if it does."""
    kind, known = type(layer), adapter(type(layer))
    if known is not None:
        for name in ("weight", "bias", "running_mean", "running_var", *(["eps"] if known.eps is None else [])):
            if not hasattr(layer, name):
                return f"has no attribute {name}"
    elif not is_ours(layer):
        return f"has a forward of its own, {forward_of(kind).__name__}.forward"
    return "has had its forward replaced" if "forward" in vars(layer) else ""


def is_unsized(layer: nn.Module) -> bool:
    """Whether a layer is lazy and has not seen its first batch."""
    tensors = (*layer._parameters.values(), *layer._buffers.values())
    return any(tensor is not None and is_lazy(tensor) for tensor in tensors)


def keeps_statistics(layer: Any) -> bool:
    """Whether a layer has running statistics."""
    return all(getattr(layer, name, None) is not None for name in ("running_mean", "running_var"))


def is_frozen(layer: Any) -> bool:
    """Whether a layer normalizes by its running statistics in training as well, without changing them."""
    return layer.statistics == RunningStatistics() if is_ours(layer) else is_always_frozen(type(layer))
