"""One normalization with its activation: ours, PyTorch's in several ways, other frameworks', and a plain copy."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm.torch as bt
from batchnorm.bench import peers
from batchnorm.bench.cases import Case
from batchnorm.bench.clock import Candidate, Record, interleave, records

__all__ = ["MODES", "Mode", "candidates", "run"]

Mode = Literal["training", "evaluation"]
"""Forward + backward with the statistics of the batch, or forward with the running ones."""
MODES: tuple[Mode, ...] = ("training", "evaluation")

_DIMENSIONS = {2: 1, 3: 1, 4: 2, 5: 3}
_ACTIVATIONS: dict[str | None, Callable[..., Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    None: lambda z, inplace=False: z,
}


def candidates(case: Case, mode: Mode, *, compiled: bool = False, others: bool = False) -> dict[str, Candidate]:
    """The functions to time for a case, by name.

    Args:
        case: The normalization.
        mode: Training or evaluation.
        compiled: Whether to add PyTorch's layer and ours under `torch.compile`.
        others: Whether to add the frameworks in `peers` that are installed.

    Returns:
        Functions without arguments. Each returns the gradient of `x` in training and `y` in evaluation, except `copy`,
        the unit of the others.
    """
    dimension, channels = _DIMENSIONS[len(case.shape)], case.shape[1]
    dtype = torch.float32 if case.dtype is torch.bfloat16 else case.dtype
    theirs = getattr(nn, f"BatchNorm{dimension}d")(channels, dtype=dtype)
    ours = getattr(bt, f"BatchNorm{dimension}d")(channels, dtype=dtype, activation=case.activation)
    activate = _ACTIVATIONS[case.activation]

    def eager(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = theirs(x)
        return activate(y if residual is None else y + residual)

    def in_place(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = theirs(x)
        if residual is not None:
            y += residual
        return activate(y, inplace=True)

    layers: dict[str, Callable[..., Tensor]] = {"eager": eager, "eager in place": in_place}
    if compiled:
        torch.compiler.reset()  # one compiled function per case, not one for all shapes
        layers["compile"] = torch.compile(eager, dynamic=False)
    layers["batchnorm"] = lambda x, residual=None: ours(x, residual=residual)
    if compiled:
        layers["batchnorm compiled"] = torch.compile(layers["batchnorm"], dynamic=False)

    inputs = [case.tensor() for _ in range(1 + case.residual)]
    dy, target = case.tensor(), torch.empty_like(inputs[0])
    parameters = [*theirs.parameters(), *ours.parameters()]
    theirs.train(mode == "training")
    ours.train(mode == "training")
    prepare = _forward_and_backward if mode == "training" else _forward
    steps: dict[str, Candidate] = {"copy": lambda: target.copy_(inputs[0])}
    steps |= {name: prepare(layer, inputs, dy, parameters) for name, layer in layers.items()}
    return steps | (peers.candidates(case, mode, inputs, dy) if others else {})


def _forward_and_backward(
    layer: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor, parameters: list[nn.Parameter]
) -> Callable[[], Any]:
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]

    def step() -> Tensor | None:
        for tensor in (*inputs, *parameters):
            tensor.grad = None
        layer(*inputs).backward(dy)
        return inputs[0].grad

    return step


def _forward(layer: Callable[..., Tensor], inputs: list[Tensor], *_: Any) -> Callable[[], Any]:
    def step() -> Tensor:
        with torch.no_grad():
            return layer(*inputs)

    return step


def run(
    cases: Iterable[Case], mode: Mode, seconds: float, *, compiled: bool = False, others: bool = False
) -> Iterator[list[Record]]:
    """The records of each case, one per candidate; `seconds` is the time per case."""
    for case in cases:
        about = {
            "case": case.name,
            "group": case.group,
            "layout": case.layout,
            "large": int(case.large),
            "where": case.where,
            "mode": mode,
        }
        found = records(interleave(candidates(case, mode, compiled=compiled, others=others), seconds))
        copy = next(record["median_us"] for record in found if record["candidate"] == "copy")
        yield [about | record | {"copies": round(record["median_us"] / copy, 3)} for record in found]
