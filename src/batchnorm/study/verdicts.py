"""The rule that turns an effect with an interval into one of four verdicts.

The verdicts were fixed before any training. Student's interval, in place of a bootstrap, and the correction for several
rounds came later, when few seeds often left a claim undecided. Both make intervals wider; neither changes a margin.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import Literal

import numpy as np
from scipy.special import stdtrit  # type: ignore[import-untyped]

__all__ = [
    "CONFIDENCE",
    "FEWEST_SEEDS",
    "Rule",
    "Verdict",
    "each_round",
    "judged",
    "mean_interval",
    "more_to_decide",
    "verdict",
]

Verdict = Literal["supported", "not supported", "contradicted", "undecided"]
Rule = Literal["effect", "no harm"]

FEWEST_SEEDS = 5
"""With fewer seeds than this, every verdict is undecided."""

CONFIDENCE = 0.95
"""How often the intervals of all rounds of one claim contain its true effect.

Nothing corrects for the number of claims.
"""

MOST_MORE = 200
"""If an effect needs more additional seeds than this, it is too close to its margin to be decided."""


def verdict(interval: tuple[float, float] | None, margin: float, rule: Rule = "effect") -> Verdict:
    """The verdict for the interval of an effect, where 0 is no effect and positive is as claimed.

    | the whole interval is | a claim of an effect | a claim of no harm |
    |---|---|---|
    | at or above `margin` | supported: an effect worth the name | supported |
    | above `-margin`, and below `margin` | not supported: an effect worth the name is ruled out | supported |
    | above `-margin` | undecided | supported: harm worth the name is ruled out |
    | at or below `-margin` | contradicted: an opposite effect worth the name | contradicted |
    | below `margin` | not supported | undecided |
    | (none of these) | undecided: the seeds do not decide | undecided |

    Args:
        interval: Its low and its high end, or None if there is none; for ratios, their logarithms.
        margin: The smallest relevant effect, positive, in the same unit.
        rule: Whether the claim is about an effect, or about no harm.

    Source: The idea of a smallest effect of interest: Lakens, "Equivalence Tests", 2017.
    """
    if interval is None:
        return "undecided"
    low, high = interval
    if high <= -margin:
        return "contradicted"
    if low >= margin or (rule == "no harm" and low > -margin):
        return "supported"
    if high < margin and rule == "effect":
        return "not supported"
    return "undecided"


def judged(rounds: Sequence[int]) -> list[int]:
    """The rounds that have enough seeds to decide anything, as numbers of seeds."""
    return [seeds for seeds in rounds if seeds >= FEWEST_SEEDS]


def each_round(rounds: Sequence[int]) -> float:
    """The confidence with which one claim's intervals of all rounds contain its true effect in 95% of all studies.

    A claim that is looked at again with more seeds has more chances to be decided by accident. With `k` rounds that can
    decide it, the confidence of each interval is `1 - 0.05/k`, Bonferroni's correction.

    Args:
        rounds: The number of seeds after each round.
    """
    return 1 - (1 - CONFIDENCE) / max(len(judged(rounds)), 1)


def mean_interval(effects: list[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's interval of a mean.

    `mean +- t s / sqrt(n)`, where `s` is the standard deviation of the `n` effects, and `t` the quantile of Student's
    distribution with `n - 1` degrees of freedom. It is exact for normal effects, and nearly so for many effects.

    Effects that come in steps, such as those of learning rates, may all be equal: the interval is then a point, and
    says too much.

    Args:
        effects: One per seed.
        confidence: How often such an interval contains the true mean.

    Returns:
        The low and the high end, or None with fewer than two effects.

    Source: Student, "The Probable Error of a Mean", 1908.
    """
    if len(effects) < 2:
        return None
    t = float(stdtrit(len(effects) - 1, (1 + confidence) / 2))
    half = t * float(np.std(effects, ddof=1)) / math.sqrt(len(effects))
    mean = fmean(effects)
    return mean - half, mean + half


def more_to_decide(
    effects: list[float], margin: float, rule: Rule = "effect", confidence: float = CONFIDENCE
) -> int | None:
    """About how many more effects would decide a verdict if their mean and their spread stay the same.

    With `n` effects of standard deviation `s` the interval reaches about `z s / sqrt(n)` to either side of the mean,
    where `z` is the normal quantile (1.96 for 95%). The verdict is decided when that is less than the distance from the
    mean to the nearest end of the undecided range: the margin, or for a claim of no harm the margin on the other side.

    Args:
        effects: One per seed.
        margin: As in `verdict`.
        rule: As in `verdict`.
        confidence: As in `mean_interval`.

    Returns:
        The number, at least one; None if there are too few effects to tell, or if too many would be needed.
    """
    if len(effects) < 2:
        return None
    distance = abs(float(np.mean(effects)) - (margin if rule == "effect" else -margin))
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * float(np.std(effects, ddof=1))
    if reach > distance * math.sqrt(len(effects) + MOST_MORE):
        return None
    needed = math.ceil((reach / distance) ** 2) if distance else FEWEST_SEEDS
    return max(needed, FEWEST_SEEDS, len(effects) + 1) - len(effects)
