"""Freeze a model's batch normalizations, so that nothing but `unfreeze` undoes it.

```
freeze(model.backbone)     # its statistics stay as they are: `train()` cannot undo it
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
    """A scale or bias that does not learn: it is no `nnx.Param`, which gradients and optimizers take."""


@dataclass(frozen=True)
class Before:
    """What `unfreeze` puts back: the source of statistics, whether the layer was ours, and what learned."""

    statistics: Statistics | None
    ours: bool
    learned: tuple[str, ...]


def freeze(model: M, *, affine: bool = False) -> M:
    """Let batch normalizations normalize by their running statistics, in training too, and leave these as they are.

    Flax' layers become ours, in place, with the same variables. In Flax `use_running_average` decides which statistics
    are used, and every `model.train()` changes it. The module knows that it is frozen, and so do its copies and what
    `nnx.split` gives; the state alone, as in a checkpoint, does not. With `affine`, freeze before an optimizer is made.

    Args:
        model: A module: a whole model or a part.
        affine: Whether scale and bias stop learning as well: they become `Frozen` variables.

    Returns:
        `model`. Layers that are already frozen stay as they are.

    Raises:
        TypeError: If `model` is no module.
        ValueError: If it has no batch normalization, or one whose class has a call of its own; nothing is changed then.
    """
    refuse(model)
    layers = {name: layer for name, layer in named_modules(model).items() if isinstance(layer, nnx.BatchNorm)}
    if not layers:
        raise ValueError("there is no batch normalization to freeze in this model")
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
    """The variable as one of another kind, with the same value and metadata."""
    return kind.from_metadata(variable[...], variable.get_metadata())


def unfreeze(model: M) -> M:
    """Undo `freeze`, in place: every layer has its class and its statistics again, and learns what it learned before.

    A layer that was made with `RunningStatistics()` stays as it is.

    Args:
        model: What was frozen, or a part of it.

    Returns:
        `model`.

    Raises:
        TypeError: If `model` is no module.
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
