"""What is claimed of batch normalization, how each claim is measured, and the rule that judges it.

A claim measures one number of each network for each seed and compares the two. The comparisons of all seeds give an
effect and an interval, and `verdict` makes one of four words of the interval. Rules and margins stood here before
anything was trained; nothing in them depends on what comes out.

To add a claim, append it to `CLAIMS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np

from batchnorm.study.experiments import RATES, Network, Records, Run

__all__ = ["CLAIMS", "FEWEST_SEEDS", "SAME_RATE", "Claim", "Finding", "Verdict", "best_rate", "judge", "verdict"]

Verdict = Literal["supported", "not supported", "contradicted", "undecided"]

SAME_RATE = 1e-3
"""The learning rate at which both networks are compared as they are: Adam's default, which introductions use."""

FEWEST_SEEDS = 5
"""With fewer seeds than this nothing is decided."""

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Claim:
    """One thing that is said of batch normalization.

    Attributes:
        id: A short name that stays the same.
        statement: The claim, as a sentence.
        measured: How it is measured, as a sentence; `{target}` stands for the target accuracy.
        quantity: What the measured number is, as a heading.
        measure: The number for every seed, of one network; None where there is none (a target never reached).
        unmeasured: What None counts as if the other network has a number: the worst that the study could have seen.
        better: Which way the claim says that the number goes with batch normalization.
        unit: How the two networks are compared: the ratio of the numbers, or the difference, in percentage points.
        margin: The smallest effect worth the name, in `unit`: above 1 for a ratio, above 0 for a difference.
        shown: The format of the number.
        best_seen: The best number that the study could have seen, if there is a limit: what is there may be better.
    """

    id: str
    statement: str
    measured: str
    quantity: str
    measure: Callable[[Records, Network], list[float | None]]
    unmeasured: Callable[[Records], float]
    better: Literal["less", "more"]
    unit: Literal["ratio", "percentage points"]
    margin: float
    shown: str
    best_seen: float | None = None


@dataclass(frozen=True)
class Finding:
    """What the records say to a claim.

    Attributes:
        claim: The claim.
        plain: The measured number for every seed, of the network without batch normalization.
        batch_norm: The same, of the network with it.
        effects: In the claim's unit, for every seed in which at least one network has a number. An effect
            above 1 (a ratio) or above 0 (a difference) is as the claim has it.
        effect: Their mean: geometric for a ratio, arithmetic for a difference. None if there are no effects.
        interval: The mean's 95% bootstrap interval. None with fewer than two effects.
        bound: `"at least"` or `"at most"` where numbers are missing or at the limit of what could be seen; else empty.
        verdict: One of four words.
    """

    claim: Claim
    plain: list[float | None]
    batch_norm: list[float | None]
    effects: list[float]
    effect: float | None
    interval: tuple[float, float] | None
    bound: Literal["", "at least", "at most"]
    verdict: Verdict


# --- The rule ---------------------------------------------------------------------------------------------------------


def verdict(interval: tuple[float, float] | None, margin: float) -> Verdict:
    """One word for an interval around an effect, where 0 is no effect and positive is as claimed.

    | the whole interval is | verdict |
    |---|---|
    | at or above `margin` | supported: an effect worth the name, as claimed |
    | at or below `-margin` | contradicted: an effect worth the name, the other way round |
    | below `margin` | not supported: an effect worth the name is ruled out |
    | (none of these) | undecided: the seeds do not tell |

    Args:
        interval: Its low and its high end, or None if there is none; for ratios, their logarithms.
        margin: The smallest effect worth the name, in the same unit, positive.

    Source: The idea of a smallest effect of interest: Lakens, "Equivalence Tests", 2017.
    """
    if interval is None:
        return "undecided"
    low, high = interval
    if low >= margin:
        return "supported"
    if high <= -margin:
        return "contradicted"
    if high < margin:
        return "not supported"
    return "undecided"


