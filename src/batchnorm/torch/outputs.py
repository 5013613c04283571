"""The outputs of a model, as arrays that can be compared with those of another model."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from batchnorm.torch.adapters import is_batch_norm
from batchnorm.torch.tracing import duplicate, leaves

__all__ = ["arrays", "dtypes", "run"]


def run(model: nn.Module, inputs: Any, axes: dict[str, int] | None = None) -> Any:
    """The outputs of a model in its current mode, without gradients; neither the model nor the inputs change.

    Args:
        model: Any module.
        inputs: A tensor, a tuple or list of the arguments, or a dict of them by name.
        axes: Receives the number of axes of each normalization's input, by the layer's name.

    Returns:
        The outputs.
    """
    model, inputs = duplicate(model), duplicate(inputs)
    seen: dict[str, set[int]] = {}

    def watch(name: str, layer: nn.Module) -> None:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, *_rest = (*args, *kwargs.values())  # its name differs between classes
            seen.setdefault(name, set()).add(x.dim())

        layer.register_forward_pre_hook(note, with_kwargs=True)

    if axes is not None:
        for name, layer in model.named_modules():
            if is_batch_norm(layer):
                watch(name, layer)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    if isinstance(inputs, tuple | list):
        args = tuple(inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)  # both models draw the same random numbers
        y = model(*args, **kwargs)
    if axes is not None:
        axes |= {name: numbers.pop() for name, numbers in seen.items() if len(numbers) == 1}
    return y


def arrays(outputs: Any) -> dict[str, NDArray[Any]]:
    """The tensors among the outputs in float64 or complex128, by their path in nested tuples, lists and the like."""
    return {
        path: y.to(torch.complex128 if y.is_complex() else torch.float64).detach().cpu().numpy()
        for path, y in leaves(outputs, Tensor)
    }


def dtypes(model: nn.Module, outputs: Any) -> set[str]:
    """The types of a model's parameters, buffers and outputs."""
    tensors = (*model.parameters(), *model.buffers(), *(y for _, y in leaves(outputs, Tensor)))
    return {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
