"""The route from a layer to the kernels and back, against the definition in float64; on the CPU, interpreted.

A second step repeats the passes of the first: it starts them with addresses. Here an interpreted kernel is then given
tensors that are made of these addresses, so that a wrong one gives wrong numbers.
"""

import ctypes
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import relative_error, tolerance
from check_stages import DEVICE, INTERPRETED, array

import batchnorm.torch as bt
from batchnorm import definition
from batchnorm.kernels.gpu import launch
from batchnorm.torch import cards, deferred, function, gpu, routes
from batchnorm.torch.call import Call, Plan
from batchnorm.torch.running import Running

Tensor = torch.Tensor


def by_addresses(made: launch.Launch, like: tuple[Tensor | None, ...]) -> launch.Start:
    """Starts an interpreted kernel on tensors at these addresses, of the sizes and types of others."""

    def at(address: Any, t: Tensor | None) -> Tensor | None:
        if t is None:
            assert address is None
            return None
        assert address % 16 == 0 or t.numel() < 1000  # of the large ones
        memory = (ctypes.c_byte * (t.numel() * t.element_size())).from_address(address)
        return torch.frombuffer(memory, dtype=t.dtype)

    def start(_stream: int, arguments: tuple[Any, ...]) -> None:
        tensors = [at(a, t) for a, t in zip(arguments, like, strict=False)]
        floats = arguments[len(like) : len(arguments) - len(made._rest)]
        made.kernel[(made.programs,)](*tensors, *floats, *made.integers, **made.constants, **made.options)

    return start


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """How each pass was started: with tensors or with addresses."""
    told: list[str] = []
    passes: tuple[dict[Any, Any], ...] = gpu._forwards, gpu._backwards
    for found in passes:
        found.clear()
    with_tensors, with_addresses = launch.Launch.__call__, launch.Launch.start

    def call(self: launch.Launch, tensors: Any, floats: Any, scratch: Any) -> None:
        told.append("tensors")
        with_tensors(self, tensors, floats, scratch)
        if INTERPRETED:
            used = scratch or launch._scratch[-1, 0]
            self._fast = self._seen = by_addresses(self, (*tensors, used.state, used.parts))

    def start(self: launch.Launch, *arguments: Any) -> None:
        told.append("addresses")
        with_addresses(self, *arguments)

    monkeypatch.setattr(launch.Launch, "start", start)
    monkeypatch.setattr(launch.Launch, "__call__", call)
    if INTERPRETED:
        of_stream = launch._of_stream
        monkeypatch.setattr(launch, "_of_stream", lambda device, _index, stream: of_stream(device, -1, stream))
        monkeypatch.setattr(launch, "_current_device", lambda: None)
        monkeypatch.setattr(launch, "_stream", lambda _index: 0)
        monkeypatch.setattr(gpu, "_current_device", lambda: None)
        quick = torch._C._dynamo.guards._empty_strided_cpu
        monkeypatch.setattr(gpu, "_quick_room", lambda: lambda *given: quick(*given).fill_(math.nan))

        def takes(call: Any, plan: Any) -> bool:
            return gpu.takes(call.x) and routes._stages_take(gpu, call, plan)

        here = routes.Route("triton", takes, routes._always, functools.partial(function.compute, gpu))
        monkeypatch.setattr(routes, "ROUTES", (here, *routes.ROUTES[1:]))
    with bt.route("triton"):
        yield told
    for found in passes:
        found.clear()


def drawn(shape: tuple[int, ...], seed: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    values = torch.from_numpy(np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32))
    return values.to(DEVICE).contiguous(memory_format=layout)