def bootstrap(effects: list[float]) -> tuple[float, float] | None:
    """The percentile bootstrap interval of a mean.

    As many effects as there are are drawn with replacement, many times over; the interval holds the middle of their
    means. With a handful of seeds the interval is somewhat too narrow; the margin of every claim is on top of it.

    Args:
        effects: One per seed.

    Returns:
        The low and the high end, or None with fewer than two effects. The draws are the same every time.

    Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979.
    """
    if len(effects) < 2:
        return None
    draws = np.random.default_rng(0).choice(effects, size=(RESAMPLES, len(effects)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws.mean(axis=1), (tail, 1 - tail))
    return float(low), float(high)


def judge(claim: Claim, records: Records) -> Finding:
    """Measure a claim and judge it.

    Ratios are averaged and resampled as logarithms, so that twice and half weigh the same. With fewer than
    `FEWEST_SEEDS` effects the verdict is *undecided* whatever the interval.
    """
    plain, batch_norm = claim.measure(records, "plain"), claim.measure(records, "batch_norm")
    logs = _effects(claim, plain, batch_norm, claim.unmeasured(records))
    interval = bootstrap(logs)
    ratio = claim.unit == "ratio"
    linear: Callable[[float], float] = math.exp if ratio else float
    return Finding(
        claim,
        plain,
        batch_norm,
        effects=[linear(effect) for effect in logs],
        effect=linear(fmean(logs)) if logs else None,
        interval=(linear(interval[0]), linear(interval[1])) if interval else None,
        bound=_bound(claim, plain, batch_norm),
        verdict=verdict(
            interval if len(logs) >= FEWEST_SEEDS else None,
            math.log(claim.margin) if ratio else claim.margin,
        ),
    )


def _effects(
    claim: Claim,
    plain: list[float | None],
    batch_norm: list[float | None],
    unmeasured: float,
) -> list[float]:
    """For every seed, `log(with / without)` or `100*(with - without)`, with the sign turned if less is better."""
    sign = 1 if claim.better == "more" else -1
    effects = []
    for without, with_ in zip(plain, batch_norm, strict=True):
        if without is None and with_ is None:
            continue
        a = unmeasured if without is None else without
        b = unmeasured if with_ is None else with_
        effects.append(sign * (math.log(b / a) if claim.unit == "ratio" else 100 * (b - a)))
    return effects


def _bound(
    claim: Claim, plain: list[float | None], batch_norm: list[float | None]
) -> Literal["", "at least", "at most"]:
    """A number that is not there would be worse than what it counts as, and one at the limit of what is seen better."""

    def beaten(a: float | None, b: float | None) -> bool:
        return b is not None and (a is None or b == claim.best_seen)

    pairs = list(zip(plain, batch_norm, strict=True))
    at_least = any(beaten(without, with_) for without, with_ in pairs)
    at_most = any(beaten(with_, without) for without, with_ in pairs)
    return "" if at_least == at_most else "at least" if at_least else "at most"


# --- What is measured -------------------------------------------------------------------------------------------------


def steps_to_target(records: Records, curve: list[float]) -> int | None:
    """The first check at which a curve is at the target accuracy or above it. None if there is none."""
    reached = (
        step for step, accuracy in zip(records.checks, curve, strict=False) if accuracy >= records.settings.target
    )
    return next(reached, None)


def final_accuracy(run: Run, curve: list[float]) -> float:
    """The last value of a run's curve; 0 if its loss was not finite."""
    return curve[-1] if run.finite and curve else 0.0


def training_threshold(chance: float) -> float:
    """Half way from chance to 1: the accuracy from which on a run counts as one that trains."""
    return (1 + chance) / 2


def trains(run: Run, chance: float) -> bool:
    """Whether the loss stayed finite and the test accuracy ended at the threshold or above it."""
    return final_accuracy(run, run.test) >= training_threshold(chance)


def best_rate(records: Records, network: Network, score: Callable[[Run], float]) -> float:
    """The learning rate with the highest mean score.

    Of equal ones it is that with the higher final accuracy, then the lower rate. A score looks at validation images
    only: the test images choose nothing.
    """

    def key(rate: float) -> tuple[float, float]:
        runs = records.of(network, rate)
        return fmean(map(score, runs)), fmean(final_accuracy(run, run.validation) for run in runs)

    return max(RATES, key=key)


def fastest_rate(records: Records, network: Network) -> float:
    """The rate with the fewest steps to the target: their geometric mean, where never counts as all steps."""
    all_steps = records.checks[-1]
    return best_rate(records, network, lambda run: -math.log(steps_to_target(records, run.validation) or all_steps))


def most_accurate_rate(records: Records, network: Network) -> float:
    """The rate with the highest accuracy at the end."""
    return best_rate(records, network, lambda run: final_accuracy(run, run.validation))


def _steps_at(records: Records, network: Network, rate: float) -> list[float | None]:
    return [steps_to_target(records, run.test) for run in records.of(network, rate)]


def _steps_at_same_rate(records: Records, network: Network) -> list[float | None]:
    return _steps_at(records, network, SAME_RATE)


def _steps_at_fastest_rate(records: Records, network: Network) -> list[float | None]:
    return _steps_at(records, network, fastest_rate(records, network))


def _largest_rate(records: Records, network: Network) -> list[float | None]:
    runs = [run for rate in RATES for run in records.of(network, rate) if trains(run, records.dataset.chance)]
    seeds = range(records.settings.seeds)
    return [max((run.rate for run in runs if run.seed == seed), default=None) for seed in seeds]


def _final_accuracies(records: Records, network: Network) -> list[float | None]:
    rate = most_accurate_rate(records, network)
    return [final_accuracy(run, run.test) for run in records.of(network, rate)]


# --- The claims -------------------------------------------------------------------------------------------------------

CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="faster-at-same-rate",
        statement="Batch normalization trains faster.",
        measured="Steps until the test accuracy reaches {target}, "
        f"both networks at learning rate {SAME_RATE:g}: without / with.",
        quantity=f"Steps to {{target}}, rate {SAME_RATE:g}",
        measure=_steps_at_same_rate,
        unmeasured=lambda records: records.checks[-1],
        better="less",
        unit="ratio",
        margin=1.1,
        shown=".0f",
    ),
    Claim(
        id="faster-at-best-rate",
        statement="It trains faster even if each network has its own best learning rate.",
        measured="Steps until the test accuracy reaches {target}, "
        "each network at the rate that is fastest for it: without / with.",
        quantity="Steps to {target}, fastest rate",
        measure=_steps_at_fastest_rate,
        unmeasured=lambda records: records.checks[-1],
        better="less",
        unit="ratio",
        margin=1.1,
        shown=".0f",
    ),
    Claim(
        id="higher-learning-rates",
        statement="Batch normalization allows higher learning rates.",
        measured=f"Largest of {len(RATES)} learning rates from {RATES[0]:g} to {RATES[-1]:g} at which the loss stays "
        "finite and the test accuracy ends at least half way from chance to 100%: with / without.",
        quantity="Largest rate that trains",
        measure=_largest_rate,
        unmeasured=lambda records: RATES[0],
        better="more",
        unit="ratio",
        margin=1.5,
        shown="g",
        best_seen=RATES[-1],
    ),
    Claim(
        id="higher-accuracy",
        statement="Batch normalization ends with a higher accuracy.",
        measured="Test accuracy after the last step, "
        "each network at the rate that is most accurate for it: with - without.",
        quantity="Final accuracy, best rate",
        measure=_final_accuracies,
        unmeasured=lambda records: 0.0,
        better="more",
        unit="percentage points",
        margin=0.5,
        shown=".1%",
    ),
)
"""Every claim of the study, in the order in which it is reported."""
