"""The table of adapters: classes that compute a batch normalization and possibly more, and what each computes.

A class is identified by the base that defines its forward. So a subclass that inherits the forward counts as its base,
and one with a forward of its own does not. Classes of other packages are listed by name, so that none of these packages
is imported.
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
        then: The names of the attributes, modules or functions, that it calls one after the other, the first with the
            normalized values. Those that a layer does not have, or that are None, are skipped.
        statistics: The source of its statistics in training; None means the batch, or all processes if the class is a
            subclass of `SyncBatchNorm`. With `RunningStatistics()` its layers are always frozen.
        axes: The number of axes of its inputs; None if it has PyTorch's `_check_input_dim`, or accepts two or more.
        eps: The number that it adds to the variance, if it has no attribute `eps`.
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
"""The models of `transformers` that have a copy of DETR's frozen layer, and the prefix of its name in each."""

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
    """Register what a class of your own computes, so that `convert`, `fold`, `freeze`, `calibrate` and `explain` work.

    The class must compute, with attributes that are named as in `torch.nn.BatchNorm2d`,

    `y = (x - mean) / sqrt(var + eps) * weight + bias`

    for each channel of the second axis, and then call what `then` names, as `then[1](then[0](y))`. These need no
    registration: PyTorch's classes, subclasses that inherit their forward, timm's `BatchNormAct2d`, `SyncBatchNormAct`
    and `FrozenBatchNormAct2d`, and `FrozenBatchNorm2d` of torchvision, detectron2 and the DETR models of transformers.

    ```
    register(NormalizeAndActivate, then=["act"])
    register(FrozenNormalization, statistics=RunningStatistics(), axes=4)
    ```

    Args:
        kind: The class, which defines its own forward. It stands for its subclasses that inherit the forward, too.
        then: The names of the attributes that it calls with the normalized values, in order: modules or functions, such
            as a dropout and an activation. Those that a layer does not have, or that are None, are skipped.
        statistics: The source of its statistics in training; None means the batch, or all processes if the class is a
            subclass of `SyncBatchNorm`. With `RunningStatistics()`, its layers are always frozen.
        axes: The number of axes of its inputs; None if it has PyTorch's `_check_input_dim`, or accepts two or more.
        eps: The number that it adds to the variance, if it has no attribute `eps`.

    Raises:
        TypeError: If `kind` is not a class of modules, or `then` or `statistics` has another type.
        ValueError: If `kind` inherits its forward, so that its base must be registered instead.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"register needs a class of modules, got {kind!r}")
    if "forward" not in vars(kind):
        base = forward_of(kind)
        known = adapter(kind) is not None
        raise ValueError(
            f"{kind.__name__} inherits the forward of {base.__name__}: "
            + ("it is known already" if known else f"register {base.__name__} if it computes a batch normalization")
        )
    names = tuple(then)
    if isinstance(then, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"then must be a list of attribute names, got {then!r}")
    expect(statistics)
    ADAPTERS[kind] = Adapter(names, statistics, axes, eps)


def forward_of(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that defines the forward of a class."""
    return next(base for base in kind.__mro__ if "forward" in vars(base))


def adapter(kind: Any) -> Adapter | None:
    """What a class computes; None if that is unknown, or if the class belongs to this package."""
    known: Adapter | None = vars(kind).get("_adapter")  # for a class of ours that was derived from it
    if known is not None:
        return known
    base: Any = forward_of(kind)
    return ADAPTERS.get(base) or ADAPTERS.get(f"{base.__module__}.{base.__qualname__}")


def eps_of(layer: Any) -> float:
    """The number that a layer of a known class, or of ours, adds to the variance."""
    known = adapter(type(layer))
    default = None if known is None else known.eps
    eps: Any = getattr(layer, "eps", default)
    return float(eps)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch normalization: PyTorch's, ours, or of another known class."""
    return isinstance(module, _BatchNorm) or adapter(type(module)) is not None


def resembles(module: nn.Module) -> bool:
    """Whether a module has running statistics under PyTorch's names, but an unknown class."""
    named = {"running_mean", "running_var"} <= module._buffers.keys()
    return named and not isinstance(module, _InstanceNorm) and not is_batch_norm(module)


def is_always_frozen(kind: Any) -> bool:
    """Whether layers of a class always normalize by their running statistics."""
    known = adapter(kind)
    return known is not None and known.statistics == RunningStatistics()
