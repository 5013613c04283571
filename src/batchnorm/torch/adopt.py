"""Turn a layer of PyTorch or of another known class into ours, in place, and back.

The layer stays the same object, with its parameters, buffers, hooks and mode; only its class changes. A layer whose
class is not PyTorch's remains an instance of that class: it gets a class of the same name, derived from ours and from
its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _LazyNormBase
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.torch.adapters import PLAIN, Adapter, adapter, is_always_frozen
from batchnorm.torch.fuse import Followed, added_activation
from batchnorm.torch.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    SyncBatchNorm,
    _Layer,
    counter,
)
from batchnorm.torch.sources import RunningStatistics, Statistics, SyncStatistics

__all__ = ["OURS", "THEIRS", "Before", "adopt", "before_freeze", "hindrance", "original", "release", "take"]

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

ATTRIBUTES = ("activation", "statistics", "save_memory", "num_batches_skipped", "_before_freeze", "_lent")
"""The attributes that our layers have and PyTorch's lack."""

LENT: dict[str, Callable[[Any, Adapter], Any]] = {
    "num_features": lambda layer, _: len(layer.running_mean),
    "eps": lambda layer, known: _own_eps(layer, known),
    "momentum": lambda *_: 0.1,
    "affine": lambda layer, _: layer.weight is not None,
    "track_running_stats": lambda *_: True,
    "num_batches_tracked": lambda *_: None,
}
"""The attributes that our layers need and some classes lack; such layers have them only while they are ours."""


# --- Into ours and back -----------------------------------------------------------------------------------------------


def hindrance(layer: nn.Module) -> str:
    """Why a batch normalization of a known class cannot become ours, as a phrase after its name; empty if it can."""
    kind, known = type(layer), adapter(type(layer))
    if kind in OURS:
        return ""
    if is_parametrized(layer):
        return "is parametrized, which has changed its class"
    if issubclass(kind, _LazyNormBase):
        return "is of a subclass of a lazy layer: call the model on one batch first"
    assert known is not None
    for name in ATTRIBUTES:
        if name not in known.then and hasattr(layer, name):
            return f"has an attribute {name}, which means something else in our layers"
    if not hasattr(layer, "num_features") and layer.running_mean is None:
        return "has no attribute num_features"
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return f"is pickled by a method of {kind.__name__}"
    try:
        _ours(kind)
    except TypeError as error:
        return f"is of a class that cannot have a subclass: {error}"
    return ""


def adopt(layer: nn.Module) -> None:
    """Turn a layer of a known class into ours, in place. There must be no `hindrance`."""
    layer.__class__ = _ours(type(layer))
    _equip(layer)


def _equip(layer: Any) -> None:
    """Give a layer the attributes that ours have and others do not."""
    known = vars(type(layer)).get("_adapter", PLAIN)
    lent = {name: value(layer, known) for name, value in LENT.items() if not hasattr(layer, name)}
    if lent:
        vars(layer).update(lent, _lent=tuple(lent))
    if "activation" not in known.then:
        layer.activation = None
    layer.statistics = known.statistics
    kind = type(layer)
    if issubclass(kind, SyncBatchNorm):
        layer._group = vars(layer).pop("process_group")
    if issubclass(kind, SyncBatchNorm | nn.SyncBatchNorm):
        layer.statistics = SyncStatistics(layer.process_group)
    device = next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), None)
    layer.num_batches_skipped = counter(device)


def _own_eps(layer: Any, known: Adapter) -> Any:
    """The `eps` of the class itself, which the attribute of our layers hides."""
    own: Any = getattr(vars(type(layer)).get("_original"), "eps", None)
    if isinstance(own, property) and own.fget is not None:
        own = own.fget(layer)
    return known.eps if own is None else own


