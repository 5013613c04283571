"""Whole networks: a step of training in bfloat16 before and after `convert`, eager and compiled."""

import re
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm.torch as bt
from batchnorm.bench.clock import Record
from batchnorm.torch import functional, routes
from benchmarks.gpu.cases import Layer
from benchmarks.gpu.layers import use_once
from benchmarks.gpu.session import Session, columns
from benchmarks.gpu.workers import Task
from benchmarks.models import efficientnet_b0, mobilenet_v2, resnet50

__all__ = ["compilations", "layers_of", "models", "networks"]

CLASSES = 1000
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet50": resnet50, "mobilenet_v2": mobilenet_v2, "efficientnet_b0": efficientnet_b0,
}  # fmt: skip
NORMALIZATION = re.compile(r"forward_kernel|backward_kernel|batch_?norm|bn_fw|bn_bw|threshold|clamp|relu|silu", re.I)


class Network(NamedTuple):
    """A network and its batch."""

    model: str
    batch: int
    last: bool
    side: int = 224

    @property
    def name(self) -> str:
        return f"{self.model} {self.batch} {'channels-last' if self.last else 'channels-first'}"

    def build(self, device: torch.device, converted: bool, save_memory: bool = False) -> nn.Module:
        """The network, as anyone would have it, or after `convert`."""
        torch.manual_seed(0)
        model = NETWORKS[self.model](CLASSES).train()
        if self.last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model = model.to(device)
        return bt.convert(model, save_memory=save_memory) if converted else model

    def data(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A batch of noise."""
        x = torch.randn(self.batch, 3, self.side, self.side, device=device)
        x = x.contiguous(memory_format=torch.channels_last) if self.last else x
        return x, torch.randint(CLASSES, (self.batch,), device=device)


def networks(quick: bool) -> Iterator[Network]:
    """All of them, the most telling first."""
    if quick:
        yield from (Network(name, 2, True, 32) for name in NETWORKS)
        return
    for model, batch in (("resnet50", 128), ("resnet50", 256), ("mobilenet_v2", 128), ("efficientnet_b0", 128)):
        for last in (True, False):
            yield Network(model, batch, last)


COMPILED = [network for network in networks(False) if network.model == "resnet50" and network.batch == 128]


def layers_of(network: Network) -> list[Layer]:
    """What the converted network normalizes in a step, each kind once, found without computing anything."""
    seen: dict[Layer, None] = {}

    def note(call: Any, plan: Any) -> Any:
        last = network.last and call.x.dim() == 4
        name = call.activation[0]
        activation = None if name == "none" else name
        seen[Layer(tuple(call.x.shape), last, "bfloat16", call.residual is not None, activation)] = None
        return routes.choose(call, plan)

    device = torch.device("meta")
    model = network.build(device, True)
    with mock.patch.object(functional, "choose", note):
        model(network.data(device)[0])
    return list(seen)


def stepper(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    """A step of training: forward under autocast, cross-entropy, backward, SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, foreach=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _busy(step: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds that the GPU is busy in a step, and in kernels named after normalizations and activations."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total / 1e3 for event in profiled.key_averages()}
    return sum(times.values()), sum(time for name, time in times.items() if NORMALIZATION.search(name))


def task_name(network: Network, converted: bool) -> str:
    return f"compile {network.name}{' converted' * converted}"


def compilations(device: torch.device) -> list[Task]:
    """What `torch.compile` will be asked for."""
    return [
        Task(task_name(network, converted), warm_compiled, (network, device, converted), 200.0)
        for network in COMPILED
        for converted in (False, True)
    ]


def warm_compiled(network: Network, device: torch.device, converted: bool) -> None:
    """One compiled step, for the caches on disk."""
    use_once()
    model: Any = torch.compile(network.build(device, converted))
    stepper(model, *network.data(device))()


def measure(network: Network, candidate: str, session: Session) -> Record:
    """The median step."""
    device = session.device
    torch.backends.cudnn.benchmark = True
    use_once()
    if session.on_gpu:
        torch.cuda.empty_cache()
    model: Any = network.build(device, candidate.startswith("converted"), candidate.endswith("save_memory"))
    if candidate.endswith("compiled"):
        torch._dynamo.reset()
        model = torch.compile(model)
    step = stepper(model, *network.data(device))
    before = time.perf_counter()
    step()
    _wait(device)
    first = time.perf_counter() - before
    for _ in range(1 if session.quick else 3):
        step()
    if session.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(2 if session.quick else 8):
        _wait(device)
        before = time.perf_counter()
        step()
        _wait(device)
        times.append((time.perf_counter() - before) * 1e3)
    record = {"network": network.name, "model": network.model, "batch": network.batch}
    record |= {"layout": "channels-last" if network.last else "channels-first", "candidate": candidate}
    record |= {"step_ms": round(median(times), 3), "fastest_ms": round(min(times), 3), "first_s": round(first, 1)}
    if session.on_gpu:
        record["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
        with session.attempt("profiler"):
            busy, named = _busy(step)
            record |= {"busy_ms": round(busy, 3), "normalization_ms": round(named, 3)}
    return record


def models(session: Session) -> None:
    """Every network before and after `convert`, compiled and with `save_memory`, as far as the time goes."""
    found = list(networks(session.quick))
    plan = [(network, name) for network in found for name in ("eager", "converted")]
    saving = [(network, "converted save_memory") for network in (found[:1] if session.quick else COMPILED)]
    compiled = [
        (network, f"{name} compiled")
        for network in COMPILED
        for name in ("eager", "converted")
        if task_name(network, name == "converted") in session.prepared  # or its first step would take a minute
    ]
    # What was not seen before comes before what was.
    plan = [*plan[:8], *saving, *compiled, *plan[8:]]
    if session.on_gpu and len(compiled) < 2 * len(COMPILED):
        session.say(
            f"{2 * len(COMPILED) - len(compiled)} compiled networks left out: there was no time to compile them"
        )
    for i, (network, candidate) in enumerate(plan):
        if session.late():
            session.say(f"out of time: {len(plan) - i} of {len(plan)} skipped, from {network.name} {candidate}")
            break
        with session.attempt(f"{network.name} {candidate}"):
            record = measure(network, candidate, session)
            session.add("models", [record])
            session.say(", ".join(f"{key} {value}" for key, value in record.items() if key not in ("model", "batch")))
    _tell(session.records.get("models", []))


def _tell(records: list[Record]) -> None:
    rows: list[list[object]] = [["step of training", "ms", "GPU busy, ms", "normalization, ms", "peak MiB", "× eager"]]
    eager = {r["network"]: r["step_ms"] for r in records if r["candidate"] == "eager"}
    for r in records:
        more = [r.get(key, "") for key in ("busy_ms", "normalization_ms", "peak_mib")]
        ratio = f"{eager[r['network']] / r['step_ms']:.2f}" if r["network"] in eager else ""
        rows.append([f"{r['network']} {r['candidate']}", r["step_ms"], *more, ratio])
    print(columns(rows), flush=True)
