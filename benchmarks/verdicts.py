"""How often the study reaches the same verdict: the whole study from many different base seeds."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from batchnorm.bench.clock import Record
from batchnorm.study.data import load
from batchnorm.study.experiments import CLAIMS, EXPERIMENTS
from batchnorm.study.rounds import conduct
from batchnorm.study.runner import perform_all
from batchnorm.study.settings import Settings
from batchnorm.study.summary import in_margins
from batchnorm.study.tasks import Run, Setup, Task
from batchnorm.study.verdicts import Rule, Verdict, each_round, mean_interval, verdict

CLAIM = {claim.id: claim for claim in CLAIMS}
STUDIES = 2000


def effects(records: Sequence[Record]) -> list[float]:
    """The effects of one claim from all base seeds, in units of its margin."""
    return [in_margins(CLAIM[r["claim"]], float(r["effect"])) for r in records if r["effect"] != ""]


def expected(records: Sequence[Record]) -> tuple[dict[str, float], float] | None:
    """How studies would end whose seeds vary as much as those of the records: simulated, with normal effects.

    A recorded effect is a mean over its seeds, so its variance is that of one seed divided by their number.
    Nearly right if the studies stopped at different numbers of seeds, for extreme ones stop first.

    Args:
        records: Those of one claim.

    Returns:
        The share of each verdict, the most frequent first, and the mean number of seeds; None if there are too few
        records to tell.
    """
    found, claim = effects(records), CLAIM[records[0]["claim"]]
    if len(found) < 2:
        return None
    seeds = np.array([int(r["seeds"]) for r in records if r["effect"] != ""])
    mean = float(np.average(found, weights=seeds))
    spread = math.sqrt(float(np.sum(seeds * (np.array(found) - mean) ** 2)) / (len(found) - 1))
    rounds = Settings().rounds
    drawn = np.random.default_rng(0).normal(mean, spread, (STUDIES, rounds[-1]))
    ends = [_ended(study.tolist(), rounds, claim.rule) for study in drawn]
    counts = Counter(found for found, _ in ends).most_common()
    return {found: count / STUDIES for found, count in counts}, sum(taken for _, taken in ends) / STUDIES


def _ended(study: list[float], rounds: Sequence[int], rule: Rule) -> tuple[Verdict, int]:
    """The verdict on effects in units of their margin, and the number of seeds that it took."""

    def decided(seeds: int) -> Verdict:
        return verdict(mean_interval(study[:seeds], each_round(rounds)), 1.0, rule)

    for seeds in rounds[:-1]:
        if (found := decided(seeds)) != "undecided":
            return found, seeds
    return decided(rounds[-1]), rounds[-1]


def run(base_seeds: int, quick: bool) -> Iterator[list[Record]]:
    """One record per claim and base seed."""
    for base_seed in range(base_seeds):
        if quick:
            settings = Settings("quick", seeds=1, epochs=1, paper_steps=20, base_seed=base_seed)
        else:
            settings = Settings(base_seed=base_seed)
        _, findings = conduct(Setup(settings, load()), list(EXPERIMENTS), list(CLAIMS), _perform)
        yield [
            {
                "claim": finding.claim.id,
                "base_seed": base_seed,
                "verdict": finding.verdict,
                "effect": "" if finding.effect is None else round(finding.effect, 4),
                "unit": finding.claim.unit,
                "seeds": finding.seeds,
            }
            for finding in findings
        ]


def _perform(tasks: dict[str, list[Task]], seeds: int) -> Iterator[Run]:
    return perform_all(None, list(dict.fromkeys(task for each in tasks.values() for task in each)))
