"""A PyTorch layer becomes ours, in place, and back.

The layer stays the object that it is, with its parameters, buffers, hooks and mode; only its class changes. A subclass
of a PyTorch layer stays a subclass of it: it gets a class of the same name, derived from ours and from its own.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.torch.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    SyncBatchNorm,
    _Layer,
)
from batchnorm.torch.sources import RunningStatistics, Statistics, SyncStatistics

__all__ = ["FORWARDS", "OURS", "THEIRS", "Before", "adopt", "before_freeze", "hindrance", "original", "release", "take"]

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}
"""PyTorch's classes, and ours for each."""

THEIRS = {ours: theirs for theirs, ours in OURS.items()}

FORWARDS = {_BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNorm1d.forward}
"""The forwards that normalize the second axis of exactly what they are given."""

ATTRIBUTES = ("activation", "statistics", "save_memory", "num_batches_skipped", "_before_freeze")
"""What our layers have and PyTorch's do not."""


# --- Into ours and back -----------------------------------------------------------------------------------------------


def hindrance(layer: nn.Module) -> str:
    """Why a PyTorch batch normalization cannot become ours, to be read after its name; empty if it can."""
    kind = type(layer)
    if kind in OURS:
        return ""
    if is_parametrized(layer):
        return "is parametrized, which has changed its class"
    if issubclass(kind, nn.SyncBatchNorm):
        return "is of a subclass of SyncBatchNorm, and only SyncBatchNorm itself can become ours"
    if issubclass(kind, _LazyNormBase):
        return "is of a subclass of a lazy layer: call the model on one batch first"
    for name in ATTRIBUTES:
        if hasattr(layer, name):
            return f"has an attribute {name}, which means something else in our layers"
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return f"is pickled by a method of {kind.__name__}"
    try:
        _ours(kind)
    except TypeError as error:
        return f"is of a class that cannot have a subclass: {error}"
    return ""


def adopt(layer: nn.Module) -> None:
    """Make a PyTorch layer ours, in place. There must be no `hindrance`."""
    layer.__class__ = _ours(type(layer))
    layer.activation = None  # type: ignore[assignment]
    if isinstance(layer, SyncBatchNorm):
        layer._group = vars(layer).pop("process_group")
        layer.statistics = SyncStatistics(layer._group)
    else:
        layer.statistics = None  # type: ignore[assignment]
    device = next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), None)
    layer.register_buffer("num_batches_skipped", torch.zeros((), dtype=torch.long, device=device), persistent=False)


def original(layer: nn.Module) -> type[nn.Module] | None:
    """The PyTorch class to which a layer of ours goes back; None if it has none, as a user's subclass of ours."""
    return THEIRS.get(type(layer)) or vars(type(layer)).get("_original")


def release(layer: Any) -> None:
    """Make our layer PyTorch's, in place. It must have an `original` class."""
    kind = original(layer)
    assert kind is not None
    if "_group" in vars(layer):
        vars(layer)["process_group"] = vars(layer).pop("_group")
    vars(layer).pop("_before_freeze", None)
    vars(layer).pop("save_memory", None)
    del layer.num_batches_skipped, layer.activation, layer.statistics
    layer.__class__ = kind


def _ours(kind: Any) -> type[nn.Module]:
    """Our class for one of PyTorch's or a subclass of it.

    Raises:
        TypeError: If the class cannot have a subclass.
    """
    return OURS[kind] if kind in OURS else _derived(kind)


@cache
def _derived(kind: Any) -> type[nn.Module]:
    namespace = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    ours: type[nn.Module] = type(kind)(
        kind.__name__, (_Layer, kind), namespace | {"_original": kind, "__reduce_ex__": _reduce}
    )
    return ours


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle by the class that can be imported."""
    reduced: Any = object.__reduce_ex__(self, max(2, protocol))
    return _restore, (self._original,), *reduced[2:]


def _restore(kind: type[nn.Module]) -> Any:
    ours = _ours(kind)
    return ours.__new__(ours)


# --- Statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Before:
    """What a layer was before it was frozen. `freeze` keeps it on the layer, as `_before_freeze`.

    Attributes:
        statistics: Where its statistics came from.
        ours: Whether it was a layer of ours, and stays one.
        learned: The names of the parameters that stopped learning.
    """

    statistics: Any
    ours: bool
    learned: tuple[str, ...]


def before_freeze(layer: nn.Module) -> Before | None:
    """What `freeze` recorded; None if it did not freeze the layer, or if the layer has got statistics since."""
    before: Before | None = vars(layer).get("_before_freeze")
    return before if before is not None and layer.statistics == RunningStatistics() else None


def take(layer: Any, statistics: Statistics | None) -> None:
    """Give a layer of ours statistics; None leaves its own. A frozen layer takes them when it is unfrozen, as ours."""
    before = before_freeze(layer)
    if before is not None:
        layer._before_freeze = replace(before, ours=True, statistics=statistics or before.statistics)
    elif statistics is not None:
        layer.statistics = statistics
