"""Freeze a model's batch normalizations, so that nothing but `unfreeze` undoes it.

```
freeze(model.backbone)     # its statistics stay as they are: `train()` cannot undo it
unfreeze(model.backbone)   # exactly as before
```
"""

from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.torch.layers import OURS, THEIRS, adopt, release
from batchnorm.torch.sources import Before, RunningStatistics

__all__ = ["freeze", "unfreeze"]

M = TypeVar("M", bound=nn.Module)


def freeze(model: M, *, affine: bool = False) -> M:
    """Let batch normalizations normalize by their running statistics, in training too, and leave these as they are.

    Layers of PyTorch become ours, in place, with the same parameters, buffers and state dict: in PyTorch's the mode
    alone says which statistics are used, and every `model.train()` changes it. Which layers are frozen is not in the
    state dict.

    Args:
        model: Any module: the whole of a model, or a part.
        affine: Whether weight and bias stop learning as well.

    Returns:
        `model`. Layers that are frozen already stay as they are.

    Raises:
        ValueError: If the model has no batch normalization, or one without running statistics, or one of a class whose
            forward is its own; nothing is changed then.
        RuntimeError: If a lazy layer does not know its size yet.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    if not layers:
        raise ValueError("there is no batch normalization to freeze in this model")
    for name, layer in layers.items():
        said = f"{name or 'the layer'}, a {type(layer).__name__},"
        if any(is_lazy(t) for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None):
            raise RuntimeError(f"{said} does not know its size yet: call the model on one batch first")
        if layer.running_mean is None or layer.running_var is None or not layer.track_running_stats:
            raise ValueError(f"{said} keeps no running statistics that it could be frozen to (track_running_stats)")
        if not (type(layer) in OURS or type(layer) in THEIRS) or "forward" in vars(layer):
            raise ValueError(f"{said} has a forward of its own, which may not look at its statistics: freeze others")
    thawed = [
        layer for layer in layers.values() if not isinstance(getattr(layer, "statistics", None), RunningStatistics)
    ]
    learned = [
        tuple(name for name, p in layer.named_parameters(recurse=False) if affine and p.requires_grad)
        for layer in thawed
    ]
    for layer, names in zip(thawed, learned, strict=True):
        _freeze(layer, names)
    return model


def _freeze(layer: Any, learned: tuple[str, ...]) -> None:
    ours = type(layer) in THEIRS
    if not ours:
        adopt(layer)
    for name in learned:
        getattr(layer, name).requires_grad_(False)
    layer.statistics = RunningStatistics(Before(layer.statistics, ours, learned))


def unfreeze(model: M) -> M:
    """Undo `freeze`, in place: every layer is of its class again, with its statistics, and learns what it learned.

    A layer that was made with `RunningStatistics()`, not frozen, stays.

    Args:
        model: Any module: what was frozen, or a part of it.

    Returns:
        `model`.
    """
    for layer in model.modules():
        frozen = getattr(layer, "statistics", None)
        if type(layer) in THEIRS and isinstance(frozen, RunningStatistics) and frozen.before is not None:
            layer.statistics = frozen.before.statistics
            for name in frozen.before.learned:
                getattr(layer, name).requires_grad_(True)
            if not frozen.before.ours and layer.activation is None:
                release(layer)
    return model
