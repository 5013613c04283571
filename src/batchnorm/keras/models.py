"""The layers of a model by name, its compiled functions, and its values in float64."""

from collections.abc import Iterator
from typing import Any

import keras
from keras import ops
from numpy import asarray, float64
from numpy.typing import NDArray

from batchnorm.keras.layers import KerasBatchNormalization

__all__ = ["forget_compiled", "named_layers", "normalizations", "refuse", "to_float64"]


def named_layers(model: Any) -> dict[str, Any]:
    """The model and all its layers, each once, in order of creation; the model's own name is ''."""
    found: dict[str, Any] = {}
    for name, layer in _walk(model, ""):
        path, number = name, 1
        while path in found:  # two layers of a subclassed model may have the same name
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


def normalizations(model: Any) -> dict[str, Any]:
    """The batch normalizations of a model, by name."""
    found = named_layers(model).items()
    return {name: layer for name, layer in found if isinstance(layer, KerasBatchNormalization)}


def to_float64(variable: Any) -> NDArray[float64]:
    """A variable or tensor as a float64 array on the host."""
    tensor = ops.convert_to_tensor(variable)
    if keras.backend.backend() == "torch":
        tensor = tensor.detach()
    return asarray(asarray(ops.convert_to_numpy(tensor)), float64)


def forget_compiled(model: Any) -> None:
    """Make `fit`, `evaluate` and `predict` compile again after layers have changed."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.Model):
            layer.train_function = layer.test_function = layer.predict_function = None
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()  # JAX's cache is keyed by the model's method, which has not changed


def refuse(model: Any) -> None:
    """Raise an error unless `model` is a layer or a model.

    Raises:
        TypeError: If it is neither.
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model must be a keras.Model or a layer, got {type(model).__name__}")
