"""What follows from runs: the rule, and every claim on records where the answer is known."""
# ruff: noqa: E402  (what is optional is asked for before it is imported)

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from rich.console import Console

for module in ("torch", "sklearn", "joblib", "plotly"):
    pytest.importorskip(module)

from batchnorm.errors import InputError
from batchnorm.study import terminal
from batchnorm.study.claims import (
    Finding,
    best_rate,
    facts,
    final_accuracy,
    judge,
    steps_to_target,
    trains,
)
from batchnorm.study.data import Dataset, Part
from batchnorm.study.experiments import CLAIMS, EXPERIMENTS, chosen
from batchnorm.study.experiments.convergence import grid
from batchnorm.study.measures import COUNTS, watched
from batchnorm.study.rounds import conduct
from batchnorm.study.settings import RATES, SAME_RATE, Settings
from batchnorm.study.tasks import Records, Run, Setup, Task
from batchnorm.study.training import checks
from batchnorm.study.verdicts import FEWEST_SEEDS, Rule, each_round, mean_interval, more_to_decide, verdict

SEEDS = 6
STEPS = 256

Curve = Callable[[Task], list[float]]
"""The accuracies of a run at its checks."""


def tiny(name: str = "tiny") -> Dataset:
    part = Part(np.linspace(0, 1, 256, dtype=np.float32).reshape(64, 4), np.arange(64) % 2)
    return Dataset(name, part, part, part, (4,))


