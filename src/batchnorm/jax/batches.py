"""What a batch of data is: how a model is called with it, its size, and what of it comes into a layer."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from numpy.typing import NDArray

from batchnorm.jax.functional import expand_mask
from batchnorm.jax.modules import to_float64

__all__ = ["call", "layer_input", "size"]


def call(model: Any, batch: Any) -> Any:
    """The model's output for a batch: an array, or a tuple or list that begins with the inputs."""
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def size(batch: Any) -> int | None:
    """The number of samples; None if it cannot be seen."""
    shapes: Any = (getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(batch))
    return next((int(shape[0]) for shape in shapes if len(shape) > 0), None)


def layer_input(
    x: Any, mask: Any, axis: int, name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None] | str:
    """The input of a layer on the host, with the channels second, and how much each position counts.

    Args:
        x, mask: What came into the layer.
        axis: Its channel axis.
        name: Its name.

    Returns:
        `(N, C, *positions)`, and `(N, *positions)` or None; or the reason why they cannot be taken.

    Raises:
        ValueError: If the arrays have no values.
    """
    if isinstance(x, Tracer):
        raise ValueError(
            f"{name or 'the layer'} is called inside a function that is compiled on its own, where its inputs cannot "
            "be seen: call the model without it, with forward=lambda model, batch: ..."
        )
    values = np.moveaxis(to_float64(x), axis, 1)
    if mask is None:
        return values, None
    counts = np.moveaxis(to_float64(expand_mask(jax.numpy.asarray(mask), x, axis % x.ndim)), axis, 1)
    if counts.shape[1] != 1:
        return "its mask counts other positions in each channel"
    return values, np.broadcast_to(counts[:, 0], (len(values), *values.shape[2:]))
