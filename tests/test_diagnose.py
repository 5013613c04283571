"""Every check finds a planted fault in its layer and nowhere else, the healthy twin draws nothing, remedies mend."""

import copy
import html.parser
import json
import random
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks import healthy
from processes import in_processes
from scipy import stats
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import batchnorm.torch as bn
from batchnorm.torch import Finding, Report, diagnose, parameter_groups
from batchnorm.whole import chance, evidence
from batchnorm.whole.checks import CHECKS

datasets = pytest.importorskip("sklearn.datasets")

BATCH = 32
FAULTS = ("warning", "error")

# --- Networks ---------------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    loaded = datasets.load_digits()
    return torch.tensor(loaded.data / 16, dtype=torch.float32), torch.tensor(loaded.target)


X, Y = digits()


class Mlp(nn.Module):
    """Two hidden layers, and what faults need: a dropout that does nothing yet."""

    def __init__(self, width: int = 24, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(64, width, bias=False), norm(width)
        self.drop = nn.Dropout(0.0)
        self.fc2, self.bn2 = nn.Linear(width, width, bias=False), norm(width)
        self.fc3 = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.fc1(x)))
        x = self.fc2(x)
        return self.fc3(torch.relu(self.bn2(self.drop(x) if self.drop.p else x)))


def shuffled(samples: int = BATCH, batches: int = 20) -> list[Tensor]:
    order = torch.randperm(len(X))[: samples * batches]
    return [X[part] for part in order.split(samples)]


