import itertools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from cases import ACTIVATIONS, DTYPES, KERNEL_SHAPES, Problem, problem, relative_error, tolerance

import batchnorm
from batchnorm import definition
from batchnorm.kernels import by_channel, by_row, calls, launch, running, threads, whole
from batchnorm.kernels.activations import CODES
from batchnorm.kernels.compilation import OPTIONS
from batchnorm.kernels.formats import arithmetic
from batchnorm.kernels.tiling import CACHE, SERIAL, along_memory, tiling

FLAGS = [(False, False), (True, False), (False, True), (True, True)]


def unwritten(*shapes: Any, dtype: Any = np.float64) -> list[Any]:
    """Outputs filled with NaN: what a kernel forgets to write is seen."""
    return [np.full(shape, np.nan, dtype) for shape in shapes]


def run(
    p: Problem, activation: Any, eps: float = 1e-5, cache: int = CACHE, of_output: bool = False, in_place: bool = False
) -> dict[str, Any]:
    """Forward and backward by the fused kernels.

    If `of_output`, backward by `y` in place of the residual; if `in_place`, with `dx` written over a copy of `dy`.
    """
    channels = p.x.shape[1]
    mean, var, rstd, sum_dz, sum_dz_xhat = unwritten(*[channels] * 5)
    y, dx = unwritten(p.x.shape, p.x.shape, dtype=p.x.dtype)
    d_residual = None if p.residual is None else unwritten(p.x.shape, dtype=p.x.dtype)[0]
    launch.forward(p.x, p.residual, p.mask, p.weight, p.bias, eps, activation, y, mean, var, rstd, cache=cache)
    (again,) = unwritten(p.x.shape, dtype=p.x.dtype)
    launch.normalize(p.x, p.residual, mean, rstd, p.weight, p.bias, activation, again, cache=cache)
    assert again.tobytes() == y.tobytes()
    dy = p.dy
    if in_place:
        dy = dx = p.dy.copy()
    launch.backward(
        dy, p.x, y if of_output else p.residual, p.mask, mean, rstd, p.weight, p.bias, p.count, activation,
        sum_dz, sum_dz_xhat, dx, d_residual, of_output=of_output, cache=cache,
    )  # fmt: skip
    outputs = {"y": y, "mean": mean, "var": var, "dx": dx, "d_weight": sum_dz_xhat, "d_bias": sum_dz}
    outputs = outputs if d_residual is None else outputs | {"d_residual": d_residual}
    if p.mask is None and cache == CACHE:
        got = in_one_call(p, activation, eps, of_output, in_place)
        for name, value in outputs.items():
            assert got[name].tobytes() == value.astype(got[name].dtype).tobytes(), name
    return outputs


def in_one_call(p: Problem, activation: Any, eps: float, of_output: bool, in_place: bool) -> dict[str, Any]:
    """`run` by `whole`, and the running statistics."""
    C, T = p.x.shape[1], arithmetic(p.x.dtype)
    statistics, (tables, running_mean, running_var) = unwritten((3, C))[0], unwritten((2, C), C, C, dtype=T)
    y, dx, d_residual = unwritten(p.x.shape, p.x.shape, p.x.shape, dtype=p.x.dtype)
    d_weight, d_bias = unwritten(C, C, dtype=T)
    running_mean[:], running_var[:], rate, correction = 1, 2, 0.25, 1.5

    def at(array: Any) -> int:
        return 0 if array is None else int(array.ctypes.data)

    weight, bias = (None if values is None else values.astype(T) for values in (p.weight, p.bias))
    descriptor = whole.Descriptor(p.x.shape, p.x.dtype, activation, int(p.residual is not None))
    move = at(running_mean), at(running_var), T.type(0), rate, correction, 0
    given = at(p.x), at(p.x if p.residual is None else p.residual), at(y), at(weight), at(bias), at(tables)
    moved = whole.forward(descriptor, *given, at(statistics), eps, move)
    mean, var, _ = statistics
    assert moved == bool(np.isfinite(mean).all() and np.isfinite(var).all())
    for was, now, batch_s in (1.0, running_mean, mean), (2.0, running_var, correction * var):
        want = was + rate * (batch_s - was) if moved else np.full(C, was)
        np.testing.assert_allclose(now, want, rtol=2 * np.finfo(T).eps)
    (again,), (copies,), (kept,) = unwritten(p.x.shape, dtype=p.x.dtype), unwritten((2, C), dtype=T), unwritten((3, C))
    constants = at(weight), at(bias), at(mean), at(var), 0.0, eps
    whole.normalize(descriptor, *given[:2], at(again), at(copies), at(kept), constants)
    for value, was in (again, y), (copies, tables), (kept, statistics):
        assert value.tobytes() == was.tobytes()
    dy = dx = p.dy.copy() if in_place else p.dy
    if not in_place:
        (dx,) = unwritten(p.x.shape, dtype=p.x.dtype)
    residual = y if of_output else p.residual
    kind = 0 if residual is None else 1 + of_output
    whole.backward(
        descriptor._replace(residual=kind, in_place=in_place), at(dy), at(p.x),
        at(p.x if residual is None else residual), at(dx), at(dx if residual is None else d_residual), at(tables),
        at(statistics), at(d_weight), at(d_bias), p.count,
    )  # fmt: skip
    found = {"y": y, "mean": mean, "var": var, "dx": dx, "d_weight": d_weight, "d_bias": d_bias}
    return found | {"d_residual": d_residual}


