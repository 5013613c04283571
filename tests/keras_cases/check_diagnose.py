"""A fault is found in its layer and nowhere else, on every backend, and nothing changes; what `Watch` records."""

import csv
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from backends import BACKEND, numbers
from keras import layers, ops

from batchnorm.keras import Watch, calibrate, diagnose, freeze

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(320, 6)).astype(np.float32)
DATA = [X[i : i + 32] for i in range(0, 320, 32)]


def network(kind: type[Any] = layers.BatchNormalization, rate: float = 0.0, bias: bool = False) -> Any:
    """Three layers, calibrated: the second normalization is where faults are planted."""
    keras.utils.set_random_seed(0)
    parts = [
        layers.Dense(8, use_bias=False), kind(name="first"), layers.ReLU(),
        layers.Dense(8, use_bias=bias, name="middle"),
        *([layers.Dropout(rate, name="drop")] if rate else []), kind(name="second"), layers.Activation("relu"),
        layers.Dense(2),
    ]  # fmt: skip
    model = keras.Sequential([keras.Input((6,)), *parts])
    calibrate(model, DATA, progress=False)
    return model


def stale(model: Any) -> None:
    model.get_layer("second").moving_mean.assign(numbers(model.get_layer("second").moving_mean) + 5)


def spoiled(model: Any) -> None:
    model.get_layer("second").moving_variance.assign(np.full(8, np.nan))


def cut(model: Any) -> None:
    model.get_layer("second").gamma.assign([1, 0, 1, 1, 0, 1, 1, 1])


def still(model: Any) -> None:
    kernel = numbers(model.get_layer("middle").kernel)
    kernel[:, 3] = 0
    model.get_layer("middle").kernel.assign(kernel)
    calibrate(model, DATA, progress=False)


def pytorch_momentum(model: Any) -> None:
    model.get_layer("second").momentum = 0.1


def large_eps(model: Any) -> None:
    model.get_layer("middle").kernel.assign(1e-4 * numbers(model.get_layer("middle").kernel))
    calibrate(model, DATA, progress=False)


def half_frozen(model: Any) -> None:
    model.get_layer("second").gamma.trainable = model.get_layer("second").beta.trainable = False


FAULTS = {
    stale: "stale-statistics",
    spoiled: "non-finite-statistics",
    cut: "dead-channel",
    still: "dead-channel",
    pytorch_momentum: "momentum-convention",
    large_eps: "eps-dominates",
    half_frozen: "half-frozen",
}


def mend(finding: Any, **names: Any) -> dict[str, Any]:
    exec(finding.remedy, names)
    return names


def test_a_healthy_network_has_no_findings() -> None:
    assert diagnose(network(), DATA).findings == ()


@pytest.mark.parametrize("plant", FAULTS)
def test_a_planted_fault_is_found_and_mended(plant: Any) -> None:
    model = network()
    plant(model)
    report = diagnose(model, DATA)
    assert {finding.layer for finding in report.findings} == {"second"}
    found = next(finding for finding in report.findings if finding.check == FAULTS[plant])
    mend(found, model=model, data=DATA)
    assert FAULTS[plant] not in {finding.check for finding in diagnose(model, DATA).findings}


def test_what_is_around_a_layer() -> None:
    model = network(bias=True)
    (found,) = diagnose(model, DATA).findings
    assert (found.layer, found.check, found.severity) == ("second", "bias-before-norm", "info")
    model.get_layer("middle").bias.assign(np.ones(8))
    calibrate(model, DATA, progress=False)
    before = numbers(model(X, training=False))
    mend(found, model=model)
    np.testing.assert_allclose(numbers(model(X, training=False)), before, atol=1e-5)
    assert diagnose(model, DATA).findings == ()
    dropped = network(rate=0.5)
    layer = dropped.get_layer("second")
    layer.moving_variance.assign(2.0 * numbers(layer.moving_variance))  # as training with this dropout leaves it
    (found,) = [f for f in diagnose(dropped, DATA).findings if f.check == "dropout-before-norm"]
    assert (found.layer, found.severity) == ("second", "warning")
    assert "when drop is off" in found.evidence
    mend(found, model=dropped, data=DATA)
    assert [f.check for f in diagnose(dropped, DATA).findings if f.severity == "warning"] == []


