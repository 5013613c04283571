"""The plain call of a layer: it computes what the general way does, and leaves to that whatever is not plain."""

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import ACTIVATIONS, relative_error, tolerance
from test_torch_routes import observed
from torch import Tensor, nn

import batchnorm.torch as bn
from batchnorm import definition
from batchnorm.torch import plain, recipes, routes


@pytest.fixture(autouse=True)
def whole_table() -> Iterator[None]:
    with bn.route():
        yield


SMALL = [(6, 5), (4, 5, 3, 3), (2, 3, 2, 4, 4)]
LARGE = [(2 * routes.SMALL, 8), (8, 32, 24, 24)]
KINDS: dict[int, Any] = {2: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}


def made(shape: Any, dtype: torch.dtype, last: bool, **options: Any) -> tuple[Any, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    if last and len(shape) > 3:
        x = x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    layer = KINDS[len(shape)](shape[1], dtype=torch.float32 if dtype is torch.bfloat16 else dtype, **options)
    with torch.no_grad():
        for values in layer.weight, layer.bias, layer.running_mean:
            values.copy_(torch.randn(shape[1], generator=generator))
    return layer, x, dy


def is_plain(layer: Any, x: Any, residual: Any = None) -> bool:
    """Whether a copy of the layer computes this as a plain call."""
    return plain.compute(copy.deepcopy(layer), x, residual, layer.activation) is not None


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SMALL + LARGE, ids=str)
def test_it_equals_the_definition(shape: Any, dtype: torch.dtype, last: bool) -> None:
    exact = np.float64 if dtype is torch.float64 else np.float32
    for residual, activation in (False, None), (True, "relu"), (False, "silu"):
        layer, x, dy = made(shape, dtype, last, activation=activation)
        given = [x.clone().requires_grad_(), *([x.flip(0).clone().requires_grad_()] if residual else [])]
        d = [None if t is None else t.detach().double().numpy() for t in (*given, None)[:2]]
        weight, bias, mean, var = (
            t.detach().double().numpy().copy()
            for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        )
        if dtype is not torch.bfloat16 or shape in LARGE:
            assert is_plain(layer, *(t.detach() for t in given))
        y = layer(given[0], residual=given[1] if residual else None)
        y.backward(dy)
        want, batch = definition.forward(d[0], weight, bias, d[1], activation, None, layer.eps)
        dx, d_weight, d_bias, d_residual = definition.backward(
            dy.double().numpy(), d[0], weight, bias, d[1], activation, None, layer.eps
        )
        moved = definition.update_running(mean, var, batch, 0.1)
        limit = 0.02 if dtype is torch.bfloat16 else 4 * tolerance(exact, x[:, 0].numel())
        for got, expected in (
            (y, want), (given[0].grad, dx), (layer.weight.grad, d_weight), (layer.bias.grad, d_bias),
            (layer.running_mean, moved[0]), (layer.running_var, moved[1]),
            *([(given[1].grad, d_residual)] if residual else []),
        ):  # fmt: skip
            assert relative_error(got.detach().double().numpy(), expected) < limit
        assert (layer.num_batches_tracked, layer.num_batches_skipped) == (1, 0)
        layer.eval()
        mean, var = (t.double().numpy() for t in (layer.running_mean, layer.running_var))
        with torch.no_grad():
            y = layer(*given) if not residual else layer(given[0], residual=given[1])
        want = definition.activate(
            definition.normalize(d[0], mean, definition.reciprocal_std(var, layer.eps), weight, bias, d[1], None),
            activation,
        )
        assert relative_error(y.double().numpy(), want) < limit


