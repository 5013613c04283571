"""What tests need of a backend that `keras.ops` does not have: gradients, and NumPy arrays of anything."""

import functools
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

BACKEND = keras.backend.backend()


def numbers(values: Any) -> NDArray[Any]:
    """A tensor or a variable as float64."""
    return np.asarray(ops.convert_to_numpy(ops.convert_to_tensor(values)), np.float64)


class Stepped(NamedTuple):
    y: Any
    dx: Any
    weights: list[Any]


def step(layer: Any, x: Any, dy: Any, **kwargs: Any) -> Stepped:
    """One call in training, and the gradients of `sum(y * dy)`; the layer's variables move."""
    x, dy = ops.convert_to_tensor(x), ops.convert_to_tensor(dy)
    if BACKEND == "torch":
        x = x.detach().requires_grad_()
        for variable in layer.trainable_variables:
            variable.value.grad = None
        y = layer(x, training=True, **kwargs)
        y.backward(dy)
        return Stepped(y.detach(), x.grad, [variable.value.grad for variable in layer.trainable_variables])
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, **kwargs)
            loss = tf.reduce_sum(y * dy)
        dx, weights = tape.gradient(loss, (x, [variable.value for variable in layer.trainable_variables]))
        return Stepped(y, dx, weights)
    learned = [variable.value for variable in layer.trainable_variables]
    other = [variable.value for variable in layer.non_trainable_variables]
    (dx, weights), (y, moved) = _compiled(layer)(x, learned, other, dy, kwargs)
    for variable, value in zip(layer.non_trainable_variables, moved, strict=True):
        variable.assign(value)
    return Stepped(y, dx, weights)


@functools.cache
def _compiled(layer: Any) -> Any:
    """A step in JAX as one program. Step by step, JAX compiles a program for each operation, which takes longer."""
    import jax

    def loss(x: Any, learned: Any, other: Any, dy: Any, kwargs: dict[str, Any]) -> Any:
        y, moved = layer.stateless_call(learned, other, x, training=True, **kwargs)
        return ops.sum(y * dy), (y, moved)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))
