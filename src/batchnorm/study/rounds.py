"""The rounds of a study: every claim from a few seeds, then what is undecided from twice as many, and so on.

A claim that a few seeds decide costs no more than these, and one that needs many gets them. A claim's intervals of all
rounds together hold at 95% (`verdicts.each_round`), so looking several times makes no accident more likely.
"""

from collections.abc import Callable, Iterable

from batchnorm.study.claims import Claim, Finding, judge, needed
from batchnorm.study.experiments import Experiment
from batchnorm.study.tasks import Records, Run, Setup, Task

__all__ = ["Perform", "conduct"]

Perform = Callable[[dict[str, list[Task]], int], Iterable[Run]]
"""Runs the tasks of each section or claim, with so many seeds. A task may belong to several."""


def conduct(
    setup: Setup, experiments: list[Experiment], claims: list[Claim], perform: Perform
) -> tuple[Records, list[Finding]]:
    """Train what the experiments need, and judge the claims, round after round.

    Args:
        setup: The setup, whose settings say how many rounds there are.
        experiments: What the first round trains.
        claims: The claims, which need nothing but these experiments.
        perform: Runs tasks.

    Returns:
        All runs, and a finding for every claim, from as many seeds as it took. What is undecided has had the most
        seeds, unless no seed has an effect: then more are not tried.
    """
    records = Records(setup, {})
    first, *more = setup.settings.rounds
    tasks = {experiment.title: setup.seeded(experiment.tasks(setup)) for experiment in experiments}
    records.runs.update((run.task, run) for run in perform(tasks, first))
    findings = {claim.id: judge(claim, records) for claim in claims}
    for seeds in more:
        undecided = [f.claim for f in findings.values() if f.verdict == "undecided" and f.effects]
        if not undecided:
            break
        tasks = {claim.id.replace("-", " "): setup.seeded(needed(claim, records), seeds) for claim in undecided}
        new = {name: [task for task in each if task not in records.runs] for name, each in tasks.items()}
        records.runs.update((run.task, run) for run in perform(new, seeds))
        findings |= {claim.id: judge(claim, records.first(seeds)) for claim in undecided}
    return records, list(findings.values())
