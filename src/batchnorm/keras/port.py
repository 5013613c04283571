"""Port layers and models between Keras and PyTorch, and report what the two define differently.

```
result = to_torch(keras_layer)          # a layer of batchnorm.torch
print(result)                           # the changes
to_torch(keras_model, torch_model, {"stem/bn": "stem.1"})
```
"""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from batchnorm.keras.layers import BatchNormalization, KerasBatchNormalization
from batchnorm.keras.linear import linear_parts
from batchnorm.keras.models import named_layers, refuse, to_float64
from batchnorm.whole.port import Ported, expect_names

__all__ = ["Ported", "from_torch", "to_torch"]

Names = Mapping[str, str | tuple[str, str]] | None
"""The PyTorch layer of each Keras layer; of a separable convolution, the depthwise and the pointwise one."""


def to_torch(model: Any, into: Any = None, names: Names = None) -> Ported:
    """Keras' batch normalization as a layer of `batchnorm.torch`, or a Keras model's weights in a PyTorch model.

    Outputs are equal, in evaluation and after training steps: PyTorch's `momentum` is one minus Keras', and the running
    variance stays the biased one, `BatchStatistics(unbiased=False)`, unless the layer has `unbiased=True`.

    Args:
        model: A built layer, Keras' or ours; or a model.
        into: For a model, the PyTorch model that gets its weights: its batch normalizations, dense layers and
            convolutions, also transposed, depthwise and separable ones. A dense layer after a Flatten is right only if
            both models flatten in the same order, and a convolution only if both pad and stride alike.
        names: The PyTorch layer of each Keras layer, where the names differ. A separable convolution is two layers in
            PyTorch: `{"separable": ("depthwise", "pointwise")}`.

    Returns:
        A layer in evaluation, or `into`; and the changes.

    Raises:
        ValueError: If a layer is not built, is of an unknown kind, or has no counterpart of the same shape; nothing has
            changed then.
        TypeError: If `into` is missing for a model.
    """
    if isinstance(model, KerasBatchNormalization):
        return Ported(*_layer_to_torch(model))
    if into is None:
        raise TypeError(f"{type(model).__name__} has several layers: pass the PyTorch model that gets their weights")
    return _model(model, into, names, _give)


