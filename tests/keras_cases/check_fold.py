"""Folding: the same outputs, the original untouched, and what stays says why."""

from itertools import cycle
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from backends import BACKEND, numbers
from check_layer import draw, normalizations, randomize
from check_tools import Named, Own, Subclassed, subclassed
from keras import layers, ops

from batchnorm.keras import BatchNormalization, fold
from batchnorm.whole.fold import Folded


def network(shape: tuple[int | None, ...], *rest: Any) -> Any:
    return keras.Sequential([keras.Input(shape), *rest])


def filled(model: Any) -> Any:
    for seed, n in enumerate(normalizations(model)):
        randomize(n, seed)
    rng = np.random.default_rng(0)
    for layer in model._flatten_layers():
        if getattr(layer, "use_bias", False):
            layer.bias.assign(rng.normal(size=layer.bias.shape))
    return model


def assert_folds(model: Any, x: Any) -> Folded[Any]:
    """The model is as it was, and the new one computes the same, from a file too."""
    filled(model)
    weights, expected = model.get_weights(), numbers(model(x))
    result = fold(model, x)
    assert all((a == b).all() for a, b in zip(weights, model.get_weights(), strict=True))
    assert (numbers(model(x)) == expected).all()
    assert type(result.model) is type(model)
    assert result.max_error is not None
    assert result.max_error < 2e-5
    assert np.max(np.abs(numbers(result.model(x)) - expected)) <= 2e-5 * np.max(np.abs(expected))
    assert len(result.folded) + len(result.skipped) == len(normalizations(model))
    assert len(normalizations(result.model)) == len(result.skipped)
    return result


BN = BatchNormalization
IMAGES = (6, 7, 4)
MAPS = [
    ((5,), lambda: layers.Dense(3)),
    ((6, 5), lambda: layers.Dense(3, use_bias=False)),
    ((9, 4), lambda: layers.Conv1D(6, 3, padding="causal", groups=2)),
    (IMAGES, lambda: layers.Conv2D(6, 3, padding="same", groups=2, use_bias=False)),
    ((4, 5, 4, 2), lambda: layers.Conv3D(3, 2)),
    (IMAGES, lambda: layers.Conv2DTranspose(3, 3, strides=2, padding="same", use_bias=False)),
    ((9, 4), lambda: layers.Conv1DTranspose(3, 3)),
    (IMAGES, lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)),
    (IMAGES, lambda: layers.SeparableConv2D(5, 3)),
]


# What a normalization computes is read from it before the layer that it goes into is looked at: a kind for each layer
# is enough.
@pytest.mark.parametrize(
    ("shape", "make", "kind"),
    [(*m, kind) for m, kind in zip(MAPS, cycle([layers.BatchNormalization, BN, Named]))],
)
def test_into_the_layer_before(shape: tuple[int, ...], make: Any, kind: Any) -> None:
    map, extra = make(), {"activation": "relu"} if kind is BN else {}
    result = assert_folds(
        network(shape, map, layers.Dropout(0.5), kind(**extra), layers.Activation("tanh")), draw((2, *shape))
    )
    assert list(result.folded.values()) == [map.name]
    assert type(result.model.layers[2]) is (layers.Activation if kind is BN else layers.Identity)


@pytest.mark.parametrize(
    ("shape", "rest"),
    [
        ((5,), lambda: [BN(), layers.Dense(3)]),
        ((6, 5), lambda: [BN(), layers.Dropout(0.2), layers.Dense(3, activation="relu", use_bias=False)]),
        (IMAGES, lambda: [BN(), layers.Conv2D(6, 3, groups=2, use_bias=False)]),
        (IMAGES, lambda: [BN(), layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)]),
        ((9, 4), lambda: [BN(), layers.DepthwiseConv1D(3, strides=2)]),
        (IMAGES, lambda: [BN(), layers.Flatten(), layers.Dense(3)]),
        (IMAGES, lambda: [BN(axis=1), layers.Flatten(), layers.Dense(3)]),
        (IMAGES, lambda: [BN(axis=2), layers.Flatten(), layers.Dense(3)]),
        (IMAGES, lambda: [BN(), layers.GlobalAveragePooling2D(), layers.Dense(3)]),
        (IMAGES, lambda: [BN(), BN(center=False), BN(scale=False), layers.Conv2D(3, 2)]),
    ],
)
def test_into_the_layer_after(shape: tuple[int, ...], rest: Any) -> None:
    model = network(shape, *rest())
    result = assert_folds(model, draw((3, *shape)))
    assert set(result.folded.values()) == {model.layers[-1].name}
    assert not result.skipped


