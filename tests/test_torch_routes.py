"""Every route over the same cases against the float64 definition; which route a call takes; and what a route costs."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import CHANNELS_LAST, CONTIGUOUS, ROUTES, Layout, batch, half_precision_tolerance, relative_error, tolerance
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm.torch as bn
from batchnorm import definition

LAYOUTS = [*CONTIGUOUS, *CHANNELS_LAST]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SOURCES = [
    bn.BatchStatistics(),
    bn.RunningStatistics(),
    bn.GhostStatistics(2),
    bn.SyncStatistics(),
    bn.Renorm(1.5, 0.5, warmup_steps=0),
]
TAKES = {
    "native": (DTYPES, SOURCES[:2] + SOURCES[3:4]),
    "numba": (DTYPES[:3], SOURCES),
    "operator": (DTYPES[:3], SOURCES[:1] + SOURCES[3:4]),
    "functorch": (DTYPES[:3], SOURCES[:1] + SOURCES[3:4]),
    "composed": (DTYPES, SOURCES),
}
"""Of each route, the types and the sources that it takes on the CPU."""

CASES = [
    pytest.param(name, dtype, source, id=f"{name}-{str(dtype)[6:]}-{type(source).__name__}")
    for name, (dtypes, sources) in TAKES.items()
    for dtype, source in itertools.product(dtypes, sources)
]
EPS, RATE = 1e-5, 0.3


def given(layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    exact = dtype if dtype in DTYPES[:2] else torch.float32
    b = batch(layout.shape, np.float64)
    tensors = {name: torch.from_numpy(getattr(b, name)) for name in ("x", "residual", "dy")}
    found = {name: layout.lay(t.to(dtype)).detach() for name, t in tensors.items()}
    vectors = ("weight", "bias", "running_mean", "running_var")
    return found | {name: torch.from_numpy(getattr(b, name)).to(exact) for name in vectors}


def run(name: str, source: Any, g: dict[str, Tensor]) -> dict[str, Tensor]:
    """`y`, its gradients and the running statistics, by one route."""
    inputs = {name: g[name].clone().requires_grad_() for name in ("x", "weight", "bias", "residual")}
    running = [g["running_mean"].clone(), g["running_var"].clone()]

    def normalize(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return bn.batch_norm(
            x, *running, weight, bias, True, RATE, EPS, activation="silu", residual=residual, statistics=source
        )

    with bn.route(name):
        if name == "functorch":
            y, pull = torch.func.vjp(normalize, *inputs.values())
            grads = pull(g["dy"])
        else:
            if name == "operator":
                torch._dynamo.reset()
                normalize = torch.compile(normalize, backend="aot_eager", fullgraph=True)
            y = normalize(*inputs.values())
            grads = torch.autograd.grad(y, list(inputs.values()), g["dy"])
    found = {"y": y.detach(), **{f"d_{name}": grad for name, grad in zip(inputs, grads, strict=True)}}
    return found | {"running_mean": running[0], "running_var": running[1]}


def exact(source: Any, g: dict[str, Tensor]) -> dict[str, Any]:
    """The same by the definition; and the slope of `y` over `x`, by which errors grow."""
    d = {name: t.double().numpy() for name, t in g.items()}
    parts, weight, bias = [slice(None)], d["weight"], d["bias"]
    whole = definition.moments(d["x"])
    running = d["running_mean"], d["running_var"]
    r, shift = np.ones_like(weight), np.zeros_like(bias)
    count = None
    if isinstance(source, bn.RunningStatistics):
        moments, count = [definition.Moments(np.inf, *running)], np.inf
    else:
        if isinstance(source, bn.GhostStatistics):
            ends = np.cumsum([0, *source.sizes(len(d["x"]))])
            parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
        moments = [definition.moments(d["x"][part]) for part in parts]
    if isinstance(source, bn.Renorm):
        old = np.sqrt(running[1] + EPS)
        r = np.clip(np.sqrt(whole.var + EPS) / old, 1 / source.r_max, source.r_max)
        shift = np.clip((whole.mean - running[0]) / old, -source.d_max, source.d_max)
    affine = r * weight, shift * weight + bias
    ys, dxs, d_weight, d_bias, d_residuals, slopes = [], [], 0.0, 0.0, [], []
    for part, m in zip(parts, moments, strict=True):
        x, dy, residual = d["x"][part], d["dy"][part], d["residual"][part]
        rstd = definition.reciprocal_std(m.var, EPS)
        args = x, m.mean, rstd, *affine, residual, "silu"
        ys.append(definition.normalize(*args))
        sum_dz, sum_dz_xhat = definition.grad_sums(dy, *args)
        dx, d_residual = definition.grad_input(
            dy, x, m.mean, rstd, sum_dz, sum_dz_xhat, count or m.count, *affine, residual, "silu"
        )
        dxs.append(dx)
        d_residuals.append(d_residual)
        slopes.append(rstd * affine[0])
        d_weight, d_bias = d_weight + r * sum_dz_xhat + shift * sum_dz, d_bias + sum_dz
    moved = running if count else definition.update_running(*running, whole, RATE)
    return {
        "y": np.concatenate(ys), "d_x": np.concatenate(dxs), "d_weight": d_weight, "d_bias": d_bias,
        "d_residual": np.concatenate(d_residuals), "running_mean": moved[0], "running_var": moved[1],
        "slope": np.stack(slopes),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "source"), CASES)
def test_every_route_equals_the_definition(name: str, dtype: torch.dtype, source: Any) -> None:
    for layout in LAYOUTS:
        g = given(layout, dtype)
        got, want = run(name, source, g), exact(source, g)
        small = dtype in (torch.float16, torch.bfloat16)
        terms = g["x"].numel() // g["x"].shape[1]
        gain = max(1.0, float(np.max(want.pop("slope"))))
        for key, value in got.items():
            found, wanted = value.detach().double().numpy(), want[key]
            assert value.dtype is (dtype if key in ("y", "d_x", "d_residual") else g["weight"].dtype), key
            if small and key in ("y", "d_x", "d_residual"):
                # PyTorch's operation rounds before the residual is added, after that, and after the activation.
                roundings = 4 if name == "native" else 1
                limit = roundings * half_precision_tolerance(torch.finfo(dtype).eps, wanted)
                assert np.all(np.abs(found - wanted) <= limit + roundings * gain * torch.finfo(dtype).eps), key
            else:
                eps = torch.finfo(dtype).eps if small and name == "native" else 0.0
                limit = gain * (tolerance(np.float64 if dtype is torch.float64 else np.float32, terms) + 4 * eps)
                assert relative_error(found, wanted) < limit, (layout, key)


# --- Which route ------------------------------------------------------------------------------------------------------


def taken(layer: nn.Module, x: Tensor) -> str:
    return bn.explain(layer, x).rows[0].route


def observed(layer: nn.Module, x: Tensor) -> str:
    """The same, in the mode of autograd that is set; `explain` has no graph."""
    from batchnorm.torch import layers

    seen: list[str] = []
    layers.observers.append(lambda _, route: seen.append(route))
    try:
        layer(x)
    finally:
        layers.observers.pop()
    return seen[0]


@pytest.fixture
def whole_table() -> Iterator[None]:
    with bn.route():
        yield


def test_a_route_is_kept_to_and_left_again() -> None:
    x = torch.randn(4, 3)
    with (
        pytest.raises(RuntimeError, match=r"route\('triton'\) cannot compute.*float32 of shape \(4, 3\) on cpu"),
        bn.route("triton"),
    ):
        bn.batch_norm(x, training=True)
    with bn.route("composed"):
        with bn.route("native"):
            assert taken(bn.BatchNorm1d(3), x) == "native"
        assert taken(bn.BatchNorm1d(3), x) == "composed"


@pytest.mark.parametrize("names", [("fast",), ("native", "fast")])
def test_a_route_that_does_not_exist_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="a route must be one of triton, native, numba"), bn.route(*names):
        pass


def test_half_precision_without_kernels_is_computed_though_it_is_not_finite() -> None:
    x = torch.randn(8, 3, 4).half()
    x[0, 1] = torch.inf
    running = torch.zeros(3), torch.ones(3)
    with bn.route("native", "numba"):  # the kernels cannot take over
        y = bn.batch_norm(x, *running, training=True)
    assert y[:, 0].isfinite().all()
    assert y[:, 1].isnan().any()
    assert torch.equal(torch.stack(running), torch.tensor([[0.0], [1.0]]).expand(2, 3))


@pytest.mark.usefixtures("whole_table")
def test_the_table_chooses_by_size_type_and_layout() -> None:
    from batchnorm.torch import routes

    layer = bn.BatchNorm2d(4)
    side = routes.SMALL // 16
    assert taken(layer, torch.randn(4, 4, 1, side - 1)) == "native"
    assert taken(layer, torch.randn(4, 4, 1, side)) == "numba"
    last = torch.randn(4, 4, 8, side - 1).contiguous(memory_format=torch.channels_last)
    assert taken(layer, last) == "native"
    last = torch.randn(4, 4, 8, side).contiguous(memory_format=torch.channels_last)
    assert taken(layer, last) == "numba"
    assert taken(bn.BatchNorm1d(4), torch.randn(2 * routes.SMALL - 1, 4)) == "native"
    assert taken(bn.BatchNorm1d(4), torch.randn(2 * routes.SMALL, 4)) == "numba"
    layer.eval()
    limit = routes.SMALL_EVALUATION // 16
    for has_graph in True, False:
        with torch.set_grad_enabled(has_graph):
            assert [observed(layer, torch.randn(4, 4, 1, side)) for side in (limit - 1, limit)] == ["native", "numba"]
    assert taken(layer.train(), torch.randn(4, 4, 2, 2, dtype=torch.bfloat16)) == "numba"
    assert taken(layer.half(), torch.randn(4, 4, 2, 2, dtype=torch.float16)) == "composed"
    assert taken(bn.BatchNorm2d(4, device="meta"), torch.empty(4, 4, 2, 2, device="meta")) == "native"
    ghost = bn.BatchNorm2d(4, device="meta", statistics=bn.GhostStatistics(2))
    assert taken(ghost, torch.empty(4, 4, 2, 2, device="meta")) == "composed"


# --- What a layer costs where there are no kernels of ours ------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts operations, and the elements of the largest tensor that comes out of each."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self.sizes.append(max((t.numel() for t in tensors), default=0))
        return result


def cost(model: nn.Module, x: Tensor) -> tuple[list[int], list[int], int, Tensor]:
    """Operations forward and backward, bytes kept for the backward pass, and `y`."""
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept[id(t)] = t
        return t

    with Operations() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    dy = torch.empty_like(y)
    with Operations() as backward:
        torch.autograd.grad(y, [x, *model.parameters()], dy)
    return forward.sizes, backward.sizes, sum(t.numel() * t.element_size() for t in kept.values()), y


CHANNELS = 8


@pytest.mark.usefixtures("whole_table")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_device_without_kernels_pays_what_it_pays_pytorch(
    training: bool, dtype: torch.dtype, memory_format: torch.memory_format, autocast: bool
) -> None:
    x = torch.empty(16, CHANNELS, 6, 6, device="meta", dtype=dtype).to(memory_format=memory_format).requires_grad_()
    theirs = nn.Sequential(nn.BatchNorm2d(CHANNELS, device="meta"), nn.ReLU()).train(training)
    ours = bn.BatchNorm2d(CHANNELS, device="meta", activation="relu").train(training)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        forward, backward, kept, y = cost(ours, x)
        their_forward, their_backward, their_kept, their_y = cost(theirs, x)
    assert len(forward) <= len(their_forward) + 8
    assert len(backward) <= len(their_backward)
    assert kept <= their_kept
    for mine, others in ((forward, their_forward), (backward, their_backward)):
        assert sum(size > 2 * CHANNELS for size in mine) <= sum(size > 2 * CHANNELS for size in others)
    assert (y.shape, y.dtype, y.stride()) == (their_y.shape, their_y.dtype, their_y.stride())


# --- The running update ----------------------------------------------------------------------------------------------


def batches_of_a_small_variance(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(64, 3, generator=generator) * 0.01 + k / 100).to(dtype) for k in range(3)]


@pytest.mark.parametrize("momentum", [None, 1.0, 0.9, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["native", "numba", "operator", "functorch", "composed"])
def test_the_running_statistics_are_those_of_the_definition(
    name: str, dtype: torch.dtype, momentum: float | None
) -> None:
    """Even where the variance is tiny beside the 1 that the running one starts from, and in half precision."""
    layer = bn.BatchNorm1d(3, momentum=momentum, dtype=dtype)
    mean, var = np.zeros(3), np.ones(3)
    torch._dynamo.reset()
    model = torch.compile(layer, backend="aot_eager") if name == "operator" else layer
    for k, x in enumerate(batches_of_a_small_variance(dtype)):
        with bn.route(name, "composed"):
            if name == "functorch":
                torch.func.vjp(lambda x: layer(x), x)
            else:
                model(x)
        moments = definition.moments(x.double().numpy())
        mean, var = definition.update_running(mean, var, moments, 1 / (k + 1) if momentum is None else momentum)
        # What the buffers hold is rounded at each step; the old value of 1 is lost at most as its rounding. A mean is
        # the sum of values that cancel: its error is in proportion to them.
        eps = torch.finfo(dtype).eps
        size = np.sqrt(moments.mean**2 + moments.var)
        for got, want, terms in ((layer.running_mean, mean, size), (layer.running_var, var, 25 * var)):
            error = np.abs(got.double().numpy() - want)
            assert np.all(error <= (k + 1) * eps * np.abs(want) + 4 * 2.0**-24 * (terms + np.abs(want))), (k, got, want)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["native", "numba", "operator", "functorch", "composed"])
def test_a_batch_that_is_not_finite_moves_nothing(name: str, bad: float) -> None:
    layer = bn.BatchNorm1d(3)
    torch._dynamo.reset()
    model = torch.compile(layer, backend="aot_eager") if name == "operator" else layer
    x = torch.ones(4, 3)
    x[1, 1] = bad
    with bn.route(name):
        if name == "functorch":
            torch.func.vjp(lambda x: layer(x), x)
        else:
            model(x)
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.ones(3))
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (0, 1)


def test_all_routes_are_in_the_tests() -> None:
    from batchnorm.torch import routes

    assert tuple(route.name for route in routes.ROUTES) == ROUTES
    assert {*TAKES, "triton"} == set(ROUTES)


# --- What users do to layers and calls --------------------------------------------------------------------------------


@pytest.mark.usefixtures("whole_table")
@pytest.mark.parametrize("momentum", [1, 0, torch.tensor(0.25)])
def test_a_momentum_may_be_any_number(momentum: Any) -> None:
    x = torch.randn(16, 3)
    layer, other = bn.BatchNorm1d(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    layer(x)
    other(x)
    torch.testing.assert_close(layer.running_var, other.running_var)


@pytest.mark.usefixtures("whole_table")
def test_subclasses_of_tensors_are_not_looked_into() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer, x = bn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    for training in (True, False):  # outside of the mode, the tensors still have no values
        assert layer.train(training)(x).shape == x.shape


def test_a_bias_made_in_inference_mode_can_be_used() -> None:
    with torch.inference_mode():
        weight, bias = torch.ones(3), torch.zeros(3)
    x = torch.randn(8, 3)
    with bn.route("numba"):
        y = bn.batch_norm(x, None, None, weight, bias, training=True)
    assert relative_error(y.numpy(), definition.forward(x.numpy())[0]) < tolerance(np.float32, 8)


@pytest.mark.parametrize("statistics", [bn.GhostStatistics, "ghost"])
def test_statistics_that_are_none_are_named(statistics: Any) -> None:
    layer = bn.BatchNorm1d(3)
    layer.statistics = statistics
    with pytest.raises(TypeError, match="statistics must be BatchStatistics"):
        layer(torch.randn(4, 3))


def test_a_frozen_layer_does_not_look_at_masks() -> None:
    layer = bn.BatchNorm1d(3, statistics=bn.RunningStatistics())
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x, mask=torch.tensor([-1.0])), layer(x))


def test_explain_does_not_make_lazy_layers() -> None:
    model = nn.Sequential(bn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="0 does not know its size yet: call the model on one batch first"):
        bn.explain(model, torch.randn(4, 3))
    assert isinstance(model[0], bn.LazyBatchNorm1d)