def train(model: nn.Module, steps: int, order: Tensor | None = None) -> nn.Module:
    """Until the weights stand still: the learning rate ends at 0."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for step in range(steps):
        part = torch.randint(len(X), (BATCH,)) if order is None else order.split(BATCH)[step % (len(X) // BATCH)]
        optimizer.zero_grad()
        F.cross_entropy(model(X[part]), Y[part]).backward()
        optimizer.step()
        schedule.step()
    return model


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    return train(Mlp(), 80)


@pytest.fixture
def model(trained: nn.Module) -> nn.Module:
    return copy.deepcopy(trained)


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return shuffled()


def said(report: Report, check: str) -> set[str]:
    return {finding.layer for finding in report.findings if finding.check == check}


def mend(finding: Finding, model: nn.Module, data: Any, optimizer: Any = None) -> tuple[Any, Any, Any]:
    """What a user has after pasting the remedy."""
    names = {"model": model, "data": data, "optimizer": optimizer}
    exec(finding.remedy, names)
    return names["model"], names["data"], names["optimizer"]


# --- Healthy networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("network", healthy.NETWORKS)
def test_a_healthy_network_draws_no_warning(network: Callable[[], nn.Module], seed: int) -> None:
    """`python -m benchmarks healthy --seeds 20` trains more of them, and longer."""
    right, found = healthy.alarms(network, seed, epochs=2)
    assert found == []
    assert right > 0.8


def test_a_healthy_network_of_our_layers(data: list[Tensor]) -> None:
    for statistics in (None, bn.Renorm(), bn.GhostStatistics(16)):
        model = bn.convert(train(Mlp(), 60), statistics=statistics)
        assert diagnose(model, data).findings == ()


# --- Planted faults ---------------------------------------------------------------------------------------------------


def never_updated(model: Any) -> None:
    model.bn2.reset_running_stats()


def far_off(model: Any) -> None:
    model.bn2.running_mean += 2 * model.bn2.running_var.sqrt()


def not_a_number(model: Any) -> None:
    model.bn2.running_var[3] = torch.nan


def negative(model: Any) -> None:
    model.bn2.running_var[3] = -1.0


def no_gamma(model: Any) -> None:
    model.bn2.weight.data[[1, 5]] = 0.0


def no_input(model: Any) -> None:
    model.fc2.weight.data[[1, 5]] = 0.0
    bn.calibrate(model, [X], progress=False)


def always_off(model: Any) -> None:
    model.bn2.bias.data[:16] = -100.0


def with_bias(model: Any) -> None:
    model.fc2 = nn.Linear(24, 24)
    train(model, 60)


def dropout_first(model: Any) -> None:
    model.drop.p = 0.5
    train(model, 60)


def keras_momentum(model: Any) -> None:
    model.bn2.momentum = 0.9


def large_eps(model: Any) -> None:
    model.fc2.weight.data *= 1e-4
    bn.calibrate(model, [X], progress=False)


def affine_frozen(model: Any) -> None:
    model.bn2.requires_grad_(False)


def mode_frozen(model: Any) -> None:
    model.bn2.eval()


STATE = {
    never_updated: "stale-statistics",
    far_off: "stale-statistics",
    not_a_number: "non-finite-statistics",
    negative: "non-finite-statistics",
    no_gamma: "dead-channel",
    no_input: "dead-channel",
    always_off: "dead-channel",
    with_bias: "bias-before-norm",
    dropout_first: "dropout-before-norm",
    keras_momentum: "momentum-convention",
    large_eps: "eps-dominates",
    affine_frozen: "half-frozen",
    mode_frozen: "half-frozen",
}


@pytest.mark.parametrize("plant", STATE, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("ours", [False, True])
def test_a_planted_fault_is_found_and_mended(plant: Any, ours: bool, model: Any, data: list[Tensor]) -> None:
    check = STATE[plant]
    if plant is always_off:
        data = shuffled(batches=40)  # only of so many samples is a sparse channel told from one that is off
    assert diagnose(model, data).findings == ()
    plant(model)
    if ours:
        bn.convert(model)
    report = diagnose(model, data)
    assert said(report, check) == {"bn2"}
    assert {finding.layer for finding in report.findings} == {"bn2"}
    (found,) = [finding for finding in report.findings if finding.check == check]
    mended, data, _ = mend(found, model, data)
    assert said(diagnose(mended, data), check) == set()


@pytest.mark.parametrize("plant", [never_updated, not_a_number, no_gamma, keras_momentum])
def test_without_data(plant: Any, model: Any) -> None:
    plant(model)
    report = diagnose(model)
    assert {(finding.check, finding.layer) for finding in report.findings} == {(STATE[plant], "bn2")}


def test_the_first_layer_where_evaluation_parts(model: Any, data: list[Tensor]) -> None:
    assert diagnose(model, data).findings == ()
    far_off(model)
    report = diagnose(model, data)
    (gap,) = [finding for finding in report.findings if finding.check == "train-eval-gap"]
    assert gap.layer == "bn2"
    assert "standard errors" in gap.evidence
    assert "the model's output moves by" in gap.evidence
    assert [layer.gap > 1 for layer in report.layers] == [False, True]  # type: ignore[operator]
    model, data, _ = mend(gap, model, data)
    assert diagnose(model, data).findings == ()


@pytest.mark.parametrize("stretch", [0.0, 0.2])
def test_small_gaps_that_add_up(stretch: float) -> None:
    """A standard deviation that is off by a fifth is not large in one layer, but in twelve."""
    torch.manual_seed(0)
    parts = [nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
    model: Any = nn.Sequential(*(copy.deepcopy(part) for _ in range(12) for part in parts))
    for layer in model[::3]:
        nn.init.orthogonal_(layer.weight)
    batches = [torch.randn(BATCH, 64) for _ in range(20)]
    bn.calibrate(model, batches, progress=False)
    for layer in model[1::3]:
        layer.running_var *= (1 + stretch) ** 2
    found = [f for f in diagnose(model, batches).findings if f.severity in FAULTS]
    assert [(f.check, int(f.layer) > 3) for f in found] == ([("train-eval-gap", True)] if stretch else [])


def test_dropout_that_no_module_does(data: list[Tensor]) -> None:
    class Functional(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.bn1(self.fc1(x)))
            return self.fc3(torch.relu(self.bn2(F.dropout(self.fc2(x), 0.5, self.training))))

    model: Any = train(Functional(), 80)
    (found,) = [f for f in diagnose(model, data).findings if f.check == "dropout-before-norm"]
    assert found.layer == "bn2"
    mend(found, model, data)
    assert [f for f in diagnose(model, data).findings if f.severity in FAULTS] == []


def test_batches_that_are_not_finite(model: Any, data: list[Tensor]) -> None:
    spoiled = [data[0].clone(), *data[1:]]
    spoiled[0][3, 20] = torch.inf
    report = diagnose(model, spoiled)
    found = [finding for finding in report.findings if finding.check == "non-finite-statistics"]
    assert found[0].layer == "bn1"
    assert "1 of 20 batches" in found[0].evidence
    _, clean, _ = mend(found[0], model, spoiled)
    assert len(clean) == len(data) - 1
    assert diagnose(model, clean).findings == ()


def test_skipped_batches_are_told(model: Any, data: list[Tensor]) -> None:
    bn.convert(model)
    model.fc2.weight.data *= torch.inf
    model(data[0])
    model.fc2.weight.data = torch.ones_like(model.fc2.weight)
    report = diagnose(model)
    (found,) = report.findings
    assert (found.layer, found.check, found.severity) == ("bn2", "non-finite-statistics", "warning")
    model.bn2.num_batches_tracked += 10_000
    assert [f.severity for f in diagnose(model).findings] == ["info"], "as rare as a gradient scaler's overflows"
    mend(found, model, data)
    assert diagnose(model).findings == ()


@pytest.mark.parametrize("samples", [2, 4])
def test_small_batches(samples: int, model: Any) -> None:
    assert diagnose(model, shuffled(8, 60)).findings == ()
    report = diagnose(model, shuffled(samples, 60))
    found = [finding for finding in report.findings if finding.check == "small-batch"]
    assert [finding.layer for finding in found] == ["bn1", "bn2"]
    assert found[0].evidence.startswith(f"{samples}.0 independent values per channel")
    assert f"{samples / (samples - 1):.2f} times that of training" in found[0].evidence
    model, data, _ = mend(found[0], model, shuffled(samples, 60))
    assert said(diagnose(model, data), "small-batch") == set()


def test_one_image_has_few_independent_pixels() -> None:
    """Smooth images: all pixels of one are nearly the same, and so are those of a small batch of them."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3)
    smooth = [torch.randn(4, 3, 1, 1) + 0.1 * torch.randn(4, 3, 8, 8) for _ in range(40)]
    rough = [torch.randn(4, 3, 8, 8) for _ in range(40)]
    for batches, layers in ((smooth, {""}), (rough, set())):
        for batch in batches:
            layer(batch)
        assert said(diagnose(layer, batches), "small-batch") == layers


