"""The linear maps of Keras as matrices with one axis of inputs and one of outputs, for folding."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers
from numpy.typing import NDArray

from batchnorm.keras.models import numbers

__all__ = ["LinearMap", "Place", "is_linear"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Place:
    """Where the channels are in a layer's kernel and in its outputs and inputs.

    Attributes:
        kernel: The name of the kernel that makes the outputs.
        out: The axes of it that are the outputs' channels, together.
        into: Its axis of the inputs' channels; None where a normalization before the layer cannot be folded.
    """

    kernel: str
    out: tuple[int, ...] = (-1,)
    into: int | None = -2


PLACES: dict[Any, Place] = {
    layers.Dense: Place("kernel"),
    layers.Conv1D: Place("kernel"),
    layers.Conv2D: Place("kernel"),
    layers.Conv3D: Place("kernel"),
    layers.Conv1DTranspose: Place("kernel", (-2,), None),
    layers.Conv2DTranspose: Place("kernel", (-2,), None),
    layers.Conv3DTranspose: Place("kernel", (-2,), None),
    layers.DepthwiseConv1D: Place("kernel", (-2, -1), None),
    layers.DepthwiseConv2D: Place("kernel", (-2, -1), None),
    layers.SeparableConv1D: Place("pointwise_kernel", (-1,), None),
    layers.SeparableConv2D: Place("pointwise_kernel", (-1,), None),
}
"""Of exactly these classes: a subclass may compute something else. A transposed convolution sums up a changing number
of inputs at its border, so what a normalization before it adds is no constant."""


def is_linear(layer: Any) -> bool:
    """Whether this is one of the layers that a normalization can go into."""
    return type(layer) in PLACES


class LinearMap:
    """A layer's kernel and bias in float64, while normalizations go into them; the layer changes with `write`.

    Args:
        layer: One for which `is_linear` holds.
    """

    def __init__(self, layer: Any) -> None:
        self.layer, self.place = layer, PLACES[type(layer)]
        kernel = numbers(getattr(layer, self.place.kernel))
        self.shape = kernel.shape
        self.kernel = kernel
        self.bias = numbers(layer.bias) if layer.use_bias else np.zeros(self.channels)

    @property
    def channels(self) -> int:
        """How many the outputs have."""
        return int(np.prod([self.shape[axis] for axis in self.place.out]))

    @property
    def axis(self) -> int:
        """The channels of the outputs."""
        return 1 if getattr(self.layer, "data_format", None) == "channels_first" else -1

    @property
    def bare(self) -> bool:
        """Whether nothing follows the linear map inside of the layer."""
        return self.layer.activation is keras.activations.linear

    @property
    def plain(self) -> bool:
        """Whether kernel and bias are just that."""
        lora = getattr(self.layer, "lora_enabled", False)
        return self.layer.built and self.layer.quantization_mode is None and not lora

    def then(self, scale: Array, shift: Array) -> None:
        """Follow it by `y -> scale*y + shift`: `(scale*A) v + (scale*b + shift)`."""
        outputs = [1] * len(self.shape)
        for axis in self.place.out:
            outputs[axis] = self.shape[axis]
        self.kernel = self.kernel * scale.reshape(outputs)
        self.bias = self.bias * scale + shift

    def after(self, scale: Array, shift: Array) -> None:
        """Precede it by `x -> scale*x + shift`: `(A*scale) x + (b + A shift)`."""
        assert self.place.into is not None
        inputs = self.shape[self.place.into]
        groups = len(scale) // inputs if type(self.layer) is not layers.Dense else 1
        outputs = self.shape[-1]
        along = [1] * len(self.shape)
        along[self.place.into] = inputs
        kernel = self.kernel.copy()
        for group in range(groups):  # outputs of one group see inputs of one group
            mine = slice(group * outputs // groups, (group + 1) * outputs // groups)
            theirs = slice(group * inputs, (group + 1) * inputs)
            part = kernel[..., mine]
            constant = (part * shift[theirs].reshape(along)).sum(tuple(range(part.ndim - 1)))
            self.bias[mine] = self.bias[mine] + constant
            kernel[..., mine] = part * scale[theirs].reshape(along)
        self.kernel = kernel

    def takes(self, channels: int) -> bool:
        """Whether a normalization of so many channels can come before it."""
        if self.place.into is None:
            return False
        inputs = int(self.shape[self.place.into])
        if type(self.layer) is layers.Dense:
            return channels == inputs
        return bool(channels == inputs * self.layer.groups and self.layer.padding == "valid")

    def fits(self) -> bool:
        """Whether it can be written down: nothing overflows."""
        dtype = getattr(self.layer, self.place.kernel).dtype
        largest = float(np.finfo(np.float32 if dtype == "bfloat16" else dtype).max)
        return all(bool((np.abs(values) <= largest).all()) for values in (self.kernel, self.bias))

    def write(self) -> None:
        """Change the layer, which has a bias from then on."""
        layer = self.layer
        getattr(layer, self.place.kernel).assign(self.kernel)
        if not layer.use_bias:
            layer.use_bias = True
            layer._tracker.unlock()
            layer.bias = layer.add_weight(
                shape=(self.channels,), name="bias", initializer="zeros", regularizer=layer.bias_regularizer,
                constraint=layer.bias_constraint,
            )  # fmt: skip
            layer._tracker.lock()
        layer.bias.assign(self.bias)
