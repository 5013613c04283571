"""The layer for Flax NNX against Flax's own, and the tools for whole models, against the definition."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from batchnorm import definition

pytest.importorskip("flax")
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from batchnorm.jax import (
    BatchNorm,
    GhostStatistics,
    Renorm,
    RunningStatistics,
    Standardize,
    calibrate,
    diagnose,
    exclude_from_weight_decay,
    fold,
    freeze,
    route,
    unfreeze,
)
from batchnorm.jax.freeze import Frozen


def batches(*shape: int, number: int = 3) -> list[Any]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(k, 1 + k, shape), jnp.float32) for k in range(number)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": 1, "use_scale": False},
        {"dtype": jnp.bfloat16},
        {"dtype": jnp.float16, "param_dtype": jnp.float16},
        {"use_bias": False, "momentum": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("computed_by", ["kernels", "formula"])
def test_steps_are_those_of_flax(options: dict[str, Any], computed_by: str) -> None:
    theirs, ours = (kind(5, rngs=nnx.Rngs(0), **options) for kind in (nnx.BatchNorm, BatchNorm))
    with route(computed_by, "formula"):
        _check_steps(theirs, ours, options)


def _check_steps(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    assert jax.tree.structure(nnx.state(theirs)) == jax.tree.structure(nnx.state(ours))
    bound = 0.04 if "dtype" in options else 1e-5
    for x in batches(8, 5, 5):
        mask = np.random.default_rng(1).random((8, 5, 1)) < 0.7
        mask = mask.swapaxes(1, 2) if "axis" in options else mask
        expected, found = theirs(x, mask=mask), ours(x, mask=mask)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=bound, atol=bound)
        for name in ("mean", "var"):
            np.testing.assert_allclose(getattr(ours, name)[...], getattr(theirs, name)[...], rtol=1e-5, atol=1e-6)
    theirs.eval()
    ours.eval()
    np.testing.assert_allclose(ours(x), theirs(x), rtol=bound, atol=bound)


def test_statistics_are_right_where_those_of_flax_are_not() -> None:
    """`E[x^2] - E[x]^2` has no digits left at a mean of 10,000."""
    x = np.random.default_rng(0).normal(1e4, 1.0, (64, 2)).astype(np.float32)
    layer = BatchNorm(2, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer(jnp.asarray(x)), definition.forward(x)[0], atol=1e-4)


def test_masks_are_those_of_flax_or_ours() -> None:
    x, *_ = batches(6, 4, 5)
    rng = np.random.default_rng(0)
    for shape in ((4, 5), (1, 4, 1), (6, 4, 5)):
        theirs, ours = (kind(5, rngs=nnx.Rngs(0)) for kind in (nnx.BatchNorm, BatchNorm))
        mask = rng.random(shape) < 0.8
        np.testing.assert_allclose(ours(x, mask=mask), theirs(x, mask=mask), rtol=1e-5, atol=1e-5)
    y = ours(x, mask=(mask := rng.random((6, 4)) < 0.6))
    expected, _ = definition.forward(np.moveaxis(np.asarray(x), -1, 1), mask=mask)
    np.testing.assert_allclose(np.moveaxis(np.asarray(y), -1, 1), expected, rtol=1e-5, atol=1e-5)
    theirs, ours = (kind(5, rngs=nnx.Rngs(0)) for kind in (nnx.BatchNorm, BatchNorm))
    kept = np.array([1, 0, 1, 0, 1], bool)  # whole channels are left out, whose statistics are NaN in Flax
    expected, found = theirs(x[:, 0], mask=kept), ours(x[:, 0], mask=kept)
    assert np.isnan(expected[:, ~kept]).all()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, kept], expected[:, kept], rtol=1e-5, atol=1e-5)
    for name, start in ("mean", 0), ("var", 1):
        moved = getattr(ours, name)[...]
        np.testing.assert_allclose(moved[kept], getattr(theirs, name)[...][kept], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(moved[~kept], start)
    with pytest.raises(ValueError, match=r"mask of shape \(5,\) can be read in two ways for x of shape \(5, 5\)"):
        ours(x[:5, 0], mask=np.ones(5, bool))


def test_activation_and_residual() -> None:
    x, residual, _ = batches(8, 5)
    layer = BatchNorm(5, activation=("leaky_relu", 0.2), rngs=nnx.Rngs(0))
    expected, _ = definition.forward(x, residual=residual, activation=("leaky_relu", 0.2))
    np.testing.assert_allclose(layer(x, residual=residual), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_survives_splits_copies_and_compilation() -> None:
    layer = BatchNorm(5, activation="relu", statistics=GhostStatistics(4), rngs=nnx.Rngs(0))
    x, *_ = batches(8, 5)
    twin = copy.deepcopy(nnx.merge(*nnx.split(nnx.clone(layer))))
    y = nnx.jit(lambda layer, x: layer(x))(twin, x)
    np.testing.assert_allclose(y, layer(x), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(twin.mean[...], layer.mean[...], rtol=1e-6)
    assert twin.statistics == GhostStatistics(4)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"activation": "rellu"}, ValueError, "did you mean 'relu'"),
        ({"statistics": RunningStatistics}, TypeError, "must be a source"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        BatchNorm(3, rngs=nnx.Rngs(0), **arguments)


def test_nobody_says_which_statistics() -> None:
    with pytest.raises(ValueError, match="does not know whether to use the running statistics"):
        BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))(jnp.ones((2, 3)))


# --- Tools ------------------------------------------------------------------------------------------------------------


class Net(nnx.Module):
    """Everything that folding decides about."""

    def __init__(self, kind: Any = nnx.BatchNorm, activation: Any = None) -> None:
        rngs = nnx.Rngs(0)
        more = {} if activation is None else {"activation": activation}
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.first = kind(4, rngs=rngs, **more)
        self.before = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(64, 2, rngs=rngs)
        self.stays = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.first(self.conv(x))
        x = self.before(jnp.tanh(x))
        y = self.dense(self.drop(x.reshape(len(x), -1)))
        return y * self.stays(y)


def trained(net: Any) -> Any:
    rng = np.random.default_rng(1)
    for name in ("first", "before", "stays"):
        layer = getattr(net, name)
        n = layer.num_features
        for variable, values in (
            (layer.mean, rng.normal(size=n)), (layer.var, rng.uniform(0.5, 2, n)),
            (layer.scale, rng.uniform(0.5, 2, n)), (layer.bias, rng.normal(size=n)),
        ):  # fmt: skip
            variable[...] = jnp.asarray(values, jnp.float32)
    return net


@pytest.mark.parametrize(("kind", "activation"), [(nnx.BatchNorm, None), (BatchNorm, "relu")])
def test_fold(kind: Any, activation: Any) -> None:
    net = trained(Net(kind, activation))
    (x,) = batches(2, 4, 4, 3, number=1)
    result = fold(net, x)
    assert result.folded == {"first": "conv", "before": "dense"}
    assert result.skipped == {
        "stays": "what comes before it is also used elsewhere, and what comes after it uses more than one array"
    }
    assert result.max_error is not None
    assert result.max_error < 1e-5
    assert type(net.first) is kind
    assert net.first.use_running_average is False
    net.eval()
    np.testing.assert_allclose(result.model(x), net(x), rtol=1e-4, atol=1e-5)


def test_fold_sees_who_reads_the_weights() -> None:
    class Tied(Net):
        def __call__(self, x: Any) -> Any:
            return self.first(self.conv(x)) + jnp.sum(self.conv.kernel[...])

    (x,) = batches(2, 4, 4, 3, number=1)
    result = fold(trained(Tied()), x)
    assert result.skipped["first"].startswith("Conv before it has variables that something else reads")


def test_calibrate_is_exact() -> None:
    net = Net()
    data = batches(6, 4, 4, 3)
    done = calibrate(net, data, method="sequential", progress=False)
    assert done.layers == ("before", "first", "stays") or set(done.layers) == {"before", "first", "stays"}
    between = np.moveaxis(np.asarray(net.conv(jnp.concatenate(data)), np.float64), -1, 1)
    exact = definition.moments(between)
    np.testing.assert_allclose(net.first.mean[...], exact.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(net.first.var[...], exact.var, rtol=1e-5)
    assert net.drop.deterministic is False
    assert type(net.first) is nnx.BatchNorm
    with pytest.raises(ValueError, match="compiled on its own"):
        calibrate(net, data, forward=lambda model, batch: nnx.jit(lambda m, b: m(b))(model, batch))
    assert type(net.first) is nnx.BatchNorm


def test_freeze_and_unfreeze() -> None:
    net = trained(Net())
    frozen, free = (np.asarray(layer.mean[...]) for layer in (net.first, net.before))
    (x,) = batches(2, 4, 4, 3, number=1)
    freeze(net.first, affine=True)
    net.train()
    net(x)
    assert type(net.first) is BatchNorm
    assert isinstance(net.first.scale, Frozen)
    np.testing.assert_array_equal(net.first.mean[...], frozen)
    assert not np.array_equal(net.before.mean[...], free)
    assert "first" not in nnx.state(net, nnx.Param)
    skipped = calibrate(net, [x], progress=False).skipped
    assert skipped == {"first": "is frozen"}
    unfreeze(net)
    assert type(net.first) is nnx.BatchNorm
    assert jax.tree.structure(nnx.state(net)) == jax.tree.structure(nnx.state(Net()))
    with pytest.raises(ValueError, match="no batch normalization to freeze"):
        freeze(net.conv)


def test_standardize() -> None:
    data = batches(6, 4, 3)
    layer = Standardize(3)
    assert np.isnan(layer(data[0])).all()
    layer.fit([(x, None) for x in data])
    values = np.moveaxis(np.concatenate(data).astype(np.float64), -1, 1)
    np.testing.assert_allclose(layer(jnp.concatenate(data)), np.moveaxis(definition.forward(values, eps=0.0)[0], 1, -1),
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    np.testing.assert_allclose(layer.inverse(layer(data[1])), data[1], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="needs 3 channels in axis -1, got shape"):
        layer.fit(np.ones((4, 2)))


def test_a_small_network_trains_as_with_flax() -> None:
    """On real digits, to the same curve."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x = jnp.asarray(images[:256].reshape(-1, 8, 8, 1) / 16, jnp.float32)
    t = jnp.asarray(labels[:256])

    class CNN(nnx.Module):
        def __init__(self, ours: bool) -> None:
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(1, 8, (3, 3), use_bias=False, rngs=rngs)
            self.norm = BatchNorm(8, activation="relu", rngs=rngs) if ours else nnx.BatchNorm(8, rngs=rngs)
            self.dense = nnx.Linear(512, 10, rngs=rngs)
            self.ours = ours

        def __call__(self, x: Any) -> Any:
            y = self.norm(self.conv(x))
            y = y if self.ours else nnx.relu(y)
            return self.dense(y.reshape(len(y), -1))

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any, t: Any) -> Any:
        def loss(model: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), t).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    curves = []
    for ours in (True, False):
        model = CNN(ours)
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        curves.append([float(step(model, optimizer, x[i : i + 64], t[i : i + 64])) for i in (0, 64, 128, 192) * 5])
    assert curves[0][-1] < 0.5 * curves[0][0]
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-3)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (jax.nn.relu, "relu"),
        (nnx.leaky_relu, "leaky_relu"),
        (functools.partial(nnx.leaky_relu, negative_slope=0.3), ("leaky_relu", 0.3)),
        (nnx.swish, "silu"),
        (functools.partial(nnx.gelu, approximate=False), "gelu"),
        (nnx.gelu, None),
        (nnx.softplus, None),
        (nnx.PReLU(), None),
    ],
)
def test_activations_as_functions_and_modules(given: Any, meant: Any) -> None:
    x = np.random.default_rng(0).normal(size=(6, 4, 5)).astype(np.float32)
    layer = BatchNorm(5, activation=given, rngs=nnx.Rngs(0))
    z, _ = definition.forward(np.moveaxis(x, -1, 1), activation=meant)
    want = np.moveaxis(z, 1, -1) if meant else given(jnp.asarray(np.moveaxis(z, 1, -1), jnp.float32))
    np.testing.assert_allclose(layer(x, use_running_average=False), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match=r"got a class: write PReLU\(\)"):
        BatchNorm(5, activation=nnx.PReLU, rngs=nnx.Rngs(0))


