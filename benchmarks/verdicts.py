"""How often the study reaches the same verdict: the whole study from many different base seeds."""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist, fmean, stdev

from batchnorm.bench.clock import Record
from batchnorm.study.claims import judge
from batchnorm.study.data import load
from batchnorm.study.experiments import CLAIMS, EXPERIMENTS
from batchnorm.study.runner import perform_all
from batchnorm.study.settings import SIZES, Settings
from batchnorm.study.summary import in_margins
from batchnorm.study.tasks import Records, Setup

CLAIM = {claim.id: claim for claim in CLAIMS}
CERTAIN = 0.99
MOST = 1000
"""More seeds than this are not told: so many mean that the effect is about as large as its margin."""


def effects(records: Sequence[Record]) -> list[float]:
    """The effects of one claim from all base seeds, in units of its margin."""
    return [in_margins(CLAIM[r["claim"]], float(r["effect"])) for r in records if r["effect"] != ""]


def seeds_to_agree(records: Sequence[Record]) -> int | None:
    """About how many seeds a study needs for the same verdict in 99 of 100 base seeds.

    With `n` seeds of standard deviation `s`, the interval reaches `1.96 s / sqrt(n)` to either side, and its centre
    strays by at most `2.33 s / sqrt(n)` in 99 of 100 studies. Together they must stay within the distance of the effect
    from the margin that decides.

    Args:
        records: Those of one claim. Each effect is a mean over the seeds of a default study.

    Returns:
        The number; None if there are too few records to tell, or if it is more than `MOST`.
    """
    found = effects(records)
    if len(found) < 2:
        return None
    decides = 1 if CLAIM[records[0]["claim"]].rule == "effect" else -1
    spread = stdev(found) * math.sqrt(SIZES["default"].seeds)
    reach = (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(CERTAIN)) * spread
    distance = abs(fmean(found) - decides)
    return math.ceil((reach / distance) ** 2) if reach <= distance * math.sqrt(MOST) else None


def run(base_seeds: int, quick: bool) -> Iterator[list[Record]]:
    """One record per claim and base seed."""
    for base_seed in range(base_seeds):
        if quick:
            settings = Settings("quick", seeds=1, epochs=1, paper_steps=20, base_seed=base_seed)
        else:
            settings = Settings(base_seed=base_seed)
        setup = Setup(settings, load())
        tasks = [task for experiment in EXPERIMENTS for task in setup.seeded(experiment.tasks(setup))]
        records = Records(setup, {run.task: run for run in perform_all(None, list(dict.fromkeys(tasks)))})
        findings = [judge(claim, records) for claim in CLAIMS]
        yield [
            {
                "claim": finding.claim.id,
                "base_seed": base_seed,
                "verdict": finding.verdict,
                "effect": "" if finding.effect is None else round(finding.effect, 4),
                "unit": finding.claim.unit,
            }
            for finding in findings
        ]
