"""Freezing and calibrating models of every kind."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from backends import BACKEND, numbers
from check_layer import BOUND, EPS, close, draw, normalizations, randomize, second
from keras import layers, ops

from batchnorm import definition
from batchnorm.definition import Moments
from batchnorm.keras import BatchNormalization, calibrate, freeze, unfreeze

Kind = Callable[..., Any]
KINDS = [layers.BatchNormalization, BatchNormalization]


@keras.saving.register_keras_serializable(package="checks")
class Subclassed(keras.Model):
    """With a list of layers, a dropout, and a normalization that is told to train."""

    def __init__(self, kind: str = "ours", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        normalization = BatchNormalization if kind == "ours" else layers.BatchNormalization
        self.kind = kind
        self.blocks = [layers.Dense(6), normalization(epsilon=EPS), layers.Dropout(0.5), layers.Dense(4)]
        self.last = normalization(epsilon=EPS)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = inputs
        for block in self.blocks:
            x = (
                block(x, training=training)
                if isinstance(block, layers.BatchNormalization | layers.Dropout)
                else block(x)
            )
        return self.last(x, training=training)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"kind": self.kind}


def functional(kind: Kind = BatchNormalization) -> Any:
    inputs = keras.Input((5,))
    x = kind(epsilon=EPS)(layers.Dense(6)(inputs))
    x = layers.Dropout(0.5)(x)
    return keras.Model(inputs, kind(epsilon=EPS)(layers.Dense(4)(layers.Activation("relu")(x))))


def sequential(kind: Kind = BatchNormalization) -> Any:
    inner = keras.Sequential([keras.Input((6,)), kind(epsilon=EPS), layers.Activation("relu")])
    return keras.Sequential(
        [keras.Input((5,)), layers.Dense(6), inner, layers.Dropout(0.5), layers.Dense(4), kind(epsilon=EPS)]
    )


def subclassed(kind: Kind = BatchNormalization) -> Any:
    model = Subclassed("ours" if kind is BatchNormalization else "theirs")
    model(np.zeros((2, 5), np.float32))
    return model


MODELS = [functional, sequential, subclassed]


def statistics(model: Any) -> list[Any]:
    return [numbers(v) for n in normalizations(model) for v in (n.moving_mean, n.moving_variance)]


def same(a: list[Any], b: list[Any]) -> bool:
    return all((x == y).all() for x, y in zip(a, b, strict=True))


# --- Freezing --------------------------------------------------------------------------------------------------------


# How a model is made and whose layers it has are found out one after the other: each of both once is enough.
@pytest.mark.parametrize(("make", "kind"), [(functional, KINDS[0]), (sequential, KINDS[1]), (subclassed, KINDS[0])])
def test_freezing(make: Any, kind: Kind) -> None:
    model, x = make(kind), draw((16, 5))
    for n in normalizations(model):
        randomize(n)
    model.compile("sgd", "mse")
    model.fit(x, np.zeros((16, 4)), verbose=0)  # compiled before it is frozen
    classes, before = [type(n) for n in normalizations(model)], statistics(model)
    gammas = [numbers(n.gamma) for n in normalizations(model)]
    assert freeze(model) is model
    model.trainable = True
    model(x, training=True)
    model.fit(x, np.zeros((16, 4)), verbose=0)
    assert same(before, statistics(model))
    assert not same(gammas, [numbers(n.gamma) for n in normalizations(model)])
    freeze(model, affine=True)  # frozen already
    assert all(n.frozen == () for n in normalizations(model))
    assert unfreeze(model) is model
    assert [type(n) for n in normalizations(model)] == classes
    model.fit(x, np.zeros((16, 4)), verbose=0)
    assert not any((a == b).all() for a, b in zip(before, statistics(model), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_freezing_gamma_and_beta(kind: Kind) -> None:
    model, x = functional(kind), draw((16, 5))
    freeze(model, affine=True)
    model.trainable = False
    model.trainable = True
    before = [w for n in normalizations(model) for w in n.get_weights()]
    assert len(model.trainable_variables) == 4  # of the dense layers
    # TensorFlow takes seconds to trace what it computes at once step by step. (JAX is the other way round.)
    model.compile("adam", "mse", run_eagerly=BACKEND == "tensorflow")
    model.fit(x, np.zeros((16, 4)), verbose=0)
    assert same(before, [w for n in normalizations(model) for w in n.get_weights()])
    unfreeze(model)
    assert len(model.trainable_variables) == 8
    model.compile("adam", "mse", run_eagerly=BACKEND == "tensorflow")
    model.fit(x, np.zeros((16, 4)), verbose=0)
    assert not any(
        (a == b).all() for a, b in zip(before, [w for n in normalizations(model) for w in n.get_weights()], strict=True)
    )


def test_frozen_layers_normalize_by_their_moving_statistics() -> None:
    layer, x = BatchNormalization(epsilon=EPS), draw((16, 5))
    layer.build((16, 5))
    randomize(layer)
    rstd = definition.reciprocal_std(numbers(layer.moving_variance), EPS)
    exact = definition.normalize(x, numbers(layer.moving_mean), rstd, numbers(layer.gamma), numbers(layer.beta))
    close(freeze(layer)(x, training=True), exact)
    again = BatchNormalization.from_config(layer.get_config())
    assert again.frozen == ()  # a file keeps it


@keras.saving.register_keras_serializable(package="checks")
class Own(layers.BatchNormalization):
    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        return inputs


@keras.saving.register_keras_serializable(package="checks")
class Named(layers.BatchNormalization):
    """A class of its own, which computes the same."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"epsilon": 0.01} | kwargs)


