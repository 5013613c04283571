"""The study: what a run is, what follows from runs, and how it is written down."""
# ruff: noqa: E402  (what is optional is asked for before it is imported)

import html.parser
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for module in ("sklearn", "joblib", "plotly", "jinja2", "rich"):
    pytest.importorskip(module)

from batchnorm.errors import InputError
from batchnorm.study import output, report
from batchnorm.study.claims import (
    CLAIMS,
    FEWEST_SEEDS,
    SAME_RATE,
    Finding,
    best_rate,
    bootstrap,
    final_accuracy,
    judge,
    steps_to_target,
    trains,
    verdict,
)
from batchnorm.study.data import Dataset, Part, load_digits
from batchnorm.study.experiments import (
    NETWORKS,
    RATES,
    Network,
    Records,
    Run,
    Settings,
    build,
    checks,
    plan,
    record,
    train,
)

SEEDS = 6
STEPS = [1, 2, 4, 8, 16, 32, 64, 128, 256]

Curve = Callable[[float, int], list[float]]
"""The test accuracies of a network at a learning rate, from a seed."""


def tiny(name: str = "tiny") -> Dataset:
    part = Part(np.linspace(0, 1, 80, dtype=np.float32).reshape(20, 4), np.arange(20) % 2)
    return Dataset(name, part, part, part)


def synthetic(plain: Curve, batch_norm: Curve, seeds: int = SEEDS, **settings: Any) -> Records:
    """Records as if the networks had trained like this; on the validation images they did the same."""
    curves: dict[Network, Curve] = {"plain": plain, "batch_norm": batch_norm}
    runs = []
    for seed in range(seeds):
        for rate in RATES:
            for network in NETWORKS:
                curve = curves[network](rate, seed)
                runs.append(Run(network, rate, seed, True, [1.0] * len(curve), curve, curve))
    return Records(Settings(seeds=seeds, **settings), tiny(), STEPS, runs)


def reaches(step: int, final: float = 0.96, up_to: float = 0.1) -> Curve:
    """Chance before `step`, `final` from then on, at rates up to `up_to`; chance at higher rates."""

    def curve(rate: float, seed: int) -> list[float]:
        return [final if at >= step and rate <= up_to else 0.5 for at in STEPS]

    return curve


def findings(records: Records) -> dict[str, Finding]:
    return {claim.id: judge(claim, records) for claim in CLAIMS}


# --- The rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((1.0, 2.0), "supported"),
        ((1.5, 2.0), "supported"),
        ((0.9, 2.0), "undecided"),
        ((-3.0, 3.0), "undecided"),
        ((0.2, 1.0), "undecided"),
        ((0.2, 0.9), "not supported"),
        ((-0.5, 0.5), "not supported"),
        ((-1.5, 0.5), "not supported"),
        ((-1.5, -0.9), "not supported"),
        ((-1.5, -1.0), "contradicted"),
        ((-9.0, -5.0), "contradicted"),
        (None, "undecided"),
    ],
)
def test_verdict(interval: tuple[float, float] | None, expected: str) -> None:
    assert verdict(interval, margin=1.0) == expected


def test_bootstrap_covers_the_mean_of_many_samples() -> None:
    generator = np.random.default_rng(0)
    intervals = [bootstrap(generator.normal(3, 1, 30).tolist()) for _ in range(200)]
    covered = sum(low <= 3 <= high for low, high in filter(None, intervals))
    assert 0.88 * 200 <= covered <= 0.99 * 200


def test_bootstrap_of_equal_effects_is_a_point_and_of_one_is_nothing() -> None:
    assert bootstrap([0.5] * 4) == (0.5, 0.5)
    assert bootstrap([0.5]) is None
    assert bootstrap([]) is None


def test_bootstrap_is_the_same_every_time() -> None:
    assert bootstrap([1.0, 2.0, 4.0]) == bootstrap([1.0, 2.0, 4.0])


