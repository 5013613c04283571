"""Batches in a form that `fit` accepts."""

from collections.abc import Iterator
from typing import Any

import keras

__all__ = ["Indexed", "inputs", "size"]


class Indexed:
    """The batches of a `PyDataset`, whose own iteration never ends."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        return (self.data[index] for index in range(len(self)))


def inputs(batch: Any) -> Any:
    """The part of a batch with which `fit` would call the model."""
    if isinstance(batch, tuple | list):
        if not 1 <= len(batch) <= 3:
            raise TypeError(
                f"a batch of {len(batch)} parts is not inputs, targets and weights; pass forward=lambda model, "
                "batch: ..."
            )
        return batch[0]
    return batch


def size(batch: Any) -> int | None:
    """The number of samples: the length of the first array; None without an array."""
    parts = batch if isinstance(batch, tuple | list) and not 1 <= len(batch) <= 3 else inputs(batch)
    shapes: Any = (getattr(leaf, "shape", ()) for leaf in keras.tree.flatten(parts))
    return next((int(shape[0]) for shape in shapes if len(shape) > 0), None)
