"""The layer on one backend against the definition in float64, and against Keras' own."""

import importlib.util
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from backends import BACKEND, numbers, step
from keras import layers, ops
from numpy.typing import NDArray

from batchnorm import definition
from batchnorm.definition import Moments
from batchnorm.keras import BatchNormalization, calibrate, convert, fold, freeze, revert, to_torch, unfreeze
from batchnorm.keras.layers import KerasBatchNormalization

EPS = 1e-3
BOUND = 40 * float(np.finfo(np.float32).eps)
"""For numbers of size 1 to 5 that about ten roundings, and sums of a few hundred terms, stand before."""


def second(x: NDArray[Any], axis: int) -> NDArray[Any]:
    """With the channels where the definition has them."""
    return np.moveaxis(x, axis, 1)


def draw(shape: tuple[int, ...], seed: int = 0, offset: float = 1.0) -> NDArray[Any]:
    return (np.random.default_rng([*shape, seed]).normal(size=shape) * 2 + offset).astype(np.float32)


def layer_for(shape: tuple[int, ...], **kwargs: Any) -> Any:
    """Built, with weights and statistics that do something to every channel."""
    layer = BatchNormalization(epsilon=EPS, momentum=0.9, **kwargs)
    layer.build(shape)
    randomize(layer)
    return layer


def randomize(layer: Any, seed: int = 1) -> None:
    rng = np.random.default_rng(seed)
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        if (variable := getattr(layer, name)) is not None:
            positive = name in ("gamma", "moving_variance")
            variable.assign(rng.uniform(0.5, 2.0, variable.shape) if positive else rng.normal(size=variable.shape))


def normalizations(model: Any) -> list[Any]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, KerasBatchNormalization)]


def close(found: Any, exact: NDArray[Any], bound: float = BOUND) -> None:
    found = numbers(found)
    assert found.shape == exact.shape
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(exact))
    assert np.max(np.abs(found - exact), initial=0.0) <= bound * max(1.0, float(np.max(np.abs(exact), initial=0.0)))


SHAPES = [((6, 5), -1), ((6, 5, 7), -1), ((6, 5, 7), 1), ((4, 5, 6, 3), -1), ((4, 3, 5, 6), 1), ((2, 3, 2, 4, 3), 3)]
ACTIVATIONS: list[tuple[Any, Any]] = [
    (None, None),
    ("relu", "relu"),
    ("relu6", "relu6"),
    ("leaky_relu", ("leaky_relu", 0.2)),  # Keras' slope
    (("leaky_relu", 0.05), ("leaky_relu", 0.05)),
    ("silu", "silu"),
    ("hard_silu", "hardswish"),
    (("elu", 1.5), ("elu", 1.5)),
    ("sigmoid", "sigmoid"),
    ("tanh", "tanh"),
    ("gelu", "gelu"),
    (keras.activations.swish, "silu"),
    (ops.relu, "relu"),
    (ops.leaky_relu, ("leaky_relu", 0.2)),
    (layers.ReLU(), "relu"),
    (layers.ReLU(6), "relu6"),
    (layers.LeakyReLU(0.3), ("leaky_relu", 0.3)),
    (layers.ELU(0.5), ("elu", 0.5)),
    (layers.Activation("tanh"), "tanh"),
]


def assert_step(layer: Any, x: NDArray[Any], axis: int, activation: Any, mask: Any, weights: Any) -> None:
    """Outputs, gradients and moving statistics of a step in training, and outputs in evaluation."""
    gamma, beta, mean, var = (numbers(v) for v in (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance))
    exact, batch = definition.forward(second(x, axis), gamma, beta, activation=activation, mask=weights, eps=EPS)
    z, _ = definition.forward(second(x, axis), gamma, beta, mask=weights, eps=EPS)
    kinks = np.min([np.abs(z - kink) for kink in (-3, 0, 3, 6)], axis=0) < 1e-3
    dy = np.where(kinks, 0.0, second(draw(x.shape, 7, 0.0), axis)).astype(np.float32)
    found = step(layer, x, np.moveaxis(dy, 1, axis), **({} if mask is None else {"mask": ops.convert_to_tensor(mask)}))
    close(found.y, np.moveaxis(exact, 1, axis))
    dx, d_gamma, d_beta, _ = definition.backward(
        dy, second(x, axis), gamma, beta, activation=activation, mask=weights, eps=EPS
    )
    close(found.dx, np.moveaxis(dx, 1, axis))
    close(found.weights[0], d_gamma)
    close(found.weights[1], d_beta)
    new_mean, new_var = definition.update_running(mean, var, batch, 0.1, unbiased=False)
    close(layer.moving_mean, new_mean)
    close(layer.moving_variance, new_var)
    rstd = definition.reciprocal_std(numbers(layer.moving_variance), EPS)
    exact = definition.normalize(second(x, axis), numbers(layer.moving_mean), rstd, gamma, beta, activation=activation)
    close(layer(ops.convert_to_tensor(x), training=False), np.moveaxis(exact, 1, axis))


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_training_and_evaluation(shape: tuple[int, ...], axis: int) -> None:
    assert_step(layer_for(shape, axis=axis), draw(shape), axis, None, None, None)


