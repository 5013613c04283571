"""Every stage against the definition in float64: walks, types, activations, masks, residuals, groups, NaN."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    ACTIVATIONS,
    GPU_SHAPES,
    GPU_SHAPES_OF_DEFAULT_TILES,
    half_precision_tolerance,
    relative_error,
    tolerance,
)

from batchnorm import definition
from batchnorm.definition import ActivationSpec, Moments
from batchnorm.kernels import gpu

Tensor = torch.Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
EPS = 1e-5

SMALL = gpu.Tuning(
    tile_bytes=256, columns=16, warps=1, slices=2, part_tiles=2, tasks=1, wave_bytes=1, alone_bytes=0, alone_units=0,
    stream_bytes=1 << 30, merge=32,
)  # fmt: skip
"""Tiles so small that small tensors have several parts, and waves of one unit."""

ONE_WAVE = SMALL._replace(wave_bytes=0, part_tiles=1, stream_bytes=0)
ALONE = SMALL._replace(alone_bytes=1 << 30)


def array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().cpu().double().numpy()


@dataclass
class Layer:
    """A batch on the device, with everything that can come with it, and room for what comes out, full of NaN."""

    x: Tensor
    dy: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    counts: Tensor | None
    activation: ActivationSpec
    tuning: gpu.Tuning | None
    groups: int = 1

    def __post_init__(self) -> None:
        self.y, self.dx, self.d_residual = (torch.full_like(self.x, math.nan) for _ in range(3))
        shape = (self.groups, self.x.shape[1]) if self.groups > 1 else (self.x.shape[1],)
        self.mean, self.var, self.rstd, self.sum_dz, self.sum_dz_xhat = (
            torch.full(shape, math.nan, device=DEVICE) for _ in range(5)
        )
        self.count = torch.full((self.groups,), math.nan, device=DEVICE)

    @property
    def options(self) -> dict[str, Any]:
        return {"tuning": self.tuning, "groups": self.groups}

    @property
    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        return self.weight, self.bias

    def forward(self, **options: Any) -> None:
        gpu.forward(
            self.x, self.residual, self.counts, *self.affine, EPS, self.activation,
            self.y, self.mean, self.var, self.rstd, self.count, **self.options, **options,
        )  # fmt: skip

    def backward(self, count: Any = None, of_output: bool = False) -> None:
        gpu.backward(
            self.dy, self.x, self.y if of_output else self.residual, self.counts, self.mean, self.rstd, *self.affine,
            count, self.activation,
            self.sum_dz, self.sum_dz_xhat, self.dx, None if self.residual is None else self.d_residual,
            of_output=of_output, **self.options,
        )  # fmt: skip

    def stages_forward(self) -> None:
        gpu.moments(self.x, self.counts, self.mean, self.var, self.count, **self.options)
        torch.rsqrt(self.var + EPS, out=self.rstd)
        gpu.normalize(
            self.x, self.residual, self.mean, self.rstd, *self.affine, self.activation, self.y, **self.options
        )

    def stages_backward(self) -> None:
        gpu.grad_sums(
            self.dy, self.x, self.residual, self.mean, self.rstd, *self.affine, self.activation,
            self.sum_dz, self.sum_dz_xhat, **self.options,
        )  # fmt: skip
        gpu.grad_input(
            self.dy, self.x, self.residual, self.counts, self.mean, self.rstd, *self.affine,
            self.sum_dz, self.sum_dz_xhat, self.count, self.activation,
            self.dx, None if self.residual is None else self.d_residual, **self.options,
        )  # fmt: skip


def layer(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    activation: ActivationSpec = "relu",
    *,
    residual: bool = False,
    mask: bool = False,
    affine: bool = True,
    offset: float = 0.0,
    tuning: gpu.Tuning | None = SMALL,
    groups: int = 1,
) -> Layer:
    """A seeded batch about `offset`. `dy` is 0 near a kink, where rounding decides on which side `z` falls."""
    rng = np.random.default_rng([*shape, residual, mask])

    def tensor(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.float32)).to(DEVICE, dtype)

    n, channels, positions = shape
    counts = rng.choice([0.0, 0.5, 1.0, 2.0], (n, positions))
    counts.flat[[0, -1, positions // 2]] = 0.0, 1.0, 2.0
    drawn = Layer(
        tensor(rng.normal(size=shape) + offset, dtype),
        tensor(rng.normal(size=shape), dtype),
        tensor(rng.uniform(0.5, 2.0, channels), torch.float32) if affine else None,
        tensor(rng.normal(size=channels), torch.float32) if affine else None,
        tensor(rng.normal(size=shape), dtype) if residual else None,
        tensor(counts, torch.float32) if mask else None,
        activation, tuning, groups,
    )  # fmt: skip
    for at in samples_of(drawn):
        z, _ = definition.forward(
            array(drawn.x)[at], array(drawn.weight), array(drawn.bias),
            array(drawn.residual)[at] if residual else None, None, array(drawn.counts)[at] if mask else None, EPS,
        )  # fmt: skip
        near = np.min([np.abs(z - kink) for kink in (-3, 0, 3, 6)], axis=0) < 1e-3
        drawn.dy[at] *= torch.from_numpy(~near).to(DEVICE, dtype)
    return drawn


def samples_of(drawn: Layer) -> list[slice]:
    """The samples of each group."""
    small, larger = divmod(drawn.x.shape[0], drawn.groups)
    ends = np.cumsum([0] + [small + (group < larger) for group in range(drawn.groups)])
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]


def assert_near(value: Tensor, exact: Any, terms: int = 1) -> None:
    assert value.shape == exact.shape
    error = np.abs(array(value) - exact)
    if value.dtype == torch.float32:
        assert relative_error(array(value), exact) <= tolerance(np.float32, terms)
    else:
        eps = torch.finfo(value.dtype).eps
        if INTERPRETED and value.dtype == torch.bfloat16:
            eps *= 2  # the interpreter cuts digits off, where a GPU rounds
        assert (error <= half_precision_tolerance(eps, exact)).all(), error.max()


def assert_forward(drawn: Layer) -> None:
    for group, at in enumerate(samples_of(drawn)):
        y, moments = definition.forward(
            array(drawn.x)[at], array(drawn.weight), array(drawn.bias),
            None if drawn.residual is None else array(drawn.residual)[at], drawn.activation,
            None if drawn.counts is None else array(drawn.counts)[at], EPS,
        )  # fmt: skip
        pick = (lambda t, g=group: t[g]) if drawn.groups > 1 else (lambda t: t)
        assert_near(drawn.y[at], y)
        assert_near(pick(drawn.mean), moments.mean, int(moments.count))
        assert_near(pick(drawn.var), moments.var, int(moments.count))
        assert_near(pick(drawn.rstd), definition.reciprocal_std(moments.var, EPS), int(moments.count))
        assert drawn.count[group].item() == moments.count


def assert_backward(drawn: Layer) -> None:
    for group, at in enumerate(samples_of(drawn)):
        dx, d_weight, d_bias, d_residual = definition.backward(
            array(drawn.dy)[at], array(drawn.x)[at], array(drawn.weight), array(drawn.bias),
            None if drawn.residual is None else array(drawn.residual)[at], drawn.activation,
            None if drawn.counts is None else array(drawn.counts)[at], EPS,
        )  # fmt: skip
        pick = (lambda t, g=group: t[g]) if drawn.groups > 1 else (lambda t: t)
        terms = dx[:, 0].size
        # Moments with this relative error, and sums of this many terms, come into every dx of a channel.
        assert_near(drawn.dx[at], dx, terms)
        assert_near(pick(drawn.sum_dz_xhat), d_weight, terms)
        assert_near(pick(drawn.sum_dz), d_bias, terms)
        if drawn.residual is not None:
            assert_near(drawn.d_residual[at], d_residual)


# --- Walks, masks, residuals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_forward_and_backward(shape: tuple[int, int, int], residual: bool, mask: bool) -> None:
    drawn = layer(shape, residual=residual, mask=mask)
    drawn.forward()
    assert_forward(drawn)
    drawn.backward(drawn.count if mask else None)
    assert_backward(drawn)


@pytest.mark.parametrize("tuning", [SMALL, ALONE], ids=["parts", "alone"])
@pytest.mark.parametrize("shape", [(3, 2, 67), (9, 5, 7), (9, 20, 1)])
def test_relu_by_its_output(shape: tuple[int, int, int], tuning: gpu.Tuning) -> None:
    drawn = layer(shape, tuning=tuning, residual=True, mask=True)
    drawn.forward()
    drawn.backward(drawn.count, of_output=True)
    assert_backward(drawn)


@pytest.mark.parametrize("tuning", [ONE_WAVE, ALONE], ids=["one-wave", "alone"])
@pytest.mark.parametrize("shape", [(3, 2, 67), (9, 5, 7), (9, 20, 1)])
def test_other_ways_to_cut(shape: tuple[int, int, int], tuning: gpu.Tuning) -> None:
    drawn = layer(shape, tuning=tuning, residual=True, mask=True)
    drawn.forward()
    assert_forward(drawn)
    drawn.backward(drawn.count)
    assert_backward(drawn)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("shape", [(3, 2, 64), (9, 5, 7), (9, 20, 1)])
def test_stage_by_stage(shape: tuple[int, int, int], mask: bool) -> None:
    drawn = layer(shape, residual=True, mask=mask)
    drawn.stages_forward()
    assert_forward(drawn)
    drawn.stages_backward()
    assert_backward(drawn)


@pytest.mark.parametrize("shape", GPU_SHAPES_OF_DEFAULT_TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_as_the_table_has_them(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    drawn = layer(shape, dtype, tuning=None)
    drawn.forward()
    assert_forward(drawn)
    drawn.backward(shape[0] * shape[2])
    assert_backward(drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 2, 64), (9, 8, 7), (9, 20, 1)])
def test_half_precision(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    drawn = layer(shape, dtype, residual=True)
    drawn.forward()
    assert_forward(drawn)
    drawn.backward()
    assert_backward(drawn)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation: ActivationSpec) -> None:
    drawn = layer((40, 8, 1), activation=activation, residual=True, tuning=None)
    drawn.forward()
    assert_forward(drawn)
    drawn.backward()
    assert_backward(drawn)


@pytest.mark.parametrize("activation", ["elu", "tanh", "gelu", "silu"])
def test_small_values_keep_their_digits(activation: str) -> None:
    """Where the textbook formula would subtract nearly equal numbers."""
    z = np.array([[-1e-6], [-3e-4], [-0.02], [-0.49], [-0.51], [1e-7], [3e-3], [-3.0]], np.float32)
    x = torch.from_numpy(z).unsqueeze(-1).to(DEVICE)
    y = torch.full_like(x, math.nan)
    gpu.normalize(
        x, None, torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE), None, None, activation, y
    )  # fmt: skip
    exact = definition.activate(z, activation)
    assert np.max(np.abs(array(y)[..., 0] / exact - 1)) < 20 * np.finfo(np.float32).eps


def test_kinks_are_as_in_the_definition() -> None:
    z = np.array([-3.0, -0.0, 0.0, 3.0, 6.0, math.nan, math.inf, -math.inf], np.float32)
    x = torch.from_numpy(z).reshape(-1, 1, 1).to(DEVICE)
    zero, one = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
    for activation in ACTIVATIONS:
        y, dx = torch.full_like(x, 7.0), torch.full_like(x, 7.0)
        gpu.normalize(x, None, zero, one, None, None, activation, y)
        gpu.grad_input(
            torch.ones_like(x), x, None, None, zero, one, None, None, zero, zero, math.inf, activation, dx, None
        )
        np.testing.assert_allclose(array(y).ravel(), definition.activate(z, activation), rtol=1e-5, atol=1e-6)
        finite = slice(0, 6)
        exact = definition.activate_grad(z[finite], activation)
        np.testing.assert_allclose(array(dx).ravel()[finite], exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_other_types(dtype: torch.dtype) -> None:
    drawn = layer((9, 20, 1), tuning=None)
    drawn.weight, drawn.bias = drawn.weight.to(dtype), drawn.bias.to(dtype)
    drawn.dy = layer((9, 20, 1), activation=None).dy
    drawn.activation = None
    drawn.forward()
    assert_forward(drawn)
    drawn.backward()
    assert_backward(drawn)


def test_without_weight_and_bias() -> None:
    drawn = layer((9, 5, 7), affine=False)
    drawn.forward()
    assert_forward(drawn)
    drawn.backward()
    assert_backward(drawn)


# --- Statistics and sums in one tensor each, and tensors of other shapes ----------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(7, 2, 64), (7, 5, 7), (25, 20, 1)])
def test_packed(shape: tuple[int, int, int], affine: bool, groups: int) -> None:
    drawn = layer(shape, residual=True, mask=True, affine=affine, groups=groups)
    channels = shape[1]
    statistics = torch.full((4, groups, channels), math.nan, device=DEVICE)
    sums = torch.full((2, groups, channels), math.nan, device=DEVICE)
    running = gpu.Running(torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE), 0.25)
    flat = {name: getattr(drawn, name).flatten() for name in ("x", "dy", "residual", "counts", "y", "dx", "d_residual")}
    for _ in range(2):
        gpu.forward_packed(
            flat["x"], flat["residual"], flat["counts"], *drawn.affine, EPS, drawn.activation, flat["y"], statistics,
            drawn.count, shape=shape, running=running, groups=groups, tuning=SMALL,
        )  # fmt: skip
        drawn.mean, drawn.var, drawn.rstd = (row if groups > 1 else row[0] for row in statistics[:3])
        assert_forward(drawn)
        kept = torch.zeros(channels, device=DEVICE) if drawn.bias is None else drawn.bias.clone()
        assert torch.equal(statistics[3], kept.expand(groups, channels))
        if drawn.bias is not None:
            drawn.bias.fill_(math.nan)  # which backward does not read again
        gpu.backward_packed(
            flat["dy"], flat["x"], flat["residual"], flat["counts"], drawn.weight, statistics, drawn.count,
            drawn.activation, *sums, flat["dx"], flat["d_residual"], shape=shape, tuning=SMALL,
        )  # fmt: skip
        if drawn.bias is not None:
            drawn.bias.copy_(kept)
        drawn.sum_dz, drawn.sum_dz_xhat = (row if groups > 1 else row[0] for row in sums)
        assert_backward(drawn)
    whole = definition.moments(array(drawn.x), array(drawn.counts))
    mean, var = np.zeros(channels), np.ones(channels)
    for _ in range(2):
        mean, var = definition.update_running(mean, var, whole, 0.25)
    assert_near(running.mean, mean, int(whole.count))
    assert_near(running.var, var, int(whole.count))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(7, 2, 64), (7, 5, 7), (25, 20, 1)])
def test_packed_by_constants(shape: tuple[int, int, int], affine: bool) -> None:
    """They take the place of what is measured, are kept, and do not move."""
    drawn = layer(shape, activation="silu", residual=True, affine=affine)
    mean, var = (torch.linspace(first, 2, shape[1], device=DEVICE) for first in (-1, 0))
    before, statistics = mean.clone(), torch.full((4, 1, shape[1]), math.nan, device=DEVICE)
    gpu.forward_packed(
        drawn.x, drawn.residual, None, *drawn.affine, EPS, "silu", drawn.y, statistics, shape=shape,
        running=gpu.Running(mean, var), constant=True, tuning=SMALL,
    )  # fmt: skip
    rstd = definition.reciprocal_std(array(var), EPS)
    affines = array(drawn.weight), array(drawn.bias)
    assert_near(
        drawn.y, definition.normalize(array(drawn.x), array(mean), rstd, *affines, array(drawn.residual), "silu")
    )
    assert torch.equal(mean, before)
    assert torch.equal(statistics[:2, 0], torch.stack([mean, var]))
    assert_near(statistics[2, 0], rstd)
    assert torch.equal(statistics[3, 0], torch.zeros_like(mean) if drawn.bias is None else drawn.bias)


def test_a_shape_of_other_size() -> None:
    x = torch.ones(4, 3, 5, device=DEVICE)
    with pytest.raises(ValueError, match=r"x of shape \(4, 3, 5\) cannot be seen as \(4, 3, 6\)"):
        gpu.moments(x, None, torch.empty(3, device=DEVICE), torch.empty(3, device=DEVICE), shape=(4, 3, 6))


# --- What backward may leave out --------------------------------------------------------------------------------------


def test_constant_statistics() -> None:
    drawn = layer((9, 5, 7), activation="silu", residual=True)
    drawn.forward()
    drawn.backward(math.inf)
    arguments = (array(drawn.weight), array(drawn.bias), array(drawn.residual), "silu")
    mean, rstd = array(drawn.mean), array(drawn.rstd)
    d_bias, d_weight = definition.grad_sums(array(drawn.dy), array(drawn.x), mean, rstd, *arguments)
    dx, d_residual = definition.grad_input(
        array(drawn.dy), array(drawn.x), mean, rstd, d_bias, d_weight, math.inf, *arguments
    )
    assert_near(drawn.dx, dx)
    assert_near(drawn.d_residual, d_residual)
    assert_near(drawn.sum_dz, d_bias, 63)
    assert_near(drawn.sum_dz_xhat, d_weight, 63)
    at_once = drawn.dx.clone()
    drawn.dx.fill_(math.nan)
    gpu.grad_input(
        drawn.dy, drawn.x, drawn.residual, None, drawn.mean, drawn.rstd, *drawn.affine,
        torch.full_like(drawn.mean, math.inf), drawn.sum_dz_xhat, math.inf, "silu", drawn.dx, None, tuning=SMALL,
    )  # fmt: skip
    torch.testing.assert_close(drawn.dx, at_once, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", ["dx", "d_residual", "neither"])
def test_gradients_that_nobody_wants(wanted: str) -> None:
    drawn = layer((9, 20, 1), residual=True)
    drawn.forward()
    gpu.backward(
        drawn.dy, drawn.x, drawn.residual, None, drawn.mean, drawn.rstd, *drawn.affine, None, "relu",
        drawn.sum_dz, drawn.sum_dz_xhat, drawn.dx if wanted == "dx" else None,
        drawn.d_residual if wanted == "d_residual" else None, tuning=SMALL,
    )  # fmt: skip
    dx, d_weight, d_bias, d_residual = definition.backward(
        array(drawn.dy), array(drawn.x), array(drawn.weight), array(drawn.bias), array(drawn.residual), "relu"
    )
    assert_near(drawn.sum_dz, d_bias, 9)
    assert_near(drawn.sum_dz_xhat, d_weight, 9)
    for name, value, exact in (("dx", drawn.dx, dx), ("d_residual", drawn.d_residual, d_residual)):
        if wanted == name:
            assert_near(value, exact, 9)
        else:
            assert value.isnan().all()


# --- Numbers that are hard --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 2, 64), (20, 5, 7), (50, 20, 1)])
@pytest.mark.parametrize("mask", [False, True])
def test_mean_of_ten_thousand_deviations(shape: tuple[int, int, int], mask: bool) -> None:
    drawn = layer(shape, activation=None, offset=1e4, mask=mask)
    drawn.forward()
    exact = definition.moments(array(drawn.x), array(drawn.counts))
    assert_near(drawn.var, exact.var, int(exact.count))
    rounding = np.abs(array(drawn.mean) - exact.mean)
    assert (rounding <= np.spacing(np.float32(1e4)) / 2 * 1.01).all()  # of the mean to float32, and nothing else
    y, _ = definition.forward(array(drawn.x), array(drawn.weight), array(drawn.bias), None, None, array(drawn.counts))
    scale = array(drawn.weight) * array(drawn.rstd)
    allowed = (rounding * scale)[:, None] + tolerance(np.float32, int(exact.count)) * max(1, np.abs(y).max())
    assert (np.abs(array(drawn.y) - y) <= allowed).all()


@pytest.mark.parametrize("shape", [(4, 2, 64), (20, 5, 7), (50, 20, 1)])
@pytest.mark.parametrize("mask", [False, True])
def test_outliers_in_first_place(shape: tuple[int, int, int], mask: bool) -> None:
    """What all other values are measured from is a thousand deviations away."""
    drawn = layer(shape, mask=mask)
    drawn.x[0, :, :] = 1e3
    if drawn.counts is not None:
        drawn.counts[0, -1] = 1.0
    drawn.forward()
    exact = definition.moments(array(drawn.x), array(drawn.counts))
    error = np.abs(array(drawn.var) / exact.var - 1)
    assert error.max() <= (1 + SMALL.part_tiles) * tolerance(np.float32, int(exact.count))


@pytest.mark.parametrize("shape", [(4, 3, 64), (20, 5, 7), (50, 20, 1)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_channel(shape: tuple[int, int, int], value: float) -> None:
    drawn = layer(shape)
    drawn.x[-1, 1, 0] = value
    drawn.forward()
    others = [c for c in range(shape[1]) if c != 1]
    y, moments = definition.forward(array(drawn.x)[:, others], array(drawn.weight)[others], array(drawn.bias)[others],
                                    activation="relu")  # fmt: skip
    assert_near(drawn.y[:, others], y)
    assert_near(drawn.mean[others], moments.mean, shape[0] * shape[2])
    assert drawn.y[:, 1].isnan().all()
    assert drawn.mean[1].isnan()
    assert drawn.var[1].isnan()
    drawn.backward()
    assert drawn.dx[:, 1].isnan().all()
    assert not drawn.dx[:, others].isnan().any()


@pytest.mark.parametrize("shape", [(4, 3, 64), (9, 5, 7), (9, 20, 1)])
def test_what_the_mask_leaves_out_may_be_nan(shape: tuple[int, int, int]) -> None:
    drawn = layer(shape, mask=True)
    left_out = (drawn.counts == 0)[:, None].expand(shape)
    clean = drawn.x.clone()
    drawn.x[left_out] = math.nan
    drawn.forward()
    exact = definition.moments(array(clean), array(drawn.counts))
    assert_near(drawn.mean, exact.mean, int(exact.count))
    assert_near(drawn.var, exact.var, int(exact.count))
    assert torch.equal(drawn.y.isnan(), left_out)


@pytest.mark.parametrize("shape", [(4, 3, 64), (9, 5, 7), (9, 20, 1)])
def test_a_mask_of_nothing(shape: tuple[int, int, int]) -> None:
    drawn = layer(shape, mask=True)
    drawn.counts.zero_()
    drawn.forward()
    assert not drawn.mean.any()
    assert not drawn.var.any()
    assert drawn.count.item() == 0
    drawn.backward(drawn.count)
    assert drawn.dx.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0), (0, 3, 1)])
def test_empty(shape: tuple[int, int, int]) -> None:
    drawn = layer((1, 3, 5))
    empty = Layer(*(torch.empty(shape, device=DEVICE),) * 2, drawn.weight, drawn.bias, None, None, "relu", SMALL)
    empty.forward()
    empty.backward()
    for zero in (empty.mean, empty.var, empty.sum_dz, empty.sum_dz_xhat):
        assert not zero.any()


# --- Groups, and the running update -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("shape", [(7, 2, 64), (7, 5, 7), (25, 20, 1)])
def test_groups(shape: tuple[int, int, int], mask: bool) -> None:
    drawn = layer(shape, residual=True, mask=mask, groups=3)
    running = gpu.Running(torch.zeros(shape[1], device=DEVICE), torch.ones(shape[1], device=DEVICE), 0.25)
    drawn.forward(running=running)
    assert_forward(drawn)
    drawn.backward(drawn.count if mask else None)
    assert_backward(drawn)
    whole = definition.moments(array(drawn.x), array(drawn.counts))
    mean, var = definition.update_running(np.zeros(shape[1]), np.ones(shape[1]), whole, 0.25)
    assert_near(running.mean, mean, int(whole.count))
    assert_near(running.var, var, int(whole.count))


def test_groups_of_channels_last_images() -> None:
    """5 samples of 6 positions, in groups of 3 and 2."""
    drawn = layer((30, 20, 1), tuning=SMALL)
    first, second = torch.full((2, 20), math.nan, device=DEVICE), torch.full((2, 20), math.nan, device=DEVICE)
    gpu.moments(drawn.x, None, first, second, groups=2, samples=5, tuning=SMALL)
    for group, at in enumerate((slice(0, 18), slice(18, 30))):
        exact = definition.moments(array(drawn.x)[at])
        assert_near(first[group], exact.mean, 18)
        assert_near(second[group], exact.var, 18)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("tuning", [SMALL, ALONE], ids=["parts", "alone"])
def test_running(tuning: gpu.Tuning, dtype: torch.dtype, unbiased: bool) -> None:
    drawn = layer((9, 20, 1), tuning=tuning)
    mean, var = (torch.full((20,), value, device=DEVICE, dtype=dtype) for value in (0.5, 2.0))
    tracked, skipped = (torch.tensor(value, device=DEVICE) for value in (3, 5))
    drawn.forward(running=gpu.Running(mean, var, 0.1, unbiased, tracked, skipped))
    batch = definition.moments(array(drawn.x))
    exact_mean, exact_var = definition.update_running(np.full(20, 0.5), np.full(20, 2.0), batch, 0.1, unbiased)
    allowed = max(torch.finfo(dtype).eps, np.finfo(np.float32).eps) * 12
    np.testing.assert_allclose(array(mean), exact_mean, rtol=0, atol=allowed)
    np.testing.assert_allclose(array(var), exact_var, rtol=0, atol=allowed)
    assert (tracked.item(), skipped.item()) == (4, 5)


def test_running_average_over_all_batches() -> None:
    mean, var = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
    tracked = torch.tensor(0, device=DEVICE)
    batches = [layer((n, 2, 64)) for n in (2, 3, 4)]
    for drawn in batches:
        drawn.forward(running=gpu.Running(mean, var, None, False, tracked))
    exact = [definition.moments(array(drawn.x)) for drawn in batches]
    assert_near(mean, np.mean([batch.mean for batch in exact], axis=0), 64)
    assert_near(var, np.mean([batch.var for batch in exact], axis=0), 64)
    assert tracked.item() == 3


@pytest.mark.parametrize("reason", ["nan", "infinity", "empty"])
def test_a_batch_that_the_running_statistics_skip(reason: str) -> None:
    drawn = layer((9, 20, 1), mask=reason == "empty")
    if reason == "empty":
        drawn.counts.zero_()
    else:
        drawn.x[3, 17] = math.nan if reason == "nan" else math.inf
    mean, var = torch.full((20,), 0.5, device=DEVICE), torch.full((20,), 2.0, device=DEVICE)
    tracked, skipped = torch.tensor(3, device=DEVICE), torch.tensor(5, device=DEVICE)
    drawn.forward(running=gpu.Running(mean, var, 0.1, True, tracked, skipped))
    assert (mean == 0.5).all()
    assert (var == 2.0).all()
    assert (tracked.item(), skipped.item()) == (3, 6)


def test_running_of_one_value() -> None:
    """Which has no unbiased variance: the biased one stands in, as in the definition."""
    x = torch.ones(1, 2, 1, device=DEVICE)
    drawn = Layer(x, x, None, None, None, None, None, None)
    mean, var = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
    drawn.forward(running=gpu.Running(mean, var, 0.5))
    exact = definition.update_running(np.zeros(2), np.ones(2), Moments(1.0, np.ones(2), np.zeros(2)), 0.5)
    assert_near(mean, exact[0])
    assert_near(var, exact[1])
