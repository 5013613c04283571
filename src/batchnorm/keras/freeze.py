"""Freeze the batch normalizations of a model until `unfreeze`.

```
freeze(backbone)     # its statistics no longer change, neither in fit nor with training=True
unfreeze(backbone)   # exactly as before
```
"""

from typing import Any, TypeVar

from batchnorm.keras.layers import BatchNormalization, KerasBatchNormalization, adopt, release
from batchnorm.keras.models import forget_compiled, named_layers, refuse

__all__ = ["freeze", "unfreeze"]

M = TypeVar("M")
WEIGHTS = ("gamma", "beta")


def freeze(model: M, *, affine: bool = False) -> M:
    """Make batch normalizations use their moving statistics in training as well, without changing them.

    Keras' layers become ours, in place, with the same weights. In Keras' layers one attribute, `trainable`, decides
    both which statistics are used and whether gamma and beta learn, and every `model.trainable = True` changes it.

    A compiled model that contains this one must be compiled again, as after a change of `trainable`. So must this one
    if gamma and beta stop learning.

    Args:
        model: A model of any kind, or a layer.
        affine: Whether gamma and beta stop learning as well.

    Returns:
        `model`. Layers that are already frozen stay as they are.

    Raises:
        TypeError: If `model` is not a model.
        ValueError: If it has no batch normalization, or one whose class is neither Keras' nor ours, or one that is not
            built; the model is then unchanged.
    """
    refuse(model)
    layers = {name: layer for name, layer in named_layers(model).items() if isinstance(layer, KerasBatchNormalization)}
    if not layers:
        raise ValueError("model has no batch normalization to freeze")
    for name, layer in layers.items():
        said = f"{name or 'the layer'} ({type(layer).__name__})"
        if not layer.built:
            raise ValueError(f"{said} does not know its size yet: call the model on one batch first")
        if type(layer) not in (KerasBatchNormalization, BatchNormalization) or "call" in vars(layer):
            inherits = type(layer).call in (KerasBatchNormalization.call, BatchNormalization.call)
            own = "class" if inherits and "call" not in vars(layer) else "call"
            raise ValueError(
                f"{said} has a {own} of its own, so it cannot be frozen: freeze the other layers one by one"
            )
    for layer in layers.values():
        if getattr(layer, "frozen", None) is None:
            _freeze(layer, affine)
    forget_compiled(model)
    return model


def _freeze(layer: Any, affine: bool) -> None:
    if theirs := type(layer) is not BatchNormalization:
        adopt(layer)
    weights = {name: getattr(layer, name) for name in WEIGHTS if getattr(layer, name) is not None}
    layer.frozen = tuple(name for name, weight in weights.items() if affine and weight.trainable)
    layer._hold()
    layer.frozen_from_keras = theirs


def unfreeze(model: M) -> M:
    """Undo `freeze`, in place: restore each layer's class, and which weights learn.

    A file says that a layer is frozen, but not that it was Keras' own: in a model from a file it stays ours.

    Args:
        model: The model that was frozen, or a part of it.

    Returns:
        `model`. Layers that are not frozen stay as they are.

    Raises:
        TypeError: If `model` is not a model.
    """
    refuse(model)
    for layer in named_layers(model).values():
        if type(layer) is not BatchNormalization or layer.frozen is None:
            continue
        learned, layer.frozen = layer.frozen, None
        for name in learned:
            getattr(layer, name).trainable = layer.trainable
        theirs = layer.__dict__.pop("frozen_from_keras", False)  # absent in a model loaded from a file
        if theirs and layer.activation.is_none:
            release(layer)
    forget_compiled(model)
    return model
