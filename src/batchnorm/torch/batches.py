"""Batches of any structure that data loaders produce: count their samples, move them, call a model with them."""

import copy
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

__all__ = ["call", "move", "size"]


def _is_dataclass(batch: Any) -> bool:
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)


def _is_named_tuple(batch: Any) -> bool:
    return isinstance(batch, tuple) and hasattr(batch, "_fields")


def _named(batch: Any) -> dict[str, Any] | None:
    """The parts of a batch by name; None if they have no names."""
    if isinstance(batch, PackedSequence):
        return None
    if isinstance(batch, Mapping):
        return dict(batch)
    if _is_dataclass(batch):
        return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    if _is_named_tuple(batch):
        return dict(batch._asdict())
    return None


def move(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device, in the same structure; the batch itself if they are already there."""
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        parts = dict(batch)
    elif _is_dataclass(batch):
        parts = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    elif isinstance(batch, tuple | list):
        parts = dict(enumerate(batch))
    else:
        return batch
    moved = {name: new for name, part in parts.items() if (new := move(part, device)) is not part}
    if not moved:
        return batch
    if isinstance(batch, tuple):
        items = (parts | moved).values()
        return type(batch)(*items) if _is_named_tuple(batch) else type(batch)(items)
    changed: Any = copy.copy(batch)
    for name, part in moved.items():
        if _is_dataclass(batch):
            object.__setattr__(changed, str(name), part)  # it may be frozen
        else:
            changed[name] = part
    return changed


def size(batch: Any, seen: Sequence[int] = ()) -> int | None:
    """The number of samples in a batch.

    It is the length of the first tensor, or of a list around it whose items are alike: `[x, y]` are the parts of a
    batch, but `[image, image]` may be its samples. Which of them it is, shows in what the model has done with it.

    Args:
        batch: The batch.
        seen: The lengths of the inputs that a layer of the model got from this batch, call by call.

    Returns:
        The length that the layer saw, in its first call or in all together. If it saw another one, that of the first
        tensor. None if nothing is known.
    """
    lengths = _lengths(batch) or list(seen[:1])
    counted = (count for count in (*seen[:1], sum(seen)) if count in lengths)
    return next(counted, lengths[0] if lengths else None)


def _lengths(batch: Any) -> list[int]:
    """What the number of samples may be: the length of the first tensor, then those of the lists around it."""
    if isinstance(batch, PackedSequence):
        return [int(batch.batch_sizes[0])]
    axes = _axes(batch)
    if axes is not None:
        return [len(batch)] if axes else []
    named = _named(batch)
    parts = list(named.values()) if named is not None else list(batch) if isinstance(batch, tuple | list) else []
    inside = next((found for part in parts if (found := _lengths(part))), [])
    wraps = len(parts) == 1 and len(inside) > 1  # a list of one list has as many samples as that one
    return [*inside, len(parts)] if named is None and _are_alike(parts) and not wraps else inside


def _are_alike(parts: list[Any]) -> bool:
    return len({(type(part), getattr(part, "dtype", None), _axes(part)) for part in parts}) == 1


def _axes(part: Any) -> int | None:
    """The number of axes of a tensor or an array; None for anything else."""
    return part.dim() if isinstance(part, Tensor) else getattr(part, "ndim", None)


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model with the parts of a batch that its forward accepts.

    1. Named parts become the arguments with these names.
    2. From a sequence, the forward gets as many items as it requires: labels are left out. If the first item is itself
       a batch (a mapping, or a sequence of as many items as are required), it replaces the sequence. If the first item
       may be a list of samples, followed by a list of their labels, it is not clear how to call the model.
    3. Anything else is the only argument.

    Raises:
        TypeError: If the forward requires something that the batch does not have.
    """
    parameters = list(inspect.signature(_inner(model).forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = _named(batch)
    if named is not None:
        taken = {name: part for name, part in named.items() if any_name or name in by_name}
        if taken and all(p.name in taken for p in required):
            return model(**taken)
    count = max(1, len(required))
    if isinstance(batch, tuple | list) and batch and not isinstance(batch, PackedSequence):
        first = batch[0]
        if isinstance(first, Tensor):
            if count <= len(batch):
                return model(*batch[:count])
        elif isinstance(first, PackedSequence):
            return model(*batch[:count])
        elif isinstance(first, Mapping) or _is_dataclass(first) or _is_named_tuple(first):
            return call(model, first)
        elif isinstance(first, tuple | list) and len(first) == count and not _lists_samples(batch):
            return model(*first)
    elif count == 1 and (positional or any(p.kind is p.VAR_POSITIONAL for p in parameters)):
        return model(batch)
    names = "" if named is None else f" of {', '.join(map(str, named))}"
    raise TypeError(
        f"it is not clear how to call {type(_inner(model)).__name__}.forward{inspect.signature(_inner(model).forward)} "
        f"with a batch of type {type(batch).__name__}{names}; pass forward=lambda model, batch: ..."
    )


def _lists_samples(batch: Sequence[Any]) -> bool:
    """Whether the items of a batch may be lists with an item for each sample: images, and their labels."""
    first, *others = batch
    return any(
        isinstance(other, tuple | list)
        and len(other) == len(first)
        and not (all(isinstance(item, Tensor) for item in other) and _lengths(other)[:1] == _lengths(first)[:1])
        for other in others
    )


def _inner(model: nn.Module) -> nn.Module:
    """The module inside wrappers: their forwards accept anything, but its forward has a meaningful signature."""
    while all(
        p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in inspect.signature(model.forward).parameters.values()
    ):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model