@pytest.mark.parametrize("shape", [SMALL[1], LARGE[1]], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_it_has_the_bits_of_the_general_way(shape: Any, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A promise: who observes a layer sends it the general way, and what the layer learns must not depend on that."""
    found = []
    for _ in range(2):
        layer, x, dy = made(shape, torch.float32, False, activation="relu")
        layer.train(training)
        x.requires_grad_()
        y = [layer(x) for _ in range(2)][-1]
        y.backward(dy)
        state = x.grad, layer.weight.grad, layer.bias.grad, *layer.state_dict().values()
        found.append([y.detach(), *(t.detach().clone() for t in state)])
        monkeypatch.setattr(plain, "compute", lambda *_: None)
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_what_is_not_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, _ = made((4, 5, 3, 3), torch.float32, False, activation="relu")
    assert is_plain(layer, x)
    assert is_plain(layer, nn.Parameter(x))
    assert is_plain(copy.deepcopy(layer).eval(), x)

    def changed(change: Callable[[Any], Any]) -> Any:
        other = copy.deepcopy(layer)
        change(other)
        return other

    for other in (
        changed(lambda b: setattr(b, "statistics", bn.GhostStatistics(2))),
        changed(lambda b: setattr(b, "track_running_stats", False)),
        changed(lambda b: setattr(b, "momentum", None)),
        changed(lambda b: setattr(b, "eps", 0.0)),
        changed(lambda b: setattr(b, "save_memory", True)),
        changed(lambda b: setattr(b, "weight", None)),
        changed(lambda b: setattr(b, "weight", nn.Parameter(torch.ones(6)))),
        changed(lambda b: setattr(b.running_mean, "requires_grad", True)),
        changed(lambda b: b.double()),
        changed(lambda b: torch.nn.utils.parametrize.register_parametrization(b, "weight", nn.Identity())),
        changed(lambda b: setattr(b, "running_var", torch.ones(10)[::2])),
    ):
        assert plain.compute(other, x, None, "relu") is None
    monkeypatch.setattr(recipes, "LEAST", x.nbytes + 1)
    with pytest.warns(UserWarning, match="called outside"):
        assert is_plain(changed(lambda b: setattr(b, "save_memory", True)), x)
    for name in ("training", "statistics", "track_running_stats", "momentum"):
        kind = type("Computed", (bn.BatchNorm2d,), {name: property(lambda _: None, lambda _, __: None)})
        assert plain.compute(kind(5), x, None, None) is None
    saves = type("Saves", (bn.BatchNorm2d,), {"save_memory": True})(5)
    with pytest.warns(UserWarning, match="called outside"):
        assert plain.compute(saves, x, None, None) is not None
    monkeypatch.setattr(recipes, "LEAST", x.nbytes)
    assert plain.compute(saves, x, None, None) is None
    for odd in (torch._efficientzerotensor(5), torch._neg_view(torch.zeros(5))):
        for name in ("running_mean", "running_var"):
            other = changed(lambda b: None)
            other._buffers[name] = odd
            assert plain.compute(other, x, None, None) is None
    assert plain.compute(bn.BatchNorm1d(0), torch.randn(4, 0), None, None) is None
    for other_x in (
        x.double(), x.to_sparse(), x.to_mkldnn(), x.half(), x[:0], x[:1, :, :1, :1], x.to("meta"), x.int(),
        torch.nested.nested_tensor([x[0], x[0]], layout=torch.jagged), x.numpy(), None,
    ):  # fmt: skip
        assert not is_plain(layer, other_x)
    for residual in (x.double(), x[:1], x.to("meta")):
        assert not is_plain(layer, x, residual)
    with bn.route("native"):
        assert not is_plain(layer, x)
    with torch.autograd.forward_ad.dual_level():
        assert not is_plain(layer, x)
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(x[0])


def test_a_layer_without_statistics_counts_once() -> None:
    layer, x, _ = made((4, 5, 3, 3), torch.float32, False)
    layer.running_mean = layer.running_var = None
    layer(x)
    assert layer.num_batches_tracked == 1
    layer.num_batches_tracked = torch.zeros(2, dtype=torch.int32)[:1].squeeze()
    layer(x)
    assert layer.num_batches_tracked == 1


def test_the_version_of_a_counter_tells_of_a_batch() -> None:
    for shape in SMALL[1], LARGE[1]:
        layer, x, _ = made(shape, torch.float32, False)
        before = [t._version for t in layer.buffers()]
        layer(x)
        assert all(t._version > version for t, version in zip(layer.buffers(), before, strict=True))


def test_nothing_moves_for_a_batch_that_is_not_finite_or_far_away() -> None:
    layer, x, _ = made((8, 3, 2, 2), torch.float32, False)
    before = copy.deepcopy(layer.state_dict())
    for poison in np.inf, np.nan:
        bad = x.clone()
        bad[0, 1] = poison
        layer(bad)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name])
    assert layer.num_batches_skipped == 2
    far = x + 1e4
    y = layer(far)  # by the kernels, which are more exact
    want, _ = definition.forward(
        far.double().numpy(), layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy(), None, None,
        None, layer.eps,
    )  # fmt: skip
    assert relative_error(y.detach().numpy(), want) < 4 * tolerance(np.float32, 32)
    assert layer.num_batches_tracked == 1
    y = layer(x)  # what was not finite is not in the next batch
    assert y.isfinite().all()
    assert layer.num_batches_tracked == 2


def test_earlier_graphs_do_not_see_later_batches() -> None:
    layer, x, dy = made((8, 3, 2, 2), torch.float32, False, activation="relu")
    grads = []
    for later in (False, True):
        given = x.clone().requires_grad_()
        y = layer(given)
        if later:
            layer(5 * x + 3)
            layer(torch.full_like(x, torch.nan))
        y.backward(dy)
        grads.append(given.grad)
    assert torch.equal(*grads)  # type: ignore[arg-type]


def test_threads_do_not_mix_their_batches() -> None:
    """Each has statistics of its own, although PyTorch computes without Python's lock."""
    want, found = {}, {}

    def run(seed: int, to: dict[int, Any]) -> None:
        layer = bn.BatchNorm1d(64)
        x = torch.randn(256, 64, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
        for _ in range(50):
            layer(x)
        to[seed] = layer.running_var.clone()

    for seed in range(4):
        run(seed, want)
    workers = [threading.Thread(target=run, args=(seed, found)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed in range(4):
        torch.testing.assert_close(want[seed], found[seed], rtol=1e-5, atol=0)  # PyTorch's sums depend on its threads


def test_observers_and_hooks_see_a_call() -> None:
    layer, x, _ = made((4, 5, 3, 3), torch.float32, False)
    assert observed(layer, x) == "native"
    seen: list[Any] = []
    layer.register_forward_hook(lambda *_: seen.append("hook"))
    layer(x)
    assert seen == ["hook"]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_activation_in_place(activation: Any) -> None:
    layer, x, _ = made((4, 5, 3, 3), torch.float32, False, activation=activation)
    before = x.clone()
    with torch.no_grad():
        y = layer.eval()(x)
    mean, var, weight, bias = (
        t.detach().double().numpy() for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    rstd = definition.reciprocal_std(var, layer.eps)
    want = definition.normalize(x.double().numpy(), mean, rstd, weight, bias, None, activation)
    assert relative_error(y.double().numpy(), want) < 4 * tolerance(np.float32, 36)
    assert torch.equal(x, before)
