"""The kernels alone, on memory that is there already."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import clock
from benchmarks.gpu.cases import Layer

__all__ = ["Kernels"]


class Kernels:
    """Calls of the kernels for a layer, on sets of tensors that take turns.

    Args:
        layer: Which.
        device: The GPU.
        most: How many sets at most.
    """

    def __init__(self, layer: Layer, device: torch.device, most: int = 100) -> None:
        from batchnorm.kernels import gpu

        self.layer, self.stages, self.scratch = layer, gpu, gpu.Scratch(device)
        channels = layer.shape[1]
        self.weight, self.bias = torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)
        self.mean, self.sum_dz, self.sum_dz_xhat = (torch.zeros(channels, device=device) for _ in range(3))
        self.var, self.rstd = (torch.ones(channels, device=device) for _ in range(2))
        moved = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        counters = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.running = gpu.Running(*moved, 0.1, True, *counters)
        count = min(most, clock.sets(device, layer.bytes, 3 + 2 * layer.residual))
        self.sets = [[self._tensor(device) for _ in range(3)] for _ in range(count)]
        self.residuals = [[self._tensor(device) if layer.residual else None for _ in range(2)] for _ in range(count)]

    def _tensor(self, device: torch.device) -> Tensor:
        """Random numbers, as the kernels see them."""
        x, shape = self.layer.tensor(device), self.layer.shape
        if self.layer.last or len(shape) == 2:
            return x.movedim(1, -1).reshape(-1, shape[1], 1)
        return x.reshape(*shape[:2], -1)

    def calls(self, direction: str, tuning: Any = None) -> list[Callable[[], None]]:
        """Of one direction, with the table's tuning or another."""
        make = self._forward if direction == "forward" else self._backward
        return [make(tuning, *tensors, *more) for tensors, more in zip(self.sets, self.residuals, strict=True)]

    def _forward(
        self, tuning: Any, x: Tensor, _dy: Tensor, y: Tensor, residual: Tensor | None, _: Tensor | None
    ) -> Callable[[], None]:
        arguments = x, residual, None, self.weight, self.bias, 1e-5, self.layer.activation, y
        found = self.mean, self.var, self.rstd

        def call() -> None:
            self.stages.forward(*arguments, *found, running=self.running, tuning=tuning, scratch=self.scratch)

        return call

    def _backward(
        self, tuning: Any, x: Tensor, dy: Tensor, dx: Tensor, residual: Tensor | None, d_residual: Tensor | None
    ) -> Callable[[], None]:
        values = float(x.numel() // x.shape[1])
        given = self.mean, self.rstd, self.weight, self.bias, values, self.layer.activation
        arguments = dy, x, residual, None, *given, self.sum_dz, self.sum_dz_xhat, dx, d_residual

        def call() -> None:
            self.stages.backward(*arguments, tuning=tuning, scratch=self.scratch)

        return call
