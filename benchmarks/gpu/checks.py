"""Every way to compute a normalization on a GPU against float64, and what a layer promises besides its values.

Errors are `|found - exact| / |exact|`, as norms of whole tensors. They must stay below what rounding may do: in
float32 arithmetic `eps * (8 + sqrt(M)) * growth`, where `M` values are summed, and half a unit in the last place for
each time that a value is stored in half precision.
"""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm.torch as bt
from batchnorm.bench.clock import Record
from batchnorm.definition import ActivationSpec
from batchnorm.torch import gpu
from benchmarks.gpu.reference import KINKS, Exact, activate, exact
from benchmarks.gpu.workers import Task

__all__ = ["Case", "tasks"]

EPS, RATE = 1e-5, 0.1
ACTIVATIONS: tuple[ActivationSpec, ...] = (
    None, "relu", "relu6", ("leaky_relu", 0.2), "silu", "hardswish", ("elu", 1.5), "sigmoid", "tanh", "gelu",
)  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16")
LAYERS = {2: bt.BatchNorm1d, 3: bt.BatchNorm1d, 4: bt.BatchNorm2d, 5: bt.BatchNorm3d}
SOURCES: dict[str, Any] = {
    "batch": None,
    "ghost": bt.GhostStatistics(3),
    "renorm": bt.Renorm(1.5, 0.5, warmup_steps=0),
    "frozen": bt.RunningStatistics(),
    "evaluation": None,
}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Case(NamedTuple):
    """One comparison of all routes with float64."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: str = "float32"
    activation: ActivationSpec = None
    residual: bool = False
    mask: bool = False
    source: str = "batch"
    mean: float = 0.5
    weights: str = "float32"

    @property
    def name(self) -> str:
        words = ["x".join(map(str, self.shape)), self.layout, self.dtype, str(self.activation)]
        words += ["residual"] * self.residual + ["mask"] * self.mask + [self.source] * (self.source != "batch")
        words += [f"about {self.mean:g}"] if self.mean != 0.5 else []
        words += [f"{self.weights} weights"] if self.weights != "float32" else []
        return " ".join(words)


def cases(quick: bool) -> Iterator[Case]:
    """All activations by each walk; all shapes and layouts; and what else may come with a call."""
    walks: tuple[tuple[tuple[int, ...], str], ...] = (
        ((6, 5, 24, 24), "contiguous"), ((9, 20, 7, 7), "contiguous"), ((6, 24, 6, 7), "channels_last"),
    )  # fmt: skip
    if quick:
        yield from (Case(*walks[0], activation="relu", residual=True), Case(*walks[2], "bfloat16", "silu"))
        yield from (Case(*walks[1], source=source, activation="gelu") for source in SOURCES)
        yield Case(*walks[1], mask=True)
        return
    for i, (shape, layout) in enumerate(walks):
        for k, activation in enumerate(ACTIVATIONS):
            for j, dtype in enumerate((DTYPES[0], DTYPES[1 + (i + k) % 2])):
                yield Case(shape, layout, dtype, activation, residual=(i + j + k) % 2 == 0)
    shapes: tuple[tuple[tuple[int, ...], str], ...] = (
        ((64, 48), "contiguous"), ((130, 7), "contiguous"), ((4096, 96), "contiguous"), ((6, 1500), "contiguous"),
        ((5, 12, 33), "contiguous"), ((3, 4, 5, 6, 7), "contiguous"), ((3, 8, 4, 6, 5), "channels_last"),
        ((16, 64, 56, 56), "contiguous"), ((16, 64, 56, 56), "channels_last"), ((32, 200, 14, 14), "contiguous"),
        ((32, 200, 14, 14), "channels_last"), ((8, 513, 7, 7), "contiguous"), ((8, 513, 7, 7), "channels_last"),
        ((7, 3, 1, 1), "contiguous"), ((1, 3, 50, 51), "contiguous"), ((4, 1, 9, 9), "channels_last"),
        ((6, 8, 12, 12), "offset"), ((6, 8, 12, 12), "sliced"), ((256, 16, 1, 1), "contiguous"),
    )  # fmt: skip
    for i, (shape, layout) in enumerate(shapes):
        for j, dtype in enumerate(DTYPES):
            yield Case(shape, layout, dtype, "relu", residual=(i + j) % 2 == 0)
            if dtype == "bfloat16":
                yield Case(shape, layout, dtype, None, residual=(i + j) % 2 == 1)
    for shape, layout in (*walks, ((64, 48), "contiguous")):
        for dtype in DTYPES[::2]:
            for source in list(SOURCES)[1:]:
                if source != "ghost" or len(shape) > 2:  # the gradient of two or three values is nothing but rounding
                    yield Case(shape, layout, dtype, "silu", source=source, residual=dtype == "float32")
            yield Case(shape, layout, dtype, "relu", mask=True)
            if len(shape) > 2:
                yield Case(shape, layout, dtype, "relu", mask=True, residual=True, source="ghost")
        yield Case(shape, layout, mean=100.0)
        yield Case(shape, layout, "bfloat16", "relu", mean=10.0)
        yield Case(shape, layout, "bfloat16", "relu", weights="bfloat16")
    yield Case((7, 16, 12, 12), activation="relu", source="ghost")


def routes(device: torch.device) -> tuple[str, ...]:
    """The routes of a device, the kernels' first."""
    return ("triton" if device.type == "cuda" else "numba", "native", "composed")


