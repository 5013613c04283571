"""What a run is: networks and what takes the place of their normalization, training, and all that is measured."""
# ruff: noqa: E402  (what is optional is asked for before it is imported)

import math
import re
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import definition
from batchnorm.errors import InputError
from batchnorm.study import networks
from batchnorm.study.data import load_digits
from batchnorm.study.measures import COUNTS, _changes, _finite, perform, watched
from batchnorm.study.networks import NETWORKS, VARIANTS, Noise, build, linear_layers, scale, swap
from batchnorm.study.tasks import Task
from batchnorm.study.training import _batches, checks, train

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.train.images).reshape(-1, *DIGITS.shape)


def made(name: str, variant: str) -> nn.Module:
    torch.manual_seed(5)
    return swap(build(name, DIGITS.shape, DIGITS.classes), variant, IMAGES, DIGITS.classes, steps=100)


# --- Networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_variant_of_every_network_gives_scores_and_gradients(name: str, variant: str) -> None:
    model = made(name, variant)
    scores = model(IMAGES[:40])
    assert scores.shape == (40, 10)
    scores.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    normalizing = sum(isinstance(layer, _BatchNorm) for layer in model.modules())
    expected = sum(isinstance(layer, _BatchNorm) for layer in build(name, DIGITS.shape, 10).modules())
    keeps = variant in ("batch_norm", "batch_norm+dropout", "noisy_batch_norm", "renorm", "ghost")
    assert normalizing == (expected if keeps else 1 if variant == "output_norm" else 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_variants_start_from_the_same_weights(name: str) -> None:
    weights = {variant: [layer.weight for layer in linear_layers(made(name, variant))] for variant in VARIANTS}
    for variant in VARIANTS:
        assert len(weights[variant]) == len(weights["plain"])
        for a, b in zip(weights[variant], weights["plain"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)  # weight normalization multiplies it together again


def test_the_variants_are_what_they_are_called() -> None:
    x = torch.randn(32, 64) * 3 + 1
    kinds = {variant: made("mlp", variant)[2] for variant in ("layer_norm", "group_norm", "plain", "identity")}  # type: ignore[index]
    y = kinds["layer_norm"](x)
    want = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, correction=0, keepdim=True) + 1e-5)
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    groups = x.reshape(32, 4, 16)
    want = (groups - groups.mean(2, keepdim=True)) / torch.sqrt(groups.var(2, correction=0, keepdim=True) + 1e-5)
    torch.testing.assert_close(kinds["group_norm"](x), want.reshape(32, 64), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        kinds["plain"].bias.fill_(2.0)
    torch.testing.assert_close(kinds["plain"](x), x + 2)
    assert kinds["identity"](x) is x


def test_input_normalization_is_of_each_input_by_all_training_images() -> None:
    model: Any = made("cnn", "input_norm")
    front = model[:-1](IMAGES)
    assert front.shape == IMAGES.shape
    assert front.mean(0).abs().max() < 1e-5
    spread, varies = front.std(0, correction=0), IMAGES.std(0) > 0
    torch.testing.assert_close(spread, varies.float(), atol=1e-4, rtol=0)


def test_renormalization_begins_in_proportion_to_the_training() -> None:
    layers = [made("mlp", "renorm")[2], swap(build("mlp", (4,), 2), "renorm", torch.zeros(2, 4), 2, 2400)[2]]  # type: ignore[index]
    assert [layer.statistics.warmup_steps for layer in layers] == [4, 100]


def test_noise_is_in_training_only_and_new_for_every_sample() -> None:
    noise, x = Noise(), torch.ones(100, 5, 3, 3)
    torch.manual_seed(0)
    y = noise(x)
    assert (y.std(0) > 0).all()
    assert y[:, :, 0, 0].mean(0).std() > 0.05, "channels have means of their own"
    torch.testing.assert_close(y[:, :, 0, 0], y[:, :, 2, 1])
    z = noise(torch.arange(2000.0)[:, None].expand(-1, 200) / 1000 - 1)
    slopes = torch.linalg.lstsq(torch.stack([torch.arange(2000.0) / 1000 - 1, torch.ones(2000)], 1), z).solution
    assert 0.98 < slopes[0].min() < 1.05 < 1.2 < slopes[0].max() < 1.27, "scales are between 1 and 1.25"
    assert -0.52 < slopes[1].min() < -0.4 < 0.4 < slopes[1].max() < 0.52, "shifts are within 0.5"
    assert noise.eval()(x) is x


@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (16, 1), (32, 2), (64, 4), (100, 5), (17, 1), (96, 6)])
def test_groups_have_sixteen_channels_or_somewhat_more(channels: int, groups: int) -> None:
    assert networks._groups(channels) == groups


