"""The kernels alone, on memory that is there already; and which kernels a layer needs."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import clock
from benchmarks.gpu.cases import Layer

__all__ = ["DIRECTIONS", "Kernels", "launch_of", "needed"]

DIRECTIONS = ("forward", "backward")


def _shape(layer: Layer) -> tuple[int, int, int]:
    """`(N, C, L)`, or `(N*L, C, 1)` where channels are last."""
    n, c, *positions = layer.shape
    length = math.prod(positions)
    return (n * length, c, 1) if layer.last else (n, c, length)


class Kernels:
    """Calls of the kernels for a layer, on sets of tensors that take turns.

    Args:
        layer: Which.
        device: The GPU.
        most: How many sets at most.
    """

    def __init__(self, layer: Layer, device: torch.device, most: int = 100) -> None:
        from batchnorm.kernels import gpu

        self.layer, self.stages, self.shape = layer, gpu, _shape(layer)
        self.scratch = gpu.Scratch(device)
        channels = layer.shape[1]
        self.weight, self.bias = torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)
        self.statistics = torch.ones((4, 1, channels), device=device)
        self.sums = [torch.zeros((1, channels), device=device) for _ in range(2)]
        moved = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        counters = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.running = gpu.Running(*moved, 0.1, True, *counters)
        count = min(most, clock.sets(device, layer.bytes, 3 + 2 * layer.residual))
        self.sets = [[layer.tensor(device) for _ in range(3)] for _ in range(count)]
        self.residuals = [[layer.tensor(device) if layer.residual else None for _ in range(2)] for _ in range(count)]

    def calls(self, direction: str, tuning: Any = None) -> list[Callable[[], None]]:
        """Of one direction, with the table's tuning or another."""
        make = self._forward if direction == "forward" else self._backward
        how = {"shape": self.shape, "samples": self.layer.shape[0], "tuning": tuning, "scratch": self.scratch}
        return [make(how, *tensors, *more) for tensors, more in zip(self.sets, self.residuals, strict=True)]

    def _forward(
        self, how: Any, x: Tensor, _dy: Tensor, y: Tensor, residual: Tensor | None, _: Tensor | None
    ) -> Callable[[], None]:
        affine = self.weight, self.bias, 1e-5
        at = x.data_ptr(), None if residual is None else residual.data_ptr(), None
        again: Any = None

        def call() -> None:
            nonlocal again
            if again is not None:
                again.forward(*at, *affine, y, self.statistics, self.running, self.scratch)
                return
            arguments = x, residual, None, *affine, self.layer.activation, y, self.statistics
            again = self.stages.forward_packed(*arguments, running=self.running, **how)

        return call

    def _backward(
        self, how: Any, x: Tensor, dy: Tensor, dx: Tensor, residual: Tensor | None, d_residual: Tensor | None
    ) -> Callable[[], None]:
        values = float(x.numel() // x.shape[1])
        given = self.weight, self.statistics, values
        at = dy.data_ptr(), x.data_ptr(), None if residual is None else residual.data_ptr(), None
        written = *self.sums, dx, d_residual
        how = how | {"of_output": residual is not None and self.layer.activation == "relu"}  # as a layer's
        again: Any = None

        def call() -> None:
            nonlocal again
            if again is not None:
                again.backward(*at, *given, *written, self.scratch)
                return
            arguments = dy, x, residual, None, *given, self.layer.activation, *written
            again = self.stages.backward_packed(*arguments, **how)

        return call


def needed(layer: Layer, directions: tuple[str, ...] = DIRECTIONS, tuning: Any = None) -> set[Any]:
    """What tells the kernels of a training step apart: two layers of which this is the same share their kernels."""
    found = set()
    for direction in directions:
        launch = launch_of(layer, direction, tuning)[0]
        fixed = *launch.constants.items(), *launch.options.items()
        found.add((direction, layer.dtype, layer.residual, fixed))
    return found


def launch_of(layer: Layer, direction: str, tuning: Any = None) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The launch of a training step in one direction, and its tensors, which have no values."""
    from batchnorm.kernels.gpu import stages

    x = torch.empty(layer.shape, dtype=getattr(torch, layer.dtype), device="meta")
    residual = x if layer.residual else None
    channel = torch.empty(layer.shape[1], device="meta")
    number = torch.empty((), dtype=torch.int64, device="meta")
    forward = direction == "forward"
    of_output = layer.residual and layer.activation == "relu" and not forward
    variant = stages.Variant(
        True, True, layer.activation, _shape(layer), 1, layer.shape[0], tuning, False, forward, of_output=of_output
    )
    if forward:
        tensors = (x, residual, None, x, *[channel] * 6, None, channel, channel, number, number)
        return stages.forward_launch(variant, tensors, True)[0], tensors
    tensors = (x, x, residual, None, x, residual, channel, None, *[channel] * 5, None)
    return stages.backward_launch(variant, tensors, True)[0], tensors
