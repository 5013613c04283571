"""Layers and the function inside `torch.func`: each model, each batch and its running statistics as without it."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import relative_error, tolerance
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import batchnorm.torch as bn
from batchnorm import definition
from batchnorm.torch import batch_norm, route

# Forward mode loads decompositions that PyTorch itself still compiles in the deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
SAMPLES = 5
LAYERS = pytest.mark.parametrize("layer", [bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shape_of(layer: Any) -> tuple[int, ...]:
    spatial = {bn.BatchNorm1d: (), bn.BatchNorm2d: (4, 2), bn.BatchNorm3d: (2, 1, 3)}[layer]
    return (SAMPLES, 3, *spatial)


def build(layer: Any = bn.BatchNorm1d, seed: int = 0, **options: Any) -> nn.Sequential:
    """A layer between two others, in float64, of random weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Tanh(), layer(3, **{"activation": "silu"} | options), nn.Tanh()).double()
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(0.5, 1.5)
    return model


def assert_close(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert relative_error(a.detach().double().numpy(), b.detach().double().numpy()) < 32 * tolerance(np.float64, 80)


def gradients(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Of `(model(x) * dy).sum()` without any transform."""
    found = torch.autograd.grad((model(x) * dy).sum(), list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def loss_of(model: nn.Module) -> Any:
    def loss(parameters: Any, buffers: Any, x: Tensor, dy: Tensor) -> Tensor:
        return (functional_call(model, (parameters, buffers), (x,)) * dy).sum()

    return loss


@pytest.fixture(params=["functorch", "composed"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with route(request.param, "numba", "composed"):
        yield request.param


@LAYERS
@pytest.mark.parametrize("momentum", [0.1, None])
def test_grad_of_a_layer_in_training(layer: Any, momentum: float | None, path: str) -> None:
    model = build(layer, momentum=momentum)
    other, x, dy = copy.deepcopy(model), draw(*shape_of(layer)), draw(*shape_of(layer), seed=1)
    for _ in range(2):
        want = gradients(other, x, dy)
        got = grad(loss_of(model))(dict(model.named_parameters()), dict(model.named_buffers()), x, dy)
        assert_close(got.values(), want.values())
    assert_close(model.buffers(), other.buffers())
    assert model[1].num_batches_tracked == 2


@LAYERS
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_an_ensemble_is_each_of_its_models(layer: Any, training: bool, momentum: float | None, path: str) -> None:
    models = [build(layer, seed, momentum=momentum).train(training) for seed in range(3)]
    base, x, dy = copy.deepcopy(models[0]), draw(*shape_of(layer)), draw(*shape_of(layer), seed=1)
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    got = vmap(grad(loss_of(base)), (0, 0, None, None))(parameters, buffers, x, dy)
    for i, model in enumerate(models):
        want = gradients(model, x, dy)
        assert_close((got[name][i] for name in want), want.values())
        for name, buffer in model.named_buffers():
            assert_close([buffers[name][i]], [buffer])


def test_an_ensemble_is_one_normalization(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    forward = torch.ops.batchnorm.forward

    def look(x: Tensor, *arguments: Any) -> Any:
        shapes.append(x.shape)
        return forward(x, *arguments)

    monkeypatch.setattr(torch.ops.batchnorm, "forward", look)
    models = [build(seed=seed) for seed in range(4)]
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    x = draw(SAMPLES, 3)
    vmap(grad(loss_of(models[0])), (0, 0, None, None))(parameters, buffers, x, x)
    assert shapes == [(SAMPLES, 4 * 3)]


def test_an_ensemble_of_ensembles(path: str) -> None:
    weight, bias, x = draw(2, 3, seed=1), draw(4, 3, seed=2), draw(4, SAMPLES, 3)

    def each(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        return batch_norm(x, weight=weight, bias=bias, training=True, activation="silu")

    got = vmap(vmap(each, (None, 0, 0)), (0, None, None))(weight, bias, x)
    assert_close(got.flatten(0, 1), [each(w, bias[i], x[i]) for w in weight for i in range(4)])


@pytest.mark.parametrize("mapped", ["x", "weight", "residual", "mask"])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap_over_any_argument_along_any_axis(mapped: str, dim: int, path: str) -> None:
    arguments = {"x": draw(SAMPLES, 3), "weight": draw(3), "residual": draw(SAMPLES, 3, seed=1)}
    arguments["mask"] = torch.tensor([True, True, False, True, True])
    many = torch.stack([arguments[mapped], arguments[mapped].roll(1, 0), arguments[mapped].flip(0)])

    def call(value: Tensor) -> Tensor:
        return batch_norm(**arguments | {mapped: value}, training=True, activation="silu")  # type: ignore[arg-type]

    def pull(value: Tensor) -> Tensor:
        given: dict[str, Any] = arguments | {mapped: value}

        def moved(by: Tensor) -> Tensor:
            return batch_norm(**given | {"x": given["x"] + by}, training=True, activation="silu")

        y, backward = vjp(moved, torch.zeros(SAMPLES, 3, dtype=torch.float64))
        found: Tensor = backward(y.sin())[0]
        return found

    laid = many.movedim(0, dim).contiguous()
    assert_close(vmap(call, dim)(laid), [call(value) for value in many])
    assert_close(vmap(pull, dim)(laid), [pull(value) for value in many])


def test_one_channel(path: str) -> None:
    """Statistics of one channel that vmap does not map have a stride of 0."""
    x = torch.randn(5, 1, dtype=torch.float64)
    dy = torch.randn(4, 5, 1, dtype=torch.float64)
    _, backward = vjp(lambda x: batch_norm(x, training=True), x)
    got = vmap(lambda dy: backward(dy)[0])(dy)
    for each, given in zip(got, dy, strict=True):
        want = definition.backward(given.numpy(), x.numpy(), np.ones(1), np.zeros(1))[0]
        torch.testing.assert_close(each, torch.from_numpy(want))


def test_statistics_that_vmap_does_not_map_see_all_batches_as_one(path: str) -> None:
    model = build()
    other, many = copy.deepcopy(model), draw(4, SAMPLES, 3)
    vmap(model)(many)
    other(many.flatten(0, 1))
    assert_close(model.buffers(), other.buffers())
    assert model[1].num_batches_tracked == 1


def test_batches_that_are_not_finite_are_skipped_each_for_itself(path: str) -> None:
    layers = [bn.BatchNorm1d(3, dtype=torch.float64) for _ in range(3)]
    parameters, buffers = stack_module_state(layers)  # type: ignore[arg-type]
    x = draw(3, SAMPLES, 3)
    x[1, 0, 0] = torch.inf
    vmap(lambda *state_and_x: functional_call(layers[0], state_and_x[:2], state_and_x[2:]))(parameters, buffers, x)
    assert buffers["num_batches_tracked"].tolist() == [1, 0, 1]
    assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    assert layers[0].num_batches_skipped == 1  # one counter for all: a member skipped
    assert [mean.count_nonzero() for mean in buffers["running_mean"]] == [3, 0, 3]


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
def test_jacobians_of_a_layer_in_training(transform: Any) -> None:
    model, x = build(), draw(3, 3)
    other = copy.deepcopy(model)
    got = transform(lambda x: model(x) if transform is not hessian else model(x).sin().sum())(x)
    if transform is hessian:
        want = torch.autograd.functional.hessian(lambda x: copy.deepcopy(other)(x).sin().sum(), x)
    else:
        want = torch.autograd.functional.jacobian(copy.deepcopy(other), x)
    assert_close([got], [want])
    other(x)
    assert_close(model.buffers(), other.buffers())


@pytest.mark.parametrize("how", ["torch.func", "dual numbers"])
def test_forward_mode_of_a_layer_in_training(how: str) -> None:
    model, x, tangent = build(), draw(SAMPLES, 3), draw(SAMPLES, 3, seed=1)
    other = copy.deepcopy(model)
    want = (torch.autograd.functional.jacobian(copy.deepcopy(other), x) * tangent).sum((-2, -1))
    if how == "torch.func":
        _, got = jvp(model, (x,), (tangent,))
    else:
        with forward_ad.dual_level():
            got = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
            assert forward_ad.unpack_dual(model[1].running_mean).tangent is None
    assert_close([got], [want])
    other(x)
    assert_close(model.buffers(), other.buffers())


def test_compiled(path: str) -> None:
    torch._dynamo.reset()
    many = draw(3, SAMPLES, 3)

    def normalized(x: Tensor) -> Tensor:
        return batch_norm(x, training=True, activation="silu")

    compiled = torch.compile(vmap(normalized), backend="aot_eager", fullgraph=True)
    assert_close(compiled(many), [normalized(x) for x in many])
    torch._dynamo.reset()