# --- Claims, on records where the answer is known ---------------------------------------------------------------------


def test_claims_that_are_true_are_supported() -> None:
    found = findings(synthetic(reaches(64, final=0.95, up_to=0.1), reaches(16, final=0.99, up_to=0.5)))
    assert {finding.verdict for finding in found.values()} == {"supported"}
    assert found["faster-at-same-rate"].effect == pytest.approx(4)
    assert found["faster-at-best-rate"].effect == pytest.approx(4)
    assert found["higher-learning-rates"].effect == pytest.approx(5)
    assert found["higher-accuracy"].effect == pytest.approx(4)
    assert found["higher-accuracy"].interval == pytest.approx((4, 4))


def test_claims_that_are_the_wrong_way_round_are_contradicted() -> None:
    found = findings(synthetic(reaches(16, final=0.99, up_to=0.5), reaches(64, final=0.95, up_to=0.1)))
    assert {finding.verdict for finding in found.values()} == {"contradicted"}
    assert found["faster-at-same-rate"].effect == pytest.approx(1 / 4)
    assert found["higher-accuracy"].effect == pytest.approx(-4)


def test_claims_without_an_effect_are_not_supported() -> None:
    found = findings(synthetic(reaches(32), reaches(32)))
    assert {finding.verdict for finding in found.values()} == {"not supported"}
    assert found["faster-at-same-rate"].effect == 1
    assert found["higher-accuracy"].effect == 0


def test_seeds_that_disagree_decide_nothing() -> None:
    def moody(rate: float, seed: int) -> list[float]:
        return reaches(*((8, 0.99, 0.5) if seed % 2 else (128, 0.95, 0.02)))(rate, seed)

    found = findings(synthetic(reaches(32, final=0.97), moody))
    assert {finding.verdict for finding in found.values()} == {"undecided"}


def test_few_seeds_decide_nothing() -> None:
    true = reaches(64, final=0.95), reaches(16, final=0.99, up_to=0.5)
    assert {f.verdict for f in findings(synthetic(*true, seeds=FEWEST_SEEDS - 1)).values()} == {"undecided"}
    one = findings(synthetic(*true, seeds=1))
    assert all(finding.interval is None and finding.effect is not None for finding in one.values())


def test_a_target_that_nobody_reaches_says_nothing() -> None:
    found = findings(synthetic(reaches(32, final=0.8), reaches(32, final=0.9)))
    for name in ("faster-at-same-rate", "faster-at-best-rate"):
        assert found[name].effects == []
        assert (found[name].effect, found[name].interval, found[name].verdict) == (None, None, "undecided")
    assert found["higher-accuracy"].verdict == "supported"


def test_a_target_that_one_network_misses_counts_as_all_steps_and_bounds_the_effect() -> None:
    missed = findings(synthetic(reaches(32, final=0.9), reaches(64)))["faster-at-same-rate"]
    assert missed.plain == [None] * SEEDS
    assert (missed.effect, missed.bound) == (pytest.approx(256 / 64), "at least")
    other = findings(synthetic(reaches(64), reaches(32, final=0.9)))["faster-at-same-rate"]
    assert (other.effect, other.bound, other.verdict) == (pytest.approx(64 / 256), "at most", "contradicted")


def test_nothing_is_a_bound_if_both_networks_miss_in_turn() -> None:
    def in_turn(odd: int) -> Curve:
        return lambda rate, seed: reaches(32, final=0.96 if seed % 2 == odd else 0.9)(rate, seed)

    assert findings(synthetic(in_turn(0), in_turn(1)))["faster-at-same-rate"].bound == ""


def test_networks_that_never_train() -> None:
    found = findings(synthetic(reaches(999), reaches(999)))
    assert found["higher-learning-rates"].effect is None
    found = findings(synthetic(reaches(999), reaches(32, up_to=0.5)))
    assert found["higher-learning-rates"].effect == pytest.approx(0.5 / RATES[0])
    assert found["higher-learning-rates"].bound == "at least"