@pytest.mark.parametrize(("given", "meant"), ACTIVATIONS)
def test_activations(given: Any, meant: Any) -> None:
    layer = layer_for((4, 5, 6, 3), activation=given)
    assert layer.activation.is_fused
    assert layer.activation.layer is None
    assert_step(layer, draw((4, 5, 6, 3)), -1, meant, None, None)


def test_an_activation_that_no_kernel_has() -> None:
    layer, x = layer_for((6, 5), activation="softplus"), draw((6, 5))
    z, _ = definition.forward(x, numbers(layer.gamma), numbers(layer.beta), eps=EPS)
    close(layer(x, training=True), np.logaddexp(z, 0.0))
    assert BatchNormalization.from_config(layer.get_config()).activation.config == "softplus"


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_no_kernel_has(training: bool) -> None:
    layer, x = layer_for((6, 5), activation=layers.ReLU(1.5, negative_slope=0.1, threshold=0.5)), draw((6, 5))
    gamma, beta = numbers(layer.gamma), numbers(layer.beta)
    if training:
        z, _ = definition.forward(x, gamma, beta, eps=EPS)
    else:
        rstd = definition.reciprocal_std(numbers(layer.moving_variance), EPS)
        z = definition.normalize(x, numbers(layer.moving_mean), rstd, gamma, beta)
    close(layer(x, training=training), np.where(z < 0.5, 0.1 * (z - 0.5), np.minimum(z, 1.5)))


def test_a_layer_with_weights() -> None:
    layer, x, dy = layer_for((6, 5), activation=layers.PReLU()), draw((6, 5)), draw((6, 5), 7, 0.0)
    names = [variable.name for variable in layer.trainable_variables]
    assert sorted(names) == ["alpha", "beta", "gamma"]
    alpha = layer.activation.layer.alpha
    alpha.assign([0.1, 0.2, 0.3, 0.4, 0.5])
    gamma, beta, slopes = (numbers(v) for v in (layer.gamma, layer.beta, alpha))
    z, _ = definition.forward(x, gamma, beta, eps=EPS)
    found = step(layer, x, dy)
    close(found.y, np.where(z > 0, z, slopes * z))
    gradients = dict(zip(names, found.weights, strict=True))
    close(gradients["alpha"], np.sum(np.where(z > 0, 0.0, z) * dy, 0))
    dz = np.where(z > 0, 1.0, slopes) * dy
    dx, d_gamma, d_beta, _ = definition.backward(dz, x, gamma, beta, eps=EPS)
    close(found.dx, dx)
    close(gradients["gamma"], d_gamma)
    close(gradients["beta"], d_beta)


def test_what_is_no_activation() -> None:
    with pytest.raises(TypeError, match=r"must be a function or a layer, got a class: write ReLU\(\)"):
        BatchNormalization(activation=layers.ReLU)
    with pytest.raises(ValueError, match="saved under the name 'gelu', which is another function"):
        BatchNormalization(activation=ops.gelu).get_config()  # an approximation, unlike `keras.activations.gelu`


@pytest.mark.parametrize("kept", ["center", "scale", None])
def test_without_gamma_or_beta(kept: str | None) -> None:
    layer = layer_for((6, 5), **{name: name == kept for name in ("center", "scale")}, activation="relu")
    x, gamma, beta = draw((6, 5)), layer.gamma, layer.beta
    exact, _ = definition.forward(
        x,
        None if gamma is None else numbers(gamma),
        None if beta is None else numbers(beta),
        activation="relu",
        eps=EPS,
    )
    close(layer(x, training=True), exact)


# --- Masks -----------------------------------------------------------------------------------------------------------

IMAGES = (4, 5, 6, 3)