def test_chains_and_files(tmp_path: Path) -> None:
    conv = layers.Conv2D(4, 3)
    model = network(
        IMAGES,
        conv,
        BN(),
        layers.BatchNormalization(),
        BN(activation=("leaky_relu", 0.1)),
        layers.Flatten(),
        layers.Dense(2),
    )
    result = assert_folds(model, x := draw((3, *IMAGES)))
    assert set(result.folded.values()) == {conv.name}
    assert "3 of 3 batch normalizations folded; outputs differ by" in str(result)
    result.model.save(tmp_path / "folded.keras")
    assert "batchnorm" not in (result.model.to_json())
    loaded = keras.models.load_model(tmp_path / "folded.keras")
    np.testing.assert_allclose(numbers(loaded(x)), numbers(result.model(x)), rtol=1e-6, atol=1e-6)


def residual() -> Any:
    inputs = keras.Input(IMAGES)
    x = BN(name="first")(layers.Conv2D(4, 3, padding="same", name="conv_1")(inputs))
    y = BN(name="second")(layers.Conv2D(4, 3, padding="same", name="conv_2")(layers.ReLU()(x)))
    y = BN(name="third")(layers.Add()([x, y]))
    same = layers.Conv2D(4, 3, padding="same", name="conv_3")(layers.ReLU()(y))
    z = BN(name="fourth")(same)
    inner = keras.Sequential([keras.Input(IMAGES), layers.Conv2D(3, 1, name="inside"), BN(name="fifth")], name="nested")
    return keras.Model(inputs, [inner(z), layers.GlobalMaxPooling2D()(same)])


def test_a_network_with_branches() -> None:
    model, x = filled(residual()), draw((2, *IMAGES))
    result = fold(model, x)
    assert result.folded == {"first": "conv_1", "second": "conv_2", "nested/fifth": "nested/inside"}
    assert "before it is an Add" in result.skipped["third"]
    assert result.skipped["fourth"].startswith("what comes before it is also used elsewhere")
    assert result.max_error is not None
    assert result.max_error < 1e-5
    assert fold(model).folded == result.folded  # the graph is known without examples


def test_subclassed_models() -> None:
    model, x = filled(subclassed()), draw((8, 5))
    result = fold(model, x)
    assert type(result.model) is Subclassed
    assert len(result.folded) == 2
    assert result.max_error is not None
    assert result.max_error < 1e-5
    with pytest.raises(ValueError, match="has layers that only a call builds: pass example_inputs"):
        fold(model)


