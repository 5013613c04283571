"""What a claim is, and how records judge it.

A claim measures one number of two networks for each seed and compares the two. The comparisons of all seeds give an
effect and an interval, and `verdicts.verdict` makes one of four words of the interval. The claims themselves are in
`experiments`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from batchnorm.study.tasks import Records, Run, Task
from batchnorm.study.training import checks
from batchnorm.study.verdicts import FEWEST_SEEDS, Rule, Verdict, bootstrap, verdict

__all__ = [
    "Claim",
    "Finding",
    "Numbers",
    "best_rate",
    "facts",
    "fastest_rate",
    "final_accuracy",
    "judge",
    "most_accurate_rate",
    "steps_to_target",
    "threshold",
    "trains",
]

Numbers = list[float | None]
Unit = Literal["ratio", "percentage points", "decades"]


@dataclass(frozen=True)
class Claim:
    """One thing that is said of batch normalization.

    Texts may contain `{target}`, `{batch_size}` and the other `facts`.

    Attributes:
        id: A short name that stays the same.
        statement: The claim, as a sentence.
        measured: How it is measured, as a sentence.
        published: What others have measured, and where; empty if there is nothing to put beside it.
        quantity: What the measured number is, as a heading.
        sides: What is compared, as people read it: first that without, then that of which something is claimed.
        measure: The number of either side for every seed; None where there is none (a target never reached).
        better: Which way the claim says that the number goes.
        unit: How the two are compared: the ratio of the numbers, their difference in percentage points, or in decades.
        margin: The smallest effect worth the name, in `unit`: above 1 for a ratio, above 0 for a difference.
        shown: The format of the number.
        if_true: What it means if the claim is supported, as a sentence.
        if_false: What it means if it is not, or if it is contradicted.
        rule: Whether an effect is claimed, or that there is none to the worse.
        unmeasured: What None counts as if the other side has a number: the worst that the study could have seen. None
            if there is no such thing: the seed is left out then.
        best_seen: The best number that the study could have seen, if there is a limit: what is there may be better.
    """

    id: str
    statement: str
    measured: str
    published: str
    quantity: str
    measure: Callable[[Records], tuple[Numbers, Numbers]]
    better: Literal["less", "more"]
    unit: Unit
    margin: float
    shown: str
    if_true: str
    if_false: str
    sides: tuple[str, str] = ("without", "with batch normalization")
    rule: Rule = "effect"
    unmeasured: Callable[[Records], float] | None = None
    best_seen: Callable[[Records], float] | None = None


@dataclass(frozen=True)
class Finding:
    """What the records say to a claim.

    Attributes:
        claim: The claim.
        without: The measured number for every seed, of the first side.
        with_: The same, of the second.
        effects: In the claim's unit, for every seed in which at least one side has a number. An effect
            above 1 (a ratio) or above 0 (a difference) is as the claim has it.
        effect: Their mean: geometric for a ratio, arithmetic for a difference. None if there are no effects.
        interval: The mean's 95% bootstrap interval. None with fewer than two effects.
        bound: `"at least"` or `"at most"` where numbers are missing or at the limit of what could be seen; else empty.
        verdict: One of four words.
    """

    claim: Claim
    without: Numbers
    with_: Numbers
    effects: list[float]
    effect: float | None
    interval: tuple[float, float] | None
    bound: Literal["", "at least", "at most"]
    verdict: Verdict


def judge(claim: Claim, records: Records) -> Finding:
    """Measure a claim and judge it.

    Ratios are averaged and resampled as logarithms, so that twice and half weigh the same. With fewer than
    `FEWEST_SEEDS` effects the verdict is *undecided* whatever the interval.
    """
    without, with_ = claim.measure(records)
    best_seen = claim.best_seen(records) if claim.best_seen else None
    effects = _effects(claim, without, with_, claim.unmeasured(records) if claim.unmeasured else None, best_seen)
    interval = bootstrap(effects)
    ratio = claim.unit == "ratio"
    linear: Callable[[float], float] = math.exp if ratio else float
    return Finding(
        claim,
        without,
        with_,
        effects=[linear(effect) for effect in effects],
        effect=linear(fmean(effects)) if effects else None,
        interval=(linear(interval[0]), linear(interval[1])) if interval else None,
        bound=_bound(without, with_, best_seen) if claim.unmeasured or claim.best_seen else "",
        verdict=verdict(
            interval if len(effects) >= FEWEST_SEEDS else None,
            math.log(claim.margin) if ratio else claim.margin,
            claim.rule,
        ),
    )


def _effects(
    claim: Claim, without: Numbers, with_: Numbers, unmeasured: float | None, best_seen: float | None
) -> list[float]:
    """For every seed `log(with / without)`, `with - without`, or 100 times that; negative if less is better."""
    sign = 1 if claim.better == "more" else -1
    factor = 100 if claim.unit == "percentage points" else 1
    effects = []
    for first, second in zip(without, with_, strict=True):
        a = unmeasured if first is None else first
        b = unmeasured if second is None else second
        if a is None or b is None or (first is None and second is None):
            continue
        if best_seen is not None and first == second == best_seen:
            continue  # which is better was not seen
        if claim.unit == "ratio" and not (a > 0 and b > 0):
            continue
        effects.append(sign * (math.log(b / a) if claim.unit == "ratio" else factor * (b - a)))
    return effects


def _bound(without: Numbers, with_: Numbers, best_seen: float | None) -> Literal["", "at least", "at most"]:
    """A number that is not there would be worse than what it counts as, and one at the limit of what is seen better."""

    def beaten(a: float | None, b: float | None) -> bool:
        return b is not None and (a is None or b == best_seen)

    pairs = list(zip(without, with_, strict=True))
    at_least = any(beaten(a, b) for a, b in pairs)
    at_most = any(beaten(b, a) for a, b in pairs)
    return "" if at_least == at_most else "at least" if at_least else "at most"


# --- What several claims measure --------------------------------------------------------------------------------------


def steps_to_target(run: Run, target: float, accuracies: str = "test") -> int | None:
    """The first check at which the curve is at the target accuracy or above it. None if there is none."""
    pairs = zip(checks(run.task.steps), run.values[accuracies], strict=False)
    return next((step for step, accuracy in pairs if accuracy >= target), None)


def final_accuracy(run: Run, accuracies: str = "test") -> float:
    """The last value of a run's curve; 0 if its loss was not finite."""
    curve = run.values[accuracies]
    return float(curve[-1]) if run.finite and curve else 0.0