@pytest.mark.parametrize("kind", ["loader", "tensors", "pairs", "generator"])
def test_sorted_data(kind: str, model: Any) -> None:
    order = Y.argsort()
    batches = [(X[part], Y[part]) for part in order.split(BATCH)]
    data: Any = {
        "loader": DataLoader(TensorDataset(X[order], Y[order]), BATCH),
        "tensors": [x for x, _ in batches],
        "pairs": batches,
        "generator": (batch for batch in batches),
    }[kind]
    report = diagnose(model, data)
    (found,) = [finding for finding in report.findings if finding.check == "correlated-batch"]
    assert found.layer == "bn1"
    data = [*batches] if kind == "generator" else data
    model, data, _ = mend(found, model, data)
    assert said(diagnose(model, data), "correlated-batch") == set()
    if kind != "generator":
        assert not isinstance(model.bn1, bn.BatchNorm1d)
        assert diagnose(model, data).findings == (), "shuffled, the same network is healthy"


def test_weight_decay(model: Any, data: list[Tensor]) -> None:
    optimizer: Any = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.02)
    F.cross_entropy(model(data[0]), Y[: len(data[0])]).backward()
    optimizer.step()
    state = {id(p): optimizer.state[p]["exp_avg"] for p in model.parameters()}
    report = diagnose(model, optimizer=optimizer)
    assert said(report, "weight-decay-on-norm") == {"bn1", "bn2"}
    mend(report.findings[0], model, data, optimizer)
    assert diagnose(model, optimizer=optimizer).findings == ()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]
    assert all(optimizer.state[p]["exp_avg"] is state[id(p)] for p in model.parameters())
    assert diagnose(model, optimizer=torch.optim.SGD(parameter_groups(model, 0.1), 0.1)).findings == ()