def original(layer: nn.Module) -> type[nn.Module] | None:
    """The class that a layer of ours had before, or would have had.

    None if there is none: for a user's subclass of ours, and for a layer with an activation that its class lacks.
    """
    if added_activation(layer) is not None:
        return None
    return THEIRS.get(type(layer)) or vars(type(layer)).get("_original")


def release(layer: Any) -> None:
    """Undo `adopt`, in place. The layer must have an `original` class."""
    kind = original(layer)
    assert kind is not None
    if "_group" in vars(layer):
        vars(layer)["process_group"] = vars(layer).pop("_group")
    lent = vars(layer).get("_lent", ())
    for name in ("_before_freeze", "activation", "statistics", "save_memory", *lent, "_lent"):
        if name != "activation" or "activation" not in vars(type(layer)).get("_adapter", PLAIN).then:
            vars(layer).pop(name, None)
            layer._modules.pop(name, None)  # where it was set to a module, and to None since
    del layer.num_batches_skipped
    layer.__class__ = kind


def _ours(kind: Any) -> type[nn.Module]:
    """Our counterpart of a known class.

    Raises:
        TypeError: If the class cannot have a subclass.
    """
    return OURS[kind] if kind in OURS else _derived(kind, adapter(kind))


@cache
def _derived(kind: Any, known: Adapter) -> type[nn.Module]:
    """A subclass of the same name that computes what the class computes, but as one of our layers."""
    namespace = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    namespace |= {"_original": kind, "_adapter": known, "__init__": _initialize, "__reduce_ex__": _reduce}
    if not hasattr(kind, "_check_input_dim"):
        namespace["_check_input_dim"] = _check_of(known.axes)
    base = Followed if known.then else _Layer
    ours: type[nn.Module] = type(kind)(kind.__name__, (base, kind), namespace)
    return ours


def _initialize(self: Any, *args: Any, **kwargs: Any) -> None:
    """Initialize as the original class does, for code that creates a layer by the class of another one."""
    self._original.__init__(self, *args, **kwargs)
    _equip(self)


def _check_of(axes: int | None) -> Callable[[Any, Tensor], None]:
    def _check_input_dim(self: Any, input: Tensor) -> None:
        if input.dim() < 2 or input.dim() != (axes or input.dim()):
            raise ValueError(f"expected {axes or 'at least 2'}D input (got {input.dim()}D input)")

    return _check_input_dim


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle the original class, which can be imported, and its adapter."""
    reduced: Any = object.__reduce_ex__(self, max(2, protocol))
    return _restore, (self._original, self._adapter), *reduced[2:]


def _restore(kind: Any, known: Adapter = PLAIN) -> Any:
    """A new object of our class for this kind, with the pickled adapter: `kind` may not be registered here."""
    ours: Any = OURS[kind] if kind in OURS else _derived(kind, known)
    return ours.__new__(ours)


# --- Statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Before:
    """The state of a layer before it was frozen. `freeze` keeps it on the layer, as `_before_freeze`.

    Attributes:
        statistics: The source of its statistics.
        ours: Whether it was a layer of ours, and stays one.
        learned: The names of the parameters that stopped learning.
    """

    statistics: Any
    ours: bool
    learned: tuple[str, ...]


def before_freeze(layer: nn.Module) -> Before | None:
    """What `freeze` recorded; None if it did not freeze the layer, or if the layer has been given statistics since."""
    before: Before | None = vars(layer).get("_before_freeze")
    return before if before is not None and layer.statistics == RunningStatistics() else None


def take(layer: Any, statistics: Statistics | None) -> None:
    """Give a layer of ours a source of statistics; None leaves it its own.

    A frozen layer gets the source when it is unfrozen, and then stays ours. A layer that is always frozen ignores it.
    """
    if is_always_frozen(type(layer)):
        return
    before = before_freeze(layer)
    if before is not None:
        layer._before_freeze = replace(before, ours=True, statistics=statistics or before.statistics)
    elif statistics is not None:
        layer.statistics = statistics
