"""The registered operators: PyTorch's own checks of them, their derivatives, and that compiled graphs call them."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import CHANNELS_LAST, CONTIGUOUS, ROUTES, Layout, batch, relative_error, tolerance
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import gradcheck, gradgradcheck

import batchnorm.torch as bn
from batchnorm import definition
from batchnorm.torch import route

LAYOUTS = [*CONTIGUOUS, *CHANNELS_LAST]
MATRIX = CONTIGUOUS[0]
HOW = 1e-5, "silu", 0.0


def given(layout: Layout, dtype: torch.dtype = torch.float64, *, grad: bool = False) -> list[Any]:
    """x, weight, bias, residual and mask."""
    b = batch(layout.shape, np.float64)
    x, weight, bias, residual, mask = (
        torch.from_numpy(values) for values in (b.x, b.weight, b.bias, b.residual, b.mask)
    )
    exact = torch.float32 if dtype is torch.bfloat16 else dtype
    tensors = [layout.lay(x.to(dtype)), weight.to(exact), bias.to(exact), layout.lay(residual.to(dtype))]
    return [*(t.detach().requires_grad_(grad) for t in tensors), mask.to(exact)]


def backward_of(arguments: list[Any], how: tuple[Any, ...] = HOW) -> tuple[Any, ...]:
    """The arguments of `backward` that follow from those of `forward`."""
    _, statistics = torch.ops.batchnorm.forward(*(None if t is None else t.detach() for t in arguments), *how)
    dy = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dy = dy.to(arguments[0].dtype).requires_grad_(arguments[0].requires_grad)
    return dy, *arguments, *how, statistics


OPTIONAL = [(), (3,), (4,), (3, 4), (1,), (2,), (1, 2, 3, 4)]
"""Which arguments are left out: residual, mask, both, weight, bias, all."""


def without(arguments: list[Any], absent: tuple[int, ...]) -> list[Any]:
    return [None if i in absent else t for i, t in enumerate(arguments)]


QUICK = "test_schema", "test_autograd_registration", "test_faketensor"


@pytest.mark.parametrize("absent", OPTIONAL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, absent: tuple[int, ...]) -> None:
    forward, backward = torch.ops.batchnorm.forward.default, torch.ops.batchnorm.backward.default
    for layout, grad in ((MATRIX, False), (CHANNELS_LAST[0], True)):
        arguments = without(given(layout, dtype, grad=grad), absent)
        torch.library.opcheck(forward, (*arguments, *HOW), test_utils=QUICK)
        for needs in ((True, True), (False, True), (True, False), (False, False)):
            torch.library.opcheck(backward, (*backward_of(arguments), *needs), test_utils=QUICK)


@pytest.mark.parametrize("absent", [(), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck_of_whole_graphs(grad: bool, absent: tuple[int, ...]) -> None:
    arguments = without(given(CHANNELS_LAST[0], torch.float32, grad=grad), absent)
    torch.library.opcheck(torch.ops.batchnorm.forward.default, (*arguments, *HOW))
    torch.library.opcheck(torch.ops.batchnorm.backward.default, (*backward_of(arguments), True, True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_they_compute_what_the_definition_says(layout: Layout) -> None:
    x, weight, bias, residual, mask = arguments = given(layout)
    y, (mean, var, _) = torch.ops.batchnorm.forward(*arguments, *HOW)
    want, moments = definition.forward(x, weight, bias, residual, mask=mask, activation="silu")
    for got, exact in ((y, want), (mean, moments.mean), (var, moments.var)):
        assert relative_error(got.numpy(), exact) < tolerance(np.float64, x.numel())
    dy, *_ = others = backward_of(arguments)
    found = torch.ops.batchnorm.backward(*others, True, True)
    exact_grads = definition.backward(dy, x, weight, bias, residual, mask=mask, activation="silu")
    for got, exact in zip(found, exact_grads, strict=True):
        assert relative_error(got.numpy(), exact) < 4 * tolerance(np.float64, x.numel())
    assert y.stride() == found[0].stride() == found[3].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("absent", OPTIONAL, ids=str)
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_their_derivatives(activation: str, absent: tuple[int, ...]) -> None:
    arguments = without(given(MATRIX, grad=True), absent)
    inputs = [t for t in arguments[:4] if t is not None]

    def function(*values: Tensor) -> Tensor:
        rest = iter(values)
        y: Tensor = torch.ops.batchnorm.forward(
            *(None if t is None else next(rest) for t in arguments[:4]), arguments[4], 1e-5, activation, 0.0
        )[0]
        return y

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_an_empty_batch() -> None:
    x = torch.empty(0, 3, 4, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    y, (mean, var, _) = torch.ops.batchnorm.forward(x, weight, None, None, None, *HOW)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.shape == x.shape
    assert (weight.grad.tolist(), mean.tolist(), var.tolist()) == ([0] * 3, [0] * 3, [0] * 3)


# --- In compiled graphs ----------------------------------------------------------------------------------------------


def called(module: nn.Module, x: Tensor, *, export: bool = False) -> list[str]:
    """The names of the operators of the forward graph, and of the backward graph."""
    torch._dynamo.reset()
    if export:
        graphs = [torch.export.export(module, (x,)).graph_module]
    else:
        graphs = []

        def look(graph: Any, _: Any) -> Any:
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        compile_with = aot_autograd(fw_compiler=look, bw_compiler=look)
        torch.compile(module, backend=compile_with, fullgraph=True)(x).sum().backward()
    torch._dynamo.reset()
    return [str(node.target) for graph in graphs for node in graph.graph.nodes if "batchnorm" in str(node.target)]


def test_a_compiled_graph_calls_them() -> None:
    layer, x = bn.BatchNorm2d(3, activation="relu"), torch.randn(4, 3, 5, 6, requires_grad=True)
    both = ["batchnorm.forward.default", "batchnorm.backward.default"]
    assert called(layer, x) == both
    assert called(layer.to(torch.bfloat16), x.detach().bfloat16().requires_grad_()) == both
    assert called(layer.half(), x.detach().half().requires_grad_()) == []
    assert called(layer.float().eval(), x) == []
    with route(*(name for name in ROUTES if name != "operator")):
        assert called(layer.train(), x) == []


def test_an_exported_graph_does_not_call_them() -> None:
    assert called(bn.BatchNorm2d(3), torch.randn(4, 3, 5, 6), export=True) == []
