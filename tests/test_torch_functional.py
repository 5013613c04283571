"""`batch_norm` of tensors against the float64 definition, and against PyTorch where equality with it is the claim.

Both paths, that of the kernels and that of PyTorch's operations, go through the same tests.
"""

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import (
    ACTIVATIONS,
    CHANNELS_LAST,
    COLUMNS,
    CONTIGUOUS,
    DTYPES,
    EMPTY,
    LAYOUTS,
    MASKS,
    Layout,
    batch,
    channels_last,
    half_precision_tolerance,
    relative_error,
    rms,
    tolerance,
)
from torch import Tensor

from batchnorm import definition
from batchnorm.torch import BatchNorm1d, BatchStatistics, RunningStatistics, batch_norm, route

MATRIX, SERIES, IMAGES, VOLUMES = CONTIGUOUS
IMAGES_LAST, VOLUMES_LAST = CHANNELS_LAST
BOTH_FORMATS = pytest.mark.parametrize("layout", [IMAGES, IMAGES_LAST], ids=str)


@pytest.fixture(params=[("numba", "composed"), ("native", "numba", "composed"), ("composed",)], ids=lambda p: p[0])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of the three ways to the answer, where it can be gone."""
    with route(*request.param):
        yield request.param[0]


def given(layout: Layout, dtype: Any = np.float64, **kwargs: Any) -> Any:
    """A batch as tensors, `x` in the layout."""
    tensors = {name: torch.from_numpy(values) for name, values in vars(batch(layout.shape, dtype, **kwargs)).items()}
    return SimpleNamespace(**tensors | {"x": layout.lay(tensors["x"])})


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def run(function: Callable[..., Tensor], g: Any, weight: Any = None, bias: Any = None, **kwargs: Any) -> dict[str, Any]:
    """`y` and all gradients."""
    inputs = {"dx": g.x, "d_weight": weight, "d_bias": bias, "d_residual": kwargs.pop("residual", None)}
    inputs = {name: leaf(t) for name, t in inputs.items() if t is not None}
    if "d_residual" in inputs:
        kwargs["residual"] = inputs["d_residual"]
    running = kwargs.pop("running_mean", None), kwargs.pop("running_var", None)
    y = function(inputs["dx"], *running, inputs.get("d_weight"), inputs.get("d_bias"), **kwargs)
    grads = torch.autograd.grad(y, list(inputs.values()), g.dy)
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


def exact(
    g: Any, weight: Any = None, bias: Any = None, residual: Any = None, activation: Any = None, mask: Any = None,
    running_mean: Any = None, running_var: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """The same by the definition; with the running statistics if these are given."""
    affine = weight, bias, residual, activation
    if running_mean is None:
        y, _ = definition.forward(g.x, *affine, mask)
        dx, d_weight, d_bias, d_residual = definition.backward(g.dy, g.x, *affine, mask)
    else:
        mean, rstd = running_mean, definition.reciprocal_std(running_var)
        y = definition.normalize(g.x, mean, rstd, *affine)
        d_bias, d_weight = definition.grad_sums(g.dy, g.x, mean, rstd, *affine)
        dx, d_residual = definition.grad_input(g.dy, g.x, mean, rstd, d_bias, d_weight, np.inf, *affine)
    return {"y": y, "dx": dx, "d_weight": d_weight, "d_bias": d_bias, "d_residual": d_residual}


def assert_exact(got: dict[str, Any], want: dict[str, Any], g: Any, dtype: Any, var: Any = None) -> None:
    var = definition.moments(g.x).var if var is None else var
    gain = max(1.0, float(np.max(definition.reciprocal_std(var) * g.weight.numpy())))
    for name, value in got.items():
        error = relative_error(value.double().numpy(), want[name])
        assert error < gain * tolerance(dtype, g.x.numel() // g.x.shape[1]), name


# --- Values and strides ----------------------------------------------------------------------------------------------


def test_the_kernels_are_what_is_tested(path: str) -> None:
    g = given(MATRIX)
    taken = type(batch_norm(leaf(g.x), None, None, training=True).grad_fn).__name__ == "_BatchNormBackward"
    assert taken == (path == "numba")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [*LAYOUTS, *COLUMNS], ids=str)
def test_equals_the_definition_in_every_layout(layout: Layout, training: bool, dtype: Any, path: str) -> None:
    g = given(layout, dtype)
    running = {} if training else {"running_mean": g.running_mean, "running_var": g.running_var}
    for weight in (None, g.weight):
        for bias in (None, g.bias):
            got = run(batch_norm, g, weight, bias, training=training, **running)
            assert_exact(got, exact(g, weight, bias, **running), g, dtype, running.get("running_var"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_and_strides_are_those_of_torch(layout: Layout, training: bool) -> None:
    g = given(layout)
    dy = g.dy
    running = {"running_mean": g.running_mean, "running_var": g.running_var}
    for g.dy in (dy, channels_last(dy), dy[:1].expand(dy.shape), dy.flatten()[0].expand(dy.shape)):
        got = run(batch_norm, g, g.weight, g.bias, training=training, **running)
        want = run(F.batch_norm, g, g.weight, g.bias, training=training, **running)
        for name in got:
            # Where dy is constant, the rounding of PyTorch's mean is the same in all terms: it adds up as their number.
            error = relative_error(got[name].numpy(), want[name].numpy())
            assert error < 4 * tolerance(np.float64, (g.x.numel() // g.x.shape[1]) ** 2), name
            assert got[name].stride() == want[name].stride(), name


@pytest.mark.parametrize("layout", COLUMNS, ids=str)
def test_an_ambiguous_memory_format_is_that_of_torch(layout: Layout) -> None:
    g = given(layout)
    want = F.batch_norm(g.x, None, None, training=True)
    assert batch_norm(g.x, None, None, training=True).stride() == want.stride()
    assert run(batch_norm, g, training=True)["dx"].stride() == want.stride()


@pytest.mark.parametrize("layout", [MATRIX, IMAGES, IMAGES_LAST, VOLUMES_LAST], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_activation_with_residual_and_mask(activation: Any, layout: Layout, path: str) -> None:
    g = given(layout)
    extras = {"residual": g.residual, "mask": g.mask, "activation": activation}
    got = run(batch_norm, g, g.weight, g.bias, training=True, **extras)
    assert_exact(got, exact(g, g.weight, g.bias, **extras), g, np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [MATRIX, SERIES, IMAGES_LAST, VOLUMES_LAST], ids=str)
def test_the_residual_may_lie_otherwise_than_x(layout: Layout, dtype: Any, path: str) -> None:
    g = given(layout, dtype)
    for residual in (g.residual, channels_last(g.residual), g.residual[:1].expand(g.x.shape)):
        extras = {"residual": residual, "mask": g.mask, "activation": "silu"}
        got = run(batch_norm, g, g.weight, g.bias, training=True, **extras)
        assert_exact(got, exact(g, g.weight, g.bias, **extras), g, dtype)


def test_a_lazily_negated_tensor_is_a_tensor_like_others() -> None:
    g = given(IMAGES)
    want = run(batch_norm, g, g.weight, g.bias, training=True)
    g.x, g.dy = torch._neg_view(-g.x), torch._neg_view(-g.dy)
    assert g.x.is_neg()
    got = run(batch_norm, g, g.weight, g.bias, training=True)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [MATRIX, IMAGES, IMAGES_LAST], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(dtype: torch.dtype, layout: Layout, training: bool) -> None:
    g = given(layout, np.float32)
    g.x, g.dy = g.x.to(dtype), g.dy.to(dtype)
    running = {"running_mean": g.running_mean, "running_var": g.running_var}
    extras = {"activation": "silu", "mask": g.mask, "residual": g.residual.to(dtype)}
    rounded = SimpleNamespace(x=g.x.float(), dy=g.dy.float())
    want = exact(
        rounded, g.weight, g.bias, **extras | {"residual": extras["residual"].float()}, **{} if training else running
    )
    got = run(batch_norm, g, g.weight, g.bias, training=training, **extras, **running)
    for name in ("y", "dx", "d_residual"):
        assert got[name].dtype is dtype
        error = np.abs(got[name].double().numpy() - want[name])
        assert np.all(error <= half_precision_tolerance(torch.finfo(dtype).eps, want[name])), name
    for name in ("d_weight", "d_bias"):
        assert got[name].dtype is torch.float32
        assert relative_error(got[name].numpy(), want[name]) < tolerance(np.float32, g.x.numel())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_meta_device_computes_shapes(layout: Layout, dtype: torch.dtype, training: bool) -> None:
    g = given(layout, np.float32)
    x, residual = (t.to("meta", dtype).requires_grad_() for t in (g.x, g.residual))
    numbers = [
        t.to("meta", torch.float32 if dtype is torch.bfloat16 else dtype)
        for t in (g.running_mean, g.running_var, g.weight, g.bias)
    ]
    y = batch_norm(x, *numbers, training=training, activation="relu", residual=residual)
    for tensor in (y, *torch.autograd.grad(y, (x, residual), y.detach())):
        assert (tensor.shape, tensor.dtype, tensor.device.type) == (x.shape, dtype, "meta")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_an_empty_batch_gives_what_torch_gives(shape: Any, dtype: torch.dtype, training: bool) -> None:
    running_mean, running_var, weight, bias = (torch.full((shape[1],), v, dtype=dtype) for v in (1.0, 2.0, 3.0, 4.0))
    g = SimpleNamespace(x=torch.empty(shape, dtype=dtype), dy=torch.empty(shape, dtype=dtype))
    # Without channels PyTorch has no weight[0] to multiply its nothing by.
    numbers = () if shape[1] == 0 else (weight, bias)
    running = {"running_mean": running_mean, "running_var": running_var}
    want = run(F.batch_norm, g, *numbers, training=training, **running)
    for mask in (None, torch.ones(shape[0])):
        got = run(batch_norm, g, *numbers, training=training, mask=mask, **running)
        for name in want:
            assert (got[name].shape, got[name].dtype) == (want[name].shape, dtype)
            np.testing.assert_array_equal(got[name].float(), want[name].float())
        assert got["y"].stride() == want["y"].stride()
    assert running_mean.unique().tolist() in ([], [1.0])
    assert running_var.unique().tolist() in ([], [2.0])


# --- Masks -----------------------------------------------------------------------------------------------------------


def draw_mask(shape: tuple[int, ...], dtype: str) -> Tensor:
    weights = torch.from_numpy(np.random.default_rng(shape).integers(0, 3, shape))
    weights.flatten()[:2] = torch.tensor([0, 1])
    return weights.to(getattr(torch, dtype))


@BOTH_FORMATS
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_any_shape_and_type_says_what_counts(name: str, layout: Layout, path: str) -> None:
    g = given(layout)
    mask = draw_mask(*MASKS[name])
    n, _, h, w = layout.shape
    # The definition broadcasts nothing.
    full = mask.reshape(mask.shape + (1,) * (3 - mask.dim())).expand(n, h, w)
    for given_mask in (mask, full):
        got = run(batch_norm, g, g.weight, g.bias, training=True, mask=given_mask)
        assert_exact(got, exact(g, g.weight, g.bias, mask=full), g, np.float64, definition.moments(g.x, full).var)


@BOTH_FORMATS
def test_a_mask_may_have_any_strides(layout: Layout, path: str) -> None:
    g = given(layout)
    want = exact(g, g.weight, g.bias, mask=g.mask)
    turned = g.mask.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not turned.is_contiguous()
    for mask in (turned, g.mask.repeat(1, 1, 2)[..., : g.x.shape[-1]], torch._neg_view(-g.mask)):
        got = run(batch_norm, g, g.weight, g.bias, training=True, mask=mask)
        assert_exact(got, want, g, np.float64, definition.moments(g.x, g.mask).var)


@BOTH_FORMATS
def test_what_the_mask_leaves_out_has_no_say(layout: Layout, path: str) -> None:
    g = given(layout)
    out = (g.mask == 0).unsqueeze(1).expand(g.x.shape)
    results = []
    for x in (g.x, g.x.masked_fill(out, torch.nan), g.x.masked_fill(out, torch.inf)):
        running_mean, running_var = torch.zeros(3).double(), torch.ones(3).double()
        y = batch_norm(layout.lay(x), running_mean, running_var, training=True, mask=g.mask)
        results.append((running_mean, running_var, y[~out]))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got, want)


@BOTH_FORMATS
def test_a_mask_that_keeps_all_is_none(layout: Layout, path: str) -> None:
    g = given(layout)
    want = exact(g, g.weight, g.bias)
    for mask in (torch.ones(4, dtype=torch.bool), torch.ones(4, 5, 6)):
        got = run(batch_norm, g, g.weight, g.bias, training=True, mask=mask)
        assert_exact(got, want, g, np.float64)


def test_without_the_batch_there_is_nothing_to_mask(path: str) -> None:
    g = given(IMAGES)
    running = {"running_mean": g.running_mean, "running_var": g.running_var}
    for how in ({"training": False}, {"training": True, "statistics": RunningStatistics()}):
        want = run(batch_norm, g, g.weight, g.bias, **running, **how)
        for mask in (g.mask, 0 * g.mask):
            got = run(batch_norm, g, g.weight, g.bias, mask=mask, **running, **how)
            for name in want:
                np.testing.assert_array_equal(got[name], want[name])


# --- Running statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics_move_as_those_of_torch(momentum: float, dtype: Any, path: str) -> None:
    ours, theirs = ((torch.zeros(3, dtype=t.dtype), torch.ones_like(t)) for t in [given(IMAGES, dtype).weight] * 2)
    for layout in (IMAGES, IMAGES_LAST):
        x = given(layout, dtype, offset=3.0).x
        batch_norm(x, *ours, training=True, momentum=momentum)
        F.batch_norm(x, *theirs, training=True, momentum=momentum)
        for got, want in zip(ours, theirs, strict=True):
            assert relative_error(got.numpy(), want.numpy()) < tolerance(dtype, x.numel() // 3)


def test_the_running_variance_is_unbiased(path: str) -> None:
    g = given(IMAGES)
    for mask in (None, g.mask):
        moments = definition.moments(g.x, mask)
        want = definition.update_running(g.running_mean, g.running_var, moments, 0.3)
        got = g.running_mean.clone(), g.running_var.clone()
        batch_norm(g.x, *got, training=True, momentum=0.3, mask=mask)
        for value, expected in zip(got, want, strict=True):
            assert relative_error(value.numpy(), expected) < tolerance(np.float64, int(moments.count))
        biased = definition.update_running(g.running_mean, g.running_var, moments, 0.3, unbiased=False)
        assert relative_error(got[1].numpy(), biased[1]) > 1e-3


def test_running_statistics_may_be_views(path: str) -> None:
    g = given(MATRIX)
    want = torch.zeros(5).double(), torch.ones(5).double()
    both = torch.stack(want, dim=1)
    batch_norm(g.x, *want, training=True)
    batch_norm(g.x, *both.unbind(1), training=True)
    np.testing.assert_array_equal(both, torch.stack(want, dim=1))


def test_autograd_is_told_that_running_statistics_changed(path: str) -> None:
    g = given(MATRIX)
    y = (leaf(g.bias) * g.running_mean * g.running_var).sum()
    batch_norm(g.x, g.running_mean, g.running_var, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_running_statistics_of_a_batch_far_from_zero(path: str) -> None:
    """PyTorch's operation is tried first on a small batch, and what it did to the running statistics is undone."""
    offset = 1e4
    g = given(IMAGES, offset=offset)
    want = definition.update_running(g.running_mean, g.running_var, definition.moments(g.x), 0.1)
    got = g.running_mean.clone(), g.running_var.clone()
    batch_norm(g.x, *got, training=True)
    for value, expected in zip(got, want, strict=True):
        assert relative_error(value.numpy(), expected) < offset * tolerance(np.float64, g.x.numel() // 3)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e30])  # the square of 1e30 is not a float32
def test_a_batch_that_is_not_finite_changes_no_running_statistics(poison: float, path: str) -> None:
    g = given(IMAGES, np.float32)
    bad = g.x.clone()
    bad[1, 2, 3, 4] = poison
    running = g.running_mean.clone(), g.running_var.clone()
    y = batch_norm(bad, *running, training=True)
    assert torch.equal(running[0], g.running_mean)
    assert torch.equal(running[1], g.running_var)
    # What is not finite in the batch is so in y: nothing is hidden from the loss.
    assert bool(y[:, 2].isnan().any()) != np.isfinite(poison)
    assert y[:, :2].isfinite().all()
    batch_norm(g.x, *running, training=True)
    want = definition.update_running(g.running_mean, g.running_var, definition.moments(g.x), 0.1)
    for got, expected in zip(running, want, strict=True):
        assert relative_error(got.numpy(), expected) < tolerance(np.float32)


def test_a_variance_beyond_the_running_type_is_not_finite() -> None:
    x = 400 * torch.from_numpy(batch((50, 3), np.float32).x).half()
    running_mean, running_var = torch.zeros(3).half(), torch.ones(3).half()
    batch_norm(x, running_mean, running_var, training=True)
    assert x.isfinite().all()
    assert (running_mean.tolist(), running_var.tolist()) == ([0, 0, 0], [1, 1, 1])


@pytest.mark.parametrize("layout", [MATRIX, IMAGES, IMAGES_LAST], ids=str)
def test_frozen_statistics_stay_and_are_constants(layout: Layout, path: str) -> None:
    g = given(layout)
    running = {"running_mean": g.running_mean.clone(), "running_var": g.running_var.clone()}
    extras = {"activation": "silu", "residual": g.residual}
    got = run(batch_norm, g, g.weight, g.bias, training=True, statistics=RunningStatistics(), **running, **extras)
    assert_exact(got, exact(g, g.weight, g.bias, **running, **extras), g, np.float64, g.running_var)
    assert torch.equal(running["running_mean"], g.running_mean)
    assert torch.equal(running["running_var"], g.running_var)


def test_the_batch_is_the_default(path: str) -> None:
    g = given(MATRIX)
    want = run(batch_norm, g, training=True)
    got = run(batch_norm, g, training=True, statistics=BatchStatistics())
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize("statistics", [None, RunningStatistics()], ids=["batch", "frozen"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_later_batch_does_not_reach_back_into_the_gradient(create_graph: bool, statistics: Any, path: str) -> None:
    g = given(IMAGES)
    running = {"running_mean": g.running_mean.clone(), "running_var": g.running_var.clone()}
    want = exact(g, g.weight, g.bias, **running if statistics else {})
    inputs = leaf(g.x), leaf(g.weight), leaf(g.bias)
    y = batch_norm(inputs[0], *running.values(), *inputs[1:], training=True, statistics=statistics)
    batch_norm(3 * g.x + 5, *running.values(), training=True, momentum=0.9)
    grads = torch.autograd.grad(y, inputs, g.dy, create_graph=create_graph)
    got = {name: grad.detach() for name, grad in zip(("dx", "d_weight", "d_bias"), grads, strict=True)}
    assert_exact(got, want, g, np.float64, g.running_var if statistics else None)


# --- Errors ----------------------------------------------------------------------------------------------------------

X, ONE = torch.ones(4, 3), torch.ones(3)
LIKE_TORCH: dict[str, tuple[dict[str, Any], str]] = {
    "too few running means": ({"running_mean": ONE[:2]}, r"running_mean .* 3 elements.* \(2,\).*\(4, 3\)"),
    "too few running variances": ({"running_var": ONE[:2]}, r"running_var .* 3 elements.* \(2,\).*\(4, 3\)"),
    "too few weights": ({"weight": ONE[:2]}, r"weight .* 3 elements.* \(2,\).*\(4, 3\)"),
    "too many biases": ({"bias": X.flatten()}, r"bias .* 3 elements.* \(12,\).*\(4, 3\)"),
    "running mean of two axes": ({"running_mean": ONE[None]}, r"running_mean .* 3 elements.* \(1, 3\)"),
    "one value per channel": ({"x": X[:1]}, r"more than 1 value per channel .*\[1, 3\].*\(drop_last=True\)"),
    "one pixel": ({"x": X[:1, :, None, None]}, r"more than 1 value per channel .*\[1, 3, 1, 1\]"),
    "integers": ({"x": X.long()}, r"torch.int64.*x.float\(\)"),
    "complex numbers": ({"x": X.cfloat()}, r"torch.complex64"),
    "x of another type": ({"x": X.double()}, r"x is torch.float64 and running_mean is torch.float32.*\.to\(x.dtype\)"),
    "weight of another type": ({"weight": ONE.double()}, r"x is torch.float32 and weight is torch.float64"),
    "bias of another type": ({"weight": ONE, "bias": ONE.double()}, r"x is torch.float32 and bias is torch.float64"),
    "weight on another device": ({"weight": ONE.to("meta")}, "device"),
    "no running statistics": ({"running_mean": None, "running_var": None, "training": False}, "pass both"),
    "no running variance": ({"running_var": None}, "either both be None or neither"),
    "no running variance in evaluation": ({"running_var": None, "training": False}, "pass both"),
    "negative eps": ({"eps": -1e-5}, "eps .* -1e-05"),
}


def error_of(call: Callable[[], Any]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("there was no error")


@pytest.mark.parametrize("name", LIKE_TORCH)
def test_errors_are_of_the_type_of_those_of_torch(name: str) -> None:
    wrong, words = LIKE_TORCH[name]
    arguments = {"x": X, "running_mean": ONE.clone(), "running_var": ONE.clone(), "training": True, **wrong}
    x = arguments.pop("x")
    theirs = {key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    expected = type(error_of(lambda: F.batch_norm(x, **theirs)))
    with pytest.raises(expected, match=words) as raised:
        batch_norm(x, **arguments)
    assert raised.type is expected
    for running in ("running_mean", "running_var"):
        assert arguments[running] is None or torch.all(arguments[running] == 1)


OUR_OWN: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "one axis": (ValueError, {"x": ONE}, r"\(N, C, \*spatial\), got \(3,\)"),
    "weight of two axes": (RuntimeError, {"weight": ONE[None]}, r"weight .* 3 elements.* \(1, 3\)"),
    "residual of another shape": (ValueError, {"residual": X[:1]}, r"shape of x, \(4, 3\), got \(1, 3\)"),
    "mask of another shape": (ValueError, {"mask": ONE}, r"mask of shape \(3,\) .* x of shape \(4, 3\): .* \(4,\)"),
    "mask with channels": (ValueError, {"mask": X}, r"mask of shape \(4, 3\) .* without channels"),
    "mask without axes": (ValueError, {"mask": ONE[0]}, r"mask of shape \(\)"),
    "negative mask": (ValueError, {"mask": -X[:, 0]}, "mask must hold booleans, or weights that are finite"),
    "NaN in a mask": (ValueError, {"mask": X[:, 0] * torch.nan}, "mask must hold booleans"),
    "infinity in a mask": (ValueError, {"mask": X[:, 0] * torch.inf}, "mask must hold booleans"),
    "mask that leaves nothing": (ValueError, {"mask": 0 * X[:, 0]}, r"leaves no position of x of shape \(4, 3\): skip"),
    "mask that leaves one": (ValueError, {"mask": X[:, 0] * torch.eye(4)[0]}, "more than 1 value .* mask keeps one"),
    "unknown activation": (ValueError, {"activation": "rleu"}, "unknown activation 'rleu'.* 'relu'.*leaky_relu"),
    "unknown statistics": (TypeError, {"statistics": "running"}, r"RunningStatistics\(\), .*got 'running'"),
    "class for an object": (TypeError, {"statistics": RunningStatistics}, r"got <class .*with parentheses"),
    "frozen, without statistics": (
        RuntimeError, {"running_mean": None, "running_var": None, "statistics": RunningStatistics()}, "pass both"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OUR_OWN)
def test_errors_say_what_was_given_and_lose_nothing(name: str, path: str) -> None:
    expected, wrong, words = OUR_OWN[name]
    arguments = {"x": X, "running_mean": ONE.clone(), "running_var": ONE.clone(), "training": True, **wrong}
    with pytest.raises(expected, match=words):
        batch_norm(**arguments)
    for running in ("running_mean", "running_var"):
        assert arguments[running] is None or torch.all(arguments[running] == 1)


# --- Accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize(
    "layout",
    [
        Layout("small-matrix", (32, 8), lambda t: t),
        Layout("small-images", (4, 3, 20, 20), lambda t: t),
        Layout("small-images-channels-last", (4, 3, 20, 20), channels_last),
        Layout("large-images", (16, 16, 48, 48), lambda t: t),
        Layout("large-images-channels-last", (16, 16, 48, 48), channels_last),
    ],
    ids=str,
)
def test_the_error_is_at_most_twice_that_of_torch(layout: Layout, ratio: float) -> None:
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(3):
        g = given(layout, np.float32, seed=seed, offset=ratio)
        want = exact(g, g.weight, g.bias)
        batch_moments = definition.moments(g.x)
        want["mean"], want["var"] = definition.update_running(*np.zeros((2, g.x.shape[1])), batch_moments, 1.0)
        got = []
        for function in (batch_norm, F.batch_norm):
            mean, var = torch.zeros_like(g.weight), torch.zeros_like(g.weight)
            running = {"running_mean": mean, "running_var": var}
            result = run(function, g, g.weight, g.bias, training=True, momentum=1.0, **running)
            got.append(result | {"mean": mean, "var": var})
        for name in got[0]:
            # The standard deviation is 1: where all is well, no value is of a smaller size.
            size = max(1.0, rms(want[name]))
            ours, theirs = (rms(result[name].double().numpy() - want[name]) / size for result in got)
            errors.setdefault(name, []).append((ours, theirs))
    floor = float(np.finfo(np.float32).eps)
    for name, pairs in errors.items():
        ours, theirs = (rms(np.array(column)) for column in zip(*pairs, strict=True))
        assert ours <= max(2 * theirs, floor), name


@pytest.mark.parametrize("wrong", [5j, "s", [1.0, 2.0, 3.0], np.ones(3)], ids=["number", "text", "list", "array"])
@pytest.mark.parametrize("name", ["x", "running_mean", "running_var", "weight", "bias", "residual", "mask", "eps"])
def test_an_argument_of_the_wrong_kind(name: str, wrong: Any) -> None:
    mean = torch.zeros(3)
    given = {"x": torch.randn(6, 3), "running_mean": mean, "running_var": torch.ones(3), "training": True} | {
        name: wrong
    }
    with pytest.raises(TypeError) as caught:
        batch_norm(**given)
    assert re.match(f"{name} must be a (tensor|number), got ", str(caught.value))
    assert "\n" not in str(caught.value)
    assert not mean.any()


@pytest.mark.parametrize(
    "wrong", [5, "s", None, [1.0], np.ones((4, 3))], ids=["number", "text", "None", "list", "array"]
)
def test_a_layer_says_that_its_input_is_no_tensor(wrong: Any) -> None:
    layer = BatchNorm1d(3)
    with pytest.raises(TypeError, match=r"^BatchNorm1d\(3\): mask must be a tensor, got int"):
        layer(torch.ones(4, 3), mask=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=rf"BatchNorm1d\(3\): the input must be a tensor, got {type(wrong).__name__}"):
        layer(wrong)
    assert layer.num_batches_tracked == 0
