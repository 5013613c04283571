"""Freeze the batch normalizations of a model until `unfreeze`.

```
freeze(model.backbone)     # its statistics no longer change, not even after train()
unfreeze(model.backbone)   # exactly as before
```
"""

import warnings
from typing import TypeVar

from torch import nn

from batchnorm.torch.adapters import adapter, is_always_frozen, is_batch_norm
from batchnorm.torch.adopt import Before, adopt, before_freeze, hindrance, original, release
from batchnorm.torch.sources import RunningStatistics
from batchnorm.torch.survey import Found, is_frozen, is_unsized, keeps_statistics, survey

__all__ = ["freeze", "unfreeze"]

M = TypeVar("M", bound=nn.Module)


def freeze(model: M, *, affine: bool = False) -> M:
    """Make batch normalizations use their running statistics in training as well, without changing them.

    PyTorch's layers become ours, in place, with the same parameters, buffers and state dict. In PyTorch's layers the
    mode alone decides which statistics are used, and every `model.train()` changes it. A frozen layer ignores its mode,
    the flag `track_running_stats`, its momentum, `reset_running_stats` and `torch.optim.swa_utils.update_bn`. Only
    writing into the buffers changes them, as `load_state_dict` does. The state dict does not record which layers are
    frozen.

    Args:
        model: Any module: a whole model or a part.
        affine: Whether weight and bias stop learning as well: their `requires_grad` becomes False.

    Returns:
        `model`. Layers that are already frozen stay as they are.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If the model has no batch normalization, or one without running statistics, or one that has its own
            forward or cannot become ours; the model is then unchanged.
        RuntimeError: If a lazy layer does not know its size yet.

    Warns:
        UserWarning: If a module of an unknown class has running statistics.
    """
    layers, others = _found(model)
    if not layers:
        raise ValueError("model has no batch normalization to freeze")
    for found in layers:
        _check(found)
    for name, layer, _, reason in others:
        warnings.warn(
            f"{name or 'the layer'} ({type(layer).__name__}) {reason}, and is not frozen: if it is a batch "
            "normalization, register its class with batchnorm.torch.register",
            stacklevel=2,
        )
    thawed = [found for found in layers if not is_frozen(found.layer)]
    learning = [_learning(found.layer) if affine else () for found in thawed]  # before any stops: layers may share them
    for found, names in zip(thawed, learning, strict=True):
        _freeze(found, names)
    return model


def _found(model: nn.Module) -> tuple[list[Found], list[Found]]:
    """The batch normalizations of a model, and what only resembles one."""
    layers: list[Found] = []
    others: list[Found] = []
    for found in survey(model):
        (layers if is_batch_norm(found.layer) else others).append(found)
    return layers, others


def _check(found: Found) -> None:
    """Raise an error unless a layer can be frozen."""
    name, layer, ours, reason = found
    said = f"{name or 'the layer'} ({type(layer).__name__})"
    if is_unsized(layer):
        raise RuntimeError(f"{said} does not know its size yet: call the model on one batch first")
    if is_always_frozen(type(layer)):
        return
    if not keeps_statistics(layer):
        raise ValueError(f"{said} keeps no running statistics to normalize by (track_running_stats=False)")
    if problem := reason or ("" if ours else hindrance(layer)):
        raise ValueError(f"{said} {problem}, so it cannot be frozen: freeze the other layers one by one")


def _learning(layer: nn.Module) -> tuple[str, ...]:
    known = adapter(type(layer))
    others = () if known is None else known.then  # what its class calls afterwards, such as a PReLU, keeps learning
    return tuple(
        name
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and name.partition(".")[0] not in others
    )


def _freeze(found: Found, learned: tuple[str, ...]) -> None:
    layer = found.layer
    if not found.ours:
        adopt(layer)
    for name in learned:
        layer.get_parameter(name).requires_grad_(False)
    layer._before_freeze = Before(layer.statistics, found.ours, learned)
    layer.statistics = RunningStatistics()


def unfreeze(model: M) -> M:
    """Undo `freeze`, in place: restore each layer's class, its source of statistics, and which parameters learn.

    Args:
        model: The model that was frozen, or a part of it.

    Returns:
        `model`. Layers that are not frozen stay as they are, as do those created with `RunningStatistics()`.

    Raises:
        TypeError: If `model` is not a module.
    """
    for layer in (found.layer for found in survey(model)):
        before = before_freeze(layer)
        if before is None:
            continue
        layer.statistics = before.statistics
        del layer._before_freeze
        for name in before.learned:
            layer.get_parameter(name).requires_grad_(True)
        if not before.ours and original(layer) is not None:
            release(layer)
    return model
