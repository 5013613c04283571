"""Keep half the activations for the backward pass: the inputs of our layers, but not their outputs.

```
save_memory(model)           # the same gradients; a step takes one more pass over each output
save_memory(model, False)    # as before
```
"""

from typing import TypeVar

from torch import nn

from batchnorm.torch import recipes
from batchnorm.torch.layers import _Layer
from batchnorm.torch.survey import survey

__all__ = ["save_memory"]

M = TypeVar("M", bound=nn.Module)


def save_memory(model: M, on: bool = True) -> M:
    """Recompute the outputs of our layers in the backward pass instead of keeping them.

    The operation after a layer keeps its input, our `y`, and our layer keeps `x`. With `save_memory`, `y` is made again
    from `x` by the kernel that made it first, at most once in a backward pass, and freed when the last operation has
    used it. On the CPU, gradients are the same bits. The state dict does not change.

    It holds for everything that happens inside a call of `model`, and of what `model` becomes part of later. So give it
    the module that you call. An output that leaves this module is kept by what uses it outside. So is an output that
    was changed in place, for example by `nn.ReLU(inplace=True)` or `y += x`, unless `convert` computes these together
    with the layer. A layer with a residual names its residual if a recipe makes that as well, or if another operation
    keeps it. On the CPU, an output of less than 3.5 MB is kept, because Python would take longer than the kernel.

    It has no effect where it could not help: in evaluation without gradients; in a compiled graph, whose compiler
    decides what to keep; inside an activation checkpoint or `save_on_cpu`, which handle what is kept themselves; and in
    calls that only PyTorch's elementary operations can compute (route `"composed"`).

    Args:
        model: Any module with layers of ours.
        on: Whether to save memory.

    Returns:
        `model`.

    Raises:
        ValueError: If the model has no layer of ours.
        RuntimeError: In a backward pass, if `x` or `y` was changed in place after it was kept: PyTorch's error. (A
            change through `y.data`, which PyTorch does not see either, must not come between the layer and what uses
            `y`.) In a forward pass that calls `torch.func.grad`, which PyTorch does not combine with such hooks.

    Source: The idea is that of Bulo, Porzi & Kontschieder 2018, "In-place activated batchnorm", who invert the
    activation, which is not exact.
    """
    layers = [found.layer for found in survey(model) if found.ours]
    if not layers and on:
        raise ValueError("model has no layer of this package: convert it with convert(model, save_memory=True)")
    for layer in layers:
        if on:
            layer.save_memory = True
        else:
            vars(layer).pop("save_memory", None)
    if not on:
        for module in model.modules():
            recipes.remove(module)
        return model
    recipes.follow_registrations()
    if not isinstance(model, _Layer):
        recipes.install(model)
    return model
