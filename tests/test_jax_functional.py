"""`batchnorm.jax.batch_norm` against the definition, under JAX's transformations, on both sides of the size rule."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import ACTIVATIONS, problem, relative_error, tolerance

from batchnorm import definition
from batchnorm.definition import ActivationSpec

pytest.importorskip("flax")
import jax
import jax.numpy as jnp
from jax.test_util import check_grads

from batchnorm.jax import BatchStatistics, GhostStatistics, Renorm, RunningStatistics, Statistics, batch_norm, route
from batchnorm.xla import kernels

LAYOUTS = {"matrix": ((9, 5, 1), -1), "channels-last": ((4, 6, 7), -1), "channels-first": ((4, 6, 70), 1)}
"""`(N, C, L)` and the channel axis. The channels of an image with the channels last follow its positions."""


@pytest.fixture(params=["kernels", "formula"])
def computed_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """The route that computes what it can."""
    with route(request.param, "formula"):
        assert kernels.registered()
        yield str(request.param)


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def laid(values: Any, layout: str) -> Any:
    """`(N, C, L)` values in a layout."""
    if layout == "matrix":
        return values[:, :, 0]
    return values.swapaxes(1, 2) if layout == "channels-last" else values


def position(mask: Any, layout: str) -> Any:
    return mask[:, 0] if layout == "matrix" and mask is not None else mask


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_and_gradients(computed_by: str, layout: str, mask: bool, dtype: Any, x64: None) -> None:
    shape, axis = LAYOUTS[layout]
    p = problem(shape, dtype, residual=True, mask=mask, offset=3.0)
    given = [laid(v, layout) for v in (p.x, p.residual)] + [p.weight, p.bias]
    old = np.full(shape[1], 0.5, dtype), np.full(shape[1], 2.0, dtype)

    def compute(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
        return batch_norm(
            x, *old, weight=weight, bias=bias, training=True, axis=axis, activation="silu", residual=residual,
            mask=position(p.mask, layout),
        )  # fmt: skip

    (y, running), pull = jax.vjp(compute, *map(jnp.asarray, given))
    zeros = jax.tree.map(jnp.zeros_like, running)
    found = pull((jnp.asarray(laid(p.dy, layout)), zeros))
    expected, batch = definition.forward(p.x, p.weight, p.bias, p.residual, "silu", p.mask)
    dx, d_weight, d_bias, d_residual = definition.backward(p.dy, p.x, p.weight, p.bias, p.residual, "silu", p.mask)
    terms = int(p.x.size / shape[1])
    assert y.dtype == dtype
    assert relative_error(y, laid(expected, layout)) < tolerance(dtype, terms)
    for value, exact in zip(found, [laid(dx, layout), laid(d_residual, layout), d_weight, d_bias], strict=True):
        assert relative_error(value, exact) < 4 * tolerance(dtype, terms)
    for value, exact in zip(running, definition.update_running(*old, batch, 0.1), strict=True):
        assert relative_error(value, exact) < tolerance(dtype, terms)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(computed_by: str, activation: ActivationSpec) -> None:
    if computed_by == "kernels" and activation not in ("relu", ("leaky_relu", 0.2)):
        pytest.skip("the activations of the kernels have their own tests")
    p = problem((5, 3, 7), np.float32)

    def compute(x: Any) -> Any:
        return batch_norm(
            x, weight=p.weight, bias=p.bias, training=True, axis=1, activation=activation
        )[0]  # fmt: skip

    y, pull = jax.vjp(compute, jnp.asarray(p.x))
    expected, _ = definition.forward(p.x, p.weight, p.bias, activation=activation)
    dx, *_ = definition.backward(p.dy, p.x, p.weight, p.bias, activation=activation)
    assert relative_error(y, expected) < tolerance(np.float32, 35)
    assert relative_error(pull(jnp.asarray(p.dy))[0], dx) < 4 * tolerance(np.float32, 35)


def test_half_precision_has_float32_statistics(computed_by: str) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(100.0, 1.0, (64, 4)), jnp.bfloat16)  # E[x^2] - E[x]^2 would be noise
    y, running = batch_norm(x, np.zeros(4, np.float32), np.ones(4, np.float32), training=True, momentum=1.0)
    exact = np.asarray(x, np.float64)
    batch = definition.moments(exact)
    assert y.dtype == jnp.bfloat16
    assert running is not None
    assert running.var.dtype == jnp.float32
    assert relative_error(running.var, batch.var * 64 / 63) < 1e-5
    assert relative_error(np.asarray(y, np.float64), definition.forward(exact)[0]) < 2**-7


def test_a_large_mean_costs_no_accuracy(computed_by: str) -> None:
    x = np.random.default_rng(0).normal(1e4, 1.0, (256, 3)).astype(np.float32)
    y, pull = jax.vjp(lambda x: batch_norm(x, training=True)[0], jnp.asarray(x))
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    assert relative_error(y, definition.forward(x)[0]) < 1e-5
    assert relative_error(pull(jnp.asarray(dy))[0], definition.backward(dy, x)[0]) < 1e-5


def test_derivatives_of_second_order_in_both_directions(computed_by: str, x64: None) -> None:
    p = problem((3, 2, 4), np.float64, residual=True, mask=computed_by == "kernels")

    @jax.jit
    def compute(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
        return batch_norm(
            x, weight=weight, bias=bias, training=True, axis=1, activation="tanh", residual=residual, mask=p.mask
        )[0]  # fmt: skip

    check_grads(compute, (p.x, p.residual, p.weight, p.bias), order=2, modes=("fwd", "rev"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("statistics", [GhostStatistics(2), Renorm(1.1, 0.3), RunningStatistics()], ids=repr)
def test_derivatives_of_other_statistics(statistics: Any, x64: None) -> None:
    p = problem((5, 2, 3), np.float64)
    old = np.full(2, 0.1), np.full(2, 1.5)

    @jax.jit
    def compute(x: Any, weight: Any) -> Any:
        return batch_norm(x, *old, weight=weight, training=True, axis=1, activation="tanh", statistics=statistics)[0]

    if isinstance(statistics, Renorm):  # r and d are constants by decree: a difference quotient does not know it
        _, pull = jax.vjp(compute, p.x, p.weight)
        _, push = jax.jvp(compute, (p.x, p.weight), (p.dy, p.weight))
        dx, d_weight = pull(p.dy)
        np.testing.assert_allclose(np.vdot(push, p.dy), np.vdot(dx, p.dy) + np.vdot(d_weight, p.weight), rtol=1e-10)
        return
    check_grads(compute, (p.x, p.weight), order=1, modes=("fwd", "rev"), rtol=1e-5, atol=1e-5)


def test_ghost_groups_are_normalized_on_their_own(x64: None) -> None:
    p = problem((7, 3, 4), np.float64, residual=True, mask=True)
    old = np.zeros(3), np.ones(3)
    y, running = batch_norm(
        p.x, *old, training=True, axis=1, residual=p.residual, mask=p.mask, statistics=GhostStatistics(3),
    )  # fmt: skip
    assert p.residual is not None
    assert p.mask is not None
    parts = [slice(0, 4), slice(4, 7)]
    expected = [definition.forward(p.x[s], residual=p.residual[s], mask=p.mask[s])[0] for s in parts]
    np.testing.assert_allclose(y, np.concatenate(expected), rtol=1e-9, atol=1e-12)
    whole = definition.update_running(*old, definition.moments(p.x, p.mask), 0.1)
    np.testing.assert_allclose(np.stack(running), np.stack(whole), rtol=1e-12)


def test_renormalization(x64: None) -> None:
    p = problem((8, 3, 2), np.float64)
    mean, var = np.array([0.0, 0.5, -0.2]), np.array([1.0, 2.0, 0.4])
    batch = definition.moments(p.x)
    rstd = definition.reciprocal_std(var)
    r = np.clip(np.sqrt(batch.var + 1e-5) * rstd, 1 / 1.1, 1.1)
    d = np.clip((batch.mean - mean) * rstd, -0.3, 0.3)
    args = {"weight": p.weight, "bias": p.bias, "training": True, "axis": 1}
    y, _ = batch_norm(p.x, mean, var, **args, statistics=Renorm(1.1, 0.3))
    expected, _ = definition.forward(p.x, r * p.weight, d * p.weight + p.bias)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-12)
    unlimited, _ = batch_norm(p.x, mean, var, **args, statistics=Renorm(1e9, 1e9))
    evaluated, _ = batch_norm(p.x, mean, var, **args | {"training": False})
    np.testing.assert_allclose(unlimited, evaluated, rtol=1e-9, atol=1e-12)


def test_evaluation_and_frozen_statistics() -> None:
    p = problem((5, 3, 7), np.float32)
    old = np.array([0.0, 0.5, -0.2], np.float32), np.array([1.0, 2.0, 0.4], np.float32)
    expected = definition.normalize(p.x, old[0], definition.reciprocal_std(old[1]), p.weight, p.bias, None, "relu")
    for training in (False, True):
        y, running = batch_norm(
            p.x, *old, weight=p.weight, bias=p.bias, training=training, axis=1, activation="relu",
            statistics=RunningStatistics() if training else None,
        )  # fmt: skip
        assert relative_error(y, expected) < tolerance(np.float32)
        assert running is not None
        np.testing.assert_array_equal(np.stack(running), np.stack(old))


def test_what_does_not_move_the_running_statistics(computed_by: str) -> None:
    x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    old = np.zeros(2, np.float32), np.ones(2, np.float32)
    spoilt = x.copy()
    spoilt[1, 1] = np.inf
    _, running = batch_norm(spoilt, *old, training=True)
    np.testing.assert_array_equal(np.stack(running), np.stack(old))
    train = jax.jit(lambda mask: batch_norm(x, *old, training=True, mask=mask))
    for mask in (np.zeros(6, bool), np.array([1, 1, 1, 1, 1, -1.0], np.float32)):
        y, running = train(mask)
        np.testing.assert_array_equal(np.stack(running), np.stack(old))
        assert np.isfinite(y).all() == (mask.dtype == bool)  # a negative weight is told by NaN
    spoilt[1, 1] = np.nan  # and where the mask leaves it out, it does
    y, running = batch_norm(spoilt, *old, training=True, mask=np.arange(6) != 1)
    assert running is not None
    assert np.isfinite(np.stack(running)).all()
    assert not np.array_equal(running.mean, old[0])


def test_only_x_and_the_statistics_are_kept(computed_by: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 16, 8)), jnp.float32)
    weight = jnp.ones(16)
    _, pull = jax.vjp(lambda x, w: batch_norm(x, weight=w, training=True, axis=1, activation="gelu")[0], x, weight)
    kept = {id(leaf): leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "size")}
    assert sum(leaf.size for leaf in kept.values() if leaf.size >= x.size) == x.size


def test_vmap(computed_by: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 5)), jnp.float32)
    weight = jnp.asarray(np.random.default_rng(1).uniform(1, 2, (3, 5)), jnp.float32)

    @jax.jit
    def loss(x: Any, weight: Any) -> Any:
        return jnp.sum(batch_norm(x, weight=weight, training=True, activation="tanh")[0] ** 3)

    found = jax.vmap(jax.value_and_grad(loss, (0, 1)))(x, weight)
    one_by_one = [jax.value_and_grad(loss, (0, 1))(x[i], weight[i]) for i in range(3)]
    for value, exact in zip(
        jax.tree.leaves(found), jax.tree.leaves(jax.tree.map(lambda *v: jnp.stack(v), *one_by_one)), strict=True
    ):
        np.testing.assert_allclose(value, exact, rtol=2e-4, atol=2e-5)
    only_x = jax.vmap(lambda x: batch_norm(x, weight=weight[0], training=True)[0])(x)
    np.testing.assert_allclose(only_x[2], batch_norm(x[2], weight=weight[0], training=True)[0], rtol=2e-5, atol=1e-6)


def test_pooling_over_a_mapped_axis() -> None:
    """`vmap` with a name is as good as devices: uneven masks, weighted by their counts."""
    p = problem((6, 3, 4), np.float32, mask=True, offset=50.0)
    x, mask = (jnp.asarray(v).reshape(2, 3, *v.shape[1:]) for v in (p.x, p.mask))
    mask = mask.at[1, :2].set(0)
    old = np.zeros(3, np.float32), np.ones(3, np.float32)

    def train(x: Any, mask: Any) -> Any:
        return batch_norm(x, *old, training=True, axis=1, mask=mask, axis_name="devices")

    y, running = jax.vmap(train, axis_name="devices")(x, mask)
    whole = np.asarray(mask).reshape(6, 4)
    expected, batch = definition.forward(p.x, mask=whole)
    assert relative_error(y.reshape(p.x.shape), expected) < 1e-5
    exact = definition.update_running(*old, batch, 0.1)
    for i in range(2):
        assert relative_error(running.mean[i], exact[0]) < 1e-6
        assert relative_error(running.var[i], exact[1]) < 1e-6


FOUR_DEVICES = r"""
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from batchnorm import definition
from batchnorm.jax import batch_norm, route
assert len(jax.devices()) == 4
allowed = route("kernels", "formula")
allowed.__enter__()  # for the whole program
rng = np.random.default_rng(0)
x = rng.normal(5, 2, (8, 3, 4)).astype(np.float32)
dy = rng.normal(size=x.shape).astype(np.float32)
mask = (rng.random((8, 4)) < 0.6).astype(np.float32)
mask[2:5] = 0  # nothing counts on the second device
weight = rng.uniform(1, 2, 3).astype(np.float32)
old = jnp.zeros(3), jnp.ones(3)
mesh = Mesh(np.array(jax.devices()), ("data",))

