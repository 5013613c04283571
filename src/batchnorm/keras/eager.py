"""Run models uncompiled while a tool observes their layers."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from batchnorm.keras.functional import expand_mask
from batchnorm.keras.models import to_float64

__all__ = ["eagerly", "layer_input"]

COMPILED = ("TracerArrayConversionError", "NotImplementedError", "OperatorNotAllowedInGraphError")
"""The errors that JAX and TensorFlow raise for a tensor without values."""


@contextmanager
def eagerly() -> Iterator[None]:
    """Run without gradients, and run TensorFlow functions uncompiled."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        before = tf.config.functions_run_eagerly()
        tf.config.run_functions_eagerly(True)
        try:
            yield
        finally:
            tf.config.run_functions_eagerly(before)
        return
    quiet: Any = nullcontext()
    if backend == "torch":
        import torch

        quiet = torch.no_grad()
    with quiet:
        yield


def layer_input(
    x: Any, mask: Any, axis: int, name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None] | str:
    """The input of a layer on the host, with the channels in axis 1, and how much each position counts.

    Args:
        x, mask: The input of the layer and its mask.
        axis: The layer's channel axis.
        name: The layer's name.

    Returns:
        `(N, C, *positions)`, and `(N, *positions)` or None; or the reason why its moments cannot be computed.

    Raises:
        ValueError: If the tensors have no values.
    """
    try:
        values = np.moveaxis(to_float64(x), axis, 1)
        counts = None if mask is None else to_float64(expand_mask(ops.convert_to_tensor(mask), x, axis))
    except Exception as error:
        if type(error).__name__ in COMPILED:
            raise ValueError(
                f"{name or 'the layer'} is called inside a function that is compiled on its own, where its inputs "
                "cannot be seen: call the model without it, with forward=lambda model, batch: ..."
            ) from error
        raise
    if counts is None:
        return values, None
    counts = np.moveaxis(counts, axis, 1)
    if counts.shape[1] != 1:
        return "its mask differs between channels"
    return values, np.broadcast_to(counts[:, 0], (len(values), *values.shape[2:]))