def exact(p: Problem, activation: Any, eps: float = 1e-5) -> dict[str, Any]:
    y, batch = definition.forward(p.x, p.weight, p.bias, p.residual, activation, p.mask, eps)
    dx, d_weight, d_bias, d_residual = definition.backward(
        p.dy, p.x, p.weight, p.bias, p.residual, activation, p.mask, eps
    )
    outputs = {"y": y, "mean": batch.mean, "var": batch.var, "dx": dx, "d_weight": d_weight, "d_bias": d_bias}
    return outputs if p.residual is None else outputs | {"d_residual": d_residual}


def assert_exact(p: Problem, activation: Any, cache: int = CACHE, of_output: bool = False) -> None:
    got, want = run(p, activation, cache=cache, of_output=of_output), exact(p, activation)
    terms = p.x.size // p.x.shape[1]
    gain = max(1.0, float(np.max(definition.reciprocal_std(want["var"]) * p.weight)))
    for name, value in got.items():
        error = relative_error(value, want[name])
        # Moments are summed in float64: in float32 nothing is seen of that sum's own rounding.
        summed = name.startswith("d_") or p.x.dtype == np.float64
        assert error < gain * tolerance(p.x.dtype, terms if summed else 1), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_every_shape(shape: Any, dtype: Any) -> None:
    for residual, mask in FLAGS:
        assert_exact(problem(shape, dtype, residual=residual, mask=mask), "relu")


@pytest.mark.parametrize("cache", [CACHE, 1])
@pytest.mark.parametrize("shape", [(7, 20, 47), (3, 5, 160), (300, 2, 33), (32, 64, 1), (9, 3, 1)])
def test_relu_by_its_output(shape: Any, cache: int) -> None:
    for mask in (False, True):
        assert_exact(problem(shape, np.float32, residual=True, mask=mask), "relu", cache, of_output=True)


@pytest.mark.parametrize(
    ("activation", "shape", "cache", "of_output"),
    [
        ("relu", (7, 20, 47), CACHE, False),
        ("relu", (7, 20, 47), CACHE, True),
        ("relu", (9, 5, 160), CACHE, False),
        ("relu", (300, 40, 1), 1, False),
        ("relu6", (300, 40, 1), 1, False),
        ("hardswish", (300, 40, 1), 1, False),
    ],
)
def test_a_flat_activation_stops_a_gradient_that_is_not_finite(
    activation: str, shape: Any, cache: int, of_output: bool
) -> None:
    p = problem(shape, np.float32, residual=of_output)
    z = definition.forward(p.x, p.weight, p.bias, p.residual, None, None, 1e-5)[0]
    position = tuple(np.argwhere(definition.activate_grad(z, activation) == 0)[-1])
    dy = p.dy.copy()
    dy[position] = 0
    want = exact(replace(p, dy=dy), activation)
    for fill in (np.inf, -np.inf, np.nan):
        dy[position] = fill
        got = run(replace(p, dy=dy), activation, cache=cache, of_output=of_output)
        for name, value in got.items():
            assert relative_error(value, want[name]) < 4 * tolerance(np.float32, p.x[:, 0].size), (name, fill)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "hardswish", "elu"])
