"""Conditions on values: checked at once on the CPU, and on a GPU without waiting for it.

A GPU runs behind the host, which would have to wait to know a value. So the outcome of a check is copied to the host
behind everything else, and the error is raised by whatever asks next once the copy has arrived: another check, or a
backward pass by our kernels. If nothing asks any more, nothing is told. So callers also use the outcome on the GPU, to
keep what is wrong away from what lasts. While a CUDA graph is captured there is nothing to tell: no value exists yet.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["expect", "tell"]


class _Check(NamedTuple):
    """A check that is under way: where its outcome arrives, whether it has arrived, and the error."""

    outcome: Tensor
    has_arrived: Callable[[], bool]
    problem: str


_under_way: list[_Check] = []
_lock = threading.Lock()


def expect(condition: Tensor, problem: str) -> None:
    """Check a condition.

    Args:
        condition: One boolean.
        problem: The error's text.

    Raises:
        ValueError: If the condition does not hold; on a GPU, later. Then it may be another condition that did not hold.
    """
    if not condition.is_cuda or type(condition) is not Tensor:
        if not bool(condition):
            raise ValueError(problem)
        return
    if torch.cuda.is_current_stream_capturing():
        return
    tell()
    check = _Check(*_send(condition), problem)
    with _lock:
        _under_way.append(check)


def tell() -> None:
    """Raise the error of a check whose outcome has arrived.

    Raises:
        ValueError: If its condition does not hold.
    """
    if not _under_way or torch.cuda.is_current_stream_capturing():  # asking for an event would spoil the capture
        return
    problems: dict[str, None] = {}
    with _lock:
        waiting = []
        for check in _under_way:
            if not check.has_arrived():
                waiting.append(check)
            elif not bool(check.outcome):
                problems[check.problem] = None
        _under_way[:] = waiting
    if problems:
        told = "; ".join(problems)
        raise ValueError(f"{told} (in this call or an earlier one, perhaps of another layer: a GPU tells it late)")


def _send(condition: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """Have the outcome copied to the host: the place, and whether it has arrived."""
    outcome = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
    outcome.copy_(condition, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(condition.device))
    return outcome, event.query
