"""A convolution or a linear layer as a linear map in float64, and batch normalization as a part of it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from batchnorm import definition
from batchnorm.torch.dataflow import TRANSPOSED

__all__ = ["LinearMap", "make_plain"]

Array = NDArray[np.float64]


@dataclass
class LinearMap:
    """What a convolution or a linear layer computes, in float64.

    Attributes:
        matrix: `(outputs, inputs of a group, positions in the kernel)`, also of transposed convolutions.
        offset: `(outputs,)`.
        groups: Into how many groups inputs and outputs are divided; one output sees the inputs of its group.
    """

    matrix: Array
    offset: Array
    groups: int

    @classmethod
    def of(cls, layer: Any) -> "LinearMap":
        """The map of a layer, from what its forward uses."""
        weight, groups = _float64(layer.weight), getattr(layer, "groups", 1)
        if isinstance(layer, TRANSPOSED):
            weight = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).swapaxes(1, 2)
            weight = weight.reshape(-1, *weight.shape[2:])
        matrix = weight.reshape(*weight.shape[:2], -1)
        return cls(matrix, np.zeros(len(matrix)) if layer.bias is None else _float64(layer.bias), groups)

    def then(self, layer: Any) -> "LinearMap":
        """This map, and a normalization after it: `s*A` and `(b - mean)*s + bias`."""
        return LinearMap(*definition.fold_linear(self.matrix, self.offset, *_parameters(layer)), self.groups)

    def after(self, layer: Any) -> "LinearMap":
        """A normalization, and this map after it: `A*s` and `b + A t`.

        Each channel of the normalization is as many inputs of the map as there are for it, one after the other.
        """
        scale, shift = definition.fold_linear(np.ones((layer.num_features, 1)), None, *_parameters(layer))
        outputs, inputs, _ = self.matrix.shape
        repeats = inputs * self.groups // layer.num_features
        scale, shift = (np.repeat(v.ravel(), repeats).reshape(self.groups, 1, inputs, 1) for v in (scale, shift))
        matrix = self.matrix.reshape(self.groups, outputs // self.groups, inputs, -1)
        offset = self.offset + (matrix * shift).sum((2, 3)).ravel()
        return LinearMap((matrix * scale).reshape(self.matrix.shape), offset, self.groups)

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether all its numbers are finite in a type."""
        return all(np.abs(numbers).max(initial=0.0) <= torch.finfo(dtype).max for numbers in (self.matrix, self.offset))

    def write(self, layer: Any) -> None:
        """Give the layer these numbers, rounded once, in tensors like its own."""
        matrix = self.matrix
        if isinstance(layer, TRANSPOSED):
            matrix = matrix.reshape(self.groups, -1, *matrix.shape[1:]).swapaxes(1, 2)
        offset = torch.from_numpy(self.offset)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(matrix)).reshape(layer.weight.shape))
            if layer.bias is None:
                layer.bias = nn.Parameter(offset.to(layer.weight), requires_grad=layer.weight.requires_grad)
            else:
                layer.bias.copy_(offset)


def make_plain(layer: Any) -> None:
    """Replace the parametrizations of a layer by the weights that they make."""
    if is_parametrized(layer):
        # Not with `remove_parametrizations`: it takes them from the class, which copies of the layer share.
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
    array: Array = values.detach().cpu().double().numpy()
    return array


def _parameters(layer: Any) -> tuple[Any, ...]:
    """The arguments of `definition.fold_linear` that come from a normalization."""
    tensors = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    return *(None if tensor is None else _float64(tensor) for tensor in tensors), layer.eps