def setup(seeds: int = SEEDS, doublings: int = 0, **settings: Any) -> Setup:
    return Setup(Settings(seeds=seeds, doublings=doublings, epochs=STEPS // 2, **settings), tiny())


def trained(task: Task, curve: list[float], **values: Any) -> Run:
    return Run(task, True, {"loss": [1.0] * len(curve), "validation": curve, "test": curve, "train": 1.0, **values})


def synthetic(plain: Curve, batch_norm: Curve, seeds: int = SEEDS, **settings: Any) -> Records:
    """Records as if the networks had trained like this; on the validation images they did the same."""
    of, curves = setup(seeds, **settings), {"plain": plain, "batch_norm": batch_norm}
    tasks = of.seeded([task for variant in curves for task in grid(of, variant)])
    return Records(of, {task: trained(task, curves[task.variant](task)) for task in tasks})


def reaches(step: int, final: float = 0.96, up_to: float = 0.1) -> Curve:
    """Chance before `step`, `final` from then on, at rates up to `up_to`; chance at higher rates."""
    return lambda task: [final if at >= step and task.rate <= up_to else 0.5 for at in checks(task.steps)]


COMPARED = chosen(["convergence", "rates", "accuracy"])[1]


def findings(records: Records) -> dict[str, Finding]:
    return {claim.id: judge(claim, records) for claim in COMPARED}


def test_steps_that_the_tests_speak_of_are_checks() -> None:
    assert {2, 8, 32, STEPS} <= set(checks(STEPS))


# --- The rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "effect", "no_harm"),
    [
        ((1.0, 2.0), "supported", "supported"),
        ((1.5, 2.0), "supported", "supported"),
        ((0.9, 2.0), "undecided", "supported"),
        ((-3.0, 3.0), "undecided", "undecided"),
        ((0.2, 1.0), "undecided", "supported"),
        ((0.2, 0.9), "not supported", "supported"),
        ((-0.5, 0.5), "not supported", "supported"),
        ((-1.5, 0.5), "not supported", "undecided"),
        ((-1.5, -0.9), "not supported", "undecided"),
        ((-1.5, -1.0), "contradicted", "contradicted"),
        ((-9.0, -5.0), "contradicted", "contradicted"),
        (None, "undecided", "undecided"),
    ],
)
def test_verdict(interval: tuple[float, float] | None, effect: str, no_harm: str) -> None:
    assert verdict(interval, margin=1.0) == effect
    assert verdict(interval, margin=1.0, rule="no harm") == no_harm


def test_as_many_more_effects_as_are_said_decide() -> None:
    """The interval is undecided with two fewer, if mean and deviation are what they were."""
    cases: list[tuple[float, float, Rule]] = [(2.0, 1.6, "effect"), (2.0, 2.4, "effect"), (-1.2, 1.6, "no harm")]
    for centre, margin, rule in cases:
        few = [centre - 1.0, centre + 1.0] * 3
        more = more_to_decide(few, margin, rule)
        assert more is not None
        deviation = float(np.std(few, ddof=1))
        for count, decided in ((len(few) + more, True), (len(few) + more - 2, False)):
            half = 1.96 * deviation / float(np.sqrt(count))
            assert (verdict((centre - half, centre + half), margin, rule) != "undecided") == decided


@pytest.mark.parametrize(
    ("effects", "more"),
    [
        ([], None),
        ([1.0], None),
        ([0.9, 1.1, 1.0, 1.0, 1.0, 1.0], None),  # at the margin
        ([5.0, 5.1, 4.9], FEWEST_SEEDS - 3),
        ([5.0] * 4, 1),
        ([5.0] * 6, 1),  # it is decided already
    ],
)
def test_how_many_more_it_takes_at_the_ends(effects: list[float], more: int | None) -> None:
    assert more_to_decide(effects, 1.0) == more


def test_the_interval_is_students() -> None:
    """By the tables: 2.571 for 5 degrees of freedom and 95%, 4.032 for 99%."""
    effects = [1.0, 2.0, 3.0, 4.0, 5.0, 9.0]  # mean 4, standard deviation sqrt(8)
    for confidence, t in ((0.95, 2.5706), (0.99, 4.0321)):
        half = t * math.sqrt(8 / 6)
        assert mean_interval(effects, confidence) == pytest.approx((4 - half, 4 + half), rel=1e-4)


def test_the_interval_of_equal_effects_is_a_point_and_of_one_is_nothing() -> None:
    assert mean_interval([0.5] * 4) == (0.5, 0.5)
    assert mean_interval([0.5]) is None
    assert mean_interval([]) is None


def test_the_intervals_of_all_rounds_contain_the_mean_together() -> None:
    """Of 2000 studies that look after 6, 12, 24, 48, 96 and 192 seeds, 95% are never wrong; four deviations are 2%."""
    effects = np.random.default_rng(0).normal(3.0, 1.0, (2000, 192))
    rounds = Settings().rounds
    assert rounds == (6, 12, 24, 48, 96, 192)

    def right(study: list[float], confidence: float) -> bool:
        intervals = [mean_interval(study[:seeds], confidence) for seeds in rounds]
        return all(low <= 3.0 <= high for low, high in filter(None, intervals))

    assert fmean(right(study, each_round(rounds)) for study in effects.tolist()) > 0.93
    assert fmean(right(study, each_round(rounds[:1])) for study in effects.tolist()) < 0.88, "without the correction"


# --- Convergence, rates, accuracy -------------------------------------------------------------------------------------


def test_claims_that_are_true_are_supported() -> None:
    found = findings(synthetic(reaches(32, final=0.95, up_to=0.1), reaches(8, final=0.99, up_to=0.5)))
    assert {finding.verdict for finding in found.values()} == {"supported"}
    assert found["faster-at-same-rate"].effect == pytest.approx(4)
    assert found["faster-at-best-rate"].effect == pytest.approx(4)
    assert found["higher-learning-rates"].effect == pytest.approx(5)
    assert found["higher-accuracy"].effect == pytest.approx(4)
    assert found["higher-accuracy"].interval == pytest.approx((4, 4))


def test_claims_that_are_the_wrong_way_round_are_contradicted() -> None:
    found = findings(synthetic(reaches(8, final=0.99, up_to=0.5), reaches(32, final=0.95, up_to=0.1)))
    assert {finding.verdict for finding in found.values()} == {"contradicted"}
    assert found["faster-at-same-rate"].effect == pytest.approx(1 / 4)
    assert found["higher-accuracy"].effect == pytest.approx(-4)


def test_claims_without_an_effect_are_not_supported() -> None:
    found = findings(synthetic(reaches(32), reaches(32)))
    assert {finding.verdict for finding in found.values()} == {"not supported"}
    assert found["faster-at-same-rate"].effect == 1
    assert found["higher-accuracy"].effect == 0


def test_seeds_that_disagree_decide_nothing() -> None:
    def moody(task: Task) -> list[float]:
        return reaches(*((8, 0.99, 0.5) if task.seed % 2 else (256, 0.95, 0.02)))(task)

    found = findings(synthetic(reaches(32, final=0.97), moody))
    assert {finding.verdict for finding in found.values()} == {"undecided"}


def test_few_seeds_decide_nothing() -> None:
    true = reaches(32, final=0.95), reaches(8, final=0.99, up_to=0.5)
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
    missed = findings(synthetic(reaches(32, final=0.9), reaches(32)))["faster-at-same-rate"]
    assert missed.without == [None] * SEEDS
    assert (missed.effect, missed.bound) == (pytest.approx(STEPS / 32), "at least")
    other = findings(synthetic(reaches(32), reaches(32, final=0.9)))["faster-at-same-rate"]
    assert (other.effect, other.bound, other.verdict) == (pytest.approx(32 / STEPS), "at most", "contradicted")


def test_nothing_is_a_bound_if_both_networks_miss_in_turn() -> None:
    def in_turn(odd: int) -> Curve:
        return lambda task: reaches(32, final=0.96 if task.seed % 2 == odd else 0.9)(task)

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
    both = findings(synthetic(reaches(32, up_to=highest), reaches(32, up_to=highest)))["higher-learning-rates"]
    assert (both.effect, both.bound, both.verdict) == (None, "", "undecided"), "which is better was not seen"


def test_rates_are_chosen_on_validation_images() -> None:
    records = synthetic(reaches(32), reaches(32))
    perfect = [1.0] * len(checks(STEPS))
    runs = {
        task: run._replace(values=run.values | {"validation" if task.rate == 0.01 else "test": perfect})
        for task, run in records.runs.items()
    }
    found = findings(replace(records, runs=runs))
    assert found["higher-accuracy"].without == [0.96] * SEEDS
    assert found["faster-at-best-rate"].without == [32] * SEEDS


def test_seeds_without_a_number_are_left_out_where_nothing_is_the_worst() -> None:
    (claim,) = chosen(["reduces-covariate-shift"])[1]
    numbers = [0.3, None, 0.3, 0.3, 0.3, 0.3], [0.1, 0.1, None, 0.1, 0.1, 0.1]
    finding = judge(replace(claim, measure=lambda records: numbers), synthetic(reaches(8), reaches(8)))
    assert finding.effects == pytest.approx([3.0] * 4)
    assert (finding.bound, finding.verdict) == ("", "undecided")


def test_best_rate_of_equals() -> None:
    records = synthetic(reaches(32), reaches(32))
    tasks = grid(records.setup, "plain")
    assert best_rate(records, tasks[::-1], lambda run: 0.0).rate == RATES[0]
    assert best_rate(records, tasks, lambda run: -abs(run.task.rate - 0.05)).rate == 0.05
    runs = {
        task: run._replace(values=run.values | {"validation": [0.99]}) if task.rate == 0.2 else run
        for task, run in records.runs.items()
    }
    assert best_rate(replace(records, runs=runs), tasks, lambda run: 0.0).rate == 0.2


def test_a_run_that_diverged_neither_trains_nor_is_accurate() -> None:
    run = trained(Task(steps=4), [0.99])._replace(finite=False)
    assert final_accuracy(run) == 0
    assert not trains(run, chance=0.1)
    assert trains(run._replace(finite=True), chance=0.1)


def test_steps_to_target_is_the_first_check_at_it() -> None:
    assert steps_to_target(trained(Task(steps=256), [0.1, 0.95, 0.9, 1.0]), 0.95) == 2
    assert steps_to_target(trained(Task(steps=256), [0.1, 0.9]), 0.95) is None
    assert steps_to_target(trained(Task(steps=256), []), 0.95) is None


# --- Every claim ------------------------------------------------------------------------------------------------------


def world(claim: str, true: bool) -> Callable[[Task], Run]:
    """Runs as if one claim were true, or just the other way round."""
    good, bad = ("batch_norm", "plain") if true else ("plain", "batch_norm")
    variants = {
        "less-dropout": {"dropout": 0.95, "plain": 0.9, "batch_norm": 0.93, "batch_norm+dropout": 0.9},
        "small-batches-hurt": {"group_norm": 0.9, "renorm": 0.9, "ghost": 0.9, "batch_norm": 0.5},
        "renorm-mends": {"renorm": 0.95, "batch_norm": 0.9, "group_norm": 0.9, "ghost": 0.9},
    }

    def accuracy(task: Task) -> float:
        if claim == "small-batches-hurt" and task.batch_size != 2:
            return 0.9
        if claim in variants:
            value = variants[claim][task.variant]
            return value if true else {0.5: 1.0, 0.95: 0.85, 0.9: 0.9, 0.93: 0.87}[value]
        if claim == "less-careful-initialization":
            return 0.9 if task.variant == good or task.gain == 1 else 0.5
        return 0.98 if task.variant == good else 0.9

    def step(task: Task) -> int:
        if claim in variants:
            return 1
        if claim == "steadiness-is-why":
            return {"plain": 32, "batch_norm": 8}.get(task.variant, 64 if true else 8)
        slow = claim.startswith("beats") and (task.variant == "batch_norm") != true
        return 32 if slow or task.variant == bad else 8

    def run(task: Task) -> Run:
        better = task.variant == good
        if task.measure == "gradient norms":
            decades = 0.5 if better else -9.0
            return Run(
                task, True, {"norms": [[decades] * n for n in task.depths], "decades": [decades] * len(task.depths)}
            )
        if task.measure == "latency":
            return Run(
                task, True, {"without": 1.0, "with": 1.5, "folded": 1.0 if true else 1.5, "difference": 1e-7, "left": 0}
            )
        last = (
            0.97
            if claim == "steadiness-is-why" or claim.startswith(("beats", "faster", "paper-network-f"))
            else accuracy(task)
        )
        reach = reaches(step(task), last, up_to=1.0 if better else 0.02)(task)
        curve = reach if claim != "less-careful-initialization" else [accuracy(task)] * len(reach)
        more: dict[str, Any] = {}
        if task.measure == "percentiles":
            more = {"movement": 0.5 if better else 5.0, "percentiles": [[0.0] * len(watched(task))] * 3}
        if task.measure == "gradient change":
            more = {"change": [0.1 if better else 0.3] * len(watched(task))}
        if task.measure == "statistics":
            low, high = (0.9, 0.95) if true else (0.95, 0.9)
            more = {"ema": [low] * len(watched(task)), "precise": [[high] * len(watched(task))] * len(COUNTS)}
        return trained(task, curve, **more)

    return run


@pytest.mark.parametrize("true", [True, False])
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_every_claim_comes_out_as_it_was_planted(claim: Any, true: bool) -> None:
    (experiment,), _ = chosen([claim.id])
    of = setup()
    records = Records(of, {task: world(claim.id, true)(task) for task in of.seeded(experiment.tasks(of))})
    finding = judge(claim, records)
    assert finding.verdict == ("supported" if true else "contradicted"), finding
    assert all(plot.figure.data for plot in experiment.plots(records))


def test_noise_explains_nothing_where_there_is_no_help() -> None:
    (experiment,), (claim,) = chosen(["steadiness-is-why"])
    of = setup()
    tasks = of.seeded(experiment.tasks(of))
    same = Records(of, {task: trained(task, reaches(8)(task), change=[0.1]) for task in tasks})
    assert (judge(claim, same).effects, judge(claim, same).verdict) == ([], "undecided")


def test_a_network_at_chance_is_not_well_regularized() -> None:
    (claim,) = chosen(["regularizes"])[1]
    (experiment,), _ = chosen(["regularizes"])
    of = setup()
    runs = {task: world("regularizes", true=True)(task) for task in of.seeded(experiment.tasks(of))}
    for task, run in runs.items():
        if task.variant == "batch_norm":
            runs[task] = run._replace(values=run.values | {"train": 0.5, "test": [0.5] * 9})
    assert judge(claim, Records(of, runs)).verdict == "undecided"


def test_gains_that_train_are_a_band_only_side_by_side() -> None:
    (claim,) = chosen(["less-careful-initialization"])[1]
    (experiment,), _ = chosen(["less-careful-initialization"])
    of = setup()
    good = {"plain": (0.01, 0.1**0.5, 1.0, 10**0.5), "batch_norm": (0.1, 0.1**0.5, 1.0, 10**0.5, 10.0)}
    runs = {
        task: trained(task, [0.9 if any(math.isclose(task.gain, gain) for gain in good[task.variant]) else 0.5] * 9)
        for task in of.seeded(experiment.tasks(of))
    }
    finding = judge(claim, Records(of, runs))
    assert (finding.without, finding.with_) == ([1.0] * SEEDS, [2.0] * SEEDS)


# --- Rounds -----------------------------------------------------------------------------------------------------------


def test_only_what_is_undecided_gets_more_seeds_until_it_is_decided() -> None:
    """Renormalization seems to help, and more and more clearly; batches of 2 hurt, as the first seeds see at once."""
    experiments, claims = chosen(["small-batches-hurt", "renorm-mends"])
    of = setup(6, doublings=3)
    asked: list[tuple[int, set[tuple[str, int]], int]] = []
    names: list[list[str]] = []

    def run(task: Task) -> Run:
        worse = 0.3 if task.batch_size == 2 and task.variant == "batch_norm" else 0.0
        gain = (0.0, 0.05)[task.seed % 2] if task.variant == "renorm" else 0.0
        return trained(task, [0.9 + gain - worse])

    def perform(tasks: dict[str, list[Task]], seeds: int) -> list[Run]:
        every = [task for each in tasks.values() for task in each]
        names.append(list(tasks))
        asked.append((seeds, {(task.variant, task.batch_size) for task in every}, len(every)))
        return [run(task) for task in every]

    records, (hurt, mends) = conduct(of, experiments, claims, perform)
    assert [(seeds, count) for seeds, _, count in asked[1:]] == [(12, 2 * 6), (24, 2 * 12)]
    assert all(tasks == {("batch_norm", 4), ("renorm", 4)} for _, tasks, _ in asked[1:])
    assert names[1:] == [["renorm mends"]] * 2, "short enough for a progress bar"
    assert (hurt.seeds, hurt.verdict, hurt.effect) == (6, "supported", pytest.approx(30))
    assert (mends.seeds, mends.verdict, mends.effect) == (24, "supported", pytest.approx(2.5))
    assert mends.interval == mean_interval(mends.effects, 1 - 0.05 / 4)
    assert judge(mends.claim, records.first(12)).verdict == "undecided"
    assert len(records.of(experiments[0].tasks(of)[0])) == 6, "pictures show the seeds that ran everything"


def test_rates_stay_those_that_the_first_seeds_chose() -> None:
    """0.02 is the fastest for six seeds; for the others another would be, but only 0.02 is trained."""
    (experiment,), (claim,) = chosen(["beats-layer-norm"])
    of = setup(6, doublings=2)
    rates: list[set[float]] = []

    def run(task: Task) -> Run:
        step = 8 if (task.rate == 0.02) == (task.seed < 6) else 32
        return trained(task, reaches(step if task.variant != "layer_norm" or task.seed % 2 else 32)(task))

    def perform(tasks: dict[str, list[Task]], seeds: int) -> list[Run]:
        rates.append({task.rate for each in tasks.values() for task in each})
        return [run(task) for each in tasks.values() for task in each]

    conduct(of, [experiment], [claim], perform)
    assert len(rates) > 1
    assert rates[1:] == [{0.02}] * len(rates[1:])


def test_rounds_that_are_too_small_to_decide_are_not_corrected_for() -> None:
    """Of 2, 4, 8 and 16 seeds two can decide."""
    assert each_round((2, 4, 8, 16)) == each_round((8, 16)) == pytest.approx(0.975)
    assert each_round((2, 4)) == each_round((6,)) == pytest.approx(0.95)
    experiments, claims = chosen(["faster-at-same-rate"])
    asked: list[int] = []

    def perform(tasks: dict[str, list[Task]], seeds: int) -> list[Run]:
        asked.append(seeds)
        every = [task for each in tasks.values() for task in each]
        return [trained(task, reaches(8 if task.variant == "batch_norm" else 32)(task)) for task in every]

    _, (finding,) = conduct(setup(2, doublings=3), experiments, claims, perform)
    assert (finding.verdict, asked) == ("supported", [2, 4, 8])


def test_progress_fits_a_terminal_of_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    of, shown = setup(6, doublings=5), io.StringIO()
    monkeypatch.setattr(terminal, "Console", lambda **_: Console(file=shown, width=80, force_terminal=True))
    (experiment,), _ = chosen(["less-careful-initialization"])
    tasks = of.seeded(experiment.tasks(of))[:10]
    runs: dict[Task, Run] = {}
    with terminal._progress(of, {"less careful initialization": tasks}, runs, 192) as advance:
        for task in tasks[:3]:
            runs[task] = trained(task, [0.5])
            advance(runs[task])
    words = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()).split())
    assert "round 6 of 6: 192 seeds, 1 undecided" in words
    assert "less careful initialization ━" in words
    assert words.count("3/10") >= 2, "of the round and of the claim"