@pytest.mark.parametrize("stages", [by_channel, by_row], ids=["by_channel", "by_row"])
def test_no_load_of_the_backward_pass_waits_for_the_activation(stages: Any, activation: str) -> None:
    code = CODES[activation]
    found = masked_loads(stages.grad_sums(code, 0, 0))
    if found is None:
        pytest.skip("this processor has no masked loads, or NUMBA_DISABLE_JIT is set")
    assert found == 0
    if activation == "relu":
        for in_place in (0, 1):
            assert masked_loads(stages.grad_input(code, 0, 0, 0, in_place)) == 0
        # The test can fail: LLVM makes masked loads of the exact gradient.
        assert masked_loads(stages.grad_sums(code, 0, 1)) != 0


def masked_loads(stage: Any) -> int | None:
    """How many loads of vectors under a mask a stage has; None if there is no machine code, or none with AVX-512."""
    if not hasattr(stage, "py_func"):
        return None
    fresh: Any = numba.njit(**OPTIONS)(stage.py_func)  # what comes from disk has no assembly
    calls.address(fresh, np.dtype(np.float32))
    (text,) = fresh.inspect_asm().values()
    return len(re.findall(r"vmovup[sd]\s+\S*\(%r\S*\), %[yz]mm\d+ \{%k", text)) if "%zmm" in text else None


def test_the_kernels_know_the_activations_of_the_definition() -> None:
    assert list(CODES) == list(definition.ACTIVATIONS)
    assert len(set(CODES.values())) == len(CODES)


@pytest.mark.parametrize("shape", [(7, 20, 47), (3, 5, 160), (9, 80, 47), (3, 50, 300)])
@pytest.mark.parametrize("cache", [CACHE, 1])
def test_a_gradient_may_be_written_over_the_one_that_came(shape: Any, cache: int) -> None:
    """Also if some blocks of channels are computed again, because a gradient is not finite where relu is flat."""
    for (residual, mask), fill in itertools.product(FLAGS, (0.0, np.inf)):
        p = problem(shape, np.float32, residual=residual, mask=mask)
        z = definition.forward(p.x, p.weight, p.bias, p.residual, None, p.mask, 1e-5)[0]
        p.dy[tuple(np.argwhere(z < 0)[-1])] = fill
        got, again = run(p, "relu", cache=cache), run(p, "relu", cache=cache, in_place=True)
        assert np.isfinite(got["dx"]).all()
        for name, value in got.items():
            np.testing.assert_array_equal(again[name], value, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 20, 47), (3, 5, 160)])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_activation(activation: Any, shape: Any, dtype: Any) -> None:
    assert_exact(problem(shape, dtype, residual=True, mask=True), activation)


@pytest.mark.parametrize(("shape", "longer"), [((4, 64, 16), True), ((33, 65, 16), False)])
def test_stages_along_memory_have_the_same_bits(shape: Any, longer: bool) -> None:
    """`assert_exact` computes `y` in both ways."""
    assert (along_memory(shape, 4, 1) != tiling(shape, 4, 1)) is longer
    for activation in "relu", "silu", "gelu":
        assert_exact(problem(shape, np.float32, residual=True, mask=True), activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 20, 9), (30, 5, 160), (300, 40, 1), (11, 2500, 1)])
def test_stage_by_stage(shape: Any, dtype: Any) -> None:
    cache = 1 << 11  # nothing fits 2 KB, and the stages run one after the other over tiles
    for residual, mask in FLAGS:
        p = problem(shape, dtype, residual=residual, mask=mask)
        assert not tiling(shape, p.x.itemsize, 1, cache).fused(shape)
        assert_exact(p, "relu", cache)