def from_torch(model: Any, into: Any = None, names: Names = None, *, axis: int = 1) -> Ported:
    """PyTorch's batch normalization as our layer for Keras, or a PyTorch model's weights in a Keras model.

    Outputs are equal, in evaluation and after training steps: Keras' `momentum` is one minus PyTorch's, and the moving
    variance stays the unbiased one, `unbiased=True`.

    Args:
        model: A layer, PyTorch's or ours; or a model.
        into: For a model, the Keras model that gets the weights. Its batch normalizations become ours, because Keras'
            cannot keep the unbiased variance.
        names: The PyTorch layer of each Keras layer, as in `to_torch`.
        axis: The channel axis of the new layer's inputs: 1 as in PyTorch, -1 as usual in Keras.

    Returns:
        A built layer, or `into`; and the changes.

    Raises:
        ValueError: If a layer keeps no running statistics or averages over all batches (`momentum=None`), is of an
            unknown kind, or has no counterpart of the same shape; nothing has changed then.
        TypeError: If `into` is missing for a model.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    if isinstance(model, _BatchNorm):
        return Ported(*_layer_from_torch(model, axis))
    if into is None:
        raise TypeError(f"{type(model).__name__} has several layers: pass the Keras model that gets their weights")
    return _model(into, model, names, _take)


# --- One layer --------------------------------------------------------------------------------------------------------


def _layer_to_torch(layer: Any) -> tuple[Any, dict[str, tuple[str, ...]]]:
    import torch

    from batchnorm.torch import BatchNorm1d, BatchNorm2d, BatchNorm3d

    if not layer.built:
        raise ValueError(f"{layer.name} has not seen an input yet: call it on one batch first")
    rank = layer.input_spec.ndim
    kinds: dict[int, Any] = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
    if rank not in kinds:
        raise ValueError(f"{layer.name} has inputs of {rank} axes; PyTorch has layers for 2 to 5")
    activation = layer.activation.fused if isinstance(layer, BatchNormalization) else None
    if isinstance(layer, BatchNormalization) and not layer.activation.is_fused:
        raise ValueError(
            f"{layer.name} has the activation {layer.activation.config!r}, which batchnorm.torch does not support"
        )
    channels = layer.moving_mean.shape[0]
    new = kinds[rank](channels, layer.epsilon, 1.0 - layer.momentum, activation=activation)
    new = new.to(torch.float64 if layer.variable_dtype == "float64" else torch.float32)
    said = _set(layer, new)
    if layer.axis % rank != 1:
        said.append(f"channels are axis 1 of the inputs, not {layer.axis}")
    return new.eval(), {"": tuple(said)}


def _set(layer: Any, new: Any) -> list[str]:
    """Copy a Keras layer to a PyTorch layer, except the activation, and return what the two define differently."""
    import torch

    from batchnorm.torch import BatchStatistics, GhostStatistics, Renorm, RunningStatistics, SyncStatistics

    said = [f"momentum {layer.momentum:g} (weight of the old) is {1 - layer.momentum:g} (weight of the new)"]
    unbiased = bool(getattr(layer, "unbiased", False))
    statistics: Any = SyncStatistics(unbiased=unbiased) if layer.synchronized else BatchStatistics(unbiased)
    if layer.renorm:
        clipping = layer.renorm_clipping or {}
        statistics = Renorm(clipping.get("rmax", np.inf), clipping.get("dmax", np.inf), 0, statistics)
        said.append("renormalization corrects towards the running statistics; rmin is always 1/rmax")
    elif getattr(layer, "virtual_batch_size", None) is not None:
        statistics = GhostStatistics(layer.virtual_batch_size, unbiased)
    if not layer.trainable or getattr(layer, "frozen", None) is not None:
        statistics = RunningStatistics()
        said.append("it is frozen: RunningStatistics()")
    elif not unbiased:
        said.append("the running variance stays the biased one")
    new.statistics = statistics
    new.eps, new.momentum = layer.epsilon, 1.0 - layer.momentum
    with torch.no_grad():
        for name, variable, neutral in (("weight", layer.gamma, 1.0), ("bias", layer.beta, 0.0)):
            parameter = getattr(new, name)
            if variable is None:
                parameter.fill_(neutral).requires_grad_(False)
                said.append(f"{name} is {neutral:g} and does not learn")
            else:
                parameter.copy_(torch.from_numpy(to_float64(variable))).requires_grad_(bool(variable.trainable))
        new.running_mean.copy_(torch.from_numpy(to_float64(layer.moving_mean)))
        new.running_var.copy_(torch.from_numpy(to_float64(layer.moving_variance)))
    return said


def _layer_from_torch(layer: Any, axis: int) -> tuple[Any, dict[str, tuple[str, ...]]]:
    from batchnorm.torch.fuse import steps

    _check_torch(layer, "the layer")
    if inside := steps(layer):
        raise ValueError(f"the layer ({type(layer).__name__}) also calls {inside[0]}: port a BatchNorm without it")
    ranks = {"1": 2, "2": 4, "3": 5}
    rank = next((rank for digit, rank in ranks.items() if f"{digit}d" in type(layer).__name__), 4)
    new = BatchNormalization(axis=axis, center=layer.affine, scale=layer.affine)
    shape: list[int | None] = [None] * rank
    shape[axis] = layer.num_features
    new.build(tuple(shape))
    new.input_spec = keras.layers.InputSpec(axes={axis: layer.num_features})  # any rank, like a BatchNorm1d
    said = _get(new, layer)
    if axis != 1:
        said.append(f"channels are axis {axis} of the inputs, not 1")
    return new, {"": tuple(said)}


def _check_torch(layer: Any, name: str) -> None:
    from batchnorm.torch.survey import deviation

    if reason := deviation(layer):
        raise ValueError(f"{name} ({type(layer).__name__}) {reason}: what it computes is not known")
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(f"{name} keeps no running statistics (track_running_stats=False), but Keras' always does")
    if layer.momentum is None:
        raise ValueError(f"{name} averages over all batches (momentum=None), which Keras cannot do: set a momentum")


def _get(new: Any, layer: Any) -> list[str]:
    """Copy everything from a PyTorch layer to our Keras layer, and return what the two define differently."""
    from batchnorm.keras.activations import Activation
    from batchnorm.torch import BatchStatistics, GhostStatistics, RunningStatistics, SyncStatistics
    from batchnorm.torch.activations import resolve

    new.momentum, new.epsilon, new.unbiased = 1.0 - layer.momentum, layer.eps, True
    said = [f"momentum {layer.momentum:g} (weight of the new) is {new.momentum:g} (weight of the old)"]
    statistics = getattr(layer, "statistics", None)
    match statistics:
        case None:
            pass
        case BatchStatistics():
            new.unbiased = statistics.unbiased
        case GhostStatistics():
            new.virtual_batch_size, new.unbiased = statistics.batch_size, statistics.unbiased
        case SyncStatistics():
            new.synchronized, new.unbiased = True, statistics.unbiased
        case RunningStatistics():
            new.frozen = ()
            said.append("it is frozen")
        case _:
            raise ValueError(f"Keras has no counterpart of {statistics!r}: port the layer without it")
    if new.unbiased:
        said.append("the moving variance stays the unbiased one")
    (name, parameter), then = resolve(getattr(layer, "activation", None))
    if then is not None:
        raise ValueError(
            f"the activation {getattr(then, '__name__', then)} has no counterpart in Keras: port the layer without it"
        )
    new.activation = Activation((name, parameter) if name in ("leaky_relu", "elu") else name)
    pairs = [("moving_mean", layer.running_mean), ("moving_variance", layer.running_var)]
    if layer.affine:
        pairs += [("gamma", layer.weight), ("beta", layer.bias)]
        for name in ("gamma", "beta"):
            getattr(new, name).trainable = bool(dict(pairs)[name].requires_grad)
    for name, tensor in pairs:
        getattr(new, name).assign(tensor.detach().cpu().double().numpy())
    return said


# --- Whole models -----------------------------------------------------------------------------------------------------


def _model(keras_model: Any, torch_model: Any, names: Names, move: Any) -> Ported:
    """Pair the layers by name, check all of them, then move the weights."""
    from batchnorm.torch.survey import expect_module

    refuse(keras_model)
    expect_module(torch_model)
    expect_names(names)
    given: Mapping[str, Any] = names or {}
    theirs = dict(torch_model.named_modules())
    weighted = {
        name: layer
        for name, layer in named_layers(keras_model).items()
        if layer.weights and not layer._flatten_layers(include_self=False, recursive=False)
    }
    if unknown := set(given) - set(weighted):
        raise ValueError(f"the Keras model has no layer with weights named {', '.join(sorted(unknown))}")
    pairs: dict[str, tuple[Any, list[Any]]] = {}
    for name, layer in weighted.items():
        others = given.get(name, name.replace("/", "."))
        others = (others,) if isinstance(others, str) else tuple(others)
        parts = len(linear_parts(layer)) or 1
        if len(others) != parts:
            raise ValueError(
                f"{name}, a {type(layer).__name__}, has {parts} counterparts in PyTorch, its depthwise and its "
                f"pointwise convolution: give names={{{name!r}: (..., ...)}}"
                if parts > 1
                else f"{name}, a {type(layer).__name__}, has one counterpart in PyTorch, got {others}"
            )
        for other in others:
            if other not in theirs:
                raise ValueError(
                    f"the PyTorch model has no {other!r}: name the counterpart with names={{{name!r}: ...}}"
                )
        modules = [theirs[other] for other in others]
        _fit(name, layer, others, modules)
        pairs[name] = layer, modules
    taken = {id(module) for _, modules in pairs.values() for module in modules}
    for name, module in theirs.items():
        if id(module) not in taken and any(True for _ in module.parameters(recurse=False)):
            raise ValueError(f"{name}, a {type(module).__name__} of the PyTorch model, has no counterpart: give names")
    changes = {name: tuple(move(layer, modules)) for name, (layer, modules) in pairs.items()}
    return Ported(torch_model if move is _give else keras_model, changes)


def _fit(name: str, layer: Any, others: tuple[str, ...], modules: list[Any]) -> None:
    """Check that a layer and its counterparts match."""
    from torch.nn.modules.batchnorm import _BatchNorm

    from batchnorm.torch.linear import linear

    def wrong(what: str, at: int = 0) -> ValueError:
        theirs = f"{others[at]}, a {type(modules[at]).__name__}"
        return ValueError(f"{name}, a {type(layer).__name__}, and {theirs}, {what}")

    if isinstance(layer, KerasBatchNormalization):
        (module,) = modules
        if not isinstance(module, _BatchNorm):
            raise wrong("are not of the same kind")
        _check_torch(module, others[0])
        if module.num_features != layer.moving_mean.shape[0]:
            raise wrong(f"have {layer.moving_mean.shape[0]} and {module.num_features} channels")
        if not module.affine and (layer.scale or layer.center):
            raise wrong("differ in gamma and beta")
        return
    parts = linear_parts(layer)
    found = [linear(module) for module in modules]
    unknown: list[Any] = [None]
    for at, (part, other) in enumerate(zip(parts or unknown, found, strict=True)):
        if part is None or other is None:
            raise wrong("cannot be ported: known are batch normalizations, Dense and convolutions", at)
        if problem := part.differs_from(other):
            raise wrong(problem, at)


def _give(layer: Any, modules: list[Any]) -> list[str]:
    """Copy Keras' weights to PyTorch."""
    from batchnorm.torch.adopt import adopt, hindrance
    from batchnorm.torch.fuse import is_ours

    if isinstance(layer, KerasBatchNormalization):
        (module,) = modules
        if not (is_ours(module) or hindrance(module)):
            adopt(module)
        return _set(layer, module)
    return _move(layer, modules, back=False)


def _take(layer: Any, modules: list[Any]) -> list[str]:
    """Copy PyTorch's weights to Keras."""
    from batchnorm.keras.layers import adopt

    if isinstance(layer, KerasBatchNormalization):
        if type(layer) is KerasBatchNormalization:
            adopt(layer)
        return _get(layer, *modules)
    return _move(layer, modules, back=True)


def _move(layer: Any, modules: list[Any], back: bool) -> list[str]:
    """Copy the weights of linear layers, in one of the two directions."""
    from batchnorm.torch.linear import linear

    said = []
    for part, module in zip(linear_parts(layer), modules, strict=True):
        other = linear(module)
        assert other is not None
        source, target = (other, part) if back else (part, other)
        target.write(source.map)
        said.append(f"the kernel of shape {source.shape} has shape {target.shape}")
    return said