def test_more_seeds_are_not_tried_where_there_is_no_effect_at_all() -> None:
    experiments, claims = chosen(["faster-at-same-rate"])
    asked: list[int] = []

    def perform(tasks: dict[str, list[Task]], seeds: int) -> list[Run]:
        asked.append(seeds)
        return [trained(task, [0.5]) for each in tasks.values() for task in each]

    _, (finding,) = conduct(setup(6, doublings=5), experiments, claims, perform)
    assert (finding.verdict, asked) == ("undecided", [6])


# --- Every claim, with runs that diverged -----------------------------------------------------------------------------


@pytest.mark.parametrize("dead", ["all", "plain", "batch_norm", "some"])
def test_runs_that_diverged_can_be_judged_and_drawn(dead: str) -> None:
    of = setup()
    tasks = [task for experiment in EXPERIMENTS for task in of.seeded(experiment.tasks(of))]

    def run(task: Task) -> Run:
        if dead in ("all", task.variant) or (dead == "some" and task.seed % 2):
            if task.measure == "gradient norms":
                return Run(
                    task, False, {"norms": [[None] * n for n in task.depths], "decades": [None] * len(task.depths)}
                )
            empty = {} if task.measure == "latency" else {"loss": [], "validation": [], "test": [], "train": 0.0}
            return Run(task, False, empty)
        return world("faster-at-same-rate", true=True)(task)

    records = Records(of, {task: run(task) for task in dict.fromkeys(tasks)})
    for claim in CLAIMS:
        finding = judge(claim, records)
        assert all(math.isfinite(effect) for effect in finding.effects), claim.id
        assert dead != "all" or finding.verdict in ("undecided", "not supported"), claim.id
    for experiment in EXPERIMENTS:
        for plot in experiment.plots(records):
            json.dumps(json.loads(plot.figure.to_json()), allow_nan=False)