def test_parameter_groups() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 1))
    model[3].bias.requires_grad_(False)
    decaying, others = parameter_groups(model, 0.5)
    assert [id(p) for p in decaying["params"]] == [id(model[0].weight), id(model[0].bias), id(model[3].weight)]
    assert [id(p) for p in others["params"]] == [id(p) for layer in model[1:3] for p in layer.parameters()]
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    optimizer = torch.optim.SGD([{"params": [*model.named_parameters()], "lr": 3.0}], 1.0, weight_decay=0.1)
    decaying, others = parameter_groups(model, optimizer=optimizer)
    assert others["param_names"] == ["1.weight", "1.bias", "2.weight", "2.bias"]
    assert (decaying["lr"], others["lr"], decaying["weight_decay"]) == (3.0, 3.0, 0.1)
    for wrong in ({}, {"weight_decay": 0.1, "optimizer": optimizer}):
        with pytest.raises(ValueError, match="give either weight_decay or optimizer"):
            parameter_groups(model, **wrong)
    with pytest.raises(ValueError, match="weight_decay must not be negative, got -1"):
        parameter_groups(model, -1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_count_twice(reentrant: bool, model: Any, data: list[Tensor]) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            inner = self.inner
            x = torch.relu(inner.bn1(inner.fc1(x)))
            x = checkpoint(lambda x: inner.bn2(inner.fc2(x)), x, use_reentrant=reentrant)
            return inner.fc3(torch.relu(x))

    whole = Checkpointed(model)
    (found,) = diagnose(whole, data).findings
    assert (found.layer, found.check) == ("inner.bn2", "recomputed")
    assert "moved 2 times in a step, 1 of them in the forward pass" in found.evidence
    assert all(p.grad is None for p in whole.parameters())
    mend(found, whole, data)
    assert diagnose(whole, data).findings == ()


def test_a_layer_that_nothing_calls(model: Any, data: list[Tensor]) -> None:
    model.extra = nn.ModuleList([nn.BatchNorm1d(24)])
    model.extra[0].num_batches_tracked += 1
    (found,) = diagnose(model, data).findings
    assert (found.layer, found.check) == ("extra.0", "unused")
    mend(found, model, data)
    assert diagnose(model, data).findings == ()


def test_a_layer_for_two_inputs(data: list[Tensor]) -> None:
    class Siamese(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.net, self.shift = Mlp(), shift

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) - self.net(x.flip(0) + self.shift)

    assert said(diagnose(train(Siamese(0.0), 40), data), "unused") == set()
    model = train(Siamese(1.0), 40)
    report = diagnose(model, data)
    found = next(finding for finding in report.findings if finding.check == "unused")
    assert found.layer == "net.bn1"
    assert "called 2 times in a step" in found.evidence
    mend(found, model, data)
    assert "net.bn1" not in said(diagnose(model, data), "unused")


def test_troubleshooting_says_what_diagnose_sees() -> None:
    text = (Path(__file__).parents[1] / "docs/troubleshooting.md").read_text(encoding="utf-8")
    named = set(re.findall(r"under\s`([a-z]+-[a-z-]+|recomputed|unsynchronized)`", text))
    assert named <= {check.__name__.replace("_", "-") for check in CHECKS}
    assert len(named) > 5


# --- Statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [0.01, 0.5, 1.0, 2.0, 30.0])
@pytest.mark.parametrize("above", [1, 2, 31, 500])
def test_the_tail_of_f(f: float, above: int) -> None:
    for below in (1, 3, 20, 1e5):
        expected = stats.f.sf(f, above, below)
        assert chance.f_tail(f, above, below) == pytest.approx(expected, rel=1e-6, abs=1e-14)


def test_eight_values_are_the_fewest_that_are_stable() -> None:
    for count in (5, 7, 8, 20):
        both = stats.chi2.sf(2 * (count - 1), count - 1) + stats.chi2.cdf((count - 1) / 2, count - 1)
        assert chance.factor_of_two(count) == pytest.approx(both, rel=1e-3)
    assert chance.factor_of_two(chance.STABLE - 1) > 0.25 > chance.factor_of_two(chance.STABLE)


def test_the_errors_of_a_batch() -> None:
    """Against many batches: of 6 images of 10 pixels each, whose pixels are alike."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(4000, 6, 2, 1)) + 0.5 * generator.normal(size=(4000, 6, 2, 10))
    batches = [evidence.batch(x) for x in images]
    for name, index in (("mean_error2", 1), ("var_error2", 2)):
        guessed = np.mean([getattr(b, name) for b in batches], axis=0)
        found = np.var([b.moments[index] for b in batches], axis=0)
        if name == "mean_error2":
            np.testing.assert_allclose(guessed, found, rtol=0.1)
        else:
            np.testing.assert_allclose(guessed, found, rtol=0.5)  # of six samples, the error of a variance is rough


@pytest.mark.parametrize("masked", [False, True])
def test_a_tensor_has_the_statistics_of_its_values(masked: bool) -> None:
    from batchnorm.torch.observer import moments_of

    x = torch.randn(5, 3, 4)
    mask = torch.rand(5, 4) > 0.3 if masked else None
    counts = None if mask is None else mask.double().numpy()[:, None]
    found, expected = moments_of(x, mask), evidence.batch(x.double().numpy(), counts)
    for a, b in zip((*found.moments, *found[2:]), (*expected.moments, *expected[2:]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_chance_alone_says_something_as_seldom_as_promised() -> None:
    """Of 1,500 data sets whose batches are alike, one in a thousand may look otherwise."""
    generator = np.random.default_rng(0)
    wrong = 0
    for size in (2, 5, 40):
        for _ in range(500):
            inputs = evidence.Inputs(tests=4)
            for x in generator.normal(size=(6, size, 4, 1)):
                inputs.add(evidence.batch(x))
            wrong += inputs.spread()[2]
    assert wrong <= stats.binom.ppf(1 - 1e-6, 1500, chance.ALPHA)


# --- Nothing changes --------------------------------------------------------------------------------------------------


def everything(model: nn.Module) -> list[Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    state: list[Any] = [(name, id(t), t._version, t.detach().clone()) for name, t in tensors]
    state += [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()]
    for module in model.modules():
        state += [module.training, dict(module._forward_hooks), dict(module._forward_pre_hooks), type(module)]
    drawn = np.random.get_state()[1].copy()  # type: ignore[union-attr]  # noqa: NPY002
    return [*state, torch.get_rng_state(), random.getstate(), drawn]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_changes(fails: bool, training: bool, model: Any) -> None:
    model.drop.p = 0.3
    model.train(training)
    model.bn1.eval()
    loader = DataLoader(TensorDataset(X, Y), BATCH, shuffle=True)
    y = model(X[:BATCH])
    before = everything(model)
    calls = 0

    def forward(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        random.random(), np.random.rand()  # noqa: NPY002
        y = model(batch[0])
        if fails and calls > 4:
            raise OverflowError("planted")
        return y

    if fails:
        with pytest.raises(OverflowError, match="planted"):
            diagnose(model, loader, forward=forward)
    else:
        diagnose(model, loader, forward=forward)
    assert same(everything(model), before)
    y.sum().backward()  # a graph from before still has what it needs


def test_how_much_is_read(model: Any) -> None:
    loader = DataLoader(TensorDataset(X, Y), 8)
    report = diagnose(model, loader, max_batches=3)
    assert report.read == "3 batches (24 samples) read"
    assert report.notes == ("Only the first 3 batches were read; max_batches=None reads all.",)
    assert diagnose(model, [X[:8]] * 3, max_batches=3).notes == ()


# --- Other models -----------------------------------------------------------------------------------------------------


def test_subclasses_compiled_models_and_masks(data: list[Tensor]) -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.0

    model = train(Mlp(norm=Own), 60)
    assert diagnose(model, data).findings == ()
    model.bn2.running_mean += 5.0  # type: ignore[operator, union-attr]
    assert said(diagnose(model, data), "stale-statistics") == {"bn2"}

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bn.BatchNorm1d(3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask)

    masked = Masked()
    batches = []
    for _ in range(60):
        mask = torch.arange(10) < torch.randint(3, 10, (16, 1))
        batches.append((torch.where(mask[:, None], torch.randn(16, 3, 10), 1e6), mask))
        masked(*batches[-1])
    assert diagnose(masked, batches).findings == ()


def test_layers_without_statistics_or_parameters(data: list[Tensor]) -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(64, track_running_stats=False), nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8, affine=False)
    )
    for batch in data:
        model(batch)
    for report in (diagnose(model, data), diagnose(model)):
        assert {finding.severity for finding in report.findings} <= {"info"}, "some pixels are the same in all images"


def test_processes_that_do_not_pool(model: Any) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        report = diagnose(model, shuffled(4, 60))
        found = [finding for finding in report.findings if finding.severity in FAULTS]
        assert [(f.layer, f.check) for f in found] == [("bn1", "unsynchronized"), ("bn2", "unsynchronized")]
        assert "all 4 processes have 16" in found[0].evidence
        assert said(diagnose(model, shuffled(32)), "unsynchronized") == set()
        model, *_ = mend(found[0], model, None)
        assert isinstance(model.bn1.statistics, bn.SyncStatistics)
    finally:
        torch.distributed.destroy_process_group()


def mended_together(rank: int) -> list[tuple[str, str]]:
    """What is found in one of two processes with batches of six, before and after the remedy."""
    torch.manual_seed(0)
    model: Any = Mlp()
    mine = shuffled(12, 40)
    mine = [batch[6 * rank : 6 * rank + 6] for batch in mine]
    bn.calibrate(model, mine, progress=False)
    first = diagnose(model, mine)
    model, *_ = mend(first.findings[0], model, mine)
    second = diagnose(model, mine)
    return [(finding.layer, finding.check) for report in (first, second) for finding in report.findings]


@pytest.mark.skipif(sys.platform == "win32", reason="needs gloo and files")
def test_processes_that_pool_are_healthy(tmp_path: Path) -> None:
    found = in_processes(2, mended_together, tmp_path)
    assert found == [[("bn1", "unsynchronized"), ("bn2", "unsynchronized")]] * 2


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "data", "error", "words"),
    [
        (nn.Linear(2, 2), None, ValueError, "model has no batch normalization"),
        (nn.BatchNorm1d(2), [], ValueError, "the data gave no batches"),
        (nn.BatchNorm1d(2), torch.ones(4, 2), TypeError, r"got a Tensor: pass \[data\]"),
        (nn.BatchNorm1d(2), {"x": 1}, TypeError, r"got a dict: pass \[data\]"),
        (nn.BatchNorm1d(2), [torch.ones(4, 3)], RuntimeError, r"fails on a batch of data of shape \(4, 3\): running_m"),
        (Mlp(), [torch.ones(4, 3)], RuntimeError, r"fails on a batch of data of shape \(4, 3\): mat1 and mat2"),
        (nn.LazyBatchNorm1d(), None, RuntimeError, "does not know its size yet"),
        (nn.BatchNorm1d(2), [(torch.ones(1, 2), 0)], ValueError, r"shape \(1, 2\): Expected more than 1 value"),
    ],
)
def test_bad_input_is_one_sentence(model: Any, data: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as raised:
        diagnose(model, data)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="max_batches must be positive, got 0"):
        diagnose(nn.BatchNorm1d(2), [], max_batches=0)


# --- The report -------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Iterable[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("href", "src")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report(model: Any, data: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = diagnose(model, data)
    assert str(healthy).endswith("nothing is wrong.")
    assert healthy.severity is None
    far_off(model)
    no_gamma(model)
    report = diagnose(model, data)
    assert [finding.severity for finding in report.findings] == ["error", "error", "warning"]
    assert report.severity == "error"
    text = str(report)
    monkeypatch.setattr("batchnorm.whole.report.find_spec", lambda name: None)
    for shown in (text, str(report)):
        for finding in report.findings:
            assert finding.check in shown
            assert f"    {finding.remedy}\n" in shown + "\n", "a remedy can be pasted"
    whole = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert [found["check"] for found in whole["findings"]] == [finding.check for finding in report.findings]
    assert [layer["name"] for layer in whole["layers"]] == ["bn1", "bn2"]
    assert whole["layers"][1]["standard_errors"] > 5 > whole["layers"][0]["standard_errors"] > 0
    page = Page(report.to_html())
    assert page.open == []
    assert page.links == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 1 + 2 * 2  # the gap, and two spectra of each layer


def test_a_report_of_what_is_not_finite(model: Any) -> None:
    model.bn2.running_var.fill_(torch.nan)
    model.bn2.weight.data.fill_(torch.inf)
    report = diagnose(model)
    json.loads(report.to_json(), parse_constant=pytest.fail)
    assert Page(report.to_html()).open == []
    assert "not finite" in report.to_html()


def test_what_is_counted_while_looking_does_not_count() -> None:
    model = bn.convert(nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8)))
    good = torch.randn(64, 4)
    model(good)
    diagnose(model, [good, torch.full_like(good, torch.nan), good])
    assert model[1].num_batches_skipped == 0
    assert model[1].num_batches_tracked == 1