TOOLS: dict[str, Callable[[Any], Any]] = {
    "calibrate": lambda model: calibrate(model, [jnp.ones((2, 3))]),
    "diagnose": diagnose,
    "fold": lambda model: fold(model, jnp.ones((2, 3))),
    "freeze": freeze,
    "unfreeze": unfreeze,
    "exclude_from_weight_decay": lambda model: exclude_from_weight_decay(optax.adamw(1e-3), model),
}


@pytest.mark.parametrize("wrong", [5, "model", None, [1]], ids=["number", "text", "None", "list"])
@pytest.mark.parametrize("name", TOOLS)
def test_no_model(name: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"^model must be a flax\.nnx\.Module, got {type(wrong).__name__}$"):
        TOOLS[name](wrong)


@pytest.mark.parametrize("wrong", [5, "data", None], ids=["number", "text", "None"])
def test_no_data(wrong: Any) -> None:
    layer, scale = BatchNorm(3, rngs=nnx.Rngs(0)), Standardize(3)
    for tool in (functools.partial(calibrate, layer), scale.fit):
        with pytest.raises(TypeError, match=r"^data must give batches, one after the other, got "):
            tool(wrong)
    with pytest.raises(TypeError, match=r"^example_inputs must be an array, or a tuple of arguments, got "):
        fold(layer, wrong)
    assert scale.count[...] == 0


def test_wrong_options() -> None:
    for limit in ("s", None, [3], 0.5):
        with pytest.raises(ValueError, match=r"^r_max must be at least 1, got "):
            Renorm(limit)
    with pytest.raises(ValueError, match=r"^a route must be one of kernels, formula; got 5$"), route(5):  # type: ignore[arg-type]
        pass
