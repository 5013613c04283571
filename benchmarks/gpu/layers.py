"""Layers: the time that the GPU spends on normalization, residual and ReLU, forward and backward, in copies."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm.torch as bt
from batchnorm.bench.clock import Record
from benchmarks.gpu import clock
from benchmarks.gpu.cases import Layer, is_compiled, timed
from benchmarks.gpu.kernels import Kernels
from benchmarks.gpu.session import Session, columns
from benchmarks.gpu.workers import Task

__all__ = ["compilations", "copies", "layers", "use_once", "warm"]


def _kind(ours: bool, rank: int) -> Any:
    package: Any = bt if ours else nn
    return package.BatchNorm1d if rank == 2 else package.BatchNorm2d


Run = Callable[[Tensor, Tensor | None], Tensor]


def build(candidate: str, layer: Layer, device: torch.device) -> tuple[nn.Module, Run]:
    """A batch normalization, and how it is called together with what follows it."""
    ours = candidate.startswith("batchnorm")
    more = {"activation": layer.activation} if ours else {}
    module = _kind(ours, len(layer.shape))(layer.shape[1], device=device, **more).train()

    def eager(x: Tensor, residual: Tensor | None) -> Tensor:
        z = module(x)
        if residual is not None:
            z += residual
        return F.relu(z, inplace=True) if layer.activation == "relu" else z

    def fused(x: Tensor, residual: Tensor | None) -> Tensor:
        return module(x, residual=residual)

    run: Run = fused if ours else eager
    if candidate.endswith("compiled"):
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, dynamic=False)
    return module, run


def warm(layer: Layer, device: torch.device, candidate: str = "batchnorm") -> None:
    """One step, to have its kernels compiled."""
    use_again()
    module, run = build(candidate, layer, device)
    x, dy = layer.tensor(device).requires_grad_(), layer.tensor(device)
    residual = layer.tensor(device).requires_grad_() if layer.residual else None
    y = run(x, residual)
    torch.autograd.grad(y, [x, *([] if residual is None else [residual]), *module.parameters()], dy)


def compilations(layer: Layer, device: torch.device) -> list[Task]:
    """What `torch.compile` will be asked for."""
    names = "eager compiled", "batchnorm compiled"
    return [Task(f"{name} {layer.name}", warm, (layer, device, name), 120.0) for name in names]


def use_again() -> None:
    """Have compiled backward passes keep what they read: they will be run many times."""
    import torch._functorch.config as config

    config.donated_buffer = False


def use_once() -> None:
    """Let compiled backward passes write into what they have read, as they do by default."""
    import torch._functorch.config as config

    config.donated_buffer = True


Calls = tuple[list[clock.Call], list[clock.Call], list[clock.Call]]


def _calls(candidate: str, layer: Layer, device: torch.device) -> Calls:
    """Forward, backward, and both, on sets of tensors that take turns."""
    module, run = build(candidate, layer, device)
    forwards: list[clock.Call] = []
    backwards: list[clock.Call] = []
    steps: list[clock.Call] = []
    for _ in range(clock.sets(device, layer.bytes, 3 + layer.residual)):
        x, dy = layer.tensor(device).requires_grad_(), layer.tensor(device)
        residual = layer.tensor(device).requires_grad_() if layer.residual else None
        inputs = [x, *([] if residual is None else [residual]), *module.parameters()]

        def forward(x: Tensor = x, residual: Tensor | None = residual) -> Tensor:
            return run(x, residual)

        y = forward()

        def backward(y: Tensor = y, inputs: list[Tensor] = inputs, dy: Tensor = dy) -> Any:
            return torch.autograd.grad(y, inputs, dy, retain_graph=True)

        def step(forward: Any = forward, inputs: list[Tensor] = inputs, dy: Tensor = dy) -> Any:
            return torch.autograd.grad(forward(), inputs, dy)

        forwards.append(forward)
        backwards.append(backward)
        steps.append(step)
    return forwards, backwards, steps


def _both(forward: Callable[[], Any], backward: Callable[[], Any]) -> None:
    forward()
    backward()


def measure(candidate: str, layer: Layer, session: Session, bandwidth: float) -> Record:
    """Forward, backward and the whole step of a candidate."""
    device = session.device
    with clock.stream(device):
        if candidate == "kernels":
            kernels = Kernels(layer, device)
            forwards, backwards = (kernels.calls(direction) for direction in ("forward", "backward"))
            steps: list[clock.Call] = [partial(_both, *pair) for pair in zip(forwards, backwards, strict=True)]
            steps[0]()  # so that the backward pass finds the statistics
        else:
            forwards, backwards, steps = _calls(candidate, layer, device)
        seconds = 0.0 if session.quick else 0.025
        forward, _ = clock.replayed(forwards, device, seconds)
        backward, _ = clock.replayed(backwards, device, seconds)
        wall = clock.walled(steps, device, 4 if session.quick else 60)
        host = clock.wall(steps, device, 4 if session.quick else 20)
    copy = 2 * layer.bytes / bandwidth * 1e6
    record: Record = {"case": layer.name, "layout": layer.layout, "dtype": layer.dtype, "candidate": candidate}
    record |= {"residual": int(layer.residual), "mib": round(layer.bytes / 2**20, 2), "copy_us": round(copy, 2)}
    times = {"forward": forward, "backward": backward}
    record |= {f"{name}_us": round(time, 2) for name, time in times.items()}
    record |= {f"{name}_copies": round(time / copy, 3) for name, time in times.items()}
    record |= {"median_us": round(forward + backward, 2), "copies": round((forward + backward) / copy, 3)}
    return record | {"wall_us": round(wall, 2), "host_us": round(host, 2)}


def copies(session: Session) -> float:
    """The bandwidth of a large copy, in bytes per second; and those of smaller ones, for the table."""
    best = 0.0
    sizes = (1 << 20,) if session.quick else (1 << 30, 1 << 28, 1 << 26, 1 << 24, 1 << 22, 1 << 20)
    rows = []
    for size in sizes:
        with session.attempt(f"copy of {size} bytes"), clock.stream(session.device):
            found = clock.copy_bandwidth(session.device, size)
            best = max(best, found)
            rows.append({"mib": size / 2**20, "bytes_per_second": round(found), "us": round(2 * size / found * 1e6, 2)})
            session.say(f"copy of {size >> 20:5} MiB: {found / 1e9:6.0f} GB/s read and written")
        _release(session)
    session.add("copies", rows)
    return best


def layers(session: Session, bandwidth: float) -> None:
    """Every layer by every candidate; the compiled ones last, as far as the time goes."""
    use_again()
    everything = list(timed(session.quick))
    plan = [(layer, ("eager", "batchnorm", *(["kernels"] if session.on_gpu else []))) for layer in everything]
    plan += [(layer, ("eager compiled", "batchnorm compiled")) for layer in everything if is_compiled(layer)]
    for i, (layer, candidates) in enumerate(plan):
        if session.late():
            session.say(f"out of time: {len(plan) - i} of {len(plan)} layers skipped, from {layer.name} {candidates}")
            break
        told = []
        for candidate in candidates:
            with session.attempt(f"{candidate}, {layer.name}"):
                r = measure(candidate, layer, session, bandwidth)
                session.add("layers", [r])
                told.append(f"{candidate} {r['forward_copies']:.2f}+{r['backward_copies']:.2f}={r['copies']:.2f}")
            _release(session)
        session.say(f"{layer.name}: {', '.join(told)} copies")
    _tell(session)


def _release(session: Session) -> None:
    if session.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _tell(session: Session) -> None:
    """One table: all candidates of each layer, in copies and in microseconds on the wall."""
    records = session.records.get("layers", [])
    names = list(dict.fromkeys(r["candidate"] for r in records))
    found: dict[str, dict[str, Record]] = {}
    for r in records:
        found.setdefault(r["case"], {})[r["candidate"]] = r
    rows: list[list[object]] = [["layer", *(f"{n}, copies f+b" for n in names), "× eager", "wall us: eager", "ours"]]
    for case, by in found.items():
        cells: list[object] = [case]
        for name in names:
            cells.append(f"{by[name]['forward_copies']:.2f}+{by[name]['backward_copies']:.2f}" if name in by else "")
        both = {"eager", "batchnorm"} <= set(by)
        cells.append(f"{by['eager']['median_us'] / by['batchnorm']['median_us']:.2f}" if both else "")
        cells += [f"{by[n]['wall_us']:.0f}" if n in by else "" for n in ("eager", "batchnorm")]
        rows.append(cells)
    print(columns(rows), flush=True)
