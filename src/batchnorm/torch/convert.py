"""Turn a model's batch normalizations into ours, fused with what follows them, and back again.

```
model = convert(model)     # the same model with the same parameters, in place
print(explain(model))      # what each layer is fused with, or why it is not
model = revert(model)      # as it was
```
"""

import warnings
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from torch import nn

from batchnorm.torch import memory
from batchnorm.torch.adapters import is_batch_norm
from batchnorm.torch.adopt import adopt, before_freeze, hindrance, original, release, take
from batchnorm.torch.rewrite import NotRewritten, at_several_places, original_class, rewrite
from batchnorm.torch.sources import Statistics, expect
from batchnorm.torch.survey import expect_module, survey

__all__ = ["adopt_layers", "convert", "revert"]

M = TypeVar("M", bound=nn.Module)


def convert(model: M, *, fuse: bool = True, statistics: Statistics | None = None, save_memory: bool | None = None) -> M:
    """Turn a model's batch normalizations into ours, in place.

    Every layer stays the same object, with its parameters, buffers, hooks and mode: only its class changes. State dicts
    keep their keys, and an existing optimizer keeps working. A layer of a subclass of PyTorch's class that inherits the
    forward remains an instance of that subclass. The same holds for other known classes (`register`), such as timm's
    `BatchNormAct2d`: the activation is computed in the same pass, and whatever else the class calls is called after it.

    With `fuse`, a layer, a residual added to it and the activation after it are computed in one pass wherever they are
    called directly one after the other. Modules that call them in this way get a subclass of their class, of the same
    name, whose methods are compiled from the same source with only these calls replaced. The activations and the
    residual stay in the model: if the layer or the activation has hooks, or the residual has another shape, everything
    is called as before. So the model computes the same, whatever is done to it later.

    Args:
        model: Any module, even a single batch normalization.
        fuse: Whether to compute layers together with what follows them.
        statistics: The source of our layers' statistics in training. None leaves each layer its own: the batch, or all
            processes if the layer was a `SyncBatchNorm`. A frozen layer gets the source when it is unfrozen; a layer
            whose class is always frozen ignores it.
        save_memory: Whether layers recompute their outputs in the backward pass instead of keeping them, as the
            function `save_memory` describes; None leaves this unchanged.

    Returns:
        `model`. Layers with a forward of their own stay as they are; `explain` gives the reason.

    Raises:
        TypeError: If `model` is not a module, or `statistics` is not a source of statistics.

    Warns:
        UserWarning: If a batch normalization stays as it is and so does not get `statistics`.
    """
    expect(statistics)
    adopt_layers(model, statistics)
    shared = at_several_places(model)
    for module in model.modules():
        module.__class__ = original_class(module)
        if fuse:
            with suppress(NotRewritten):
                module.__class__ = rewrite(module, shared)
    if save_memory is not None and any(found.ours for found in survey(model)):
        memory.save_memory(model, save_memory)
    return model


def adopt_layers(model: nn.Module, statistics: Statistics | None) -> None:
    """Turn a model's batch normalizations into ours where possible, with this source, but not the modules around them.

    Args:
        model: Any module.
        statistics: As in `convert`.

    Warns:
        UserWarning: As in `convert`.
    """
    left_out = []
    for name, layer, ours, reason in survey(model):
        if ours:
            take(layer, statistics)
        elif reason := reason or hindrance(layer):
            if is_batch_norm(layer):
                left_out.append(f"{name or 'the layer'} ({type(layer).__name__}) {reason}")
        else:
            adopt(layer)
            take(layer, statistics)
    if left_out and statistics is not None:
        these = "batch normalization does" if len(left_out) == 1 else "batch normalizations do"
        warnings.warn(f"{len(left_out)} {these} not get {statistics!r}: {'; '.join(left_out)}", stacklevel=3)


def revert(model: M) -> M:
    """Undo `convert`, in place: our layers get PyTorch's classes again, or those that they had.

    A layer created with an activation stays ours, because PyTorch has no such layer. A frozen layer stays ours until
    `unfreeze`.

    Args:
        model: Any module.

    Returns:
        `model`.

    Raises:
        TypeError: If `model` is not a module.
    """
    expect_module(model)
    for module in model.modules():
        module.__class__ = original_class(module)
    for _, layer, ours, _ in survey(model):
        if ours and original(layer) is not None:
            before = before_freeze(layer)
            if before is None:
                release(layer)
            else:
                layer._before_freeze = replace(before, ours=False)
    if not any(getattr(module, "save_memory", False) is True for module in model.modules()):
        memory.save_memory(model, False)
    return model
