"""A fault is found in its layer and nowhere else, the healthy twin draws nothing, remedies mend, nothing changes."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flax")
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from batchnorm.jax import (
    BatchNorm,
    GhostStatistics,
    Renorm,
    calibrate,
    diagnose,
    exclude_from_weight_decay,
    freeze,
)
from batchnorm.jax.freeze import Frozen

X = np.random.default_rng(0).normal(size=(640, 6)).astype(np.float32)
DATA = [X[i : i + 64] for i in range(0, 640, 64)]


class Mlp(nnx.Module):
    """The second normalization, in a list, is where faults are planted."""

    def __init__(self, kind: Any = nnx.BatchNorm, rate: float = 0.0, bias: bool = False, size: int = 8) -> None:
        rngs = nnx.Rngs(0)
        self.enter = nnx.Linear(6, size, use_bias=False, rngs=rngs)
        self.first = kind(size, rngs=rngs)
        self.middle = nnx.Linear(size, size, use_bias=bias, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.inner = nnx.List([kind(size, rngs=rngs)])
        self.out = nnx.Linear(size, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.first(self.enter(x)))
        x = self.drop(self.middle(x))
        return self.out(jnp.maximum(self.inner[0](x), 0))


def network(*args: Any, data: Any = DATA, **kwargs: Any) -> Any:
    model = Mlp(*args, **kwargs)
    calibrate(model, data, progress=False)
    return model


def mend(finding: Any, **names: Any) -> dict[str, Any]:
    exec(finding.remedy, names)
    return names


def found(model: Any, data: Any = DATA, **options: Any) -> list[tuple[str, str, str]]:
    return [(f.layer, f.check, f.severity) for f in diagnose(model, data, **options).findings]


# --- Faults -----------------------------------------------------------------------------------------------------------


def stale(model: Any) -> None:
    model.inner[0].mean[...] += 5


def spoiled(model: Any) -> None:
    model.inner[0].var[...] = jnp.full(8, jnp.nan)


def cut(model: Any) -> None:
    model.inner[0].scale[...] = jnp.array([1, 0, 1, 1, 0, 1, 1, 1.0])


def still(model: Any) -> None:
    model.middle.kernel[...] = model.middle.kernel[...].at[:, 3].set(0)
    calibrate(model, DATA, progress=False)


def off(model: Any) -> None:
    model.inner[0].bias[...] = model.inner[0].bias[...].at[jnp.array([2])].set(-100.0)


def momentum_of_pytorch(model: Any) -> None:
    model.inner[0].momentum = 0.1


def large_eps(model: Any) -> None:
    model.middle.kernel[...] *= 1e-4
    calibrate(model, DATA, progress=False)


def does_not_learn(model: Any) -> None:
    for name in ("scale", "bias"):
        setattr(model.inner[0], name, Frozen(getattr(model.inner[0], name)[...]))


def evaluates(model: Any) -> None:
    model.inner[0].use_running_average = True


FAULTS: dict[Callable[[Any], None], tuple[str, str]] = {
    stale: ("stale-statistics", "error"),
    spoiled: ("non-finite-statistics", "error"),
    cut: ("dead-channel", "warning"),
    still: ("dead-channel", "warning"),
    off: ("dead-channel", "info"),
    momentum_of_pytorch: ("momentum-convention", "warning"),
    large_eps: ("eps-dominates", "warning"),
    does_not_learn: ("half-frozen", "warning"),
    evaluates: ("half-frozen", "info"),
}


CASES = [*((plant, nnx.BatchNorm) for plant in FAULTS), (stale, BatchNorm), (large_eps, BatchNorm)]


@pytest.mark.parametrize("kind", [nnx.BatchNorm, BatchNorm])
def test_a_healthy_network_draws_nothing(kind: Any) -> None:
    model = network(kind)
    assert found(model) == []
    assert found(model, None) == []


@pytest.mark.parametrize(("plant", "kind"), CASES)
def test_a_planted_fault_is_found_and_mended(plant: Any, kind: Any) -> None:
    model = network(kind)
    data = DATA * 2 if plant is off else DATA  # fewer samples do not show that a unit is off
    plant(model)
    findings = diagnose(model, data).findings
    assert {finding.layer for finding in findings} == {"inner.0"}
    first = next(finding for finding in findings if (finding.check, finding.severity) == FAULTS[plant])
    mend(first, model=model, data=data)
    assert FAULTS[plant][0] not in {finding.check for finding in diagnose(model, data).findings}


@pytest.mark.parametrize("activation", [nnx.relu, nnx.relu6, jax.jit(nnx.relu), "relu"])
def test_units_that_are_off(activation: Any) -> None:
    class Net(nnx.Module):
        def __init__(self) -> None:
            fused = activation if isinstance(activation, str) else None
            self.norm = BatchNorm(6, activation=fused, momentum=0.0, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            y = self.norm(x)
            return y if isinstance(activation, str) else activation(y)

    model = Net()
    calibrate(model, [X], progress=False)
    model.norm.bias[...] = jnp.array([0, -100.0, 0, 0, 0, 0])
    whole = np.concatenate([X, X])
    assert ("norm", "dead-channel", "info") in found(model, [whole])


def test_never_trained() -> None:
    report = diagnose(Mlp())
    assert [(f.layer, f.check, f.severity) for f in report.findings] == [
        (name, "stale-statistics", "error") for name in ("first", "inner.0")
    ]
    assert report.read == "without data"


def test_the_first_layer_where_evaluation_parts() -> None:
    model = network()
    model.enter.kernel[...] *= 3
    parted = [f for f in diagnose(model, DATA).findings if f.check == "train-eval-gap"]
    assert [(f.layer, f.severity) for f in parted] == [("first", "error")]
    assert "2 of 2 layers differ; the model's output moves by" in parted[0].evidence
    mend(parted[0], model=model, data=DATA)
    assert found(model) == []


def test_a_bias_that_has_no_effect() -> None:
    model = network(bias=True)
    (bias,) = diagnose(model, DATA).findings
    assert (bias.layer, bias.check, bias.severity) == ("inner.0", "bias-before-norm", "info")
    model.middle.bias[...] = jnp.ones(8)
    calibrate(model, DATA, progress=False)
    model.eval()
    before = model(X)
    mend(bias, model=model)
    np.testing.assert_allclose(model(X), before, atol=1e-5)
    assert model.middle.bias is None
    model.train()
    assert found(model) == []


def test_a_bias_that_something_else_uses() -> None:
    class Skips(Mlp):
        def __call__(self, x: Any) -> Any:
            x = self.middle(nnx.relu(self.first(self.enter(x))))
            return self.out(self.inner[0](x) + x)

    assert found(network(bias=True)) == [("inner.0", "bias-before-norm", "info")]
    model = Skips(bias=True)
    calibrate(model, DATA, progress=False)
    assert found(model) == []


def test_dropout_before_a_layer() -> None:
    model = network(rate=0.5)
    model.inner[0].var[...] *= 2.0  # as training with this dropout leaves it
    (dropout, *_) = [f for f in diagnose(model, DATA).findings if f.check == "dropout-before-norm"]
    assert (dropout.layer, dropout.severity) == ("inner.0", "warning")
    assert "when drop is off" in dropout.evidence
    mend(dropout, model=model, data=DATA)
    assert [f for f in diagnose(model, DATA).findings if f.severity == "warning"] == []


def test_batches() -> None:
    model = network()
    small = [X[i : i + 4] for i in range(0, 160, 4)]
    findings = diagnose(model, small).findings
    assert [(f.layer, f.check) for f in findings] == [("first", "small-batch"), ("inner.0", "small-batch")]
    assert found(model, mend(findings[0], model=model, data=small)["data"]) == []
    order = X[X[:, 0].argsort()]
    alike = [jnp.asarray(order[i : i + 32]) for i in range(0, 640, 32)]
    (finding, *_) = [f for f in diagnose(model, alike).findings if f.check == "correlated-batch"]
    assert finding.layer == "first"
    assert found(model, mend(finding, model=model, data=alike)["data"]) == []


def test_batches_that_are_not_finite() -> None:
    spoilt = [*DATA[:-1], np.full_like(DATA[0], np.nan)]
    (first, _) = diagnose(network(), spoilt).findings
    assert (first.layer, first.check, first.severity) == ("first", "non-finite-statistics", "error")
    assert found(network(), mend(first, data=spoilt)["data"]) == []


def test_layers_that_are_used_otherwise() -> None:
    class Twice(Mlp):
        def __call__(self, x: Any) -> Any:
            x = self.middle(self.enter(x))
            return self.out(self.first(x) + self.first(5 + 3 * x))

    model = Twice()
    calibrate(model, DATA, progress=False)
    model.inner[0].mean[...] += 1
    findings = {(f.layer, f.severity): f for f in diagnose(model, DATA).findings if f.check == "unused"}
    assert set(findings) == {("first", "warning"), ("inner.0", "info")}
    assert "called 2 times in a step" in findings["first", "warning"].evidence
    for finding in findings.values():
        mend(finding, model=model)
    assert model.inner[0] is None
    assert [f for f in diagnose(model, DATA).findings if f.check == "unused"] == []


# --- Optimizers -------------------------------------------------------------------------------------------------------


def everything(tree: Any) -> Any:
    return jax.tree.map(lambda _: True, tree)


def matrices(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


@pytest.mark.parametrize(
    ("tx", "decays"),
    [
        (optax.adamw(1e-3), True),
        (optax.adamw(1e-3, mask=everything), True),
        (optax.adamw(1e-3, mask=matrices), False),
        (optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 100)), True),
        (optax.MultiSteps(optax.adamw(1e-3), 4).gradient_transformation(), True),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(1e-4), optax.sgd(0.1, 0.9)), True),
        (optax.lamb(1e-3, weight_decay=0.01), True),
        (optax.adam(1e-3), False),
        (optax.sgd(0.1, nesterov=True), False),
    ],
)
def test_weight_decay(tx: Any, decays: bool) -> None:
    model = Mlp()
    model.first.mean[...], model.inner[0].mean[...] = jnp.ones(8), jnp.ones(8)  # as if trained
    findings = diagnose(model, optimizer=tx).findings
    expected = [("first", "weight-decay-on-norm"), ("inner.0", "weight-decay-on-norm")] if decays else []
    assert [(f.layer, f.check) for f in findings] == expected
    for optimizer in (tx, nnx.Optimizer(model, tx, wrt=nnx.Param)) if decays else ():
        finding = diagnose(model, optimizer=optimizer).findings[0]
        after = mend(finding, model=model, optimizer=optimizer)["optimizer"]
        assert diagnose(model, optimizer=after).findings == ()


def test_without_decay_all_else_is_as_before() -> None:
    """Against the optimizer without any decay, for scale and bias, and the one with it for the others."""
    ones = jax.tree.map(jnp.ones_like, nnx.to_pure_dict(nnx.state(Mlp(), nnx.Param)))
    model = Mlp()

    def step(tx: Any) -> Any:
        return tx.update(ones, tx.init(ones), ones)[0]

    ours, none, all_ = (
        step(tx)
        for tx in (
            exclude_from_weight_decay(optax.adamw(1e-2, weight_decay=0.1), model),
            optax.adamw(1e-2, weight_decay=0.0),
            optax.adamw(1e-2, weight_decay=0.1),
        )
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(ours)[0]:
        keys = [part.key for part in path]
        expected: Any = none if "first" in keys or "inner" in keys else all_
        for key in keys:
            expected = expected[key]
        np.testing.assert_array_equal(leaf, expected)


def test_what_an_optimizer_leaves_alone() -> None:
    """The usual ways to fine-tune in JAX: statistics move all the same."""
    model = network()

    def labels(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "on" if path[0].key == "out" else "off", tree)

    ways = (
        nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.All(nnx.Param, nnx.PathContains("out"))),
        nnx.Optimizer(model, optax.multi_transform({"on": optax.adam(1e-3), "off": optax.set_to_zero()}, labels),
                      wrt=nnx.Param),
    )  # fmt: skip
    for optimizer in ways:
        model = network()
        findings = diagnose(model, DATA, optimizer=optimizer).findings
        assert [(f.layer, f.check) for f in findings] == [("first", "half-frozen"), ("inner.0", "half-frozen")]
        for finding in findings:
            mend(finding, model=model)
        assert diagnose(model, DATA, optimizer=optimizer).findings == ()
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(X)))(model))  # its state still fits


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (3, "must be a nnx.Optimizer or a transformation of optax, got int"),
        (optax.scale_by_polyak(), "cannot be looked at, because its update fails .*diagnose without optimizer"),
    ],
)
def test_optimizers_that_cannot_be_known(optimizer: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        diagnose(Mlp(), optimizer=optimizer)


# --- Nothing changes --------------------------------------------------------------------------------------------------


def everything_of(model: Any) -> Any:
    nodes = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Pytree)]
    attributes = [(type(node), dict(vars(node))) for node in nodes]
    values = [np.asarray(jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v)
              for v in jax.tree.leaves(nnx.state(model))]  # fmt: skip
    return attributes, values


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nothing_changes(fails: bool, mode: str) -> None:
    class Keeps(Mlp):
        def __call__(self, x: Any) -> Any:
            self.seen = nnx.Intermediate(jnp.asarray(x))
            self.calls = getattr(self, "calls", 0) + 1
            return super().__call__(x)

    model = Keeps(rate=0.5)
    getattr(model, mode)()
    attributes, values = everything_of(model)
    drawn = np.random.get_state()[1].copy()  # type: ignore[union-attr]  # noqa: NPY002
    times = 0

    def forward(model: Any, batch: Any) -> Any:
        nonlocal times
        times += 1
        y = model(batch)
        np.random.rand()  # noqa: NPY002
        if fails and times > 2:
            raise OverflowError("planted")
        return y

    if fails:
        with pytest.raises(OverflowError, match="planted"):
            diagnose(model, DATA, forward=forward)
    else:
        diagnose(model, DATA, forward=forward, optimizer=nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param))
    after, others = everything_of(model)
    assert after == attributes
    for a, b in zip(others, values, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (np.random.get_state()[1] == drawn).all()  # type: ignore[union-attr]  # noqa: NPY002


def test_dropout_is_drawn_anew_for_each_batch() -> None:
    model, seen = network(rate=0.5), []

    def forward(model: Any, batch: Any) -> Any:
        seen.append(model.drop(jnp.ones((4, 4))))
        return model(batch)

    diagnose(model, DATA, forward=forward, max_batches=2)
    masks = [y for y in seen if not isinstance(y, jax.core.Tracer) and (np.asarray(y) != 1).any()]
    assert len(masks) == 2
    assert not np.array_equal(*masks)


# --- Models of other kinds --------------------------------------------------------------------------------------------


class Told(nnx.Module):
    """The modes are arguments, as in Flax's older style."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.enter = nnx.Linear(6, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=None, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=None, rngs=rngs)

    def __call__(self, x: Any, train: bool) -> Any:
        x = self.drop(self.enter(x), deterministic=not train)
        return self.norm(x, use_running_average=not train)