# --- Values ----------------------------------------------------------------------------------------------------------


def _lay(t: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return t.contiguous(memory_format=LAST[t.dim()])
    if layout == "offset":  # begins where vectors do not
        return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)
    if layout == "sliced":
        return t.repeat_interleave(2, -1)[..., ::2]
    return t.contiguous()


def _given(case: Case, device: torch.device, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a case, and `dy`: 0 near a kink, where rounding decides on which side `z` falls."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, weights, channels = getattr(torch, case.dtype), getattr(torch, case.weights), case.shape[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    given = {
        "x": _lay((normal(*case.shape) + case.mean).to(dtype), case.layout),
        "weight": (normal(channels).abs() + 0.5).to(weights),
        "bias": normal(channels).to(weights),
        "running_mean": normal(channels) + case.mean,
        "running_var": normal(channels).abs() + 0.5,
    }
    if case.residual:
        given["residual"] = _lay(normal(*case.shape).to(dtype), case.layout)
    if case.mask:
        given["counts"] = torch.randint(0, 3, (case.shape[0], *case.shape[2:]), generator=generator, device=device)
        given["counts"].view(-1)[-2:] = 1
    z = exact(given, None, case.activation, SOURCES[case.source], case.source != "evaluation", EPS, RATE).z
    distance = torch.stack([(z - kink).abs() for kink in KINKS]).amin(0)
    margin = 1e-3 if dtype is torch.float32 else 0.05
    dy = torch.where(distance < margin, 0.0, normal(*case.shape)).to(dtype)
    return given, _lay(dy, case.layout)


