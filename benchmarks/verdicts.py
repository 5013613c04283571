"""How often the study reaches the same verdict: the whole study from many different base seeds."""

from collections.abc import Iterator, Sequence

from batchnorm.bench.clock import Record
from batchnorm.study.data import load
from batchnorm.study.experiments import CLAIMS, EXPERIMENTS
from batchnorm.study.rounds import conduct
from batchnorm.study.runner import perform_all
from batchnorm.study.settings import Settings
from batchnorm.study.summary import in_margins
from batchnorm.study.tasks import Run, Setup, Task

CLAIM = {claim.id: claim for claim in CLAIMS}


def effects(records: Sequence[Record]) -> list[float]:
    """The effects of one claim from all base seeds, in units of its margin."""
    return [in_margins(CLAIM[r["claim"]], float(r["effect"])) for r in records if r["effect"] != ""]


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
