"""Freeze the batch normalizations of a model until `unfreeze`.

```
freeze(model.backbone)     # its statistics no longer change, not even after train()
unfreeze(model.backbone)   # exactly as before
```
"""

from dataclasses import dataclass
from typing import Any, TypeVar

from flax import nnx

from batchnorm.jax.layers import BatchNorm, adopt, release
from batchnorm.jax.modules import named_modules, refuse
from batchnorm.jax.statistics import RunningStatistics, Statistics

__all__ = ["Frozen", "freeze", "unfreeze"]

M = TypeVar("M")


class Frozen(nnx.Variable):  # type: ignore[type-arg, misc, unused-ignore]
    """A scale or bias that does not learn: it is not an `nnx.Param`, so gradients and optimizers ignore it."""


@dataclass(frozen=True)
class Before:
    """What `unfreeze` restores: the source of statistics, whether the layer was ours, and what learned."""

    statistics: Statistics | None
    ours: bool
    learned: tuple[str, ...]


def freeze(model: M, *, affine: bool = False) -> M:
    """Make batch normalizations use their running statistics in training as well, without changing them.

    Flax's layers become ours, in place, with the same variables. In Flax `use_running_average` decides which statistics
    are used, and every `model.train()` changes it. The module knows that it is frozen, and so do its copies and what
    `nnx.split` gives; the state alone, as in a checkpoint, does not. With `affine`, freeze before an optimizer is made.

    Args:
        model: A module: a whole model or a part.
        affine: Whether scale and bias stop learning as well: they become `Frozen` variables.

    Returns:
        `model`. Layers that are already frozen stay as they are.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If it has no batch normalization, or one whose class has a call of its own; the model is then
            unchanged.
    """
    refuse(model)
    layers = {name: layer for name, layer in named_modules(model).items() if isinstance(layer, nnx.BatchNorm)}
    if not layers:
        raise ValueError("model has no batch normalization to freeze")
    for name, layer in layers.items():
        if type(layer) not in (nnx.BatchNorm, BatchNorm):
            raise ValueError(
                f"{name or 'the layer'} ({type(layer).__name__}) has a call of its own, so it cannot be frozen: "
                "freeze the other layers one by one"
            )
    for layer in layers.values():
        if getattr(layer, "before_freeze", None) is None:
            _freeze(layer, affine)
    return model


def _freeze(layer: Any, affine: bool) -> None:
    ours = type(layer) is BatchNorm
    if not ours:
        adopt(layer)
    learned = [name for name in ("scale", "bias") if affine and isinstance(getattr(layer, name), nnx.Param)]
    for name in learned:
        setattr(layer, name, _as(Frozen, getattr(layer, name)))
    layer.before_freeze = Before(layer.statistics, ours, tuple(learned))
    layer.statistics = RunningStatistics()


def _as(kind: Any, variable: Any) -> Any:
    """A variable of another kind with the same value and metadata."""
    return kind.from_metadata(variable[...], variable.get_metadata())


def unfreeze(model: M) -> M:
    """Undo `freeze`, in place: restore each layer's class, its source of statistics, and which variables learn.

    A layer that was made with `RunningStatistics()` stays as it is.

    Args:
        model: The model that was frozen, or a part of it.

    Returns:
        `model`. Layers that are not frozen stay as they are.

    Raises:
        TypeError: If `model` is not a module.
    """
    refuse(model)
    for layer in named_modules(model).values():
        before = getattr(layer, "before_freeze", None)
        if before is None:
            continue
        for name in before.learned:
            setattr(layer, name, _as(nnx.Param, getattr(layer, name)))
        layer.statistics = before.statistics
        del layer.before_freeze
        if not before.ours and layer.activation is None:
            release(layer)
    return model