def test_batches() -> None:
    model = network()
    small = [X[i : i + 4] for i in range(0, 160, 4)]
    found = diagnose(model, small).findings
    assert [(f.layer, f.check) for f in found] == [("first", "small-batch"), ("second", "small-batch")]
    after = mend(found[0], model=model, data=small)["data"]
    assert diagnose(model, after).findings == ()
    order = X[X[:, 0].argsort()]
    alike = [order[i : i + 32] for i in range(0, 320, 32)]
    (found, *_) = [f for f in diagnose(model, alike).findings if f.check == "correlated-batch"]
    assert found.layer == "first"
    after = mend(found, model=model, data=alike)["data"]
    assert diagnose(model, after).findings == ()


def test_small_batches_of_every_kind() -> None:
    model, small = network(), [X[i : i + 4] for i in range(0, 160, 4)]
    kinds: list[Any] = [[(x, np.zeros(len(x))) for x in small], (x for x in small)]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        kinds.insert(0, tf.data.Dataset.from_tensor_slices(X[:160]).batch(4))
    for data in kinds:
        found = next(f for f in diagnose(model, data).findings if f.check == "small-batch")
        after = mend(found, model=model, data=data)["data"]
        if after is data:  # a generator cannot be batched anew, so the layers are frozen: the last case
            after = small
        assert diagnose(model, after).findings == ()


def test_batches_that_are_not_finite() -> None:
    model, data = network(), [*DATA[:3], np.where(X[:32] > 2, np.inf, X[:32]), *DATA[4:]]
    (found, *_) = diagnose(model, data).findings
    assert (found.layer, found.check) == ("first", "non-finite-statistics")
    assert found.evidence == "1 of 10 batches contained NaN or infinity"
    after = mend(found, model=model, data=data)["data"]
    assert len(after) == 9
    assert diagnose(model, after).findings == ()


@pytest.mark.parametrize("kind", ["pairs", "dataset"])
def test_batches_that_are_not_alike(kind: str) -> None:
    model, order = network(), X[X[:, 0].argsort()]
    data: Any = [(order[i : i + 32], np.zeros(32)) for i in range(0, 320, 32)]
    if kind == "dataset":
        tf = pytest.importorskip("tensorflow")
        data = tf.data.Dataset.from_tensor_slices(order).batch(32)
        if BACKEND == "jax":
            pytest.skip("one backend more says nothing new of TensorFlow's data sets")
    (found, *_) = [f for f in diagnose(model, data).findings if f.check == "correlated-batch"]
    data = mend(found, model=model, data=data)["data"]
    assert diagnose(model, data).findings == ()


def test_channels_that_are_always_off() -> None:
    model = network()
    model.get_layer("second").beta.assign([-100.0] * 5 + [0.0] * 3)
    data = [GENERATOR.normal(size=(64, 6)).astype(np.float32) for _ in range(20)]  # enough to tell off from rare
    (found,) = diagnose(model, data).findings
    assert (found.layer, found.check, found.severity) == ("second", "dead-channel", "warning")
    assert found.evidence == "5 of 8 channels (62%): the activation is off for every value"
    mend(found, model=model)
    assert diagnose(model, data).findings == ()


class Twice(keras.Model):
    """A layer that is called twice, with inputs that are not alike."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = layers.BatchNormalization(name="norm")

    def build(self, shape: Any) -> None:
        self.norm.build(shape)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.norm(x, training=training) - self.norm(ops.flip(x, 0) + 3.0, training=training)


class Forgetful(keras.Model):
    """A layer that nothing calls, so that Keras never builds it, and one that was built."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.extra = layers.BatchNormalization(name="norm"), layers.BatchNormalization(name="extra")
        self.more = [layers.BatchNormalization(name="built")]
        self.more[0].build((None, 4))

    def build(self, shape: Any) -> None:
        self.norm.build(shape)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.norm(x, training=training)