def test_a_layer_at_several_places_stays_one_layer() -> None:
    norm = nn.BatchNorm1d(8)
    model = nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), norm)
    model.again = norm  # type: ignore[assignment]
    swapped: Any = swap(model, "plain", IMAGES, 8, steps=100)
    assert swapped[1] is swapped[3] is swapped.again
    assert not any(isinstance(layer, _BatchNorm) for layer in swapped.modules())


def test_gain_multiplies_weights_and_nothing_else() -> None:
    a, b = made("resnet", "batch_norm"), made("resnet", "batch_norm")
    scale(b, 10.0)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(q, p * 10 if p.dim() > 1 else p, msg=name)


def test_networks_of_images_want_images() -> None:
    with pytest.raises(InputError, match=r"cnn needs images of shape .* and the data are of shape \(64,\)"):
        build("cnn", (64,), 10)


# --- The user's own network -------------------------------------------------------------------------------------------

FACTORIES = """
    from torch import nn
    from batchnorm.torch import BatchNorm1d, convert

    def good(inputs, classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes))
    def raises(): raise OSError("no\\nweights")
    def number(): return 3
    def without(classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    def wants(size): return size
    def shape(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.BatchNorm1d(7))
    def images(): return nn.Sequential(nn.Flatten(), nn.Linear(99, 10), nn.BatchNorm1d(10))
    def fused(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), BatchNorm1d(10, activation="relu"))
    notafunction = 3
    def reads():
        class Reads(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.norm = nn.Linear(64, 10), nn.BatchNorm1d(10)
            def forward(self, x): return self.norm(self.linear(x.flatten(1))) * self.norm.weight
        return Reads()
    def lazy(classes):
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.LazyLinear(classes)).eval()
    def odd(classes):
        "A frozen layer, and one that is not used."
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes))
        model[1].requires_grad_(False)
        model[0].unused = nn.Linear(3, 3)
        return model
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text(textwrap.dedent(FACTORIES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("my_networks", None)


@pytest.mark.usefixtures("factories")
def test_a_factory_gets_what_it_asks_for() -> None:
    for name in ("good", "lazy", "odd"):
        networks.check(f"my_networks:{name}", DIGITS.shape, DIGITS.classes)
        for measure in ("training", "gradient change", "statistics", "latency"):
            task = Task(measure, f"my_networks:{name}", rate=0.01, steps=0 if measure == "latency" else 8)  # type: ignore[arg-type]
            assert perform(None, task).finite
    run = train(DIGITS, Task(model="my_networks:good", rate=0.01, steps=60))
    assert run.values["test"][-1] > 0.5


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "there is no network 'nothing'; choose mlp, cnn, resnet, or MODULE:FACTORY of your own"),
        (":good", "there is no network"),
        ("no_such_module:good", "no_such_module:good failed with ModuleNotFoundError: No module named"),
        ("my_networks:missing", "failed with AttributeError"),
        ("my_networks:notafunction", "failed with TypeError"),
        ("my_networks:raises", "my_networks:raises failed with OSError: no weights."),
        ("my_networks:number", "must return a torch.nn.Module, but returns a int"),
        ("my_networks:without", "without batch normalization, so there is nothing to compare"),
        ("my_networks:wants", "failed with TypeError"),
        ("my_networks:shape", "returns (4, 7) for 4 images, but must return scores of shape (4, 10)"),
        ("my_networks:images", "failed on images of shape (4, 1, 8, 8) with RuntimeError"),
        ("my_networks:reads", "my_networks:reads in the variant 'without' failed on images"),
        ("my_networks:fused", "build it without `activation=`"),
    ],
)
def test_a_network_of_no_use_is_one_sentence(name: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)) as error:
        networks.check(name, DIGITS.shape, DIGITS.classes)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


# --- Training ---------------------------------------------------------------------------------------------------------


def test_a_run_is_the_same_every_time_and_leaves_torch_as_it_was() -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    task = Task(rate=0.01, seed=3, steps=35)
    first = train(DIGITS, task)
    torch.manual_seed(99)
    assert train(DIGITS, task) == first
    assert train(DIGITS, replace(task, seed=4)).values != first.values
    torch.random.set_rng_state(state)
    train(DIGITS, replace(task, variant="dropout"))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("variant", ["plain", "batch_norm"])
def test_a_run_learns(variant: str) -> None:
    task = Task(variant=variant, rate=0.01, steps=105)
    run = train(DIGITS, task)
    assert run.finite
    assert len(run.values["test"]) == len(run.values["validation"]) == len(run.values["loss"]) == len(checks(105))
    assert run.values["test"][0] < 0.5 < 0.8 < run.values["test"][-1]
    assert run.values["loss"][-1] < run.values["loss"][0]
    assert run.values["train"] > 0.8


def test_a_run_whose_loss_is_not_finite_ends_there() -> None:
    run = train(DIGITS, Task(variant="plain", rate=1e38, steps=35))
    assert not run.finite
    assert len(run.values["test"]) < 5


def test_checks_are_steps_spaced_by_ratio() -> None:
    steps = checks(1000)
    assert (steps[0], steps[-1]) == (1, 1000)
    assert steps == sorted(set(steps))
    assert all(b / a < 1.2 for a, b in pairwise(steps) if a > 20)


def test_an_epoch_has_every_image_once_but_for_what_does_not_fill_a_batch() -> None:
    task = Task(steps=7, batch_size=30, seed=1)
    batches = list(_batches(100, task))
    assert [len(batch) for batch in batches] == [30] * 7
    for epoch in (batches[:3], batches[3:6]):
        assert max(Counter(torch.cat(epoch).tolist()).values()) == 1
    assert not torch.equal(batches[0], batches[3])
    for again, batch in zip(_batches(100, task), batches, strict=True):
        assert torch.equal(again, batch)


def test_few_images_are_all_that_is_used() -> None:
    run = train(DIGITS, Task(variant="plain", rate=0.01, steps=200, images=40, batch_size=20))
    assert run.values["train"] == 1.0
    assert run.values["test"][-1] < 0.95


# --- What is measured -------------------------------------------------------------------------------------------------


def test_percentiles_are_those_of_the_last_sigmoids_input() -> None:
    task = Task("percentiles", "paper", "batch_norm", 0.1, steps=60, batch_size=60, optimizer="sgd")
    run = perform(None, task)
    curves = np.array(run.values["percentiles"])
    assert curves.shape == (3, len(watched(task)))
    assert (curves[0] < curves[1]).all()
    assert (curves[1] < curves[2]).all()
    # At first it is normalized with weight 1 and bias 0: the percentiles are near those of a normal distribution.
    np.testing.assert_allclose(curves[:, 0], [-1, 0, 1], atol=0.35)
    way = np.abs(np.diff(curves, axis=1)).sum(1).mean() / (curves[2, -1] - curves[0, -1])
    assert run.values["movement"] == pytest.approx(way, rel=1e-3)


def test_looking_at_percentiles_changes_nothing() -> None:
    task = Task("percentiles", "paper", "batch_norm", 0.1, steps=40, batch_size=60, optimizer="sgd")
    assert perform(None, task).values["test"] == train(DIGITS, task).values["test"]


def test_the_change_of_gradients_is_that_of_the_definition() -> None:
    """Two linear layers and a quadratic loss in disguise: only the first layer changes, so that G' is known."""
    torch.manual_seed(0)
    old = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    new = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    x, labels = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))

    def gradient(first: Any, second: Any) -> np.ndarray:
        hidden = x.numpy() @ first.T
        scores = hidden @ second.T
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(8), labels] -= 1
        return p.T @ hidden / 8

    w = [layer.weight.detach().numpy() for layer in (*old, *new)]
    before, after = gradient(w[0], w[1]), gradient(w[2], w[1])
    (change,) = _changes(old, new, x, labels, 0)
    assert change == pytest.approx(np.linalg.norm(before - after) / np.linalg.norm(before), rel=1e-10)


