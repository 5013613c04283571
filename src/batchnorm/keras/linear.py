"""The convolutions and dense layers of Keras as linear maps for folding and porting, and back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import layers
from numpy.typing import NDArray

from batchnorm.keras.models import to_float64
from batchnorm.whole.linear import LinearMap
from batchnorm.whole.port import Linear

__all__ = ["channel_axis", "is_linear", "linear_parts", "read_map", "shift_problem", "write_map"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """The channel axes of a layer's kernel.

    Attributes:
        kernel: The name of the kernel that computes the outputs.
        outputs: The axes of the kernel that together are the output channels.
        inputs: The axis of the kernel that is the input channels; None if each output depends on one of them.
        shift: Whether a constant added to the input adds a constant to the output, through this kernel alone.
    """

    kernel: str
    outputs: tuple[int, ...] = (-1,)
    inputs: int | None = -2
    shift: bool = True


_PLAIN = Layout("kernel")
_TRANSPOSED = Layout("kernel", (-2,), -1, shift=False)
_DEPTHWISE = Layout("kernel", (-2, -1), None)
_SEPARABLE = Layout("pointwise_kernel", shift=False)
_FIRST_OF_SEPARABLE = Layout("depthwise_kernel", (-2, -1), None)

LAYOUTS: dict[Any, Layout] = {
    layers.Dense: _PLAIN,
    layers.Conv1D: _PLAIN,
    layers.Conv2D: _PLAIN,
    layers.Conv3D: _PLAIN,
    layers.Conv1DTranspose: _TRANSPOSED,
    layers.Conv2DTranspose: _TRANSPOSED,
    layers.Conv3DTranspose: _TRANSPOSED,
    layers.DepthwiseConv1D: _DEPTHWISE,
    layers.DepthwiseConv2D: _DEPTHWISE,
    layers.SeparableConv1D: _SEPARABLE,
    layers.SeparableConv2D: _SEPARABLE,
}
"""By class, without subclasses, which may compute something else. A transposed convolution sums fewer inputs at its
border, so a shift of the input is not a constant there; a separable one has a second kernel before this one."""


def is_linear(layer: Any) -> bool:
    """Whether a normalization can be folded into this layer."""
    return type(layer) in LAYOUTS


def shift_problem(layer: Any) -> str | None:
    """The reason why a normalization before this layer cannot be folded into it; None if it can."""
    if not LAYOUTS[type(layer)].shift:
        return "adds a different part of the shift to each output"
    if getattr(layer, "padding", "valid") != "valid":
        return "pads with zeros, which the shift does not reach"
    return None


def channel_axis(layer: Any) -> int:
    """The axis of the channels in the layer's inputs and outputs: 1 or -1."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else -1


def linear_parts(layer: Any) -> list[Linear]:
    """A layer for porting: one map, or the two of a separable convolution, depthwise and pointwise; [] if unknown."""
    if type(layer) not in LAYOUTS:
        return []
    last = LAYOUTS[type(layer)]
    return [_part(layer, layout) for layout in ((_FIRST_OF_SEPARABLE, last) if last is _SEPARABLE else (last,))]


def _part(layer: Any, layout: Layout) -> Linear:
    has_bias = bool(layer.use_bias) and layout is not _FIRST_OF_SEPARABLE

    def write(map: LinearMap) -> None:
        _write_kernel(layer, layout, map)
        if has_bias:
            layer.bias.assign(map.offset)

    shape = tuple(getattr(layer, layout.kernel).shape)
    return Linear(_read(layer, layout, has_bias), layout is _TRANSPOSED, has_bias, shape, write)


def read_map(layer: Any) -> LinearMap:
    """The linear map of a layer for which `is_linear` holds."""
    return _read(layer, LAYOUTS[type(layer)], bool(layer.use_bias))


def _read(layer: Any, layout: Layout, has_bias: bool) -> LinearMap:
    kernel = getattr(layer, layout.kernel)
    matrix = _matrix(to_float64(kernel), layout)
    offset = to_float64(layer.bias) if has_bias else np.zeros(len(matrix))
    groups = kernel.shape[-2] if layout.inputs is None else getattr(layer, "groups", 1)
    return LinearMap(matrix, offset, groups, kernel.dtype)


def write_map(layer: Any, map: LinearMap) -> None:
    """Give a layer the numbers of a map, rounded once; it has a bias from then on."""
    _write_kernel(layer, LAYOUTS[type(layer)], map)
    if not layer.use_bias:
        layer.use_bias = True
        layer._tracker.unlock()
        layer.bias = layer.add_weight(
            shape=map.offset.shape, name="bias", initializer="zeros", regularizer=layer.bias_regularizer,
            constraint=layer.bias_constraint,
        )  # fmt: skip
        layer._tracker.lock()
    layer.bias.assign(map.offset)


def _write_kernel(layer: Any, layout: Layout, map: LinearMap) -> None:
    variable = getattr(layer, layout.kernel)
    variable.assign(_kernel(map.matrix, layout, tuple(variable.shape)))


def _ends(layout: Layout) -> tuple[int, ...]:
    return layout.outputs if layout.inputs is None else (*layout.outputs, layout.inputs)


def _matrix(kernel: Array, layout: Layout) -> Array:
    """`(outputs, inputs of a group, *positions)`, from the kernel with its positions first."""
    ends = _ends(layout)
    turned = np.moveaxis(kernel, ends, range(len(ends)))
    return turned.reshape(-1, 1, *turned.shape[2:]) if layout.inputs is None else turned


def _kernel(matrix: Array, layout: Layout, shape: tuple[int, ...]) -> Array:
    """The kernel of a shape from its matrix."""
    ends = _ends(layout)
    turned = tuple(shape[axis] for axis in ends) + shape[: -len(ends)]
    return np.moveaxis(matrix.reshape(turned), range(len(ends)), ends)
