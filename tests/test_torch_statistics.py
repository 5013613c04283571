"""Statistics that are not just the batch's: groups, renormalization, frozen layers; against the definition."""

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import CHANNELS_LAST, CONTIGUOUS, Layout, batch, relative_error, tolerance
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import batchnorm.torch as bn
from batchnorm import definition
from batchnorm.torch import (
    BatchNorm1d,
    BatchNorm2d,
    BatchStatistics,
    GhostStatistics,
    Renorm,
    RunningStatistics,
    SyncStatistics,
    batch_norm,
    route,
)
from batchnorm.torch.call import Call, Plan
from batchnorm.torch.running import Running

LAYOUTS = [*CONTIGUOUS, *CHANNELS_LAST]
CLIPPED = Renorm(1.0001, 0.0001, 0)  # its r and d are at their limits, and so constant
VARIANTS = [GhostStatistics(2), CLIPPED, Renorm(statistics=SyncStatistics(), warmup_steps=0), SyncStatistics()]


@pytest.fixture(params=["numba", "composed"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with route(request.param, "composed"):  # which takes what is empty
        yield request.param


def tensors(layout: Layout, *, mask: bool = False, dtype: Any = np.float64) -> dict[str, Any]:
    """What `batch_norm` takes, that may need a gradient."""
    b = batch(layout.shape, dtype)
    found: dict[str, Any] = {name: torch.from_numpy(getattr(b, name)) for name in ("x", "weight", "bias", "residual")}
    found |= {name: layout.lay(found[name]).detach() for name in ("x", "residual")}
    found = {name: t.requires_grad_() for name, t in found.items()}
    return found | {"mask": torch.from_numpy(b.mask) if mask else None}


def running(layout: Layout, dtype: Any = np.float64) -> tuple[Tensor, Tensor]:
    b = batch(layout.shape, dtype)
    return torch.from_numpy(b.running_mean.copy()), torch.from_numpy(b.running_var.copy())


def numpy(t: Tensor | None) -> Any:
    return None if t is None else t.detach().numpy()


def assert_close(got: Any, want: Any, terms: int = 200) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert relative_error(np.asarray(numpy(a) if isinstance(a, Tensor) else a), np.asarray(b)) < 16 * tolerance(
            np.float64, terms
        )


def outcome(given: dict[str, Any], statistics: Any, layout: Layout, **options: Any) -> tuple[list[Tensor], Any]:
    """Output and gradients of x, weight, bias and residual; and the running statistics."""
    moved = running(layout)
    y = batch_norm(
        **given, running_mean=moved[0], running_var=moved[1], training=True, statistics=statistics, **options
    )
    dy = torch.from_numpy(batch(layout.shape, np.float64).dy)
    inputs = [given[name] for name in ("x", "weight", "bias", "residual")]
    return [y, *torch.autograd.grad(y, inputs, dy)], moved


# --- Groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "size", "sizes"),
    [(8, 4, [4, 4]), (8, 3, [4, 4]), (7, 3, [4, 3]), (3, 4, [3]), (5, 2, [3, 2]), (4, 1, [1] * 4), (1, 3, [1])],
)
def test_no_group_is_smaller_than_wanted(samples: int, size: int, sizes: list[int]) -> None:
    assert GhostStatistics(size).sizes(samples) == sizes


@for_all(samples=st.integers(1, 300), size=st.integers(1, 40))
def test_groups_share_the_samples_evenly(samples: int, size: int) -> None:
    sizes = GhostStatistics(size).sizes(samples)
    assert sum(sizes) == samples
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(size, samples)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_group_is_a_batch_of_its_own(layout: Layout, mask: bool, path: str) -> None:
    given = tensors(layout, mask=mask)
    if layout.shape[0] == 3:
        sizes, size = [3], 3
    else:
        sizes, size = [layout.shape[0] // 2] * 2, layout.shape[0] // 2
    found, moved = outcome(given, GhostStatistics(size), layout, activation="silu")
    x, weight, bias, residual, weights = (numpy(given[n]) for n in ("x", "weight", "bias", "residual", "mask"))
    dy = batch(layout.shape, np.float64).dy
    want: list[Any] = []
    for part in np.split(np.arange(len(x)), np.cumsum(sizes)[:-1]):
        of = {"mask": None if weights is None else weights[part], "activation": "silu"}
        y, _ = definition.forward(x[part], weight, bias, residual[part], **of)
        want.append([y, *definition.backward(dy[part], x[part], weight, bias, residual[part], **of)])
    y, dx, d_weight, d_bias, d_residual = zip(*want, strict=True)
    assert_close(found, [np.concatenate(y), np.concatenate(dx), sum(d_weight), sum(d_bias), np.concatenate(d_residual)])
    whole = definition.moments(x, weights)
    assert_close(moved, definition.update_running(*map(numpy, running(layout)), whole, 0.1)[:2])
    like_x = torch.empty_like(given["x"]).stride()
    assert found[0].stride() == like_x
    assert path == "composed" or found[1].stride() == like_x


def test_groups_are_for_training_only() -> None:
    layer = BatchNorm1d(3, statistics=GhostStatistics(2)).double().eval()
    x = torch.randn(6, 3, dtype=torch.float64)
    assert torch.equal(layer(x), BatchNorm1d(3).double().eval()(x))


def test_running_statistics_are_updated_once_with_those_of_the_batch() -> None:
    ghost, plain = BatchNorm2d(3, statistics=GhostStatistics(2)).double(), BatchNorm2d(3).double()
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    for layer in (ghost, plain):
        layer(x)
    assert_close(ghost.buffers(), map(numpy, plain.buffers()))
    assert ghost.num_batches_tracked == 1


def test_a_group_of_one_value_says_what_to_do() -> None:
    layer = BatchNorm1d(3, statistics=GhostStatistics(1))
    with pytest.raises(ValueError, match=r"BatchNorm1d\(3\): Expected more than 1 value per channel.*batch_size=2"):
        layer(torch.randn(4, 3))
    mask = torch.tensor([True, True, True, False])
    with pytest.raises(ValueError, match="samples 2 to 3"):
        BatchNorm1d(3, statistics=GhostStatistics(2))(torch.randn(4, 3), mask=mask)
    assert layer.num_batches_tracked == 0
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match="batch_size"):
            GhostStatistics(wrong)  # type: ignore[arg-type]


# --- Renormalization -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("limits", [(1.1, 0.1), (3.0, 5.0), (1.0, 0.0), (1e9, 1e9)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_renormalized_by_the_definition(layout: Layout, limits: tuple[float, float], mask: bool, path: str) -> None:
    given = tensors(layout, mask=mask)
    found, moved = outcome(given, Renorm(*limits, warmup_steps=0), layout, activation="silu")
    x, weight, bias, residual, weights = (numpy(given[n]) for n in ("x", "weight", "bias", "residual", "mask"))
    old_mean, old_var = map(numpy, running(layout))
    whole = definition.moments(x, weights)
    rstd = definition.reciprocal_std(old_var)
    r_max, d_max = limits
    r = np.clip(rstd / definition.reciprocal_std(whole.var), 1 / r_max, r_max)
    d = np.clip((whole.mean - old_mean) * rstd, -d_max, d_max)
    how = {"mask": weights, "activation": "silu"}
    y, _ = definition.forward(x, weight * r, bias + weight * d, residual, **how)
    dx, d_weight, d_bias, d_residual = definition.backward(
        batch(layout.shape, np.float64).dy, x, weight * r, bias + weight * d, residual, **how
    )
    assert_close(found, [y, dx, r * d_weight + d * d_bias, d_bias, d_residual])
    assert_close(moved, definition.update_running(old_mean, old_var, whole, 0.1)[:2])
    if limits == (1e9, 1e9):
        evaluated = definition.normalize(x, old_mean, rstd, weight, bias, residual, "silu")
        assert_close(found[:1], [evaluated])


def test_the_limits_grow_as_in_the_paper() -> None:
    renorm = Renorm()
    for steps, limits in {
        0: (1, 0), 5000: (1, 0), 15000: (1 + 2 * 2 / 7, 2.5), 25000: (1 + 2 * 4 / 7, 5), 40000: (3, 5), 10**6: (3, 5)
    }.items():  # fmt: skip
        assert renorm.limits_after(steps) == pytest.approx(limits)
        assert [float(v) for v in renorm.limits_after(torch.tensor(steps))] == pytest.approx(limits)
    assert renorm.limits_after(None) == (3, 5)
    without = Renorm(np.inf, np.inf)
    assert without.limits_after(7) == (1, 0)
    assert without.limits_after(5001) == (np.inf, np.inf)
    assert [float(v) for v in without.limits_after(torch.tensor(7))] == [1, 0]
    assert Renorm(2.0, 1.0, 0).limits_after(0) == (2, 1)


def test_a_saved_layer_goes_on_where_it_was() -> None:
    renorm = Renorm(2.0, 1.0, warmup_steps=2)
    layer, x = BatchNorm1d(3, statistics=renorm).double(), torch.randn(8, 3, dtype=torch.float64) * 3 + 1
    for _ in range(7):
        layer(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = BatchNorm1d(3, statistics=renorm).double()
    first = other(x)
    other.load_state_dict(torch.load(file))
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(first, other(x))
    assert torch.equal(first, BatchNorm1d(3).double()(x)), "in the beginning there is no correction"


def test_renormalization_needs_running_statistics() -> None:
    with pytest.raises(RuntimeError, match=r"Renorm\(\) corrects towards the running statistics"):
        BatchNorm1d(3, track_running_stats=False, statistics=Renorm())(torch.randn(4, 3))
    for wrong in ({"r_max": 0.5}, {"d_max": -1}, {"warmup_steps": -1}):
        with pytest.raises(ValueError, match="r_max must be at least 1"):
            Renorm(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="BatchStatistics"):
        Renorm(statistics=GhostStatistics(2))  # type: ignore[arg-type]


# --- All of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("statistics", [GhostStatistics(3), CLIPPED, SyncStatistics()], ids=repr)
@pytest.mark.parametrize("layout", [CONTIGUOUS[0], CHANNELS_LAST[0]], ids=str)
def test_derivatives(layout: Layout, statistics: Any, mask: bool, path: str) -> None:
    given = tensors(layout, mask=mask)
    names = ["x", "weight", "bias", "residual"]

    def function(*values: Tensor) -> Tensor:
        mean, var = running(layout)
        now = given | dict(zip(names, values, strict=True))
        return batch_norm(
            **now, running_mean=mean, running_var=var, training=True, statistics=statistics, activation="silu"
        )

    inputs = [given[name] for name in names]
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("statistics", VARIANTS, ids=repr)
def test_other_types(statistics: Any, dtype: torch.dtype) -> None:
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    layers = [BatchNorm1d(3, statistics=statistics).double(), BatchNorm1d(3, statistics=statistics)]
    exact, y = layers[0](x), layers[1](x.to(dtype))
    assert y.dtype is dtype
    assert (y.double() - exact).abs().max() < 16 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("statistics", [*VARIANTS, BatchStatistics()], ids=repr)
def test_nothing_changes_where_nothing_can_be_learned(statistics: Any, path: str) -> None:
    layer = BatchNorm1d(3, statistics=statistics).double()
    before = copy.deepcopy(layer.state_dict())
    assert layer(torch.empty(0, 3, dtype=torch.float64)).shape == (0, 3)
    layer(torch.full((4, 3), torch.inf, dtype=torch.float64))
    assert layer.num_batches_skipped == 2
    with pytest.raises(ValueError, match="mask leaves no position"):
        layer(torch.randn(4, 3, dtype=torch.float64), mask=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="weights that are finite and not negative"):
        layer(torch.randn(4, 3, dtype=torch.float64), mask=-torch.ones(4))
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(torch.randn(1, 3, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("statistics", [GhostStatistics(2), Renorm(warmup_steps=1)], ids=repr)
def test_compiled(statistics: Any) -> None:
    torch._dynamo.reset()
    layers = [BatchNorm1d(3, statistics=statistics, activation="silu").double() for _ in range(2)]
    compiled = torch.compile(layers[1], backend="aot_eager", fullgraph=True)
    for seed in range(4):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = []
        for call in (layers[0], compiled):
            given = x.clone().requires_grad_()
            y = call(given)
            (y * x).sum().backward()
            found.append([y, given.grad])
        assert_close(found[1], map(numpy, found[0]))
    assert_close(layers[1].buffers(), map(numpy, layers[0].buffers()))
    torch._dynamo.reset()


def test_a_checkpoint_counts_once() -> None:
    for statistics in (GhostStatistics(2), SyncStatistics()):
        layers = [BatchNorm1d(3, statistics=statistics).double() for _ in range(2)]
        x = torch.randn(6, 3, dtype=torch.float64)
        layers[0](x.clone().requires_grad_()).sin().sum().backward()
        given = x.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(layers[1], given, use_reentrant=False).sin().sum().backward()
        assert_close(layers[1].buffers(), map(numpy, layers[0].buffers()))


def test_a_checkpoint_around_renormalization_is_an_error() -> None:
    x = torch.randn(6, 3, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(BatchNorm1d(3, statistics=Renorm()), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="cannot be inside an activation checkpoint"):
        y.sum().backward()


def test_groups_with_masks_inside_vmap() -> None:
    x, masks = torch.randn(6, 3, dtype=torch.float64), torch.rand(4, 6).double() + 0.1

    def call(mask: Tensor) -> Tensor:
        return batch_norm(x, training=True, mask=mask, statistics=GhostStatistics(2))

    assert_close(torch.func.vmap(call)(masks), [numpy(call(mask)) for mask in masks])


def test_groups_compiled_for_any_size_of_batch() -> None:
    torch._dynamo.reset()
    layer = BatchNorm1d(3, statistics=GhostStatistics(2)).double()
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for samples in (4, 7, 6):
        x = torch.randn(samples, 3, dtype=torch.float64)
        assert_close([compiled(x)], [numpy(other(x))])
    torch._dynamo.reset()


def test_a_compiled_mask_that_leaves_nothing_changes_nothing() -> None:
    torch._dynamo.reset()
    layer = BatchNorm1d(3)
    before = copy.deepcopy(layer.state_dict())
    torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(4, 3), mask=torch.zeros(4))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    torch._dynamo.reset()


@pytest.mark.parametrize("statistics", [GhostStatistics(2), SyncStatistics()], ids=repr)
def test_evaluation_without_running_statistics_is_of_the_batch(statistics: Any) -> None:
    layer = BatchNorm1d(3, track_running_stats=False, statistics=statistics).eval()
    x = torch.randn(6, 3)
    assert torch.equal(layer(x), BatchNorm1d(3, track_running_stats=False).eval()(x))


@pytest.mark.parametrize("statistics", [*VARIANTS, RunningStatistics()], ids=repr)
def test_copies_and_pickles(statistics: Any) -> None:
    layer = BatchNorm1d(3, statistics=statistics)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.statistics == statistics
    assert f"statistics={statistics!r}" in repr(layer)


@pytest.mark.parametrize("wrong", ["batch", GhostStatistics, 3])
def test_what_are_no_statistics(wrong: Any) -> None:
    for call in (
        lambda: BatchNorm1d(3, statistics=wrong),
        lambda: bn.convert(nn.BatchNorm1d(3), statistics=wrong),
        lambda: batch_norm(torch.randn(4, 3), training=True, statistics=wrong),
    ):
        with pytest.raises(TypeError, match="statistics must be"):
            call()


# --- A source that a user defines -------------------------------------------------------------------------------------


class FirstHalf(bn.Statistics):
    """The statistics of the first half of the samples, as constants."""

    def plan(self, call: Call, running: Running) -> Plan:
        half = call.part(slice(0, len(call.x) // 2)).x.detach()
        axes = (0, *range(2, half.dim()))
        return Plan(torch.inf, (half.mean(axes), half.var(axes, correction=0)))


class WithoutCheck(bn.Statistics):
    """The statistics of the batch, whatever its mask leaves."""

    def plan(self, call: Call, running: Running) -> Plan:
        return Plan(call.total())


class Constants(bn.Statistics):
    """Some numbers, in the place of a batch's."""

    def __init__(self, mean: Tensor, var: Tensor, adjust: Any = None) -> None:
        self.given = Plan(torch.inf, (mean, var), adjust=adjust)

    def plan(self, call: Call, running: Running) -> Plan:
        return self.given


@pytest.mark.parametrize("shape", [(), (1,), (64,)], ids=str)
@pytest.mark.parametrize("name", ["native", "numba", "composed"])
def test_constants_of_all_channels_or_of_each(name: str, shape: tuple[int, ...]) -> None:
    x, dy = (torch.from_numpy(np.random.default_rng(seed).normal(size=(9, 64, 3, 3))) for seed in (0, 1))
    for laid in torch.contiguous_format, torch.channels_last:
        given = x.clone(memory_format=laid).requires_grad_()
        layer = bn.BatchNorm2d(64, dtype=x.dtype, statistics=Constants(*(torch.full(shape, v).to(x) for v in (0.5, 2))))
        with bn.route(name):
            y = layer(given)
        (dx,) = torch.autograd.grad(y, given, dy)
        rstd = definition.reciprocal_std(2.0, layer.eps)
        bound = tolerance(np.float64, 1)
        assert relative_error(y.detach().numpy(), (x.numpy() - 0.5) * rstd) < bound
        assert relative_error(dx.numpy(), dy.numpy() * rstd) < bound


def test_constants_of_some_channels() -> None:
    layer = bn.BatchNorm1d(3, statistics=Constants(torch.zeros(2), torch.ones(3)))
    with pytest.raises(
        ValueError, match=r"shapes \(2,\) and \(3,\) for x with 3 channels: each must be of shape \(3,\)"
    ):
        layer(torch.randn(4, 3))


@pytest.mark.parametrize("name", ["numba", "composed"])
def test_constants_are_adjusted(name: str) -> None:
    source = Constants(torch.tensor(0.5), torch.tensor(2.0), lambda mean, var: (2 + 0 * mean, 1 + 0 * var))
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with bn.route(name):
        y = bn.BatchNorm1d(3, statistics=source)(x)
    want = (x.double().numpy() - 0.5) * definition.reciprocal_std(2.0) * 2 + 1
    assert relative_error(y.detach().numpy(), want) < tolerance(np.float32, 1)


@pytest.mark.parametrize("samples", [4, 1 << 12])
def test_gradients_of_constants(samples: int) -> None:
    """By the formula: no kernel computes them."""
    mean, var = (torch.full((128,), value, dtype=torch.float64, requires_grad=True) for value in (0.5, 2.0))
    layer = bn.BatchNorm1d(128, dtype=torch.float64, statistics=Constants(mean, var))
    x = torch.randn(samples, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with bn.route():
        found = torch.autograd.grad(layer(x).sum(), (mean, var))
    rstd = definition.reciprocal_std(2.0, layer.eps)
    exact = -samples * rstd * np.ones(128), -0.5 * rstd**3 * (x.numpy() - 0.5).sum(0)
    for value, want in zip(found, exact, strict=True):
        assert relative_error(value.numpy(), want) < tolerance(np.float64, samples)


@pytest.mark.parametrize("samples", [4, 1 << 13])
@pytest.mark.parametrize("training", [True, False])
def test_eps_as_a_tensor(samples: int, training: bool) -> None:
    x = torch.randn(samples, 128, generator=torch.Generator().manual_seed(0))
    found = []
    for eps in 0.25, torch.tensor(0.25):
        with bn.route():
            found.append(bn.batch_norm(x, torch.zeros(128), torch.ones(128), training=training, eps=eps))  # type: ignore[arg-type]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["numba", "composed"])
def test_a_batch_of_which_nothing_counts_moves_nothing(name: str) -> None:
    layer = bn.BatchNorm1d(3, statistics=WithoutCheck())
    with bn.route(name):
        layer(torch.randn(4, 3), mask=torch.zeros(4, dtype=torch.bool))
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.ones(3))
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (0, 1)


@pytest.mark.parametrize("name", ["native", "numba", "composed"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_source_of_a_user_works_through_the_function_and_a_layer(layout: Layout, name: str) -> None:
    t = tensors(layout)
    mean, var = running(layout)
    before = mean.clone(), var.clone()
    x, weight, bias = (t[name].detach().numpy() for name in ("x", "weight", "bias"))
    moments = definition.moments(x[: len(x) // 2])
    given = (
        x,
        moments.mean,
        definition.reciprocal_std(moments.var),
        weight,
        bias,
        t["residual"].detach().numpy(),
        "silu",
    )
    expected = definition.normalize(*given)
    dy = np.random.default_rng(1).normal(size=x.shape)
    sums = definition.grad_sums(dy, *given)
    dx, d_residual = definition.grad_input(dy, *given[:3], *sums, np.inf, *given[3:])
    layer = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}[x.ndim](
        x.shape[1], dtype=torch.float64, activation="silu", statistics=FirstHalf()
    )
    layer.load_state_dict({"weight": t["weight"], "bias": t["bias"]}, strict=False)
    inputs = [t[name] for name in ("x", "weight", "bias", "residual")]
    with route(name):
        y = batch_norm(
            t["x"], mean, var, t["weight"], t["bias"], True, activation="silu", residual=t["residual"],
            statistics=FirstHalf(),
        )  # fmt: skip
        of_layer = layer(t["x"], residual=t["residual"])
        grads = torch.autograd.grad(y, inputs, torch.from_numpy(dy))
    gain = max(1.0, float(np.max(given[2] * weight)))
    terms = x.size // x.shape[1]
    for found, exact in zip((y, of_layer, *grads), (expected, expected, dx, *sums[::-1], d_residual), strict=True):
        assert relative_error(numpy(found), exact) < gain * tolerance(np.float64, terms)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


def test_a_source_without_a_plan_says_what_it_needs() -> None:
    with pytest.raises(TypeError, match="Statistics is not a source of statistics: it needs a method `plan`"):
        batch_norm(torch.randn(4, 3), training=True, statistics=bn.Statistics())


# --- Freezing --------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(),
        BatchNorm2d(4, activation="relu", statistics=GhostStatistics(2)),
        nn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4, affine=False),
    )  # fmt: skip
    model[1].bias.requires_grad_(False)
    model(torch.randn(4, 3, 2, 2))
    return model


@pytest.mark.parametrize("affine", [True, False])
def test_nothing_undoes_a_freeze_but_unfreeze(affine: bool) -> None:
    model = network()
    before = copy.deepcopy(model)
    state = copy.deepcopy(model.state_dict())
    assert bn.freeze(model, affine=affine) is model
    model.train()
    model.apply(lambda module: module.train())
    x = torch.randn(4, 3, 2, 2)
    y = model(x)
    y.sum().backward()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(y, before.eval()(x))
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {"0.weight", "0.bias"} | (
        {"1.weight", "3.weight", "3.bias", "4.weight", "4.bias"} if not affine else set()
    )
    bn.freeze(model)  # again
    bn.unfreeze(model)
    before.train()
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert model[3].statistics == GhostStatistics(2)
    assert torch.equal(model(x), before(x))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before.buffers(), strict=True))


def test_a_frozen_model_is_copied_and_saved_and_unfrozen() -> None:
    for other in (copy.deepcopy(bn.freeze(network())), pickle.loads(pickle.dumps(bn.freeze(network())))):
        bn.unfreeze(other)
        assert [type(m) for m in other] == [type(m) for m in network()]


def test_what_cannot_be_frozen_leaves_all_as_it_is() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return input

    for last, error, words in (
        (nn.BatchNorm2d(4, track_running_stats=False), ValueError, r"1 \(BatchNorm2d\) keeps no running"),
        (nn.LazyBatchNorm2d(), RuntimeError, "does not know its size"),
        (Own(4), ValueError, r"1 \(Own\) has a forward of its own"),
    ):
        model = nn.Sequential(nn.BatchNorm2d(4), last)
        with pytest.raises(error, match=words):
            bn.freeze(model)
        assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="no batch normalization"):
        bn.freeze(nn.Linear(2, 2))


def test_other_tools_do_not_thaw() -> None:
    model = bn.freeze(
        nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), BatchNorm1d(3, activation="relu")), affine=True
    )
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(5, 3)
    for tool, statistics, kinds in (
        (lambda m: bn.convert(m), None, [BatchNorm1d] * 3),
        (lambda m: bn.convert(m, statistics=GhostStatistics(2)), GhostStatistics(2), [BatchNorm1d] * 3),
        (bn.SyncBatchNorm.convert_sync_batchnorm, SyncStatistics(), [BatchNorm1d] * 3),
        (bn.revert, None, [nn.BatchNorm1d, nn.BatchNorm1d, BatchNorm1d]),
    ):
        tool(model).train()(x)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        thawed = bn.unfreeze(copy.deepcopy(model))
        assert [type(layer) for layer in thawed] == kinds
        assert all(p.requires_grad for p in thawed.parameters())
        if statistics is not None:
            assert [layer.statistics for layer in thawed] == [statistics] * 3


def test_a_shared_weight_learns_again() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    bn.unfreeze(bn.freeze(model, affine=True)[1])
    assert model[1].weight.requires_grad


def test_layers_made_with_running_statistics_stay() -> None:
    layer = BatchNorm1d(3, statistics=RunningStatistics())
    assert bn.unfreeze(bn.freeze(layer)).statistics == RunningStatistics()


# --- Standardize -----------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@for_all(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), offset=st.floats(-1e6, 1e6))
def test_any_split_gives_the_same(sizes: list[int], offset: float) -> None:
    x = torch.from_numpy(batch((sum(sizes) + 2, 3, 4), np.float64).x) + offset
    whole = bn.Standardize(3, dtype=torch.float64).fit(x)
    split = bn.Standardize(3, dtype=torch.float64).fit(x.split([*sizes, 2]))
    moments = definition.moments(x.numpy())
    scale = tolerance(np.float64, x.numel()) * max(1.0, abs(offset))
    for found in (whole, split):
        assert np.abs(found.mean.numpy() - moments.mean).max() < 4 * scale
        assert np.abs(found.std.numpy() - np.sqrt(moments.var)).max() < 4 * scale
        assert found.count == moments.count


def test_there_and_back() -> None:
    x = (torch.randn(20, 3, 4, dtype=torch.float64) + 5) * torch.tensor([1e-9, 1.0, 1e9]).reshape(1, 3, 1).double()
    x[:, 1] = 7.0
    standardize = bn.Standardize(3, dtype=torch.float64).fit([(part, "label") for part in x.split(6)])
    y = standardize(x)
    assert_close([y[:, ::2].mean((0, 2))], [np.zeros(2)], 10**6)
    assert abs(float(y[:, 2].var(correction=0)) - 1) < 1e-12
    assert torch.equal(y[:, 1], torch.zeros(20, 4).double()), "a constant is centered"
    torch.testing.assert_close(standardize.inverse(y), x, rtol=1e-12, atol=0)
    other = bn.Standardize(3, dtype=torch.float64)
    other.load_state_dict(standardize.state_dict())
    assert torch.equal(other(x), y)


def test_it_is_saved_traced_and_folded_behind() -> None:
    x = torch.randn(6, 3, 5, 5)
    model = nn.Sequential(bn.Standardize(3).fit(x), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model(x)
    folded = bn.fold(model.eval(), x)
    assert list(folded.folded) == ["2"]
    torch.testing.assert_close(folded.model(x), model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model[:1])(x), model[0](x))
    assert model.to("meta")(x.to("meta")).shape == (6, 4, 3, 3)


def test_what_its_type_cannot_hold() -> None:
    data = torch.randn(20, 1, dtype=torch.float64)
    tiny = bn.Standardize(1, dtype=torch.float16).fit(data * 1e-9)
    assert tiny(data.half()).isfinite().all()
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        bn.Standardize(1, dtype=torch.float16).fit(data + 1e6)


def test_what_counts_and_what_is_meant() -> None:
    x, mask = torch.randint(0, 255, (6, 1, 4, 4), dtype=torch.uint8), torch.rand(6, 4, 4) > 0.3
    batches = [{"image": x[i], "kept": mask[i]} for i in (slice(0, 4), slice(4, 6))]
    found = bn.Standardize(1).fit(batches, select=lambda b: b["image"], mask=lambda b: b["kept"])
    kept = x[:, 0][mask].double()
    torch.testing.assert_close(found.mean.double(), kept.mean().reshape(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.std.double(), kept.std(correction=0).reshape(1), rtol=1e-6, atol=0)
    assert found(x).dtype is torch.float32


def test_wrong_data_changes_nothing() -> None:
    fitted = bn.Standardize(2).fit(torch.randn(5, 2))
    before = copy.deepcopy(fitted.state_dict())
    for data, error, words in (
        (torch.randn(5, 3), ValueError, r"\(N, 2, \*spatial\), got \(5, 3\)"),
        ([], ValueError, "nothing to fit to"),
        (
            [torch.ones(3, 2), torch.full((3, 2), torch.nan)],
            ValueError,
            r"not finite in torch.float32, in channels \[0, 1\]",
        ),
        ([{"x": 1}], TypeError, "select="),
    ):
        with pytest.raises(error, match=words):
            fitted.fit(data)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in fitted.state_dict().items())
    with pytest.raises(RuntimeError, match=r"fit\(data\)"):
        bn.Standardize(2)(torch.randn(3, 2))
    with pytest.raises(ValueError, match="num_features"):
        bn.Standardize(0)


@pytest.mark.parametrize("value", [0.1, -7.3e5, 1e-30, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 333, 1000])
def test_a_constant_is_constant_however_it_is_split(size: int, dtype: torch.dtype, value: float) -> None:
    x = torch.full((1000, 2), value, dtype=torch.float64).clamp(-6e4, 6e4).to(dtype)
    x[:, 1] = torch.linspace(0, 1, 1000)
    weights = torch.linspace(0.1, 0.7, 1000)
    for mask in (None, lambda batch: weights[: len(batch)]):
        found = bn.Standardize(2, dtype=torch.float64).fit(x.split(size), mask=mask)
        assert found.std[0] == 1
        assert found.std[1] < 0.5
        assert found(x.double())[:, 0].abs().max() <= 1e-12 * max(1, abs(value))


@pytest.mark.parametrize("relative", [1e-9, 1e-12])
def test_what_varies_a_little_is_not_constant(relative: float) -> None:
    x = 1e3 * (1 + relative * torch.randn(1000, 1, dtype=torch.float64))
    found = bn.Standardize(1, dtype=torch.float64).fit(x.split(100))
    assert found.std[0] == pytest.approx(float(x.std(correction=0)), rel=1e-2)


def test_whether_it_has_statistics_is_in_its_buffers() -> None:
    x = torch.randn(20, 3)
    fitted, empty = bn.Standardize(3).fit(x), bn.Standardize(3)
    want = fitted(x)
    assert torch.equal(torch.func.functional_call(empty, dict(fitted.named_buffers()), (x,)), want)
    with pytest.raises(RuntimeError, match="no statistics yet"):
        torch.func.functional_call(fitted, dict(empty.named_buffers()), (x,))
    for buffer, other in zip(empty.buffers(), fitted.buffers(), strict=True):
        buffer.copy_(other)
    assert torch.equal(empty(x), want)
    for module in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        assert torch.equal(module(x), want)
    fitted.load_state_dict(bn.Standardize(3).state_dict())
    with pytest.raises(RuntimeError, match="no statistics yet"):
        fitted(x)


def test_without_statistics_graphs_give_nan() -> None:
    torch._dynamo.reset()
    x = torch.randn(20, 3)
    for module, is_fitted in ((bn.Standardize(3), False), (bn.Standardize(3).fit(x), True)):
        for y in (
            torch.compile(module, backend="eager", fullgraph=True)(x),
            torch.func.vmap(module, 2, 2)(x[:, :, None])[..., 0],
            torch.export.export(module, (x,)).module()(x),
        ):
            assert y.isnan().all() if not is_fitted else torch.equal(y, module(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_a_default_device_does_not_matter_to_the_fit(default: str) -> None:
    x = torch.randn(20, 3)
    module = bn.Standardize(3)
    with torch.device(default):
        module.fit([x, (x > 0).int()])
        assert module(x).isfinite().all()


@pytest.mark.parametrize("path", ["numba", "native"])
@pytest.mark.parametrize(
    "statistics",
    [BatchStatistics(False), GhostStatistics(4, False), SyncStatistics(unbiased=False)],
    ids=["batch", "ghost", "sync"],
)
def test_the_running_variance_can_be_the_biased_one(statistics: Any, path: str) -> None:
    with route(path, "numba"):
        check_the_biased_running_variance(statistics)


def check_the_biased_running_variance(statistics: Any) -> None:
    layer = BatchNorm2d(5, momentum=0.3, statistics=statistics)
    x = torch.randn(8, 5, 3, 3) * 2 + 1
    mean, var = layer.running_mean.numpy().copy(), layer.running_var.numpy().copy()
    layer(x)
    want = definition.update_running(mean, var, definition.moments(x.numpy()), 0.3, unbiased=False)
    np.testing.assert_allclose(layer.running_mean, want[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.running_var, want[1], rtol=1e-5)
    layer(torch.full_like(x, torch.inf))
    np.testing.assert_allclose(layer.running_var, want[1], rtol=1e-5)
    assert layer.num_batches_skipped == 1