def threshold(chance: float) -> float:
    """Half way from chance to 1: the accuracy from which on a run counts as one that trains."""
    return (1 + chance) / 2


def trains(run: Run, chance: float) -> bool:
    """Whether the loss stayed finite and the test accuracy ended at the threshold or above it."""
    return final_accuracy(run) >= threshold(chance)


def best_rate(records: Records, tasks: list[Task], score: Callable[[Run], float]) -> Task:
    """Of tasks that differ in the rate, that with the highest mean score.

    Of equal ones it is that with the higher final accuracy, then the lower rate. A score looks at validation images
    only: the test images choose nothing.
    """

    def key(task: Task) -> tuple[float, float]:
        runs = records.of(task)
        return fmean(map(score, runs)), fmean(final_accuracy(run, "validation") for run in runs)

    return max(sorted(tasks, key=lambda task: task.rate), key=key)


def fastest_rate(records: Records, tasks: list[Task]) -> Task:
    """The task with the fewest steps to the target: their geometric mean, where never counts as all steps."""
    target = records.settings.target

    def score(run: Run) -> float:
        return -math.log(steps_to_target(run, target, "validation") or run.task.steps)

    return best_rate(records, tasks, score)


def most_accurate_rate(records: Records, tasks: list[Task]) -> Task:
    """The task with the highest accuracy at the end."""
    return best_rate(records, tasks, lambda run: final_accuracy(run, "validation"))


MODELS = {
    "mlp": "two hidden layers of 64 ReLU units",
    "cnn": "two convolutions with ReLU and a linear layer",
    "resnet": "a small residual network of seven convolutions",
    "paper": "three layers of 100 sigmoid units",
}


def facts(records: Records) -> dict[str, str]:
    """What the texts of claims and experiments may speak of."""
    settings, dataset = records.settings, records.setup.dataset
    return {
        "target": f"{settings.target:.0%}",
        "batch_size": str(settings.batch_size),
        "epochs": f"{settings.epochs} epochs" if settings.epochs != 1 else "1 epoch",
        "steps": str(records.setup.steps()),
        "model": MODELS.get(settings.model, f"your network {settings.model}"),
        "rates": str(len(settings.size.rates)),
        "lowest": f"{settings.size.rates[0]:g}",
        "highest": f"{settings.size.rates[-1]:g}",
        "few_rates": ", ".join(f"{rate:g}" for rate in settings.size.few_rates),
        "depths": ", ".join(map(str, settings.size.depths)),
        "deepest": str(settings.size.depths[-1]),
        "gains": str(len(settings.size.gains)),
        "batch_sizes": ", ".join(map(str, settings.size.batch_sizes)),
        "paper_steps": f"{settings.paper_steps:,}",
        "data": dataset.name,
        "threshold": f"{threshold(dataset.chance):.0%}",
    }
