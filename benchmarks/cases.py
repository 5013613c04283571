"""The shapes that are timed: those of real networks, and the small ones where overhead is everything."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One normalization with what follows it."""

    shape: tuple[int, ...]
    channels_last: bool = False
    activation: str | None = "relu"
    residual: bool = False
    where: str = ""

    @property
    def name(self) -> str:
        parts = [
            "x".join(map(str, self.shape)),
            "channels-last" if self.channels_last else "channels-first",
            self.activation or "no activation",
            *(["residual"] if self.residual else []),
        ]
        return " ".join(parts)

    @property
    def memory_format(self) -> torch.memory_format:
        if not self.channels_last:
            return torch.contiguous_format
        return torch.channels_last_3d if len(self.shape) == 5 else torch.channels_last

    def tensor(self) -> torch.Tensor:
        return torch.randn(self.shape).contiguous(memory_format=self.memory_format)


IMAGES = [
    ((32, 64, 112, 112), "ResNet's first"),
    ((32, 64, 56, 56), "ResNet, stage 1"),
    ((32, 128, 28, 28), "ResNet, stage 2"),
    ((32, 256, 14, 14), "ResNet, stage 3"),
    ((32, 512, 7, 7), "ResNet, stage 4"),
    ((32, 2048, 7, 7), "ResNet-50's last"),
    ((32, 96, 56, 56), "MobileNetV2, expanded"),
    ((32, 576, 14, 14), "MobileNetV2, expanded"),
    ((16, 256, 8, 8), "DenseNet on small images"),
]
LARGE = 1 << 22
"""Values from which a tensor is called large: 16 MB of float32, more than the L2 caches hold."""

CASES = [
    *(Case(shape, channels_last, where=where) for shape, where in IMAGES for channels_last in (False, True)),
    Case((4, 16, 32, 64, 64), where="3-D U-Net"),
    Case((4, 16, 32, 64, 64), channels_last=True, where="3-D U-Net"),
    Case((32, 64), where="MLP on digits"),
    Case((128, 128), where="MLP"),
    Case((256, 1024), where="MLP, wide"),
    Case((1024, 512), where="MLP, large batch"),
    Case((32, 64, 56, 56), residual=True, where="ResNet, end of a block"),
    Case((32, 64, 56, 56), channels_last=True, residual=True, where="ResNet, end of a block"),
    Case((32, 96, 56, 56), activation="silu", where="EfficientNet"),
    Case((32, 96, 56, 56), channels_last=True, activation="silu", where="EfficientNet"),
]