def test_a_network_of_one_layer_has_none_below_another() -> None:
    one = nn.Sequential(nn.Linear(6, 3))
    assert _changes(one, one, torch.randn(4, 6), torch.tensor([0, 1, 2, 0]), 0) == []


def test_looking_at_gradients_changes_nothing() -> None:
    task = Task("gradient change", variant="noisy_batch_norm", rate=0.01, steps=30)
    run = perform(None, task)
    assert run.values["test"] == train(DIGITS, task).values["test"]
    assert len(run.values["change"]) == len(watched(task))
    assert all(0 < change < 2 for change in run.values["change"])


def test_gradients_of_deep_networks() -> None:
    task = Task("gradient norms", "deep", activation="sigmoid", depths=(2, 10))
    with_, without = perform(None, task), perform(None, replace(task, variant="plain"))
    for run in (with_, without):
        assert [len(norms) for norms in run.values["norms"]] == [2, 10]
        assert [norms[-1] for norms in run.values["norms"]] == [0, 0]
        assert run.values["decades"] == [norms[0] for norms in run.values["norms"]]
    assert without.values["decades"][1] < -3 < with_.values["decades"][1]


def test_precise_statistics_are_those_of_the_images() -> None:
    task = Task("statistics", rate=0.01, steps=35)
    run = perform(None, task)
    assert run.values["test"] == train(DIGITS, task).values["test"], "looking changes nothing"
    assert [len(curve) for curve in run.values["precise"]] == [len(watched(task))] * len(COUNTS)
    # The same by hand, at the end: one layer's statistics of the definition.
    models: list[nn.Module] = []
    train(DIGITS, task, after=lambda trainee, step: models.append(trainee.model), watched=(35,))
    first = models[0][1](IMAGES[:1000].flatten(1))  # type: ignore[index]
    moments = definition.moments(first.detach().numpy()[:, :, None])
    from batchnorm.torch import calibrate

    calibrate(models[0], IMAGES[:1000].split(256), progress=False)
    np.testing.assert_allclose(models[0][2].running_mean, moments.mean, atol=1e-5)  # type: ignore[index]


def test_what_is_not_finite_is_none_wherever_it_is() -> None:
    values = {"a": [1.0, math.nan, [math.inf]], "b": -math.inf, "c": 2, "d": {"e": math.nan}}
    assert _finite(values) == {"a": [1.0, None, [None]], "b": None, "c": 2, "d": {"e": None}}


def test_latency_of_three_networks_with_the_same_outputs() -> None:
    run = perform(None, Task("latency", "cnn", rate=0.0))
    assert {"without", "with", "folded"} < set(run.values)
    assert all(run.values[name] > 0 for name in ("without", "with", "folded"))
    assert run.values["left"] == 0
    assert run.values["difference"] < 1e-5
