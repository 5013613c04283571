"""Claims, and how the records judge them.

A claim measures one number of two networks for each seed and compares the two. The comparisons of all seeds give an
effect and an interval, and `verdicts.verdict` turns the interval into one of four verdicts. The claims themselves are
in `experiments`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from batchnorm.study.tasks import Records, Run, Task
from batchnorm.study.training import checks
from batchnorm.study.verdicts import (
    FEWEST_SEEDS,
    Rule,
    Verdict,
    each_round,
    mean_interval,
    more_to_decide,
    verdict,
)

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
    "needed",
    "steps_to_target",
    "threshold",
    "trains",
]

Numbers = list[float | None]
Unit = Literal["ratio", "percentage points", "decades"]


@dataclass(frozen=True)
class Claim:
    """One claim about batch normalization.

    Texts may contain `{target}`, `{batch_size}` and the other `facts`.

    Attributes:
        id: A short, stable name.
        statement: The claim, as a sentence.
        measured: How it is measured, as a sentence.
        published: The published result and its source; empty if there is none.
        literature: The verdict of the published result; None if there is none.
        quantity: The measured number, as a heading.
        sides: The names of the two sides: first the one without, then the one that the claim is about.
        measure: The number of each side for every seed; None where there is none (a target never reached).
        better: Whether a smaller or a larger number supports the claim.
        unit: How the two are compared: as a ratio, or as a difference in percentage points or in decades.
        margin: The smallest relevant effect, in `unit`: above 1 for a ratio, above 0 for a difference.
        shown: The format of the number.
        if_true: The meaning if the claim is supported, as a sentence.
        if_false: The meaning if it is not supported, or contradicted.
        rule: Whether the claim is about an effect, or about no harm.
        unmeasured: The number that replaces a missing one if the other side has one: the worst that the study could
            have seen. If None, the seed is left out.
        best_seen: The best number that the study could have seen, if it is limited: the true number may be better.
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
    literature: Verdict | None = "supported"


@dataclass(frozen=True)
class Finding:
    """The result of a claim.

    Attributes:
        claim: The claim.
        without: The measured number of the first side for every seed.
        with_: The same for the second side.
        effects: The effects in the claim's unit, for every seed in which at least one side has a number. An effect
            above 1 (a ratio) or above 0 (a difference) agrees with the claim.
        effect: Their mean: geometric for a ratio, arithmetic for a difference. None if there are no effects.
        interval: The mean's interval; those of all rounds hold at 95%. None with fewer than two effects.
        bound: `"at least"` or `"at most"` if numbers are missing or at the limit of what could be seen; else empty.
        verdict: One of the four verdicts.
        more_seeds: About how many more seeds would decide an undecided verdict; None if that cannot be told, or if it
            would take too many.
    """

    claim: Claim
    without: Numbers
    with_: Numbers
    effects: list[float]
    effect: float | None
    interval: tuple[float, float] | None
    bound: Literal["", "at least", "at most"]
    verdict: Verdict
    more_seeds: int | None = None

    @property
    def seeds(self) -> int:
        """The number of seeds that were looked at."""
        return len(self.without)


def judge(claim: Claim, records: Records) -> Finding:
    """Measure a claim and judge it.

    Ratios are averaged as logarithms, so that twice and half have the same weight. With fewer than `FEWEST_SEEDS`
    effects the verdict is *undecided*, whatever the interval.
    """
    without, with_ = claim.measure(records)
    best_seen = claim.best_seen(records) if claim.best_seen else None
    effects = _effects(claim, without, with_, claim.unmeasured(records) if claim.unmeasured else None, best_seen)
    confidence = each_round(records.settings.rounds)
    interval = mean_interval(effects, confidence)
    ratio = claim.unit == "ratio"
    linear: Callable[[float], float] = math.exp if ratio else float
    margin = math.log(claim.margin) if ratio else claim.margin
    decided = verdict(interval if len(effects) >= FEWEST_SEEDS else None, margin, claim.rule)
    return Finding(
        claim,
        without,
        with_,
        effects=[linear(effect) for effect in effects],
        effect=linear(fmean(effects)) if effects else None,
        interval=(linear(interval[0]), linear(interval[1])) if interval else None,
        bound=_bound(without, with_, best_seen) if claim.unmeasured or claim.best_seen else "",
        verdict=decided,
        more_seeds=(
            _in_seeds(more_to_decide(effects, margin, claim.rule, confidence), len(without) / max(len(effects), 1))
            if decided == "undecided"
            else None
        ),
    )


