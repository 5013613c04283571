"""What a layer costs the host: calls on a tensor so small that the GPU is always done first."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm.torch as bt
from batchnorm.bench.clock import Record
from benchmarks.gpu import clock
from benchmarks.gpu.session import Session, columns

__all__ = ["host"]

SHAPES = (8, 16, 4, 4), (32, 64, 8, 8)
ITERATIONS, ROUNDS = 200, 7
CHAIN = 16
"""Layers one after the other: what a layer costs in a network, where one call of autograd goes through many."""

Run = Callable[[Tensor], Tensor]


def _candidates(channels: int, device: torch.device) -> dict[str, tuple[Run, list[Tensor]]]:
    """How each is called, and its parameters."""
    found: dict[str, tuple[Run, list[Tensor]]] = {}
    eager = nn.Sequential(nn.BatchNorm2d(channels, device=device), nn.ReLU(inplace=True))
    found["eager"] = eager, list(eager.parameters())
    alone = nn.BatchNorm2d(channels, device=device)
    found["eager, no ReLU"] = alone, list(alone.parameters())
    layer = bt.BatchNorm2d(channels, activation="relu", device=device)
    found["batchnorm"] = layer, list(layer.parameters())
    bare = bt.BatchNorm2d(channels, device=device)
    found["batchnorm, no ReLU"] = bare, list(bare.parameters())
    for name, layers in (("eager, frozen", eager), ("batchnorm, frozen", layer)):
        frozen = deepcopy(layers).eval()
        found[name] = frozen, list(frozen.parameters())
    weight, bias = (torch.ones(channels, device=device, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)

    def functional(x: Tensor) -> Tensor:
        return bt.batch_norm(x, mean, var, weight, bias, True, activation="relu")

    def theirs(x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, mean, var, weight, bias, True), inplace=True)

    found["batchnorm, function"] = functional, [weight, bias]
    found["eager, function"] = theirs, [weight, bias]
    return found


def _pieces(run: Run, parameters: list[Tensor], x: Tensor) -> dict[str, Callable[[], Any]]:
    dy = torch.randn_like(x)
    inputs = [x, *parameters]
    y = run(x)

    def without_gradients() -> Tensor:
        with torch.no_grad():
            return run(x)

    def chain() -> Any:
        y = x
        for _ in range(CHAIN):
            y = run(y)
        return torch.autograd.grad(y, x, dy)

    return {
        "in a chain": chain,
        "forward, no gradients": without_gradients,
        "forward": lambda: run(x),
        "forward + backward": lambda: torch.autograd.grad(run(x), inputs, dy),
        "backward": lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True),
    }


def host(session: Session) -> None:
    """The time of a call on the wall, of 200 calls without a wait among them: the median of rounds."""
    device, rows = session.device, []
    iterations, rounds = (5, 2) if session.quick else (ITERATIONS, ROUNDS)
    for shape in SHAPES[:1] if session.quick else SHAPES:
        candidates = _candidates(shape[1], device)
        x = torch.randn(shape, device=device, dtype=torch.bfloat16 if session.on_gpu else None).requires_grad_()
        for name, (run, parameters) in candidates.items():
            with session.attempt(f"host, {name}"):
                for piece, call in _pieces(run, parameters, x).items():
                    clock.wall([call], device, max(2, iterations // 10))
                    calls = CHAIN if piece == "in a chain" else 1
                    found = clock.wall([call], device, max(2, iterations // calls), rounds) / calls
                    rows.append(
                        {"case": "x".join(map(str, shape)), "candidate": name, "piece": piece, "us": round(found, 2)}
                    )
    session.add("host", rows)
    _tell(rows)


def _tell(rows: list[Record]) -> None:
    pieces = list(dict.fromkeys(r["piece"] for r in rows))
    found: dict[str, dict[str, float]] = {}
    for r in rows:
        found.setdefault(f"{r['case']} {r['candidate']}", {})[r["piece"]] = r["us"]
    lines: list[list[object]] = [["host time, us", *pieces]]
    lines += [[name, *(f"{by.get(piece, float('nan')):.1f}" for piece in pieces)] for name, by in found.items()]
    print(columns(lines), flush=True)
