"""Turn a model's batch normalizations into ours, and back into Keras', for existing models and their files.

```
model = convert(keras.models.load_model("theirs.keras"))
revert(model).save("for_everyone.keras")               # loads without this package
```
"""

from typing import Any, TypeVar

import keras

from batchnorm.keras.layers import EXTRAS, BatchNormalization, KerasBatchNormalization, adopt, release
from batchnorm.keras.models import forget_compiled, named_layers, refuse

__all__ = ["convert", "revert"]

M = TypeVar("M")


def convert(model: M, **extras: Any) -> M:
    """Turn a model's batch normalizations into ours, in place, with the same weights.

    Args:
        model: A model of any kind, or a layer.
        **extras: Arguments of `BatchNormalization` to set on all of them, including layers that are already ours:
            `virtual_batch_size`, `synchronized`, `axis_name`, `unbiased`.

    Returns:
        `model`. Layers of other classes and of subclasses stay as they are.

    Raises:
        TypeError: If `model` is not a model, or there is no such argument.
        ValueError: If the arguments contradict each other, or the settings of a layer; the model is then unchanged.
    """
    refuse(model)
    allowed = EXTRAS.keys() - {"frozen", "activation"} | {"synchronized"}
    if unknown := extras.keys() - allowed:
        raise TypeError(f"convert has no argument {', '.join(sorted(unknown))}; it has {', '.join(sorted(allowed))}")
    kinds = (KerasBatchNormalization, BatchNormalization)
    found = [layer for layer in named_layers(model).values() if type(layer) in kinds]
    checked = []
    for layer in found:  # before anything is changed
        has: dict[str, Any] = {name: getattr(layer, name, EXTRAS.get(name)) for name in ("renorm", *allowed)}
        checked.append(BatchNormalization(**(has | extras)))
    for layer, other in zip(found, checked, strict=True):
        if type(layer) is KerasBatchNormalization:
            adopt(layer)
        for name in extras:
            setattr(layer, name, getattr(other, name))
    forget_compiled(model)
    return model


def revert(model: M) -> M:
    """Undo `convert`, in place: our layers become Keras', so that a file loads without this package.

    Args:
        model: A model of any kind, or a layer.

    Returns:
        `model`.

    Raises:
        TypeError: If `model` is not a model.
        ValueError: If a layer has a setting that Keras' lacks, or is not built; the model is then unchanged.
    """
    refuse(model)
    found = {name: layer for name, layer in named_layers(model).items() if type(layer) is BatchNormalization}
    for name, layer in found.items():
        said = name or "the layer"
        if not layer.built:
            raise ValueError(f"{said} has not seen an input yet: call the model on one batch first")
        config = layer.get_config()
        more = [f"{extra}={config[extra]!r}" for extra in EXTRAS if extra in config]
        if layer.synchronized and keras.backend.backend() != "tensorflow":
            more.append("synchronized=True")
        if more:
            raise ValueError(f"{said} has {', '.join(more)}, which Keras' layer does not have: reset it first")
    for layer in found.values():
        release(layer)
    forget_compiled(model)
    return model
