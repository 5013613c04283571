"""Put our layers where a model has PyTorch's, together with what follows them; and take them out again.

```
model = convert(model)     # the same model, the same parameters; in place
print(explain(model))      # which layer is fused with what, and where with nothing, why
model = revert(model)      # as it was
```
"""

from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from batchnorm.torch.layers import OURS, THEIRS, adopt, release, take
from batchnorm.torch.rewrite import NotRewritten, at_several_places, original_class, rewrite
from batchnorm.torch.sources import RunningStatistics, Statistics, expect

__all__ = ["convert", "revert"]

M = TypeVar("M", bound=nn.Module)


def convert(model: M, *, fuse: bool = True, statistics: Statistics | None = None) -> M:
    """Turn a model's batch normalizations into ours, in place.

    Every layer stays the object that it is, with its parameters, buffers, hooks and mode: only its class changes. State
    dicts keep their keys, and an optimizer made before goes on working.

    With `fuse`, a layer, a residual added to it and the activation after it are computed in one pass, wherever they are
    called one right after the other. Modules in which this is so get a subclass of their class, of the same name, whose
    methods are compiled from the same source with just these calls exchanged. The activations and the residual stay
    where they are: with hooks on the layer or on the activation, or with a residual of another shape, everything is
    called as before, so that the model means the same whatever is done to it later.

    Args:
        model: Any module; it may be a batch normalization itself.
        fuse: Whether to compute layers together with what follows them.
        statistics: Where our layers' statistics come from in training; None leaves it as it is: from the batch, or
            from all processes where a layer was a `SyncBatchNorm`. A frozen layer takes them when it is unfrozen.

    Returns:
        `model`.

    Raises:
        TypeError: If `statistics` are not.
    """
    expect(statistics)
    for module in model.modules():
        if type(module) in OURS and "forward" not in vars(module):
            adopt(module)
        if type(module) in THEIRS:
            take(module, _unfrozen(module) if statistics is None else statistics)
    shared = at_several_places(model)
    for module in model.modules():
        module.__class__ = original_class(module)
        if fuse:
            with suppress(NotRewritten):
                module.__class__ = rewrite(module, shared)
    return model


def revert(model: M) -> M:
    """Undo `convert`, in place: all layers of ours are PyTorch's again, all modules of their own classes.

    A layer that was made with an activation stays, since PyTorch has no such layer; a frozen one stays until
    `unfreeze`.

    Args:
        model: Any module.

    Returns:
        `model`.
    """
    for module in model.modules():
        module.__class__ = original_class(module)
        if type(module) in THEIRS and module.activation is None:
            layer: Any = module
            frozen = layer.statistics
            if isinstance(frozen, RunningStatistics) and frozen.before is not None:
                layer.statistics = RunningStatistics(replace(frozen.before, ours=False))
            else:
                release(layer)
    return model


def _unfrozen(layer: Any) -> Any:
    """The statistics of a layer, or those that it will have again when it is not frozen any more."""
    frozen = layer.statistics
    return frozen.before.statistics if isinstance(frozen, RunningStatistics) and frozen.before else frozen
