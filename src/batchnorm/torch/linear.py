"""PyTorch's convolutions, linear layers and normalizations as arrays for folding, and back."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from batchnorm.torch.adapters import eps_of
from batchnorm.torch.dataflow import TRANSPOSED
from batchnorm.whole.linear import LinearMap, Normalization, exchange_ends
from batchnorm.whole.port import Linear

__all__ = ["linear", "read_map", "read_normalization", "write_map"]

Array = NDArray[np.float64]


def read_map(layer: Any) -> LinearMap:
    """The linear map of a layer, from the weight that its forward uses."""
    weight, bias = _tensor(layer, "weight"), _tensor(layer, "bias")
    kernel, groups = _float64(weight), getattr(layer, "groups", 1)
    matrix = exchange_ends(kernel, groups) if isinstance(layer, TRANSPOSED) else kernel
    offset = np.zeros(len(matrix)) if bias is None else _float64(bias)
    return LinearMap(matrix, offset, groups, str(weight.dtype).removeprefix("torch."))


def write_map(layer: Any, map: LinearMap) -> None:
    """Give a layer the numbers of a map, rounded once, in plain parameters like its own; it has a bias from then on."""
    _make_plain(layer)
    offset = torch.from_numpy(map.offset)
    with torch.no_grad():
        _write_weight(layer, map)
        if layer.bias is None:
            layer.bias = nn.Parameter(offset.to(layer.weight), requires_grad=layer.weight.requires_grad)
        else:
            layer.bias.copy_(offset)


def _write_weight(layer: Any, map: LinearMap) -> None:
    kernel = exchange_ends(map.matrix, map.groups) if isinstance(layer, TRANSPOSED) else map.matrix
    layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(kernel)))


def linear(layer: Any) -> Linear | None:
    """A layer for porting; None if it is neither a convolution nor linear, or makes its weights from others."""
    if not isinstance(layer, nn.Linear | _ConvNd) or is_parametrized(layer) or "weight" not in layer._parameters:
        return None

    def write(map: LinearMap) -> None:
        with torch.no_grad():
            _write_weight(layer, map)
            if layer.bias is not None:
                layer.bias.copy_(torch.from_numpy(map.offset))

    return Linear(
        read_map(layer), isinstance(layer, TRANSPOSED), layer.bias is not None, tuple(layer.weight.shape), write
    )


def read_normalization(layer: Any) -> Normalization:
    """The constants of a normalization in evaluation."""
    weight, bias = (None if tensor is None else _float64(tensor) for tensor in (layer.weight, layer.bias))
    return Normalization(_float64(layer.running_mean), _float64(layer.running_var), weight, bias, eps_of(layer))


def _tensor(layer: Any, name: str) -> Any:
    """The tensor that the forward of a layer uses under a name."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == name:  # the attribute is as old as the last call
            return hook.compute_weight(layer)
    return getattr(layer, name)


def _make_plain(layer: Any) -> None:
    """Replace the parametrizations of a layer by the weights that they compute."""
    if is_parametrized(layer):
        # Not with `remove_parametrizations`, which removes them from the class, and copies of the layer share it.
        values = {name: getattr(layer, name) for name in layer.parametrizations}
        del layer.parametrizations
        layer.__class__ = type(layer).__bases__[0]
        for name, value in values.items():
            layer.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad))
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            learns = getattr(layer, f"{hook.name}_v").requires_grad
            remove_weight_norm(layer, hook.name)
            getattr(layer, hook.name).requires_grad_(learns)


def _float64(values: Tensor) -> Array:
    array: Array = values.detach().to("cpu", torch.float64, copy=True).numpy()
    return array