@pytest.mark.parametrize("shape", [(7, 20, 47), (3, 5, 160)])
def test_single_stages(shape: Any) -> None:
    p = problem(shape, np.float64, residual=True, mask=True)
    want = exact(p, "silu")
    rstd = definition.reciprocal_std(want["var"])
    mean, var, sum_dz, sum_dz_xhat = unwritten(*[shape[1]] * 4)
    y, dx, d_residual = unwritten(*[shape] * 3)
    launch.moments(p.x, p.mask, mean, var)
    launch.normalize(p.x, p.residual, want["mean"], rstd, p.weight, p.bias, "silu", y)
    launch.grad_sums(p.dy, p.x, p.residual, want["mean"], rstd, p.weight, p.bias, "silu", sum_dz, sum_dz_xhat)
    launch.grad_input(
        p.dy, p.x, p.residual, p.mask, want["mean"], rstd, p.weight, p.bias, want["d_bias"], want["d_weight"],
        p.count, "silu", dx, d_residual,
    )  # fmt: skip
    got = dict(y=y, mean=mean, var=var, dx=dx, d_weight=sum_dz_xhat, d_bias=sum_dz, d_residual=d_residual)
    for name, value in got.items():
        assert relative_error(value, want[name]) < tolerance(np.float64, p.x[:, 0].size), name


@pytest.mark.parametrize("shape", [(7, 20, 47), (3, 5, 160)])
def test_constant_statistics_take_nothing_from_the_gradient(shape: Any) -> None:
    p = problem(shape, np.float64)
    mean, rstd = np.zeros(shape[1]), np.ones(shape[1])
    infinite = np.full(shape[1], np.inf)
    (dx,) = unwritten(shape)
    launch.grad_input(p.dy, p.x, None, None, mean, rstd, None, None, infinite, infinite, np.inf, None, dx, None)
    np.testing.assert_array_equal(dx, p.dy)