def test_layers_that_nothing_calls() -> None:
    model = Forgetful()
    with pytest.raises(RuntimeError, match="norm does not know its size yet"):
        diagnose(model, DATA)
    model(X)
    assert set(calibrate(model, DATA, progress=False).skipped) == {"extra", "built"}
    model.more[0].moving_mean.assign(np.ones(4))
    for remaining in (["extra", "built"], ["built"], []):
        report = diagnose(model, DATA)
        assert [(f.layer, f.check, f.severity) for f in report.findings] == [(n, "unused", "info") for n in remaining]
        if remaining:
            mend(report.findings[0], model=model)
    assert np.isfinite(numbers(model(X))).all()


def test_a_layer_with_two_calls() -> None:
    model = Twice()
    model(X)
    calibrate(model, DATA, progress=False)
    found = next(finding for finding in diagnose(model, DATA).findings if finding.check == "unused")
    assert (found.layer, found.severity) == ("norm", "warning")
    assert found.evidence.startswith("called 2 times in a step; the inputs of two calls are 3")
    mend(found, model=model)
    assert "unused" not in {finding.check for finding in diagnose(model, DATA).findings}


@pytest.mark.skipif(BACKEND != "torch", reason="TensorFlow has checkpoints only uncompiled; JAX returns statistics")
def test_checkpoints() -> None:
    with keras.RematScope(mode="list_of_layers", layer_names=["second"]):
        model = network()
    weights = [variable.value.grad for variable in model.trainable_variables]
    (found,) = diagnose(model, DATA).findings
    assert (found.layer, found.check) == ("second", "recomputed")
    assert "moved 2 times in a step, 1 of them in the forward pass" in found.evidence
    assert [variable.value.grad for variable in model.trainable_variables] == weights
    mend(found, model=model)
    assert diagnose(model, DATA).findings == ()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="in PyTorch processes are real ones: see check_sync")
def test_replicas_that_do_not_pool() -> None:
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    data = [X[i : i + 6] for i in range(0, 240, 6)]
    with strategy.scope():
        model = keras.Sequential([keras.Input((6,)), layers.BatchNormalization(name="norm")])
        calibrate(model, data, progress=False)
        (found,) = diagnose(model, data).findings
        assert (found.layer, found.check) == ("norm", "unsynchronized")
        assert found.evidence.endswith("all 2 processes have 12")
        mend(found, model=model)
        assert diagnose(model, data).findings == ()


def test_weight_decay() -> None:
    model = network()
    optimizer = keras.optimizers.AdamW(weight_decay=0.01)
    optimizer.build(model.trainable_variables)
    found = diagnose(model, optimizer=optimizer).findings
    assert [(f.layer, f.check) for f in found] == [(name, "weight-decay-on-norm") for name in ("first", "second")]
    optimizer = mend(found[0], model=model, optimizer=optimizer)["optimizer"]
    assert diagnose(model, optimizer=optimizer).findings == ()


def test_frozen_layers_and_ours() -> None:
    from batchnorm.keras import BatchNormalization

    model = network(BatchNormalization)
    assert diagnose(model, DATA).findings == ()
    stale(model)
    freeze(model)
    assert diagnose(model, DATA).findings == ()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_changes(fails: bool) -> None:
    model = network(rate=0.5)
    state = [numbers(variable) for variable in model.variables]
    generator = numbers(model.get_layer("drop").seed_generator.state)
    drawn = np.random.get_state()[1].copy()  # type: ignore[union-attr]  # noqa: NPY002

    def forward(model: Any, batch: Any, training: bool) -> Any:
        y = model(batch, training=training)
        np.random.rand()  # noqa: NPY002
        if fails and training:
            raise OverflowError("planted")
        return y

    if fails:
        with pytest.raises(OverflowError, match="planted"):
            diagnose(model, DATA, forward=forward)
    else:
        diagnose(model, DATA, forward=forward)
    assert all((numbers(v) == old).all() for v, old in zip(model.variables, state, strict=True))
    assert (numbers(model.get_layer("drop").seed_generator.state) == generator).all()
    assert (np.random.get_state()[1] == drawn).all()  # noqa: NPY002
    assert all("call" not in vars(layer) for layer in model.layers)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"model must be a keras\.Model or a layer, got int"):
        diagnose(3)
    with pytest.raises(ValueError, match="model has no batch normalization"):
        diagnose(keras.Sequential([keras.Input((2,)), layers.Dense(2)]))
    with pytest.raises(ValueError, match="the data gave no batches"):
        diagnose(network(), [])
    with pytest.raises(ValueError, match=r"fails on a batch of data of shape \(4, 3\): .*expected") as raised:
        diagnose(network(), [X[:4, :3]])
    assert "\n" not in str(raised.value)
    with pytest.raises(RuntimeError, match="does not know its size yet"):
        diagnose(keras.Sequential([layers.BatchNormalization()]))
    with pytest.raises(TypeError, match=r"^a batch of 4 parts is not inputs, targets and weights"):
        diagnose(network(), [(X[:4],) * 4])