def test_a_rate_at_the_end_of_the_grid_bounds_the_effect() -> None:
    highest = RATES[-1]
    found = findings(synthetic(reaches(32), reaches(32, up_to=highest)))["higher-learning-rates"]
    assert (found.effect, found.bound) == (pytest.approx(highest / 0.1), "at least")
    assert findings(synthetic(reaches(32, up_to=highest), reaches(32)))["higher-learning-rates"].bound == "at most"
    both = reaches(32, up_to=highest)
    assert findings(synthetic(both, both))["higher-learning-rates"].bound == ""


def test_rates_are_chosen_on_validation_images() -> None:
    records = synthetic(reaches(32), reaches(32))
    better_rate = 0.01
    runs = [
        run._replace(validation=[1.0] * len(STEPS))
        if run.rate == better_rate
        else run._replace(test=[1.0] * len(STEPS))
        for run in records.runs
    ]
    found = findings(replace(records, runs=runs))
    assert found["higher-accuracy"].plain == [0.96] * SEEDS
    assert found["faster-at-best-rate"].plain == [32] * SEEDS


def test_best_rate_of_equals() -> None:
    records = synthetic(reaches(32), reaches(32))
    assert best_rate(records, "plain", lambda run: 0.0) == RATES[0]
    assert best_rate(records, "plain", lambda run: -abs(run.rate - 0.05)) == 0.05
    runs = [run._replace(validation=[0.99] * len(STEPS)) if run.rate == 0.2 else run for run in records.runs]
    assert best_rate(replace(records, runs=runs), "plain", lambda run: 0.0) == 0.2


def test_a_run_that_diverged_neither_trains_nor_is_accurate() -> None:
    run = Run("plain", 1.0, 0, False, [1.0], [0.99], [0.99])
    assert final_accuracy(run, run.test) == 0
    assert not trains(run, chance=0.1)
    assert trains(run._replace(finite=True), chance=0.1)


def test_steps_to_target_is_the_first_check_at_it() -> None:
    records = synthetic(reaches(32), reaches(32))
    assert steps_to_target(records, [0.1, 0.95, 0.9, 1.0]) == 2
    assert steps_to_target(records, [0.1, 0.9]) is None
    assert steps_to_target(records, []) is None


def test_claims_are_told_apart_and_can_be_judged() -> None:
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.margin > (1 if claim.unit == "ratio" else 0) for claim in CLAIMS)
    assert SAME_RATE in RATES


# --- Training ---------------------------------------------------------------------------------------------------------


def test_a_run_is_the_same_every_time_and_leaves_torch_as_it_was() -> None:
    digits, settings = load_digits(), Settings(epochs=1)
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    first = train(digits, settings, "batch_norm", 0.01, seed=3)
    torch.manual_seed(99)
    assert train(digits, settings, "batch_norm", 0.01, seed=3) == first
    assert train(digits, settings, "batch_norm", 0.01, seed=4) != first
    torch.random.set_rng_state(state)
    train(digits, settings, "plain", 0.01, seed=3)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_learns(network: Network) -> None:
    digits, settings = load_digits(), Settings(epochs=3)
    run = train(digits, settings, network, 0.01, seed=0)
    assert run.finite
    assert len(run.test) == len(run.validation) == len(run.loss) == len(checks(digits, settings))
    assert run.test[0] < 0.5 < 0.8 < run.test[-1]
    assert run.loss[-1] < run.loss[0]