def _in_seeds(effects: int | None, seeds_per_effect: float) -> int | None:
    """A number of effects as a number of seeds, some of which have no effect."""
    return None if effects is None else math.ceil(effects * seeds_per_effect)


def needed(claim: Claim, records: Records) -> list[Task]:
    """The tasks that a claim compares: those that more seeds have to run. The first round chose learning rates."""
    asked = _Asked(records.setup, records.runs)
    claim.measure(asked)
    return list(dict.fromkeys(asked.tasks))


@dataclass(frozen=True, eq=False)
class _Asked(Records):
    """Records that note the tasks whose runs they are asked for."""

    tasks: list[Task] = field(default_factory=list)

    def of(self, task: Task) -> list[Run]:
        self.tasks.append(task)
        return super().of(task)


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
            continue  # the study cannot tell which is better
        if claim.unit == "ratio" and not (a > 0 and b > 0):
            continue
        effects.append(sign * (math.log(b / a) if claim.unit == "ratio" else factor * (b - a)))
    return effects


def _bound(without: Numbers, with_: Numbers, best_seen: float | None) -> Literal["", "at least", "at most"]:
    """Whether the effect is a bound: a missing number is worse than its replacement, one at the limit may be better."""

    def beaten(a: float | None, b: float | None) -> bool:
        return b is not None and (a is None or b == best_seen)

    pairs = list(zip(without, with_, strict=True))
    at_least = any(beaten(a, b) for a, b in pairs)
    at_most = any(beaten(b, a) for a, b in pairs)
    return "" if at_least == at_most else "at least" if at_least else "at most"


# --- Measurements of several claims -----------------------------------------------------------------------------------


def steps_to_target(run: Run, target: float, accuracies: str = "test") -> int | None:
    """The first check at which the curve reaches the target accuracy; None if it never does."""
    pairs = zip(checks(run.task.steps), run.values[accuracies], strict=False)
    return next((step for step, accuracy in pairs if accuracy >= target), None)


def final_accuracy(run: Run, accuracies: str = "test") -> float:
    """The last value of a run's curve; 0 if its loss was not finite."""
    curve = run.values[accuracies]
    return float(curve[-1]) if run.finite and curve else 0.0


def threshold(chance: float) -> float:
    """Halfway from chance to 1: a run trains if its accuracy reaches this."""
    return (1 + chance) / 2


def trains(run: Run, chance: float) -> bool:
    """Whether the loss has stayed finite and the final test accuracy reaches the threshold."""
    return final_accuracy(run) >= threshold(chance)


def best_rate(records: Records, tasks: list[Task], score: Callable[[Run], float]) -> Task:
    """The task with the highest mean score among tasks that differ in the rate.

    Ties go to the higher final accuracy, then to the lower rate. Scores use validation images only: the test images
    choose nothing. The seeds of the first round choose for all: only they have trained with every rate.
    """

    def key(task: Task) -> tuple[float, float]:
        runs = records.first().of(task)
        return fmean(map(score, runs)), fmean(final_accuracy(run, "validation") for run in runs)

    return max(sorted(tasks, key=lambda task: task.rate), key=key)


def fastest_rate(records: Records, tasks: list[Task]) -> Task:
    """The task with the fewest steps to the target: their geometric mean, where "never" counts as all steps."""
    target = records.settings.target

    def score(run: Run) -> float:
        return -math.log(steps_to_target(run, target, "validation") or run.task.steps)

    return best_rate(records, tasks, score)


def most_accurate_rate(records: Records, tasks: list[Task]) -> Task:
    """The task with the highest final accuracy."""
    return best_rate(records, tasks, lambda run: final_accuracy(run, "validation"))


MODELS = {
    "mlp": "two hidden layers of 64 ReLU units",
    "cnn": "two convolutions with ReLU and a linear layer",
    "resnet": "a small residual network of seven convolutions",
    "paper": "three layers of 100 sigmoid units",
}


def facts(records: Records) -> dict[str, str]:
    """The values that the texts of claims and experiments may contain."""
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
