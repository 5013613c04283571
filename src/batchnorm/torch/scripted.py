"""Substitutes that `torch.jit.script` compiles for methods whose Python it does not support."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["activate", "compiled_as"]

Method = TypeVar("Method", bound=Callable[..., Any])


def compiled_as(source: Callable[..., Any]) -> Callable[[Method], Method]:
    """Let `torch.jit.script` compile `source` instead of a method, which does not change otherwise.

    The compiler reads the source of the function that a method claims to wrap, but looks up names where the method is
    defined.
    """

    def decorate(method: Any) -> Any:
        method.__signature__ = inspect.signature(method)  # otherwise it would be that of `source`
        method.__wrapped__ = source
        return method

    return decorate


def activate(z: Tensor, name: str, parameter: float) -> Tensor:
    """`act(z)`: `definition.ACTIVATIONS` once more, because scripts can neither look up functions nor call lambdas."""
    if name == "relu":
        return torch.relu(z)
    if name == "relu6":
        return F.relu6(z)
    if name == "leaky_relu":
        return F.leaky_relu(z, parameter)
    if name == "silu":
        return F.silu(z)
    if name == "hardswish":
        return F.hardswish(z)
    if name == "elu":
        return F.elu(z, parameter)
    if name == "sigmoid":
        return torch.sigmoid(z)
    if name == "tanh":
        return torch.tanh(z)
    if name == "gelu":
        return F.gelu(z)
    return z
