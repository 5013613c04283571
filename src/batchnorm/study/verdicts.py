"""The rule that turns an effect with an interval into one of four verdicts.

It was fixed before any training, and nothing in it depends on the results.
"""

import math
from statistics import NormalDist
from typing import Literal

import numpy as np

__all__ = ["FEWEST_SEEDS", "Rule", "Verdict", "bootstrap", "more_to_decide", "verdict"]

Verdict = Literal["supported", "not supported", "contradicted", "undecided"]
Rule = Literal["effect", "no harm"]

FEWEST_SEEDS = 5
"""With fewer seeds than this, every verdict is undecided."""

CONFIDENCE = 0.95
RESAMPLES = 10_000

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


def bootstrap(effects: list[float]) -> tuple[float, float] | None:
    """The percentile bootstrap interval of a mean.

    The effects are resampled with replacement many times; the interval contains the central part of the means. With
    few seeds it is somewhat too narrow, for which the margin of every claim compensates.

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


def more_to_decide(effects: list[float], margin: float, rule: Rule = "effect") -> int | None:
    """About how many more effects would decide a verdict if their mean and their spread stay the same.

    With `n` effects of standard deviation `s` the interval reaches about `1.96 s / sqrt(n)` to either side of the mean.
    The verdict is decided when that is less than the distance from the mean to the nearest end of the undecided range:
    the margin, or for a claim of no harm the margin on the other side.

    Args:
        effects: One per seed.
        margin: As in `verdict`.
        rule: As in `verdict`.

    Returns:
        The number, at least one; None if there are too few effects to tell, or if too many would be needed.
    """
    if len(effects) < 2:
        return None
    distance = abs(float(np.mean(effects)) - (margin if rule == "effect" else -margin))
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * float(np.std(effects, ddof=1))
    if reach > distance * math.sqrt(len(effects) + MOST_MORE):
        return None
    needed = math.ceil((reach / distance) ** 2) if distance else FEWEST_SEEDS
    return max(needed, FEWEST_SEEDS, len(effects) + 1) - len(effects)
