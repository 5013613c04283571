"""First and second derivatives against finite differences, in every mode, and through PyTorch's transformations."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    ACTIVATIONS,
    GRADCHECK_SHAPES,
    Layout,
    batch,
    channels_last,
    far_from_kinks,
    relative_error,
    tolerance,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from batchnorm import definition
from batchnorm.kernels import launch
from batchnorm.torch import RunningStatistics, batch_norm, route

# Forward mode loads decompositions that PyTorch itself still compiles in the deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

LAYOUTS = [Layout(name, shape, lambda t: t) for name, shape in GRADCHECK_SHAPES.items()] + [
    Layout(f"{name}-channels-last", GRADCHECK_SHAPES[name], channels_last) for name in ("series", "images", "volumes")
]
MATRIX, IMAGES, IMAGES_LAST = (
    next(layout for layout in LAYOUTS if layout.name == name) for name in ("matrix", "images", "images-channels-last")
)
NAMES = ["x", "weight", "bias", "residual"]
MODES = ["training", "evaluation", "frozen"]


def given(layout: Layout, mode: str, activation: Any = None, residual: bool = True) -> dict[str, Any]:
    """Arguments of `batch_norm`, with `z` on the same side of every kink for all steps of a finite difference."""
    for seed in range(1000):
        b = batch(layout.shape, np.float64, seed=seed)
        added = b.residual if residual else b.x
        if mode == "training":
            z, _ = definition.forward(b.x, b.weight, b.bias, added, mask=b.mask)
        else:
            rstd = definition.reciprocal_std(b.running_var)
            z = definition.normalize(b.x, b.running_mean, rstd, b.weight, b.bias, added)
        if far_from_kinks(z):
            break
    t = {name: torch.from_numpy(values) for name, values in vars(b).items()}
    arguments: dict[str, Any] = {"x": layout.lay(t["x"]), "weight": t["weight"], "bias": t["bias"], "mask": t["mask"]}
    if residual:
        arguments["residual"] = layout.lay(t["residual"])
    if mode != "training":
        arguments |= {"running_mean": t["running_mean"], "running_var": t["running_var"]}
    if mode == "frozen":
        arguments["statistics"] = RunningStatistics()
    return arguments | {"training": mode != "evaluation", "activation": activation}


def assert_differentiable(arguments: dict[str, Any], *names: str) -> None:
    """Jacobian and Hessian with respect to the named arguments, also over many `dy` at once and forward."""

    def function(*values: Tensor) -> Tensor:
        return batch_norm(**arguments | dict(zip(names, values, strict=True)))

    inputs = [arguments[name].detach().requires_grad_() for name in names]
    assert "_BatchNorm" in type(function(*inputs).grad_fn).__name__
    assert gradcheck(function, inputs, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(function, inputs, check_batched_grad=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_derivatives_of_every_activation(activation: Any, mode: str) -> None:
    assert_differentiable(given(IMAGES, mode, activation), *NAMES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_derivatives_in_every_layout(layout: Layout, mode: str) -> None:
    assert_differentiable(given(layout, mode, "silu"), *NAMES)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("names", [["x"], ["weight"], ["bias"], ["residual"], ["x", "weight"], ["bias", "residual"]])
def test_derivatives_of_some_inputs(names: list[str], activation: Any) -> None:
    for mode in ("training", "frozen"):
        assert_differentiable(given(MATRIX, mode, activation), *names)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [IMAGES, IMAGES_LAST], ids=str)
def test_derivatives_where_x_is_its_own_residual(layout: Layout, mode: str) -> None:
    arguments = given(layout, mode, "silu", residual=False)

    def function(x: Tensor) -> Tensor:
        return batch_norm(**arguments | {"x": x, "residual": x})

    x = arguments["x"].requires_grad_()
    assert gradcheck(function, x, check_batched_grad=True)
    assert gradgradcheck(function, x, check_batched_grad=True)


def test_without_inputs_to_differentiate_there_is_no_graph() -> None:
    arguments = given(MATRIX, "training")
    assert not batch_norm(**arguments).requires_grad
    arguments["weight"].requires_grad_()
    with torch.no_grad():
        assert not batch_norm(**arguments).requires_grad


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_sums_alone_need_no_gradient_of_x(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(launch, "backward")
    arguments = given(MATRIX, "training", "silu")
    batch_norm(**arguments | {name: arguments[name].requires_grad_()}).sum().backward()
    assert arguments[name].grad is not None


def test_an_input_changed_before_the_backward_pass_is_noticed() -> None:
    for name in ("x", "weight", "mask"):
        arguments = given(MATRIX, "training", "silu")
        y = batch_norm(**arguments | {"bias": arguments["bias"].requires_grad_()})
        arguments[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("way", ["numba", "native", "composed"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_what_pytorch_does_not_keep_may_change_before_the_backward_pass(activation: Any, way: str) -> None:
    """The first and second derivatives are those of the values in the forward pass."""
    arguments = given(IMAGES, "training", activation)
    del arguments["mask"]
    found = []
    for change in (False, True):
        given_now = arguments | {name: arguments[name].clone().requires_grad_() for name in NAMES}
        with route(way):
            y = batch_norm(**given_now | {"residual": (state := given_now["residual"].clone())})
        if change:
            with torch.no_grad():
                state.mul_(0.9).add_(y)
                given_now["bias"].add_(1)
        leaves = [given_now[name] for name in NAMES]
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), leaves)
        found.append([*first, *second])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_an_output_that_relu_keeps_may_not_change() -> None:
    """Nor may it in PyTorch."""
    arguments = given(MATRIX, "training", "relu")
    y = batch_norm(**arguments | {"residual": arguments["residual"].requires_grad_()})
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_output_may_be_changed_in_place() -> None:
    arguments = given(MATRIX, "training", "silu")
    x = arguments["x"].requires_grad_()
    (want,) = torch.autograd.grad(batch_norm(**arguments).sum(), x)
    y = batch_norm(**arguments)
    y.add_(1)
    np.testing.assert_array_equal(torch.autograd.grad(y.sum(), x)[0], want)


# --- torch.func ------------------------------------------------------------------------------------------------------


def normalized(x: Tensor) -> Tensor:
    return batch_norm(x, None, None, training=True, activation="silu")


def definition_of_dx(dy: Tensor, x: Tensor) -> Any:
    return definition.backward(dy, x, activation="silu")[0]


def assert_close(got: Tensor, want: Any) -> None:
    assert relative_error(got.numpy(), np.asarray(want)) < 8 * tolerance(np.float64, got.numel())


@pytest.fixture
def x() -> Tensor:
    return torch.from_numpy(batch((5, 2), np.float64).x)


@pytest.fixture
def dy() -> Tensor:
    return torch.from_numpy(batch((5, 2), np.float64).dy)


def test_grad(x: Tensor, dy: Tensor) -> None:
    assert_close(torch.func.grad(lambda x: (normalized(x) * dy).sum())(x), definition_of_dx(dy, x))


def test_vjp(x: Tensor, dy: Tensor) -> None:
    y, backward = torch.func.vjp(normalized, x)
    assert_close(y, definition.forward(x, activation="silu")[0])
    assert_close(backward(dy)[0], definition_of_dx(dy, x))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_vjp_after_the_residual_and_the_bias_have_changed(activation: str, dy: Tensor) -> None:
    b = batch((5, 2), np.float64)
    x, weight, bias, residual = (torch.from_numpy(t.copy()) for t in (b.x, b.weight, b.bias, b.residual))

    def function(*inputs: Tensor) -> Tensor:
        x, weight, bias, residual = inputs
        return batch_norm(x, None, None, weight, bias, True, activation=activation, residual=residual)

    _, backward = torch.func.vjp(function, x, weight, bias, residual)
    bias.add_(1)
    residual.mul_(0.9)
    want = definition.backward(dy.numpy(), b.x, b.weight, b.bias, b.residual, activation)
    for got, exact in zip(backward(dy), want, strict=True):
        assert_close(got, exact)


@pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd])
def test_jacobians(jacobian: Any, x: Tensor) -> None:
    rows = jacobian(normalized)(x).reshape(10, 5, 2)
    assert_close(rows, [definition_of_dx(dy, x) for dy in torch.eye(10).reshape(10, 5, 2)])


def test_jvp(x: Tensor, dy: Tensor) -> None:
    y, forward = torch.func.jvp(normalized, (x,), (dy,))
    assert_close(y, definition.forward(x, activation="silu")[0])
    # <e, J v> = <J' e, v> for every unit e
    want = [(definition_of_dx(e, x) * dy.numpy()).sum() for e in torch.eye(10).reshape(10, 5, 2)]
    assert_close(forward.flatten(), want)


def test_hessian(x: Tensor, dy: Tensor) -> None:
    def loss(x: Tensor) -> Tensor:
        return (normalized(x) * dy).sum()

    want = torch.autograd.functional.hessian(loss, x)  # which gradgradcheck has checked
    assert_close(torch.func.hessian(loss)(x), want)


def test_vmap(x: Tensor, dy: Tensor) -> None:
    many = torch.stack([x, dy, 3 * x + 5])
    want = [definition.forward(x, activation="silu")[0] for x in many]
    assert_close(torch.func.vmap(normalized)(many), want)
    got = torch.func.vmap(torch.func.grad(lambda x: (normalized(x) * dy).sum()))(many)
    assert_close(got, [definition_of_dx(dy, x) for x in many])


def test_vmap_over_models(x: Tensor) -> None:
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).double()
    mask = torch.tensor([True, True, False, True, True])
    got = torch.func.vmap(lambda weight: batch_norm(x, None, None, weight, training=True, mask=mask))(weights)
    assert_close(got, [definition.forward(x, weight, mask=mask)[0] for weight in weights])


def test_vmap_with_running_statistics(x: Tensor, dy: Tensor) -> None:
    b = batch((5, 2), np.float64)
    running = torch.from_numpy(b.running_mean), torch.from_numpy(b.running_var)
    rstd = definition.reciprocal_std(b.running_var)
    many = torch.stack([x, dy])
    for how in ({"training": False}, {"training": True, "statistics": RunningStatistics()}):
        got = torch.func.vmap(lambda x, how=how: batch_norm(x, *running, **how))(many)
        assert_close(got, [definition.normalize(x, b.running_mean, rstd) for x in many])


def test_gradients_of_each_sample(x: Tensor, dy: Tensor) -> None:
    b = batch((5, 2), np.float64)
    running = torch.from_numpy(b.running_mean), torch.from_numpy(b.running_var)

    def loss(weight: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        return (batch_norm(x.unsqueeze(0), *running, weight) * dy).sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(torch.ones(2).double(), x, dy)
    assert_close(got, dy.numpy() * (x.numpy() - b.running_mean) * definition.reciprocal_std(b.running_var))