@pytest.mark.parametrize(
    ("shape", "axis", "mask_shape"),
    [
        ((6, 5), -1, (6,)),
        ((6, 7, 5), -1, (6, 7)),
        ((6, 7, 5), -1, (6,)),
        (IMAGES, -1, (4, 5, 6)),
        (IMAGES, -1, (4, 5, 1)),
        (IMAGES, -1, (4, 5)),
        ((4, 3, 5, 6), 1, (4, 5, 6)),  # without channels, which are not last
        ((4, 3, 5, 6), 1, (4, 1, 5, 6)),
        ((4, 3, 5, 6), 1, (4,)),
    ],
)
@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_masks(shape: tuple[int, ...], axis: int, mask_shape: tuple[int, ...], kind: str) -> None:
    rng = np.random.default_rng(3)
    mask = rng.choice([0.0, 1.0] if kind == "bool" else [0.0, 0.5, 1.0, 2.0], mask_shape)
    mask.flat[:3] = 0.0, 1.0, 1.0
    positions = second(np.zeros(shape), axis)[:, 0].shape
    weights = mask.reshape(mask_shape[:1] + mask_shape[2:]) if len(mask_shape) == len(shape) else mask
    weights = weights.reshape(weights.shape + (1,) * (len(positions) - weights.ndim))
    weights = np.broadcast_to(weights, positions)
    assert_step(layer_for(shape, axis=axis), draw(shape), axis, None, mask.astype(kind), weights)


def test_a_mask_that_keeps_other_positions_in_each_channel() -> None:
    """As Keras reads it: the mask covers the first axes, and one of them are the channels."""
    x, mask = draw((6, 5, 7)), np.random.default_rng(4).random((6, 5)) < 0.7
    layer = layer_for((6, 5, 7), axis=1)
    theirs = layers.BatchNormalization(axis=1, momentum=0.9, epsilon=EPS)
    theirs.build((6, 5, 7))
    theirs.set_weights(layer.get_weights())
    y = layer(x, training=True, mask=ops.convert_to_tensor(mask))
    for channel in range(5):
        exact, batch = definition.forward(
            x[:, channel : channel + 1], numbers(layer.gamma)[[channel]], numbers(layer.beta)[[channel]],
            mask=np.broadcast_to(mask[:, channel, None], (6, 7)), eps=EPS,
        )  # fmt: skip
        close(numbers(y)[:, channel : channel + 1], exact)
        moved = 0.9 * numbers(theirs.moving_mean)[channel] + 0.1 * batch.mean[0]
        assert abs(numbers(layer.moving_mean)[channel] - moved) < BOUND


def test_masks_that_do_not_fit_or_can_be_read_in_two_ways() -> None:
    layer, x = layer_for((6, 5, 5), axis=1), draw((6, 5, 5))
    with pytest.raises(ValueError, match=r"\(6, 5\) can be read in two ways .* \(6, 5, 5\) with channels in axis 1"):
        layer(x, training=True, mask=np.ones((6, 5), bool))
    with pytest.raises(ValueError, match=r"\(6, 4\) does not fit inputs of shape \(6, 5, 5\)"):
        layer(x, training=True, mask=np.ones((6, 4), bool))
    assert numbers(layer(x, training=True, mask=np.ones((6, 5, 1), bool))).shape == x.shape


def test_what_is_masked_may_be_nan() -> None:
    x, mask = draw((6, 7, 5)), np.ones((6, 7), bool)
    mask[:, 4:] = False
    layer = layer_for((6, 7, 5))
    exact, batch = definition.forward(second(x, -1), numbers(layer.gamma), numbers(layer.beta), mask=mask, eps=EPS)
    mean, var = definition.update_running(
        numbers(layer.moving_mean), numbers(layer.moving_variance), batch, 0.1, unbiased=False
    )
    x[:, 4:] = np.nan
    y = numbers(layer(x, training=True, mask=ops.convert_to_tensor(mask)))
    close(y[:, :4], np.moveaxis(exact, 1, -1)[:, :4])
    close(layer.moving_mean, mean)
    close(layer.moving_variance, var)


def test_nothing_counts_when_all_is_masked() -> None:
    layer, x = layer_for((6, 5)), draw((6, 5))
    before = [numbers(v) for v in (layer.moving_mean, layer.moving_variance)]
    y = layer(x, training=True, mask=np.zeros(6, bool))
    close(y, numbers(layer.gamma) * x / np.sqrt(EPS) + numbers(layer.beta))  # the moments of nothing are 0
    assert all((numbers(v) == b).all() for v, b in zip((layer.moving_mean, layer.moving_variance), before, strict=True))


def test_masks_of_masking_reach_the_layer_and_pass_it() -> None:
    padded = draw((8, 6, 3))
    lengths = np.array([6, 5, 4, 3, 6, 2, 1, 6])
    kept = np.arange(6) < lengths[:, None]
    padded[~kept] = -9.0
    inputs = keras.Input((None, 3))
    normalized = BatchNormalization(momentum=0.0, activation="relu")(layers.Masking(-9.0)(inputs))
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(normalized))
    model.compile("sgd", "mse")
    model.fit(padded, np.zeros((8, 3)), batch_size=8, epochs=1, verbose=0)
    batch = definition.moments(second(padded * kept[..., None], -1), kept)  # what Masking makes of it
    close(model.layers[2].moving_mean, batch.mean)
    close(model.layers[2].moving_variance, batch.var)
    y = numbers(model(padded))
    cut = numbers(model(padded[6:7, :1]))
    close(y[6:7], cut)  # the pooling behind got the mask