def test_what_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match=r"named \(Named\) has a class of its own"):
        freeze(keras.Sequential([keras.Input((3,)), Named()]))
    with pytest.raises(ValueError, match="no batch normalization to freeze"):
        freeze(layers.Dense(3))
    with pytest.raises(ValueError, match="call the model on one batch first"):
        freeze(keras.Sequential([BatchNormalization()]))
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(), Own()])
    with pytest.raises(ValueError, match=r"own \(Own\) has a call of its own"):
        freeze(model)
    assert type(model.layers[0]) is layers.BatchNormalization
    with pytest.raises(TypeError, match=r"must be a keras.Model or a layer, got str"):
        freeze("model")


# --- Calibrating -----------------------------------------------------------------------------------------------------


def pooled(parts: Any) -> Moments:
    found = Moments(0.0, *np.zeros((2, 5)))
    for part in parts:
        found = definition.merge_moments(found, definition.moments(second(np.asarray(part), -1)))
    return found


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_all_data(kind: Kind, unbiased: bool) -> None:
    """Whatever the batches: with the variance between them, and a last one of one sample."""
    model = keras.Sequential([keras.Input((7, 5)), kind()])
    x = np.concatenate([draw((30, 7, 5), offset=offset) for offset in (-4.0, 0.0, 5.0)])
    batch = definition.moments(second(x, -1))
    for sizes in ([90], [1, 29, 31, 29], [89, 1]):
        parts = np.split(x, np.cumsum(sizes)[:-1])
        done = calibrate(model, parts, unbiased=unbiased)
        close(model.layers[0].moving_mean, batch.mean)
        close(model.layers[0].moving_variance, batch.var * (batch.count / (batch.count - 1) if unbiased else 1.0))
        assert done.samples == 90
    assert done.largest < 1e-5  # it was calibrated before
    assert "1 layer calibrated on 90 samples" in str(done)


@pytest.mark.parametrize("method", ["parallel", "sequential"])
@pytest.mark.parametrize("make", MODELS)
def test_nothing_but_the_statistics_changes(make: Any, method: Any) -> None:
    model, x = make(), draw((24, 5))
    model.compile("sgd", "mse")
    weights = {id(v): numbers(v) for v in model.variables}
    moving = {id(v) for n in normalizations(model) for v in (n.moving_mean, n.moving_variance)}
    done = calibrate(model, [x[:10], (x[10:], np.zeros(14))], method=method)
    assert len(done.layers) == 2
    assert not done.skipped
    assert all(id(v) in moving or (numbers(v) == weights[id(v)]).all() for v in model.variables)
    assert not any((numbers(v) == weights[id(v)]).all() for v in model.variables if id(v) in moving)
    assert not any("call" in vars(layer) for layer in model._flatten_layers())
    model.fit(x, np.zeros((24, 4)), verbose=0)


@pytest.mark.parametrize("make", MODELS)
def test_sequentially_evaluation_has_the_statistics_of_its_inputs(make: Any) -> None:
    """Dropout is off, and each layer sees what it will see in evaluation."""
    model, x = make(), draw((64, 5))
    for _ in range(2):
        calibrate(model, [x[:40], x[40:]], method="sequential")
    y = numbers(model(x, training=False))  # of the last normalization, whose gamma is 1 and beta 0
    batch = definition.moments(y)
    rounding = 20 * BOUND
    assert np.max(np.abs(batch.mean)) < rounding
    var = numbers(normalizations(model)[-1].moving_variance)
    assert np.max(np.abs(batch.var - var / (var + EPS))) < rounding