def test_claims_are_told_apart_and_can_be_judged() -> None:
    assert len(CLAIMS) >= 10
    assert len({claim.id for claim in CLAIMS} | {experiment.id for experiment in EXPERIMENTS}) == len(CLAIMS) + len(
        EXPERIMENTS
    )
    assert all(claim.margin > (1 if claim.unit == "ratio" else 0) for claim in CLAIMS)
    known = facts(synthetic(reaches(8), reaches(8)))
    for claim in CLAIMS:
        assert "{" not in claim.measured.format(**known) + claim.quantity.format(**known)
    for experiment in EXPERIMENTS:
        assert "{" not in experiment.ran.format(**known)


def test_ids_stay() -> None:
    assert [claim.id for claim in CLAIMS] == [
        "faster-at-same-rate",
        "faster-at-best-rate",
        "higher-learning-rates",
        "higher-accuracy",
        "gradient-flow-sigmoid",
        "gradient-flow-relu",
        "less-careful-initialization",
        "regularizes",
        "less-dropout",
        "paper-network-faster",
        "paper-network",
        "steady-inputs",
        "reduces-covariate-shift",
        "steadiness-is-why",
        "small-batches-hurt",
        "renorm-mends",
        "beats-input-norm",
        "beats-output-norm",
        "beats-weight-norm",
        "beats-layer-norm",
        "beats-group-norm",
        "precise-statistics",
        "costs-nothing",
    ]