def step(layer: Any, x: Tensor, dy: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> list[Tensor]:
    """`y` and the gradients of `x`, weight, bias and residual."""
    inputs = [x.requires_grad_(), layer.weight, layer.bias, *([] if residual is None else [residual.requires_grad_()])]
    y = layer(x, residual=residual, mask=mask)
    return [y, *torch.autograd.grad(y, inputs, dy)]


def assert_step(
    layer: Any, x: Tensor, dy: Tensor, residual: Tensor | None, mask: Tensor | None, found: list[Tensor],
    sizes: list[int] | None = None,
) -> None:  # fmt: skip
    """That a step found what the definition does, of each group of samples."""
    sums: list[Any] = [0.0, 0.0]
    start = 0
    for size in sizes or [len(x)]:
        at = slice(start, start + size)
        start += size
        x64, dy64, residual64 = (None if t is None else array(t)[at] for t in (x, dy, residual))
        counts = None if mask is None else array(mask)[at]
        act = layer.activation
        y, _ = definition.forward(x64, array(layer.weight), array(layer.bias), residual64, act, counts, layer.eps)
        dx, d_weight, d_bias, d_residual = definition.backward(
            dy64, x64, array(layer.weight), array(layer.bias), residual64, act, counts, layer.eps
        )
        sums = [sums[0] + d_weight, sums[1] + d_bias]
        pairs = [(found[0], y), (found[1], dx), *([] if residual is None else [(found[4], d_residual)])]
        for value, exact in pairs:
            assert relative_error(array(value)[at], exact) <= tolerance(np.float32, dx[:, 0].size)
    for value, exact in zip(found[2:4], sums, strict=True):
        assert relative_error(array(value), exact) <= tolerance(np.float32, x.numel() // x.shape[1])


LAYOUTS = {
    "channels-first": ((4, 5, 6, 8), torch.contiguous_format),
    "channels-last": ((4, 8, 3, 3), torch.channels_last),
    "by-row": ((6, 8, 3, 3), torch.contiguous_format),
}


@pytest.mark.parametrize(("layout", "residual"), list(zip(LAYOUTS, (False, True, True), strict=True)))
def test_a_step_and_the_next_ones(layout: str, residual: bool, started: list[str]) -> None:
    shape, laid = LAYOUTS[layout]
    layer = bt.BatchNorm2d(shape[1], activation="silu", device=DEVICE)
    for seed in range(2):
        x, dy = drawn(shape, seed, laid), drawn(shape, seed + 10, laid)
        beside = drawn(shape, seed + 20, laid) if residual else None
        with torch.no_grad():
            layer.weight.copy_(drawn((shape[1],), seed)), layer.bias.copy_(drawn((shape[1],), seed + 1))
        found = step(layer, x, dy, beside)
        assert_step(layer, x, dy, beside, None, found)
        assert found[0].stride() == found[1].stride() == x.stride()
    assert started == ["tensors"] * 2 + ["addresses"] * 2
    assert (int(layer.num_batches_tracked), int(layer.num_batches_skipped)) == (2, 0)
    mean, var = np.zeros(shape[1]), np.ones(shape[1])
    for seed in range(2):
        mean, var = definition.update_running(mean, var, definition.moments(array(drawn(shape, seed))), 0.1)
    assert relative_error(array(layer.running_mean), mean) <= tolerance(np.float32, 100)
    assert relative_error(array(layer.running_var), var) <= tolerance(np.float32, 100)


@pytest.mark.parametrize(("layout", "residual"), list(zip(LAYOUTS, (False, True, True), strict=True)))
def test_constants_in_one_launch(layout: str, residual: bool, started: list[str]) -> None:
    """In evaluation, and frozen in training: the backward pass knows the constants as they were."""
    shape, laid = LAYOUTS[layout]
    layer = bt.BatchNorm2d(shape[1], activation="silu", statistics=bt.RunningStatistics(), device=DEVICE)
    for seed, frozen in enumerate((False, False, True, True)):
        layer.train(frozen)
        x, dy = (drawn(shape, seed + ten, laid) for ten in (0, 10))
        beside = drawn(shape, seed + 20, laid) if residual else None
        with torch.no_grad():
            layer.weight.copy_(drawn((shape[1],), seed)), layer.bias.copy_(drawn((shape[1],), seed + 1))
            layer.running_mean.copy_(drawn((shape[1],), seed + 2))
            layer.running_var.copy_(drawn((shape[1],), seed + 3).square())
        weight, bias, mean, var = (array(t).copy() for t in (*layer.parameters(), *list(layer.buffers())[:2]))
        rstd = definition.reciprocal_std(var, layer.eps)
        inputs = [x.requires_grad_(), *layer.parameters(), *([beside.requires_grad_()] if beside is not None else [])]
        y = layer(x, residual=beside)
        with torch.no_grad():
            layer.running_mean.add_(1), layer.running_var.mul_(2), layer.bias.add_(1)
        found = torch.autograd.grad(y, inputs, dy)
        z = definition.normalize(array(x), mean, rstd, weight, bias, None if beside is None else array(beside), None)
        dz = array(dy) * definition.activate_grad(z, "silu")
        across = (slice(None), None, None)
        xhat = (array(x) - mean[across]) * rstd[across]
        exact = dz * (weight * rstd)[across], (dz * xhat).sum((0, 2, 3)), dz.sum((0, 2, 3)), dz
        assert relative_error(array(y), definition.activate(z, "silu")) <= tolerance(np.float32, 100)
        for value, wanted in zip(found, exact, strict=False):
            assert relative_error(array(value), wanted) <= tolerance(np.float32, 100)
    assert started == ["tensors"] * 2 + ["addresses"] * 6
    assert (int(layer.num_batches_tracked), int(layer.num_batches_skipped)) == (0, 0)


def test_plain_calls(started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They reach the kernels without the table of routes."""
    if INTERPRETED:
        monkeypatch.setattr(Tensor, "is_cpu", property(lambda _: False), raising=False)
        monkeypatch.setattr(gpu, "is_available", lambda _device: True)
        monkeypatch.setattr(cards, "smallest", lambda _device: 0)
    monkeypatch.setattr(bt.BatchNorm2d, "_normalize", lambda *_: pytest.fail("not a plain call"))
    shape, laid = LAYOUTS["by-row"]
    layer = bt.BatchNorm2d(shape[1], activation="tanh", device=DEVICE)
    mean, var = np.zeros(shape[1]), np.ones(shape[1])
    with bt.route():
        for seed in range(3):
            x, dy, beside = (drawn(shape, seed + ten, laid) for ten in (0, 10, 20))
            assert_step(layer, x, dy, beside, None, step(layer, x, dy, beside))
            mean, var = definition.update_running(mean, var, definition.moments(array(x)), 0.1)
        y = layer.eval()(x)
    assert (int(layer.num_batches_tracked), int(layer.num_batches_skipped)) == (3, 0)
    for value, exact in (layer.running_mean, mean), (layer.running_var, var):
        assert relative_error(array(value), exact) <= tolerance(np.float32, 100)
    rstd = definition.reciprocal_std(var, layer.eps)
    assert relative_error(array(y), definition.normalize(array(x), mean, rstd, None, None, None, "tanh")) <= tolerance(
        np.float32, 100
    )
    assert started == ["tensors"] * 2 + ["addresses"] * 4 + ["tensors"]


def test_second_derivatives_by_constants() -> None:
    layer = bt.BatchNorm2d(3, activation="silu", device=DEVICE).eval()
    x = drawn((2, 3, 2, 2), 0).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with torch.no_grad():
        layer.running_var.add_(9)
    (found,) = torch.autograd.grad(dx.sum(), x)
    z = x.detach().double().requires_grad_()
    y = torch.nn.functional.silu(z / (1 + layer.eps) ** 0.5).sum()
    (exact,) = torch.autograd.grad(torch.autograd.grad(y, z, create_graph=True)[0].sum(), z)
    assert relative_error(array(found), array(exact)) <= tolerance(np.float32, 8)


@pytest.mark.parametrize("groups", [False, True])
def test_masks_and_groups(groups: bool, started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts stay on the device, as on a GPU."""
    monkeypatch.setattr(Call, "is_opaque", property(lambda call: call.counts is not None))
    shape = 6, 8, 3, 3
    layer = bt.BatchNorm2d(8, activation="silu", statistics=bt.GhostStatistics(3) if groups else None, device=DEVICE)
    for seed in range(2):
        x, dy, beside = (drawn(shape, seed + ten) for ten in (0, 10, 20))
        mask = torch.from_numpy(np.random.default_rng(seed).choice([0.0, 1.0, 2.0], (6, 3, 3))).to(DEVICE)
        found = step(layer, x, dy, beside, mask)
        assert_step(layer, x, dy, beside, mask, found, [3, 3] if groups else None)
    assert started == ["tensors"] * 2 + ["addresses"] * 2


@pytest.mark.parametrize(("values", "groups"), [([1.0] + [0.0] * 5, False), ([1.0, 1, 1, 1, 0, 0], True)])
def test_an_unsound_mask_moves_nothing(values: list[float], groups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few values, which is told later; the gradients are those of a batch of which nothing counts."""
    monkeypatch.setattr(Call, "is_opaque", property(lambda call: call.counts is not None))
    monkeypatch.setattr(deferred, "expect", lambda _condition, _problem: None)
    layer = bt.BatchNorm2d(8, statistics=bt.GhostStatistics(3) if groups else None, device=DEVICE)
    x, dy = (drawn((6, 8, 1, 1), seed) for seed in (0, 1))
    assert all(t.isfinite().all() for t in step(layer, x, dy, mask=torch.tensor(values, device=DEVICE)))
    assert layer.running_mean.eq(0).all()
    assert layer.running_var.eq(1).all()
    assert (int(layer.num_batches_tracked), int(layer.num_batches_skipped)) == (0, 1)


def test_relu_by_its_output(started: list[str]) -> None:
    layer = bt.BatchNorm2d(8, activation="relu", device=DEVICE)
    for seed in range(2):
        x, dy, beside = (drawn((6, 8, 3, 3), seed + ten) for ten in (0, 10, 20))
        given = beside.clone()
        y = layer(x.requires_grad_(), residual=given.requires_grad_())
        dx, d_residual = torch.autograd.grad(y, (x, given), dy)
        exact = definition.backward(array(dy), array(x), None, None, array(beside), "relu", None, layer.eps)
        assert relative_error(array(dx), exact[0]) <= tolerance(np.float32, 54)
        assert relative_error(array(d_residual), exact[3]) <= tolerance(np.float32, 54)
    assert started == ["tensors"] * 2 + ["addresses"] * 2


def test_what_is_like_no_pass_before(started: list[str]) -> None:
    """Other strides, types, sizes and alignments: each is made anew, and right."""
    layer = bt.BatchNorm2d(8, activation="silu", device=DEVICE)
    x, dy = drawn((6, 8, 3, 4), 0), drawn((6, 8, 3, 4), 1)
    assert_step(layer, x, dy, None, None, step(layer, x, dy))
    del started[:]
    room = torch.empty(x.numel() + 1, device=DEVICE)
    others = {
        "offset": (room[1:].view(x.shape).copy_(x), dy, "tensors"),
        "gaps": (x.repeat_interleave(2, -1)[..., ::2], dy, "tensors"),
        "negated": (torch._neg_view(-x), dy, "tensors"),
        "dy of one number": (x, torch.ones((), device=DEVICE).expand(x.shape), "addresses"),
        "dy in channels-last": (x, dy.contiguous(memory_format=torch.channels_last), "addresses"),
        "channels-last": (x.contiguous(memory_format=torch.channels_last), dy, "tensors"),
        "fewer samples": (x[:4].clone(), dy[:4].clone(), "tensors"),
    }
    for name, (other, gradient, first) in others.items():
        other = other.detach()
        assert_step(layer, other, gradient, None, None, step(layer, other, gradient))
        assert started[0] == first, name
        del started[:]
    half = step(layer, x.detach().bfloat16(), dy.bfloat16())
    assert half[0].dtype is half[1].dtype is torch.bfloat16
    assert started[0] == "tensors"


def test_views_that_are_negated() -> None:
    """Their memory holds the values with the other sign."""
    x, dy = drawn((6, 8, 3, 3), 0), drawn((6, 8, 3, 3), 1)
    layer = bt.BatchNorm2d(8, activation="silu", device=DEVICE)
    for each in layer.weight, layer.bias:
        each.data = torch._neg_view(drawn((8,), 2))
    for _ in range(2):
        assert_step(layer, x, dy, None, None, step(layer, x, dy))
    layer.running_mean, layer.running_var = torch._neg_view(drawn((8,), 3)), torch._neg_view(-drawn((8,), 4).square())
    mean, var, weight, bias = (array(t) for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias))
    exact = definition.normalize(array(x), mean, definition.reciprocal_std(var, layer.eps), weight, bias, None, "silu")
    assert relative_error(array(layer.eval()(x)), exact) <= tolerance(np.float32, 54)


def test_gradients_that_nobody_wants() -> None:
    x, dy = drawn((6, 8, 3, 3), 0), drawn((6, 8, 3, 3), 1)
    layer = bt.BatchNorm2d(8, activation="silu", device=DEVICE)
    exact = definition.backward(array(dy), array(x), None, None, None, "silu", None, layer.eps)
    for _ in range(2):
        for wanted, places in (("x", (0,)), ("weight", (1, 2))):
            layer.requires_grad_(wanted == "weight")
            given = x.detach().requires_grad_(wanted == "x")
            inputs = (given,) if wanted == "x" else (layer.weight, layer.bias)
            for value, place in zip(torch.autograd.grad(layer(given), inputs, dy), places, strict=True):
                assert relative_error(array(value), exact[place]) <= tolerance(np.float32, 54)


class Alone:
    """A group of one process, which pools and adds up all the same."""

    def pool(self, x: Tensor, positions: int, count: float, mean: Tensor, var: Tensor) -> tuple[Any, Tensor, Tensor]:
        return torch.tensor(count, dtype=torch.float64, device=mean.device), mean, var

    def reduce(self, sums: Tensor) -> Tensor:
        return sums


@pytest.mark.parametrize("mask", [False, True])
def test_stage_by_stage_for_other_processes(mask: bool) -> None:
    x, dy, beside = (drawn((6, 8, 3, 3), seed) for seed in range(3))
    weight, bias = drawn((8,), 3), drawn((8,), 4)
    counts = torch.from_numpy(np.random.default_rng(0).choice([0.0, 1.0, 2.0], (6, 3, 3))).to(DEVICE).float()
    inputs = [t.requires_grad_() for t in (x, weight, bias, beside)]
    call = Call.of(*inputs, counts if mask else None, 1e-5, "silu")
    plan = Plan(float(call.total()), group=Alone())  # type: ignore[arg-type]
    y = function.compute(gpu, call, plan, Running()).y
    found = torch.autograd.grad(y, inputs, dy)
    at = array(x), array(weight), array(bias), array(beside), "silu", array(counts) if mask else None
    assert relative_error(array(y), definition.forward(*at)[0]) <= tolerance(np.float32, 54)
    for value, exact in zip(found, definition.backward(array(dy), *at), strict=True):
        assert relative_error(array(value), exact) <= tolerance(np.float32, 54)


def test_second_derivatives() -> None:
    x, dy = drawn((4, 3, 3, 3), 0), drawn((4, 3, 3, 3), 1)
    layer = bt.BatchNorm2d(3, activation="silu", device=DEVICE)

    def twice(normalize: Any, x: Tensor, dy: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(normalize(x), x, dy, create_graph=True)
        return torch.autograd.grad((dx * dx).sum(), x)[0]

    def formula(x: Tensor) -> Tensor:
        z = torch.nn.functional.batch_norm(x, None, None, None, None, True, 0.1, layer.eps)
        return torch.nn.functional.silu(z)

    exact = array(twice(formula, x.double(), dy.double()))
    for _ in range(2):
        assert relative_error(array(twice(layer, x, dy)), exact) <= 1e-4


def test_a_batch_that_is_not_finite_moves_nothing() -> None:
    layer = bt.BatchNorm2d(8, device=DEVICE)
    for _ in range(2):
        layer(drawn((6, 8, 3, 3), 0))
    before = layer.running_mean.clone(), layer.running_var.clone()
    x = drawn((6, 8, 3, 3), 1)
    x[0, 0, 0, 0] = math.inf
    layer(x)
    assert torch.equal(layer.running_mean, before[0])
    assert torch.equal(layer.running_var, before[1])
    assert (int(layer.num_batches_tracked), int(layer.num_batches_skipped)) == (2, 1)


def test_a_parameter_that_changes_between_the_passes() -> None:
    """`weight` and `x` raise PyTorch's error; the bias is the one of the forward pass."""
    x, dy = drawn((6, 8, 3, 3), 0), drawn((6, 8, 3, 3), 1)
    layer = bt.BatchNorm2d(8, activation="silu", device=DEVICE)
    (exact, *_) = definition.backward(array(dy), array(x), None, None, None, "silu", None, layer.eps)
    for _ in range(2):
        given = x.detach().requires_grad_()
        y = layer(given)
        with torch.no_grad():
            layer.bias.add_(1.0)
        dx = torch.autograd.grad(y, given, dy)[0]
        with torch.no_grad():
            layer.bias.zero_()
        assert relative_error(array(dx), exact) <= tolerance(np.float32, 54)
    y = layer(given)
    with torch.no_grad():
        layer.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, given, dy)


def test_the_passes_that_are_kept_are_not_ever_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MOST_PASSES", 2)
    layer = bt.BatchNorm1d(4, device=DEVICE)
    for samples in (2, 3, 4, 5):
        layer(drawn((samples, 4), 0))
    assert len(gpu._forwards) == 2


def test_room_on_a_device() -> None:
    """What stands in for `torch.empty_strided` is as good, where it is used at all."""
    device = torch.device(DEVICE, torch.cuda.current_device()) if DEVICE == "cuda" else torch.device("cpu")
    made = gpu._room(device)((2, 3), (1, 2), torch.bfloat16)
    assert made.shape == (2, 3)
    assert made.stride() == (1, 2)
    assert made.dtype is torch.bfloat16
    assert made.device == device