# --- Groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "size", "axis", "masked"),
    [(8, 4, 1, False), (10, 3, -1, False), (10, 3, 1, True), (4, 9, -1, False), (7, 2, -1, True)],
)
def test_virtual_batches(samples: int, size: int, axis: int, masked: bool) -> None:
    shape = (samples, 3, 5)
    channels = shape[axis]
    x, dy = draw(shape), draw(shape, 5, 0.0)
    mask = np.random.default_rng(6).random((samples, 1, 1)) < 0.8
    mask[[0, -1, samples // 2]] = True
    layer = layer_for(shape, axis=axis, virtual_batch_size=size)
    gamma, beta = numbers(layer.gamma), numbers(layer.beta)
    moving = numbers(layer.moving_mean), numbers(layer.moving_variance)
    found = step(layer, x, dy, **({"mask": ops.convert_to_tensor(mask)} if masked else {}))
    groups = max(1, samples // size)
    pooled, d_gamma, d_beta = (
        Moments(0.0, np.zeros(channels), np.zeros(channels)),
        np.zeros(channels),
        np.zeros(channels),
    )
    ends = np.cumsum([samples // groups + (g < samples % groups) for g in range(groups)])[:-1]
    for part in np.split(np.arange(samples), ends):
        weights = np.broadcast_to(mask[part], second(x[part], axis)[:, :1].shape)[:, 0] if masked else None
        exact, batch = definition.forward(second(x[part], axis), gamma, beta, mask=weights, eps=EPS)
        close(numbers(found.y)[part], np.moveaxis(exact, 1, axis))
        dx, dg, db, _ = definition.backward(
            second(dy[part], axis), second(x[part], axis), gamma, beta, mask=weights, eps=EPS
        )
        close(numbers(found.dx)[part], np.moveaxis(dx, 1, axis), 4 * BOUND)
        pooled, d_gamma, d_beta = definition.merge_moments(pooled, batch), d_gamma + dg, d_beta + db
    close(found.weights[0], d_gamma, 4 * BOUND)
    close(found.weights[1], d_beta, 4 * BOUND)
    mean, var = definition.update_running(*moving, pooled, 0.1, unbiased=False)
    close(layer.moving_mean, mean)
    close(layer.moving_variance, var)


def test_unbiased_moves_towards_the_unbiased_variance() -> None:
    for kwargs in ({}, {"virtual_batch_size": 3}, {"synchronized": True}):
        layer, x = layer_for((6, 5), unbiased=True, **kwargs), draw((6, 5))
        _, var = definition.update_running(
            numbers(layer.moving_mean), numbers(layer.moving_variance), definition.moments(x), 0.1
        )
        layer(x, training=True)
        close(layer.moving_variance, var)


# --- What must not spoil anything ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"renorm": True}, {"virtual_batch_size": 2}, {"synchronized": True}])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_is_left_out(value: float, kwargs: dict[str, Any]) -> None:
    layer, x = layer_for((6, 5), **kwargs), draw((6, 5))
    before = layer.get_weights()
    x[2, 3] = value
    y = numbers(layer(x, training=True))
    assert not np.isfinite(y[:, 3]).any() or "virtual_batch_size" in kwargs
    assert all((a == b).all() for a, b in zip(before, layer.get_weights(), strict=True))
    x[2, 3] = 0.0
    layer(x, training=True)
    assert not (before[2] == layer.get_weights()[2]).any()


def test_far_from_zero() -> None:
    """The error of `x - mean` does not grow with `mean / std` beyond what the inputs' own rounding does."""
    x = draw((64, 5), offset=3000.0)
    layer = layer_for((64, 5))
    exact, _ = definition.forward(x, numbers(layer.gamma), numbers(layer.beta), eps=EPS)
    close(layer(x, training=True), exact, 3000 * BOUND / 40)
    layer.moving_mean.assign(np.full(5, 3000.0))
    exact = definition.normalize(
        x, np.full(5, 3000.0), definition.reciprocal_std(numbers(layer.moving_variance), EPS), numbers(layer.gamma),
        numbers(layer.beta),
    )  # fmt: skip
    close(layer(x, training=False), exact)


@pytest.mark.parametrize(("shape", "axis"), [((20, 7), -1), ((4, 7, 6), 1), ((1 << 18, 5), -1)])
def test_evaluation_far_from_zero_by_the_routes_that_users_get(shape: tuple[int, ...], axis: int) -> None:
    """On both sides of the sizes from which the kernels of `batchnorm.torch` pay."""
    x = (1e6 + np.random.default_rng(0).normal(size=shape)).astype(np.float32)
    layer = layer_for(shape, axis=axis)
    channels = shape[axis]
    layer.moving_mean.assign(np.full(channels, 1e6))
    layer.moving_variance.assign(np.ones(channels))
    exact = definition.normalize(
        second(x, axis), np.full(channels, 1e6), definition.reciprocal_std(np.ones(channels), EPS),
        numbers(layer.gamma), numbers(layer.beta),
    )  # fmt: skip
    allowed: Any = nullcontext()
    if BACKEND == "torch":
        from batchnorm.torch import route

        allowed = route()
    with allowed:
        close(layer(ops.convert_to_tensor(x), training=False), np.moveaxis(exact, 1, axis))


@pytest.mark.skipif(BACKEND != "jax", reason="XLA's custom calls")
@pytest.mark.parametrize(("shape", "axis"), [((6, 5), -1), ((6, 5, 7), 1), ((4, 5, 6, 3), -1)])
def test_the_kernels_inside_programs(shape: tuple[int, ...], axis: int) -> None:
    """In JAX the checks above are of the formula, because they are small."""
    from batchnorm.xla.routes import route

    x = draw(shape)
    with route("kernels"):
        assert_step(layer_for(shape, axis=axis, activation="relu"), x, axis, "relu", None, None)
        with pytest.raises(RuntimeError, match="cannot compute this call: it has a mask"):
            layer_for(shape, axis=axis)(x, training=True, mask=np.ones(shape, bool))
        plain = BatchNormalization(axis=axis, epsilon=EPS, center=False, scale=False, activation="softplus")
        z, _ = definition.forward(second(x, axis), eps=EPS)
        close(plain(x, training=True), np.moveaxis(np.logaddexp(z, 0.0), 1, axis))


@pytest.mark.skipif(BACKEND != "jax", reason="XLA's custom calls")
def test_the_kernels_round_once_in_half_precision() -> None:
    """As the formula does: `y` has the layer's type, and the input of an activation without a kernel is float32."""
    from batchnorm.xla.routes import route

    x = ops.cast(draw((64, 5)), "bfloat16")
    exact, _ = definition.forward(numbers(x), eps=EPS)
    plain = {"axis": -1, "epsilon": EPS, "center": False, "scale": False}
    with route("kernels", "formula"):
        # exp(8 z) makes the rounding of z visible.
        mixed = BatchNormalization(dtype="mixed_bfloat16", activation=lambda z: ops.exp(8.0 * z), **plain)
        y = numbers(mixed(x, training=True))
        assert np.max(np.abs(y / np.exp(8.0 * exact) - 1)) < 2.0**-8 + 1e-4
        close(BatchNormalization(autocast=False, **plain)(x, training=True), exact)
    with route("kernels"), pytest.raises(RuntimeError, match="its activation has no kernel"):
        mixed(x, training=True)


@pytest.mark.skipif(BACKEND != "jax", reason="XLA's custom calls")
def test_when_programs_have_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    from batchnorm.xla.kernels import BACKWARD
    from batchnorm.xla.routes import SMALL

    def text(rows: int, layer: Any, dtype: str = "float32") -> str:
        def loss(x: Any) -> Any:
            learned, moving = (
                [v.value for v in some] for some in (layer.trainable_weights, layer.non_trainable_weights)
            )
            return ops.sum(ops.cast(layer.stateless_call(learned, moving, x, training=True)[0], "float32") ** 2)

        return str(jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((rows, 16), dtype)).as_text())

    rows = SMALL // 16
    layer, half = layer_for((1, 16)), layer_for((1, 16), dtype="mixed_bfloat16")
    assert [BACKWARD in text(n, layer) for n in (rows - 1, rows)] == [False, True]
    (called,) = (line for line in text(rows, half, "bfloat16").splitlines() if f"@{BACKWARD}(" in line)
    assert called.count(f"tensor<{rows}x16xbf16>") == 3  # dy and x, and dx: they are not cast before
    for kwargs in {"virtual_batch_size": rows}, {"synchronized": True}, {"renorm": True}:
        assert BACKWARD not in text(rows, layer_for((1, 16), **kwargs))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert BACKWARD not in text(rows, layer)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("training", [True, False])
def test_mixed_precision(policy: str, training: bool) -> None:
    layer, x = layer_for((64, 5), dtype=policy, activation="relu"), draw((64, 5), offset=300.0)
    half = policy.removeprefix("mixed_")
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[half]
    rounded = numbers(ops.cast(x, half))
    gamma, beta = numbers(layer.gamma), numbers(layer.beta)
    if training:
        exact, _ = definition.forward(rounded, gamma, beta, activation="relu", eps=EPS)
    else:
        rstd = definition.reciprocal_std(numbers(layer.moving_variance), EPS)
        exact = definition.normalize(rounded, numbers(layer.moving_mean), rstd, gamma, beta, activation="relu")
    y = layer(x, training=training)
    assert keras.backend.standardize_dtype(y.dtype) == half
    assert np.all(np.abs(numbers(y) - exact) <= eps / 2 * np.abs(exact) + 300 * BOUND)
    assert {keras.backend.standardize_dtype(v.dtype) for v in layer.variables} == {"float32"}


def with_float64() -> Any:
    """JAX has no float64 unless it is asked for."""
    if BACKEND != "jax":
        return nullcontext()
    import jax

    return jax.enable_x64(True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"virtual_batch_size": 3}, {"synchronized": True}, {"unbiased": True}])
def test_float64(kwargs: dict[str, Any], masked: bool) -> None:
    """All of it, although `keras.backend.result_type` says float32 on JAX and PyTorch."""
    with with_float64():
        layer, x = layer_for((6, 5), dtype="float64", **kwargs), np.random.default_rng(0).normal(size=(6, 5))
        gamma, beta = numbers(layer.gamma), numbers(layer.beta)
        moving = numbers(layer.moving_mean), numbers(layer.moving_variance)
        mask = np.array([True, True, False, True, True, True]) if masked else None
        given = {"mask": ops.convert_to_tensor(mask)} if masked else {}
        y = layer(ops.convert_to_tensor(x), training=True, **given)
        for part in [slice(0, 3), slice(3, 6)] if "virtual_batch_size" in kwargs else [slice(0, 6)]:
            exact, _ = definition.forward(x[part], gamma, beta, mask=None if mask is None else mask[part], eps=EPS)
            close(y[part], exact, 1e-14)
        batch = definition.moments(x, mask)
        mean, var = definition.update_running(*moving, batch, 0.1, unbiased="unbiased" in kwargs)
        close(layer.moving_mean, mean, 1e-14)
        close(layer.moving_variance, var, 1e-14)
        rstd = definition.reciprocal_std(numbers(layer.moving_variance), EPS)
        exact = definition.normalize(x, numbers(layer.moving_mean), rstd, gamma, beta)
        close(layer(ops.convert_to_tensor(x), training=False), exact, 1e-14)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["int32", "uint8", "bool"])
def test_integers(kind: str, training: bool) -> None:
    layer, x = layer_for((8, 5), activation="relu"), np.random.default_rng(0).integers(0, 2, (8, 5)).astype(kind)
    gamma, beta = numbers(layer.gamma), numbers(layer.beta)
    exact, _ = definition.forward(x.astype(np.float64), gamma, beta, activation="relu", eps=EPS)
    if not training:
        rstd = definition.reciprocal_std(numbers(layer.moving_variance), EPS)
        exact = definition.normalize(x, numbers(layer.moving_mean), rstd, gamma, beta, activation="relu")
    y = layer(ops.convert_to_tensor(x), training=training)
    assert keras.backend.standardize_dtype(y.dtype) == "float32"
    close(y, exact)


# --- As Keras' -------------------------------------------------------------------------------------------------------


def network(normalization: Any, **kwargs: Any) -> Any:
    keras.utils.set_random_seed(3)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, use_bias=False)(inputs)
    x = layers.Activation("relu")(normalization(**kwargs)(x))
    x = normalization(axis=1, **kwargs)(layers.Permute((3, 1, 2))(x))
    x = normalization(**kwargs)(layers.Dense(7)(layers.Flatten()(x)))
    return keras.Model(inputs, layers.Dense(3)(x))


