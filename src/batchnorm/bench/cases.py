"""The cases to time: layers of real networks, small layers where overhead dominates, and other types."""

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

__all__ = ["CASES", "LARGE", "Case"]

Group = Literal["network", "rows", "small", "type"]

LARGE = 1 << 22
"""The smallest number of values of a large tensor: 16 MB of float32, more than the L2 caches hold."""


@dataclass(frozen=True)
class Case:
    """One normalization with its residual and activation.

    Attributes:
        shape: `(N, C, *spatial)`.
        channels_last: Whether the channels are last in memory.
        activation: The activation, or None.
        residual: Whether a residual is added before the activation.
        dtype: The type of the values. Weights have the same type, but float32 for half precision.
        group: `network` for layers of real networks, over which means are taken; `rows` for layers of multilayer
            perceptrons; `small` for layers where overhead dominates; `type` for types other than float32.
        where: A network with such a layer.
    """

    shape: tuple[int, ...]
    channels_last: bool = False
    activation: str | None = "relu"
    residual: bool = False
    dtype: torch.dtype = torch.float32
    group: Group = "network"
    where: str = ""

    @property
    def name(self) -> str:
        """A unique name of shape, layout, activation, residual and type."""
        parts = ["x".join(map(str, self.shape)), self.layout, self.activation or "no activation"]
        parts += ["residual"] * self.residual
        parts += [str(self.dtype).removeprefix("torch.")] * (self.dtype is not torch.float32)
        return " ".join(parts)

    @property
    def layout(self) -> str:
        """`channels-first`, `channels-last`, or `rows` for a matrix."""
        if len(self.shape) == 2:
            return "rows"
        return "channels-last" if self.channels_last else "channels-first"

    @property
    def large(self) -> bool:
        """Whether the memory bandwidth limits its speed."""
        return prod(self.shape) >= LARGE

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout as PyTorch's memory format."""
        if not self.channels_last:
            return torch.contiguous_format
        return torch.channels_last_3d if len(self.shape) == 5 else torch.channels_last

    def tensor(self) -> torch.Tensor:
        """Normal random values of this shape, layout and type."""
        return torch.randn(self.shape).to(self.dtype).contiguous(memory_format=self.memory_format)


_IMAGES = [
    ((32, 64, 112, 112), "ResNet's first"),
    ((32, 64, 56, 56), "ResNet, stage 1"),
    ((32, 128, 28, 28), "ResNet, stage 2"),
    ((32, 256, 14, 14), "ResNet, stage 3"),
    ((32, 512, 7, 7), "ResNet, stage 4"),
    ((32, 2048, 7, 7), "ResNet-50's last"),
    ((32, 96, 56, 56), "MobileNetV2, expanded"),
    ((32, 576, 14, 14), "MobileNetV2, expanded"),
    ((16, 256, 8, 8), "DenseNet on small images"),
    ((4, 16, 32, 64, 64), "3-D U-Net"),
]
_BOTH = False, True

CASES = [
    *(Case(shape, channels_last, where=where) for shape, where in _IMAGES for channels_last in _BOTH),
    *(Case((32, 64, 56, 56), last, residual=True, where="ResNet, end of a block") for last in _BOTH),
    *(Case((32, 96, 56, 56), last, activation="silu", where="EfficientNet") for last in _BOTH),
    Case((32, 128, 500), where="speech, one second"),
    Case((1024, 512), group="rows", where="MLP, large batch"),
    Case((256, 1024), group="rows", where="MLP, wide"),
    Case((128, 128), group="small", where="MLP"),
    Case((32, 64), group="small", where="MLP on digits"),
    Case((8, 16), group="small", where="as small as they get"),
    *(Case((4, 32, 4, 4), last, group="small", where="small batch, last stage") for last in _BOTH),
    *(
        Case(shape, last, dtype=dtype, group="type", where="mixed precision" if dtype is torch.bfloat16 else "")
        for dtype in (torch.float64, torch.bfloat16)
        for shape in ((32, 64, 56, 56), (32, 256, 14, 14))
        for last in _BOTH
    ),
]
"""The only registry of cases."""
