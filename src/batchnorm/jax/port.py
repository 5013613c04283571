"""Port layers and models between Flax NNX and PyTorch or Keras, and report what the two define differently.

```
print(to_torch(nnx_model, torch_model, {"norm": "1"}))    # copy the weights of an NNX model into a PyTorch model
from_keras(keras_model, nnx_model)
```
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from batchnorm.definition import ACTIVATIONS, ActivationSpec
from batchnorm.jax.activations import resolve
from batchnorm.jax.layers import BatchNorm, adopt, source
from batchnorm.jax.linear import linear
from batchnorm.jax.modules import named_modules, refuse, to_float64
from batchnorm.jax.statistics import OURS, BatchStatistics, GhostStatistics, Renorm, RunningStatistics, Statistics
from batchnorm.whole.port import Linear, Ported, expect_names

__all__ = ["Ported", "from_keras", "from_torch", "to_keras", "to_torch"]

Names = Mapping[str, str] | None


def to_torch(model: Any, into: Any, names: Names = None) -> Ported:
    """Copy the weights of an NNX layer or model into a PyTorch layer or model.

    Outputs are equal, in evaluation and after training steps: PyTorch's `momentum` is one minus Flax's, and the running
    variance stays the biased one, `BatchStatistics(unbiased=False)`.

    Args:
        model: A batch normalization, Flax's or ours, or a model with them, `nnx.Linear`, `nnx.Conv` and
            `nnx.ConvTranspose`. Its channels are last; PyTorch's are axis 1. A linear layer after a flattening is right
            only if both flatten in one order, and a convolution only if both pad and stride alike.
        into: The PyTorch layer or model that gets the weights. Its batch normalizations become ours.
        names: The PyTorch layer of each NNX layer, where the names differ.

    Returns:
        `into`, and the changes.

    Raises:
        ValueError: If a layer is of an unknown kind, or has no counterpart of the same shape; nothing has changed then.
        TypeError: If `model` is not a module.
    """
    return Ported(into, _port(model, _modules_torch(into), names, _fit_torch, _give_torch))


def from_torch(model: Any, into: Any, names: Names = None) -> Ported:
    """Copy the weights of a PyTorch layer or model into an NNX layer or model: the reverse of `to_torch`.

    The running variance stays the unbiased one: batch normalizations become ours, with
    `BatchStatistics(unbiased=True)`.

    Args:
        model: The PyTorch layer or model.
        into: The NNX layer or model that gets the weights.
        names: The PyTorch layer of each NNX layer, where the names differ.

    Returns:
        `into`, and the changes.

    Raises:
        ValueError: As in `to_torch`, and if a layer averages over all batches (`momentum=None`) or keeps no statistics.
        TypeError: If `into` is not a module.
    """
    return Ported(into, _port(into, _modules_torch(model), names, _fit_torch, _take_torch))


def to_keras(model: Any, into: Any, names: Names = None) -> Ported:
    """Copy the weights of an NNX layer or model into a Keras layer or model, which must be built.

    Args, Returns and Raises: as `to_torch`. Names of Keras layers in other layers are such as "block/norm". A separable
    convolution is the counterpart of two layers, with `names={"depthwise": "separable", "pointwise": "separable"}`.
    """
    return Ported(into, _port(model, _layers_keras(into), names, _fit_keras, _give_keras))


def from_keras(model: Any, into: Any, names: Names = None) -> Ported:
    """Copy the weights of a Keras layer or model, which must be built, into an NNX layer or model.

    Args, Returns and Raises: as `from_torch`. Names of Keras layers are as in `to_keras`.
    """
    return Ported(into, _port(into, _layers_keras(model), names, _fit_keras, _take_keras))


# --- Pairs of layers --------------------------------------------------------------------------------------------------

Fit = Callable[[Any, Any], str]
"""The reason why two layers do not match; '' if they do."""

Move = Callable[[Any, Any], list[str]]
"""Copies the weights, and returns what the two define differently."""


def _port(model: Any, others: Mapping[str, Any], names: Names, fit: Fit, move: Move) -> dict[str, tuple[str, ...]]:
    """Pair the layers by name, check all pairs, then copy the weights."""
    refuse(model)
    expect_names(names)
    weighted = {
        name: module
        for name, module in named_modules(model).items()
        if any(isinstance(value, nnx.Param | nnx.BatchStat) for value in vars(module).values())
    }
    if unknown := set(names or {}) - set(weighted):
        raise ValueError(f"the NNX model has no layer with weights named {', '.join(sorted(unknown))}")
    pairs = {}
    for name, module in weighted.items():
        other = (names or {}).get(name, name)
        other = other if other in others else other.replace(".", "/")
        if other not in others:
            raise ValueError(f"the other model has no {name!r}: name the counterpart with names={{{name!r}: ...}}")
        if problem := fit(module, others[other]):
            raise ValueError(
                f"{name or 'the layer'}, a {type(module).__name__}, and {other or 'the other'}, a "
                f"{type(others[other]).__name__}, {problem}"
            )
        pairs[name] = module, others[other]
    return {name: tuple(move(*pair)) for name, pair in pairs.items()}


def _assign(variable: Any, values: Any) -> None:
    variable[...] = jnp.asarray(np.asarray(values), variable[...].dtype)


def _fit_linear(module: Any, others: list[Linear]) -> str:
    """Why none of these is the counterpart of a module; '' if one is."""
    own = linear(module)
    if own is None:
        return "cannot be ported: known are batch normalizations, Linear, Conv and ConvTranspose"
    if not others:
        return "are not of the same kind"
    problems = [own.differs_from(other) for other in others]
    return "" if "" in problems else problems[-1]


def _move_linear(module: Any, others: list[Linear], back: bool = False) -> list[str]:
    """Copy the weights of a linear layer to its counterpart among these, or from it."""
    own = linear(module)
    assert own is not None
    other = next(other for other in others if not own.differs_from(other))
    source, target = (other, own) if back else (own, other)
    target.write(source.map)
    said = [] if source.shape == target.shape else [f"the kernel of shape {source.shape} has shape {target.shape}"]
    if own.is_transposed and not module.transpose_kernel:
        said.append("the positions in the kernel are in the reverse order")
    return said


def _no_counterpart(module: Any) -> str:
    return f"cannot be ported: only NNX has the source of statistics {source(module)!r}"


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def _modules_torch(model: Any) -> dict[str, Any]:
    from batchnorm.torch.survey import expect_module

    expect_module(model)
    return dict(model.named_modules())


def _parts_torch(other: Any) -> list[Linear]:
    from batchnorm.torch.linear import linear

    found = linear(other)
    return [] if found is None else [found]


def _fit_torch(module: Any, other: Any) -> str:
    from torch.nn.modules.batchnorm import _BatchNorm

    if not isinstance(module, nnx.BatchNorm):
        return _fit_linear(module, _parts_torch(other))
    if not isinstance(other, _BatchNorm):
        return "are not of the same kind"
    if other.running_mean is None or other.momentum is None:
        return "differ: the NNX layer keeps running statistics with a momentum, the other does not"
    if other.num_features != module.num_features:
        return f"have {module.num_features} and {other.num_features} channels"
    if (module.use_scale or module.use_bias) and not other.affine:
        return "differ in scale and bias"
    return "" if type(source(module)) in OURS else _no_counterpart(module)


def _give_torch(module: Any, other: Any) -> list[str]:
    import torch

    if not isinstance(module, nnx.BatchNorm):
        return _move_linear(module, _parts_torch(other))
    from batchnorm import torch as ours
    from batchnorm.torch.adopt import OURS, adopt

    if type(other) in OURS:
        adopt(other)
    statistics = source(module)
    inner: Any = ours.BatchStatistics(statistics.unbiased)
    if module.axis_name is not None:
        inner = ours.SyncStatistics(unbiased=statistics.unbiased)
    if statistics.is_constant:
        inner = ours.RunningStatistics()
    elif statistics.group_size is not None:
        inner = ours.GhostStatistics(statistics.group_size, statistics.unbiased)
    elif statistics.limits is not None:
        r_max, d_max = statistics.limits
        inner = ours.Renorm(float(r_max), float(d_max), 0, inner)
    other.statistics, other.activation = inner, _spec(getattr(module, "activation", None), resolve)
    other.eps, other.momentum = module.epsilon, 1 - module.momentum
    said = [f"momentum {module.momentum:g} (weight of the old) is {other.momentum:g} (weight of the new)"]
    with torch.no_grad():
        for tensor, variable, name, neutral in (
            (other.weight, module.scale, "weight", 1.0), (other.bias, module.bias, "bias", 0.0),
        ):  # fmt: skip
            if variable is not None:
                tensor.copy_(torch.from_numpy(to_float64(variable))).requires_grad_(isinstance(variable, nnx.Param))
            elif tensor is not None:
                tensor.fill_(neutral).requires_grad_(False)
                said.append(f"{name} is {neutral:g} and does not learn")
        other.running_mean.copy_(torch.from_numpy(to_float64(module.mean)))
        other.running_var.copy_(torch.from_numpy(to_float64(module.var)))
    return said


def _take_torch(module: Any, other: Any) -> list[str]:
    from batchnorm.torch.activations import resolve as torch_resolve

    def values(tensor: Any) -> Any:
        return tensor.detach().cpu().double().numpy()

    if not isinstance(module, nnx.BatchNorm):
        return _move_linear(module, _parts_torch(other), back=True)
    from batchnorm import torch as ours

    statistics: Statistics = BatchStatistics()
    match getattr(other, "statistics", None):
        case None:
            pass
        case ours.BatchStatistics(unbiased) | ours.SyncStatistics(_, unbiased):
            statistics = BatchStatistics(unbiased)
        case ours.GhostStatistics(batch_size, unbiased):
            statistics = GhostStatistics(batch_size, unbiased)
        case ours.RunningStatistics():
            statistics = RunningStatistics()
        case ours.Renorm(r_max, d_max, steps, inner) if int(other.num_batches_tracked) >= 8 * steps:
            statistics = Renorm(r_max, d_max, inner.unbiased)
        case ours.Renorm():
            raise ValueError(
                "NNX's layer counts no batches, so it has no counterpart of a Renorm that still warms up: port it with "
                "warmup_steps=0, and raise its limits by a schedule"
            )
        case theirs:
            raise ValueError(f"NNX has no counterpart of {theirs!r}: port the layer without it")
    _become_ours(module, _spec(getattr(other, "activation", None), torch_resolve), statistics)
    module.epsilon, module.momentum = other.eps, 1 - other.momentum
    for variable, tensor in ((module.scale, other.weight), (module.bias, other.bias)):
        if variable is not None and tensor is not None:
            _assign(variable, values(tensor))
    _assign(module.mean, values(other.running_mean))
    _assign(module.var, values(other.running_var))
    said = [f"momentum {other.momentum:g} (weight of the new) is {module.momentum:g} (weight of the old)"]
    for name, variable in ("weight", module.scale), ("bias", module.bias):
        parameter = getattr(other, name)
        if parameter is not None and not parameter.requires_grad and isinstance(variable, nnx.Param):
            said.append(f"{name} does not learn in PyTorch, but it does here: freeze(layer, affine=True)")
    return [*said, "the running variance stays the unbiased one"] if statistics.unbiased else said


def _spec(activation: Any, resolve: Any) -> ActivationSpec:
    """An activation in the words that all frameworks have.

    Raises:
        ValueError: If there are none.
    """
    (name, parameter), then = resolve(activation)
    if then is not None:
        said = getattr(then, "__name__", type(then).__name__)
        raise ValueError(f"the activation {said} has no counterpart: port the layer without it")
    return None if name == "none" else (name, parameter) if ACTIVATIONS[name].parameter else name


def _become_ours(module: Any, activation: Any, statistics: Statistics) -> None:
    if type(module) is not BatchNorm:
        adopt(module)
    module.activation = _spec(activation, resolve)
    module.statistics = statistics


# --- Keras ------------------------------------------------------------------------------------------------------------


def _layers_keras(model: Any) -> dict[str, Any]:
    from batchnorm.keras import models

    models.refuse(model)
    return models.named_layers(model)


def _fit_keras(module: Any, other: Any) -> str:
    from keras import layers

    from batchnorm.keras.linear import linear_parts

    if not other.built:
        return "cannot be ported: the Keras layer has not seen an input yet"
    if not isinstance(module, nnx.BatchNorm):
        return _fit_linear(module, linear_parts(other))
    if not isinstance(other, layers.BatchNormalization):
        return "are not of the same kind"
    if other.moving_mean.shape[0] != module.num_features:
        return f"have {module.num_features} and {other.moving_mean.shape[0]} channels"
    if (module.use_scale, module.use_bias) != (other.scale, other.center):
        return "differ in scale and bias"
    if type(source(module)) not in OURS:
        return _no_counterpart(module)
    if other.renorm or source(module).limits is not None:
        return "cannot be ported: they keep different statistics for renormalization"
    return ""


def _weights(module: Any, other: Any) -> list[tuple[Any, Any]]:
    """The pairs of variables of two batch normalizations."""
    pairs = [
        (module.mean, other.moving_mean), (module.var, other.moving_variance), (module.scale, other.gamma),
        (module.bias, other.beta),
    ]  # fmt: skip
    return [(own, theirs) for own, theirs in pairs if own is not None]


def _give_keras(module: Any, other: Any) -> list[str]:
    from batchnorm.keras import layers as ours
    from batchnorm.keras.activations import Activation
    from batchnorm.keras.linear import linear_parts

    if not isinstance(module, nnx.BatchNorm):
        return _move_linear(module, linear_parts(other))
    if type(other) is not ours.BatchNormalization:
        ours.adopt(other)
    statistics = source(module)
    other.activation = Activation(_spec(getattr(module, "activation", None), resolve))
    other.unbiased, other.momentum, other.epsilon = statistics.unbiased, module.momentum, module.epsilon
    other.virtual_batch_size = statistics.group_size
    other.synchronized = module.axis_name is not None
    other.frozen = () if statistics.is_constant else None
    for own, theirs in _weights(module, other):
        theirs.assign(to_float64(own))
    return []


def _take_keras(module: Any, other: Any) -> list[str]:
    from batchnorm.keras import layers as ours
    from batchnorm.keras.linear import linear_parts
    from batchnorm.keras.models import to_float64 as keras_values

    if not isinstance(module, nnx.BatchNorm):
        return _move_linear(module, linear_parts(other), back=True)
    statistics: Statistics = BatchStatistics(unbiased=False)
    activation = None
    if isinstance(other, ours.BatchNormalization):
        if not other.activation.is_fused:
            raise ValueError(f"{other.name} has the activation {other.activation.config!r}, which NNX's layer lacks")
        activation, statistics = other.activation.fused, BatchStatistics(other.unbiased)
        if other.virtual_batch_size is not None:
            statistics = GhostStatistics(other.virtual_batch_size, other.unbiased)
        if other.frozen is not None:
            statistics = RunningStatistics()
    if not other.trainable:  # in Keras it then normalizes by its moving statistics, in training too
        statistics = RunningStatistics()
    _become_ours(module, activation, statistics)
    module.momentum, module.epsilon = other.momentum, other.epsilon
    for own, theirs in _weights(module, other):
        _assign(own, keras_values(theirs))
    return []