def test_claims_and_sections_are_chosen_by_name() -> None:
    experiments, claims = chosen(["renorm-mends", "gradients"])
    assert [experiment.id for experiment in experiments] == ["gradients", "batch-sizes"]
    assert [claim.id for claim in claims] == ["gradient-flow-sigmoid", "gradient-flow-relu", "renorm-mends"]
    with pytest.raises(InputError, match="there is no claim nothing; choose of faster-at-same-rate"):
        chosen(["nothing"])


def test_every_level_has_what_claims_ask_for() -> None:
    for level in ("quick", "default", "full"):
        size = Settings(level=level).size  # type: ignore[arg-type]
        assert SAME_RATE in size.rates
        assert set(size.few_rates) <= set(RATES)
        assert {2, 4, 32} <= set(size.batch_sizes)
        assert size.seeds >= FEWEST_SEEDS
        spacings = np.diff(np.log10(size.gains))
        np.testing.assert_allclose(spacings, spacings[0])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seeds": 0}, "seeds must be 1 or more, got 0"),
        ({"epochs": -3}, "epochs must be 1 or more, got -3"),
        ({"paper_steps": 0}, "paper steps must be 1 or more, got 0"),
        ({"doublings": -1}, "doublings must be 0 or more, got -1"),
        ({"seeds": 1001}, "1001 seeds are more than 1000; choose fewer"),
        ({"seeds": 63, "doublings": 4}, "63 seeds, doubled 4 times, are more than 1000; choose fewer seeds"),
        ({"batch_size": 1}, "batch size must be 2 or more"),
        ({"target": 1.0}, "between 0 and 1, got 1.0"),
        ({"target": math.nan}, "between 0 and 1, got nan"),
        ({"base_seed": -1}, "base seed must be 0 or more"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        Settings(**settings)


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        ({}, (6, 12, 24, 48, 96, 192)),
        ({"level": "quick"}, (5,)),
        ({"level": "full"}, (12, 24, 48, 96, 192)),
        ({"seeds": 50}, (50, 100)),
        ({"seeds": 500}, (500,)),
        ({"seeds": FEWEST_SEEDS - 1}, (4,)),
        ({"seeds": 1, "doublings": 3}, (1, 2, 4, 8)),
    ],
)
def test_rounds(settings: dict[str, Any], rounds: tuple[int, ...]) -> None:
    assert Settings(**settings).rounds == rounds


def test_base_seeds_share_no_seed() -> None:
    seeds = [set(Settings(base_seed=base_seed).first_seeds(1000)) for base_seed in (0, 1)]
    assert not seeds[0] & seeds[1]