@keras.saving.register_keras_serializable(package="checks")
class Reads(keras.Model):
    """Reads the kernel of a layer besides calling it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense, self.normalization = layers.Dense(5), BN()

    def call(self, inputs: Any) -> Any:
        y = self.normalization(self.dense(inputs))
        return y + ops.matmul(inputs, self.dense.kernel)


def test_variables_that_are_read_elsewhere() -> None:
    model = Reads()
    model(x := draw((8, 5)))
    result = fold(filled(model), x)
    assert not result.folded
    assert "has variables that something else reads" in str(result)


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (lambda: [layers.Dense(4, activation="relu"), BN()], "before it has an activation of its own"),
        (lambda: [layers.LayerNormalization(), BN(), layers.Conv2D(3, 3, padding="same")], "pads with zeros"),
        (lambda: [layers.Conv2D(4, 3), Own()], "is an Own with a call of its own"),
        (lambda: [layers.Conv2D(4, 3), BN(axis=1), layers.ReLU()], "before it has its channels on another axis"),
        (lambda: [BN(), layers.SeparableConv2D(4, 3)], "adds a different part of the shift to each output"),
        (lambda: [BN(), layers.Conv2DTranspose(4, 3)], "adds a different part of the shift to each output"),
        (lambda: [BN(), layers.DepthwiseConv2D(3, padding="same")], "pads with zeros, which the shift does not reach"),
        (lambda: [BN(activation="relu"), layers.Dense(3)], "what comes after it is its own activation"),
        (lambda: [layers.ReLU(), BN(), layers.ReLU()], "after it is a ReLU, which it cannot go into"),
    ],
)
def test_what_stays_says_why(rest: Any, reason: str) -> None:
    result = assert_folds(network(IMAGES, *rest()), draw((2, *IMAGES)))
    assert not result.folded
    assert reason in str(result)


def test_layers_that_are_called_twice() -> None:
    inputs, dense, normalization = keras.Input((5,)), layers.Dense(5), BN()
    model = keras.Model(inputs, normalization(dense(dense(inputs))))
    assert "is called 2 times" in str(assert_folds(model, draw((3, 5))))
    model = keras.Model(inputs, normalization(layers.Dense(5)(normalization(layers.Dense(5)(inputs)))))
    filled(model)
    assert "is called 2 times" in str(fold(model, draw((3, 5))))


def test_statistics_that_cannot_be_folded() -> None:
    model = network((5,), layers.Dense(3), BN())
    model.layers[1].moving_variance.assign([1.0, -2.0, 1.0])
    assert "is not positive" in str(fold(model))
    model.layers[1].moving_variance.assign([1.0, np.nan, 1.0])
    assert "has a moving_variance that is not finite" in str(fold(model))
    told = keras.Model(inputs := keras.Input((5,)), BN()(layers.Dense(3)(inputs), training=True))
    assert "is always called with training=True" in str(fold(told))


# --- What the copy keeps ----------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="checks")
class Remembers(layers.Layer):
    """Has a state that is neither in its config nor in its weights, and says so when it is saved."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shift = np.float32(0.0)

    def call(self, inputs: Any) -> Any:
        return inputs + self.shift

    def save_own_variables(self, store: Any) -> None:
        store["shift"] = np.asarray(self.shift)

    def load_own_variables(self, store: Any) -> None:
        self.shift = np.float32(store["shift"])


@keras.saving.register_keras_serializable(package="checks")
class Vocabulary(Remembers):
    """The same, in a file of its own beside the weights."""

    save_own_variables = layers.Layer.save_own_variables
    load_own_variables = layers.Layer.load_own_variables

    def save_assets(self, folder: str) -> None:
        (Path(folder) / "shift").write_text(str(float(self.shift)))

    def load_assets(self, folder: str) -> None:
        self.shift = np.float32((Path(folder) / "shift").read_text())


def adapted() -> Any:
    layer = layers.Normalization()
    layer.adapt(draw((50, *IMAGES), offset=30.0))
    return layer


def shifted(kind: Any) -> Any:
    layer = kind()
    layer.shift = np.float32(7.0)
    return layer


@pytest.mark.parametrize("make", [adapted, lambda: shifted(Remembers), lambda: shifted(Vocabulary)])
def test_state_outside_of_config_and_weights(make: Any) -> None:
    model, x = network(IMAGES, make(), layers.Conv2D(4, 3), BN(), layers.ReLU()), draw((2, *IMAGES))
    assert len(assert_folds(model, x).folded) == 1
    result = fold(model)
    np.testing.assert_allclose(numbers(result.model(x)), numbers(model(x)), rtol=1e-4, atol=1e-4)


def test_state_that_no_file_keeps() -> None:
    class Silent(Remembers):  # neither registered nor at the top of a module
        def save_own_variables(self, store: Any) -> None:
            pass

        def load_own_variables(self, store: Any) -> None:
            pass

    model = network((5,), Silent(), layers.Dense(3), BN())
    assert len(fold(model).folded) == 1
    model.layers[0].shift = np.float32(7.0)
    with pytest.raises(TypeError, match=r"Sequential cannot be copied: the outputs of a copy .* differ .* leaves out"):
        fold(model)


