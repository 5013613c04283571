"""Tensors from PyTorch's own files, without running code that a pickle may contain."""

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from batchnorm.checkpoints.names import is_part
from batchnorm.errors import InputError

__all__ = ["read"]


def read(path: Path) -> dict[str, Any]:
    """The tensors of a state dict that may be parts of batch normalizations, in float64.

    The state dict may be inside other dicts, as training programs write them. If there are several, such as those of a
    model and of its average, the first is used.

    Raises:
        InputError: If the file is not a checkpoint, or contains more than tensors and plain values.
    """
    import torch

    try:
        whole = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_map(path))
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "Unsupported" in str(error):
            raise InputError(_code(path)) from error
        raise InputError(
            f"{path} is not a checkpoint of PyTorch: it cannot be read as tensors and plain values; save "
            "model.state_dict() with torch.save."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        if "TorchScript" in str(error):
            raise InputError(_code(path)) from error
        raise InputError(
            f"{path} is not a valid checkpoint of PyTorch; fetch it again, or save model.state_dict() with torch.save."
        ) from error
    for tensors in _dicts(whole):
        if any(name.rpartition(".")[2] == "running_mean" for name in tensors):
            return {
                name: tensor.detach().double().numpy()
                for name, tensor in tensors.items()
                if is_part(name, tuple(tensor.shape))
            }
    return {}


def _code(path: Path) -> str:
    return (
        f"{path} contains objects that are neither tensors nor plain values, as a model saved as a whole does. "
        "Loading them could run code, so they are not loaded; save model.state_dict() instead, or call diagnose(model) "
        "from Python."
    )


def _can_map(path: Path) -> bool:
    """Whether this is a zip file, from which single tensors can be read."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _dicts(value: Any, around: tuple[int, ...] = ()) -> Iterator[dict[str, Any]]:
    """The tensors by name in each dict, the outer ones first. A dict may contain itself."""
    import torch

    if id(value) in around:
        return
    around = (*around, id(value))
    if isinstance(value, Mapping):
        tensors = {name: t for name, t in value.items() if isinstance(name, str) and isinstance(t, torch.Tensor)}
        if tensors:
            yield tensors
        for inner in value.values():
            yield from _dicts(inner, around)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _dicts(inner, around)
