"""The layers that are timed."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Layer", "is_compiled", "timed"]

SHAPES: tuple[tuple[int, ...], ...] = (
    (64, 256, 56, 56), (64, 64, 112, 112), (64, 512, 28, 28), (64, 512, 14, 14), (64, 1024, 14, 14), (64, 2048, 7, 7),
    (256, 64, 56, 56), (128, 32, 112, 112), (128, 1280, 7, 7), (4096, 1024), (256, 1024), (32, 64, 8, 8),
)  # fmt: skip
IN_OTHER_TYPES = {"float16": (SHAPES[0], SHAPES[5]), "float32": (SHAPES[0], SHAPES[3], SHAPES[5], SHAPES[9])}
WITH_RESIDUAL = SHAPES[0], SHAPES[2], SHAPES[4], SHAPES[5]
COMPILED = SHAPES[0], SHAPES[3], SHAPES[5], SHAPES[9]
TRIED: tuple[tuple[int, ...], ...] = ((8, 16, 14, 14), (64, 32))


class Layer(NamedTuple):
    """What is timed."""

    shape: tuple[int, ...]
    last: bool = False
    dtype: str = "bfloat16"
    residual: bool = False
    activation: str | None = "relu"

    @property
    def layout(self) -> str:
        return "rows" if len(self.shape) == 2 else "channels-last" if self.last else "channels-first"

    @property
    def name(self) -> str:
        return " ".join(
            ("x".join(map(str, self.shape)), self.layout, self.dtype, *(["residual"] if self.residual else []))
        )

    @property
    def bytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    def tensor(self, device: torch.device) -> Tensor:
        """Random numbers."""
        x = torch.randn(self.shape, device=device).to(getattr(torch, self.dtype))
        return x.contiguous(memory_format=torch.channels_last) if self.last else x


def timed(quick: bool) -> Iterator[Layer]:
    """All layers, the most telling first."""
    if quick:
        yield from (Layer(TRIED[0]), Layer(TRIED[0], last=True, residual=True), Layer(TRIED[1]))
        return
    for shape in SHAPES:
        for last in (False, True) if len(shape) == 4 else (False,):
            yield Layer(shape, last)
    for shape in WITH_RESIDUAL:
        for last in (False, True):
            yield Layer(shape, last, residual=True)
    for dtype, shapes in IN_OTHER_TYPES.items():
        for shape in shapes:
            for last in (False, True) if len(shape) == 4 else (False,):
                yield Layer(shape, last, dtype)


def is_compiled(layer: Layer) -> bool:
    """Whether it is timed after `torch.compile` as well, which takes long to make."""
    compiled = (*COMPILED, *TRIED) if layer.dtype == "bfloat16" else (SHAPES[0],)
    return not layer.residual and layer.shape in compiled