def test_both_networks_start_from_the_same_weights() -> None:
    weights = []
    for network in NETWORKS:
        torch.manual_seed(5)
        model = build(network, inputs=7, classes=3)
        weights.append([layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)])
    assert [weight.shape for weight in weights[0]] == [(64, 7), (64, 64), (3, 64)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_networks_differ_in_batch_normalization_only() -> None:
    plain, batch_norm = (build(network, inputs=7, classes=3) for network in NETWORKS)
    normalizing = [layer for layer in batch_norm.modules() if isinstance(layer, torch.nn.BatchNorm1d)]
    assert len(normalizing) == 2
    assert not any(isinstance(layer, torch.nn.BatchNorm1d) for layer in plain.modules())
    assert (batch_norm[1](torch.randn(16, 64)) >= 0).all(), "its ReLU follows"


def test_a_run_whose_loss_is_not_finite_ends_there() -> None:
    run = train(load_digits(), Settings(epochs=1), "plain", 1e38, seed=0)
    assert not run.finite
    assert len(run.test) < 5


def test_checks_are_steps_spaced_by_ratio() -> None:
    steps = checks(load_digits(), Settings())
    assert steps[0] == 1
    assert steps[-1] == 1149 // 32 * 10
    assert steps == sorted(set(steps))
    assert all(b / a < 1.1 for a, b in pairwise(steps) if a > 20)


def test_records_are_in_order_whatever_order_the_runs_came_in() -> None:
    records = synthetic(reaches(32), reaches(16), seeds=2)
    again = record(records.dataset, Settings(seeds=2, batch_size=2), records.runs[::-1])
    assert [(run.seed, run.rate, run.network) for run in again.runs] == plan(records.settings)
    assert [run.seed for run in again.of("plain", SAME_RATE)] == [0, 1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seeds": 0}, "seeds must be 1 or more, got 0"),
        ({"epochs": -3}, "epochs must be 1 or more, got -3"),
        ({"batch_size": 1}, "batch size must be 2 or more"),
        ({"target": 1.0}, "between 0 and 1, got 1.0"),
        ({"target": math.nan}, "between 0 and 1, got nan"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        Settings(**settings)


# --- Results and page -------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """The parts of a page that could make a browser ask for something, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.styles = ""
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.inside = ""
        self.policy = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                self.links.append(value or "")
            if name == "style":
                self.styles += value or ""
            if name == "id":
                self.ids.append(value or "")
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self.styles += data
        elif self.inside != "script":
            self.words += data


@pytest.fixture(scope="module")
def mixed() -> tuple[Records, list[Finding]]:
    """Records in which every verdict occurs, and a run that diverged at once."""
    records = synthetic(reaches(16, final=0.96, up_to=0.05), reaches(64, final=0.961, up_to=0.5))
    dead = records.runs[-1]._replace(finite=False, loss=[], validation=[], test=[])
    records = replace(records, runs=[*records.runs[:-1], dead])
    found = [judge(claim, records) for claim in CLAIMS]
    found[1] = replace(found[1], effect=None, interval=None, effects=[], verdict="undecided")
    return records, found


def test_the_page_asks_for_nothing(mixed: tuple[Records, list[Finding]]) -> None:
    text = report.page(*mixed)
    page = Page(text)
    assert page.links == ["data:,"]
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    assert not {"iframe", "img", "object", "embed", "audio", "video", "base", "form"} & set(page.tags)
    assert page.policy.startswith("default-src 'none'")
    assert "http" not in page.policy
    assert len(text.encode()) < 6e6


def test_the_page_says_every_verdict(mixed: tuple[Records, list[Finding]]) -> None:
    records, found = mixed
    verdicts = [finding.verdict for finding in found]
    assert verdicts == ["contradicted", "undecided", "supported", "not supported"]
    page = Page(report.page(records, found))
    words = " ".join(page.words.split())
    for finding in found:
        assert finding.claim.statement in words
        assert report.effect(finding) in words
    for mark, word in zip("✗?✓○", verdicts, strict=True):
        assert f"{mark} {word}" in words
    assert {"same-rate", "fastest-rate", "by-rate"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_the_page_escapes_a_name(mixed: tuple[Records, list[Finding]]) -> None:
    records, found = mixed
    name = "</script><script>alert(1)</script>"
    page = report.page(replace(records, dataset=tiny(name)), found)
    assert name not in page
    assert "alert(1)" in page


def test_results_are_strict_json(mixed: tuple[Records, list[Finding]]) -> None:
    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    results = json.loads(report.to_json(report.results(*mixed)), parse_constant=refuse)
    assert set(results) == {"claims", "checks", "runs", "environment"}
    assert len(results["runs"]) == SEEDS * len(RATES) * len(NETWORKS)
    for claim in results["claims"]:
        assert {"id", "statement", "verdict", "effect", "interval", "unit"} <= set(claim)
    assert [claim["effect"] is None for claim in results["claims"]] == [False, True, False, False]


def test_not_a_number_is_never_written(mixed: tuple[Records, list[Finding]]) -> None:
    results = report.results(*mixed)
    results["claims"][0]["effect"] = math.nan
    with pytest.raises(ValueError, match="JSON"):
        report.to_json(results)


def test_the_environment_names_versions_and_neither_paths_nor_hosts(mixed: tuple[Records, list[Finding]]) -> None:
    environment = report.environment(mixed[0])
    assert environment["versions"]["torch"]
    assert environment["settings"]["epochs"] == 10
    assert environment["seeds"] == list(range(SEEDS))
    text = json.dumps(environment)
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text
    assert os.getcwd() not in text


@pytest.mark.parametrize(
    ("bound", "effect", "interval", "shown"),
    [
        ("", 2.816, (2.357, 3.421), ("2.82×", "2.36 to 3.42")),
        ("at least", 3.0, (3.0, 3.0), ("at least 3.00×", "3.00 to 3.00")),
        ("", None, None, ("nothing to compare", "no interval")),
        ("", 0.5, None, ("0.50×", "no interval")),
    ],
)
def test_numbers_as_text(
    mixed: tuple[Records, list[Finding]], bound: Any, effect: Any, interval: Any, shown: tuple[str, str]
) -> None:
    finding = replace(mixed[1][0], bound=bound, effect=effect, interval=interval)
    assert (report.effect(finding), report.interval(finding)) == shown


def test_points_have_a_sign(mixed: tuple[Records, list[Finding]]) -> None:
    finding = replace(mixed[1][3], effect=1.493, interval=(-0.5, 2.431))
    assert (report.effect(finding), report.interval(finding)) == ("+1.49 points", "-0.50 to +2.43")


def test_a_median_of_seeds_that_mostly_never_arrive_is_never(mixed: tuple[Records, list[Finding]]) -> None:
    finding = replace(mixed[1][0], plain=[10, None, None, 20], batch_norm=[10, None, 30, 20])
    assert report.compared(finding, "plain") == "never"
    assert report.compared(finding, "batch_norm") == "20"


# --- Files ------------------------------------------------------------------------------------------------------------

FILES = {"a.txt": "new a", "b.txt": "new b"}


def test_files_are_written_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "down"
    output.check_writable(folder, tuple(FILES))
    assert not folder.exists()
    for text in ("old", "new"):
        output.write(folder, {name: text for name in FILES})
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(FILES, "new")


@pytest.mark.parametrize("failing", ["a.txt", "b.txt"])
def test_a_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    for name in FILES:
        (tmp_path / name).write_text("old")
    write_text = Path.write_text

    def full(self: Path, text: str, **options: Any) -> int:
        write_text(self, text[:2], **options)
        if failing in self.name:
            raise OSError(28, "No space left on device")
        return len(text)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left on device"):
        output.write(tmp_path, FILES)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(FILES, "old")


def test_an_interrupt_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        output.write(tmp_path, FILES)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError):
            output.check_writable(folder, ("a.txt",))


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(InputError, match=r"a\.txt is a folder"):
        output.check_writable(tmp_path, ("a.txt",))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        output.check_writable(tmp_path / "new", ("a.txt",))
