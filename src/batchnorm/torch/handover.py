"""Attributes that stop PyTorch's tools from losing a part of our layers.

Tools that fuse, synchronize or quantize test `isinstance(module, _BatchNorm)`, and put a layer of their own in the
place of ours. They do not know its activation and its source of statistics, which would be lost silently. Two
attributes notice such a tool before it has changed anything: whatever replaces a batch normalization must read its
`eps`, and quantization sets `qconfig` on every layer.
"""

import sys
from typing import Any

from batchnorm.torch.activations import said

__all__ = ["Eps", "QConfig"]

TOOLS = {
    "torch.nn.modules.batchnorm": (
        "torch.nn.SyncBatchNorm.convert_sync_batchnorm",
        "batchnorm.torch.SyncBatchNorm.convert_sync_batchnorm(model)",
        True,
    ),
    "torch.nn.utils.fusion": ("torch.nn.utils.fusion", "batchnorm.torch.fold(model)", False),
    "torch.utils.mkldnn": ("torch.utils.mkldnn.to_mkldnn", "batchnorm.torch.fold(model) first", False),
    "torch.ao.nn.quantized.modules.batchnorm": ("torch.ao.quantization", "batchnorm.torch.fold(model) first", False),
}
"""For each module that reads `eps`: its tool, what to call instead, and whether the tool's result is trained."""


class Eps:
    """The attribute `eps` of a layer: a number, except for tools that would lose another part of the layer."""

    def __get__(self, layer: Any, kind: Any = None) -> Any:
        """The number.

        Raises:
            RuntimeError: If one of `TOOLS` reads it that would lose an activation or statistics.
        """
        if layer is None:
            return self
        own = vars(layer)
        if (
            getattr(layer, "activation", None) is not None
            or own.get("statistics") is not None
            or hasattr(kind, "_adapter")
        ):
            _refuse(layer, sys._getframe(1).f_globals.get("__name__", ""))
        try:
            return own["eps"]
        except KeyError:
            raise AttributeError(f"{type(layer).__name__} has no eps yet") from None

    def __set__(self, layer: Any, value: float) -> None:
        vars(layer)["eps"] = value

    def __delete__(self, layer: Any) -> None:
        del vars(layer)["eps"]


def _refuse(layer: Any, asking: str) -> None:
    """Raise an error if the module that is reading belongs to a tool that would lose something."""
    if asking not in TOOLS:
        return
    tool, instead, trains = TOOLS[asking]
    followed = getattr(type(layer), "_adapter", None)  # the class of another package, which computes more
    lost = list(followed.then) if followed is not None else []
    if "activation" not in lost and getattr(layer, "activation", None) is not None:
        lost.append(f"activation={said(layer.activation)}")
    lost += [f"statistics={layer.statistics!r}"] if trains and layer.statistics is not None else []
    if lost:
        raise RuntimeError(
            f"{type(layer).__name__}({layer.num_features}): {tool} would lose {' and '.join(lost)}; call {instead}"
        )


class QConfig:
    """The attribute `qconfig`, which tells `torch.ao.quantization` how to quantize a layer; it can only be None."""

    def __get__(self, layer: Any, kind: Any = None) -> Any:
        if layer is None:
            return self
        try:
            return vars(layer)["qconfig"]
        except KeyError:
            raise AttributeError(f"{type(layer).__name__} has no qconfig") from None

    def __set__(self, layer: Any, value: Any) -> None:
        """Set it.

        Raises:
            RuntimeError: If it is not None.
        """
        if value is not None:
            raise RuntimeError(unquantized(layer))
        vars(layer)["qconfig"] = value

    def __delete__(self, layer: Any) -> None:
        del vars(layer)["qconfig"]


def unquantized(layer: Any) -> str:
    """The reason why a layer cannot be quantized, and what to do."""
    problem = f"{type(layer).__name__}({layer.num_features}): torch.ao.quantization supports only PyTorch's own layers"
    if layer.activation is None:
        return f"{problem}; call batchnorm.torch.revert(model) first, or set qconfig = None to leave this one in float"
    return (
        f"{problem}, which have no activation; call batchnorm.torch.fold(model) first, or let a module of its own "
        f"compute activation={said(layer.activation)}"
    )