def step(x, mask, weight, dy, name):
    def compute(x, weight):
        return batch_norm(x, *old, weight=weight, training=True, axis=1, mask=mask, activation="silu", axis_name=name)
    y, pull, running = jax.vjp(compute, x, weight, has_aux=True)
    return y, running, *pull(dy)

expected, batch = definition.forward(x, weight, activation="silu", mask=mask)
dx, d_weight, *_ = definition.backward(dy, x, weight, activation="silu", mask=mask)
running = definition.update_running(*old, batch, 0.1)

def agree(found, said):
    for value, exact in zip(jax.tree.leaves(found), [expected, *running, dx, d_weight], strict=True):
        np.testing.assert_allclose(np.asarray(value), exact, rtol=2e-5, atol=2e-5, err_msg=said)

sharded = jax.shard_map(lambda *given: step(*given, "data"), mesh=mesh, in_specs=(P("data"), P("data"), P(), P("data")),
                        out_specs=(P("data"), P(), P("data"), P()))
agree(jax.jit(sharded)(x, mask, weight, dy), "shard_map")
alone = jax.jit(lambda *given: step(*given, None))
place = NamedSharding(mesh, P("data"))
given = [jax.device_put(v, place) for v in (x, mask)] + [weight, jax.device_put(dy, place)]
agree(alone(*given), "jit of sharded arrays")
agree(alone(x, mask, weight, dy), "one device")
kernel = 'custom_call_target="batchnorm_forward"'
assert kernel in alone.lower(x, mask, weight, dy).compile().as_text()
for program in jax.jit(sharded).lower(x, mask, weight, dy), alone.lower(*given):
    assert kernel not in program.compile().as_text()
