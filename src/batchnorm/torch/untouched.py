"""A model is run as in training, and is afterwards as it was: buffers, modes, gradients, random states."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from batchnorm.whole import randomness

__all__ = ["random_states_kept", "untouched"]

COUNTER = "num_batches_skipped"
"""What a layer of ours counts without a buffer."""


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Let the model use copies of its buffers and counters; then give it its own again, and its modes.

    The buffers themselves are not written to: a backward pass that is still to come may need them as they are.
    """
    modes = [(module, module.training) for module in model.modules()]
    held = [(module, name, buffer) for module, _ in modes for name, buffer in module._buffers.items()]
    counters: list[Any] = [(module, vars(module)[COUNTER]) for module, _ in modes if COUNTER in vars(module)]
    copies: dict[int, Any] = {}
    try:
        for module, counter in counters:
            vars(module)[COUNTER] = counter.clone()
        for module, name, buffer in held:
            if buffer is not None:
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
                module._buffers[name] = copies[id(buffer)]
        yield
    finally:
        for module, name, buffer in held:
            module._buffers[name] = buffer
        for module, counter in counters:
            vars(module)[COUNTER] = counter
        for module, training in modes:
            module.training = training


@contextmanager
def random_states_kept() -> Iterator[None]:
    """The random states of PyTorch on all devices in use, of NumPy and of Python are afterwards as they were."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    metal = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with randomness.random_states_kept():
            yield
    finally:
        torch.set_rng_state(cpu)
        for device, state in enumerate(cuda):
            torch.cuda.set_rng_state(state, device)
        if metal is not None:
            torch.mps.set_rng_state(metal)