def to_bfloat16(values: Any) -> Any:
    """The nearest bfloat16, as its bits: the definition of rounding to nearest, ties to even, in integers."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    lower, kept = bits & 0xFFFF, bits >> 16
    return (kept + (lower > 0x8000) + ((lower == 0x8000) & (kept & 1 == 1))).astype(np.uint16)


def from_bfloat16(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("shape", [(7, 20, 47), (3, 5, 160)])
def test_bfloat16_in_memory_is_calculated_in_float32(shape: Any) -> None:
    assert_bfloat16_exact(shape)


def assert_bfloat16_exact(shape: Any) -> None:
    p = problem(shape, np.float32, residual=True)
    bits = {name: to_bfloat16(getattr(p, name)) for name in ("x", "dy", "residual")}
    rounded = replace(p, **{name: from_bfloat16(value) for name, value in bits.items()})
    want = exact(rounded, "silu")
    mean, var, rstd, sum_dz, sum_dz_xhat = unwritten(*[shape[1]] * 5)
    y, dx, d_residual = (np.full(shape, 0x7FC0, np.uint16) for _ in range(3))
    launch.forward(bits["x"], bits["residual"], None, p.weight, p.bias, 1e-5, "silu", y, mean, var, rstd)
    launch.backward(
        bits["dy"], bits["x"], bits["residual"], None, mean, rstd, p.weight, p.bias, p.count, "silu",
        sum_dz, sum_dz_xhat, dx, d_residual,
    )  # fmt: skip
    terms = p.x.size // shape[1]
    for name, value in dict(mean=mean, var=var, d_weight=sum_dz_xhat, d_bias=sum_dz).items():
        assert relative_error(value, want[name]) < tolerance(np.float32, terms), name
    for name, value in dict(y=y, dx=dx, d_residual=d_residual).items():
        # One rounding to 8 significant bits, 2^-8 of the value at most, on top of float32's.
        np.testing.assert_allclose(from_bfloat16(value), want[name], rtol=2**-8 * 1.01, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("shape", [(32, 8, 1), (32, 8, 47), (8, 4, 3136), (20000, 4, 1)])
def test_a_distant_mean_costs_no_accuracy(shape: Any, ratio: float) -> None:
    p = problem(shape, np.float32, offset=ratio)
    got, want = run(p, None, eps=0.0), exact(p, None, eps=0.0)
    np.testing.assert_allclose(got["var"], want["var"], rtol=tolerance(np.float32))
    for name in ("y", "dx"):
        assert relative_error(got[name], want[name]) < tolerance(np.float32)


def test_a_far_first_value_costs_no_accuracy() -> None:
    # The first value is what a block is measured from before its mean is known.
    x = np.random.default_rng(0).normal(size=(4, 3, 6000)).astype(np.float32)
    x[0, :, 0] = 1e4
    mean, var = unwritten(3, 3)
    launch.moments(x, None, mean, var)
    want = definition.moments(x)
    np.testing.assert_allclose(var, want.var, rtol=tolerance(np.float32))
    np.testing.assert_allclose(mean, want.mean, atol=tolerance(np.float32) * np.sqrt(want.var.max()))


@pytest.mark.parametrize("shape", [(40, 3, 20), (4, 3, 200)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_nan_and_infinity_go_through(activation: Any, dtype: Any, shape: Any) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    x[0, 0, 0], x[1, 1, 1], x[2, 2, 2] = np.nan, np.inf, -np.inf
    (y,) = unwritten(shape, dtype=dtype)
    launch.normalize(x, None, np.zeros(3), np.ones(3), None, None, activation, y)
    with np.errstate(all="ignore"):
        want = definition.activate(x, activation)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(y), np.isinf(want))
    mean, var = unwritten(3, 3)
    launch.moments(x, None, mean, var)
    assert not np.isfinite(var).any()


def test_what_the_mask_leaves_out_may_be_nan() -> None:
    for shape in [(40, 3, 20), (4, 3, 200)]:
        p = problem(shape, np.float32, mask=True)
        assert p.mask is not None
        want = exact(p, None)
        p.x[np.broadcast_to(p.mask[:, None] == 0, shape)] = np.nan
        got = run(p, None)
        np.testing.assert_allclose(got["mean"], want["mean"], atol=tolerance(np.float32))
        np.testing.assert_allclose(got["var"], want["var"], rtol=tolerance(np.float32))


def test_float32_activations_are_as_exact_as_float32() -> None:
    z = np.concatenate([np.linspace(-100, 100, 200_001), np.linspace(-1, 1, 200_001)]).astype(np.float32)
    for activation in ACTIVATIONS:
        assert_activation_exact(z.reshape(1, 1, -1), activation)


def assert_activation_exact(x: Any, activation: Any) -> None:
    unit = np.ones(1)
    eps = np.finfo(np.float32).eps
    (y,) = unwritten(x.shape, dtype=np.float32)
    launch.normalize(x, None, 0 * unit, unit, None, None, activation, y)
    error = np.abs(y - definition.activate(x, activation))
    # Relative to the value, or absolute below 1: one rounding each for the exponential, a quotient, a product.
    assert np.max(error / np.maximum(np.abs(x), 1)) < 3 * eps, activation
    dx = np.empty_like(x)
    launch.grad_input(
        np.ones_like(x),
        x,
        None,
        None,
        0 * unit,
        unit,
        None,
        None,
        unit,
        unit,
        np.inf,
        activation,
        dx,
        None,
        exact=False,
    )
    smooth = np.min([np.abs(x - kink) for kink in (-3, 0, 3, 6)], axis=0) > 1e-6
    error = np.abs(dx - definition.activate_grad(x, activation))[smooth]
    assert np.max(error / np.maximum(np.abs(x[smooth]), 1)) < 4 * eps, activation


@pytest.mark.parametrize("shape", [(9, 80, 47), (3, 50, 300), (30000, 4, 1)])
def test_the_same_bits_for_any_number_of_threads(shape: Any) -> None:
    p = problem(shape, np.float32, residual=True)
    assert p.x.size >= SERIAL
    before = threads.follow(lambda: 1)
    results = []
    try:
        for count in (1, 2):
            threads.follow(lambda count=count: count)  # type: ignore[misc]
            assert threads.available() == min(count, numba.config.NUMBA_NUM_THREADS)
            results.append(run(p, "silu"))
    finally:
        threads.follow(before)
    for name in results[0]:
        np.testing.assert_array_equal(results[0][name], results[1][name], err_msg=name)


def in_new_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, env=os.environ | environment, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


CALL = """
import numpy as np
from batchnorm.kernels import launch
x = np.random.default_rng(0).normal(size={shape}).astype(np.float32)
y, mean, var, rstd = np.empty_like(x), *np.empty((3, x.shape[1]))
def call():
    launch.forward(x, None, None, None, None, 1e-5, "relu", y, mean, var, rstd)
    return float(y.sum())