RENORM = {"renorm": True, "renorm_clipping": {"rmax": 2.0, "rmin": 0.4, "dmax": 1.0}}


# PyTorch takes minutes to compile, which is tested with the layers of batchnorm.torch; JAX takes long not to.
@pytest.mark.parametrize(
    ("jit", "kwargs"),
    [(False, {}), *[(False, RENORM)] * (BACKEND != "jax"), *[(True, RENORM)] * (BACKEND != "torch")],
)
def test_training_gives_the_numbers_of_keras(kwargs: dict[str, Any], jit: bool) -> None:
    x, y = draw((48, 8, 8, 3)), np.random.default_rng(5).integers(0, 3, 48)
    results = []
    for kind in (BatchNormalization, layers.BatchNormalization):
        model = network(kind, **kwargs)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.05), loss, jit_compile=jit)
        history = model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0)
        results.append((history.history["loss"], model.get_weights(), model.predict(x, verbose=0)))
    ours, theirs = results
    # Nine steps: each may double what rounding makes different.
    np.testing.assert_allclose(ours[0], theirs[0], rtol=2**9 * 1e-7)
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=2**9 * 1e-7, atol=2**9 * 1e-7)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(BACKEND == "torch", reason="nothing to compile with XLA")
@pytest.mark.parametrize("kwargs", [{"virtual_batch_size": 5, "activation": "gelu"}, {"synchronized": True}])
def test_xla_compiles_all_of_it(kwargs: dict[str, Any]) -> None:
    """A step that is compiled gives what a step by step call gives, for a batch size that the graph does not know."""
    x = draw((27, 6, 3))
    x[:, 4:] = 0.0
    weights = []
    for how in ({"jit_compile": True}, {"run_eagerly": True}):
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.Input((None, 3)), layers.Masking(), BatchNormalization(**kwargs)])
        model.compile(keras.optimizers.SGD(0.1), "mse", **how)
        model.fit(x, np.ones_like(x), batch_size=16, epochs=2, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_arguments_and_errors() -> None:
    with pytest.raises(ValueError, match="virtual_batch_size must be a positive integer, got 0"):
        BatchNormalization(virtual_batch_size=0)
    with pytest.raises(ValueError, match=r"virtual_batch_size must be a positive integer, got 1\.5"):
        BatchNormalization(virtual_batch_size=1.5)
    assert type(BatchNormalization(virtual_batch_size=np.int64(4)).get_config()["virtual_batch_size"]) is int
    with pytest.raises(ValueError, match="cannot be combined with synchronized=True"):
        BatchNormalization(virtual_batch_size=4, synchronized=True)
    with pytest.raises(ValueError, match="cannot be combined with renorm=True"):
        BatchNormalization(virtual_batch_size=4, renorm=True)
    with pytest.raises(ValueError, match="nope"):
        BatchNormalization(activation="nope")
    with pytest.raises(ValueError, match="takes no parameter"):
        BatchNormalization(activation=("relu", 0.5))
    with pytest.raises(ValueError, match=r"Axis 3 is out of bounds for input shape \(2, 3\)"):
        BatchNormalization(axis=3)(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"axis -1 of inputs of shape \(None, None\) holds the channels"):
        BatchNormalization()(keras.Input((None,)))
    ours, theirs = BatchNormalization(name="one").get_config(), layers.BatchNormalization(name="one").get_config()
    assert ours == theirs


# --- Files -----------------------------------------------------------------------------------------------------------

EVERYTHING = {"activation": ("leaky_relu", 0.3), "virtual_batch_size": 4, "axis_name": "batch", "unbiased": True}


def test_files_of_ours(tmp_path: Path) -> None:
    inputs = keras.Input((5,))
    model = keras.Model(inputs, layers.Dense(2)(BatchNormalization(**EVERYTHING)(inputs)))
    randomize(model.layers[1])
    x = draw((6, 5))
    model.save(tmp_path / "ours.keras")
    loaded = keras.models.load_model(tmp_path / "ours.keras")
    assert type(loaded.layers[1]) is BatchNormalization
    assert loaded.layers[1].get_config() == model.layers[1].get_config()
    assert loaded.layers[1].activation.config == ["leaky_relu", 0.3]
    np.testing.assert_array_equal(numbers(model(x)), numbers(loaded(x)))


@pytest.mark.parametrize("activation", [layers.LeakyReLU(0.2), layers.ReLU(1.5), layers.PReLU()], ids=str)
def test_files_with_layers_as_activations(activation: Any, tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((5,)), BatchNormalization(activation=activation), layers.Dense(2)])
    model.layers[0].set_weights([0.1 + w + np.arange(5) for w in model.layers[0].get_weights()])
    x = draw((6, 5))
    model.save(tmp_path / "ours.keras")
    model.save_weights(tmp_path / "ours.weights.h5")
    fresh = keras.models.clone_model(model)
    assert fresh.layers[0].activation.layer is not activation  # each has weights of its own
    fresh.load_weights(tmp_path / "ours.weights.h5")
    loaded = keras.models.load_model(tmp_path / "ours.keras")
    for other in (fresh, loaded):
        assert other.layers[0].activation.fused == model.layers[0].activation.fused
        np.testing.assert_array_equal(numbers(model(x)), numbers(other(x)))


