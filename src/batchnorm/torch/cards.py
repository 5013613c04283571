"""From which size on our GPU kernels take less time than PyTorch's operation: by the GPU's name, as measured on it."""

import functools

import torch

__all__ = ["smallest"]

SMALLEST = {"NVIDIA H200": 0}
"""Values of a tensor below which PyTorch's operation and the activation after it take less time on the GPU.

On an H200 there are none: the smallest layer timed, 32x64x8x8, takes 0.93 of their time
(`benchmarks/results/gpu_layers.csv`). `python -m benchmarks.gpu --only sizes` prints the line of another GPU."""


@functools.cache
def smallest(device: torch.device) -> int:
    """The number of values from which on the kernels compute a call; 0 for a GPU that nobody has measured."""
    return SMALLEST.get(torch.cuda.get_device_name(device), 0)
