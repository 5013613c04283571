"""Put our layers where a model has PyTorch's, together with what follows them; and take them out again.

```
model = convert(model)     # the same model, the same parameters; in place
print(explain(model))      # what each layer is fused with, or why with nothing
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

    Every layer stays the object that it is, with its parameters, buffers, hooks and mode: only its class changes. State
    dicts keep their keys, and an optimizer made before goes on working. A subclass of PyTorch's layer that inherits the
    forward stays a subclass of its class. So does a layer of another class that is known (`register`), such as timm's
    `BatchNormAct2d`: its activation is computed in the same pass, and whatever else it calls is called after it.

    With `fuse`, a layer, a residual added to it and the activation after it are computed in one pass, wherever they are
    called one right after the other. Modules that call them so get a subclass of their class, of the same name, whose
    methods are compiled from the same source with only these calls replaced. The activations and the residual stay
    where they are: with hooks on the layer or on the activation, or with a residual of another shape, everything is
    called as before. So the model computes the same, whatever is done to it later.

    Args:
        model: Any module; it may be a batch normalization itself.
        fuse: Whether to compute layers together with what follows them.
        statistics: Where our layers' statistics come from in training. None leaves each layer its own: those of the
            batch, or those of all processes where a layer was a `SyncBatchNorm`. A frozen layer gets them when it is
            unfrozen; one of a class whose layers are always frozen gets none.
        save_memory: Whether layers make their outputs again in the backward pass instead of keeping them, as the
            function `save_memory` describes; None leaves that as it is.

    Returns:
        `model`. Layers with a forward of their own stay as they are; `explain` says why.

    Raises:
        TypeError: If `model` is not a module; if `statistics` is of another type.

    Warns:
        UserWarning: If a batch normalization has to stay as it is and so does not get `statistics`.
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
    """Make a model's batch normalizations ours where they can be, with these statistics; the modules around them stay.

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
    """Undo `convert`, in place: all layers of ours are of PyTorch's classes again, or of those that they had.

    A layer that was made with an activation stays, since PyTorch has no such layer. A frozen one stays until
    `unfreeze`.

    Args:
        model: Any module.

    Returns:
        `model`.
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
