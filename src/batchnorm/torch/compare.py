"""Two models on the same inputs: how far apart are their outputs?"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.folded import difference
from batchnorm.torch.tracing import duplicate, leaves

__all__ = ["compare", "run"]

ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""How far outputs may differ for rounding, relative to the largest."""


def run(model: nn.Module, inputs: Any, axes: dict[str, int] | None = None) -> Any:
    """What a model gives for inputs, as it is and without gradients; neither is changed.

    Args:
        model: Any module.
        inputs: A tensor, a tuple or list of the arguments, or a dict of them by name.
        axes: Gets the numbers of axes of the inputs of all normalizations, by their names.

    Returns:
        The outputs.
    """
    model, inputs = duplicate(model), duplicate(inputs)
    seen: dict[str, set[int]] = {}

    def watch(name: str, layer: nn.Module) -> None:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(name, set()).add((args[0] if args else kwargs["input"]).dim())

        layer.register_forward_pre_hook(note, with_kwargs=True)

    if axes is not None:
        for name, layer in model.named_modules():
            if isinstance(layer, _BatchNorm):
                watch(name, layer)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    if isinstance(inputs, tuple | list):
        args = tuple(inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)  # both models draw the same
        y = model(*args, **kwargs)
    if axes is not None:
        axes |= {name: numbers.pop() for name, numbers in seen.items() if len(numbers) == 1}
    return y


def compare(model: nn.Module, expected: Any, actual: Any) -> float | None:
    """The largest difference in the outputs of two models, each tensor's relative to its largest value.

    Args:
        model: The first one; its types say what rounding explains.
        expected: Its outputs: tensors, in any nest of tuples, lists, dicts and dataclasses.
        actual: The other's.

    Returns:
        The difference; None if there are no tensors.

    Raises:
        RuntimeError: If it is more than rounding explains, or if the tensors are others or of other shapes.
    """
    before, after = (dict(leaves(output, Tensor)) for output in (expected, actual))
    shapes, new_shapes = ({path: y.shape for path, y in outputs.items()} for outputs in (before, after))
    if shapes != new_shapes:
        raise RuntimeError(f"the folded model's outputs are not of the same shapes: {new_shapes}, not {shapes}")
    tensors = (*model.parameters(), *model.buffers(), *before.values())
    limit = max((ROUNDING[tensor.dtype] for tensor in tensors if tensor.dtype in ROUNDING), default=1e-10)
    error = max((difference(_array(y), _array(after[path])) for path, y in before.items()), default=None)
    if error is not None and not error <= limit:
        raise RuntimeError(
            f"the folded model's outputs on the example inputs differ by {error:.1e} of the largest, where rounding "
            f"explains {limit:.1e}: this model does something that its trace does not show, and must not be folded"
        )
    return error


def _array(y: Tensor) -> Any:
    return (y.to(torch.complex128 if y.is_complex() else torch.float64)).detach().cpu().numpy()