parts = [v.reshape(4, 2, *v.shape[1:]) for v in (x, mask, dy)]
mapped = jax.pmap(lambda x, m, w, dy: step(x, m, w, dy, "data"), axis_name="data", in_axes=(0, 0, None, 0))
y, running_, dx_, d_weight_ = mapped(*parts[:2], weight, parts[2])
agree((y.reshape(x.shape), jax.tree.map(lambda v: v[3], running_), dx_.reshape(x.shape), d_weight_.sum(0)), "pmap")
print("agree")
"""


def test_four_devices_with_uneven_masks_are_one_device() -> None:
    flags = f"--xla_force_host_platform_device_count=4 {os.environ['XLA_FLAGS']}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FOUR_DEVICES],
        capture_output=True, text=True, env=environment, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "agree"


class Zeros(Statistics):
    """A user's own source."""

    def normalize(self, call: Any) -> tuple[Any, None]:
        return jnp.zeros_like(call.x), None


def test_a_source_of_a_user_gets_more_than_one_value_per_channel() -> None:
    with pytest.raises(ValueError, match=r"got x of shape \(1, 3\) with channels in axis -1: drop the last"):
        batch_norm(np.ones((1, 3), np.float32), training=True, statistics=Zeros())
    y, _ = batch_norm(np.ones((2, 3), np.float32), training=True, statistics=Zeros())
    assert not y.any()