def test_modes_that_are_arguments() -> None:
    model = Told()
    calibrate(model, DATA, forward=lambda model, batch: model(batch, train=False), progress=False)
    model.norm.var[...] *= 2.0  # as training with this dropout leaves it
    trains = diagnose(model, DATA, forward=lambda model, batch: model(batch, train=True))
    assert {f.check for f in trains.findings} == {"dropout-before-norm"}
    evaluates = diagnose(model, DATA, forward=lambda model, batch: model(batch, train=False))
    assert evaluates.findings == ()


def test_masks_axes_and_sources() -> None:
    class Odd(nnx.Module):
        def __init__(self, statistics: Any) -> None:
            self.norm = BatchNorm(6, axis=1, activation="relu", axis_name="devices", statistics=statistics,
                                  rngs=nnx.Rngs(0))  # fmt: skip

        def __call__(self, x: Any) -> Any:
            return self.norm(x[:, :, None], mask=np.arange(len(x))[:, None] < 24)

    data = [np.concatenate([batch[:24], np.full_like(batch[24:], 1e6)]) for batch in DATA]
    for source in (None, GhostStatistics(32), Renorm()):
        model = Odd(source)
        x = np.concatenate([batch[:24] for batch in data])
        model.norm.mean[...], model.norm.var[...] = x.mean(0), x.var(0)
        assert found(model, data) == []
        assert model.norm.axis_name == "devices"
    model = Odd(GhostStatistics(4))
    model.norm.mean[...], model.norm.var[...] = x.mean(0), x.var(0)
    assert found(model, data) == [("norm", "small-batch", "warning")]


