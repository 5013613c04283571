"""Classes that compute a batch normalization and more, and what each of them computes: the table of adapters.

A class is known by the one among its bases that defines its forward. So a subclass that inherits the forward is what
its base is, and one that has a forward of its own is not. Classes of other packages are known by their names, so that
none of these packages is imported.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from batchnorm.torch.sources import RunningStatistics, Statistics, expect

__all__ = [
    "ADAPTERS",
    "PLAIN",
    "Adapter",
    "adapter",
    "eps_of",
    "forward_of",
    "is_always_frozen",
    "is_batch_norm",
    "register",
    "resembles",
]


@dataclass(frozen=True)
class Adapter:
    """What a class computes: the batch normalization of the second axis, and then what it calls with the result.

    Attributes:
        then: The names of its attributes that it calls one after the other, first with the normalized values: modules
            or functions. Those that a layer does not have, or that are None, are left out.
        statistics: Where its statistics come from in training; None means the batch, or all processes if the class is a
            subclass of `SyncBatchNorm`. With `RunningStatistics()` its layers are frozen for good.
        axes: The number of axes of its inputs; None if its `_check_input_dim` says so, or if there are two or more.
        eps: What it adds to the variance, if it has no attribute `eps`.
    """

    then: tuple[str, ...] = ()
    statistics: Statistics | None = None
    axes: int | None = None
    eps: float | None = None


PLAIN = Adapter()
_ACTIVATED = Adapter(then=("drop", "act"))
_FROZEN = Adapter(statistics=RunningStatistics(), axes=4)
_FROZEN_ACTIVATED = Adapter(then=("drop", "act"), statistics=RunningStatistics(), axes=4)
_FROZEN_IN_DETR = Adapter(statistics=RunningStatistics(), axes=4, eps=1e-5)

_DETRS = {
    "conditional_detr": "ConditionalDetr",
    "d_fine": "DFine",
    "deformable_detr": "DeformableDetr",
    "detr": "Detr",
    "grounding_dino": "GroundingDino",
    "rt_detr": "RTDetr",
    "rt_detr_v2": "RTDetrV2",
    "table_transformer": "TableTransformer",
}
"""The models of `transformers` that have a copy of DETR's frozen layer, and what they put in front of its name."""

ADAPTERS: dict[type[nn.Module] | str, Adapter] = {
    _BatchNorm: PLAIN,
    nn.SyncBatchNorm: PLAIN,
    "timm.layers.norm_act.BatchNormAct2d": _ACTIVATED,
    "timm.layers.norm_act.SyncBatchNormAct": _ACTIVATED,
    "timm.layers.norm_act.FrozenBatchNormAct2d": _FROZEN_ACTIVATED,
    "timm.models.layers.norm_act.BatchNormAct2d": _ACTIVATED,  # before timm 0.9
    "timm.models.layers.norm_act.SyncBatchNormAct": _ACTIVATED,
    "torchvision.ops.misc.FrozenBatchNorm2d": _FROZEN,
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": _FROZEN,
    **{
        f"transformers.models.{model}.modeling_{model}.{prefix}FrozenBatchNorm2d": _FROZEN_IN_DETR
        for model, prefix in _DETRS.items()
    },
}
"""What each class computes, by the class or its full name."""


def register(
    kind: type[nn.Module],
    *,
    then: Iterable[str] = (),
    statistics: Statistics | None = None,
    axes: int | None = None,
    eps: float | None = None,
) -> None:
    """Say what a class of your own computes, so that `convert`, `fold`, `freeze`, `calibrate` and `explain` treat it.

    The class must compute, with attributes that are named as in `torch.nn.BatchNorm2d`,

    `y = (x - mean) / sqrt(var + eps) * weight + bias`

    for each channel of the second axis, and then call what `then` names, as `then[1](then[0](y))`. Known without it are
    PyTorch's classes, subclasses that inherit their forward, timm's `BatchNormAct2d`, `SyncBatchNormAct` and
    `FrozenBatchNormAct2d`, and `FrozenBatchNorm2d` of torchvision, detectron2 and the DETR models of transformers.

    ```
    register(NormalizeAndActivate, then=["act"])
    register(FrozenNormalization, statistics=RunningStatistics(), axes=4)
    ```

    Args:
        kind: The class, which defines its own forward. Its subclasses that inherit the forward are known as well.
        then: The names of the attributes that it calls with the normalized values, in order: modules or functions, such
            as a dropout and an activation. Those that a layer does not have, or that are None, are left out.
        statistics: Where its statistics come from in training; None means the batch, or all processes if it is a
            subclass of `SyncBatchNorm`. With `RunningStatistics()`, its layers always normalize by their running
            statistics, and nothing makes them do otherwise.
        axes: The number of axes of its inputs. None if it has PyTorch's `_check_input_dim`, or takes two or more.
        eps: What it adds to the variance, if it has no attribute `eps`.

    Raises:
        TypeError: If `kind` is not a class of modules, or `then` or `statistics` is of another type.
        ValueError: If `kind` inherits its forward, so that its base is what has to be registered.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"register takes a class of modules, got {kind!r}")
    if "forward" not in vars(kind):
        base = forward_of(kind)
        known = adapter(kind) is not None
        raise ValueError(
            f"{kind.__name__} inherits the forward of {base.__name__}: "
            + ("it is known already" if known else f"register {base.__name__}, if it computes a batch normalization")
        )
    names = tuple(then)
    if isinstance(then, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"then takes the names of attributes, got {then!r}: pass a list of strings")
    expect(statistics)
    ADAPTERS[kind] = Adapter(names, statistics, axes, eps)


def forward_of(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that defines the forward of a class."""
    return next(base for base in kind.__mro__ if "forward" in vars(base))


def adapter(kind: Any) -> Adapter | None:
    """What a class computes; None if that is not known, or if the class is of this package."""
    known: Adapter | None = vars(kind).get("_adapter")  # of a class of ours that was derived from it
    if known is not None:
        return known
    base: Any = forward_of(kind)
    return ADAPTERS.get(base) or ADAPTERS.get(f"{base.__module__}.{base.__qualname__}")


def eps_of(layer: Any) -> float:
    """What a layer of a known class, or of ours, adds to the variance."""
    known = adapter(type(layer))
    default = None if known is None else known.eps
    eps: Any = getattr(layer, "eps", default)
    return float(eps)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is meant to be a batch normalization: of PyTorch's, of ours, or of a class that is known."""
    return isinstance(module, _BatchNorm) or adapter(type(module)) is not None


def resembles(module: nn.Module) -> bool:
    """Whether a module has running statistics under PyTorch's names and is of a class that is not known."""
    named = {"running_mean", "running_var"} <= module._buffers.keys()
    return named and not isinstance(module, _InstanceNorm) and not is_batch_norm(module)


def is_always_frozen(kind: Any) -> bool:
    """Whether layers of a class always normalize by their running statistics."""
    known = adapter(kind)
    return known is not None and known.statistics == RunningStatistics()