"""


def test_the_same_bits_from_memory_and_from_disk_for_any_number_of_threads(tmp_path: Any) -> None:
    code = (
        "import hashlib\n"
        "import numpy as np\n"
        "from batchnorm.kernels import launch, threads\n"
        "x, residual = np.random.default_rng(0).normal(size=(2, 3, 50, 300)).astype(np.float32)\n"
        "for count in (1, 2):\n"
        "    threads.follow(lambda: count)\n"
        "    y, (mean, var, rstd) = np.empty_like(x), np.empty((3, 50))\n"
        "    launch.forward(x, residual, None, None, None, 1e-5, 'silu', y, mean, var, rstd)\n"
        "    again = np.empty_like(x)\n"
        "    launch.normalize(x, residual, mean, rstd, None, None, 'silu', again)\n"
        "    assert again.tobytes() == y.tobytes()\n"
        "    print(hashlib.sha256(y.tobytes() + mean.tobytes() + var.tobytes()).hexdigest())"
    )
    results = [in_new_process(code, NUMBA_CACHE_DIR=str(tmp_path)).split() for _ in range(2)]
    assert len(set(results[0] + results[1])) == 1


def test_compiled_lazily_and_cached_on_disk(tmp_path: Any) -> None:
    code = CALL.format(shape=(2, 3, 4)) + (
        "from batchnorm.kernels import activations, by_row\n"
        "functions = launch.forward_kernel(False), by_row.moments(0), by_row.normalize(activations.RELU, 0)\n"
        "assert not any(function.signatures for function in functions)\n"
        "call()\n"
        "print(*(sum(function.stats.cache_hits.values()) for function in functions))"
    )
    environment = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert in_new_process(code, **environment) == "0 0 0\n"
    assert in_new_process(code, **environment) == "1 1 1\n"


NORMALIZE_NAN = """
import numpy as np
from batchnorm.kernels import activations, by_row, launch
stage = by_row.normalize(activations.NONE, 0)
x = np.full((1, 2, 3), 0x7F81, np.uint16)
y = np.empty_like(x)
def call():
    launch.normalize(x, None, np.zeros(2), np.ones(2), None, None, None, y)
    return hex(y[0, 0, 0]), sum(stage.stats.cache_hits.values())