def _by_layer(case: Case, given: dict[str, Tensor], dy: Tensor) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """What a layer of ours makes of it, and its counters."""
    layer: Any = LAYERS[len(case.shape)](
        case.shape[1], EPS, RATE, activation=case.activation, statistics=SOURCES[case.source], device=dy.device
    )
    layer.train(case.source != "evaluation")
    for name in ("weight", "bias"):
        setattr(layer, name, nn.Parameter(given[name].clone()))
    layer.running_mean.copy_(given["running_mean"])
    layer.running_var.copy_(given["running_var"])
    x = given["x"].detach().requires_grad_()
    residual = given["residual"].detach().requires_grad_() if case.residual else None
    y = layer(x, residual=residual, mask=given.get("counts"))
    inputs = {"x": x, "weight": layer.weight, "bias": layer.bias} | ({} if residual is None else {"residual": residual})
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    found = {"y": y.detach()} | {f"d_{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    found |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
    return found, (int(layer.num_batches_tracked), int(layer.num_batches_skipped))


def _by_pytorch(case: Case, given: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """The same by PyTorch's operations, one after the other; nothing where PyTorch has no such thing."""
    if case.mask or case.source not in ("batch", "evaluation"):
        return {}
    names = ("x", "weight", "bias", *(["residual"] if case.residual else []))
    inputs = {name: given[name].detach().clone().requires_grad_() for name in names}
    running = {name: given[name].to(given["weight"].dtype, copy=True) for name in ("running_mean", "running_var")}
    z = F.batch_norm(
        inputs["x"], running["running_mean"], running["running_var"], inputs["weight"], inputs["bias"],
        case.source == "batch", RATE, EPS,
    )  # fmt: skip
    y = activate(z + inputs["residual"] if case.residual else z, case.activation)
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    return {"y": y.detach()} | {f"d_{name}": g for name, g in zip(inputs, grads, strict=True)} | running


def _error(found: Tensor, true: Tensor) -> float:
    found, true = found.detach().double(), true.detach()
    return float((found - true).norm() / true.norm().clamp(min=1e-300))


def limit(case: Case, name: str, route: str, growth: float) -> float:
    """How far a tensor may be from the exact one, as a norm over the norm of that one."""
    terms = math.prod(case.shape) // case.shape[1]
    arithmetic = torch.finfo(torch.float32).eps * (8 + math.sqrt(terms)) * growth
    half = {t: torch.finfo(getattr(torch, t)).eps / 2 for t in (case.dtype, case.weights)}
    stored = 0.0 if case.dtype == "float32" else half[case.dtype]
    if route == "native" and stored:  # z, the sum and y are stored, and the gradient of the activation starts from z
        return arithmetic + (4 + 2 * case.residual) * stored
    if name in ("y", "d_x", "d_residual"):
        return arithmetic + stored
    is_half = name in ("d_weight", "d_bias") and case.weights != "float32"
    return arithmetic + (half[case.weights] if is_half else 0.0)


def against(case: Case, device: torch.device) -> list[Record]:
    """Every route that takes the case, against float64 and beside PyTorch."""
    given, dy = _given(case, device)
    source, training = SOURCES[case.source], case.source != "evaluation"
    true: Exact = exact(given, dy, case.activation, source, training, EPS, RATE)
    eager = {name: _error(t, true.tensors[name]) for name, t in _by_pytorch(case, given, dy).items()}
    moves = training and case.source != "frozen"
    records = []
    for route in routes(device):
        with bt.route(route):
            try:
                found, counters = _by_layer(case, given, dy)
            except RuntimeError as error:
                if "cannot compute this call" not in str(error):
                    raise
                if route == "triton":  # it says itself what it cannot load in whole vectors
                    records.append(_row(case.name, route, "refused", not gpu.takes(given["x"]), str(error)))
                elif route == "numba":
                    raise
                continue
        for name, tensor in found.items():
            distance, most = _error(tensor, true.tensors[name]), limit(case, name, route, true.growth)
            about = {"check": case.name, "route": route, "what": name, "value": distance, "limit": most}
            about["eager"] = eager.get(name, math.nan)
            records.append(about | {"ok": int(distance <= most)})
        wanted = (int(moves), 0)
        records.append(_row(case.name, route, "counters", counters == wanted, f"{counters}, not {wanted}"))
    return records


def _row(check: str, route: str, what: str, ok: bool, detail: str = "") -> Record:
    """A check that is met or not."""
    empty = {"value": math.nan, "limit": math.nan, "eager": math.nan}
    return {"check": check, "route": route, "what": what, **empty, "ok": int(ok), "detail": "" if ok else detail}


# --- Promises --------------------------------------------------------------------------------------------------------

Step = tuple[Tensor, ...]


def _layer(shape: Sequence[int], device: torch.device, activation: ActivationSpec = "relu", source: Any = None) -> Any:
    layer = LAYERS[len(shape)](shape[1], activation=activation, statistics=source, device=device)
    torch.manual_seed(1)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    return layer


def _step(layer: Any, x: Tensor, dy: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Step:
    """`y` and the gradients of `x`, weight and bias."""
    x = x.detach().requires_grad_()
    y = layer(x, residual=residual, mask=mask)
    return (y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy))


def _random(shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _same(a: Step, b: Step) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


WALKS = {
    "by channel": ((8, 16, 40, 40), False),
    "by row": ((8, 32, 7, 7), False),
    "last": ((8, 32, 14, 14), True),
}


def _walk(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    shape, last = WALKS[name]
    x = _random(shape, device, dtype, seed)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def _mask(x: Tensor) -> Tensor:
    """Weights of 0, 1 and 2; the first position counts."""
    generator = torch.Generator(x.device).manual_seed(9)
    mask = torch.randint(0, 3, (x.shape[0], *x.shape[2:]), generator=generator, device=x.device).float()
    mask.view(-1)[0] = 1.0
    return mask


def without_waiting(device: torch.device) -> list[Record]:
    """Training never waits for the GPU; a batch that is not finite moves nothing and is counted as skipped."""
    records = []
    sources: dict[str, Any] = {"batch": None, "ghost": bt.GhostStatistics(4), "frozen": bt.RunningStatistics()}
    sources["renorm"] = bt.Renorm(warmup_steps=0)
    route = routes(device)[0]
    for walk, (name, source), masked in product(WALKS, sources.items(), (False, True)):
        x, dy = _walk(walk, device), _walk(walk, device, seed=1)
        layer, mask = _layer(x.shape, device, source=source), _mask(x) if masked else None
        for _ in range(2):
            with bt.route(route):
                _step(layer, x, dy, None, mask)
        before = [t.clone() for t in (layer.running_mean, layer.running_var)]
        tracked = int(layer.num_batches_tracked)
        x[0, 0, 0, 0] = math.inf
        mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
        problem = ""
        try:
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            with bt.route(route):
                _step(layer, x, dy, None, mask)
        except RuntimeError as error:
            problem = str(error).splitlines()[-1]
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode(mode)
        about = f"{walk}, {name}{', mask' if masked else ''}"
        records.append(_row(f"no wait, {about}", route, "sync", not problem, problem))
        if name == "frozen":
            continue
        after = layer.running_mean, layer.running_var
        kept = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        records.append(_row(f"infinity, {about}", route, "running", kept, "they moved"))
        counters = int(layer.num_batches_tracked) - tracked, int(layer.num_batches_skipped)
        records.append(_row(f"infinity, {about}", route, "counters", counters == (0, 1), f"{counters}, not (0, 1)"))
    return records


def late_errors(device: torch.device) -> list[Record]:
    """A mask that nobody may give is an error: at once on the CPU, by the next such call on a GPU."""
    x, records = _walk("by row", device), []
    masks = {"negative": -torch.ones(len(x), device=device), "empty": torch.zeros(len(x), device=device).bool()}
    for name, mask in masks.items():
        told = ""
        try:
            bt.batch_norm(x, training=True, mask=mask)
            if device.type == "cuda":
                torch.cuda.synchronize()
            bt.batch_norm(x, training=True, mask=torch.ones(len(x), device=device))
        except ValueError as error:
            told = str(error)
        records.append(_row(f"a mask, {name}", "any", "error", told.startswith("mask "), f"{told!r}"))
    return records


def second_derivative(device: torch.device) -> list[Record]:
    """The gradient of `|dx|^2 + |d_weight|^2`."""
    shape, records = (6, 4, 9, 9), []
    x, dy = _random(shape, device), _random(shape, device, seed=1)
    layer = _layer(shape, device, "silu")

    def twice(normalize: Any, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> Step:
        x = x.detach().requires_grad_()
        first = torch.autograd.grad(normalize(x), (x, weight), dy, create_graph=True)
        return torch.autograd.grad(torch.stack([(g * g).sum() for g in first]).sum(), (x, weight))

    weight, bias = (t.detach().double().requires_grad_() for t in (layer.weight, layer.bias))

    def formula(x: Tensor) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        return F.silu((x - mean) / (var + EPS).sqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1))

    true = twice(formula, x.double(), weight, bias, dy.double())
    for route in routes(device):
        with bt.route(route):
            found = twice(layer, x, layer.weight, layer.bias, dy)
        for name, one, other in zip(("x", "weight"), found, true, strict=True):
            error = _error(one, other)
            records.append(_row(f"second derivative of {name}", route, "value", error < 1e-4, f"error {error:.1e}"))
    return records


def autocast(device: torch.device) -> list[Record]:
    """Under autocast the types are PyTorch's."""
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        x = _random((4, 8, 10, 10), device, dtype)
        layer, theirs = _layer(x.shape, device, None), nn.BatchNorm2d(8, device=device)
        theirs.load_state_dict(layer.state_dict())
        with torch.autocast(device.type, torch.bfloat16):
            y, wanted = layer(x), theirs(x)
        ok = y.dtype is wanted.dtype
        records.append(_row(f"autocast, {dtype}", "any", "type", ok, f"{y.dtype}, not {wanted.dtype}"))
        error = _error(y, wanted.double())
        ok = error < 4 * torch.finfo(wanted.dtype).eps + 1e-6
        records.append(_row(f"autocast, {dtype}", "any", "value", ok, f"error {error:.1e}"))
    return records


def strides(device: torch.device) -> list[Record]:
    """`y` and `dx` lie in memory as PyTorch's do."""
    base = _random((4, 8, 8, 10), device)
    inputs = {
        "contiguous": base,
        "channels last": base.contiguous(memory_format=torch.channels_last),
        "volumes, channels last": _random((2, 4, 3, 4, 5), device).contiguous(memory_format=torch.channels_last_3d),
        "transposed": base.transpose(2, 3),
        "every other channel": base[:, ::2],
        "channels last, some channels": base.contiguous(memory_format=torch.channels_last)[:, :4],
        "one pixel": base[..., :1, :1].contiguous(),
        "one channel": base[:, :1].contiguous(memory_format=torch.channels_last),
        "matrix": base[..., 0, 0].contiguous(),
        "series": base[..., 0],
        "channels last, three channels": base[:, :3].contiguous(memory_format=torch.channels_last),
    }
    ranks = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    records = []
    for route in routes(device):
        for name, x in inputs.items():
            if route == "triton" and not gpu.takes(x):
                continue
            theirs = ranks[x.dim()](x.shape[1], device=device)
            leaf = x.detach().requires_grad_()
            y = theirs(leaf)
            dx = torch.autograd.grad(y, leaf, torch.ones_like(y))[0]
            with bt.route(route):
                leaf = x.detach().requires_grad_()
                ours = _layer(x.shape, device, None)(leaf)
                d_ours = torch.autograd.grad(ours, leaf, torch.ones_like(ours))[0]
            for what, a, b in (("y", ours, y), ("d_x", d_ours, dx)):
                # The stride of an axis of length one says nothing.
                found, wanted = ([t.stride(i) for i in range(t.dim()) if t.shape[i] > 1] for t in (a, b))
                records.append(_row(f"strides, {name}", route, what, found == wanted, f"{found}, not {wanted}"))
    return records


def same_bits(device: torch.device) -> list[Record]:
    """Three times the same bits, and the same on another stream."""
    records, route = [], routes(device)[0]
    for walk in WALKS:
        x, dy, residual = (_walk(walk, device, seed=seed) for seed in range(3))
        start = _layer(x.shape, device)
        found = []
        for _ in range(3):
            layer = deepcopy(start)
            with bt.route(route):
                step = _step(layer, x, dy, residual)
            found.append((*step, layer.running_mean, layer.running_var))
        records.append(_row(f"the same bits, {walk}", route, "all", all(_same(found[0], other) for other in found[1:])))
        if device.type != "cuda":
            continue
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        beside: list[list[Step]] = [[], []]
        for _ in range(20):
            for stream, kept in zip(streams, beside, strict=True):
                with torch.cuda.stream(stream), bt.route(route):
                    layer = deepcopy(start)
                    kept.append((*_step(layer, x, dy, residual), layer.running_mean, layer.running_var))
        torch.cuda.synchronize()
        ok = all(_same(found[0], other) for kept in beside for other in kept)
        records.append(_row(f"two streams at once, {walk}", route, "all", ok, "other bits"))
    return records


def graphs(device: torch.device) -> list[Record]:
    """A step captured as a CUDA graph gives, replayed on new values, the same bits as the step itself."""
    records, route = [], routes(device)[0]
    if device.type != "cuda":
        return []
    for walk, masked in product(WALKS, (False, True)):
        x, dy, residual = (_walk(walk, device, seed=seed) for seed in range(3))
        layer, mask = _layer(x.shape, device), _mask(x) if masked else None
        stream = torch.cuda.Stream()
        with bt.route(route), torch.cuda.stream(stream):
            _step(layer, x, dy, residual, mask)
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                outputs = _step(layer, x, dy, residual, mask)
            torch.cuda.synchronize()
            other = deepcopy(layer)
            ok = True
            for seed in range(10, 14):
                x.copy_(_walk(walk, device, seed=seed))
                graph.replay()
                found = (*(t.clone() for t in outputs), layer.running_mean, layer.running_var)
                wanted = (*_step(other, x, dy, residual, mask), other.running_mean, other.running_var)
                ok &= _same(found, wanted)
            ok &= int(layer.num_batches_tracked) == int(other.num_batches_tracked)
        records.append(_row(f"graph, {walk}{', mask' if masked else ''}", route, "all", ok, "not what the step gives"))
    return records


def compiled(device: torch.device) -> list[Record]:
    """A compiled layer, in one graph."""
    records = []
    for dtype in ("float32", "bfloat16"):
        case = Case((8, 16, 14, 14), dtype=dtype, activation="relu", residual=True)
        given, dy = _given(case, device)
        layer: Any = LAYERS[4](16, EPS, RATE, activation="relu", device=device)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(layer, name).copy_(given[name])
        torch._dynamo.reset()
        backend = "inductor" if device.type == "cuda" else "aot_eager"
        run = torch.compile(layer, fullgraph=True, backend=backend)
        found = _step(run, given["x"], dy, given["residual"])
        true = exact(given, dy, "relu", None, True, EPS, RATE).tensors
        for name, tensor in zip(("y", "d_x", "d_weight", "d_bias"), found, strict=True):
            error = _error(tensor, true[name])
            most = limit(case, name, "native", 2.0) + torch.finfo(getattr(torch, dtype)).eps
            records.append(_row(f"compiled, {dtype}", "compile", name, error <= most, f"error {error:.1e}"))
        error = _error(layer.running_var, true["running_var"])
        counters = int(layer.num_batches_tracked), int(layer.num_batches_skipped)
        ok = error < 1e-4 and counters == (1, 0)
        records.append(_row(f"compiled, {dtype}", "compile", "running", ok, f"error {error:.1e}, counters {counters}"))
    return records


def cumulative(device: torch.device) -> list[Record]:
    """`momentum=None`: the plain average of all batches."""
    records = []
    for route in routes(device):
        layer: Any = LAYERS[4](8, momentum=None, device=device)
        xs = [_random((4, 8, 12, 12), device, seed=seed) for seed in range(3)]
        with bt.route(route):
            for x in xs:
                layer(x)
        var = torch.stack([x.double().var((0, 2, 3)) for x in xs]).mean(0)
        error = _error(layer.running_var, var)
        records.append(_row("average of all batches", route, "running_var", error < 1e-5, f"error {error:.1e}"))
    return records


def parts_of_gradients(device: torch.device) -> list[Record]:
    """Whatever gradients are not asked for, the others are the same."""
    records, route = [], routes(device)[0]
    for walk in WALKS:
        x, dy = _walk(walk, device), _walk(walk, device, seed=1)
        with bt.route(route):
            _, dx, d_weight, d_bias = _step(_layer(x.shape, device), x, dy)
            layer = _layer(x.shape, device)
            found = torch.autograd.grad(layer(x), (layer.weight, layer.bias), dy)
            records.append(_row(f"no d_x, {walk}", route, "all", _same(found, (d_weight, d_bias)), "others"))
            layer = _layer(x.shape, device).requires_grad_(False)
            leaf = x.detach().requires_grad_()
            found = torch.autograd.grad(layer(leaf), (leaf,), dy)
            records.append(_row(f"only d_x, {walk}", route, "d_x", _same(found, (dx,)), "another"))
    return records


def flat_memory(device: torch.device) -> list[Record]:
    """200 steps hold as much memory as 20."""
    if device.type != "cuda":
        return []
    route = routes(device)[0]
    x, dy = _random((32, 64, 28, 28), device), _random((32, 64, 28, 28), device, seed=1)
    layer = _layer(x.shape, device)
    held = []
    with bt.route(route):
        for step in range(200):
            y = layer(x.detach().requires_grad_())
            y.backward(dy)
            layer.zero_grad()
            del y
            if step in (19, 199):
                torch.cuda.synchronize()
                held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    return [_row("200 steps", route, "memory", held[0] == held[1], f"{held[0]} then {held[1]} bytes")]


def huge(device: torch.device, last: bool, dtype: str) -> list[Record]:
    """More than 2^31 values, seen on the first, a middle and the last channel."""
    if device.type != "cuda":
        return []
    shape, route = (33, 64, 1024, 1024), routes(device)[0]
    name = f"{math.prod(shape):.2e} values, {dtype}{', channels last' if last else ''}"
    if torch.cuda.mem_get_info()[0] < 5 * 2 * math.prod(shape):
        return [_row(name, route, "memory", False, "not enough memory to check this")]
    laid = torch.channels_last if last else torch.contiguous_format

    def tensor() -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device, memory_format=laid).normal_()

    x, dy, layer, records = tensor(), tensor(), _layer(shape, device, "silu"), []
    with bt.route(route):
        y, dx, d_weight, d_bias = _step(layer, x, dy)
    for channel in (0, 31, 63):
        keep = slice(channel, channel + 1)
        given = {"x": x[:, keep], "weight": layer.weight[keep], "bias": layer.bias[keep]}
        given |= {"running_mean": torch.zeros(1, device=device), "running_var": torch.ones(1, device=device)}
        true = exact(given, dy[:, keep], "silu", None, True, layer.eps, RATE).tensors
        found = {"y": y[:, keep], "d_x": dx[:, keep], "d_weight": d_weight[keep], "d_bias": d_bias[keep]}
        found |= {"running_mean": layer.running_mean[keep], "running_var": layer.running_var[keep]}
        for what, t in found.items():
            error = _error(t, true[what])
            # A mean near 0, and a sum that cancels, are told in units of what goes into them.
            most = 0.2 if what in ("running_mean", "d_bias", "d_weight") else torch.finfo(t.dtype).eps / 2 + 1e-4
            records.append(_row(name, route, f"{what} of channel {channel}", error <= most, f"error {error:.1e}"))
        del true, found
        torch.cuda.empty_cache()
    del x, dy, y, dx
    torch.cuda.empty_cache()
    return records


PROMISES = (
    compiled, without_waiting, late_errors, second_derivative, autocast, strides, same_bits, graphs, cumulative,
    parts_of_gradients, flat_memory,
)  # fmt: skip


def tasks(device: torch.device, quick: bool) -> list[Task]:
    """All checks, those first that take longest."""
    found = [Task(f"huge {dtype} {last}", huge, (device, last, dtype), 120.0) for last, dtype in HUGE if not quick]
    found += [Task(promise.__name__, promise, (device,), 120.0) for promise in PROMISES]
    return found + [Task(case.name, against, (case, device)) for case in cases(quick)]


HUGE = ((False, "bfloat16"), (True, "float16"))
