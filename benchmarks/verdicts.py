"""How often the study reaches the same verdict: the whole study from many different base seeds."""

from collections.abc import Iterator

from batchnorm.bench.clock import Record
from batchnorm.study.claims import judge
from batchnorm.study.data import load
from batchnorm.study.experiments import CLAIMS, EXPERIMENTS
from batchnorm.study.runner import perform_all
from batchnorm.study.settings import Settings
from batchnorm.study.tasks import Records, Setup


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