@keras.saving.register_keras_serializable(package="checks")
class Counts(layers.Layer):
    """Draws random numbers in evaluation too, and counts its calls."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(3)
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")

    def call(self, inputs: Any) -> Any:
        self.count.assign(self.count + 1.0)
        return inputs + keras.random.normal(ops.shape(inputs), seed=self.seed) + keras.random.normal((1, 5))

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


def test_folding_counts_no_calls_and_draws_no_numbers() -> None:
    model = network((5,), Counts(), layers.Dense(4), BN())
    model(draw((2, 5)))
    before = [numbers(v) for v in model.variables]
    result = fold(model, draw((3, 5)))
    assert len(result.folded) == 1
    assert all((numbers(v) == b).all() for v, b in zip(model.variables, before, strict=True))
    keras.utils.set_random_seed(5)
    expected = numbers(model(x := draw((2, 5))))
    keras.utils.set_random_seed(5)
    np.testing.assert_allclose(numbers(result.model(x)), expected, rtol=1e-5, atol=1e-5)


@keras.saving.register_keras_serializable(package="checks")
class Random(layers.Layer):
    def call(self, inputs: Any) -> Any:
        return inputs + np.random.default_rng().normal()


@keras.saving.register_keras_serializable(package="checks")
class Counted(layers.Layer):
    """Takes counts only, which nothing says before it is called."""

    def call(self, inputs: Any) -> Any:
        if numbers(inputs).min() < 0:
            raise ArithmeticError("these are no counts")
        return inputs

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


def test_what_was_not_compared_is_said() -> None:
    result = fold(network((5,), Random(), layers.Dense(4), BN()), draw((3, 5)))
    assert len(result.folded) == 1
    assert result.max_error is None
    assert "outputs were not compared: the outputs of the model differ from call to call" in str(result)
    model = network((5,), Counted(), layers.Dense(4), BN())
    said = "the model cannot be called on random inputs (these are no counts): pass example_inputs"
    assert fold(model).notes == (f"outputs were not compared: {said}",)
    assert fold(model, np.abs(draw((3, 5)))).max_error is not None


# --- The comparison ---------------------------------------------------------------------------------------------------


def falsify(monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    """Fold everything with this number of channels wrongly, by one percent."""
    from batchnorm.whole.linear import LinearMap

    then = LinearMap.then

    def planted(self: Any, n: Any) -> Any:
        return then(self, n._replace(weight=n.weight * (1.01 if n.channels == wrong else 1.0)))

    monkeypatch.setattr(LinearMap, "then", planted)


@pytest.mark.parametrize("x", [None, np.zeros((4, 5), np.float32)])
def test_a_fold_that_changes_the_outputs_is_undone(x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    falsify(monkeypatch, 3)
    model = filled(
        network((5,), *(f() for n in (6, 3, 7) for f in (lambda n=n: layers.Dense(n), BN, layers.LeakyReLU)))
    )
    model.layers[4].beta.assign(np.zeros(3))  # no shift, so that
    model.layers[3].bias.assign(np.zeros(3))
    model.layers[4].moving_mean.assign(np.zeros(3))  # zeros stay zeros
    result = fold(model, x)
    wrong = model.layers[4].name
    assert list(result.skipped) == [wrong]
    assert result.skipped[wrong].startswith("was folded and put back: the folded model's outputs differ by")
    assert "but rounding explains only 1.0e-04" in result.skipped[wrong]
    assert len(result.folded) == 2
    assert result.max_error < 1e-5
    np.testing.assert_allclose(numbers(result.model(draw((9, 5)))), numbers(model(draw((9, 5)))), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")  # JAX has it only if it is asked for
@pytest.mark.parametrize("normalization", [layers.BatchNormalization, BN])
def test_float64(normalization: Any) -> None:
    """Keras computes its matrix products in float32, unless it runs on TensorFlow."""
    same: dict[str, Any] = {"dtype": "float64"}
    inputs = keras.Input(IMAGES, **same)
    x = layers.ReLU(**same)(normalization(**same)(layers.Conv2D(4, 3, **same)(inputs)))
    model = keras.Model(inputs, normalization(**same)(layers.Dense(3, **same)(layers.Flatten(**same)(x))))
    result = fold(filled(model), np.random.default_rng(0).normal(size=(4, *IMAGES)))
    assert len(result.folded) == 2
    assert result.max_error < (1e-10 if BACKEND == "tensorflow" else 1e-5)


@keras.saving.register_keras_serializable(package="checks")
class Sensitive(layers.Layer):
    """What multiplies the last digits of its inputs."""

    def call(self, inputs: Any) -> Any:
        return ops.sin(3000 * inputs)


def test_the_rounding_of_the_model_itself_counts() -> None:
    model = filled(network((40,), layers.Dense(30), BN(), Sensitive()))
    result = fold(model, draw((20, 40)))
    assert len(result.folded) == 1
    assert result.max_error > 1e-4


# --- Files ------------------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="checks")
class Block(layers.Layer):
    """A layer of layers, which it makes by itself."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense, self.normalization = layers.Dense(5, use_bias=False), layers.BatchNormalization()

    def build(self, shape: Any) -> None:
        self.dense.build(shape)
        self.normalization.build((None, 5))

    def call(self, inputs: Any) -> Any:
        return self.normalization(self.dense(inputs))


