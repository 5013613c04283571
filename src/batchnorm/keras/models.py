"""The layers of a model by name, and what compiled a model before its layers were changed."""

from collections.abc import Iterator
from typing import Any

import keras
from keras import ops
from numpy import asarray, float64
from numpy.typing import NDArray

__all__ = ["forget_compiled", "named_layers", "numbers", "refuse"]


def named_layers(model: Any) -> dict[str, Any]:
    """The model and all layers in it, each once, in the order in which they were made; the model's name is ''."""
    found: dict[str, Any] = {}
    for name, layer in _walk(model, ""):
        path, number = name, 1
        while path in found:  # two layers of a subclassed model may have one name
            number += 1
            path = f"{name}:{number}"
        found[path] = layer
    return found


def _walk(model: Any, name: str) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()

    def walk(layer: Any, name: str) -> Iterator[tuple[str, Any]]:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        yield name, layer
        for inner in layer._flatten_layers(include_self=False, recursive=False):
            yield from walk(inner, f"{name}/{inner.name}" if name else inner.name)

    yield from walk(model, name)


def numbers(variable: Any) -> NDArray[float64]:
    """A variable or tensor in float64, on the host."""
    tensor = ops.convert_to_tensor(variable)
    if keras.backend.backend() == "torch":
        tensor = tensor.detach()
    return asarray(asarray(ops.convert_to_numpy(tensor)), float64)


def forget_compiled(model: Any) -> None:
    """Let `fit`, `evaluate` and `predict` be compiled anew: they were for the layers as they had been."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.Model):
            layer.train_function = layer.test_function = layer.predict_function = None
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()  # it finds what it has compiled by the model's method, which is the same


def refuse(model: Any) -> None:
    """See that this is a layer or a model.

    Raises:
        TypeError: If not.
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model must be a keras.Model or a layer, got {type(model).__name__}")