def test_batches_of_any_structure() -> None:
    x = draw((12, 5))
    model = keras.Sequential([keras.Input((5,)), BatchNormalization()])
    mean = definition.moments(x).mean

    class Data(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return x[4 * index : 4 * index + 4], np.zeros(4)

    tensors = [ops.convert_to_tensor(x[:5]), ops.convert_to_tensor(x[5:])]
    for data in ([x], (part for part in [x[:3], x[3:]]), [(x, 0)], [[x, 0, 0]], Data(), tensors):
        model.layers[0].moving_mean.assign(np.zeros(5))
        calibrate(model, data)
        close(model.layers[0].moving_mean, mean)
    inputs = {name: keras.Input((size,), name=name) for name, size in (("pixels", 5), ("others", 2))}
    normalized = BatchNormalization()(inputs["pixels"])
    named = keras.Model(inputs, layers.Concatenate()([normalized, inputs["others"]]))
    calibrate(named, [{"pixels": x, "others": x[:, :2]}])
    close(normalizations(named)[0].moving_mean, mean)
    model.layers[0].moving_mean.assign(np.zeros(5))
    calibrate(model, [("id", x)], forward=lambda model, batch: model(batch[1]))
    close(model.layers[0].moving_mean, mean)
    assert calibrate(model, [x[:4], x[4:8], x[8:]], max_samples=5).samples == 8
    if BACKEND == "tensorflow":
        import tensorflow as tf

        calibrate(model, tf.data.Dataset.from_tensor_slices((x, np.zeros(12))).batch(5))
        close(model.layers[0].moving_mean, mean)


def test_masks_count() -> None:
    x = draw((8, 6, 3))
    x[:, 4:] = 0.0
    model = keras.Sequential([keras.Input((6, 3)), layers.Masking(), BatchNormalization()])
    calibrate(model, [x[:5], x[5:]])
    batch = definition.moments(second(x[:, :4], -1))
    close(model.layers[1].moving_mean, batch.mean)
    close(model.layers[1].moving_variance, batch.var)


def test_renormalization_keeps_its_own_statistics() -> None:
    model, x = keras.Sequential([keras.Input((5,)), BatchNormalization(renorm=True)]), draw((20, 5))
    layer = model.layers[0]
    before = numbers(layer.renorm_mean), numbers(layer.renorm_stddev)
    calibrate(model, [x])
    assert same(list(before), [numbers(layer.renorm_mean), numbers(layer.renorm_stddev)])
    close(numbers(layer.moving_stddev) ** 2 - layer.epsilon, definition.moments(x).var)


def test_frozen_layers_stay() -> None:
    model, x = functional(), draw((20, 5))
    first, last = normalizations(model)
    freeze(first)
    before = statistics(model)[:2]
    done = calibrate(model, [x])
    assert same(before, statistics(model)[:2])
    assert done.skipped == {first.name: "is frozen"}
    unfreeze(first).trainable = False
    assert calibrate(model, [x]).skipped == {first.name: "is frozen: it is not trainable, while others are"}
    last.trainable = False
    assert len(calibrate(model, [x]).layers) == 2


@pytest.mark.parametrize("method", ["parallel", "sequential"])
def test_an_exception_leaves_all_as_it_was(method: Any) -> None:
    model, x = sequential(), draw((20, 5))
    before = statistics(model)
    bad = x.copy()
    bad[3] = np.nan
    with pytest.raises(ValueError, match="are not finite in float32; nothing has been changed"):
        calibrate(model, [x, bad], method=method)

    def forward(model: Any, batch: Any) -> Any:
        if batch is bad:
            raise ZeroDivisionError
        return model(batch)

    with pytest.raises(ZeroDivisionError):
        calibrate(model, [x, bad], method=method, forward=forward)
    assert same(before, statistics(model))
    assert not any("call" in vars(layer) for layer in model._flatten_layers())
    if BACKEND == "tensorflow":
        import tensorflow as tf

        assert not tf.config.functions_run_eagerly()


def test_data_and_models_that_cannot_be_used() -> None:
    model, x = functional(), draw((20, 5))
    for wrong, error, said in (
        ({"data": x}, TypeError, r"pass \[data\]"),
        ({"data": []}, ValueError, "the data have no samples"),
        ({"data": iter([x]), "method": "sequential"}, ValueError, "can be read only once"),
        ({"data": [x], "method": "both"}, ValueError, "must be one of parallel, sequential, got 'both'"),
        ({"data": [x], "max_samples": 0}, ValueError, "must be positive"),
        ({"data": [(x, 1, 2, 3)]}, TypeError, "a batch of 4 parts"),
    ):
        with pytest.raises(error, match=said):
            calibrate(model, **wrong)
    with pytest.raises(ValueError, match=r"no batch normalization was calibrated \(the model has none\)"):
        calibrate(keras.Sequential([keras.Input((5,)), layers.Dense(3)]), [x])
    with pytest.raises(RuntimeError, match="call the model on one batch first"):
        calibrate(keras.Sequential([BatchNormalization()]), [x])
    with pytest.raises(ValueError, match="its input had only one value, which has no variance"):
        calibrate(model, [x[:1]])