@pytest.mark.parametrize("make", [subclassed, lambda: network((5,), Block(), layers.Dense(3))])
def test_what_cannot_be_saved_says_so(make: Any, tmp_path: Path) -> None:
    model, x = filled(make()), draw((8, 5))
    result = fold(model, x)
    assert result.folded
    for use in (lambda m: m.save(tmp_path / "m.keras"), keras.models.clone_model, fold):
        with pytest.raises(TypeError, match=r"was folded, and a (Subclassed|Block) .* save the original and fold it"):
            use(result.model)
    model.save(tmp_path / "m.keras")
    again = fold(keras.models.load_model(tmp_path / "m.keras"), x)
    result.model.save_weights(tmp_path / "m.weights.h5")
    again.model.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(numbers(again.model(x)), numbers(result.model(x)))


@keras.saving.register_keras_serializable(package="checks")
class Wraps(layers.Wrapper):
    """Has its layer in its config."""

    def call(self, inputs: Any) -> Any:
        return self.layer(inputs)


def test_wrappers_can_be_saved(tmp_path: Path) -> None:
    inner = keras.Sequential([keras.Input((6, 5)), layers.Dense(4, use_bias=False), layers.BatchNormalization()])
    model = filled(network((6, 5), Wraps(inner), layers.ReLU()))
    result = fold(model, x := draw((2, 6, 5)))
    assert len(result.folded) == 1
    result.model.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(numbers(keras.models.load_model(tmp_path / "m.keras")(x)), numbers(result.model(x)))


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"must be a keras\.Model, got a layer"):
        fold(layers.Dense(3))
    with pytest.raises(ValueError, match="call it on one batch first"):
        fold(keras.Sequential([layers.Dense(3)]))


# JAX compiles a program for each shape of each operation, which takes 15 s for the second: one network is enough there.
NETWORKS: list[tuple[str, dict[str, Any]]] = [("MobileNetV2", {"alpha": 0.35}), ("ResNet50V2", {})]


@pytest.mark.parametrize(("make", "options"), NETWORKS[: 1 if BACKEND == "jax" else 2])
def test_networks_of_keras(make: str, options: dict[str, Any]) -> None:
    network = getattr(keras.applications, make)
    model = filled(network(weights=None, input_shape=(32, 32, 3), classes=5, **options))
    for n in normalizations(model):  # outputs of size 1 to the end
        n.moving_variance.assign(np.ones(n.moving_variance.shape))
    result = fold(model, draw((2, 32, 32, 3)))
    print(result)
    folded, all_of_them = len(result.folded), len(normalizations(model))
    assert folded == all_of_them if make == "MobileNetV2" else folded >= all_of_them // 2