RUNNING = {"running_mean": np.zeros(3), "running_var": np.ones(3)}


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"x": np.ones((4, 3), np.int32)}, TypeError, "floating-point type, got int32 of shape (4, 3)"),
        ({"x": np.ones(4, np.float32)}, ValueError, "at least two axes, samples and channels, got shape (4,)"),
        ({"axis": 2}, ValueError, "axis must be one of the 2 axes of x, of shape (4, 3), got 2"),
        ({"x": np.ones((1, 3), np.float32)}, ValueError, "more than 1 value per channel, got x of shape (1, 3)"),
        ({"weight": np.ones(4)}, ValueError, "weight must have shape (3,), one value per channel, got (4,)"),
        ({"residual": np.ones((4, 1))}, ValueError, "residual must have the shape of x, (4, 3), got (4, 1)"),
        ({"mask": np.ones((3,))}, ValueError, "mask of shape (3,) does not fit x of shape (4, 3)"),
        ({"mask": np.full(4, -1.0)}, ValueError, "finite and not negative"),
        ({"activation": "rellu"}, ValueError, "did you mean 'relu'?"),
        ({"eps": -1.0}, ValueError, "eps must not be negative"),
        ({"running_mean": np.zeros(3)}, ValueError, "must be given together"),
        ({"training": False}, ValueError, "running_mean and running_var are needed"),
        ({"statistics": BatchStatistics}, TypeError, "must be a source such as BatchStatistics()"),
        ({"statistics": GhostStatistics(1)}, ValueError, "x of shape (4, 3) in groups of 1"),
        ({"x": "s"}, TypeError, "x must be an array, got str"),
        ({"x": None}, TypeError, "x must be an array, got NoneType"),
        ({"weight": "s"}, TypeError, "weight must be an array, got str"),
        ({"mask": "s"}, TypeError, "mask must be an array, got str"),
        ({"residual": "s"}, TypeError, "residual must be an array, got str"),
        ({"running_mean": "s", "running_var": np.ones(3)}, TypeError, "running_mean must be an array, got str"),
        ({"eps": "s"}, TypeError, "eps must be a number, got 's'"),
        ({"momentum": "s", **RUNNING}, TypeError, "momentum must be an array, got str"),
        ({"momentum": np.ones(3), **RUNNING}, ValueError, "momentum must be a number, got shape (3,)"),
    ],
)
def test_bad_input_is_one_sentence(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    given: dict[str, Any] = {"x": np.ones((4, 3), np.float32), "training": True} | changes
    with pytest.raises(error) as caught:
        batch_norm(**given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_traced_eps_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"eps must be a number, got a traced value of shape \(\)"):
        jax.jit(lambda eps: batch_norm(np.ones((4, 3), np.float32), training=True, eps=eps)[0])(1e-3)


def test_nothing_of_torch_is_imported() -> None:
    code = (
        "import sys, numpy as np, batchnorm.jax as ours\n"
        "before = 'numba' in sys.modules\n"
        "with ours.route('kernels'): ours.batch_norm(np.ones((4, 3), np.float32), training=True)\n"
        "absent = ('torch', 'keras', 'tensorflow')\n"
        "print(before, 'numba' in sys.modules, *(name for name in absent if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"], Path.cwd()