@pytest.mark.parametrize("kind", [TypeError, RuntimeError])
def test_the_errors_of_a_model_are_one_sentence(kind: type[Exception]) -> None:
    class Fails(layers.Layer):
        now = False

        def call(self, x: Any) -> Any:
            if self.now:
                raise kind("planted")
            return x

    model = keras.Sequential([keras.Input((6,)), layers.BatchNormalization(), Fails()])
    model.layers[-1].now = True
    with pytest.raises(kind, match=r"^the model fails on a batch of data of shape \(4, 6\): planted$"):
        diagnose(model, [np.ones((4, 6), np.float32)])


def test_a_layer_that_only_training_calls() -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.norm = layers.Dense(3), layers.BatchNormalization(name="late")

        def call(self, x: Any, training: bool = False) -> Any:
            return self.norm(self.dense(x), training=True) if training else self.dense(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras: the layer is not built
        model = Net()
        model(np.ones((4, 6), np.float32))
    with pytest.raises(RuntimeError, match=r"^late does not know its size yet: call the model on one batch first$"):
        diagnose(model, [np.ones((4, 6), np.float32)])


@pytest.mark.parametrize("ours", [False, True])
def test_watch(ours: bool, tmp_path: Path) -> None:
    from batchnorm.keras import BatchNormalization

    model = keras.Sequential(
        [keras.Input((6,)), (BatchNormalization if ours else layers.BatchNormalization)(name="n"), layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    watch = Watch(every=2, to=tmp_path / "seen.csv")
    model.fit(X[:160], np.zeros((160, 1)), batch_size=32, shuffle=False, verbose=0, callbacks=[watch])
    assert [record.step for record in watch.records] == [1, 3, 5]
    third = X[64:96].astype(np.float64)
    record = watch.records[1]
    assert record.batch_mean == pytest.approx(third.mean(), abs=1e-4)
    assert record.batch_var == pytest.approx(third.var(0).mean(), rel=1e-3)
    last = watch.records[-1]
    assert last.running_mean == pytest.approx(float(numbers(model.get_layer("n").moving_mean).mean()), abs=1e-6)
    assert last.gap is not None
    rows = list(csv.DictReader((tmp_path / "seen.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "3", "5"]
    plain = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match="model has no batch normalization, so there is nothing to watch"):
        plain.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0, callbacks=[Watch()])
    assert ops.shape(model.get_layer("n").gamma) == (6,)


def test_watch_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    model = keras.Sequential([keras.Input((6,)), layers.BatchNormalization(name="n"), layers.Dense(1)])
    model.compile("sgd", "mse")
    watch = Watch(to=tmp_path / "run")
    for _ in range(2):  # each `fit` writes a file of its own
        model.fit(X[:64], np.zeros((64, 1)), verbose=0, callbacks=[watch])
    events = [event for file in (tmp_path / "run").iterdir() for event in EventFileLoader(str(file)).Load()]
    seen = {(value.tag, event.step) for event in events for value in event.summary.value}
    assert seen >= {(f"n/{name}", step) for name in ("batch_mean", "running_var", "gap") for step in (1, 2, 3, 4)}