"""
"""A call with NaN in bfloat16: the bits of what comes out, and whether the stage came from the disk."""


@pytest.fixture
def copied(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy of the kernels' source that may be changed, and the environment in which it is what Python imports."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(batchnorm.__file__).parent, source / "batchnorm", ignore=ignored)
    environment = {"PYTHONPATH": str(source), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    return source / "batchnorm" / "kernels", environment


def test_a_change_in_any_file_replaces_what_is_on_disk(copied: Any) -> None:
    source, environment = copied
    code = NORMALIZE_NAN + "print(*call())"
    assert in_new_process(code, **environment) == "0x7fc0 0\n"
    (first,) = Path(environment["NUMBA_CACHE_DIR"]).rglob("by_row*.nbc")
    formats = source / "formats.py"
    assert formats.read_text().count("0x7FC0") == 1
    formats.write_text(formats.read_text().replace("0x7FC0", "0x7FC1"))
    assert in_new_process(code, **environment) == "0x7fc1 0\n"
    assert in_new_process(code, **environment) == "0x7fc1 1\n"
    (second,) = Path(environment["NUMBA_CACHE_DIR"]).rglob("by_row*.nbc")
    assert second.name != first.name


def test_everything_a_kernel_is_made_of_is_in_the_digest(copied: Any) -> None:
    source, environment = copied
    code = (
        "import importlib, pathlib, llvmlite, numba\n"
        "from batchnorm.kernels import disk\n"
        "def changed():\n"
        "    print(importlib.reload(disk).DIGEST)\n"
        "changed()\n"
        "for file in sorted(pathlib.Path(disk.__file__).parent.glob('*.py')):\n"
        "    file.write_text(file.read_text() + '# changed')\n"
        "    changed()\n"
        "numba.__version__ += '.changed'\n"
        "changed()\n"
        "llvmlite.__version__ += '.changed'\n"
        "changed()\n"
        "numba.config.OPT = 0\n"
        "changed()"
    )
    digests = in_new_process(code, **environment).split()
    assert len(digests) == len(set(digests)) == 1 + len(list(source.glob("*.py"))) + 3


def test_a_file_that_cannot_be_read_is_replaced(tmp_path: Any) -> None:
    environment = {"NUMBA_CACHE_DIR": str(tmp_path)}
    code = NORMALIZE_NAN + "print(*call())"
    assert in_new_process(code, **environment) == "0x7fc0 0\n"
    (file,) = tmp_path.rglob("by_row*.nbc")
    file.write_bytes(file.read_bytes()[:1000])
    assert in_new_process(code, **environment) == "0x7fc0 0\n"
    assert in_new_process(code, **environment) == "0x7fc0 1\n"


def test_a_folder_that_is_lost_does_not_stop_a_kernel(tmp_path: Any) -> None:
    folder = tmp_path / "cache"
    code = NORMALIZE_NAN + (
        "import pathlib, shutil\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "shutil.rmtree(folder)\n"
        "folder.touch()\n"
        "print(*call())"
    )
    assert in_new_process(code, NUMBA_CACHE_DIR=str(folder)) == "0x7fc0 0\n"


@pytest.mark.skipif(os.name == "nt", reason="needs a home that is no folder")
def test_without_a_writable_folder_a_kernel_is_compiled_every_time(copied: Any) -> None:
    source, environment = copied
    (source / "__pycache__").touch()  # in the way of a folder, even for root
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache", "NUMBA_CACHE_DIR": "/dev/null/numba"}
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as warned:\n"
        "    warnings.simplefilter('default')\n"
        f"    exec({NORMALIZE_NAN!r})\n"
        "    print(*call())\n"
        "    mean, var = np.empty((2, 2))\n"
        "    launch.moments(np.ones((3, 2, 1)), None, mean, var)\n"
        "assert mean.tolist() == [1, 1]\n"
        "(warning,) = warned  # once for all kernels\n"
        "print(warning.message)"
    )
    result, warning = in_new_process(code, **environment | nowhere).splitlines()
    assert result == "0x7fc0 0"
    assert warning == (
        "batchnorm cannot keep its compiled kernels, because it finds no writable folder: every process compiles them "
        "again, which takes seconds. Set NUMBA_CACHE_DIR to a writable folder."
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_batch_is_accepted_whose_means_are_near(dtype: Any) -> None:
    """Up to the limit, and only with statistics that are finite; otherwise nothing has changed."""
    eps, limit, count = 0.25, 8.0, 4
    shrinkage, like = (count - 1) / count, dtype(0)
    edge = limit * np.sqrt(1.0 + eps)
    for worst, var, near in (
        (edge * (1 - 1e-6), 1.0, True), (-edge * (1 + 1e-6), 1.0, False), (0.0, np.inf, False), (np.nan, 1.0, False),
        (0.0, np.nan, False), (np.inf, 1.0, False), (0.0, 0.0, True),
    ):  # fmt: skip
        mean, biased = np.array([0.0, worst, 1.0], dtype), np.array([2.0, var, 1.0], dtype)
        unbiased = (biased / shrinkage).astype(dtype)
        old, counter = (np.full(3, 5, dtype), np.full(3, 6, dtype)), np.array([41])
        got = old[0].copy(), old[1].copy()
        move = got[0].ctypes.data, got[1].ctypes.data, like, 0.5, 1.0, counter.ctypes.data
        assert whole.is_near(mean.ctypes.data, biased.ctypes.data, 3, like, eps, limit) is near
        places = mean.ctypes.data, unbiased.ctypes.data
        assert whole.accept(*places, 3, shrinkage, eps, limit, move) is near
        assert counter[0] == 41 + near
        for now, was, batch in zip(got, old, (mean, unbiased), strict=True):
            np.testing.assert_allclose(now, (was + batch) / 2 if near else was, rtol=2 * np.finfo(dtype).eps)


def test_without_compilation_kernels_are_plain_python() -> None:
    code = (
        "import numpy as np\n"
        "from cases import ACTIVATIONS, DTYPES, problem\n"
        "from test_kernels import FLAGS, assert_bfloat16_exact, assert_exact, launch\n"
        "assert type(launch.moments_kernel(False)) is type(launch.by_row.moments(0)) is type(problem)\n"
        "for shape in [(9, 3, 4), (2, 3, 70), (70, 2, 1)]:\n"
        "    assert_bfloat16_exact(shape)\n"
        "    for dtype, offset in zip(DTYPES, (1e3, 0)):  # float64 statistics hold a distant mean for float32 data\n"
        "        for residual, mask in FLAGS:\n"
        "            p = problem(shape, dtype, residual=residual, mask=mask, offset=offset)\n"
        "            assert_exact(p, 'relu')\n"
        "            assert_exact(p, 'relu', cache=64)\n"
        "for dtype in DTYPES:\n"
        "    for activation in ACTIVATIONS:\n"
        "        assert_exact(problem((5, 2, 9), dtype), activation)\n"
        # Bits of NaN; division by zero; a size for several threads.
        "bits = np.array([[[0x7F81, 0x3F80]]], np.uint16)\n"
        "y = np.empty_like(bits)\n"
        "launch.normalize(bits, None, np.zeros(1), np.ones(1), None, None, None, y)\n"
        "assert y.tolist() == [[[0x7FC0, 0x3F80]]]\n"
        "mean, var, rstd = np.empty((3, 1))\n"
        "x = np.ones((1, 1, launch.SERIAL), np.float32)\n"
        "launch.forward(x, None, None, None, None, 0.0, None, np.empty_like(x), mean, var, rstd)\n"
        "print(mean[0], var[0], rstd[0])"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    assert in_new_process(code, NUMBA_DISABLE_JIT="1", PYTHONPATH=path) == "1.0 0.0 inf\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_the_same() -> None:
    code = CALL.format(shape=(8, 64, 300)) + (
        "import os, warnings\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        "before = call()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if call() == before else 1)\n"
        "_, status = os.waitpid(child, 0)\n"
        "assert status == 0, status\n"
        "assert call() == before"
    )
    in_new_process(code)


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_eight_threads_at_once(layer: str) -> None:
    code = CALL.format(shape=(8, 64, 300)) + (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "want = call()\n"
        "def mine(_):\n"
        "    y, mean, var, rstd = np.empty_like(x), *np.empty((3, x.shape[1]))\n"
        "    launch.forward(x, None, None, None, None, 1e-5, 'relu', y, mean, var, rstd)\n"
        "    return float(y.sum())\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    assert set(pool.map(mine, range(200))) == {want}"
    )
    in_new_process(code, NUMBA_THREADING_LAYER=layer)


# --- Running statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_running_statistics_move_as_in_the_definition(dtype: Any, rate: float) -> None:
    mean, var = np.array([1.0, -2e38, 3.0]), np.array([0.5, 2e38, 0.0])
    old = np.array([-1.0, 1e38, 0.1], dtype), np.array([1.0, 3.0, 1e-5], dtype)
    want = definition.update_running(*old, definition.Moments(9.0, mean, var), rate)
    got = old[0].copy(), old[1].copy()
    assert running.move(mean, var, rate, 9 / 8, *got) is True
    for value, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(value, expected, rtol=2 * np.finfo(dtype).eps)
    if rate == 1:
        np.testing.assert_array_equal(got[0], mean.astype(dtype))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("which", [0, 1])
def test_running_statistics_stay_if_those_of_a_batch_are_not_finite(which: int, poison: float) -> None:
    batch = np.ones(5), np.ones(5)
    batch[which][3] = poison
    old = np.arange(5, dtype=np.float32), np.ones(5, np.float32)
    got = old[0].copy(), old[1].copy()
    assert running.move(*batch, 0.1, 1.0, *got) is False
    np.testing.assert_array_equal(got, old)
