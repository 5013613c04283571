"""Run a model in training and leave it as it was: its buffers and modes, and the random states."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from batchnorm.whole import randomness

__all__ = ["random_states_kept", "untouched"]

COUNTER = "num_batches_skipped"
"""The counter of our layers that is not a buffer."""


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Let the model use copies of its buffers and counters, and restore its own and its modes afterwards.

    The buffers themselves are never written to, because a later backward pass may need their values.
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
    """Restore the random states of Python, of NumPy, and of PyTorch on all devices in use."""
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