def test_files_both_ways(tmp_path: Path) -> None:
    x = draw((4, 8, 8, 3))
    theirs, ours = network(layers.BatchNormalization), network(BatchNormalization)
    theirs.save(tmp_path / "theirs.keras")
    loaded = convert(keras.models.load_model(tmp_path / "theirs.keras"))
    assert [type(layer) for layer in loaded.layers].count(BatchNormalization) == 3
    np.testing.assert_allclose(numbers(theirs(x)), numbers(loaded(x)), rtol=1e-4, atol=1e-4)
    for one, other in ((theirs, BatchNormalization), (ours, layers.BatchNormalization)):
        one.save_weights(tmp_path / "model.weights.h5")
        fresh = network(other)
        fresh.load_weights(tmp_path / "model.weights.h5")
        np.testing.assert_allclose(numbers(one(x)), numbers(fresh(x)), rtol=1e-4, atol=1e-4)


def test_a_file_for_where_this_package_is_not(tmp_path: Path) -> None:
    x = draw((4, 8, 8, 3))
    model = network(BatchNormalization)
    expected = numbers(model(x))
    revert(model).save(tmp_path / "reverted.keras")
    network(BatchNormalization).save(tmp_path / "ours.keras")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import keras, numpy as np, sys\n"
        "x = np.load('x.npy')\n"
        "first = keras.models.load_model('reverted.keras')\n"
        "names = {'batchnorm>BatchNormalization': keras.layers.BatchNormalization}\n"
        "second = keras.models.load_model('ours.keras', custom_objects=names)\n"
        "assert 'batchnorm' not in sys.modules\n"
        "np.savez('y.npz', *(model.predict(x, verbose=0) for model in (first, second)))"
    )
    # JAX starts in a third of the time of TensorFlow, and a file is one of every backend.
    environment = os.environ | {"KERAS_BACKEND": "jax" if importlib.util.find_spec("jax") else BACKEND}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for y in np.load(tmp_path / "y.npz").values():
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(BACKEND != "torch", reason="the others export by way of packages that are not among ours")
@pytest.mark.parametrize(("shape", "axis"), [((5,), -1), ((6, 5), -1), ((6, 5), 1), ((6, 7, 4), -1), ((6, 7, 4), 2)])
def test_files_of_onnx(shape: tuple[int, ...], axis: int, tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = keras.Sequential([keras.Input(shape), BatchNormalization(axis=axis, activation="relu"), layers.Dense(3)])
    randomize(model.layers[0])
    model(x := draw((3, *shape)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras 3.15 calls PyTorch's older exporter
        model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    close(session.run(None, {session.get_inputs()[0].name: x})[0], numbers(model(x)))


def test_our_class_in_the_place_of_that_of_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    """As people exchange a class in a program that they did not write."""

    def small(normalization: Any) -> Any:
        return keras.Sequential([keras.Input((5,)), layers.Dense(4), normalization(), layers.Dense(3)])

    theirs = small(layers.BatchNormalization)
    monkeypatch.setattr(keras.layers, "BatchNormalization", BatchNormalization)
    assert layers.BatchNormalization is BatchNormalization
    ours, x = small(keras.layers.BatchNormalization), draw((8, 5))
    ours(x, training=True)
    ours.trainable = False
    assert [type(layer) for layer in normalizations(convert(theirs))] == [BatchNormalization]
    assert type(normalizations(revert(theirs))[0]) is KerasBatchNormalization is not BatchNormalization
    (normalization,) = normalizations(ours)
    freeze(ours)
    assert normalization.frozen == ()
    unfreeze(ours)
    assert len(calibrate(ours, [x]).layers) == len(fold(ours, x).folded) == 1
    assert len(to_torch(normalization).changes) == 1
    assert type(keras.models.clone_model(ours).layers[1]) is BatchNormalization


def test_converting() -> None:
    model, x = network(layers.BatchNormalization), draw((4, 8, 8, 3))
    model.compile("sgd", "mse")
    model.fit(x, np.zeros((4, 3)), verbose=0)
    before, expected = model.get_weights(), numbers(model(x))
    assert convert(model, virtual_batch_size=2, unbiased=True) is model
    assert all(layer.virtual_batch_size == 2 for layer in normalizations(model))
    np.testing.assert_allclose(numbers(model(x)), expected, rtol=1e-4, atol=1e-4)
    model.fit(x, np.zeros((4, 3)), verbose=0)
    assert any((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))
    with pytest.raises(ValueError, match=r"has virtual_batch_size=2, unbiased=True, which Keras' layer does not have"):
        revert(model)
    assert convert(model, unbiased=False) is model  # layers that are already ours get it, too
    assert not any(layer.unbiased for layer in normalizations(model))
    with pytest.raises(ValueError, match="cannot be combined with synchronized=True"):
        convert(model, synchronized=True)
    assert not any(layer.synchronized for layer in normalizations(model))
    convert(model, synchronized=True, virtual_batch_size=None)
    with pytest.raises(ValueError, match="cannot be combined with synchronized=True"):
        convert(model, virtual_batch_size=4)
    assert all(layer.virtual_batch_size is None for layer in normalizations(model))
    with pytest.raises(TypeError, match="convert has no argument size"):
        convert(model, size=2)
    with pytest.raises(TypeError, match=r"must be a keras.Model or a layer, got int"):
        convert(3)