def test_a_class_with_a_call_of_its_own() -> None:
    class Halved(nnx.BatchNorm):
        def __call__(self, x: Any) -> Any:  # type: ignore[override, unused-ignore]
            return super().__call__(x) / 2

    model = Mlp(Halved)
    for batch in DATA * 4:
        model.first.momentum = model.inner[0].momentum = 0.9
        model(batch)
    assert found(model) == []
    stale(model)
    assert ("inner.0", "stale-statistics", "error") in found(model)


def test_a_forward_that_wants_values() -> None:
    model = network(bias=True)

    def forward(model: Any, batch: Any) -> float:
        return float(model(batch).sum())

    with pytest.warns(UserWarning, match="bias-before-norm is not checked, .* because forward asks for the values"):
        assert found(model, forward=forward) == []


def test_frozen_layers_and_evaluation() -> None:
    model = network(rate=0.0)
    stale(model)
    freeze(model)
    assert found(model) == []
    model = network()
    model.eval()
    assert found(model) == []
    stale(model)
    assert ("inner.0", "stale-statistics", "error") in found(model)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"model must be a flax\.nnx\.Module, got int"):
        diagnose(3)
    with pytest.raises(ValueError, match="model has no batch normalization, so there is nothing to diagnose"):
        diagnose(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="the data gave no batches"):
        diagnose(Mlp(), [])
    with pytest.raises(TypeError, match="data must give batches, one after the other"):
        diagnose(Mlp(), DATA[0])
    with pytest.raises(ValueError, match="first is called inside a function that is compiled on its own"):
        diagnose(Mlp(), DATA, forward=lambda model, batch: nnx.jit(lambda m, b: m(b))(model, batch))
    model = Mlp()
    keys = jax.random.split(jax.random.key(0), 3)
    model.inner[0] = nnx.vmap(lambda key: nnx.BatchNorm(8, rngs=nnx.Rngs(key)))(keys)
    with pytest.raises(ValueError, match=r"inner\.0 is a stack of layers, with statistics of shape \(3, 8\)"):
        diagnose(model)


def test_names_are_expressions() -> None:
    class Deep(nnx.Module):
        def __init__(self) -> None:
            self.blocks = nnx.List([nnx.Dict({"the norm": nnx.BatchNorm(2, rngs=nnx.Rngs(0))})])

    model = Deep()
    norm = model.blocks[0]["the norm"]
    norm.mean[...], norm.scale[...] = jnp.ones(2), jnp.array([0.0, 1.0])
    (finding,) = diagnose(model).findings
    assert (finding.layer, finding.check) == ("blocks.0.the norm", "dead-channel")
    mend(finding, model=model)
    assert norm.scale[...].tolist() == [1, 1]


def test_without_pytorch() -> None:
    program = """
import sys
import numpy as np
from flax import nnx
from batchnorm.jax import diagnose
print(diagnose(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), [np.ones((3, 2), np.float32)]))
assert not {"torch", "keras", "tensorflow"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "stale-statistics" in done.stdout
