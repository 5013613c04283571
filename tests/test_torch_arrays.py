"""Tensors as arrays of the kernels."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import batchnorm.torch as bn
from batchnorm.torch import arrays

LAST, FIRST = torch.channels_last, torch.contiguous_format


def expected(t: Tensor, laid: torch.memory_format) -> Any:
    values = t.double().numpy(force=True)
    return values.reshape(*t.shape[:2], -1) if laid is FIRST else np.moveaxis(values, 1, -1).reshape(-1, t.shape[1], 1)


@pytest.mark.parametrize("laid", [FIRST, LAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_with_any_strides(laid: torch.memory_format, dtype: torch.dtype) -> None:
    whole = torch.arange(4 * 6 * 5 * 7, dtype=dtype).reshape(4, 6, 5, 7)
    for t in (
        whole, whole.contiguous(memory_format=LAST), whole[:, ::2], whole[1:, 1:], whole.transpose(2, 3),
        nn.Parameter(whole), torch._neg_view(whole), whole[:1].expand(3, 6, 5, 7),
    ):  # fmt: skip
        held = arrays.dense(t, laid)
        array = arrays.batch(held, laid)
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, expected(t, laid))


@pytest.mark.parametrize("laid", [FIRST, LAST])
def test_the_bits_of_bfloat16(laid: torch.memory_format) -> None:
    whole = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    for t in (whole, whole[:, ::2]):
        held = arrays.dense(t, laid)
        bits = arrays.batch(held, laid).astype(np.uint32) << 16
        np.testing.assert_array_equal(bits.view(np.float32), expected(t, laid))


def test_a_view_is_no_copy_and_tables_are() -> None:
    t = torch.zeros(3)
    view, tables = arrays.view(t), arrays.tables(t, None, 3, torch.float64)
    t += 1
    np.testing.assert_array_equal(view, 1)
    np.testing.assert_array_equal(tables, 0)
    np.testing.assert_array_equal(arrays.tables(None, None, 3, torch.float32), [[1] * 3, [0] * 3])
    for values in (t[::2], torch._neg_view(t), t.bfloat16(), t.double(), torch._efficientzerotensor(2)):
        want = (values.float() + 0).numpy(force=True)
        np.testing.assert_array_equal(arrays.tables(values, values, len(values), torch.float32), [want, want])
        held = arrays.channels(values, torch.float32)
        np.testing.assert_array_equal(arrays.view(held), want)


def test_the_memory_of_tensors_stays_theirs() -> None:
    """Sharding frees the memory of parameters, which is impossible for memory that NumPy has seen."""
    layer = bn.BatchNorm2d(4, activation="relu")
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    for name in ("native", "numba"):
        with bn.route(name):
            layer(x).sum().backward()
    for t in (x, x.grad, layer.weight, layer.bias, layer.weight.grad, layer.running_mean, layer.running_var):
        assert t is not None
        assert t.untyped_storage().resizable()


def test_a_gradient_without_memory() -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    with bn.route("numba"):
        bn.batch_norm(x, training=True).backward(torch._efficientzerotensor(4, 3, 5))
    assert x.grad is not None
    assert not x.grad.any()


def test_a_gradient_beyond_the_type_is_infinite() -> None:
    x, bias = torch.randn(64, 3, 8, requires_grad=True), torch.zeros(3, requires_grad=True)
    with bn.route("numba"):
        y = bn.batch_norm(x, bias=bias, training=True)
    y.backward(torch.full_like(y, 1e36))
    assert bias.grad is not None
    assert bias.grad.isinf().all()


def test_a_weight_of_a_class_of_its_own() -> None:
    x, ones = torch.randn(8, 3, 4), torch.ones(3)
    running_mean = torch.zeros(3)
    two = TwoTensor(ones, ones.clone())
    y = bn.batch_norm(x, running_mean, torch.ones(3), two, two, training=True)
    want = bn.batch_norm(x, weight=ones, bias=ones, training=True)
    np.testing.assert_allclose(y.a.detach(), want, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]
    np.testing.assert_allclose(running_mean, 0.1 * x.mean((0, 2)), rtol=1e-5, atol=1e-6)
